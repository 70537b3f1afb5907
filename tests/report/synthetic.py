"""Run folders made by hand for the report's tests: a realistic embedded run, and tiny ones with known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from suite import schema
from suite.statistics import paired_delta, resampling_group, standard_error, statistic

MODEL = "SmolLM2-135M-Instruct"
IDEAL = ("random", "dejavu", "dejavu-abs", "cats", "m-countdown", "d-countdown", "s-countdown")
PRACTICAL = ("cats", "m-countdown")
SPARSITIES = (0.7, 0.8, 0.9)
CHOICES = {"pack_grammar": (2, "acc", 90), "pack_knowledge": (4, "acc_norm", 60), "pack_last_word": (0, "acc", 40)}
# Nats lost per token at .9, and how sharply it grows: only the order and the size are meant to be realistic.
COST = {
    "random": 6,
    "dejavu": 4.5,
    "dejavu-abs": 2.2,
    "cats": 2.6,
    "m-countdown": 1.5,
    "d-countdown": 0.5,
    "s-countdown": 0.45,
}


def frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows as a frame with exactly the schema's columns; what is not given is empty."""
    for row in rows:
        unknown = set(row) - set(columns)
        if unknown:
            raise KeyError(f"no such columns: {unknown}")
    return pd.DataFrame([{c: row.get(c, "") for c in columns} for row in rows], columns=columns)


def accuracy_row(method: str, task: str, metric: str, value: float | str, **more: Any) -> dict[str, Any]:
    """One ok row with sensible defaults."""
    sparsity = more.pop("sparsity", 0.0 if method == "dense" else 0.8)
    mode = more.pop("mode", "none" if method == "dense" else "ideal")
    row = {
        "run_id": "hand",
        "cell_id": f"{method}-{mode}-{sparsity}-{task}",
        "model": MODEL,
        "dtype": "float32",
        "method": method,
        "mode": mode,
        "sparsity_target": sparsity,
        "sparsity_realized": sparsity,
        "scope": "" if method == "dense" else "scored",
        "bytes_share": 1 - sparsity,
        "task": task,
        "filter": "none",
        "metric": metric,
        "higher_is_better": metric not in ("perplexity", "kl_dense"),
        "value": value,
        "seed": 0,
        "status": "ok",
    }
    return row | more


