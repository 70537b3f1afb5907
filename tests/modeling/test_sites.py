"""Methods at sites other than neurons, against masks laid by hooks and sorting in plain torch."""

import dataclasses
import re
from contextlib import ExitStack

import pytest
import torch

from suite.errors import InputError
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from tests.conftest import D_FF, D_MODEL, WIDTH, State, activations, logits, tiny_model
from tests.modeling.site_methods import Allocated, Chess, Griffin, Peeking, Static, Teal, TealInput, Undeclared, Wina


def largest(score, k):
    """By sorting: the k largest entries of each token; random fp32 scores do not tie."""
    order = score.argsort(-1, descending=True).argsort(-1)
    return order < k


def masked_by_hand(model, ids, sites, keep, in_scope=slice(None)):
    """Logits with the inputs of projections masked by hooks, and how many entries of each site and layer were kept.

    keep : callable (site, layer, vector) -> bool
    """
    kept = {}

    def hook(site, layer):
        def mask(_module, args):
            x = args[0].clone()
            found = keep(site, layer, x[in_scope])
            kept[site, layer] = found.sum().item()
            x[in_scope] = torch.where(found, x[in_scope], 0)
            return (x,)

        return mask

    with ExitStack() as undo:
        for layer, block in enumerate(model.model.layers):
            parts = dict(block.mlp.named_children())
            places = {"mlp.input": ["gate_proj", "up_proj", "gate_up_proj"], "mlp.neurons": ["down_proj"]}
            for site in sites:
                for name in places[site]:
                    if name in parts:
                        undo.callback(parts[name].register_forward_pre_hook(hook(site, layer)).remove)
        return logits(model, ids), kept


def norms_by_hand(model, layer):
    weights = {name: parameter.detach() for name, parameter in model.model.layers[layer].mlp.named_parameters()}
    if "gate_up_proj.weight" in weights:
        both = weights["gate_up_proj.weight"]
    else:
        both = torch.cat([weights["gate_proj.weight"], weights["up_proj.weight"]])
    return {"mlp.input": both.norm(dim=0), "mlp.neurons": weights["down_proj.weight"].norm(dim=0)}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("cls", [Teal, TealInput, Wina])
def test_ideal_keeps_the_k_largest_of_each_input(cls, architecture, ids):
    model, method = tiny_model(architecture), cls(sparsity=0.6)
    before = logits(model, ids)
    counts = {"mlp.input": D_MODEL - 19, "mlp.neurons": D_FF - 28}

    def keep(site, layer, x):
        return largest(x.abs() * (norms_by_hand(model, layer)[site] if cls is Wina else 1), counts[site])

    by_hand, _ = masked_by_hand(model, ids, method.sites, keep)
    with attach(model, method) as attached:
        ours = logits(model, ids)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)
    rows = [(row.layer, row.site, row.n_tokens) for row in attached.sparsity()]
    assert rows == [(layer, site, 24) for layer in range(2) for site in method.sites]
    for row in attached.sparsity():
        assert row.sparsity_realized == pytest.approx(1 - counts[row.site] / WIDTH[row.site], abs=1e-12)
    assert torch.equal(logits(model, ids), before)


def test_a_method_allocates_its_sparsity(ids):
    with attach(tiny_model("llama"), Allocated(sparsity=0.5)) as attached:
        logits(tiny_model("llama"), ids)
    shares = [8 / 32, 24 / 48, 4 / 32, 19 / 48]  # of .25 and .5, then of .15 and .4, in whole entries
    assert [row.sparsity_realized for row in attached.sparsity()] == pytest.approx(shares)


