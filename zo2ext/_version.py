"""The version, where code can read it without importing anything."""

__version__ = "0.2.0"
