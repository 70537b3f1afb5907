"""Cost of evaluating with sparsity against dense, on the embedded model: at most 1.3 times is wanted."""

import itertools
import time

import pytest

from suite import get_method, load_model
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.tasks import resolve_task
from suite.registry import METHODS

TASKS = [resolve_task("pack_grammar", limit=16), resolve_task("decode_perplexity", limit=4)]


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(load_model("embedded"), batch_size=8)


def _run(evaluator, method, mode):
    start = time.perf_counter()
    for task in TASKS:
        evaluator.run(task, method, mode=mode)
    return time.perf_counter() - start


@pytest.mark.embedded
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_sparse_evaluation_against_dense(benchmark, evaluator, name):
    """Dense and sparse rounds alternate, so that both see the same machine; the ratio is in extra_info."""
    dense, sparse = get_method("dense"), get_method(name, sparsity=0.8)
    _run(evaluator, dense, "none")  # builds the tasks and the dense reference
    times = [(_run(evaluator, dense, "none"), _run(evaluator, sparse, "ideal")) for _ in range(3)]
    ratios = sorted(s / d for d, s in times)
    benchmark.extra_info["ratio_to_dense"] = ratios[len(ratios) // 2]
    benchmark.extra_info["dense_s"] = min(itertools.chain(d for d, _ in times))
    benchmark.pedantic(_run, (evaluator, sparse, "ideal"), rounds=1)
