"""Where episodes come from: one file per data set, and `load`, which finds them by name."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection
from pathlib import Path

from metaft.errors import DataError, MetaftError, no_such
from metaft.spec import Takes
from metaft.support import paths, places

# These functions share their names with the modules they live in. The eager import settles it: `metaft.tasks.folder` is
# the function for everyone; what else a module holds is reached by `from metaft.tasks.folder import ...`.
from metaft.tasks.folder import folder
from metaft.tasks.glyphs import glyphs
from metaft.tasks.learn2learn import named as _learn2learn
from metaft.tasks.mini_imagenet import mini_imagenet
from metaft.tasks.omniglot import OMNIGLOT_SPLITS, download, find, omniglot
from metaft.tasks.pool import ClassEpisodes, ClassPool
from metaft.tasks.sinusoid import Sinusoid
from metaft.tasks.tables import tables
from metaft.tasks.unlabelled import UnlabelledPool, hide, unlabelled
from metaft.types import Dataset

__all__ = [
    "DATASETS",
    "ClassEpisodes",
    "ClassPool",
    "Sinusoid",
    "UnlabelledPool",
    "folder",
    "glyphs",
    "hide",
    "load",
    "mini_imagenet",
    "omniglot",
    "tables",
    "unlabelled",
]


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked of `load` beside the name of the data set."""

    path: str
    """What follows the colon in "folder:PATH", "csv:PATH" and "l2l:NAME"."""
    split: str
    data_root: str | None
    download: bool
    image_size: int | None
    channels: int | None
    classes: Collection[str]
    skip_bad: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a data set is opened, and the options it understands."""

    open: Callable[[Request], Dataset]
    path: str = ""
    """What stands after the colon of its name, if anything must: PATH or NAME."""
    splits: tuple[str, ...] = ()
    """Class splits to choose from, the default first."""
    downloads: bool = False
    any_size: bool = False
    """Whether `image_size` and `channels` are the user's choice."""


def _root(name: str, request: Request) -> Path:
    root = request.data_root or os.environ.get("METAFT_DATA")
    if not root:
        fetch = " (--download fetches it to there)" if DATASETS[name.partition(":")[0]].downloads else ""
        raise DataError(f"{name}: where is it? pass --data-root or set METAFT_DATA{fetch}")
    return paths.local(root)


def _open_omniglot(request: Request) -> Dataset:
    root = _root("omniglot", request)
    if request.download and find(root, whole=True) is None:
        download(root)
    return omniglot(root, request.split, skip_bad=request.skip_bad)


def _open_mini_imagenet(request: Request) -> Dataset:
    if request.channels not in (None, 3):
        raise MetaftError(f"channels: mini-imagenet has 3, got {request.channels}")
    return mini_imagenet(_root("mini-imagenet", request), request.image_size, skip_bad=request.skip_bad)


def _open_files(opened: Callable[..., Dataset], kind: str, request: Request) -> Dataset:
    try:
        path = places.found(request.path, request.data_root, request.classes)
    except DataError as error:
        raise DataError(f"{kind}: {error}") from None
    return opened(path, request.image_size, request.channels, skip_bad=request.skip_bad)


def _open_unlabelled(request: Request) -> Dataset:
    if request.path not in places.NAMED:
        return _open_files(unlabelled, "unlabelled", request)
    pool = DATASETS[request.path].open(dataclasses.replace(request, path=""))
    assert isinstance(pool, ClassPool)
    return hide(pool)


def _open_learn2learn(request: Request) -> Dataset:
    root = _root(f"l2l:{request.path}", request)
    return _learn2learn(
        request.path, root, download=request.download, image_size=request.image_size, channels=request.channels
    )


DATASETS: dict[str, Entry] = {
    "glyphs": Entry(lambda request: glyphs(), splits=("scripts",)),
    "omniglot": Entry(_open_omniglot, splits=tuple(OMNIGLOT_SPLITS), downloads=True),
    "mini-imagenet": Entry(_open_mini_imagenet, any_size=True),
    "folder": Entry(functools.partial(_open_files, folder, "folder"), path="PATH", any_size=True),
    "csv": Entry(functools.partial(_open_files, tables, "csv"), path="PATH", any_size=True),
    "l2l": Entry(_open_learn2learn, path="NAME", downloads=True, any_size=True),
    "unlabelled": Entry(_open_unlabelled, path="PATH", any_size=True),
    "sinusoid": Entry(lambda request: Sinusoid()),
}


def options_of(name: str, path: str) -> Entry:
    """What says which options a data set understands: of a named one without its labels that of the named one."""
    return DATASETS[path if name == "unlabelled" and path in places.NAMED else name]


def load(
    dataset: str,
    *,
    data_root: str | None = None,
    split: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    classes: Collection[str] = (),
    skip_bad: bool = False,
) -> Dataset:
    """The data set of that name: "glyphs", "omniglot", "mini-imagenet", "folder:PATH", "csv:PATH", "l2l:NAME",
    "unlabelled:PATH" (or one of the first three in the place of PATH) or "sinusoid".

    `data_root` (default: the environment's METAFT_DATA) is where data sets with a fixed name live,
    and where a folder is looked for that is not at its path, see `metaft.support.places.found`; `classes` are
    those that a run knows it by. `split` names one of the data set's class splits; `skip_bad` leaves
    out picture files that cannot be read. Raises MetaftError for a name, split or option that the
    data set does not have, and DataError where its data is missing or broken.
    """
    members = {known: Takes(entry.path or None) for known, entry in DATASETS.items()}
    name, positional, _ = places.parsed("dataset", dataset, members)
    path = positional or ""
    entry = options_of(name, path)
    if split is not None and split not in entry.splits:
        if entry.splits:
            raise no_such("split", split, entry.splits, lacks=f"{name} has no", says="only")
        raise MetaftError(f"split: {name} has no {split!r}, nor any other to choose")
    if download and not entry.downloads:
        raise MetaftError(f"download: {name} is not something to download")
    for field, value in (("image_size", image_size), ("channels", channels)):
        if value is not None and not entry.any_size:
            sized = ", ".join(f"{known}:{e.path}".rstrip(":") for known, e in DATASETS.items() if e.any_size)
            raise MetaftError(f"{field}: {name} has its own, only {sized} take {value}")
    request = Request(
        path=path,
        split=split or (entry.splits[0] if entry.splits else ""),
        data_root=data_root,
        download=download,
        image_size=image_size,
        channels=channels,
        classes=classes,
        skip_bad=skip_bad,
    )
    field, value = ("data_root", data_root) if data_root and not path else ("dataset", dataset)
    try:
        return DATASETS[name].open(request)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise DataError(f"{field}: {value!r} cannot be read ({error.strerror})") from None
