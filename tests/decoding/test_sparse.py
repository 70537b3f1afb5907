"""What a sparse method of a model takes from its own decode steps where the weights are random."""

import pytest
import torch

from suite.decoding.sparse import SparseMethod
from suite.decoding.step import DecodeModel
from tests.decoding.test_step import build


@pytest.mark.parametrize(("name", "quantity"), [("m-countdown-cw", "act"), ("chess", "up")])
def test_moments_are_mean_squares_over_dense_steps(name, quantity):
    decode = DecodeModel(build("llama"), 64)
    decode.prefill(torch.arange(3, 19)[None])
    start = int(decode.token), int(decode.position)
    seen = [[], []]

    def dense(layer, x, block):
        made = decode.mlps[layer].activations(x)
        seen[layer].append(getattr(made, quantity)[0].double().square())
        return decode.mlps[layer].down(made.product)

    for _ in range(12):
        decode.step(dense)
    method = SparseMethod(decode, name)
    for sparsity in (0.5, 0.9):  # one fit serves all sparsities
        method.calibrate(sparsity, start)
        for layer, known in enumerate(method.calibrated):
            expected = torch.stack(seen[layer]).mean(0).float()
            torch.testing.assert_close(known.moments[quantity], expected, rtol=1e-5, atol=0)
        vectors = sum(4 * mlp.d_ff for mlp in decode.mlps)
        copies = sum(mlp.weights()[2].numel() * 4 for mlp in decode.mlps)
        assert method.extra_bytes == vectors + copies


def test_a_set_of_the_prompt_is_of_all_its_tokens():
    decode, ids = DecodeModel(build("llama"), 64), torch.arange(3, 19)[None]
    expected, handles = [], []
    for mlp in decode.mlps:
        hook = mlp.module.down_proj.register_forward_pre_hook(lambda _m, args: expected.append(args[0][0].double()))
        handles.append(hook)
    decode.prefill(ids)
    for handle in handles:
        handle.remove()
    method = SparseMethod(decode, "griffin", prompt=ids)
    method.calibrate(0.75, (int(decode.token), int(decode.position)))
    kernels = method.kernels()
    for layer, v in enumerate(expected):
        sums = (v / v.norm(dim=-1, keepdim=True)).square().sum(0)
        assert kernels.active(layer).tolist() == sums.topk(12).indices.sort().values.tolist()
    assert not decode.mlps[0].module._forward_pre_hooks
