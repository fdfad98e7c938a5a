"""The settings of a finished run as they hold for the classifier in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaft.config import read_toml
from metaft.options import Settings, flat, options
from metaft.runs.folder import RunFolder
from metaft.settings.data import TargetSettings
from metaft.settings.finetuning import Recipe

_SAME = ("image_size", "init_norm", "seed", *options(TargetSettings))
"""What a smaller classifier has in common with the run that it was made of."""

_OWN = ("init", "method", "device", *options(Recipe))
"""What its own `result.json` says of it."""

_COMPRESS = "compress "
"""What the names of settings of metaft.compress begin with."""


def settings_of(run: RunFolder, config: Settings, result: Mapping[str, Any]) -> dict[str, Any]:
    """By name, of a run whose `config.toml` holds `config`. In the folder of a smaller classifier that file is of the
    run that it was made of: of its settings are those that hold for both, then those that metaft.compress recovered it
    by, and those of the command itself as "compress NAME"."""
    values = flat(config)
    if not run.compress.exists():
        return values
    own = {name: result.get(name) for name in _OWN}
    same = {name: value if name in _SAME else own.get(name) for name, value in values.items()}
    made = {"run": result["compressed"]["run"], **read_toml(run.compress)}
    return same | own | {"seeds": 1} | {f"{_COMPRESS}{name}": value for name, value in made.items()}


def of_compress(name: str) -> str | None:
    """The name of a setting of metaft.compress without what it begins with here; None of another."""
    return name.removeprefix(_COMPRESS) if name.startswith(_COMPRESS) else None
