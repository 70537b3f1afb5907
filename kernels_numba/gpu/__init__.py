"""CUDA kernels. The folder is not called ``cuda``: numba-cuda's import hook claims every name with "numba.cuda" in it."""
