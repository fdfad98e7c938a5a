"""Episodes that a file lists picture by picture: fixed tests such as Omniglot's official one-shot runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.inputs import ImageInputs, Inputs
from metaft.sampler import raw_words
from metaft.support.names import is_text
from metaft.support.paths import absolute, local
from metaft.types import SPLITS, Batch, Episode, Loss, Split

PARTS = ("support", "query")

_Pairs = list[tuple[Path, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class ListedEpisodes:
    """A data set and the only `Source` of it: episode i is line i, whatever seed and split."""

    name: str
    """ "episodes:FILE"."""
    sha256: str
    """Of the file."""
    ways: int
    shots: int
    query_shots: int
    images: Tensor
    """uint8 [M, C, H, W], each picture once."""
    rows: Tensor
    """int64 [episodes, N*K + N*Q] rows of the images: support, then query, in the file's order."""
    labels: Tensor
    """int64 [episodes, N*K + N*Q]: a class's number is its place among those of its line's support."""
    inputs: Inputs
    loss: Loss = dataclasses.field(default="cross_entropy", init=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def split_hash(self) -> str:
        return self.sha256

    def describe(self) -> Mapping[str, object]:
        return {"inputs": self.inputs.plain()}

    def to(self, device: str) -> ListedEpisodes:
        moved = {field: getattr(self, field).to(device) for field in ("images", "rows", "labels")}
        return dataclasses.replace(self, **moved)

    def source(
        self, *, ways: int, shots: int, query_shots: int, rotate: bool = False, splits: Sequence[Split] = SPLITS
    ) -> ListedEpisodes:
        """Itself. Raises DataError for other episodes than the file's."""
        if (ways, shots, query_shots, rotate) != (self.ways, self.shots, self.query_shots, False):
            raise DataError(
                f"{self.name}: its episodes are {self.ways}-way {self.shots}-shot with {self.query_shots} queries per "
                "class, not rotated"
            )
        return self

    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        chosen = torch.as_tensor(list(indices))
        rows, labels = self.rows[chosen], self.labels[chosen]
        x, cut = self.inputs(self.images[rows]), self.ways * self.shots
        keys = (raw_words(seed, split, indices, 1)[:, 0] >> np.uint64(1)).astype(np.int64)
        classes = torch.arange(self.ways).expand(len(rows), -1)
        key = torch.from_numpy(keys).to(x.device)
        return Episode(x[:, :cut], labels[:, :cut], x[:, cut:], labels[:, cut:], classes.to(x.device), key)

    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        raise DataError(f"{self.name}: episodes alone, no batches to train on")


def listed_episodes(file: str | os.PathLike[str], inputs: Inputs | None, *, skip_bad: bool = False) -> ListedEpisodes:
    """The episodes of a file of JSON lines, read as a run's images were (`inputs`). Whether drawings are dark on bright
    and have to be turned, their own borders say, all together.

    Each line is {"support": [[PATH, LABEL], ...], "query": [[PATH, LABEL], ...]} with paths relative to the file and
    labels in text. All lines have as many classes, and each class as many support and as many query pictures.

    Raises DataError that names the file and line: what is not of this form, other numbers than in the first line, a
    query of a class without support, a picture that is not there or in both parts; and for pictures that cannot be
    read. `skip_bad` is refused: an episode without one of its pictures is another one.
    """
    from metaft.targets.files import Listed, target_of

    if skip_bad:
        raise MetaftError("skip_bad: an episode without one of its pictures would be another episode")
    if not isinstance(inputs, ImageInputs):
        raise MetaftError("episodes_file: the run's inputs are no pictures")
    file = local(file)
    content = _content(file)
    lines = list(_lines(file, content.decode("utf-8-sig")))
    if not lines:
        raise DataError(f"{file} holds no episodes")
    numbers = [_numbers(f"{file}, line {number}", line) for number, line in lines]
    for (number, _), found in zip(lines, numbers, strict=True):
        if found != numbers[0]:
            raise DataError(
                f"{file}, line {number}: {_said(found)}, where line {lines[0][0]} has {_said(numbers[0])}; they must "
                "be alike"
            )
    place: dict[Path, int] = {}
    rows, labels = [], []
    for _, line in lines:
        known: dict[str, int] = {}
        both = [*line["support"], *line["query"]]
        rows.append([place.setdefault(path, len(place)) for path, _ in both])
        labels.append([known.setdefault(label, len(known)) for _, label in both])
    files = Listed(f"episodes:{absolute(file)}", file, (), [("all", 0.0, path) for path in place])
    try:
        read = target_of(files, inputs, skip_bad=False)
    except MetaftError as error:
        raise type(error)(str(error).removeprefix("data: ")) from None
    for note in read.notes:
        warnings.warn(f"{file}: {note}", MetaftWarning, stacklevel=2)
    return ListedEpisodes(
        files.name,
        hashlib.sha256(content).hexdigest(),
        *numbers[0],
        images=read.examples,
        rows=torch.tensor(rows),
        labels=torch.tensor(labels),
        inputs=read.inputs,
    )


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error})") from None
    return content


