"""Cells: what a matrix measures, one by one, with the key of everything that decides their numbers. Loads no torch."""
