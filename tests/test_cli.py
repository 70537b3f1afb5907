"""The command line as a user runs it."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from suite import __version__
from suite.cli import main
from suite.runs.audit.config import config_of
from suite.runs.audit.recompute import recompute
from tests.runs.fakes import FakeWorker, FakeWorld

ROOT = Path(__file__).parents[1]
MATRIX = {
    "name": "tiny",
    "models": [{"id": "a"}],
    "accuracy": [
        {"methods": ["dense", "random", "cats"], "sparsities": [0.5, 0.9], "tasks": ["t1", "decode_perplexity"]},
        {"methods": ["cats"], "modes": ["practical"], "sparsities": [0.5, 0.9], "tasks": ["t1"]},
    ],
}
N_CELLS = 12


@pytest.fixture
def matrix(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MATRIX))
    return str(path)


def quick_report(folder: Path) -> None:
    (folder / "REPORT.md").write_text("quick")


@pytest.fixture
def worker(quick, monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    """The quick worker without the report, which takes most of a run's time and has tests of its own."""
    monkeypatch.setattr("suite.report.page.write_report", quick_report)
    monkeypatch.setattr("suite.report.rebuild.rebuild_problems", lambda folder: [])
    return quick


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    """One quick worker for all commands of a test, and no real models or data."""
    made = FakeWorker()
    monkeypatch.setattr("suite.runs.work.worker.TorchWorker", lambda **_: made)
    monkeypatch.setattr("suite.runs.machine.LocalWorld", FakeWorld)
    return made


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "suite.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["info"], ["run", "--help"], ["check", "embedded"]])
def test_what_needs_no_model_does_not_load_torch(arguments):
    code = (
        "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'matplotlib', 'numba'} & set(sys.modules); "
        "sys.exit(f'loads {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_finished_run_repeated_does_not_load_torch(tmp_path, matrix):
    command = [sys.executable, "-m", "tests.runs.fake_cli", "0", "run", matrix, "--results", str(tmp_path / "r")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code = (
        "import sys, runpy; sys.argv = ['fake_cli', *sys.argv[1:]]\n"
        "try: runpy.run_module('tests.runs.fake_cli', run_name='__main__')\n"
        "except SystemExit as done: sys.exit('loads torch' if 'torch' in sys.modules else done.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command[3:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{N_CELLS} cached, 0 to run" in done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"countdown-suite {__version__}\n"


def test_ls_names_every_kind(capsys, tmp_path):
    assert main(["ls", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("m-countdown", "pack_grammar", "decode_perplexity", "microsoft/phi-4", "paper"):
        assert name in out
    assert main(["ls", "methods"]) == 0
    lines = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["dense"][0] == "none"
    assert lines["cats"] == ["ideal, practical", "Lee et al. 2024, arXiv 2404.08763"]
    assert lines["md-countdown"] == ["ideal, practical", "this suite"]
    assert lines["d-countdown"][0] == "ideal, practical (needs predictor)"


def test_benchmark_prints_its_table_with_times_checks_and_reasons(tmp_path, worker, capsys):
    worker.fail = ("given",)
    command = ["benchmark", "--shape", "embedded", "--sparsity", "0.9", "--threads", "1", "--results", str(tmp_path)]
    assert main([*command, "--method", "dense", "--method", "m-countdown", "--method", "given"]) == 1
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[2:6])
    assert header[:5] == ["method", "backend", "sparsity", "realised", "median"]
    assert header[-4:] == ["speed-up", "efficiency", "check", "status"]
    table = {row[0]: row for row in rows}
    latency = {name: float(table[name][-5]) for name in ("dense", "m-countdown")}
    assert table["dense"][-4] == "1.00"
    assert float(table["m-countdown"][-4]) == pytest.approx(latency["dense"] / latency["m-countdown"], rel=0.05)
    assert table["m-countdown"][-2:] == ["passed", "ok"]
    assert table["given"][-3:] == ["failed:", "check", "failed"]
    assert not any(re.fullmatch(r"\d+\.\d\d", cell) for cell in table["given"][5:])  # a failed case has no time


def test_run_with_its_real_report_verifies_until_changed_by_hand(tmp_path, matrix, quick, capsys):
    folder = tmp_path / "one"
    assert main(["run", matrix, "--results", str(tmp_path / "r"), "--out", str(folder)]) == 0
    assert f"{N_CELLS} cells ok, 0 failed" in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    table = folder / "accuracy.csv"
    table.write_text(table.read_text().replace("random", "rnadom"))
    assert main(["verify", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "accuracy.csv: its hash does not match" in err
    assert "REPORT.md: is not what the run's CSVs give" in err
    assert main(["report", str(folder)]) == 0  # seals the changed table, and does not make it what was measured
    assert main(["verify", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "accuracy.csv: is not what the run wrote" in err
    assert "method is 'rnadom', its cell's key says 'random'" in err


def test_compare_says_which_keys_changed(tmp_path, matrix, worker, capsys):
    results = ["--results", str(tmp_path / "r")]
    assert main(["run", matrix, *results, "--out", str(tmp_path / "one")]) == 0
    assert main(["run", matrix, *results, "--out", str(tmp_path / "two"), "--batch-size", "4"]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert "config.batch_size: 8 -> 4" in out
    assert f"key changed in {N_CELLS} cells: batch_size: 8 -> 4" in out
    assert (
        main(["compare", str(tmp_path / "one"), str(Path(__file__).parents[1] / "results/reference/embedded-cpu")]) == 0
    )
    out = capsys.readouterr().out
    assert "config.accuracy: " in out
    assert max(map(len, out.splitlines())) < 250  # a matrix is not printed
    assert main(["ls", "runs", *results]) == 0


def test_verify_measures_sampled_cells_again(tmp_path, matrix, worker, capsys):
    folder = tmp_path / "one"
    assert main(["run", matrix, "--results", str(tmp_path / "r"), "--out", str(folder)]) == 0
    assert main(["verify", str(folder), "--recompute", "3"]) == 0
    assert "3 cells measured again" in capsys.readouterr().err
    path = folder / "accuracy.csv"
    lines = path.read_text().splitlines(keepends=True)
    column = lines[0].split(",").index("value")
    changed = [lines[0]]
    for line in lines[1:]:
        parts = line.split(",")
        parts[column] = "0.321"
        changed.append(",".join(parts))
    path.write_text("".join(changed))
    before = len(worker.ran)
    assert main(["verify", str(folder), "--recompute", "2"]) == 1
    assert "nothing is measured again while there are problems" in capsys.readouterr().err
    assert len(worker.ran) == before
    found = recompute(folder, config_of(folder, {}), FakeWorld(), worker, 2, lambda line: None)
    assert [problem for problem in found if "was 0.321, is" in problem] == found
    assert len(found) == 2


def test_check_counts_cached_and_missing(tmp_path, matrix, worker, capsys):
    results = ["--results", str(tmp_path / "r")]
    assert main(["check", matrix, *results]) == 0
    out = capsys.readouterr().out
    assert f"cells     {N_CELLS}: {N_CELLS} accuracy, 0 speed" in out
    assert f"0 cached, {N_CELLS} missing" in out
    assert re.search(r"estimate  about \d+ (s|min), \d+\.\d GiB of memory, 0\.0 GiB to download", out)
    assert worker.ran == []
    worker.fail = ("cats ideal 0.9",)
    assert main(["run", matrix, *results]) == 1
    capsys.readouterr()
    assert main(["check", matrix, *results]) == 0
    out = capsys.readouterr().out
    assert f"{N_CELLS - 2} cached, 0 missing, 2 failed" in out
    assert "--rerun failed" in out


def test_check_of_an_absent_model_tells_download_or_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["check", "embedded", "--model", "some/Model-7B", "--results", str(tmp_path), "--only", "accuracy"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "13.0 GiB to download" in out
    assert (
        "missing   model some/Model-7B: model some/Model-7B is not on disk: countdown-suite prepare downloads it" in out
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    assert "the hub is offline" in capsys.readouterr().out


def test_prepare_of_a_matrix_that_wants_data_needs_no_data_folder(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "model" / "model.safetensors")
    assert main(["prepare", "gpu-accuracy", "--model", f"{tmp_path / 'model'}=bfloat16"]) == 0
    assert capsys.readouterr().out == "model: ready\n"
    assert main(["prepare", "gpu-accuracy", "--model", "m.gguf=float9"]) == 2
    assert "must be 'float32', 'bfloat16' or 'float16', got 'float9'" in capsys.readouterr().err


def test_a_failed_cell_is_exit_1_and_goes_away_with_rerun_failed(tmp_path, matrix, worker, capsys):
    results = ["--results", str(tmp_path / "r")]
    worker.fail = ("random ideal 0.5",)
    assert main(["run", matrix, *results]) == 1
    captured = capsys.readouterr()
    assert f"{N_CELLS - 2} cells ok, 2 failed" in captured.out
    assert "Traceback" not in captured.err
    worker.fail = ()
    assert main(["run", matrix, *results]) == 1
    assert main(["run", matrix, *results, "--rerun", "failed"]) == 0


def test_overrides_reach_the_cells(tmp_path, matrix, worker):
    folder = tmp_path / "out"
    options = [
        "--limit",
        "5",
        "--seed",
        "3",
        "--seed",
        "4",
        "--model",
        "x=bfloat16",
        "--model",
        "y",
        "--batch-size",
        "2",
    ]
    assert main(["run", matrix, "--results", str(tmp_path / "r"), "--out", str(folder), *options]) == 0
    config = json.loads((folder / "manifest.json").read_text())["config"]
    assert config["seeds"] == [3, 4]
    assert config["models"] == [{"id": "x", "dtype": "bfloat16"}, {"id": "y", "dtype": "float32"}]
    assert config["batch_size"] == 2
    assert {task["limit"] for block in config["accuracy"] for task in block["tasks"]} == {5}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_exit_130_and_keeps_finished_cells(tmp_path, matrix, number):
    command = [sys.executable, "-m", "tests.runs.fake_cli", "0.2", "run", matrix, "--results", str(tmp_path / "r")]
    # a shell ignores SIGINT for what it starts in the background, and children inherit that
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **default)
    while not list(tmp_path.glob("r/cells/*/*.json.gz")):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(rf"interrupted: \d+ of {N_CELLS} cells are finished and kept", err)
    assert err.rstrip().endswith("run the same command again to go on where it stopped")
    finished = len(list(tmp_path.glob("r/cells/*/*.json.gz")))
    assert 0 < finished < N_CELLS
    command[3] = "0"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"{N_CELLS} cells: {finished} cached" in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    plain = program("run", str(tmp_path / "no.yaml"))
    debug = program("run", str(tmp_path / "no.yaml"), "--debug")
    assert (plain.returncode, plain.stderr.count("\n"), "Traceback" in plain.stderr) == (2, 1, False)
    assert "Traceback" in debug.stderr
    assert debug.returncode != 0