def write_run(
    folder: Path,
    accuracy: list[dict[str, Any]] | None = None,
    samples: list[tuple[str, str, str, str, float]] | None = None,
    speed: list[dict[str, Any]] | None = None,
    sparsity: list[dict[str, Any]] | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Write the given parts of a run folder; None leaves a file out, as an unfinished run does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, columns in (
        ("accuracy.csv", accuracy, schema.ACCURACY.names),
        ("speed.csv", speed, schema.SPEED.names),
        ("sparsity.csv", sparsity, schema.SPARSITY.names),
    ):
        if rows is not None:
            frame(rows, columns).to_csv(folder / name, index=False)
    if samples is not None:
        pd.DataFrame(samples, columns=schema.SAMPLES.names[:5]).reindex(columns=schema.SAMPLES.names).to_csv(
            folder / "samples.csv.gz", index=False
        )
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def settings() -> list[tuple[str, str, float]]:
    """(method, mode, sparsity) of the embedded profile: 28."""
    ideal = [(m, "ideal", s) for m in IDEAL for s in SPARSITIES]
    return [("dense", "none", 0.0), *ideal, *[(m, "practical", s) for m in PRACTICAL for s in SPARSITIES]]


def _loss(method: str, mode: str, sparsity: float) -> float:
    if method == "dense":
        return 0.0
    return COST[method] * math.exp(9 * (sparsity - 0.9)) * (1.25 if mode == "practical" else 1.0)


def _bytes(method: str, realised: float) -> float:
    return (3 - 2 * realised) / 3 if method in ("cats", "m-countdown") else 1 - realised


class _Draws:
    """Latent difficulty of every document, shared by all settings so that differences are paired."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.easy = {task: rng.normal(1.2, 1.5, n) for task, (_, _, n) in CHOICES.items()}
        self.easy["pack_generation"] = rng.normal(0.8, 1.5, 12)
        self.tokens = rng.integers(40, 120, 30).astype(float)
        self.nats = rng.normal(3.1, 0.4, 30)
        self.rng = rng


def embedded_run(folder: Path, seed: int = 0) -> Path:
    """28 settings x 5 tasks with samples, speed of two shapes, realised sparsity of 30 layers, and a manifest."""
    draws = _Draws(seed)
    accuracy: list[dict[str, Any]] = []
    samples: list[tuple[str, str, str, str, float]] = []
    sparsity_rows: list[dict[str, Any]] = []
    dense: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for method, mode, sparsity in settings():
        layers = _layers(method, mode, sparsity, draws.rng)
        realised = float(np.mean(layers)) if method != "dense" else 0.0
        for task, metric, values, weights, docs in _task_samples(draws, method, mode, sparsity):
            row = accuracy_row(method, task, metric, 0.0, mode=mode, sparsity=sparsity, run_id="synthetic")
            cell = str(row["cell_id"])
            groups = [resampling_group(d) for d in docs]
            base = dense.setdefault((task, metric), (values, weights))
            delta = paired_delta(values, weights, *base, metric, groups)
            row |= {
                "value": statistic(values, weights, metric),
                "stderr": standard_error(values, weights, metric, groups),
                "sparsity_realized": realised,
                "bytes_share": 1.0 if method == "dense" else _bytes(method, realised),
                "estimator": "calibrated" if mode == "practical" else "",
                "calibration": "pydoc" if mode == "practical" else "",
                "chance": {
                    "pack_grammar": 0.5,
                    "pack_knowledge": 0.25,
                    "pack_last_word": 0.0,
                    "pack_generation": 0.0,
                }.get(task, ""),
                "n_samples": len(values),
                "elapsed_s": 1.5,
            }
            if method != "dense":
                row |= dict(zip(("delta_dense", "delta_ci_low", "delta_ci_high"), delta, strict=True))
            accuracy.append(row)
            samples += [(cell, task, d, metric, float(v)) for d, v in zip(docs, values, strict=True)]
            if not np.all(weights == 1):
                samples += [(cell, task, d, f"{metric}.weight", float(w)) for d, w in zip(docs, weights, strict=True)]
        if method != "dense":
            sparsity_rows += [
                {
                    "cell_id": cell,
                    "layer": i,
                    "threshold": 0.1 if mode == "practical" else "",
                    "sparsity_target": sparsity,
                    "sparsity_realized": value,
                    "n_tokens": 900,
                }
                for i, value in enumerate(layers)
                for cell in {f"{method}-{mode}-{sparsity}-{t}" for t in ("pack_grammar", "decode_perplexity")}
            ]
    folder.mkdir(parents=True, exist_ok=True)
    write_analysis(folder, MODEL)
    speed = speed_rows()
    run = write_run(folder, accuracy, samples, speed, sparsity_rows, manifest())
    traced = next(row["cell_id"] for row in speed if row["method"] == "m-countdown")
    phases = [(traced, name, 3.0, 2.0, 4.0) for name in ("fill", "first packet", "choose", "active rows", "sum of y")]
    for cell in ("decode-dense-0.0", "decode-m-countdown-0.7", "decode-m-countdown-0.9"):
        phases += [(cell, name, 8000.0, 7900.0, 8200.0) for name in ("attention", "MLP", "head", "rest")]
    pd.DataFrame(phases, columns=schema.PHASES.names).to_csv(run / "phases.csv", index=False)
    predictors = [
        predictor_row(method, target, layer)
        for method in ("d-countdown", "dejavu")
        for target in (0.7, 0.8)
        for layer in (0, 1)
    ]
    pd.DataFrame(predictors, columns=schema.PREDICTOR.names).to_csv(run / "predictor.csv", index=False)
    return run


def predictor_row(method: str, target: float, layer: int) -> dict[str, Any]:
    mass = {"d-countdown": 0.74, "dejavu": 0.5}[method] - 0.1 * layer
    return {
        "fit_id": f"{method}-{target}", "model": MODEL, "method": method, "predictor": "low-rank", "rank": 288,
        "sparsity_target": target, "layer": layer, "recall": 0.6, "precision": 0.61, "overlap_at_k": 0.59,
        "mass_kept": mass, "mass_kept_ideal": 0.9, "sparsity_realized": target - 0.004, "train_tokens": 6144,
        "loss": 0.3, "fit_s": 0.25, "peak_memory_mib": 1762.0,
    }  # fmt: skip


def _layers(method: str, mode: str, sparsity: float, rng: np.random.Generator) -> np.ndarray:
    if mode != "practical":
        return np.full(30, math.floor(sparsity * 1536) / 1536)
    shift = -0.012 if method == "cats" else -0.004
    return np.clip(sparsity + shift + 0.03 * np.sin(np.arange(30) / 4) + rng.normal(0, 0.01, 30), 0, 1)


def _task_samples(draws: _Draws, method: str, mode: str, sparsity: float):
    loss = _loss(method, mode, sparsity)
    rng = np.random.default_rng([ord(c) for c in f"{method}{mode}{sparsity}"])
    one = np.ones
    for task, (choices, metric, n) in CHOICES.items():
        extra = 0.6 if method == "m-countdown" and task == "pack_last_word" else 1.0
        right = draws.easy[task] + rng.normal(0, 0.3 if loss else 0, n) > loss * 0.9 / extra
        guess = rng.random(n) < (1 / choices if choices else 0)
        values = np.where(loss > 2, np.where(right, 1.0, guess), right).astype(float)
        docs = [f"t{i % 12}/{i}" if task == "pack_grammar" else str(i) for i in range(n)]
        yield task, metric, values, one(n), docs
    right = (draws.easy["pack_generation"] > loss * 1.3).astype(float)
    yield "pack_generation", "exact_match", right, one(12), [f"g{i % 4}/{i}" for i in range(12)]
    tokens, docs = draws.tokens, [str(i) for i in range(30)]
    nats = (draws.nats + loss + (rng.normal(0, 0.1 * loss, 30) if loss else 0)) * tokens
    yield "decode_perplexity", "perplexity", nats, tokens, docs
    yield "decode_perplexity", "kl_dense", loss * tokens * rng.uniform(0.8, 1.0, 30), tokens, docs
    yield "decode_perplexity", "top1_agreement", np.round(tokens * math.exp(-loss)), tokens, docs


def speed_row(method: str, sparsity: float, latency: float, **more: Any) -> dict[str, Any]:
    """One ok speed row of the Llama shape on a CPU."""
    elements = (
        3.0 if method == "dense" else 3 - 2 * sparsity if method in ("cats", "m-countdown") else 3 * (1 - sparsity)
    )
    d_model, d_ff = more.get("d_model", 4096), more.get("d_ff", 14336)
    row = {
        "run_id": "synthetic",
        "cell_id": f"speed-{method}-{sparsity}-{more.get('variant', '')}-{d_model}",
        "level": "layer",
        "model_shape": "llama-3.1-8b",
        "d_model": d_model,
        "d_ff": d_ff,
        "activation": "silu",
        "dtype": "float32",
        "method": method,
        "mode": "none" if method == "dense" else "practical",
        "sparsity_target": sparsity,
        "sparsity_realized": sparsity,
        "backend": "torch" if method == "dense" else "numba-cpu",
        "variant": "eager",
        "threads": 2,
        "batch_size": 1,
        "clock": "wall",
        "cache": "cold",
        "rounds": 50,
        "latency_us_median": latency,
        "latency_us_q25": latency * 0.98,
        "latency_us_q75": latency * 1.03,
        "latency_us_min": latency * 0.95,
        "bytes_read_mib": elements * d_model * d_ff * 4 / 2**20,
        "read_bandwidth_gb_s": 20.0,
        "efficiency": elements * d_model * d_ff * 4 / (latency * 1e-6 * 20e9),
        "check": "passed",
        "device_name": "CPU, 2 cores",
        "status": "ok",
    }
    return row | more


def speed_rows() -> list[dict[str, Any]]:
    """Two shapes on the CPU, and CUDA rows that were skipped."""
    rows = []
    for shape, d_model, d_ff in (("llama-3.1-8b", 4096, 14336), ("embedded", 576, 1536)):
        time = d_model * d_ff * 12 / 20e9 * 1e6
        more = {"model_shape": shape, "d_model": d_model, "d_ff": d_ff}
        rows.append(speed_row("dense", 0.0, time / 0.69, **more))
        for s in (0.5, 0.7, 0.8, 0.9):
            rows += [speed_row(m, s, time * (3 - 2 * s) / 3 / 0.8 + 15, **more) for m in ("cats", "m-countdown")]
            rows.append(speed_row("given", s, time * (1 - s) / 0.75 + 20, **more))
    tokens = {"level": "decode", "model": MODEL, "context_tokens": 128, "tokens_per_s": 30.0, "mlp_share": 0.6}
    for m, s, time in (("dense", 0.0, 33000.0), ("m-countdown", 0.7, 27000.0), ("m-countdown", 0.9, 24000.0)):
        rows.append(speed_row(m, s, time, **more | tokens) | {"cell_id": f"decode-{m}-{s}"})
    skipped = {"latency_us_median": "", "latency_us_q25": "", "latency_us_q75": "", "latency_us_min": ""}
    skipped |= {"status": "skipped", "reason": "no CUDA device", "efficiency": "", "check": "skipped"}
    for m in ("cats", "m-countdown"):
        rows.append(speed_row(m, 0.9, 1.0) | skipped | {"backend": "numba-cuda", "device_name": ""})
    return rows


def manifest(**more: Any) -> dict[str, Any]:
    """What a finished run records, in short."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": "synthetic",
        "argv": ["countdown-suite", "run", "embedded"],
        "config": {"name": "embedded", "seeds": [0], "models": [{"id": "embedded", "dtype": "float32"}]},
        "config_sha256": "c" * 64,
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "python": "3.11.9",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6", "scipy": "1.17.1"},
        "device": {"name": "CPU, 2 cores"},
        "fits": {"f1": "f" * 64},
        "models": {MODEL: {"weights": "a" * 64, "dtype": "float32"}},
        "data": {"pack_grammar": "d" * 16},
    } | more


