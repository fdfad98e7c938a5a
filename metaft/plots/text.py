"""How wide a text is, and how a class name is brought into the room there is for it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from metaft.plots.style import FONT

_HEADS = (0.6, 0.8, 0.4, 1.0, 0.2, 0.0)


def width(text: str, size: float) -> float:
    """Inches that the text takes at a size in points, before the pixels of a picture round it."""
    return size * _ems(text) / 72


def fitted(names: Sequence[str], inches: float, size: float) -> list[str]:
    """The names, with those that are wider made to fit in the way that leaves the most of them distinct.

    They are cut in their middle, or where the middle is what tells them apart, word by word.

    >>> fitted(["omega", "epsilon with grave", "epsilon with acute"], 0.7, 8)
    ['omega', 'epsilo…rave', 'epsilo…cute']
    >>> fitted(["spotted lower owl", "spotted upper owl", "striped lower owl", "spotted lower elk"], 0.6, 8)
    ['sp. lo. owl', 'spott…owl', 'st. lo. owl', 'sp. lo. elk']
    """
    ways = (*(functools.partial(_cut, head=head) for head in _HEADS), _abbreviated)
    return max(([way(name, inches, size) for name in names] for way in ways), key=lambda some: len(set(some)))


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """The text in lines. A word that is wider than a line goes on in the next one; a no-break space is no end of one.

    >>> wrapped("epsilon with grave", 0.8, 8), wrapped("epsilon_with_grave", 0.8, 8)
    (['epsilon with', 'grave'], ['epsilon_with_', 'grave'])
    """
    lines = [""]
    for word in filter(None, text.split(" ")):
        joined = f"{lines[-1]} {word}".lstrip()
        if width(joined, size) > inches and lines[-1]:
            lines.append("")
            joined = word
        while width(joined, size) > inches and len(joined) > 1:
            letters = max(1, _most(joined, inches, size))
            lines[-1:] = [joined[:letters], ""]
            joined = joined[letters:]
        lines[-1] = joined
    return lines


def _most(text: str, inches: float, size: float) -> int:
    """How many letters from the start of the text fit."""
    return bisect.bisect_right(range(len(text) + 1), inches, key=lambda n: width(text[:n], size)) - 1


def _cut(name: str, inches: float, size: float, head: float) -> str:
    """As many letters as fit, the part `head` of them from the name's start and the others from its end."""
    if width(name, size) <= inches:
        return name

    def part(letters: int) -> str:
        first = round(head * letters)
        return f"{name[:first].rstrip()}…{name[len(name) - letters + first :].lstrip()}"

    return part(max(0, bisect.bisect_right(range(len(name)), inches, key=lambda n: width(part(n), size)) - 1))


def _abbreviated(name: str, inches: float, size: float) -> str:
    """Its words with at most as many letters as fit, or the middle cut out where not even two of each do."""
    words = name.split()
    for letters in range(max(map(len, words), default=0), 1, -1):
        short = " ".join(word if len(word) <= letters + 1 else f"{word[:letters]}." for word in words)
        if width(short, size) <= inches:
            return short
    return _cut(name, inches, size, _HEADS[0])


@functools.lru_cache(maxsize=4096)
def _ems(text: str) -> float:
    if not text:
        return 0.0
    font = FontProperties(family=FONT, size=100)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 100
