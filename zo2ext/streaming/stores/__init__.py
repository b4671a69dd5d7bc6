"""Places where weights rest: host memory, memory shared by ranks, files."""
