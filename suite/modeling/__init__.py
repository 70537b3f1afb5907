"""Models: loading, the uniform view of a gated MLP, attaching a method."""
