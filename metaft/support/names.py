"""Class names as people want to read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CODE_POINT = re.compile(r"^U\+[0-9A-F]{4,6} (?=.)")


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them begin with, and without code points, while they stay distinct.

    >>> short_names(["Greek/U+03B1 GREEK SMALL LETTER ALPHA", "Greek/U+03B2 GREEK SMALL LETTER BETA"])
    ['ALPHA', 'BETA']
    >>> short_names(["red fox", "red panda"]), short_names(["cat", "dog"]), short_names(["red", "red fox"])
    (['fox', 'panda'], ['cat', 'dog'], ['red', 'red fox'])
    """
    words = [_words(name) for name in names]
    common = 0
    while all(len(w) > common + 1 for w in words) and len({w[common] for w in words}) == 1:
        common += 1
    short = ["".join(w[common:]) for w in words]
    return short if len(names) > 1 and len(set(short)) == len(set(names)) else list(names)


def natural(name: str) -> tuple[list[str | int], str]:
    """What to sort names by so that numbers in them count as such.

    >>> sorted(["10", "9b", "2", "class 10", "class 9"], key=natural)
    ['2', '9b', '10', 'class 9', 'class 10']
    """
    parts = re.split(r"([0-9]+)", name)  # text, number, text, ...: places of one kind are compared
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def is_text(name: str) -> bool:
    """Whether a name can be written down: Python keeps bytes of a file name that are not UTF-8 as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _words(name: str) -> list[str]:
    """The name cut behind spaces and slashes, and a code point that stands at its start or behind a slash left out."""
    parts = [_CODE_POINT.sub("", part) for part in re.split(r"(?<=/)", name)]
    return re.findall(r"[^ /]+[ /]*|[ /]+", "".join(parts))
