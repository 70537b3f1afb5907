import csv
import gzip
from pathlib import Path

import pytest

from suite.config import build_config
from suite.errors import InputError
from suite.runs.audit.verify import verify_files
from suite.runs.estimate import estimate
from suite.runs.run import Options, make_fits, plan, run
from suite.runs.store import CellStore
from suite.runs.view.manifest import file_hashes, read_manifest, seal
from suite.runs.work.base import Outcome
from tests.runs.fakes import FakeWorker, FakeWorld, matrix


def go(results: Path, worker: FakeWorker, config=None, world=None, say=lambda line: None, **options):
    return run(config or matrix(), world or FakeWorld(), worker, Options(results, **options), say)


def rows(folder: Path, name: str = "accuracy.csv") -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def without(folder: Path, *columns: str) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in columns} for row in rows(folder)]


def test_a_finished_run_repeated_computes_nothing(tmp_path):
    worker = FakeWorker()
    first = go(tmp_path, worker)
    before = (first.folder / "accuracy.csv").read_bytes()
    assert (first.n_ok, first.n_failed, first.n_missing) == (24, 0, 0)
    assert worker.loads == ["a", "b"]
    again = FakeWorker()
    second = go(tmp_path, again)
    assert (again.loads, again.ran) == ([], [])
    assert second.folder == first.folder
    assert (second.folder / "accuracy.csv").read_bytes() == before


def test_rerun_all_gives_the_same_csv(tmp_path):
    first = go(tmp_path, FakeWorker())
    before = without(first.folder, "elapsed_s")
    worker = FakeWorker()
    second = go(tmp_path, worker, rerun="all")
    assert len(worker.ran) == 24
    assert len(worker.fitted) == 4
    assert without(second.folder, "elapsed_s") == before


def test_a_second_process_begins_with_a_task_that_no_other_is_at(tmp_path):
    class Second(FakeWorker):
        def run(self, cell, fits):
            if cell.task.name == "t1":
                raise KeyboardInterrupt
            return super().run(cell, fits)

    class First(FakeWorker):
        def run(self, cell, fits):
            if not self.ran:
                with pytest.raises(KeyboardInterrupt):
                    go(tmp_path, second, config)
            return super().run(cell, fits)

    config, first, second = matrix(models=[{"id": "a"}]), First(), Second()
    assert go(tmp_path, first, config).n_ok == 12
    assert first.ran[0] == "A t1 dense"
    assert len(second.ran) == 5
    assert all("decode_perplexity" in label for label in second.ran)
    assert all(" t1 " in label for label in first.ran)


def test_runs_of_overlapping_matrices_share_cells(tmp_path):
    go(tmp_path, FakeWorker(), matrix(models=[{"id": "a"}]))
    worker = FakeWorker()
    go(tmp_path, worker)
    assert worker.loads == ["b"]


