"""The journal: a file with one record per direction of every step."""
