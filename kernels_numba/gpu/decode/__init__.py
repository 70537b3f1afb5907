"""The kernels around the MLP in a decode step: attention, and the addition with the norm behind it."""
