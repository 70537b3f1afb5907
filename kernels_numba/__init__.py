"""Numba kernels of sparse gated MLPs, with torch and numpy only; nothing here imports the suite.

``kernels_numba.reference``
    The gated MLP in float64, and the error a right kernel may have.
``kernels_numba.cpu``
    ``ThresholdLayer`` (CATS, M-COUNTDOWN, either with a factor a neuron, given or made by a low rank), ``GivenLayer`` (a
    given active set), ``sparse_down_proj``, ``transpose_down``.
``kernels_numba.gpu``
    The same for CUDA devices; its README.md walks one launch from x to y.

Import the module that is needed: importing this package loads neither torch nor numba. It sets ``OMP_WAIT_POLICY`` to
``passive`` where the user has not set it: OpenMP's idle threads spin by default, and on a machine with one other busy
process a layer then takes 20 ms instead of .1 (NOTES.md).
"""

from __future__ import annotations

import os
import sys

# OpenMP reads its variables when it is loaded: by torch at import, by numba at its first parallel call.
_LOADS_OPENMP = {"torch": "torch", "numba.np.ufunc.omppool": "numba"}
# Libraries that had loaded it before the policy was set here: it still spins.
OPENMP_TOO_LATE: tuple[str, ...] = ()

if "OMP_WAIT_POLICY" not in os.environ:
    OPENMP_TOO_LATE = tuple(name for module, name in _LOADS_OPENMP.items() if module in sys.modules)
    os.environ["OMP_WAIT_POLICY"] = "passive"
