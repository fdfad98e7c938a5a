"""`torchvision:NAME`: a data set of torchvision.datasets with a train and a test part, as torchvision stores it.

One rule for all of them, by the signatures of their classes: what can be opened from a folder alone, has labels, and
says its part by `train: bool` or `split: str`. Nothing is fetched.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metaft.errors import DataError, no_such, words_of
from metaft.inputs.fitting import plain, upright
from metaft.inputs.flaws import about
from metaft.inputs.listing import DAMAGED
from metaft.inputs.reading import Unreadable
from metaft.support.foreign import ran_out
from metaft.support.paths import absolute
from metaft.targets.files import Listed

_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
"""What torchvision's data sets call their parts."""

_LABELS = ("targets", "labels", "_labels")
"""Where they have the labels of all pictures; each is compared with what comes with its picture."""


def listed(name: str, data_root: str | None) -> Listed:
    """The pictures of torchvision's data set NAME, from `data_root` or METAFT_DATA; classes keep its numbers.

    Where there is no test part the val part is the test. Raises DataError where it is not there (with torchvision's own
    way to fetch it) or has no classes, MetaftError for a name that torchvision has not.
    """
    parts = _opened(name, data_root)
    notes = []
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        notes.append(f"torchvision:{name} has no test part; its val part is the test")
    if "test" not in parts:
        raise DataError(f"data: torchvision:{name} has no test part")
    labels = {part: _labels(name, part, dataset) for part, dataset in parts.items()}
    names = _class_names(parts["train"], 1 + max(int(of.max()) for of in labels.values()))
    if len(names) < 2:
        raise DataError(f"data: torchvision:{name} holds {len(names)} class, fewer than 2")
    for part, of in labels.items():
        lacking = np.setdiff1d(np.arange(len(names)), of)
        if len(lacking):
            raise DataError(f"data: class {names[lacking[0]]!r} has no picture in part {part!r} of torchvision:{name}")
    files = [
        (part, label, Path(name, part, str(i))) for part, of in labels.items() for i, label in enumerate(of.tolist())
    ]
    return Listed(f"torchvision:{name}", Path(f"torchvision:{name}"), names, files, (), notes,
                  partial(_picture, parts, labels))  # fmt: skip


def _known() -> dict[str, Any]:
    """Name -> class of each data set that the rule takes."""
    from metaft.support.vision import datasets

    return {name: of for name in sorted(datasets.__all__) if _is_taken(of := getattr(datasets, name))}


def _is_taken(of: object) -> bool:
    if not inspect.isclass(of):
        return False
    takes = inspect.signature(of).parameters
    needs = [p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    kinds = {p.default for name, p in takes.items() if name.startswith("target_type")}
    return needs == ["root"] and "target_transform" in takes and kinds <= {"category"} and bool(_part_option(of))


def _part_option(of: Any) -> str:
    """The parameter that says the part, or nothing."""
    takes = inspect.signature(of).parameters
    kinds = {"train": bool, "split": str}
    return next((name for name, kind in kinds.items() if name in takes and isinstance(takes[name].default, kind)), "")


def _opened(name: str, data_root: str | None) -> dict[str, Any]:
    """Part -> data set, of the parts that there are. Raises DataError where one of them is not in the folder."""
    known = _known()
    if name not in known:
        raise no_such("data", name, known, lacks="torchvision has no data set of labelled parts", says="it has")
    root = data_root or os.environ.get("METAFT_DATA")
    if not root:
        raise DataError(f"data: torchvision:{name}: where is it? pass --data-root or set METAFT_DATA")
    of, option, place = known[name], _part_option(known[name]), absolute(root)
    default = inspect.signature(of).parameters[option].default
    ways: dict[str, Sequence[bool | str]] = {"train": (True,), "test": (False,)}
    if option == "split":
        ways = {part: (*words, default) if part == "train" else words for part, words in _SPLITS.items()}
    parts: dict[str, Any] = {}
    missing: dict[bool | str, Exception] = {}
    for part, words in ways.items():
        for word in words:
            try:
                parts[part] = of(str(place), **{option: word})
            except Exception as error:  # each of them says in its own way what it lacks
                if _is_no_part(error):
                    continue
                missing[word] = error
            break
    if missing:
        raise _not_there(name, of, option, place, missing)
    return parts


def _is_no_part(error: Exception) -> bool:
    """Whether a data set says that it has no part of this name."""
    return isinstance(error, ValueError) and str(error).startswith("Unknown value")


def _not_there(name: str, of: Any, option: str, root: Path, missing: Mapping[bool | str, Exception]) -> DataError:
    error = next(iter(missing.values()))
    if ran_out(error):
        raise error
    if isinstance(error, ImportError):
        return DataError(f"data: torchvision:{name} needs a package that is not installed ({error})")
    folder = getattr(of, "base_folder", None)
    place = root / folder if isinstance(folder, str) else root
    why = words_of(error).removesuffix(" You can use download=True to download it")
    hint = "torchvision does not fetch it, its documentation says where it is"
    if "download" in inspect.signature(of).parameters:
        calls = "; ".join(f"{name}({str(root)!r}, {option}={word!r}, download=True)" for word in missing)
        hint = f'to fetch it: python -c "from torchvision.datasets import {name}; {calls}"'
    return DataError(f"data: torchvision:{name} cannot be read from {place}: {why.rstrip('.')}; {hint}")


def _labels(name: str, part: str, dataset: Any) -> np.ndarray:
    """int64 [n]. Raises DataError where they are no numbers of classes."""
    values = next((v for a in _LABELS if (v := getattr(dataset, a, None)) is not None), None)
    if values is None:
        samples = getattr(dataset, "_samples", None)
        values = [pair[1] for pair in samples or (dataset[i] for i in range(len(dataset)))]
    try:
        labels = np.asarray(values)
    except ValueError:  # of several shapes
        labels = np.empty((0, 0))
    numbers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not numbers or len(labels) != len(dataset) or len(labels) == 0 or labels.min() < 0:
        raise DataError(
            f"data: torchvision:{name} does not give each picture of its part {part!r} the number of a class"
        )
    return labels.astype(np.int64)


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """Its own names, where it has them; those that two classes share get their number too."""
    own = getattr(dataset, "classes", None) or ()
    if len(own) < count:
        return tuple(map(str, range(count)))
    names = [text if isinstance(text, str) else ", ".join(text) for text in own]
    return tuple(f"{text} ({i})" if names.count(text) > 1 else text for i, text in enumerate(names))


def _picture(parts: Mapping[str, Any], labels: Mapping[str, np.ndarray], file: Path) -> Image.Image | Unreadable:
    """A picture of `listed`, as `try_open` gives one. Raises DataError where it comes with another label."""
    part, i = file.parts[-2], int(file.parts[-1])
    try:
        with about(file):
            image, label, *_ = parts[part][i]
            image = plain(upright(image))
    except Exception as error:  # a broken file makes a decoder raise anything
        if ran_out(error):
            raise
        return Unreadable(file, DAMAGED, words_of(error))
    if int(label) != labels[part][i]:
        raise DataError(f"data: {file} has label {label}, but is listed with {labels[part][i]}")
    return image
