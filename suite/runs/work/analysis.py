"""Analyses what methods keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.analysis.coefficients import analyse as analyse_texts
from suite.data_files import read_documents
from suite.runs.work.base import Outcome

if TYPE_CHECKING:
    from suite.modeling.loading import LoadedModel
    from suite.runs.cells.analysis import AnalysisCell


def analyse(loaded: LoadedModel, cell: AnalysisCell) -> Outcome:
    """Analyse the model of one cell."""
    config, field = cell.config, str(cell.task.options["field"])
    documents = read_documents(cell.task.files["test"], field)[: config.documents]
    found = analyse_texts(
        loaded,
        [document[field] for document in documents],
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        sparsities=config.sparsities,
    )
    return Outcome([*found.cif_caf, *found.activations])
