"""The version, in one place: a literal that the build reads without importing torch, and that costs nothing here."""

__version__ = "0.1.0"
