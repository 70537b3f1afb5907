"""What the kernels take from the machine: inline PTX for Numba, and the twin of each function for Numba's simulator."""
