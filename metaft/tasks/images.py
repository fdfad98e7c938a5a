"""The former place of `metaft.inputs.reading`, for those who import from here."""

from metaft.inputs.reading import looks_grey, open_image, read, read_all

__all__ = ["looks_grey", "open_image", "read", "read_all"]
