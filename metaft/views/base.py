"""What a page is made of: a view is a title, a caption in plain words, pictures and tables, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from metaft.views.subject import Subject

Cell = str | int | float | None
"""Text, or a number, by which a column is sorted; None where there is none."""


class Column(NamedTuple):
    """Of a table."""

    name: str
    form: str = ""
    """How Python's `format` writes its numbers; "%" counts in hundredths."""


class Table(NamedTuple):
    """Rows that a reader can sort."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


class Of(NamedTuple):
    """What each figure has to say of itself."""

    n: str
    """How many of what it shows, or is a mean of: "200 episodes"."""
    mode: str
    """Normalisation mode, or how the model computed: "transductive", "each image by itself"."""
    step: str
    """Of which step or epoch the parameters are, or which steps are shown."""

    def __str__(self) -> str:
        return f"n: {self.n} · mode: {self.mode} · step: {self.step}"


class Picture(NamedTuple):
    """An image, which is not the page's: it has its own white ground."""

    title: str
    source: str
    """A data URI."""
    alt: str
    """What it shows, for those who cannot see it."""
    width: int
    """In pixels of a page, at which its letters are as large as the page's small ones."""
    of: Of


class Drawing(NamedTuple):
    """SVG of our own, in the page's colours."""

    title: str
    svg: str
    of: Of


class Query(NamedTuple):
    """One image of a task, and what is thought of it step by step."""

    image: str
    """A data URI."""
    alt: str
    label: str
    right: bool
    """Whether the last step is."""
    columns: Sequence[str]
    """Letters of the classes whose probabilities are shown."""
    rows: Sequence[tuple[str, Sequence[float]]]
    """(step, probability of each of them)."""


class Episode(NamedTuple):
    """A task: images of its classes, and queries."""

    title: str
    classes: Sequence[tuple[str, str, Sequence[str]]]
    """(letter, name, data URIs of its support images)."""
    queries: Sequence[Query]
    of: Of


class Neighbour(NamedTuple):
    """A training image beside a mistake."""

    image: str
    label: str
    distance: float


class Mistake(NamedTuple):
    """A wrong prediction."""

    image: str
    file: str
    label: str
    predicted: str
    probability: float
    neighbours: Sequence[Neighbour]


class Mistakes(NamedTuple):
    """Wrong predictions, each with what is near it in feature space."""

    title: str
    mistakes: Sequence[Mistake]
    of: Of


class Overlay(NamedTuple):
    """An image under what a method says of it."""

    name: str
    image: str
    alt: str


class Explanation(NamedTuple):
    """One image, and what its label rests on."""

    image: str
    file: str
    classes: Sequence[tuple[str, float]]
    """The most probable, with their probabilities."""
    overlays: Sequence[Overlay]
    note: str


class Explained(NamedTuple):
    """Images, each with what its label rests on."""

    title: str
    explanations: Sequence[Explanation]
    of: Of


Part = str | Table | Picture | Drawing | Episode | Mistakes | Explained
"""Text is a paragraph."""


class View(NamedTuple):
    """What there is to see."""

    caption: str
    """In plain words."""
    parts: Sequence[Part]


class Missing(NamedTuple):
    """Why a view does not apply."""

    why: str


class Viewed(NamedTuple):
    """A member of `metaft.views.VIEWS`."""

    title: str
    of: Callable[[Subject], View | Missing]
    slow: bool = False
    """Whether it reads data or computes for long: `metaft.look` alone draws it, and no run at its end."""


def shown(cell: Cell, form: str = "") -> str:
    """A cell as it is read.

    >>> shown(1234567), shown(0.5, "%"), shown(0.5, ".1%"), shown(None), shown(0.123456, ".3g"), shown("x", ".3g")
    ('1,234,567', '50.00 %', '50.0 %', '–', '0.123', 'x')
    """
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if form.endswith("%"):
        return f"{100 * cell:{form[:-1] or '.2'}f} %"
    return f"{cell:{form}}" if form else f"{cell:,}"
