"""Bounds of numbers that several options have."""

LARGEST = 1e30
"""Of the rates and bounds that are above zero."""

MOST_PIXELS = 4096
"""Per side of what a model computes with: of more a single picture takes gigabytes."""
