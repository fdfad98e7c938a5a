"""Images grouped by class, and the episodes drawn from them."""

# Above 300 lines: a pool and its episodes share the arrays that both are made of.
from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError, check_ways
from metaft.inputs import ImageInputs
from metaft.sampler import Stream, choose, raw_words
from metaft.support.modes import in_usual_modes
from metaft.types import SPLITS, Batch, Episode, Loss, Split


@functools.lru_cache(maxsize=64)
@in_usual_modes
def _turned(side: int, device: torch.device) -> Tensor:
    """int64 [4, side * side]: where each pixel of an image comes from, for 0 to 3 quarter turns."""
    grid = np.arange(side * side).reshape(side, side)
    return torch.from_numpy(np.stack([np.rot90(grid, t).ravel() for t in range(4)])).to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassPool:
    """Images grouped by class. Class c owns rows `starts[c] : starts[c] + counts[c]` of `images`.

    Classes may share rows: a class that is another one turned by quarter turns only says so in `turns`.
    """

    name: str
    images: Tensor
    """uint8 [M, C, H, W]"""
    class_names: tuple[str, ...]
    starts: np.ndarray
    """int64 [classes]"""
    counts: np.ndarray
    """int64 [classes]"""
    splits: Mapping[str, np.ndarray]
    """"train", "val", "test" -> int64 class numbers; disjoint, fixed, independent of every seed."""
    inputs: ImageInputs
    turns: np.ndarray | None = None
    """int64 [classes] quarter turns that belong to the class itself; None: none."""
    kept_from: str | None = None
    """A device whose memory `images` are too large for: they stay where they are, and it is sent each episode's own."""
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Class name -> how many of its pictures could not be read and were left out."""
    default_rotate: bool = False
    """Whether episodes turn each class by random quarter turns where nobody says: only where the published protocol
    does. Elsewhere a turned class is another class, or not a picture one would meet."""

    loss: Loss = dataclasses.field(default="cross_entropy", init=False)

    def __post_init__(self) -> None:
        p = self.inputs
        if self.images.dtype != torch.uint8 or tuple(self.images.shape[1:]) != (p.channels, p.height, p.width):
            raise DataError(
                f"{self.name}: images must be uint8 [M, {p.channels}, {p.height}, {p.width}], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        seen: dict[int, str] = {}
        for split, classes in self.splits.items():
            for c in classes.tolist():
                if c in seen:
                    raise DataError(f"{self.name}: class {self.class_names[c]!r} is in both {seen[c]!r} and {split!r}")
                seen[c] = split

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where episodes are made."""
        return self.images.device if self.kept_from is None else torch.device(self.kept_from)

    @property
    def split_hash(self) -> str:
        lines = [f"{split}\t{self.class_names[c]}" for split in SPLITS for c in self.splits[split]]
        return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()

    def digest(self) -> str:
        """Of all that episodes are made of, pixels and their order too; `split_hash` knows names alone."""
        turns = self.turns if self.turns is not None else np.empty(0)
        arrays = [self.starts, self.counts, turns, *(self.splits[split] for split in SPLITS), self.images.cpu().numpy()]
        total = hashlib.blake2b(repr((self.class_names, self.inputs)).encode())
        for array in arrays:
            total.update(repr((array.shape, array.dtype)).encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()[:16]

    def describe(self) -> Mapping[str, object]:
        return {
            "inputs": self.inputs.plain(),
            "classes": {split: [self.class_names[c] for c in self.splits[split]] for split in SPLITS},
        }

    def to(self, device: str, *, budget: int | None = None) -> ClassPool:
        """The same pool with its pixels on another device, or in host memory where they take more than `budget` bytes
        (None: half of what a GPU has free, and as much as it takes elsewhere)."""
        if budget is None and torch.device(device).type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        if budget is not None and self.images.nbytes > budget:
            return dataclasses.replace(self, images=self.images.cpu(), kept_from=device)
        return dataclasses.replace(self, images=self.images.to(device), kept_from=None)

    def source(
        self,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        rotate: bool = False,
        splits: Sequence[Split] = SPLITS,
    ) -> ClassEpisodes:
        """Episodes of `ways` classes with `shots` support and `query_shots` query images each.

        Raises DataError where one of `splits` has fewer than `ways` classes, one of their classes fewer than
        `shots + query_shots` images, or `rotate` meets images that are not square.
        """
        return ClassEpisodes(self, ways, shots, query_shots, rotate, tuple(splits))


def skipped_words(skipped: Mapping[str, int], name: str) -> str:
    """What to add to the number of a class's images where some were left out."""
    return f" ({skipped[name]} more cannot be read and were skipped)" if name in skipped else ""


class Draw(NamedTuple):
    """Which pixels make up B episodes: small integer arrays, drawn on the CPU."""

    rows: np.ndarray
    """[B, N*K + N*Q] rows of the pool's images: support first, then query."""
    turns: np.ndarray
    """[B, N*K + N*Q] quarter turns."""
    labels: np.ndarray
    """[B, N*K + N*Q] in 0..N-1."""
    class_ids: np.ndarray
    """[B, N]"""
    key: np.ndarray
    """[B]"""


class Drawn(NamedTuple):
    """A `Draw` of episodes or batches as small tensors: all that the device of a pool is sent for them."""

    images: Tensor
    """int64 [B, n] rows of the pool's images; of a pool that stays in host memory uint8 [B, n, C, H, W] pixels."""
    turns: Tensor
    """int64 [B, n]"""
    labels: Tensor
    """int64 [B, n]"""
    class_ids: Tensor
    """int64 [B, N]; of batches [B, 0]."""
    key: Tensor
    """int64 [B]"""


@dataclasses.dataclass(frozen=True, eq=False)
class ClassEpisodes:
    """A `Source` over a `ClassPool`; make it with `ClassPool.source`."""

    pool: ClassPool
    ways: int
    shots: int
    query_shots: int
    rotate: bool
    splits: tuple[Split, ...]

    def __post_init__(self) -> None:
        for field in ("ways", "shots", "query_shots"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} must be at least 1, got {getattr(self, field)}")
        check_ways("ways", self.ways, self.loss)
        for split in self.splits:
            self._check(split)
        if self.rotate and self.pool.turns is not None:
            raise DataError(
                f"{self.name}: rotate must be false, quarter turns of an image are classes of their own here"
            )
        if (self.rotate or self.pool.turns is not None) and self.shape[-1] != self.shape[-2]:
            raise DataError(f"{self.name}: rotate needs square images, got {list(self.shape)}")

    def _check(self, split: Split) -> None:
        """Raises DataError where a split has too few classes, or one of them too few images."""
        classes, need = self.pool.splits[split], self.shots + self.query_shots
        if len(classes) < self.ways:
            raise DataError(
                f"{self.name}: split {split!r} has {len(classes)} classes, fewer than ways = {self.ways}; "
                f"{len(classes)} is the most that it allows"
            )
        short = classes[self.pool.counts[classes] < need]
        if len(short):
            c = int(short[0])
            name = self.pool.class_names[c]
            raise DataError(
                f"{self.name}: class {name!r} of split {split!r} has "
                f"{int(self.pool.counts[c])} images{skipped_words(self.pool.skipped, name)}, fewer than "
                f"shots + query_shots = {self.shots} + {self.query_shots} = {need}"
            )

    @property
    def name(self) -> str:
        return self.pool.name

    @property
    def loss(self) -> Loss:
        return self.pool.loss

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pool.shape

    def draw(self, seed: int, split: Split, indices: Sequence[int]) -> Draw:
        """Choose classes, images, rotations and order; touches no pixel."""
        n, k, m = self.ways, self.shots, self.shots + self.query_shots
        classes = self._classes(split)
        words = raw_words(seed, split, indices, 2 * n + 2 * n * m + 1)
        b = len(words)
        cuts = np.cumsum([n, n, n * m, n * k, n * (m - k)])
        w_class, w_turn, w_image, w_support, w_query, w_key = np.split(words, cuts, axis=1)

        class_ids = classes[choose(w_class, np.full(b, len(classes)))]
        images = choose(w_image.reshape(b * n, m), self.pool.counts[class_ids].ravel()).reshape(b, n, m)
        rows = self.pool.starts[class_ids][:, :, None] + images
        turns = np.zeros((b, n), np.int64) if self.pool.turns is None else self.pool.turns[class_ids]
        return self._laid_out(rows, turns, class_ids, w_turn, w_support, w_query, w_key)

    def _laid_out(
        self,
        rows: np.ndarray,
        turns: np.ndarray,
        class_ids: np.ndarray,
        w_turn: np.ndarray,
        w_support: np.ndarray,
        w_query: np.ndarray,
        w_key: np.ndarray,
    ) -> Draw:
        """Episodes of the pictures `rows` [B, N, K + Q], class by class with their own `turns` [B, N], in an order that
        the words make: [B, N] for turns, [B, N*K] and [B, N*Q] for support and query, [B, 1] for keys."""
        (b, n, m), k = rows.shape, self.shots
        if self.rotate:
            turns = (turns + (w_turn % 4).astype(np.int64)) % 4

        # The order of both sets is shuffled: a label must not be readable off an image's place in the batch.
        order_s = np.argsort(w_support, axis=1, kind="stable")
        order_q = np.argsort(w_query, axis=1, kind="stable")

        def lay_out(per_image: np.ndarray) -> np.ndarray:
            support = np.take_along_axis(per_image[:, :, :k].reshape(b, n * k), order_s, 1)
            query = np.take_along_axis(per_image[:, :, k:].reshape(b, n * (m - k)), order_q, 1)
            return np.concatenate([support, query], axis=1)

        every = (b, n, m)
        return Draw(
            rows=lay_out(rows),
            turns=lay_out(np.broadcast_to(turns[:, :, None], every)),
            labels=lay_out(np.broadcast_to(np.arange(n)[None, :, None], every)),
            class_ids=class_ids,
            key=(w_key[:, 0] >> np.uint64(1)).astype(np.int64),
        )

    @in_usual_modes
    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        """Episodes number `indices` of `split`: see `metaft.types.Episode` for shapes."""
        return self.gather(self._sent(self.indices(seed, split, indices)))

    def indices(self, seed: int, split: Split, indices: Sequence[int]) -> Drawn:
        """What `gather` makes episodes of, on the CPU."""
        d = self.draw(seed, split, indices)
        return self._drawn(d.rows, d.turns, d.labels, d.class_ids, d.key)

    def gather(self, drawn: Any) -> Episode:  # a `Drawn`, or what a source adds to it
        """Pixels, turned and normalised, where `drawn` is: tensor operations alone, with no look at any value."""
        cut = self.ways * self.shots
        x, y = self._pixels(drawn), drawn.labels
        return Episode(x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:], drawn.class_ids, drawn.key)

    @in_usual_modes
    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        """`size` images a batch: a class uniformly, then one of its images uniformly."""
        return self.gather_batch(self._sent(self.batch_indices(seed, split, indices, size)))

    def batch_indices(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Drawn:
        """What `gather_batch` makes batches of, on the CPU."""
        classes = self._classes(split)
        words = raw_words(seed, split, indices, 2 * size + 1, stream=Stream.BATCHES)
        y = (words[:, :size] % np.uint64(len(classes))).astype(np.int64)
        class_ids = classes[y]
        image = (words[:, size : 2 * size] % self.pool.counts[class_ids].astype(np.uint64)).astype(np.int64)
        turns = np.zeros_like(y) if self.pool.turns is None else self.pool.turns[class_ids]
        key = (words[:, -1] >> np.uint64(1)).astype(np.int64)
        return self._drawn(self.pool.starts[class_ids] + image, turns, y, np.empty((len(y), 0), np.int64), key)

    def gather_batch(self, drawn: Drawn) -> Batch:
        """As `gather`."""
        return Batch(x=self._pixels(drawn), y=drawn.labels, key=drawn.key)

    def _classes(self, split: Split) -> np.ndarray:
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.name}: split {split!r} is not one of {known}, which were asked for")
        return self.pool.splits[split]

    def _drawn(self, rows: np.ndarray, *rest: np.ndarray) -> Drawn:
        images = torch.from_numpy(rows)
        if self.pool.kept_from is not None:
            images = self.pool.images[images]
        return Drawn(images, *map(torch.from_numpy, rest))

    def _sent(self, drawn: Drawn) -> Drawn:
        return type(drawn)(*(part.to(self.pool.device) for part in drawn))

    def _pixels(self, drawn: Drawn) -> Tensor:
        """Float [B, n, C, H, W]."""
        x = drawn.images if self.pool.kept_from is not None else self.pool.images[drawn.images]
        if self.rotate or self.pool.turns is not None:
            # A rotation is a permutation of pixels: one gather serves all four, with no branch per image.
            where = _turned(self.shape[-1], x.device)[drawn.turns].unsqueeze(2)
            x = x.flatten(-2).gather(-1, where.expand(*x.shape[:3], -1)).view_as(x)
        return self.pool.inputs(x)
