"""Speed cases: expansion, grouping, bytes and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from suite import schema
from suite.decoding.shapes import SHAPES
from suite.errors import InputError
from suite.speed.bench import run_group
from suite.speed.case import needed_bytes
from suite.speed.expand import default_threads, make_cases

MIB = 2.0**20


def test_shapes_are_the_papers():
    sizes = {name: (s.d_model, s.d_ff, s.activation) for name, s in SHAPES.items()}
    assert sizes == {
        "embedded": (576, 1536, "silu"),
        "llama-3.1-8b": (4096, 14336, "silu"),
        "gemma-2-9b": (3584, 14336, "gelu_tanh"),
        "qwen2.5-14b": (5120, 13824, "silu"),
        "phi-4": (5120, 17920, "silu"),
    }


def test_a_block_expands_to_one_dense_case_and_every_method_at_every_sparsity():
    cases = make_cases(["embedded", "phi-4"], ["dense", "cats", "m-countdown", "given"], [0.5, 0.9])
    assert len(cases) == 2 * (1 + 3 * 2)
    assert [c.model_shape for c in cases] == ["embedded"] * 7 + ["phi-4"] * 7
    assert len({c.group for c in cases}) == 2
    dense = [c for c in cases if c.method == "dense"]
    assert [(c.backend, c.mode, c.sparsity) for c in dense] == [("torch", "none", 0.0)] * 2
    assert {c.threads for c in cases} == {default_threads()}
    assert {c.method: c.mode for c in cases} == {
        "dense": "none",
        "cats": "practical",
        "m-countdown": "practical",
        "given": "ideal",
    }


def test_cuda_cases_are_groups_of_their_own_with_their_own_clock():
    cases = make_cases(
        ["embedded"],
        ["dense", "given"],
        [0.9],
        backends=["torch", "numba-cpu", "numba-cuda"],
        clocks=["graph", "event"],
    )
    by_device = {d: [c for c in cases if c.device == d] for d in ("cpu", "cuda")}
    assert {c.clock for c in by_device["cpu"]} == {"wall"}
    assert sorted(c.clock for c in by_device["cuda"]) == ["event", "event", "graph", "graph"]
    assert len({c.group for c in cases}) == 2


def test_compile_is_a_variant_of_dense_in_a_graph_alone():
    cases = make_cases(
        ["phi-4"], ["dense", "cats"], [0.5], backends=["torch", "numba-cuda"], variants=["eager", "compile"],
        clocks=["graph", "event"],
    )  # fmt: skip
    assert [(c.method, c.clock) for c in cases if c.variant == "compile"] == [("dense", "graph")]
    assert len(cases) == 5


def test_key_fields_tell_cases_apart():
    cases = make_cases(["embedded", "phi-4"], ["dense", "cats", "given"], [0.5, 0.9])
    cases += make_cases(["embedded"], ["dense", "given"], [0.5, 0.9], level="op")
    assert len({str(sorted(c.key_fields().items(), key=str)) for c in cases}) == len(cases)


@pytest.mark.parametrize(
    ("method", "level", "realised", "weights"),
    [
        ("dense", "layer", 0.0, 3.0),
        ("cats", "layer", 0.9, 1.2),
        ("m-countdown", "layer", 0.5, 2.0),
        ("given", "layer", 0.9, 0.3),
        ("given", "op", 0.75, 0.25),
        ("dense", "op", 0.0, 1.0),
    ],
)
def test_needed_bytes(method, level, realised, weights):
    (case,) = make_cases(["llama-3.1-8b"], [method], [0.5], level=level, backends=["torch", "numba-cpu"])
    assert needed_bytes(case, realised) == pytest.approx(weights * 4096 * 14336 * 4)


def test_needed_bytes_of_a_predictor():
    case = make_cases(["llama-3.1-8b"], ["d-countdown"], [0.9], backends=["numba-cuda"], dtypes=["bfloat16"])[0]
    assert case.rank == 512
    assert needed_bytes(case, 0.9) == pytest.approx((0.3 * 4096 * 14336 + 512 * (4096 + 14336)) * 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["llama"], ["dense"], [0.5]), {}, "unknown shape 'llama'"),
        ((["phi4"], ["dense"], [0.5]), {}, "did you mean 'phi-4'"),
        ((["phi-4"], ["m-count"], [0.5]), {}, "did you mean 'm-countdown'"),
        ((["phi-4"], ["given"], [1.0]), {}, r"sparsity 1.0 of a speed case: must be a number in \[0, 1\)"),
        ((["phi-4"], ["given"], [True]), {}, "sparsity True"),
        ((["phi-4"], ["given"], [0.5, 0.5]), {}, "named twice"),
        ((["phi-4"], ["given"], [0.5]), {"level": "model"}, "unknown speed level 'model'"),
        ((["phi-4"], ["given"], [0.5]), {"backends": ["cuda"]}, "unknown speed backend 'cuda'; known: torch"),
        (
            (["embedded"], [("md-countdown", {"rank": 577})], [0.5]),
            {},
            "rank 577 of method md-countdown is above d_model",
        ),
        ((["embedded"], [("md-countdown", {"rank": 0})], [0.5]), {}, "rank 0 of method md-countdown"),
        ((["embedded"], [("md-countdown", {"ranks": 1})], [0.5]), {}, "no parameter 'ranks'; did you mean 'rank'"),
        ((["embedded"], [("md-countdown", {"exact": "auto"})], [0.5]), {}, "exact auto of method md-countdown: no fit"),
        ((["phi-4"], [("md-countdown", {"exact": "auto"})], [0.5]), {"level": "decode"}, "give up or gate"),
        ((["embedded"], [("md-countdown", {"predictor_input": "block"})], [0.5]), {}, "use level decode"),
        ((["embedded"], ["d-countdown"], [0.5]), {"predictor_inputs": ["block"]}, "use level decode"),
        (
            (["embedded"], ["d-countdown"], [0.5]),
            {"level": "decode", "predictor_inputs": ["mlp", "block"]},
            "predictor_inputs block of a speed block with predictors low-rank: only gated ones read it; name gated too",
        ),
        (
            (["embedded"], ["d-countdown", "dejavu"], [0.5]),
            {"predictors": ["gated"]},
            "predictors gated of a speed block: method dejavu has no such predictor; name low-rank too",
        ),
        ((["embedded"], ["d-countdown"], [0.5]), {"predictors": ["gate"]}, "unknown speed predictor 'gate'; did you"),
        ((["embedded"], [("given", {"rank": 1})], [0.5]), {}, "'given' of a speed case has no parameters"),
        ((["phi-4"], ["given"], [0.5]), {"threads": [10**6]}, "threads 1000000"),
        ((["phi-4"], ["given"], [0.5]), {"threads": ["some"]}, "threads 'some'"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(InputError, match=message):
        make_cases(*arguments, **options)


def test_cases_of_two_groups_are_refused():
    with pytest.raises(InputError, match="2 groups"):
        run_group(make_cases(["embedded", "phi-4"], ["dense"], [0.5]))


def test_without_a_gpu_cuda_rows_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cases = make_cases(["embedded"], ["dense", "m-countdown"], [0.5, 0.9], backends=["torch", "numba-cuda"])
    rows = run_group(cases)
    assert [row["status"] for row in rows] == ["skipped"] * 3
    for case, row in zip(cases, rows, strict=True):
        assert "no CUDA device" in row["reason"]
        assert row["method"] == case.method
        assert row["latency_us_median"] is None
        assert ["run_id", "cell_id", *row] == [c for c in schema.SPEED.names if c in ("run_id", "cell_id")] + list(row)
        assert set(row) == set(schema.SPEED.names) - {"run_id", "cell_id"}


def test_expanding_cases_loads_neither_torch_nor_numba():
    code = (
        "import sys; from suite.speed.expand import make_cases; make_cases(['phi-4'], ['dense', 'cats', 'given'], [.5]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
