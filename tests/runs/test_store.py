import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from suite.errors import InputError
from suite.runs.store import CellStore, StoreFullError, canonical, finite, write_atomically

RECORD = {"key": "ab12", "kind": "accuracy", "status": "ok", "samples": [("1", "acc", 0.1)], "elapsed_s": 1.5}


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path)


def test_what_is_put_comes_back(store):
    store.put(RECORD)
    found = store.get("ab12")
    assert found["samples"] == [["1", "acc", 0.1]]
    assert found["elapsed_s"] == 1.5
    assert store.get("cd34") is None


def test_equal_records_are_equal_files(store, tmp_path):
    other = CellStore(tmp_path / "other")
    store.put(RECORD)
    other.put(RECORD)
    assert store.path("ab12").read_bytes() == other.path("ab12").read_bytes()


def flip(data: bytes) -> bytes:
    record = json.loads(gzip.decompress(data))
    record["samples"][0][2] = 0.2
    return gzip.compress(json.dumps(record).encode())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        lambda data: gzip.compress(b"[]"),
        lambda data: gzip.compress(b"{"),
        lambda data: b"not gzip at all",
        flip,
    ],
)
def test_damage_is_found_and_said_once(tmp_path, damage):
    said: list[str] = []
    store = CellStore(tmp_path, said.append)
    store.put(RECORD)
    path = store.path("ab12")
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("ab12") is None
    assert store.get("ab12") is None
    assert len(said) == 1
    assert "damaged cell ab12" in said[0]
    store.put(RECORD)
    assert store.get("ab12") is not None


def test_record_under_another_key_is_damaged(store):
    store.put(RECORD)
    store.path("ab12").rename(store.path("ab12").with_name("ab13.json.gz"))
    assert store.get("ab13") is None


def test_newer_schema_is_refused(store):
    store.path("ab12").parent.mkdir(parents=True)
    store.path("ab12").write_bytes(gzip.compress(b'{"schema_version": 99, "key": "ab12"}'))
    with pytest.raises(InputError, match=r"schema 99.*update countdown-suite"):
        store.get("ab12")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_no_record_holds_nan_or_infinity(store, value):
    assert not finite(value)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.put({**RECORD, "rows": value})
    assert store.get("ab12") is None


def test_canonical_json_does_not_depend_on_order():
    assert canonical({"b": 1, "a": (0.1, None)}) == canonical({"a": [0.1, None], "b": 1}) == '{"a":[0.1,null],"b":1}'


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_size_limit_of_the_system_is_a_full_disk(tmp_path):
    """A real refusal by the kernel, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from suite.runs.store import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(Path(sys.argv[1]), b'x' * 5000)\n"
        "except StoreFullError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert done.returncode == 7
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_file_in_the_way_of_the_folder_is_one_clear_line(tmp_path):
    (tmp_path / "cells").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*--results"):
        CellStore(tmp_path).put(RECORD)


def test_lock_is_exclusive_and_does_not_wait_when_told(store, tmp_path):
    with store.lock("k") as held:
        assert held
        code = (
            "import sys; from pathlib import Path; from suite.runs.store import CellStore\n"
            "with CellStore(Path(sys.argv[1])).lock('k', wait=False) as held: sys.exit(3 if held else 4)"
        )
        run = [sys.executable, "-c", code, str(tmp_path)]
        assert subprocess.run(run, check=False).returncode == 4
    assert subprocess.run(run, check=False).returncode == 3
