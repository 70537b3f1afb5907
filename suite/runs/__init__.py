"""Runs: cells, the cell store, provenance, the runner."""
