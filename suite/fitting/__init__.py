"""Fitting the practical modes: thresholds, calibration text, artifacts."""
