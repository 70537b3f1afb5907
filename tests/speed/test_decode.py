"""Decode cases on a tiny model: rows, checks that can fail, refusals by one line."""

import itertools
from dataclasses import replace

import pytest
import torch

from suite import schema
from suite.decoding import sparse
from suite.decoding.shapes import SHAPES, Shape, build_model
from suite.decoding.step import DecodeModel
from suite.errors import InputError
from suite.registry import get_method
from suite.speed import decode, decode_check
from suite.speed.bench import run_group
from suite.speed.clock import Rounds
from suite.speed.expand import make_cases
from tests.conftest import D_FF, D_MODEL, decode_state, random_fit
from tests.decoding.test_step import build
from tests.speed import cuda_stand_in

SCALED = ("m-countdown-cw", "chess")  # a factor a neuron
METHODS = ("dense", "cats", "m-countdown", "d-countdown", *SCALED)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(D_MODEL, D_FF, "silu", 2, 9000, "LlamaConfig"))
    monkeypatch.setattr(decode, "build_model", lambda *_: build("llama"))
    monkeypatch.setattr(decode.StepSubject, "rounds", Rounds(2, 2))


def cases(methods=METHODS, sparsities=(0.5,), contexts=(16,), variants=("eager", "generate")):
    options = {"backends": ["torch", "numba-cpu"], "threads": [1], "variants": variants, "contexts": contexts}
    made = make_cases(["tiny"], methods, sparsities, level="decode", **options)
    return [replace(case, rank=8 if case.rank else None) for case in made]


def test_rows_of_every_method(tiny):
    said = []
    rows = run_group(cases(), progress=said.append)
    assert [(row["method"], row["variant"]) for row in rows] == [
        ("dense", "eager"),
        ("dense", "generate"),
        ("cats", "eager"),
        ("m-countdown", "eager"),
        ("d-countdown", "eager"),
        *((name, "eager") for name in SCALED),
    ]
    for row in rows:
        assert set(row) <= {*schema.SPEED.names, "phases", "decode_check", "timings"}
        assert (row["level"], row["status"], row["check"], row["context_tokens"]) == ("decode", "ok", "passed", 16)
        assert row["tokens_per_s"] == pytest.approx(1e6 / row["latency_us_median"])
        assert row["latency_us_q25"] <= row["latency_us_median"] <= row["latency_us_q75"]
    own, sparse = rows[0], rows[2:]
    for row in (own, *sparse):
        assert [phase["phase"] for phase in row["phases"]] == ["attention", "MLP", "head", "rest"]
        assert all(set(phase) == set(schema.PHASES.names) - {"cell_id"} for phase in row["phases"])
    # 2 layers of 3 MLP matrices, q, k, v and o, the head, and keys and values of 16 tokens, 4 bytes each
    weights = 2 * (3 * 32 * 48 + (32 + 16 + 16 + 32) * 32) + 64 * 32 + 2 * 2 * 16 * 16
    assert own["bytes_read_mib"] == pytest.approx(weights * 4 / 2**20)
    for row in sparse:
        assert 0.35 < row["sparsity_realized"] < 0.65
        assert 0 < row["max_rel_error"] < 1e-5
        assert row["mlp_share"] > 0
        assert row["extra_memory_mib"] >= 2 * 32 * 48 * 4 / 2**20
        assert set(row["decode_check"]) == set(schema.DECODE_CHECK.names) - {"cell_id"}
        assert row["decode_check"]["max_error"] == row["max_rel_error"] < row["decode_check"]["bound"]
        assert 0 <= row["decode_check"]["kl_median"] <= row["decode_check"]["kl_max"] < 1e-4
        assert row["decode_check"]["top1_agreement"] == 1
    assert own["decode_check"] is None
    assert sum("equal next tokens" in line for line in said) == 5


