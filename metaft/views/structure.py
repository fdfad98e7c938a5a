"""The model from its input to its head: what each layer makes, costs and becomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from metaft.plots.text import fitted
from metaft.views.base import Cell, Column, Drawing, Missing, Of, Table, View
from metaft.views.layers import Block, blocks_among, layers_of
from metaft.views.moves import MEANING, NONE, moves_of
from metaft.views.subject import Subject
from metaft.views.template import rendered

_ROW, _WIDE = 58, 380  # units of the drawing: height of a block's row, and the whole's width
_BOX = 120  # the widest box


class Box(NamedTuple):
    """A block as it is drawn."""

    x: float
    y: float
    width: float
    height: float
    state: str
    """The word by which it is coloured."""
    lines: tuple[str, ...]


def structure(subject: Subject) -> View | Missing:
    built = subject.built
    layers = layers_of(built.module, built.x)
    blocks = blocks_among(built.blocks, built.head, layers)
    states, how = moves_of(subject, layers)
    if not subject.has_head and subject.command == "start":  # whose classes are not decided yet
        blocks = [block for block in blocks if block.name != "head"]
        layers = [layer for block in blocks for layer in block.layers]
    total, flops = sum(layer.parameters for layer in layers), sum(layer.flops for layer in layers)
    shape = _times(built.x.shape[1:])
    caption = (
        f"One input of {shape} passes through {len(layers)} layers with {total:,} parameters. Convolutions and matrix "
        f"products cost {quantity(flops)} FLOPs (a product and a sum are two), as torch counts them."
    )
    rows: list[list[Cell]] = [
        [
            number, layer.path, layer.kind, "not used" if layer.shape is None else _times(layer.shape),
            layer.parameters, layer.flops, states.get(layer.path, NONE),
        ]
        for number, layer in enumerate(layers, 1)
    ]  # fmt: skip
    columns = ("", "layer", "kind", "output", "parameters", "FLOPs", "what becomes of it")
    of = Of("1 input", "evaluation", _step(subject))
    drawing = Drawing("From the input to the head", drawn(blocks, states, shape), of)
    legend = [f"{word}: {meaning}" for word, meaning in MEANING.items() if word in _words(states.values())]
    said = ". ".join(["; ".join(legend).capitalize(), how] if legend else [how]).strip(". ")
    table = Table("Layers", [Column(name) for name in columns], rows)
    return View(caption, [drawing, *([f"{said}."] if said else []), table])


def _step(subject: Subject) -> str:
    if subject.command == "meta_train":
        return f"meta-step {subject.start.about['step']:,}, the best on validation"
    if subject.command == "adapt":
        return f"{subject.kept}, the classifier that was kept"
    return "before any"


def _words(states: Sequence[str] | object) -> set[str]:
    return {state.partition(",")[0] for state in states}  # type: ignore[union-attr]


def drawn(blocks: Sequence[Block], states: Mapping[str, str], shape: str) -> str:
    """SVG: a box for each block, the wider the more channels its output has, and the higher the more places."""
    shapes = [block.shape or (1,) for block in blocks]
    channels, sides = [s[0] for s in shapes], [math.prod(s[1:]) ** 0.5 for s in shapes]
    boxes = []
    for i, block in enumerate(blocks):
        width = 20 + (_BOX - 20) * math.log2(1 + channels[i]) / math.log2(1 + max(channels))
        height = 8 + 30 * math.log2(1 + sides[i]) / math.log2(1 + max(sides))
        state = _state_of(block, states)
        lines = (
            fitted([_short(block.name)], 2.0, 8)[0],
            f"→ {_times(block.shape) if block.shape else '?'}",
            f"{quantity(block.parameters)} parameters · {quantity(block.flops)} FLOPs",
        )
        top = 44 + i * _ROW
        boxes.append(Box((_BOX + 10 - width) / 2, top + (_ROW - 14 - height) / 2, width, height, state, lines))
    alt = f"{len(blocks)} blocks from an input of {shape} to {_times(shapes[-1])}"
    return rendered(
        "drawing.svg", boxes=boxes, shape=shape, alt=alt, width=_WIDE, height=50 + _ROW * len(blocks), row=_ROW,
        middle=(_BOX + 10) / 2,
    )  # fmt: skip


def _short(name: str) -> str:
    """Without the way into what wraps the backbone."""
    while name.startswith("body."):
        name = name.removeprefix("body.")
    return name


def _state_of(block: Block, states: Mapping[str, str]) -> str:
    """The word that most of its parameters stand under."""
    counts: Counter[str] = Counter()
    for layer in block.layers:
        if layer.path in states:
            counts[states[layer.path].partition(",")[0]] += layer.parameters
    return counts.most_common(1)[0][0] if counts else NONE


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "1"


def quantity(n: int) -> str:
    """A number in three digits, with the prefixes of units.

    >>> quantity(0), quantity(999), quantity(1000), quantity(36_928), quantity(999_999), quantity(1_234_567_890)
    ('0', '999', '1.00 k', '36.9 k', '1.00 M', '1.23 G')
    """
    for size, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(n / size) + 1e-3))
            return f"{n / size:,.{digits}f} {prefix}"
    return str(n)
