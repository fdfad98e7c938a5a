"""The settings that run folders keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from metaft.config import AdaptConfig, MetaTrainConfig, read_toml
from metaft.errors import MetaftError
from metaft.options import Config, Settings, flat, from_mapping, options


def of_run(config: type[Config], file: Path, field: str) -> Config:
    """The settings in a run folder's `config.toml`. Raises MetaftError, naming `field`, for another command's run."""
    values = read_toml(file)
    for kind, other in CONFIGS.items():
        if values.keys() <= options(other).keys() and not values.keys() <= options(config).keys():
            own = next(name for name, settings in CONFIGS.items() if settings is config)
            raise MetaftError(f"{field}: {file.parent} is a run of metaft.{kind}, not of metaft.{own}")
    return from_mapping(config, values, origin=str(file))


CONFIGS: dict[str, type[Settings]] = {"meta_train": MetaTrainConfig, "adapt": AdaptConfig}
"""The commands that leave run folders, and the settings of each."""


def check_unchanged(config: Settings, own: Settings, path: Path, *, except_for: Iterable[str]) -> None:
    """Raises MetaftError for a setting that differs from the run's own and may not."""
    theirs = flat(own)
    for name, mine in flat(config).items():
        if name in theirs and mine != theirs[name] and name not in except_for:
            raise MetaftError(
                f"{name}: a resumed run keeps its settings; {path} was started with {theirs[name]!r}, given {mine!r}"
            )