def test_failed_cells_are_recorded_and_retried_only_when_told(tmp_path):
    said: list[str] = []
    finished = go(tmp_path, FakeWorker(fail=["B t1 cats ideal 0.5"]), say=said.append)
    assert (finished.n_ok, finished.n_failed) == (23, 1)
    assert any("failed: B t1 cats ideal 0.5 scored: RuntimeError: no luck" in line for line in said)
    failed = [row for row in rows(finished.folder) if row["status"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["value"] == failed[0]["sparsity_realized"] == failed[0]["delta_dense"] == ""
    assert failed[0]["reason"].startswith("RuntimeError: no luck with B t1")
    store = CellStore(tmp_path)
    records = [store.get(path.name.removesuffix(".json.gz")) for path in tmp_path.glob("cells/*/*.json.gz")]
    assert ["Traceback" in record["log"] for record in records if record["status"] == "failed"] == [True]
    (log,) = finished.folder.glob("logs/*.txt")
    assert log.stem == failed[0]["cell_id"]
    assert log.read_text().startswith("B t1 cats ideal 0.5 scored\nTraceback")

    worker = FakeWorker()
    assert go(tmp_path, worker).n_failed == 1
    assert worker.ran == []
    assert go(tmp_path, worker, rerun="failed").n_failed == 0
    assert worker.ran == ["B t1 cats ideal 0.5 scored"]
    assert not list(finished.folder.glob("logs/*.txt"))


def test_a_model_that_does_not_load_fails_its_cells_and_no_others(tmp_path):
    class Broken(FakeWorker):
        def session(self, cell):
            if cell.model == "a":
                raise MemoryError("no room")
            return super().session(cell)

    finished = go(tmp_path, Broken())
    assert (finished.n_ok, finished.n_failed) == (12, 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["value", "sample"])
def test_nan_is_a_failed_cell_and_never_a_number(tmp_path, bad, where):
    class Nan(FakeWorker):
        def run(self, cell, fits):
            found = super().run(cell, fits)
            if cell.label != "A t1 cats ideal 0.9 scored":
                return found
            if where == "value":
                return Outcome([found.rows[0] | {"value": bad}], found.sparsity, found.samples)
            return Outcome(found.rows, found.sparsity, [("0", "acc", bad)])

    finished = go(tmp_path, Nan())
    assert (finished.n_ok, finished.n_failed) == (23, 1)
    failed = [row for row in rows(finished.folder) if row["status"] == "failed"]
    assert failed[0]["value"] == ""
    assert "not finite" in failed[0]["reason"]


def test_bad_input_while_running_keeps_finished_cells(tmp_path):
    class Bad(FakeWorker):
        def run(self, cell, fits):
            if cell.model == "b":
                raise InputError("model b has no gated MLP")
            return super().run(cell, fits)

    with pytest.raises(InputError, match="no gated MLP"):
        go(tmp_path, Bad())
    worker = FakeWorker()
    go(tmp_path, worker)
    assert worker.loads == ["b"]


def test_interrupt_keeps_finished_cells_and_writes_the_view(tmp_path):
    class Interrupted(FakeWorker):
        def run(self, cell, fits):
            if len(self.ran) == 5:
                raise KeyboardInterrupt
            return super().run(cell, fits)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Interrupted(), say=said.append)
    assert "5 of 24 cells are finished" in said[-1]
    (folder,) = tmp_path.glob("runs/*")
    assert [row["status"] for row in rows(folder)].count("ok") == 5
    worker = FakeWorker()
    assert go(tmp_path, worker).n_missing == 0
    assert len(worker.ran) == 19


def test_damaged_cell_is_computed_again_and_said(tmp_path):
    first = go(tmp_path, FakeWorker())
    before = without(first.folder, "elapsed_s")
    victim = sorted(tmp_path.glob("cells/*/*.json.gz"))[3]
    victim.write_bytes(victim.read_bytes()[:-9])
    said: list[str] = []
    worker = FakeWorker()
    second = go(tmp_path, worker, say=said.append)
    assert len(worker.ran) == 1
    assert any(victim.name in line and "damaged" in line for line in said)
    assert without(second.folder, "elapsed_s") == before


def test_no_fit_refuses_before_anything_runs(tmp_path):
    worker = FakeWorker()
    with pytest.raises(InputError, match=r"4 cells need a fit that is missing.*countdown-suite fit"):
        go(tmp_path, worker, no_fit=True)
    assert worker.ran == []
    assert make_fits(matrix(), FakeWorld(), worker, tmp_path, lambda line: None) == 4
    assert go(tmp_path, worker, no_fit=True).n_ok == 24


def test_two_outputs_of_one_fit_are_not_mixed(tmp_path):
    go(tmp_path, FakeWorker(), matrix(accuracy=[matrix().accuracy[1].model_dump()]))
    for path in tmp_path.glob("fits/*"):
        path.unlink()
    changed = FakeWorker()
    changed.fit_text = "another output"
    block = matrix().accuracy[1].model_dump() | {"scopes": ["scored", "paper"]}
    with pytest.raises(InputError, match=r"two outputs.*--rerun all"):
        go(tmp_path, changed, matrix(accuracy=[block]))
    assert go(tmp_path, changed, matrix(accuracy=[block]), rerun="all").n_ok == 8


def test_fit_of_each_cell_is_recorded(tmp_path):
    finished = go(tmp_path, FakeWorker())
    practical = [row for row in rows(finished.folder) if row["mode"] == "practical"]
    assert all(
        row["fit_id"] and row["estimator"] == "calibrated" and row["calibration"] == "pydoc" for row in practical
    )
    assert all(row["fit_id"] == "" for row in rows(finished.folder) if row["mode"] != "practical")


def test_delta_is_paired_by_document(tmp_path):
    """The difference of the means is that of the pairs; dense has none."""
    finished = go(tmp_path, FakeWorker())
    table = rows(finished.folder)
    dense = {(row["model"], row["task"]): float(row["value"]) for row in table if row["method"] == "dense"}
    for row in table:
        if row["method"] == "dense":
            assert row["delta_dense"] == row["delta_ci_low"] == ""
        elif row["metric"] == "acc":
            delta = float(row["delta_dense"])
            assert delta == pytest.approx(float(row["value"]) - dense[row["model"], row["task"]], abs=1e-9)
            assert float(row["delta_ci_low"]) <= delta <= float(row["delta_ci_high"])


def test_bytes_share_follows_the_realised_sparsity(tmp_path):
    table = rows(go(tmp_path, FakeWorker()).folder)
    share = {(row["method"], row["mode"], row["sparsity_target"]): float(row["bytes_share"]) for row in table}
    assert share["dense", "none", "0"] == 1
    assert share["random", "ideal", "0.9"] == pytest.approx(0.1)
    assert share["cats", "practical", "0.9"] == pytest.approx((3 - 1.8) / 3)


def test_missing_cells_have_a_row_with_a_reason(tmp_path):
    class Stops(FakeWorker):
        def run(self, cell, fits):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Stops())
    (folder,) = tmp_path.glob("runs/*")
    assert {(row["status"], row["value"]) for row in rows(folder)} == {("missing", "")}


