"""Table of the abstract's claim about the loss at 90 % against the size of the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from suite.modeling.names import named_parameters
from suite.report.claims import C1_LOSS, C1_METHOD, C1_SPARSITY
from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Average, Interval, Quality
from suite.report.text import MISSING, percent, signed
from suite.statistics import FloatArray

_COLUMNS = ["model", "parameters", "loss, %", "above 5.5 %, points", "less than the next smaller model, points"]


class _Sized(NamedTuple):
    """A setting of the claim with its dense reference and the tasks of its average."""

    parameters: float
    model: str
    one: Average
    dense: Average
    tasks: list[str]


def loss_by_size(material: Material) -> Content | None:
    """A block per mode and scope: the models by their size; None with fewer than two that name it."""
    found: dict[tuple[str, str, str], list[_Sized]] = {}
    quality = material.quality
    for block, settings in quality.summary_blocks:
        dense, size = quality.dense_of(block, settings), named_parameters(str(block["model"]))
        if dense is None or size is None or block["sparsity_target"] != C1_SPARSITY:
            continue
        for one in (s for s in settings if s.method == C1_METHOD):
            key = (str(block["mode"]), str(block["scope"]), one.label)
            found.setdefault(key, []).append(_Sized(size, str(block["model"]), one, dense, quality.tasks_of(block)))
    blocks = [
        _block(quality, key, sorted(own, key=lambda s: (s.parameters, s.model)))
        for key, own in found.items()
        if len({s.model for s in own}) > 1
    ]
    return Content(blocks) if blocks else None


def _block(quality: Quality, key: tuple[str, str, str], own: list[_Sized]) -> Block:
    mode, scope, label = key
    losses = [quality.quantity([s.one, s.dense], s.tasks, _loss) for s in own]
    closer = [None, *(_closer(quality, *pair) for pair in pairwise(own))]
    rows = [
        [
            sized.model,
            f"{sized.parameters / 1e6:g}M",
            MISSING if loss is None else _percent(loss),
            MISSING if loss is None else f"{100 * (loss[0] - C1_LOSS):+.1f}",
            signed(less),
        ]
        for sized, loss, less in zip(own, losses, closer, strict=True)
    ]
    known = [step[0] for step in closer[1:] if step is not None]
    falls = len(known) == len(own) - 1 and all(step > 0 for step in known)
    settled = falls and all(step is not None and step[1] is not None and step[1] > 0 for step in closer[1:])
    told = "falls" + " (not settled)" * (not settled) if falls else "does not always fall"
    note = f"From model to larger model the loss {told}."
    return Block(_COLUMNS, rows, f"{label}, {mode}, scope `{scope}`", [note])


def _loss(means: list[FloatArray]) -> Any:
    """Relative loss of the average: the first system against the second."""
    return 1 - sum(m[0] for m in means) / sum(m[1] for m in means)


def _closer(quality: Quality, smaller: _Sized, larger: _Sized) -> Interval | None:
    """Loss of the smaller model minus that of the larger, both on the same documents; None on other tasks."""
    if smaller.tasks != larger.tasks:
        return None
    settings = [smaller.one, smaller.dense, larger.one, larger.dense]
    return quality.quantity(settings, smaller.tasks, lambda m: _loss(m) - _loss([mean[2:] for mean in m]))


def _percent(loss: Interval) -> str:
    value, low, high = loss
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


TABLES = (
    ReportTable(
        "loss_by_size",
        "The loss at 90 % against the size of the model",
        f"Relative loss of the task average of {C1_METHOD} at sparsity {C1_SPARSITY:g} (the abstract: as low as 5.5 %, "
        "ideally), models by the parameters that their names say. Last column: the loss of the model above minus this one's, "
        "paired on the same documents, with its 95 % interval; above 0 it falls.",
        loss_by_size,
    ),
)
