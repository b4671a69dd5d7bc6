"""Places where weights are computed with: CPU, GPU, and a simulated device for tests."""
