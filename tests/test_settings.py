"""What the packages do to the environment of their process, seen from outside: each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def printed(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["suite", "kernels_numba"])
def test_idle_openmp_threads_wait_passively_and_the_user_may_say_otherwise(package):
    code = f"import os, sys, {package}; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert printed(code) == "False passive"
    assert printed(code, OMP_WAIT_POLICY="active") == "False active"


def test_info_says_how_threads_wait_and_that_torch_was_loaded_too_early():
    shown = "from suite.settings import openmp_waiting; print(openmp_waiting())"
    assert printed(shown) == "passive"
    assert printed("import torch; " + shown) == "passive (late)"  # whatever loaded it: a key names no library
    assert printed("import torch; " + shown, OMP_WAIT_POLICY="active") == "active"
    shown = "from suite.cli_actions import show_info; show_info()"
    assert "passive, but torch loaded before: import suite first" in printed("import torch; " + shown)
