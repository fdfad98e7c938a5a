"""A plane through the parameters as it is to be drawn: what is seen of it, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metaft.types import Params
from metaft.views.base import Of
from metaft.views.planes import Plane, Projected, filter_normalised


class Scene(NamedTuple):
    """One picture that is to be computed."""

    title: str
    plane: Plane
    loss: Callable[[Params], float]
    around: np.ndarray
    """Points [n, 2] that are to be seen."""
    axes: tuple[str, str]
    paths: Mapping[str, np.ndarray]
    marks: Mapping[str, tuple[float, float]]
    says: str
    """What is drawn, for those who cannot see it."""
    of: Of
    projected: Projected | None = None


def path_scene(
    title: str, projected: Projected, paths: Mapping[str, np.ndarray], loss: Callable[[Params], float], of: Of,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Scene:  # fmt: skip
    first, second = (f"{100 * share:.1f} %" for share in projected.shares)
    axes = (f"first direction, {first} of the squared distance", f"second, {second}")
    says = (
        f"{title}: {', '.join(f'{name} in {len(path)} points' for name, path in paths.items())}, over the contours of "
        f"the loss; {100 * projected.residual:.3g} % of the squared distance is not in the plane"
    )
    around = np.concatenate([*paths.values(), *(np.array([mark]) for mark in (marks or {}).values())])
    return Scene(title, projected.plane, loss, around, axes, paths, marks or {}, says, of, projected)


def random_scene(end: Params, names: Sequence[str], loss: Callable[[Params], float], of: Of) -> Scene | None:
    """None where no parameter is a filter."""
    plane = filter_normalised(end, names)
    if not plane.first:
        return None
    corners = np.array([[-1.0, -1.0], [1.0, 1.0]]) / 1.5  # which the margin makes 1
    title = "A random plane through the end"
    axes = ("first random direction, in lengths of the filters", "second")
    says = f"{title}: contours of the loss in two filter-normalised directions, from -1 to 1"
    return Scene(title, plane, loss, corners, axes, {}, {"end": (0.0, 0.0)}, says, of)


def onto(plane: Plane, params: Params) -> tuple[float, float]:
    """Where a point's projection lies."""
    away = {k: params[k].double() - plane.origin[k].double() for k in plane.first}
    a, b = (sum(float((away[k] * d[k].double()).sum()) for k in d) for d in (plane.first, plane.second))
    return a, b
