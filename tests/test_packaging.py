"""The wheel and the source archive hold what they need: installed into a clean virtual environment, and run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | environment
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # a copy: two workers that build in one folder take each other's files away
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results"))
    built = run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def clean_python(archives, tmp_path_factory):
    """Python of a new environment with the wheel; its dependencies are lent by a path file, which runs no .pth of theirs.

    So the project itself, which tox installs as an editable path file, cannot leak in.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--no-deps", "--no-index", archives[0], cwd=folder)
    assert installed.returncode == 0, installed.stderr
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_and_sdist_hold_configs_pack_and_licence(archives):
    wheel = set(zipfile.ZipFile(archives[0]).namelist())
    with tarfile.open(archives[1]) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    data = [p for d in ("suite/configs", "suite/evaluation/pack") for p in (ROOT / d).iterdir() if p.is_file()]
    assert len(data) > 10
    for path in data:
        relative = path.relative_to(ROOT).as_posix()
        assert relative in wheel
        assert relative in sdist
    assert "suite/py.typed" in wheel
    assert any(name.endswith("LICENSE") for name in wheel)
    assert not any(name.startswith(("tests/", "results/")) for name in wheel)


def test_the_installed_suite_is_the_wheel(clean_python, tmp_path):
    found = run(clean_python, "-c", "import suite; print(suite.__file__)", cwd=tmp_path)
    assert str(clean_python.parent.parent) in found.stdout


@pytest.mark.parametrize("verb", [["--help"], ["--version"], ["ls"], ["check", "paper"], ["check", "embedded"]])
def test_the_installed_command_runs(clean_python, tmp_path, verb):
    command = clean_python.parent / "countdown-suite"
    done = run(command, *verb, cwd=tmp_path, COUNTDOWN_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert done.returncode in ((0,) if verb[0] != "check" else (0, 2)), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout


def test_the_installed_pack_feeds_lm_eval(clean_python, tmp_path):
    code = (
        "from suite.evaluation.tasks import resolve_task\n"
        "from suite.evaluation.built_task import build_task\n"
        "print(len(build_task(resolve_task('pack_knowledge'), 0).eval_docs))"
    )
    done = run(clean_python, "-c", code, cwd=tmp_path)
    assert int(done.stdout) >= 200, done.stderr
