"""The selection of the ideal modes on a GPU against the same one on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from suite.methods.base import select_top_k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d_ff", [1, 48, 1536, 14336])
def test_equals_the_cpu(dtype, d_ff):
    score = torch.randn(65, d_ff, generator=torch.Generator().manual_seed(d_ff)).to(dtype)
    score[::3] = (score[::3] * 2).round() / 2  # ties
    score[5, ::7] = float("nan")
    score[6, ::7] = float("inf")
    for k in {1, max(1, d_ff // 5), d_ff}:
        torch.testing.assert_close(select_top_k(score.cuda(), k).cpu(), select_top_k(score, k), rtol=0, atol=0)


def test_other_streams_wait_their_turn():
    score = torch.zeros(4096, 1536, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            score = score + torch.randn_like(score)
        keep = select_top_k(score, 300)
    stream.synchronize()
    assert keep.sum(-1).unique().tolist() == [300]
    assert torch.equal(keep.cpu(), select_top_k(score.cpu(), 300))
