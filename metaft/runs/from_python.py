"""What a run is handed in Python in the place of settings: a data set, a module, a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metaft.errors import MetaftError
from metaft.options import Settings, flat, options
from metaft.support import places

if TYPE_CHECKING:
    from metaft.types import Dataset

_OF_DATA = ("split", "data_root", "download", "image_size", "channels", "skip_bad")
"""Settings that say how `dataset` is opened."""

_OF_MODEL = ("width", "dropout")
"""Settings that say how `model` is built."""


def brought(
    *, module: object = None, init: str = "keep", loss: object = None, dataset: object = None
) -> tuple[str, ...]:
    """The arguments that a run was handed in Python and no command line has, as they are written there."""
    arguments = [
        ("module=...", module is not None),
        (f"init={init!r}", module is not None and init != "keep"),
        (f"loss={loss!r}" if isinstance(loss, str) else "loss=...", loss is not None),
        ("dataset=...", dataset is not None),
    ]
    return tuple(argument for argument, is_given in arguments if is_given)


def check_brought(
    settings: Settings | None, *, dataset: Dataset | None = None, module: object = None, init: str = "keep"
) -> None:
    """Raises MetaftError for a setting that says of the data or the model what the one from Python says itself, for
    `init` without a module, and for a data set that makes no sources."""
    if module is None and init != "keep":
        raise MetaftError(f"init: is of a module from Python, and none is given (given {init!r})")
    if dataset is not None and not callable(getattr(dataset, "source", None)):
        kind = type(dataset).__name__
        raise MetaftError(f"dataset: {kind} is none, it has no source(ways=..., shots=..., query_shots=...)")
    given = {} if settings is None else _given(settings)
    if dataset is not None:
        if (named := given.get("dataset")) and places.named_in_full(named) != places.named_in_full(dataset.name):
            raise MetaftError(f"dataset: {dataset.name} comes from Python (given {named!r} too)")
        _refuse(given, _OF_DATA, f"{dataset.name} from Python brings its own")
    if module is not None and given.get("model") != "custom":  # as a run with a module records it
        _refuse(given, ("model", *_OF_MODEL), "a module from Python brings its own")


def _given(settings: Settings) -> dict[str, Any]:
    """The values that are not those of settings of which nothing is given."""
    known = options(type(settings))
    return {name: value for name, value in flat(settings).items() if value != known[name].default}


def _refuse(given: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in given:
            raise MetaftError(f"{name}: {why} (given {given[name]!r})")
