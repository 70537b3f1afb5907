"""Times the cases of a group: skip what cannot run, check, time what passed, and make a row of each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from suite import devices
from suite.errors import InputError
from suite.registry import METHODS
from suite.speed.case import COLUMNS, GIVEN, Kernel, Progress, Result, Row, SpeedCase, States, kernel_of, microseconds
from suite.speed.clock import time_interleaved
from suite.speed.expand import make_cases

if TYPE_CHECKING:
    import pandas as pd

    from suite.speed.rig import Rig, Subject


def run_group(
    cases: Sequence[SpeedCase], *, seed: int = 0, progress: Progress | None = None, states: States | None = None
) -> list[Row]:
    """Check and time the cases of one group, interleaved round by round.

    Parameters
    ----------
    cases : cases with one ``group``
    seed : of weights and inputs
    progress : called with the label of what is going on; None shows a bar for what takes over 3 s
    states : fits of decode cases of a model with real weights

    Returns
    -------
    list of dict
        One row of ``schema.SPEED`` (without run_id, cell_id) a case, in order. A case whose check failed has status
        ``failed`` and no time; one that cannot run here has status ``skipped`` and the reason. A timed one also has
        ``timings``, the microseconds of each round, and may have rows of ``phases`` and ``decode_check``.

    Raises
    ------
    InputError
        Cases of several groups.
    """
    if not cases:
        return []
    groups = sorted({case.group for case in cases})
    if len(groups) > 1:
        raise InputError(f"cases of {len(groups)} groups ({', '.join(groups)}): run each group on its own")
    found = _results(cases, seed, progress, states or {})
    return [found[case].row() for case in cases]


def _results(
    cases: Sequence[SpeedCase], seed: int, progress: Progress | None, states: States
) -> dict[SpeedCase, Result]:
    from tqdm import tqdm

    reason = _no_device(cases[0].device)
    if reason:
        return {case: Result(case, "skipped", reason) for case in cases}
    rig_class = _rig_class(cases[0])
    reasons = {case: rig_class.why_not(case) for case in cases}
    able = [case for case, reason in reasons.items() if not reason]
    if able and (reason := rig_class.no_room(able)):
        reasons |= dict.fromkeys(able, reason)
    found = {case: Result(case, "skipped", reason) for case, reason in reasons.items() if reason}
    able = [case for case in able if case not in found]
    bar = tqdm(desc=f"speed {cases[0].model_shape}", delay=3, leave=False, disable=None if progress is None else True)

    def tell(text: str) -> None:
        bar.set_postfix_str(text)
        bar.update()
        if progress is not None:
            progress(text)

    if able:
        with bar, rig_class(able, seed, tell, states) as rig:
            for batch in rig.batches():
                found |= _measured(rig, batch, tell)
    return found


def _no_device(device: str) -> str:
    """Reason why nothing can run on a device; "" if it can."""
    if device == "cpu":
        return ""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    try:
        from kernels_numba.gpu.host.checks import unavailable
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: install the extra 'cuda'"
    return unavailable()


def _rig_class(case: SpeedCase) -> type[Rig]:
    if case.level == "decode":
        from suite.speed.decode import DecodeRig

        return DecodeRig
    if case.device == "cpu":
        from suite.speed.layer_cpu import CpuRig

        return CpuRig
    from suite.speed.layer_cuda import CudaRig

    return CudaRig


def _measured(rig: Rig, cases: Sequence[SpeedCase], tell: Progress) -> dict[SpeedCase, Result]:
    """Results of cases that are timed together; what runs out of memory fails them, and the others go on."""
    import torch

    device = devices.cpu() if cases[0].device == "cpu" else devices.gpu()
    known: Row = {"device_name": device.name, "driver_version": device.driver} if device else {}
    found: dict[SpeedCase, Result] = {}
    ready: list[tuple[Subject, Row]] = []
    try:
        for case in cases:
            tell(f"check {case.label}")
            subject = rig.subject(case)
            outcome = subject.check()
            facts = known | {"max_rel_error": outcome.error} | outcome.facts
            if outcome.reason:
                found[case] = Result(case, "failed", outcome.reason, facts)
                continue
            subject.prepare()
            ready.append((subject, facts))
        return found | (_timed(rig, ready, tell) if ready else {})
    except torch.OutOfMemoryError as error:
        line = " ".join(str(error).split())[:200]
        return {case: found.get(case) or Result(case, "failed", f"out of memory: {line}", known) for case in cases}


def _timed(rig: Rig, ready: Sequence[tuple[Subject, Row]], tell: Progress) -> dict[SpeedCase, Result]:
    subjects = [subject for subject, _ in ready]
    bandwidth = None if all(subject.needed_bytes is None for subject in subjects) else rig.bandwidth()
    seconds = time_interleaved(
        [lambda one=subject: one.sample(bandwidth) for subject in subjects],  # type: ignore[misc]
        subjects[0].rounds,
        (lambda: None) if bandwidth is None else bandwidth.measure,
        tell,
    )
    found = {}
    for (subject, facts), one in zip(ready, seconds, strict=True):
        latencies = microseconds(one)
        median_s = float(np.median(latencies)) * 1e-6
        row = facts | subject.facts(median_s)
        if bandwidth is not None and (needed := subject.needed_bytes) is not None:
            row["bytes_read_mib"] = needed / 2**20
            row["read_bandwidth_gb_s"] = bandwidth.bytes_per_s / 1e9
            row["efficiency"] = needed / (median_s * bandwidth.bytes_per_s)
        found[subject.case] = Result(subject.case, "passed", "", row, latencies)
    return found


def default_methods() -> list[str]:
    """Methods that every device times: dense, those with thresholds, and a given set."""
    found = []
    for name in METHODS:
        with suppress(InputError):  # no kernel runs it
            if kernel_of(name) in (Kernel.DENSE, Kernel.THRESHOLD):
                found.append(name)
    return [*found, GIVEN]


def benchmark(
    shapes: Sequence[str] = ("embedded",),
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9),
    *,
    level: str = "layer",
    dtype: str = "float32",
    backends: Sequence[str] = ("torch", "numba-cpu"),
    threads: int | str = "all",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Time one gated MLP layer (or its down projection, ``level="op"``) and return rows with speed.csv's columns.

    ``methods`` are registry names, ``module:Class``, and ``given`` for a given active set; by default `default_methods`.

    >>> benchmark(["llama-3.1-8b"], sparsities=[0.9])  # doctest: +SKIP

    Raises
    ------
    InputError
        As `make_cases`.
    """
    import pandas as pd

    wanted = default_methods() if methods is None else methods
    cases = make_cases(shapes, wanted, sparsities, level=level, dtypes=[dtype], backends=backends, threads=[threads])
    rows: list[Row] = []
    for _, group in groupby(cases, key=lambda case: case.group):
        rows += run_group(list(group), seed=seed, progress=progress)
    return pd.DataFrame(rows, columns=COLUMNS)
