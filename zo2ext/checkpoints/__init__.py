"""Files in and out: checkpoints, model cards, fingerprints."""