def test_only_tokens_in_scope_are_masked_and_counted(ids):
    model, method = tiny_model("llama"), TealInput(sparsity=0.5)
    rows, columns = torch.ones(5, dtype=torch.int64), torch.tensor([4, 6, 7, 9, 11])
    by_hand, _ = masked_by_hand(
        model, ids, method.sites, lambda site, layer, x: largest(x.abs(), D_MODEL // 2), (rows, columns)
    )
    with attach(model, method) as attached, attached.positions(rows, columns, rows, columns):
        ours = logits(model, ids)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    dense = logits(model, ids)
    assert torch.equal(ours[0], dense[0])
    assert torch.equal(ours[1, :4], dense[1, :4])
    assert [row.n_tokens for row in attached.sparsity()] == [5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_practical_drops_what_is_below_the_threshold_of_its_site_and_layer(dtype, ids):
    model, method = tiny_model("qwen2", dtype), Teal(sparsity=0.5)
    thresholds = torch.tensor([0.5, 0.7, 0.02, 0.3])  # the input's of both layers, then the neurons'
    place = {("mlp.input", 0): 0, ("mlp.input", 1): 1, ("mlp.neurons", 0): 2, ("mlp.neurons", 1): 3}
    by_hand, kept = masked_by_hand(
        model, ids, method.sites, lambda site, layer, x: x.abs().float() >= thresholds[place[site, layer]]
    )
    with attach(model, method, State("teal", 0.5, thresholds)) as attached:
        ours = logits(model, ids)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)
    for row in attached.sparsity():
        assert row.threshold == pytest.approx(float(thresholds[place[row.site, row.layer]]))
        assert row.sparsity_realized == pytest.approx(1 - kept[row.site, row.layer] / (24 * WIDTH[row.site]))
        assert 0 < row.sparsity_realized < 1
    assert attached.realised == pytest.approx(sum(row.sparsity_realized for row in attached.sparsity()) / 4)
    with pytest.raises(InputError, match="2 thresholds, the model 2 layers of 2 sites"):
        attach(model, method, State("teal", 0.5, torch.zeros(2))).__enter__()


def test_the_input_of_somebody_else_stays(ids):
    """The norm's output is masked in a copy."""
    model, seen = tiny_model("llama"), []
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with attach(model, TealInput(sparsity=0.9)):
        logits(model, ids)
    handle.remove()
    assert bool((seen[0] != 0).all())


def test_gradients_flow_as_through_the_mask_of_an_input(llama, ids):
    with attach(llama, Teal(sparsity=0.5)):
        embeddings = llama.get_input_embeddings()(ids).detach().requires_grad_()
        graded = llama(inputs_embeds=embeddings).logits
        graded.square().mean().backward()
        assert torch.equal(graded, logits(llama, ids))
    assert embeddings.grad.abs().sum() > 0
    llama.zero_grad()


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_norms_of_every_projection(architecture):
    mlp = find_gated_mlps(tiny_model(architecture))[1]
    for matrix, weight in zip(("gate", "up", "down"), mlp.weights(), strict=True):
        torch.testing.assert_close(mlp.norm2(matrix, "rows").sqrt(), weight.norm(dim=1))
        torch.testing.assert_close(mlp.norm2(matrix, "columns").sqrt(), weight.norm(dim=0))


def test_norms_are_made_once_a_layer_and_attach(llama, ids, monkeypatch):
    calls = []
    norm2 = type(find_gated_mlps(llama)[0]).norm2

    def counted(self, *key):
        calls.append((self.layer, *key))
        return norm2(self, *key)

    monkeypatch.setattr("suite.modeling.gated_mlp.GatedMLP.norm2", counted)
    with attach(llama, Static(sparsity=0.5)) as attached:
        logits(llama, ids)
        logits(llama, ids)
    assert len(calls) == len(set(calls)) == 6
    assert attached.realised == 0.5


def test_numba_says_that_it_skips_neurons_and_auto_is_masked(llama, ids):
    method, state = TealInput(sparsity=0.5), State("teal-input", 0.5, torch.tensor([0.5, 0.7]))
    with pytest.raises(InputError, match=r"kernels skip neurons, and teal-input masks mlp\.input; use backend masked"):
        attach(llama, method, state, backend="numba").__enter__()
    with attach(llama, method, state, backend="auto"):
        auto = logits(llama, ids[:1, :1])
    with attach(llama, method, state):
        assert torch.equal(logits(llama, ids[:1, :1]), auto)


def shares_by_hand(model, ids, prompt):
    """Sum over the prompt's tokens of v^2 / norm(v)^2 of every layer, of one row of ids, the model dense."""
    found, handles = [], []
    for mlp in find_gated_mlps(model):
        keep = lambda module, args: found.append(args[0][0, :prompt].clone())  # noqa: E731
        handles.append(mlp.module.down_proj.register_forward_pre_hook(keep))
    logits(model, ids[None])
    for handle in handles:
        handle.remove()
    return [torch.stack([(v / v.norm()) ** 2 for v in rows]).sum(0) for rows in found]


def griffin_by_hand(model, ids, prompt):
    """Logits of one row whose tokens after the prompt use the k neurons that were largest over it."""
    sums = shares_by_hand(model, ids, prompt)
    scope = (slice(None), slice(prompt, None))
    return masked_by_hand(
        model, ids[None], ("mlp.neurons",), lambda site, layer, x: largest(sums[layer].expand_as(x), D_FF // 2), scope
    )[0][0]


def test_prompt_of_the_same_pass(llama, ids):
    """As the evaluator scores: whole sequences, whose tokens in scope follow their prompts."""
    columns = torch.cat([torch.arange(5, 12), torch.arange(8, 12)])
    rows = torch.tensor([0] * 7 + [1] * 4)
    with attach(llama, Griffin(sparsity=0.5)) as attached, attached.positions(rows, columns, rows, columns):
        ours = logits(llama, ids)
    for row, prompt in enumerate((5, 8)):
        torch.testing.assert_close(ours[row], griffin_by_hand(llama, ids[row], prompt), rtol=0, atol=1e-4)
    assert attached.realised == 0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_prompt_of_the_prefill_serves_the_decode_steps(architecture, ids):
    """With left padding, which is not a token of the prompt; a second prefill begins anew."""
    model = tiny_model(architecture)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = ids.masked_fill(mask == 0, 9)  # PAD is embedded as 0, and would add nothing
    with attach(model, Griffin(sparsity=0.5), scope="paper"), torch.inference_mode():
        model(input_ids=ids.flip(1), use_cache=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask[:, :7], "position_ids": positions[:, :7]}
        cache = model(input_ids=padded[:, :7], use_cache=True, **given).past_key_values
        steps = []
        for i in range(7, 12):
            given = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            steps.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True, **given).logits)
    ours = torch.cat(steps, 1)
    for row, start in enumerate((3, 0)):
        by_hand = griffin_by_hand(model, ids[row, start:], 7 - start)[7 - start :]
        torch.testing.assert_close(ours[row], by_hand, rtol=0, atol=2e-4)


