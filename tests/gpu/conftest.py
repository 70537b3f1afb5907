"""What makes a test on a GPU independent of the tests before it, in whichever worker it runs."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Tests draw without seeds of their own, too: the same numbers whatever ran before."""
    torch.manual_seed(0)
