"""What a report is made of: a run, and what is computed from it once for tables, figures and claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from suite.report.claims import make_claims
from suite.report.equal_bytes import equal_bytes
from suite.report.quality import Quality
from suite.report.results import Results
from suite.report.speed import with_speed_up


@dataclass(frozen=True)
class Material:
    """A run and what is computed from it once."""

    results: Results

    @cached_property
    def quality(self) -> Quality:
        """Accuracy in blocks."""
        return Quality(self.results)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """Speed rows with speed-ups."""
        return with_speed_up(self.results.speed)

    @cached_property
    def claims(self) -> pd.DataFrame:
        """Rows of claims.csv."""
        return make_claims(self.quality, self.speed)

    @cached_property
    def equal_bytes(self) -> pd.DataFrame:
        """Rows of equal_bytes.csv; none where no practical setting is measured on a task of an average."""
        return equal_bytes(self.quality, self.speed)

    @property
    def in_domain(self) -> Mapping[str, bool]:
        """Whether a calibration text is of the evaluated tasks' train splits, by its source."""
        return self.results.manifest.get("in_domain") or {}
