"""Attach from outside: scopes, restore, refusals, generation."""

import pytest
import torch
import transformers

from suite.errors import InputError
from suite.methods.base import kept_count, select_top_k
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method
from tests.conftest import D_FF, END, PAD, State, logits, tiny_model

HALF = get_method("d-countdown", sparsity=0.5)


def counted(attached):
    return [layer.n_tokens for layer in attached.sparsity()]


def snapshot(model):
    modules = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return {name: set(attributes) for name, attributes in modules.items()}, hooks


def test_masked_output_is_the_formula(model, ids):
    """First layer, by hand: v with all but the top k set to 0, through the model's own down projection."""
    mlp = find_gated_mlps(model)[0]
    seen = []
    handle = mlp.module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with attach(model, HALF):
        logits(model, ids)
    handle.remove()
    x, y = seen[0]
    with torch.inference_mode():
        gate, up = mlp.gate_up(x)
        v = (mlp.act(gate) * up).flatten(0, 1)
        keep = select_top_k(v.abs(), kept_count(D_FF, 0.5))
        assert torch.equal(mlp.down((v * keep).view(2, 12, -1)), y)


def test_restores_bit_for_bit_also_by_exception(model, ids):
    dense, before = logits(model, ids), snapshot(model)
    with attach(model, HALF):
        assert not torch.equal(logits(model, ids), dense)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), attach(model, HALF):
        raise ZeroDivisionError
    with pytest.raises(IndexError), attach(model, HALF):
        logits(model, torch.full((1, 3), 10_000))  # fails inside the forward pass
    assert snapshot(model) == before
    assert torch.equal(logits(model, ids), dense)


def test_a_forward_set_by_somebody_else_survives(ids):
    model = tiny_model("qwen3")
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x)
    shadow = mlp.forward
    try:
        with attach(model, HALF):
            logits(model, ids)
        assert mlp.__dict__["forward"] is shadow
    finally:
        del mlp.forward


def test_nesting_is_refused_and_leaves_the_outer_alone(llama, ids):
    with attach(llama, HALF) as attached:
        for inner in (llama, llama.model):
            with pytest.raises(InputError, match="nesting"), attach(inner, HALF):
                pass
        logits(llama, ids)
        assert counted(attached) == [24, 24]
    with attach(llama, HALF):
        pass


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_tokens_out_of_scope_are_bit_equal_to_dense(architecture, ids):
    model = tiny_model(architecture)
    dense = logits(model, ids)
    for columns in (torch.arange(7, 12), torch.tensor([8, 11, 9])):  # one run of tokens; scattered ones
        rows = torch.ones_like(columns)
        with attach(model, HALF) as attached, attached.positions(rows, columns, rows, columns):
            sparse = logits(model, ids)
        first = int(columns.min())
        assert torch.equal(sparse[0], dense[0])
        assert torch.equal(sparse[1, :first], dense[1, :first])
        assert not torch.equal(sparse[1, first], dense[1, first])
        assert counted(attached) == [len(columns)] * 2


def test_explicit_positions_override_the_scope_and_end_with_their_block(llama, ids):
    dense, empty = logits(llama, ids), torch.empty(0, dtype=torch.int64)
    with attach(llama, HALF, scope="paper") as attached:
        with attached.positions(empty, empty, empty, empty):
            assert torch.equal(logits(llama, ids), dense)
        one = torch.tensor([0])
        with attached.positions(one, one, one, one):
            assert not torch.equal(logits(llama, ids), dense)
        assert torch.equal(logits(llama, ids), dense)  # paper: a prefill is dense
        assert counted(attached) == [1, 1]


@pytest.mark.parametrize(("row", "column"), [(2, 0), (0, 12), (-1, 3), (0, -1)])
def test_positions_outside_the_batch_are_refused(llama, ids, row, column):
    row, column = torch.tensor([row]), torch.tensor([column])
    refused = pytest.raises(InputError, match="outside the batch of 2 x 12")
    with attach(llama, HALF) as attached, attached.positions(row, column, row, column), refused:
        logits(llama, ids)


def test_positions_of_unequal_length_are_refused(llama):
    with attach(llama, HALF) as attached, pytest.raises(InputError, match="one length"):
        attached.positions(torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.zeros(2)).__enter__()


def test_scopes_of_a_prefill(llama, ids):
    dense = logits(llama, ids)
    expected = {"all": 24, "paper": 0, "scored": 2}
    for scope, tokens in expected.items():
        with attach(llama, HALF, scope=scope) as attached:
            sparse = logits(llama, ids)
        assert counted(attached) == [tokens] * 2
        if scope != "all":
            assert torch.equal(sparse[:, :-1], dense[:, :-1])
            assert torch.equal(sparse[:, -1], dense[:, -1]) == (scope == "paper")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("scope", ["paper", "scored", "all"])
def test_generation_counts_decode_steps_and_no_padding(model, ids, scope, cache):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    prompt = ids.masked_fill(mask == 0, PAD)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    options["suppress_tokens"] = [PAD, END]
    with attach(model, HALF, scope=scope) as attached, torch.inference_mode():
        together = model.generate(prompt, attention_mask=mask, **options)[:, 12:]
        steps = 2 * 3  # the first new token comes from the prefill
        assert counted(attached) == [steps + {"paper": 0, "scored": 2, "all": 12 + 7}[scope]] * 2
        alone = model.generate(ids[:1, 5:], attention_mask=mask[:1, 5:], **options)[:, 7:]
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"use_cache": False}])
def test_generation_that_hides_its_prefill_is_refused(llama, ids, options):
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    for scope in ("paper", "scored"):
        with attach(llama, HALF, scope=scope), pytest.raises(InputError, match=next(iter(options))) as refused:
            llama.generate(ids, **settings, **options)
        assert "\n" not in str(refused.value)
        config = transformers.GenerationConfig(**options)
        with attach(llama, HALF, scope=scope), pytest.raises(InputError, match=next(iter(options))):
            llama.generate(ids, config, **settings)
    with attach(llama, HALF), torch.inference_mode():  # all tokens are in scope, whatever the passes are
        llama.generate(ids, **settings, **options)
    assert "generate" not in llama.__dict__


