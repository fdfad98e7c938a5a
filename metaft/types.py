"""The shapes and records that every part of metaft shares.

Shape letters: `B` tasks of a meta-batch, `N` ways, `K` shots, `Q` query shots (per class), `C, H, W` an image.
A record that stands for one task has no `B` axis; `metaft.outer` alone adds and removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from metaft.objective import Loss as Loss

Params = dict[str, Tensor]
"""Named tensors: meta-parameters, fast weights, gradients. Flat, so that a checkpoint is a plain list of names."""

Moments = tuple[tuple[Tensor, Tensor], ...]
"""(mean [C], biased variance [C]) of every normalisation layer, in the order in which the forward pass meets them."""

Norm = Literal["transductive", "inductive"]
"""transductive: a batch is normalised with its own statistics; inductive: with those of the support set."""

NORMS: tuple[Norm, Norm] = ("transductive", "inductive")

Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")


class Episode(NamedTuple):
    """One meta-batch of tasks; without the leading `B` one task.

    Support and query are disjoint, and both are in random order, so that position tells nothing about the label.
    """

    support_x: Tensor
    """[B, N*K, C, H, W] float, or [B, K, 1] for the sinusoid."""
    support_y: Tensor
    """[B, N*K] int64 labels in 0..N-1, or [B, K, 1] float targets."""
    query_x: Tensor
    """[B, N*Q, C, H, W]"""
    query_y: Tensor
    """[B, N*Q]"""
    class_ids: Tensor
    """[B, N] int64: which class of the pool label n stands for."""
    key: Tensor
    """[B] int64: the task's own random key, from which masks and augmentations derive."""


class Batch(NamedTuple):
    """Images of all classes of a split, for members that train without episodes."""

    x: Tensor
    """[B, size, C, H, W] float."""
    y: Tensor
    """[B, size] int64: index of the class within its split."""
    key: Tensor
    """[B] int64."""


class Fast(NamedTuple):
    """What one task's adaptation leaves behind: everything `predict` needs.

    With `trajectory=True` every tensor carries a leading axis of `steps + 1`: before the first step, after each one.
    """

    params: Params
    """The fast weights."""
    moments: Moments
    """Support-set moments at the fast weights; empty where they were not asked for."""
    extra: Params
    """What a member needs besides weights, e.g. ProtoNet's prototypes [N, D]."""


@runtime_checkable
class Source(Protocol):
    """Where episodes come from. Episode i is a function of (seed, split, i) and of nothing else."""

    @property
    def name(self) -> str: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def ways(self) -> int:
        """Classes per task, which is the number of outputs of a model's head (1 for the sinusoid)."""
        ...

    @property
    def shots(self) -> int: ...

    @property
    def query_shots(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, e.g. (C, H, W)."""
        ...

    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        """Episodes number `indices` of a split, stacked along a leading axis."""
        ...

    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        """Batches number `indices` over all classes of a split, stacked along a leading axis."""
        ...


@runtime_checkable
class Static(Protocol):
    """What a source has whose episodes are made on the device: what chance decides, and the rest, apart."""

    def indices(self, seed: int, split: Split, indices: Sequence[int]) -> Any:
        """A tree of small CPU tensors [B, ...], whose shapes are the same for every index."""
        ...

    def gather(self, drawn: Any) -> Episode:
        """Episodes of them on the device where they are: tensor operations alone, with no look at any value."""
        ...

    def batch_indices(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Any: ...

    def gather_batch(self, drawn: Any) -> Batch: ...


class Dataset(Protocol):
    """What `--dataset` names: it makes sources of any ways and shots over the same data."""

    @property
    def name(self) -> str: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def split_hash(self) -> str:
        """Digest of which class is in which split; a checkpoint carries it."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Plain data for the checkpoint: "inputs" (see `metaft.inputs`), where files become them, and class names."""
        ...

    def to(self, device: str) -> Dataset: ...

    def source(
        self, *, ways: int, shots: int, query_shots: int, rotate: bool = False, splits: Sequence[Split] = SPLITS
    ) -> Source:
        """Raises DataError where a split has too few classes or a class too few images."""
        ...
