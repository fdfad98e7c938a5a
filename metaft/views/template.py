"""The way to jinja2: what is put into a page is escaped, wherever it came from."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from metaft.views.base import shown

FOLDER = Path(__file__).parent / "page"


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_finished,
    )  # fmt: skip
    made.filters["shown"] = shown
    return made


def rendered(template: str, **values: Any) -> Markup:
    """A template of `metaft/views/page` with these values."""
    return Markup(_environment().get_template(template).render(**values))


def included(name: str) -> Markup:
    """A file of `metaft/views/page` as it is."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


_BIDI = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
"""Controls that would turn what follows a name around; the page isolates names by itself."""


def _finished(value: Any) -> Any:
    """What HTML and UTF-8 can hold: names of files may have control characters, or bytes that are no text."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    kept = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in value)
    return kept.translate(_BIDI)
