"""The version, where code can read it without importing anything."""

__version__ = "0.1.0"
