"""A run's folder: log, plots, report, checkpoints."""
