"""What is dropped and counted on a GPU against the same on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernels_numba.gpu.masking import drop
from suite.methods.base import select_threshold, select_top_k


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


def masked(score, values, rows, alive, k, threshold):
    """By definition: values with what is dropped set to 0, entries kept, and tokens whose scores alone are NaN."""
    keep = select_top_k(score, k) if k else select_threshold(score, threshold)
    alive = torch.ones(len(rows), dtype=torch.bool) if alive is None else alive
    wanted = values.clone()
    wanted[rows] = torch.where(keep | ~alive[:, None], values[rows], 0)
    faults = score.isnan().any(1) & values[rows].isfinite().all(1) & alive
    return wanted, [int(keep[alive].sum()), int(faults.sum()), int(alive.sum())]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    "kinds", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float32)]
)
def test_drops_and_counts_as_the_definition(kinds, gathered, some):
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(40, 2048, generator=draw).to(kinds[0])
    score[::3] = (score[::3] * 2).round() / 2  # ties
    score[5:8, ::7] = float("nan")
    values = torch.randn(50, 2048, generator=draw).to(kinds[1])
    rows = torch.randperm(50, generator=draw)[:40] if gathered else torch.arange(40) + 7
    values[rows[6], 100] = float("inf")
    alive = torch.rand(40, generator=draw) < 0.7 if some else None
    for k, threshold in [(1, 0.0), (400, 0.0), (2048, 0.0), (0, 0.5), (0, float("inf")), (0, -float("inf"))]:
        wanted, counts = masked(score, values, rows, alive, k, threshold)
        found, counters = values.cuda(), torch.zeros(3, dtype=torch.int64, device="cuda")
        given = {"rows": rows.cuda()} if gathered else {"first": 7}
        given |= {} if alive is None else {"alive": alive.cuda()}
        drop(score.cuda(), found, counters, k=k, threshold=threshold, **given)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        assert counters.tolist() == counts


def test_refuses_what_it_cannot_drop():
    score, counters = torch.zeros(2, 8, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=r"values of torch\.float64"):
        drop(score, score.double(), counters, k=1)
    with pytest.raises(ValueError, match="contiguous"):
        drop(score, torch.zeros(8, 2, device="cuda").t(), counters, k=1)
    with pytest.raises(ValueError, match="k=9"):
        drop(score, score.clone(), counters, k=9)
