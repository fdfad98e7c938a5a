"""Regression to sine waves: the first experiment of the MAML paper (https://arxiv.org/abs/1703.03400, section 5.1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from metaft.errors import DataError
from metaft.sampler import Stream, raw_words, uniform
from metaft.support.modes import in_usual_modes
from metaft.types import SPLITS, Batch, Episode, Loss, Split

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Sinusoid:
    """Tasks y = A sin(x - p), A uniform in 0.1..5, p in 0..pi, x in -5..5.

    The tasks of train, val and test have one distribution; the splits are different random streams.
    """

    device: str = "cpu"
    name: str = dataclasses.field(default="sinusoid", init=False)
    loss: Loss = dataclasses.field(default="mse", init=False)
    shape: tuple[int, ...] = dataclasses.field(default=(1,), init=False)

    @property
    def split_hash(self) -> str:
        """Digest of the task distribution, since there are no classes to split."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """The task distribution, as plain data."""
        return {"amplitude": list(AMPLITUDE), "phase": list(PHASE), "x": list(X)}

    def to(self, device: str) -> Sinusoid:
        """The same tasks with their points on another device."""
        return dataclasses.replace(self, device=device)

    def source(
        self,
        *,
        ways: int = 1,
        shots: int,
        query_shots: int,
        rotate: bool = False,
        splits: Sequence[Split] = SPLITS,
    ) -> SinusoidTasks:
        """Tasks with `shots` support and `query_shots` query points.

        Raises DataError for ways other than 1, for fewer than one point, and for `rotate`.
        """
        if ways != 1:
            raise DataError(f"sinusoid: ways must be 1, the curve's one output, got {ways}")
        for field, points in (("shots", shots), ("query_shots", query_shots)):
            if points < 1:
                raise DataError(f"{field} must be at least 1, got {points}")
        if rotate:
            raise DataError("sinusoid: rotate must be false, there are no images to rotate")
        return SinusoidTasks(shots, query_shots, tuple(splits), self.device)


@dataclasses.dataclass(frozen=True)
class SinusoidTasks:
    """A `Source` of sine waves; make it with `Sinusoid.source`."""

    shots: int
    query_shots: int
    splits: tuple[Split, ...] = SPLITS
    device: str = "cpu"
    name: str = dataclasses.field(default="sinusoid", init=False)
    loss: Loss = dataclasses.field(default="mse", init=False)
    ways: int = dataclasses.field(default=1, init=False)
    shape: tuple[int, ...] = dataclasses.field(default=(1,), init=False)

    @in_usual_modes
    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        """Tasks number `indices`: support [B, K, 1], query [B, Q, 1], class_ids all 0 [B, 1]."""
        return Episode(*(part.to(self.device) for part in self.indices(seed, split, indices)))

    def indices(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        """`episodes` on the CPU: a curve's few points are all that a device is sent."""
        points = self.shots + self.query_shots
        words = self._words(seed, split, indices, 2 + points + 1, stream=Stream.EPISODES)
        x = _between(X, words[:, 2:-1])
        y = _wave(words[:, :1], words[:, 1:2], x)
        return Episode(
            support_x=self._tensor(x[:, : self.shots]),
            support_y=self._tensor(y[:, : self.shots]),
            query_x=self._tensor(x[:, self.shots :]),
            query_y=self._tensor(y[:, self.shots :]),
            class_ids=torch.zeros(len(words), 1, dtype=torch.int64),
            key=self._key(words),
        )

    def gather(self, drawn: Episode) -> Episode:
        """The same."""
        return drawn

    @in_usual_modes
    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        """Points of all tasks at once, for pre-training: each of the `size` points is of a random task of its own.

        x and y are [B, size, 1].
        """
        return Batch(*(part.to(self.device) for part in self.batch_indices(seed, split, indices, size)))

    def batch_indices(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        """`batches` on the CPU."""
        words = self._words(seed, split, indices, 3 * size + 1, stream=Stream.BATCHES)
        x = _between(X, words[:, 2 * size : 3 * size])
        y = _wave(words[:, :size], words[:, size : 2 * size], x)
        return Batch(x=self._tensor(x), y=self._tensor(y), key=self._key(words))

    def gather_batch(self, drawn: Batch) -> Batch:
        """The same."""
        return drawn

    def _words(self, seed: int, split: Split, indices: Sequence[int], words: int, stream: Stream) -> np.ndarray:
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.name}: split {split!r} is not one of {known}, which were asked for")
        return raw_words(seed, split, indices, words, stream=stream)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).unsqueeze(-1)

    def _key(self, words: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((words[:, -1] >> np.uint64(1)).astype(np.int64))


def _between(limits: tuple[float, float], words: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * uniform(words)


def _wave(amplitude: np.ndarray, phase: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _between(AMPLITUDE, amplitude) * np.sin(x - _between(PHASE, phase))
