"""Numba kernels of sparse gated MLPs, with torch and numpy only; nothing here imports the suite.

``kernels_numba.reference``
    The gated MLP in float64, and the error a right kernel may have.
``kernels_numba.cpu``
    ``ThresholdLayer`` (CATS, M-COUNTDOWN), ``GivenLayer`` (a given active set), ``sparse_down_proj``, ``transpose_down``.
``kernels_numba.gpu``
    The same for CUDA devices.

Import the module that is needed: importing this package loads neither torch nor numba.
"""