def test_csvs_have_the_columns_of_the_schema_and_no_machine_path(tmp_path):
    from suite import schema

    results = tmp_path / "somewhere"
    finished = go(results, FakeWorker(fail=["A t1 random ideal 0.5"]), argv=["run", "--out", str(tmp_path / "x")])
    assert list(rows(finished.folder)[0]) == schema.ACCURACY.names
    assert list(rows(finished.folder, "sparsity.csv")[0]) == schema.SPARSITY.names
    with gzip.open(finished.folder / "samples.csv.gz", "rt") as file:
        assert next(csv.reader(file)) == schema.SAMPLES.names
    for path in filter(Path.is_file, finished.folder.rglob("*")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert str(results).encode() not in data
        assert str(Path.home()).encode() + b"/" not in data


def test_sealed_folder_verifies_and_a_changed_one_does_not(tmp_path):
    folder = go(tmp_path, FakeWorker()).folder
    seal(folder)
    assert verify_files(folder) == []
    text = (folder / "accuracy.csv").read_text()
    value = rows(folder)[0]["value"]
    (folder / "accuracy.csv").write_text(text.replace(f",{value},", ",0.123,", 1))
    problems = verify_files(folder)
    assert any("accuracy.csv: its hash" in problem for problem in problems)
    assert any("its samples give" in problem for problem in problems)
    (folder / "extra.txt").write_text("x")
    (folder / "speed.csv").unlink()
    problems = verify_files(folder)
    assert any("extra.txt: is not in the manifest" in problem for problem in problems)
    assert any("speed.csv: is missing" in problem for problem in problems)
    assert set(file_hashes(folder)) == {"accuracy.csv", "samples.csv.gz", "sparsity.csv", "extra.txt"}


SPEED = {"shapes": ["embedded"], "methods": ["dense", "cats", "given"], "sparsities": [0.5, 0.9], "threads": [1]}


def timing(**changes):
    return matrix(accuracy=[], models=[], speed=[SPEED | changes])


def test_speed_cells_of_a_group_are_timed_together_and_cached(tmp_path):
    worker = FakeWorker()
    finished = go(tmp_path, worker, timing(shapes=["embedded", "llama-3.1-8b"]))
    assert finished.n_ok == 10
    assert [len(group) for group in worker.timed] == [5, 5]
    table = rows(finished.folder, "speed.csv")
    assert {(row["device_name"], row["threads"], row["status"]) for row in table} == {("fake", "1", "ok")}
    go(tmp_path, worker, timing(shapes=["embedded", "llama-3.1-8b"]))
    assert len(worker.timed) == 2


def test_one_missing_case_times_its_whole_group_again(tmp_path):
    worker = FakeWorker()
    go(tmp_path, worker, timing(sparsities=[0.5]))
    go(tmp_path, worker, timing())
    assert [len(group) for group in worker.timed] == [3, 5]


def test_a_failed_check_has_no_time(tmp_path):
    finished = go(tmp_path, FakeWorker(fail=["cats s=0.9"]), timing())
    assert (finished.n_ok, finished.n_failed) == (4, 1)
    failed = [row for row in rows(finished.folder, "speed.csv") if row["status"] == "failed"]
    assert [(row["method"], row["latency_us_median"], row["reason"]) for row in failed] == [
        ("cats", "", "check failed")
    ]
    worker = FakeWorker()
    assert go(tmp_path, worker, timing(), rerun="failed").n_failed == 0
    assert [len(group) for group in worker.timed] == [5]


def test_cases_without_a_gpu_are_rows_with_a_reason(tmp_path, monkeypatch):
    """The real timing room, which looks for the GPU before anything else."""
    from suite.runs.work.worker import TorchWorker

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = timing(backends=["torch", "numba-cuda"], dtypes=["bfloat16"])
    finished = run(config, FakeWorld(), TorchWorker(), Options(tmp_path))
    assert finished.n_skipped == 5
    for row in rows(finished.folder, "speed.csv"):
        assert (row["status"], row["latency_us_median"]) == ("skipped", "")
        assert "no CUDA device" in row["reason"]


def test_a_finished_run_repeated_leaves_its_sealed_folder_alone(tmp_path):
    reports = []

    def report(folder):
        reports.append(folder)
        (folder / "REPORT.md").write_text("report")
        seal(folder)

    def again():
        return run(matrix(), FakeWorld(), FakeWorker(), Options(tmp_path), report=report)

    folder = again().folder
    manifest = (folder / "manifest.json").read_bytes()
    again()
    assert len(reports) == 1
    assert (folder / "manifest.json").read_bytes() == manifest
    (folder / "REPORT.md").write_text("changed by hand")
    again()
    assert len(reports) == 2
    (folder / "accuracy.csv").unlink()
    again()
    assert len(reports) == 3
    assert verify_files(folder) == []


def test_phases_of_traced_cells_have_a_file_of_their_own(tmp_path):
    class Tracing(FakeWorker):
        def time(self, cells, fits):
            phases = [{"phase": name, "us_median": 2.0, "us_q05": 1.0, "us_q95": 3.0} for name in ("fill", "choose")]
            timed = zip(cells, super().time(cells, fits), strict=True)
            return [row | {"phases": phases if cell.case.method == "cats" else []} for cell, row in timed]

    assert not (go(tmp_path / "a", FakeWorker(), timing()).folder / "phases.csv").exists()
    finished = go(tmp_path / "b", Tracing(), timing())
    traced = sorted(row["cell_id"] for row in rows(finished.folder, "speed.csv") if row["method"] == "cats")
    found = rows(finished.folder, "phases.csv")
    assert [row["cell_id"] for row in found] == [cell for cell in traced for _ in range(2)]
    assert [row["phase"] for row in found] == ["fill", "choose"] * 2


def speed_fits():
    """Two decode rows of real weights, whose fits no accuracy cell has."""
    block = {"level": "decode", "shapes": ["embedded"], "methods": ["dense", "m-countdown"], "sparsities": [0.5, 0.9]}
    return matrix(accuracy=[], models=[], speed=[block | {"backends": ["numba-cpu"]}])


def test_fits_of_speed_cells_are_fits_of_the_matrix(tmp_path):
    config, worker = speed_fits(), FakeWorker()
    plan_ = plan(config, FakeWorld())
    assert len(plan_.fits) == 2
    slow = estimate(plan_, CellStore(tmp_path), FakeWorld(), tmp_path).seconds
    with pytest.raises(InputError, match=r"2 cells need a fit that is missing.*countdown-suite fit"):
        go(tmp_path, worker, config, no_fit=True)
    assert make_fits(config, FakeWorld(), worker, tmp_path, lambda line: None) == 2
    assert set(worker.fitted) == set(plan_.fits)
    assert estimate(plan_, CellStore(tmp_path), FakeWorld(), tmp_path).seconds < slow
    manifest = read_manifest(go(tmp_path, worker, config, no_fit=True).folder)
    assert set(manifest["fits"]) == {key[:16] for key in plan_.fits}
    assert set(manifest["in_domain"]) == {"pydoc"}


def test_a_new_output_of_a_fit_is_not_mixed_with_speed_cells_of_the_old(tmp_path):
    config = speed_fits()
    go(tmp_path, FakeWorker(), config)
    for path in tmp_path.glob("fits/*"):
        path.unlink()
    changed = FakeWorker()
    changed.fit_text = "another output"
    block = {"methods": ["m-countdown"], "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
    more = build_config(config.model_dump() | {"models": [{"id": "embedded"}], "accuracy": [block]}, "test")
    with pytest.raises(InputError, match=r"two outputs.*--rerun all"):
        go(tmp_path, changed, more)