def write_analysis(folder: Path, model: str) -> None:
    """The analysis of one model: shares that grow with sparsity, 30 layers."""
    sets = [
        {"model": model, "row_method": m, "sparsity": s, "cif_alive": s / 2, "cif_dead": (1 - s) / 2}
        | {"caf_alive": s / 3, "caf_dead": (1 - s) / 3, "n_tokens": 256}
        for m in ("cats", "m-countdown")
        for s in (0.1, 0.5, 0.9)
    ]
    layers = [
        {"model": model, "dtype": "float32", "layer": i, "quantity": q, "n_tokens": 256}
        | {c: (i + 1.0) * n / 100 for n, c in enumerate(schema.ACTIVATIONS.names[4:-1], 1)}
        for i in range(30)
        for q in ("abs_up", "abs_act", "abs_product")
    ]
    frame(sets, schema.CIF_CAF.names).to_csv(folder / "cif_caf.csv", index=False)
    frame(layers, schema.ACTIVATIONS.names).to_csv(folder / "activations.csv", index=False)


Setting = tuple[str, str, float, float] | tuple[str, str, float, float, str]  # method, mode, target, realised, scope


def hand_run(
    folder: Path, answers: dict[Setting, dict[str, list[float]]], metric: str = "", chance: float = 0.25, **more: Any
) -> Path:
    """A run of hand-made answers, one list of document values per setting and task (for perplexity: nats, one token).

    ``metric`` "": acc, and perplexity of tasks that are called so. A fifth part of a setting is its scope.
    """
    wanted = metric
    accuracy, samples = [], []
    dense = next(tasks for (method, *_), tasks in answers.items() if method == "dense")
    for (method, mode, target, realised, *scope), tasks in answers.items():
        for task, values in tasks.items():
            metric = wanted or ("perplexity" if "perplexity" in task else "acc")
            row = accuracy_row(method, task, metric, statistic(values, None, metric), mode=mode, sparsity=target)
            if scope:
                row |= {"scope": scope[0], "cell_id": f"{row['cell_id']}-{scope[0]}", "sparse_share": 0.25}
            row |= {"sparsity_realized": realised, "stderr": standard_error(values, None, metric)}
            row |= {"chance": chance if metric != "perplexity" else "", "n_samples": len(values)}
            if method != "dense":
                delta = paired_delta(values, None, dense[task], None, metric)
                row |= dict(zip(("delta_dense", "delta_ci_low", "delta_ci_high"), delta, strict=True))
            accuracy.append(row)
            samples += [(str(row["cell_id"]), task, str(i), metric, v) for i, v in enumerate(values)]
    return write_run(folder, accuracy, samples, manifest=manifest(), **more)


def hits(n: int, of: int = 100) -> list[float]:
    """n right answers, then wrong ones: runs of equal length share their documents."""
    return [1.0] * n + [0.0] * (of - n)
