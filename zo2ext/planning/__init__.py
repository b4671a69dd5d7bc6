"""Predictions of what a model needs on a machine, before it is loaded."""
