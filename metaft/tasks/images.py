"""The former place of `metaft.inputs.reading`, for those who import from here."""

from metaft.inputs.pictures import looks_grey, read_all
from metaft.inputs.reading import open_image, read

__all__ = ["looks_grey", "open_image", "read", "read_all"]
