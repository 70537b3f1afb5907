"""A store carried to a machine with other packages: the run folder is written from it, and nothing is measured."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from suite import devices, settings
from suite.cli import main
from suite.config import build_config
from suite.runs import machine
from suite.runs.machine import StoredWorld
from suite.runs.store import CellStore
from tests.runs.tiny_world import _SHAPE, ARCHITECTURES, data_folder, save_model


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    model = save_model(tmp_path / "tiny-llama", ARCHITECTURES["tiny-llama"](**_SHAPE))
    data = data_folder(tmp_path / "data")
    matrix = {
        "name": "carried",
        "device": "cpu",
        "models": [{"id": str(model)}],
        "accuracy": [{"methods": ["dense", "cats"], "sparsities": [0.5], "tasks": [{"name": "arc_easy", "limit": 2}]}],
    }
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix))
    return ["run", str(tmp_path / "matrix.yaml"), "--data-dir", str(data), "--results", str(tmp_path / "results")]


def statuses(folder: Path) -> set[str]:
    with (folder / "accuracy.csv").open() as file:
        return {row["status"] for row in csv.DictReader(file)}


def test_a_store_is_read_under_the_versions_of_its_cells(command, tmp_path, monkeypatch, capsys):
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    versions = machine.versions
    monkeypatch.setattr(machine, "versions", lambda *names: versions(*names) | {"torch": "another"})

    def measures(*_):
        raise AssertionError("a cell was measured")

    monkeypatch.setattr("suite.runs.work.worker.TorchWorker.session", measures)
    out = tmp_path / "there"
    assert main([*command, "--rerun", "none", "--out", str(out)]) == 0
    assert statuses(out) == {"ok"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["packages"] == versions(machine.ACCURACY_PACKAGES)
    assert main([*command, "--rerun", "none", "--limit", "1", "--out", str(tmp_path / "other")]) == 1
    assert statuses(tmp_path / "other") == {"missing"}
    assert "2 cells: 0 cached, 2 missing" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0


def test_an_empty_store_is_refused(command, capsys):
    assert main([*command, "--rerun", "none"]) == 2
    assert "no cell below" in capsys.readouterr().err


def test_speed_cells_keep_the_device_that_measured_them(tmp_path, monkeypatch):
    fields = {
        "device": "cuda", "device_name": "Some GPU", "driver_version": "1.2", "versions": {"torch": "another"}, "code": "abc",
    }  # fmt: skip
    store = CellStore(tmp_path)
    records = [{"kind": "speed", "created": "2026", "key_fields": fields | {"method": "cats"}}]
    monkeypatch.setattr(store, "records", lambda: records)
    config = build_config(
        {"name": "n", "title": "t", "speed": [{"shapes": ["llama-3.1-8b"], "methods": ["cats"], "sparsities": [0.5]}]},
        "here",
    )
    world = StoredWorld(config, store)
    assert world.speed_device("cuda") == devices.Device("cuda", "Some GPU", "1.2")
    assert world.speed_device("cpu") == devices.cpu()
    assert world.versions("speed") == {"torch": "another"}
    assert world.code("speed", "cats") == "abc"
    assert world.openmp_waiting() == settings.openmp_waiting()  # a GPU's cell says nothing of it
    of_a_cpu = fields | {"method": "cats", "device": "cpu", "openmp_waiting": "active"}
    records.insert(0, {"kind": "speed", "created": "2025", "key_fields": of_a_cpu})
    assert StoredWorld(config, store).openmp_waiting() == "active"
