"""Pictures that a page holds itself: charts as SVG, images as PNG, each as a data URI."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from metaft.views.base import Of, Picture

PER_INCH = 80
"""Pixels of a page for an inch of a chart: letters of 10 points are 11 pixels high."""


def chart(title: str, figure: Figure, alt: str, of: Of) -> Picture:
    """A figure of matplotlib. The same figure gives the same bytes: no date, no random names."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "metaft", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(title, source, alt, round(PER_INCH * figure.get_size_inches()[0]), of)


def thumbnail(pixels: np.ndarray, side: int = 64) -> str:
    """uint8 [H, W] or [H, W, 3] as a PNG of at most `side` pixels; a smaller image keeps its size."""
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def raw_thumbnail(raw: Tensor, side: int = 64) -> str:
    """The same of uint8 [C, H, W]."""
    return thumbnail(raw.permute(1, 2, 0).squeeze(-1).contiguous().cpu().numpy(), side)
