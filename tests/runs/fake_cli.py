"""The command line with the quick world and worker, as a program: ``python -m tests.runs.fake_cli SECONDS ARGS...``."""

import sys
import types

import suite.runs.machine
import suite.runs.work.worker
from suite.cli import main
from tests.runs.fakes import FakeWorker, FakeWorld

if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    suite.runs.work.worker.TorchWorker = lambda **_: FakeWorker(seconds=seconds)
    suite.runs.machine.LocalWorld = FakeWorld
    page = types.ModuleType("suite.report.page")  # has tests of its own, and takes most of a quick run's time
    page.write_report = lambda folder: None
    sys.modules[page.__name__] = page
    sys.exit(main())