@pytest.mark.parametrize("method", ["m-countdown", "d-countdown", *SCALED])
def test_a_fit_decides_what_is_kept(tiny, method):
    """Its thresholds and predictor, whatever the target of the case."""
    case = cases((method,))[0]
    seen = []
    for threshold in (-float("inf"), float("inf")):
        state = replace(decode_state(method), thresholds=torch.full((2,), threshold))
        row = run_group([case], states={case: state})[0]
        assert row["status"] == "ok"
        seen.append(row["sparsity_realized"])
    assert seen == [0, 1]


def spoil(monkeypatch, factor):
    """Multiply what kernels return by ``factor(layer, n)`` in their n-th call, from 1."""
    right = sparse.decode_kernels

    def wrong(*arguments, **named):
        kernels, calls = right(*arguments, **named), itertools.count(1)
        run = kernels.run
        kernels.run = lambda layer, *x: run(layer, *x) * factor(layer, next(calls))
        return kernels

    monkeypatch.setattr(sparse, "decode_kernels", wrong)


@pytest.mark.parametrize("method", ["m-countdown", "d-countdown", *SCALED])
def test_a_wrong_kernel_gets_no_time(tiny, method, monkeypatch):
    spoil(monkeypatch, lambda layer, n: 1.0 if layer == 0 else 1.001)
    row = run_group(cases((method,)))[0]
    assert (row["status"], row["check"], row["latency_us_median"]) == ("failed", "failed", None)
    assert "over the bound" in row["reason"]


def test_what_a_model_amplifies_excuses_single_steps_alone(tiny, monkeypatch):
    """Rounding that changes the logits a lot lets one step be off as far, but not half of them."""
    wrong_at = []
    spoil(monkeypatch, lambda layer, n: 1.001 if n in wrong_at or not wrong_at else 1.0)
    monkeypatch.setattr(decode_check, "_shaken", lambda decode, mlp: lambda *x: 1.5 * mlp(*x))
    row = run_group(cases(("m-countdown",)))[0]
    assert "half of the steps off" in row["reason"]
    wrong_at.append(6)
    row = run_group(cases(("m-countdown",)))[0]
    assert (row["status"], row["check"]) == ("ok", "passed")
    assert row["max_rel_error"] > 1e-5


def test_logits_that_are_not_finite_fail_whatever_the_bound(tiny, monkeypatch):
    spoil(monkeypatch, lambda layer, n: float("nan") if n == 6 else 1.0)
    monkeypatch.setattr(decode_check, "_shaken", lambda decode, mlp: lambda *x: float("nan") * mlp(*x))
    row = run_group(cases(("m-countdown",)))[0]
    assert (row["status"], row["check"], row.get("decode_check")) == ("failed", "failed", None)


def test_a_wrong_step_gets_no_time(tiny, monkeypatch):
    monkeypatch.setattr(decode.DecodeModel, "dense", lambda self, layer, x, block: x)
    row = run_group(cases(("dense",), variants=("eager",)))[0]
    assert (row["status"], row["tokens_per_s"]) == ("failed", None)


def test_contexts_are_cases_of_one_group(tiny):
    made = cases(("dense", "m-countdown"), contexts=(16, 40), variants=("eager",))
    assert len({case.group for case in made}) == 1
    rows = run_group(made)
    assert [row["context_tokens"] for row in rows] == [16, 16, 40, 40]
    assert rows[0]["bytes_read_mib"] < rows[2]["bytes_read_mib"]


def test_out_of_memory_marks_its_context_and_the_others_go_on(tiny, monkeypatch):
    right = decode.StepSubject.prepare

    def prepare(self):
        if self.case.context_tokens == 16:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
        right(self)

    monkeypatch.setattr(decode.StepSubject, "prepare", prepare)
    rows = run_group(cases(("dense",), contexts=(16, 40), variants=("eager",)))
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"].startswith("out of memory: ")
    assert "\n" not in rows[0]["reason"]


