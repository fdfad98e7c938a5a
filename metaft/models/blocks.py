"""The blocks of a backbone, from its input to its output: what is frozen, unfrozen or given a rate as one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks_of(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the parameters that can learn, block by block.

    A module that only holds another one is looked into, and so is one that is mostly a row of others: the stages of a
    ResNet, the layers of a transformer. Rows are opened once; what is in them is a block. Layers whose parameters all
    have one axis or none (normalisation) belong to the block before them, and parameters of a module's own to the one
    after.
    """
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    paths = list(_opened(module, "", rows=1))
    blocks: list[list[str]] = []
    waiting: list[str] = []
    taken: set[str] = set()
    for path in paths:
        inside = [n for n in learning if n not in taken and (n == path or n.startswith(f"{path}."))]
        taken |= set(inside)
        if not inside:
            continue
        if path in inside:  # a parameter by itself
            waiting += inside
        elif blocks and not waiting and all(module.get_parameter(n).dim() < 2 for n in inside):
            blocks[-1] += inside
        else:
            blocks.append([*waiting, *inside])
            waiting = []
    waiting += [n for n in learning if n not in taken]
    if waiting:
        blocks = [*blocks[:-1], [*(blocks[-1] if blocks else []), *waiting]]
    return tuple(map(tuple, blocks))


def _opened(module: nn.Module, path: str, rows: int) -> Iterator[str]:
    """Paths of parameters and parts, in their order, that a block begins with."""
    below = f"{path}." if path else ""
    yield from (below + name for name, _ in module.named_parameters(recurse=False))
    children = [(name, part) for name, part in module.named_children() if _size(part)]
    for name, part in children:
        if len(children) == 1 and not _is_row(part):
            yield from _opened(part, below + name, rows)
        elif rows and _is_row(part):
            yield from _of_row(part, below + name, rows - 1)
        elif rows and any(_is_most(inner, part) for inner in part.children()):
            yield from _opened(part, below + name, rows)
        else:
            yield below + name


def _of_row(row: nn.Module, path: str, rows: int) -> Iterator[str]:
    children = [(name, part) for name, part in row.named_children() if _size(part)]
    if len(children) == 1:  # no row after all
        yield from _opened(children[0][1], f"{path}.{children[0][0]}", rows + 1)
        return
    yield from (f"{path}.{name}" for name, _ in children)


def _is_most(row: nn.Module, part: nn.Module) -> bool:
    """Whether a row of three or more is most of a part; the branches of an Inception block are shorter."""
    return _is_row(row) and len([*row.children()]) > 2 and 2 * _size(row) > _size(part)


def _is_row(part: nn.Module) -> bool:
    return isinstance(part, (nn.Sequential, nn.ModuleList))


def _size(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())
