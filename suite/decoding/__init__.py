"""Decode steps of whole models: one sequence, few launches, dense and sparse in the same loop."""