def test_too_big_a_model_is_estimated_not_loaded(tiny, monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 30 << 30)
    monkeypatch.setattr(decode, "build_model", lambda *_: pytest.fail("it was built"))
    made = make_cases(["phi-4"], ["dense", "m-countdown"], [0.9], level="decode")
    rows = run_group(made)
    assert {row["status"] for row in rows} == {"skipped"}
    assert rows[0]["reason"] == (
        "phi-4 in float32 needs about 70 GiB with its copies, 30 are free; embedded, tiny would fit"
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"methods": ["given"]}, "level decode"),
        ({"batch_sizes": [2]}, "level decode: batch size 1"),
        ({"shapes": ["lama"]}, "unknown shape 'lama'"),
    ],
)
def test_bad_cases_are_refused(change, match):
    options = {"shapes": ["embedded"], "methods": ["dense"], "sparsities": [0.5], "level": "decode"} | change
    with pytest.raises(InputError, match=match):
        make_cases(**options)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.config])
def test_shapes_are_the_papers(name):
    """Parameters of the published models, counted on a model without memory."""
    model = build_model(name, "bfloat16", "meta")
    mlp = model.model.layers[0].mlp
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].n_parameters
    assert tuple(mlp.down_proj.weight.shape) == (SHAPES[name].d_model, SHAPES[name].d_ff)
    with pytest.raises(InputError, match="did you mean 'phi-4'"):
        build_model("phi4", "bfloat16", "meta")


def test_limit_of_the_check_grows_with_the_layers():
    class Two:
        mlps, dtype = [type("Mlp", (), {"d_model": 32, "d_ff": 48})] * 2, torch.float32

    class Eight(Two):
        mlps = Two.mlps * 4

    assert decode_check._limit(Eight) == pytest.approx(2 * decode_check._limit(Two))


OWN = "tests.speed.own_methods:"


@pytest.mark.parametrize("method", ["s-countdown", "dejavu", OWN + "MagnitudeOfGate", OWN + "Predicted"])
def test_a_method_decodes_by_what_its_contract_says(tiny, method):
    (row,) = run_group(cases((method,)))
    assert (row["method"], row["status"], row["check"]) == (method, "ok", "passed"), row["reason"]
    assert 0.35 < row["sparsity_realized"] < 0.65
    assert row["predictor"] == (None if method.endswith("Gate") else "low-rank")


def test_a_score_that_no_kernel_computes_is_skipped(tiny):
    (row,) = run_group(cases(("tests.contract.third_party:PowerOfUp",)))
    assert (row["status"], row["check"]) == ("skipped", "skipped")
    assert "do not compute the score" in row["reason"]


def test_a_type_that_the_kernels_do_not_take_is_skipped_for_sparse_methods_alone(tiny):
    made = [replace(case, dtype="float16") for case in cases(("dense", "cats"), variants=("eager",))]
    rows = run_group(made)
    assert [row["status"] for row in rows] == ["ok", "skipped"]
    assert rows[1]["reason"] == "dtype float16: the kernels on cpu take float32"


def test_on_a_gpu_steps_and_parts_are_graphs(tiny, monkeypatch):
    """Played by the CPU: what is captured, replayed and noted down around the kernels."""
    captured = []
    monkeypatch.setattr(decode, "captured", lambda run: captured.append(run) or cuda_stand_in.captured(run))
    monkeypatch.setattr(decode, "cuda_bandwidth", cuda_stand_in.small_bandwidth)
    monkeypatch.setattr(decode, "free_bytes", lambda device: 80 << 30)
    options = {"backends": ["torch", "numba-cuda"], "variants": ["graph", "generate"], "contexts": [16]}
    with cuda_stand_in.play_gpu(monkeypatch):
        rows = run_group(make_cases(["tiny"], ["dense", "cats", "d-countdown"], [0.5], level="decode", **options))
    assert [(row["method"], row["variant"], row["clock"]) for row in rows] == [
        ("dense", "graph", "graph"),
        ("dense", "generate", "wall"),
        ("cats", "graph", "graph"),
        ("d-countdown", "graph", "graph"),
    ]
    assert len(captured) == 3 * 4  # a step and three parts each
    for row in rows:
        assert (row["status"], row["device_name"], row["threads"]) == ("ok", "a GPU", None), row["reason"]
        graph = row["variant"] == "graph"
        assert ((row["capture_s"] is not None), (row["peak_memory_mib"] == 3)) == (graph, graph)


