from pathlib import Path

import pytest

from suite.report.page import write_report
from tests.report.synthetic import embedded_run


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A realistic run with its report; read only."""
    folder = embedded_run(tmp_path_factory.mktemp("run") / "synthetic")
    write_report(folder)
    return folder