def _lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, _Pairs]]]:
    """(number, part -> (picture, label) of each) for each line that is not empty."""
    for number, line in enumerate(text.split("\n"), 1):  # a label may hold what else Python takes for a line's end
        if line.strip():
            where = f"{file}, line {number}"
            try:
                given = json.loads(line, object_pairs_hook=_object)
            except _Twice as error:
                raise DataError(f"{where}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}, is no JSON: {error}") from None
            yield number, _checked(where, file.parent, given)


class _Twice(ValueError):
    """A name that an object has twice, of which JSON's readers take the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for i, (name, _) in enumerate(pairs):
        if any(name == before for before, _ in pairs[:i]):
            raise _Twice(f"{name!r} stands there twice")
    return dict(pairs)


def _checked(where: str, folder: Path, given: Any) -> dict[str, _Pairs]:
    if not isinstance(given, dict) or set(given) != set(PARTS):
        has = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise DataError(
            f'{where}: an episode is {{"support": [...], "query": [...]}}, this one holds {has or "nothing"}'
        )
    parts: dict[str, _Pairs] = {}
    for part in PARTS:
        pairs = given[part]
        if not isinstance(pairs, list) or not pairs:
            raise DataError(f"{where}: {part} is no list of [PATH, LABEL] pairs, but {pairs!r:.80}")
        parts[part] = [_pair(f"{where}: {part}", folder, pair) for pair in pairs]
    classes = {label for _, label in parts["support"]}
    for _, label in parts["query"]:
        if label not in classes:
            raise DataError(f"{where}: query label {label!r} has no support picture")
    seen: dict[str, str] = {}
    for part in PARTS:
        for path, _ in parts[part]:
            real = os.path.realpath(path)
            if real in seen:
                places = f"twice in {part}" if seen[real] == part else "in both support and query"
                raise DataError(f"{where}: {path} is {places}")
            seen[real] = part
    return parts


def _pair(where: str, folder: Path, pair: Any) -> tuple[Path, str]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(v, str) and v and is_text(v) for v in pair):
        raise DataError(f"{where}: {pair!r:.80} is no [PATH, LABEL] in text")
    path = folder / os.path.expanduser(pair[0])
    if not os.path.isfile(path):
        raise DataError(f"{where}: {path} {'is no file' if os.path.lexists(path) else 'is not there'}")
    return path, pair[1]


def _numbers(where: str, parts: Mapping[str, _Pairs]) -> tuple[int, int, int]:
    """(ways, shots, queries per class). Raises DataError where classes have unlike numbers of pictures."""
    counts = {}
    classes = dict.fromkeys(label for _, label in parts["support"])
    for part in PARTS:
        labels = [label for _, label in parts[part]]
        of_class = {label: labels.count(label) for label in classes}
        most, least = max(of_class.values()), min(of_class.values())
        if most != least:
            label = next(label for label, n in of_class.items() if n == least)
            raise DataError(f"{where}: class {label!r} has {least} {part} pictures, another one {most}")
        counts[part] = most
    return len(classes), counts["support"], counts["query"]


def _said(numbers: tuple[int, int, int]) -> str:
    ways, shots, queries = numbers
    return f"{ways} classes of {shots} support and {queries} query pictures"
