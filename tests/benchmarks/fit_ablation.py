"""What each choice of a fit is worth at one sparsity: bytes, mass kept, perplexity, seconds; one row of CSV a setting.

    python -m tests.benchmarks.fit_ablation OUT.csv --data-dir DIR [--device cuda --dtype bfloat16] [--only 'gated*']

Rows that OUT.csv has already are not measured again. Calibration text is DIR/calibration/c4.jsonl.gz, as in
suite/configs/gpu-accuracy.yaml; the task is decode_perplexity_wikitext, practical mode. No test: `pytest` does not collect it.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.evaluation.evaluator import Evaluator
from suite.evaluation.tasks import resolve_task
from suite.fitting.api import fit
from suite.fitting.artifacts import Fit, PredictorFit, calibrated_layers
from suite.fitting.calibration import Calibration
from suite.fitting.options import PredictorOptions
from suite.fitting.stream import mlp_inputs
from suite.fitting.thresholds import ThresholdFitter
from suite.fitting.windows import make_predictor_windows, make_windows
from suite.methods.base import Method, kept_count, select_threshold, select_top_k
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from suite.modeling.loading import load_model
from suite.modeling.modes import settled
from suite.registry import get_method
from tests.benchmarks.fit_variants import CHUNK, Variant, fit_variant

_TASK = "decode_perplexity_wikitext"


@dataclass(frozen=True)
class Setting:
    """A fit by the suite, or one of the variants; ``without`` drops the residuals of a fit by the suite."""

    name: str
    method: str = "d-countdown"
    params: Mapping[str, Any] = field(default_factory=dict)
    options: PredictorOptions | None = None
    variant: Variant | None = None
    without: bool = False


def settings() -> list[Setting]:
    """In the order of what they tell."""
    low_rank = PredictorOptions(rank=288)
    gated = PredictorOptions(predictor="gated", rank=144, rounds=1)
    found = [Setting("low-rank-288", options=low_rank)]
    found += [Setting(name, name) for name in ("m-countdown-cw", "m-countdown", "chess", "cats")]
    found += [Setting(f"suite-gated-144-rounds-{n}", options=replace(gated, rounds=n)) for n in (1, 2)]
    found += [_md(rank) for rank in (64, 72, 128, 144)]
    base = Variant(144, 144)
    found += [
        _own(f"gated-train-{epochs}-rate-{rate:g}", replace(base, epochs=epochs, rate=rate))
        for epochs, rate in ((3, 3e-3), (3, 1e-2), (3, 3e-2), (10, 1e-2))
    ]
    more: dict[str, Variant] = {
        "gated-train-3-token": replace(base, epochs=3, goal="token"),
        "gated-train-5-rounds-2": replace(base, epochs=5, rounds=2),
        "gated-train-20-rounds-2": replace(base, epochs=20, rounds=2),
        "gated-ce": base,
        "gated-none": replace(base, terms=""),
        "gated-c": replace(base, terms="c"),
        "gated-e": replace(base, terms="e"),
        "gated-rows-other": replace(base, rows="other"),
        "gated-rows-slope": replace(base, rows="slope"),
        "gated-rows-slope-relative": replace(base, rows="slope", relative=True),
        "gated-relative": replace(base, relative=True),
        "gated-scale": replace(base, scale=True),
        "gated-quadratic": replace(base, terms="quadratic"),
        "gated-shared-166": replace(base, gate=166, up=166, shared=True, rows="slope"),
        "gated-shared-166-train-5": replace(base, gate=166, up=166, shared=True, rows="slope", epochs=5),
        "gated-192+96": replace(base, gate=192, up=96),
        "gated-96+192": replace(base, gate=96, up=192),
        "gated-norm": replace(base, norm=True),
        "gated-block": replace(base, predictor_input="block"),
        "gated-block-train-5": replace(base, predictor_input="block", epochs=5),
        "gated-rounds-3": replace(base, rounds=3),
        "gated-288-int8": replace(base, gate=288, up=288, bits=8),
        "md-variant-64": replace(base, gate=64, up=0),
        "md-variant-64-slope": replace(base, gate=64, up=0, rows="slope"),
        "md-variant-64-train-5": replace(base, gate=64, up=0, epochs=5),
        "md-variant-64-train-5-rounds-2": replace(base, gate=64, up=0, epochs=5, rounds=2),
    }
    for gate in (120, 80, 64, 48, 32):  # of 288 in all
        more[f"split-{gate}+{288 - gate}"] = replace(base, gate=gate, up=288 - gate)
    for gate in (144, 96, 64):
        split = replace(base, gate=gate, up=288 - gate, rate=3e-2)
        more[f"split-{gate}-train-10"] = replace(split, epochs=10)
        more[f"split-{gate}-train-10-rounds-2"] = replace(split, epochs=10, rounds=2)
        more[f"split-{gate}-rounds-2"] = replace(split, rounds=2)
        more[f"split-{gate}-relative"] = replace(split, relative=True)
        more[f"split-{gate}-block"] = replace(split, predictor_input="block")
    more["split-64-train-10-rate-0.1"] = replace(base, gate=64, up=224, rate=0.1, epochs=10)
    more["split-64-train-40"] = replace(base, gate=64, up=224, rate=3e-2, epochs=40)
    more["split-192-int8"] = replace(base, gate=192, up=384, bits=8)
    more["split-288-int8-rounds-2"] = replace(base, gate=288, up=288, bits=8, rounds=2)
    found += [_own(name, variant) for name, variant in more.items()]
    found += [_md(rank) for rank in (16, 32, 288)]
    found += [replace(_md(rank), name=f"md-{rank}-without-c", without=True) for rank in (16, 64, 144)]
    found += [_md(64, fit_rounds=2), _md(144, fit_rounds=2), _md(64, exact="gate"), _md(64, exact="auto")]
    found += [_md(64, predictor_input="block"), _md(144, predictor_input="block")]
    return found


def _md(rank: int, **params: Any) -> Setting:
    name = "-".join([f"md-{rank}", *(f"{key}-{value}" for key, value in params.items())])
    return Setting(name, "md-countdown", {"rank": rank, **params})


def _own(name: str, variant: Variant) -> Setting:
    return Setting(name, "d-countdown" if variant.up else "md-countdown", variant=variant)


class Bench:
    """The model, its texts and its task, for all settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._loaded = load_model(options.model, options.dtype, options.device)
        data = Path(options.data_dir)
        source = f"file:{data / 'calibration' / 'c4.jsonl.gz'}"
        self._text = Calibration(source, options.predictor_tokens), Calibration(source, options.threshold_tokens)
        self._windows = make_predictor_windows(self._text[0], self._loaded.tokenizer, 0)
        self._threshold_windows = make_windows(self._text[1], self._loaded.tokenizer, 0)
        self._mlps = find_gated_mlps(self._loaded.model)
        self._task = resolve_task(_TASK, data_dir=data, limit=options.limit)
        self._evaluator = Evaluator(self._loaded, batch_size=options.batch_size)
        self._dense: Callable[[bool], Tensor] = cache(
            lambda block: mlp_inputs(self._loaded.model, self._mlps, self._windows.train, of_block=block)
        )

    def row(self, setting: Setting) -> dict[str, Any]:
        """Fit, check and evaluate."""
        begun = time.monotonic()
        method, state = self._fit(setting)
        fitted = time.monotonic()
        found = self._mass(method, state)
        with torch.inference_mode():
            result, layers = self._evaluator.run(self._task, method, mode="practical", state=state)
        metrics = {metric.name: metric for metric in result.metrics}
        values = {
            "fit_s": fitted - begun,
            "bytes_share": self._bytes(setting, state),
            **found,
            "realised": math.fsum(one.sparsity_realized for one in layers) / len(layers),
            "perplexity": metrics["perplexity"].value,
            "stderr": metrics["perplexity"].stderr,
            "kl_dense": metrics["kl_dense"].value,
            "top1": metrics["top1_agreement"].value,
            "eval_s": time.monotonic() - fitted,
        }
        values = {name: None if value is None else f"{value:.5g}" for name, value in values.items()}
        return {"setting": setting.name, "method": setting.method, **_described(setting, method, state), **values}

    def _fit(self, setting: Setting) -> tuple[Method, Fit | PredictorFit]:
        sparsity = self._options.sparsity
        if setting.variant is not None:
            return fit_variant(self._loaded, setting.variant, self._windows, sparsity, self._dense)
        method = get_method(setting.method, sparsity=sparsity, **setting.params)
        state = fit(self._loaded, method, self._text[0 if setting.options else 1], options=setting.options)
        if setting.without and isinstance(state, Fit):
            extras = {k: torch.zeros_like(v) if k.endswith("residual") else v for k, v in state.extras.items()}
            calibrated = calibrated_layers(extras, torch.device(self._loaded.device))
            fitter = ThresholdFitter(self._loaded, method, calibrated=calibrated)
            thresholds = fitter.fit(self._threshold_windows.fit, "calibrated")
            state = replace(state, extras=extras, thresholds=thresholds)
        return method, state

    def _mass(self, method: Method, state: Fit | PredictorFit) -> dict[str, float]:
        """As `suite.fitting.quality` has it, of any method: shares of the sum of v^2, mean over layers, on held-out text."""
        device = torch.device(self._loaded.device)
        method = settled(method, state)
        calibrated = state.calibrated(device) if isinstance(state, Fit) else []
        predictor = state.to(device) if isinstance(state, PredictorFit) else None
        of_block = (predictor or method).predictor_input == "block"
        totals = {"mass_kept": 0.0, "mass_ideal": 0.0}
        with attach(self._loaded.model, method, state), torch.inference_mode():
            x = mlp_inputs(self._loaded.model, self._mlps, self._windows.check)
            seen = mlp_inputs(self._loaded.model, self._mlps, self._windows.check, of_block=True) if of_block else x
        with torch.inference_mode():
            for i, mlp in enumerate(self._mlps):
                n = len(self._mlps) * x.shape[1]
                for own, read in zip(x[i].split(CHUNK), seen[i].split(CHUNK), strict=True):
                    made = mlp.activations(own, block=read, calibrated=calibrated[i] if calibrated else None)
                    score = method.score(made) if predictor is None else predictor.logits(i, read)
                    mass = made.product.double().square()
                    total = mass.sum(-1).clamp(min=1e-300)
                    kept = select_threshold(score, float(state.thresholds[i]))
                    ideal = select_top_k(mass.float(), kept_count(mlp.d_ff, method.sparsity))
                    totals["mass_kept"] += float(((mass * kept).sum(-1) / total).sum()) / n
                    totals["mass_ideal"] += float(((mass * ideal).sum(-1) / total).sum()) / n
        return totals

    def _bytes(self, setting: Setting, state: Fit | PredictorFit) -> float:
        if setting.variant is None:
            return state.bytes_share
        vectors = 4 if setting.variant.terms == "quadratic" else len(setting.variant.terms)
        return setting.variant.share(self._mlps[0].d_model, self._mlps[0].d_ff, vectors)


