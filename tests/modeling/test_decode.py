"""Generation on the kernels equals masked generation: every architecture, cache, padding, sampling; and what is left behind."""

import warnings

import pytest
import torch

from suite.modeling import decode_layers
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method
from tests.conftest import CONFIGS, D_FF, END, PAD, decode_method, decode_state, tiny_model
from tests.speed import cuda_stand_in

METHODS = [("cats", ""), ("m-countdown", ""), ("chess", ""), ("m-countdown-cw", "")]
METHODS += [("d-countdown", kind) for kind in ("low-rank", "ternary", "gated", "gated block")]
METHODS += [("md-countdown", kind) for kind in ("up mlp", "gate mlp", "up block", "gate block")]
FIXED = [("griffin", ""), ("static", "")]
LENGTH = 6


def prompt(n_tokens=5, rows=1, seed=2):
    return torch.randint(3, 64, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **options):
    defaults = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LENGTH, "do_sample": False}
    fixed = {"suppress_tokens": [PAD, END], "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        out = model.generate(ids, **(defaults | fixed | options))
    return out.sequences, torch.stack(out.logits)


def both(model, name, kind, *prompts, scope="paper", **options):
    method, state, found = decode_method(name, kind), decode_state(name, kind, model), {}
    for backend in ("masked", "numba"):
        with attach(model, method, state, scope=scope, backend=backend) as attached:
            found[backend] = [generate(model, ids, **options) for ids in prompts], attached.sparsity()
    return found["masked"], found["numba"]


def assert_equal(masked, numba):
    for (tokens, logits), (own_tokens, own_logits) in zip(masked[0], numba[0], strict=True):
        assert torch.equal(tokens, own_tokens)
        # 2 layers of fp32 sums of up to 48 terms; logits of up to about 10
        torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-4)
        assert not torch.equal(own_logits[1:], logits[1:])  # the kernels ran
    assert numba[1] == masked[1]
    assert 0.05 < masked[1][0].sparsity_realized < 0.95


@pytest.mark.parametrize(
    ("name", "kind", "cache"),
    [(*one, None) for one in METHODS + FIXED] + [(*one, "static") for one in METHODS if "block" not in one[1]],
)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_generates_what_masked_generates(architecture, name, kind, cache):
    """Two prompts of different length in one block."""
    model = tiny_model(architecture)
    masked, numba = both(model, name, kind, prompt(), prompt(8, seed=4), cache_implementation=cache)
    assert_equal(masked, numba)
    assert masked[1][0].n_tokens == 2 * (LENGTH - 1)  # the first new token comes from the prefill


@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_left_padding_and_the_scope_all(name, kind, llama):
    ids = prompt(8)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, PAD
    masked, numba = both(llama, name, kind, ids, scope="all", attention_mask=mask)
    assert_equal(masked, numba)
    assert masked[1][0].n_tokens == 5 + LENGTH - 1


@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_sampling_with_a_seed(name, kind, llama):
    method, state, found = decode_method(name, kind), decode_state(name, kind), []
    for backend in ("masked", "numba"):
        torch.manual_seed(3)
        with attach(llama, method, state, scope="paper", backend=backend):
            found.append(generate(llama, prompt(), do_sample=True, temperature=0.7)[0])
    assert torch.equal(*found)


def test_an_exception_inside_leaves_block_and_model_right(llama):
    method, state, ids = get_method("m-countdown", sparsity=0.5), decode_state("m-countdown"), prompt()
    dense = generate(llama, ids)
    with attach(llama, method, state, scope="paper", backend="numba") as attached:
        before = generate(llama, ids)
        counted = attached.sparsity()
        handle = llama.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), torch.inference_mode():
            llama(input_ids=ids[:, :1])
        handle.remove()
        assert attached.sparsity() == counted  # half a pass counts for nothing
        after = generate(llama, ids)
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, generate(llama, ids), dense))  # detached: bit for bit


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize(("name", "kind"), FIXED)
def test_rows_of_a_batch_have_sets_of_their_own(name, kind, options, llama):
    """Three prompts, two of them padded, side by side and then others; a new prompt gathers anew."""
    found = []
    for seed in (2, 3):
        ids = prompt(8, rows=3, seed=seed)
        mask = torch.ones_like(ids)
        mask[1, :3], mask[2, :5] = 0, 0
        found.append((ids * mask, mask))
    method, logits = get_method(name, sparsity=0.84), {}  # six rows, with two beams, are the most
    for backend in ("masked", "numba"):
        with attach(llama, method, scope="paper", backend=backend) as attached:
            logits[backend] = [generate(llama, ids, attention_mask=mask, **options)[1] for ids, mask in found]
            logits[backend].append(generate(llama, prompt(8, seed=5))[1])
            assert attached.realised == pytest.approx(1 - 8 / D_FF)
    for masked, numba in zip(*logits.values(), strict=True):
        torch.testing.assert_close(numba, masked, rtol=1e-4, atol=1e-4)
        assert not torch.equal(numba[1:], masked[1:])


