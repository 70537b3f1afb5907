"""Sparsification methods: one frozen dataclass and one file each."""