def test_an_empty_prompt_keeps_its_row_dense_and_counts_it_so(llama, ids):
    rows = torch.cat([torch.zeros(12), torch.ones(5)]).long()
    columns = torch.cat([torch.arange(12), torch.arange(7, 12)])
    with attach(llama, Griffin(sparsity=0.5)) as attached, attached.positions(rows, columns, rows, columns):
        ours = logits(llama, ids)
    torch.testing.assert_close(ours[0], logits(llama, ids)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], griffin_by_hand(llama, ids[1], 7), rtol=0, atol=1e-4)
    assert [row.n_tokens for row in attached.sparsity()] == [17, 17]
    assert attached.realised == pytest.approx(5 * 0.5 / 17)
    with attach(llama, Griffin(sparsity=0.5), scope="scored") as attached, torch.inference_mode():
        out = llama.generate(ids[:, :1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert attached.realised == 0
    with torch.inference_mode():
        assert torch.equal(out, llama.generate(ids[:, :1], max_new_tokens=5, min_new_tokens=5, do_sample=False))


def test_a_token_without_a_prompt_is_refused(llama, ids):
    with attach(llama, Griffin(sparsity=0.5)), pytest.raises(InputError, match="its prompt: use scope paper or scored"):
        logits(llama, ids)
    with attach(llama, Griffin(sparsity=0.5), scope="paper"), torch.inference_mode():
        cache = llama(input_ids=ids[:, :6], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(InputError, match="1 rows follow the prompts of 2"):
            llama(input_ids=ids[:1, 6:7], past_key_values=cache, use_cache=True)
        cache = llama(input_ids=ids[:1, :6], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(InputError, match="2 rows follow the prompts of 1"):
            llama(input_ids=ids[:, 6:8], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (Peeking(sparsity=0.5), r"at site mlp\.input asks for 'up', which is computed after it"),
        (Undeclared(sparsity=0.5), "layer 0 holds no moments of 'up'"),
        (Chess(sparsity=0.5), "chess needs a fit of its moments"),
    ],
)
def test_what_a_score_cannot_have_is_refused_in_one_line(llama, ids, method, match):
    with pytest.raises(InputError, match=match) as refused, attach(llama, method):
        logits(llama, ids)
    assert "\n" not in str(refused.value)
    bare = dataclasses.replace(activations(), calibrated=None, prompts=None)
    with pytest.raises(InputError, match="needs_prompt"):
        _ = bare.prompt
    with pytest.raises(InputError, match="no factor of 'gate'"):
        bare.factor("gate")


def test_unknown_sites_and_moments_are_refused():
    for changes in ({"sites": ("mlp.inptu",)}, {"moments": ("uup",)}):
        cls = type("Wrong", (Teal,), changes)
        with pytest.raises(InputError, match=re.escape(f"declares {next(iter(changes.values()))[0]!r}; known")):
            cls()