def test_several_tokens_after_a_prompt_are_masked_by_its_set(llama):
    """All of them in scope, as a step's are: only a step has a token a row."""
    found, ids = [], prompt(7)
    for backend in ("masked", "numba"):
        with attach(llama, get_method("griffin", sparsity=0.7), scope="paper", backend=backend), torch.inference_mode():
            cache = llama(input_ids=ids[:, :4]).past_key_values
            found.append(llama(input_ids=ids[:, 4:], past_key_values=cache).logits)
    assert torch.equal(*found)


def test_a_row_without_a_prompt_stays_dense_beside_others(llama):
    """Its row of the gathered weights is as long as the longest, all of it in use."""
    ids, mask = prompt(4, rows=2), torch.ones(2, 5, dtype=torch.int64)
    mask[1, :4] = 0
    step, found = prompt(1, rows=2, seed=9), []
    for backend in ("masked", "numba"):
        with attach(llama, get_method("griffin", sparsity=0.7), scope="paper", backend=backend) as attached:
            with torch.inference_mode():
                cache = llama(input_ids=ids, attention_mask=mask[:, :4]).past_key_values
                found.append(llama(input_ids=step, attention_mask=mask, past_key_values=cache).logits)
            assert attached.sparsity()[0].sparsity_realized == pytest.approx((1 - 15 / D_FF) / 2)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(*found)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {}], ids=["beam", "batch"])
def test_wider_steps_are_masked_and_said_once(options, llama):
    ids = prompt(rows=1 if options else 2)
    method, state, found = get_method("m-countdown", sparsity=0.5), decode_state("m-countdown"), []
    for backend in ("masked", "numba"):
        with (
            warnings.catch_warnings(record=True) as said,
            attach(llama, method, state, scope="paper", backend=backend) as attached,
        ):
            warnings.simplefilter("always")
            found.append((generate(llama, ids, **options)[0], attached.sparsity()))
            generate(llama, ids, **options)
        lines = [str(w.message) for w in said if "decode step" in str(w.message)]
        assert len(lines) == (backend == "numba")
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_finished_row_is_dense_and_not_counted(llama):
    method, state = get_method("m-countdown", sparsity=0.5), decode_state("m-countdown")

    def step():
        cache = llama(input_ids=prompt()).past_key_values
        return llama(input_ids=torch.tensor([[END]]), past_key_values=cache).logits

    with torch.inference_mode():
        dense = step()
        with attach(llama, method, state, scope="paper", backend="numba") as attached:
            assert torch.equal(step(), dense)
            assert attached.sparsity()[0].n_tokens == 0


def test_generate_does_not_compile_attached_passes(llama):
    """A static cache on a GPU makes it compile the forward pass, which would freeze hooks and counters."""
    before = llama.generation_config.disable_compile
    with attach(llama, get_method("m-countdown", sparsity=0.5), decode_state("m-countdown")):
        assert llama.generation_config.disable_compile
    assert llama.generation_config.disable_compile == before


@pytest.mark.parametrize("kind", ["up mlp", "gate mlp", "up block", "gate block"])
def test_cuda_layers_get_the_low_rank_or_factors_made_by_torch(kind, llama, monkeypatch):
    """Played by the CPU: a layer whose low rank reads the block's input gets the factors of each token in its own memory."""
    layers = pytest.importorskip("kernels_numba.gpu.host.layers")
    seen = []

    class Layer(cuda_stand_in.Kernel):
        def __init__(self, *weights, deterministic, **options):
            super().__init__(*weights, **options)
            seen.append(options)

        def __call__(self, x):
            return super().__call__(x, torch.empty_like(x))

    monkeypatch.setattr(layers, "ThresholdLayer", Layer)
    method, state = decode_method("md-countdown", kind), decode_state("md-countdown", kind)
    known, mlps, threshold = state.calibrated(torch.device("cpu")), find_gated_mlps(llama), 0.5
    kernels = decode_layers._cuda_choosing(mlps, method, [threshold] * 2, known, deterministic=False)
    of_block = kind.endswith("block")
    assert kernels.most == (1 if of_block else Layer.launch_tokens)
    assert [("low_rank" in one, one["scale"] is not None) for one in seen] == 2 * [(not of_block, of_block)]
    x, block = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(3)).unbind()
    for mlp in mlps:
        made = mlp.activations(x, block=block, calibrated=known[mlp.layer])
        keep = method.score(made) >= threshold
        assert 0 < keep.sum() < D_FF
        with torch.no_grad():
            expected = mlp.down(made.product * keep)
        torch.testing.assert_close(kernels.run(mlp.layer, x, block), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(kernels.active(mlp.layer), keep[0].nonzero()[:, 0])
    sizes = sum(part.numel() for one in known for factor in one.factors.values() for part in vars(factor).values())
    assert sum(part.numel() for part in kernels.copies) == of_block * sizes
