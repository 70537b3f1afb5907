"""Baselines beside COUNTDOWN; they import only the method contract."""
