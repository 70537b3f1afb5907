"""The kernels of a sparse gated MLP: one persistent launch a layer. ``kernel`` puts them together; ``plan`` is their shape."""
