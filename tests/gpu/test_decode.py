"""Tiny models that generate with the CUDA kernels, and the decode loop in a graph, against the masked computation."""

from __future__ import annotations

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from suite.decoding.graphs import captured
from suite.decoding.sparse import SparseMethod
from suite.decoding.step import DecodeModel
from suite.modeling.attach import attach
from suite.speed.decode_check import check, check_dense
from tests.conftest import CONFIGS, decode_method, decode_state, tiny_model

METHODS = [("cats", ""), ("m-countdown", ""), ("d-countdown", "low-rank"), ("d-countdown", "ternary")]
SCALED = ["m-countdown-cw", "chess"]  # a factor a neuron
METHODS += [(name, "") for name in (*SCALED, "griffin", "static")]
METHODS += [("md-countdown", kind) for kind in ("up mlp", "gate mlp", "up block", "gate block")]
METHODS += [("d-countdown", "gated"), ("d-countdown", "gated block"), ("dejavu-abs", "gated")]


def generate(model, rows, **options):
    ids = torch.randint(3, 64, (rows, 6), generator=torch.Generator().manual_seed(3)).cuda()
    fixed = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "suppress_tokens": [0, 1]}
    with torch.inference_mode():
        out = model.generate(ids, do_sample=False, output_logits=True, return_dict_in_generate=True, **fixed, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("name", "kind"), METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_generates_what_masked_generates(architecture, name, kind, rows, cache):
    model = tiny_model(architecture).cuda()
    try:
        dense = generate(model, rows)
        found = {}
        for backend in ("masked", "numba"):
            method, state = decode_method(name, kind), decode_state(name, kind, model)
            with attach(model, method, state, scope="paper", backend=backend) as attached:
                found[backend] = *generate(model, rows, cache_implementation=cache), attached.sparsity()
        masked, numba = found["masked"], found["numba"]
        assert torch.equal(masked[0], numba[0])
        torch.testing.assert_close(numba[1], masked[1], rtol=1e-3, atol=1e-3)
        assert numba[2] == masked[2]
        assert all(map(torch.equal, generate(model, rows), dense))
    finally:
        model.cpu()


LOW_RANK = [
    {"rank": 16, "exact": exact, "predictor_input": read} for exact in ("up", "gate") for read in ("mlp", "block")
]


@pytest.mark.parametrize(
    ("name", "params"),
    [(name, {}) for name in ("m-countdown", "d-countdown", *SCALED)] + [("md-countdown", one) for one in LOW_RANK],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2", "phi3"])
def test_graph_of_a_step(architecture, name, params):
    """Replays after the cache moved, for a second prompt and another length, equal eager steps token by token."""
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](**sizes), dtype=torch.bfloat16)
    decode = DecodeModel(model.eval(), 300)
    method = SparseMethod(decode, name, 64 if name == "d-countdown" else None, 0, params=params)
    graph = None
    for n_tokens in (40, 11, 270):
        prompt = torch.randint(0, 256, (1, n_tokens), device="cuda")
        decode.prefill(prompt)
        start = int(decode.token), int(decode.position)
        assert not check_dense(decode, prompt, start).reason
        if graph is None:
            method.calibrate(0.5, start)
            kernels = method.kernels()
            for layer in kernels.layers:
                layer.change_plan(deterministic=True)  # in another order of sums near ties may turn out otherwise
            graph = captured(lambda run=kernels.run: decode.step(run))
        assert not check(decode, method, kernels, start, real=False).reason
        runs = []
        for step in (graph.replay, lambda: decode.step(kernels.run)):
            decode.rewind(*start)
            tokens = []
            for _ in range(12):
                step()
                tokens.append(int(decode.token))
            runs.append(tokens)
        assert runs[0] == runs[1]
