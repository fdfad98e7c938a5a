"""Tables for people."""

from __future__ import annotations

import re
from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, two spaces apart."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same, the head first, as GitHub and others read it."""
    head, *others = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *others))


def latex(lines: Sequence[Sequence[str]]) -> str:
    """The same as a `tabular`."""
    head, *others = [" & ".join(map(_escaped, line)) + r" \\" for line in lines]
    rows = [rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\hline", head, r"\hline", *others, r"\hline"]
    return "\n".join([*rows, r"\end{tabular}"])


_LATEX = {
    **{letter: rf"\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "+": "$+$",
}


def _escaped(cell: str) -> str:
    cell = re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", cell)
    return "".join({**_LATEX, "\N{MINUS SIGN}": "$-$"}.get(letter, letter) for letter in cell)
