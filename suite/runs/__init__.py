"""Runs: cells, their work, the store, the run folder and its checks."""