FACTORS = [
    ("md-countdown", {"rank": 8, "exact": "up", "predictor_input": "mlp"}),
    ("md-countdown", {"rank": 8, "exact": "gate", "predictor_input": "block"}),
]


def test_rows_of_factors_gated_predictors_and_fixed_sets(tiny):
    methods = (*FACTORS, "d-countdown", "dejavu-abs", "griffin", "static")
    options = {"backends": ["torch", "numba-cpu"], "threads": [1], "contexts": [16]}
    options |= {"predictors": ["gated"], "predictor_inputs": ["mlp", "block"]}
    made = make_cases(["tiny"], methods, [0.5, 0.75], level="decode", **options)
    rows = run_group(made)
    names = ("method", "backend", "rank", "predictor", "predictor_input", "exact_projection")
    assert list(dict.fromkeys(tuple(row[name] for name in names) for row in rows)) == [
        ("md-countdown", "numba-cpu", 8, None, "mlp", "up"),
        ("md-countdown", "numba-cpu", 8, None, "block", "gate"),
        *(("d-countdown", "numba-cpu", 6, "gated", read, None) for read in ("mlp", "block")),
        *(("dejavu-abs", "numba-cpu", 14, "gated", read, None) for read in ("mlp", "block")),
        *((method, "torch", None, None, None, None) for method in ("griffin", "static")),
    ]
    copies, one = 2 * D_MODEL * D_FF, D_MODEL + D_FF
    for case, row in zip(made, rows, strict=True):
        assert (row["status"], row["check"]) == ("ok", "passed"), row["reason"]
        assert row["decode_check"]["top1_agreement"] == 1
        assert abs(row["sparsity_realized"] - case.sparsity) < (1e-6 if row["backend"] == "torch" else 0.2)
        kept = D_FF - int(case.sparsity * D_FF)
        extra = {
            "md-countdown": copies + 2 * (8 * one + D_FF),
            "d-countdown": copies + 2 * 2 * (6 * one + D_FF),
            "dejavu-abs": copies + 2 * (14 * one + D_FF),
        }.get(row["method"], 2 * 3 * D_MODEL * kept)
        assert row["extra_memory_mib"] == pytest.approx(4 * extra / 2**20)


def test_a_fit_chooses_what_is_exact(tiny):
    """The setting stays auto, another column says what was chosen."""
    case = replace(cases((FACTORS[0],))[0], params={"rank": 8, "exact": "auto"}, exact_projection="auto")
    state = random_fit(get_method("md-countdown", sparsity=0.5, rank=8, exact="auto"), thresholds=torch.zeros(2))
    for chosen in ("up", "gate"):
        factor = {
            f"factor.{'up' if chosen == 'gate' else 'gate'}.{part}": state.extras[f"factor.gate.{part}"]
            for part in ("v", "u", "residual")
        }
        (row,) = run_group([case], states={case: replace(state, meta={"chosen": {"exact": chosen}}, extras=factor)})
        found = tuple(row[name] for name in ("status", "exact_projection", "exact_chosen"))
        assert found == ("ok", "auto", chosen), row["reason"]


def test_without_its_prompt_a_set_is_refused():
    with pytest.raises(InputError, match="method griffin ranks by the prompt"):
        sparse.SparseMethod(DecodeModel(build("llama"), 64), "griffin")