def test_finished_rows_are_not_counted(llama):
    """One row ends at once: it is fed its end token, then padding, and neither counts."""
    prompt = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(5))

    def force(_batch, scores):
        step = force.step = force.step + 1
        scores = scores.clone()
        scores[:, [PAD, END]] = -torch.inf
        if step == 1:
            scores[0] = -torch.inf
            scores[0, END] = 0
        return scores

    force.step = 0
    with attach(llama, HALF, scope="paper") as attached, torch.inference_mode():
        out = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, logits_processor=[force]
        )
    assert out[0, 6:].tolist() == [END, PAD, PAD, PAD, PAD]
    assert counted(attached) == [4, 4]


def test_reset_and_realised_before_any_token(llama, ids):
    with attach(llama, HALF) as attached:
        assert attached.realised != attached.realised  # NaN: nothing seen
        logits(llama, ids)
        assert attached.realised == 0.5
        attached.reset()
        assert counted(attached) == [0, 0]


def test_gradients_flow_as_through_the_mask(llama, ids):
    with attach(llama, HALF):
        embeddings = llama.get_input_embeddings()(ids).detach().requires_grad_()
        llama(inputs_embeds=embeddings).logits.square().mean().backward()
        graded = llama(input_ids=ids).logits
        assert torch.equal(graded, logits(llama, ids))  # with and without gradients
    assert embeddings.grad.abs().sum() > 0
    llama.zero_grad()


def test_part_of_a_model_is_refused_not_left_dense(llama, ids):
    with attach(llama, HALF), pytest.raises(InputError, match="attach to the model you call"):
        logits(llama.model, ids)


def test_dropped_infinity_becomes_zero():
    """In half precision v can overflow where the score is finite; dropped means not computed."""
    model = tiny_model("llama", torch.float16)
    dropped = torch.arange(6)
    cats = get_method("cats", sparsity=0.5)
    down = model.model.layers[0].mlp.down_proj
    seen = []
    up = model.model.layers[0].mlp.up_proj
    with attach(model, cats):
        handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        inject = up.register_forward_hook(lambda module, args, output: output.fill_(torch.inf))
        logits(model, dropped[None] + 3)
    handle.remove()
    inject.remove()
    v = seen[0].flatten(0, 1)
    assert ((v == 0).sum(-1) == D_FF - kept_count(D_FF, 0.5)).all()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"scope": "everything"}, "unknown scope"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"state": State("cats", 0.5, torch.zeros(2))}, "fit is of cats"),
        ({"state": State("m-countdown", 0.4, torch.zeros(2))}, "sparsity 0.4"),
        ({"state": State("m-countdown", 0.5, torch.zeros(3))}, "3 thresholds, the model 2 layers"),
        ({"state": State("m-countdown", 0.5, torch.zeros(2)), "mode": "ideal"}, "leave one of them out"),
        ({"state": State("m-countdown", 0.5, torch.tensor([0.0, torch.nan]))}, "NaN"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(llama, kwargs, match):
    with pytest.raises(InputError, match=match) as refused:
        attach(llama, get_method("m-countdown", sparsity=0.5), **kwargs).__enter__()
    assert "\n" not in str(refused.value)
    with attach(llama, HALF):  # nothing was left behind
        pass


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("name", ["cats", "m-countdown"])
def test_numba_decodes_what_masked_decodes(name, architecture, ids):
    model, method = tiny_model(architecture), get_method(name, sparsity=0.5)
    state = State(name, 0.5, torch.tensor([0.3, 0.1]))
    found = {}
    for backend in ("masked", "numba", "auto"):
        with attach(model, method, state, scope="paper", backend=backend) as attached, torch.inference_mode():
            cache = model(input_ids=ids[:1, :6], use_cache=True).past_key_values
            steps = [
                model(input_ids=ids[:1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 12)
            ]
            found[backend] = (torch.cat(steps), attached.sparsity())
    masked, numba = found["masked"], found["numba"]
    assert 0.05 < masked[1][0].sparsity_realized < 0.95
    assert numba[1] == masked[1] == found["auto"][1]
    # two layers of sums of up to d_ff terms, of values up to about 10
    torch.testing.assert_close(numba[0], masked[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(numba[0], masked[0])  # the kernel really ran
    torch.testing.assert_close(numba[0], found["auto"][0], rtol=1e-4, atol=1e-4)


def test_numba_is_refused_where_its_kernels_cannot_run(ids):
    half = tiny_model("llama", torch.bfloat16)
    state = State("m-countdown", 0.5, torch.zeros(2))
    own = get_method("tests.contract.third_party:PowerOfUp", sparsity=0.5)
    for model, method, given, match in (
        (half, get_method("m-countdown", sparsity=0.5), state, "float32"),
        (tiny_model("llama"), HALF, None, "mode is ideal"),
        (tiny_model("llama"), own, State("power-of-up", 0.5, torch.zeros(2)), "score of power-of-up"),
    ):
        with pytest.raises(InputError, match=match), attach(model, method, given, backend="numba"):
            pass
        with attach(model, method, given, backend="auto"):
            logits(model, ids[:1, :1])
