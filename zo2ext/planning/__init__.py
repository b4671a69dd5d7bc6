"""Predictions of a model's memory and speed on a machine, before its weights are loaded."""
