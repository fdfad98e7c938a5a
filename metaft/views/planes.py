"""Planes through a space of parameters, and what a loss is on them. Pure, of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from metaft.types import Params


class Plane(NamedTuple):
    """All points origin + a first + b second."""

    origin: Params
    first: Params
    second: Params

    def at(self, a: float, b: float) -> Params:
        """Of what neither direction moves, the origin's own tensors."""
        return {k: v + a * self.first[k] + b * self.second[k] if k in self.first else v for k, v in self.origin.items()}


class Projected(NamedTuple):
    """Points in the plane that lies nearest to them."""

    plane: Plane
    points: np.ndarray
    """[n, 2]"""
    shares: tuple[float, float]
    """Of the squared distances from the origin, how much lies along each direction."""
    residual: float
    """And how much in neither."""


def principal_plane(points: Sequence[Params], origin: Params) -> Projected | None:
    """The plane through the origin in which the squared distances of the points from it are kept best: the first two
    principal directions of their differences, of length 1 and unscaled (Lorch 2016; Li, Xu, Taylor, Studer and
    Goldstein 2018, https://arxiv.org/abs/1712.09913, section 7). None where the differences have fewer than two
    directions.

    Their mean is not taken off, unlike in a principal component analysis of points: the origin is where the path ends,
    and has to lie in the plane. The directions come from the points' inner products, so that no matrix of all
    parameters is ever made; the first point has no negative coordinate.
    """
    names = list(points[0])
    differences = [{k: point[k].double() - origin[k].double() for k in names} for point in points]
    inner = np.array([[sum(float((a[k] * b[k]).sum()) for k in names) for b in differences] for a in differences])
    values, vectors = np.linalg.eigh(inner)
    (second, first), total = np.maximum(values[-2:], 0) if len(values) > 1 else (0.0, values[-1]), values.sum()
    if not total > 0 or second <= 1e-12 * total:
        return None
    directions, columns = [], []
    for value, vector in ((first, vectors[:, -1]), (second, vectors[:, -2])):
        along = inner @ vector / np.sqrt(value)  # coordinates of the points
        sign = -1.0 if along[0] < 0 else 1.0
        weights = sign * vector / np.sqrt(value)
        columns.append(sign * along)
        directions.append(_combined(differences, weights.tolist(), origin))
    shares = (float(first / total), float(second / total))
    return Projected(Plane(origin, *directions), np.stack(columns, 1), shares, max(0.0, 1 - sum(shares)))


def _combined(differences: Sequence[Params], weights: Sequence[float], origin: Params) -> Params:
    """Their weighted sum, in the origin's types."""
    pairs = list(zip(weights, differences, strict=True))
    return {k: torch.stack([w * d[k] for w, d in pairs]).sum(0).to(origin[k]) for k in differences[0]}


def filter_normalised(origin: Params, names: Sequence[str], seed: int = 0) -> Plane:
    """A random plane through the origin, each filter of a direction as long as the origin's filter (same paper, section
    4): a filter is what makes one output of a layer. Of `names`, those with one axis (biases, scales and shifts) stay,
    as do all others."""
    generator = torch.Generator().manual_seed(seed)

    def direction() -> Params:
        drawn: Params = {}
        for name in sorted(names):  # so that the same names are the same plane
            weight = origin[name].double().cpu()
            if weight.dim() < 2:
                continue
            random = torch.randn(weight.shape, generator=generator, dtype=torch.float64).flatten(1)
            lengths = weight.flatten(1).norm(dim=1, keepdim=True)
            scaled = random / random.norm(dim=1, keepdim=True).clamp_min(1e-12) * lengths
            drawn[name] = scaled.view(weight.shape).to(origin[name])
        return drawn

    return Plane(origin, direction(), direction())


def surface(
    loss: Callable[[Params], float], plane: Plane, xs: np.ndarray, ys: np.ndarray, each: Callable[[], None]
) -> np.ndarray:
    """float64 [len(ys), len(xs)] of the loss, NaN where it is not finite; `each` is called after each point."""
    values = np.full((len(ys), len(xs)), np.nan)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            value = loss(plane.at(float(x), float(y)))
            values[i, j] = value if np.isfinite(value) else np.nan
            each()
    return values


def span(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` places along each axis, from a quarter of the points' extent before the first to as much behind the last.
    The shorter side is at least a fifth of the longer one."""
    low, high = points.min(0), points.max(0)
    half = np.maximum((high - low) / 2, (high - low).max() / 10) * 1.5
    middle = (low + high) / 2
    xs, ys = (np.linspace(m - h, m + h, count) for m, h in zip(middle, half, strict=True))
    return xs, ys
