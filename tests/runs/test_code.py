"""What the keys of cells cover of the source: what the import graph says, and nothing of another method."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from suite import code
from suite.registry import METHODS

ROOT = Path(__file__).parents[2]
# Runs in a copy of the house: edits it file by file, and prints the hashes after each edit.
SCRIPT = """
import json, sys
from pathlib import Path
from suite import code
from suite.config import load_config
from suite.runs.machine import LocalWorld

OWN = [("accuracy", "own.method:Own"), ("accuracy", "alone:Own")]
KINDS = [("accuracy", "cats"), ("accuracy", "m-countdown"), *OWN, ("speed", "cats"), ("analysis", "")]
world = LocalWorld(load_config("embedded"))
for name, old, new in json.loads(sys.argv[1]):
    path = Path(name)
    was = path.read_text() if path.exists() else None
    assert was is None or old in was, name
    path.write_text(was.replace(old, new, 1) if was else new)
    for function in (code.code_hash, code.reached, code._imports, code._graph, code.source_of):
        function.cache_clear()
    print(json.dumps([world.code(*kind) for kind in KINDS] + [code.code_hash((code.REPORT,))]))
    path.write_text(was) if was is not None else path.unlink()
assert "torch" not in sys.modules
"""
NAMES = CATS, OURS, OWN, ALONE, SPEED, ANALYSIS, REPORT = "cats m-countdown own alone speed analysis report".split()
ACCURACY = {CATS, OURS, OWN, ALONE}
CELLS = ACCURACY | {SPEED, ANALYSIS}
# A user's single file: one import for checkers of types only, one inside a function.
ALONE_TEXT = """
from typing import TYPE_CHECKING
import baselines.cats
if TYPE_CHECKING:
    from baselines.dejavu import DejaVu
def later():
    from baselines import dejavu_abs
"""
NEW_LINE = (
    '"dense": "suite.methods.dense:Dense",',
    '"new": "suite.methods.new:New",\n    "dense": "suite.methods.dense:Dense",',
)
EDITS = {
    ("suite/statistics.py", "", "#\n"): ACCURACY | {REPORT},
    ("suite/evaluation/lm_eval.py", "", "#\n"): ACCURACY,
    ("suite/fitting/training.py", "", "#\n"): ACCURACY,
    ("suite/modeling/gated_mlp.py", "", "#\n"): CELLS,
    ("suite/methods/base.py", "", "#\n"): CELLS | {REPORT},
    ("suite/methods/m_countdown.py", "", "#\n"): {OURS, ANALYSIS},
    ("suite/methods/s_countdown.py", "", "#\n"): set(),
    ("baselines/cats.py", "", "#\n"): {CATS, OWN, ALONE, SPEED, ANALYSIS},  # the users' methods inherit from it
    ("baselines/dejavu_abs.py", "", "#\n"): {ALONE},
    ("baselines/dejavu.py", "", "#\n"): set(),
    ("suite/methods/new.py", "", "import suite.methods.base"): set(),
    ("suite/registry.py", *NEW_LINE): set(),
    ("suite/registry.py", "def get_method", "def get_method_"): CELLS | {REPORT},
    ("suite/__init__.py", '__version__ = "', '__version__ = "9'): set(),
    ("suite/__init__.py", "import kernels_numba ", "import kernels_numba  "): CELLS | {REPORT},
    ("kernels_numba/__init__.py", "", "#\n"): CELLS | {REPORT},  # sets how threads wait
    ("own/__init__.py", "", "import os\n"): {OWN},
    ("suite/speed/layer_cpu.py", "", "#\n"): {SPEED},
    ("suite/decoding/parts_cuda.py", "", "#\n"): {SPEED},
    ("suite/devices.py", "", "#\n"): CELLS,
    ("kernels_numba/gpu/decode/attention.py", "", "#\n"): {SPEED},
    ("kernels_numba/gpu/host/layers.py", "", "#\n"): {SPEED},  # accuracy is computed masked
    ("kernels_numba/cpu_kernels.py", "", "#\n"): {SPEED},
    ("kernels_numba/gpu/masking.py", "", "#\n"): CELLS | {REPORT},  # but it selects
    ("suite/modeling/decode.py", "", "#\n"): ACCURACY | {SPEED},
    ("suite/modeling/decode_probe.py", "", "#\n"): ACCURACY,
    ("suite/runs/work/worker.py", "", "#\n"): CELLS,
    ("suite/runs/work/accuracy.py", "", "#\n"): ACCURACY,
    ("suite/runs/work/fits.py", "", "#\n"): ACCURACY,
    ("suite/runs/work/analysis.py", "", "#\n"): {ANALYSIS},
    ("suite/runs/work/speed.py", "", "#\n"): {SPEED},
    ("suite/runs/view/assemble.py", "", "#\n"): set(),
    ("suite/report/quality.py", "", "#\n"): {REPORT},
    ("suite/cli.py", "", "#\n"): set(),
    ("own/method.py", "", "#\n"): {OWN},
    ("own/helper.py", "", "#\n"): {OWN},
    ("own/other.py", "", "#\n"): set(),
    ("alone.py", "", "#\n"): {ALONE},
}  # fmt: skip


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """What changes its hash with each edit."""
    house = tmp_path_factory.mktemp("house")
    for package in ("suite", "kernels_numba", "baselines"):
        shutil.copytree(ROOT / package, house / package, ignore=shutil.ignore_patterns("__pycache__"))
    (house / "own").mkdir()
    for name, text in (
        ("__init__", ""),
        ("method", "from baselines.cats import Cats\nfrom own.helper import a\n"),
        ("helper", "a = 1\n"),
        ("other", "#\n"),
    ):
        (house / "own" / f"{name}.py").write_text(text)
    (house / "alone.py").write_text(ALONE_TEXT)
    edits = [("suite/cli.py", "", ""), *EDITS]
    command = [sys.executable, "-c", SCRIPT, json.dumps(edits)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(house), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, *after = map(json.loads, done.stdout.splitlines())
    return {
        edit: {name for name, old, new in zip(NAMES, before, hashes, strict=True) if old != new}
        for edit, hashes in zip(EDITS, after, strict=True)
    }


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit[0]} {edit[2][:12]!r}")
def test_a_hash_covers_what_decides_the_number_and_no_other_method(changed, edit):
    assert changed[edit] == EDITS[edit]


def test_the_work_of_one_kind_is_in_the_keys_of_its_cells_alone():
    """Modules of suite.runs.work that are not named serve every kind; whatever one of them imports is covered."""
    graph = code._graph("suite", "kernels_numba", "baselines")
    work = {module for module in graph.modules if module.startswith("suite.runs.work.")}
    assert set(code.WORK) < work
    for kind in ("accuracy", "analysis", "speed"):
        found = code.reached((code.WORKER,), code.CLOSED.get(kind, ()), code.others(kind))
        assert found & set(code.WORK) == {module for module, own in code.WORK.items() if own == kind}
        assert {module for module in found if module.startswith("suite.runs.")} <= work | {"suite.runs.work"}
        for module in found & work:
            assert graph.find_modules_directly_imported_by(module) - set(code.others(kind)) <= found


def test_an_analysis_is_over_the_methods_that_it_names():
    from suite.analysis import coefficients

    assert set(code.strings_of(code.ANALYSIS, METHODS)) == {coefficients.DIRECT, *coefficients.ROWS}