_NAMES = [one.name for one in fields(Variant)]
COLUMNS = [
    "setting",
    "method",
    *_NAMES,
    "params",
    "options",
    "chosen",
    "bytes_share",
    "mass_kept",
    "mass_ideal",
    "realised",
]
COLUMNS += ["perplexity", "stderr", "kl_dense", "top1", "fit_s", "eval_s"]


def _described(setting: Setting, method: Method, state: Fit | PredictorFit) -> dict[str, Any]:
    found = {} if setting.variant is None else asdict(setting.variant)
    told = " ".join(f"{name}={value}" for name, value in setting.params.items())
    chosen = getattr(state, "chosen", {})
    return found | {
        "params": told + (" without residuals" if setting.without else ""),
        "options": "" if setting.options is None else str(setting.options.fields()),
        "chosen": " ".join(f"{name}={value}" for name, value in chosen.items()),
    }


def main() -> None:
    """Measure what is missing in the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--predictor-tokens", type=int, default=100000)
    parser.add_argument("--threshold-tokens", type=int, default=32768)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="pages of the task; default all")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the settings' names")
    options = parser.parse_args()
    done: set[str] = set()
    if options.out.exists():
        with options.out.open() as stored:
            done = {row["setting"] for row in csv.DictReader(stored)}
    wanted = [one for one in settings() if any(fnmatch.fnmatch(one.name, pattern) for pattern in options.only)]
    todo = [one for one in wanted if one.name not in done]
    begun = time.monotonic()
    bench = Bench(options)
    with options.out.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        if not done:
            writer.writeheader()
        for number, setting in enumerate(todo, 1):
            try:
                row = bench.row(setting)
            except (RuntimeError, ValueError) as error:  # one setting's fault: the others are measured all the same
                sys.stdout.write(f"{number}/{len(todo)} {setting.name}: {type(error).__name__}: {error}\n")
                continue
            writer.writerow(row)
            out.flush()
            told = " ".join(
                f"{name} {row[name]}" for name in ("perplexity", "mass_kept", "realised", "fit_s", "eval_s")
            )
            sys.stdout.write(f"{time.monotonic() - begun:6.1f} s {number}/{len(todo)} {setting.name}: {told}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
