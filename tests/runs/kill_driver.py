"""Runs a matrix in children that are killed at random moments; prints what happened as JSON. A program of its own, so
that forking is safe: nothing here has started a thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import suite.runs.view.assemble  # noqa: F401  imported before the fork, so that children start at once
from suite.runs.run import Options, run
from tests.runs.fakes import FakeWorker, FakeWorld, matrix

CONFIG = matrix(seeds=[0, 1])


def child(results: Path, log: Path, seconds: float, say_file: Path) -> int:
    """Fork a process that runs the matrix; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with say_file.open("a") as said:
            worker = FakeWorker(seconds=seconds, log=log)
            run(CONFIG, FakeWorld(), worker, Options(results), lambda line: print(line, file=said, flush=True))
        code = 0
    except BaseException:  # noqa: BLE001  a forked child must never return into the parent's loop
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stored(results: Path) -> set[str]:
    return {path.name.removesuffix(".json.gz") for path in results.glob("cells/*/*.json.gz")}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def kill_rounds(folder: Path, rounds: int) -> dict[str, object]:
    draw = random.Random(int(folder.stat().st_mtime_ns))
    killed = again = torn = 0
    for number in range(rounds):
        results = folder / f"store{number % 3}"  # several, so that kills fall early and late in a run
        before, log = stored(results), folder / f"log{number}"
        pid = child(results, log, 0.004, folder / "said")
        time.sleep(draw.uniform(0.002, 0.16))
        os.kill(pid, signal.SIGKILL)
        killed += exit_code(pid) == -signal.SIGKILL
        again += len(before & set(lines(log)))
        torn += sum(path.stat().st_size == 0 for path in results.glob("cells/*/*.json.gz"))
    codes = [exit_code(child(folder / f"store{i}", folder / "last", 0, folder / "said")) for i in range(3)]
    return {
        "killed": killed,
        "computed_again": again,
        "torn": torn,
        "codes": codes,
        "damaged": sum("damaged" in line for line in lines(folder / "said")),
        "leftovers": [path.name for path in folder.rglob("cells/*/.*.tmp")],
    }


def two_processes(folder: Path) -> dict[str, object]:
    results, log = folder / "shared", folder / "log"
    pids = [child(results, log, 0.004, folder / f"said{i}") for i in (0, 1, 2)]
    return {"codes": [exit_code(pid) for pid in pids], "computed": sorted(lines(log))}


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    done = two_processes(folder) if mode == "two" else kill_rounds(folder, int(sys.argv[3]))
    sys.stdout.write(json.dumps(done))


if __name__ == "__main__":
    main()
