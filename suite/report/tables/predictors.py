"""Table of trained predictors: means over their layers."""

from __future__ import annotations

import pandas as pd

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.results import Results
from suite.report.text import MISSING, fixed

_MEANS = ("sparsity_realized", "recall", "precision", "overlap_at_k", "mass_kept", "mass_kept_ideal")
_ONE = ["model", "method", "sparsity_target", "predictor", "rank", "predictor_input"]
_ONE += ["calibration", "estimator", "seed", "fit_id"]
_COLUMNS = ["predictor of", "model", "kind", "fitted on", "threshold", "seed", "realised", "recall", "precision"]
_COLUMNS += ["overlap@k", "mass kept", "ideal", "tokens", "fit s", "peak MiB"]


def predictors(material: Material) -> Content | None:
    """One row a predictor."""
    layers = _with_fits(material.results)
    if layers.empty:
        return None
    rows = []
    for key, own in layers.groupby(_ONE, sort=True, dropna=False):
        model, method, target, predictor, rank, read, calibration, estimator, seed, _ = key
        domain = "in domain" if material.in_domain.get(str(calibration)) else "out of domain"
        text = calibration if calibration == MISSING else f"{calibration} ({domain})"
        means = [fixed(float(own[name].mean()), 3) for name in _MEANS]
        cost = [f"{own['train_tokens'].iloc[0]:.0f}", fixed(float(own["fit_s"].sum()), 1)]
        peak = fixed(float(own["peak_memory_mib"].iloc[0]), 0)
        name = [
            f"{method} {target:g}",
            str(model),
            " ".join(part for part in map(str, (predictor, rank, read)) if part),
        ]
        rows.append([*name, text, str(estimator), str(seed), *means, *cost, peak])
    return Content([Block(_COLUMNS, rows)])


def _with_fits(results: Results) -> pd.DataFrame:
    """Rows of predictor.csv with the text, estimator and seed of each fit, a dash where no cell has used it."""
    names = ["estimator", "calibration", "seed"]
    fits = results.accuracy[["fit_id", *names]].drop_duplicates("fit_id")
    found = results.predictor.merge(fits, on="fit_id", how="left")
    return found.assign(**{name: found[name].astype(object).where(found[name].notna(), MISSING) for name in names})


TABLES = (
    ReportTable(
        "predictors",
        "Predictors",
        "Means over layers on documents that neither matrices nor thresholds were fitted on, all earlier layers being "
        "sparse. Mass: share of the sum of v^2 that is kept, by the predictor and by the true top k; it, not recall, "
        "decides the output. Time: the training's share of this predictor, without the passes of the model. What each "
        "choice of training is worth: `suite/fitting/NOTES.md`.",
        predictors,
        is_open=False,
    ),
)
