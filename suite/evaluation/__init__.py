"""Accuracy: tasks, scopes, scoring; lm-eval's tasks over sparse models."""
