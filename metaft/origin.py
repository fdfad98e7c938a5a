"""What a command is asked for by its line, a TOML file and a run that it goes on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from metaft.config import read_toml
from metaft.errors import CheckpointError, MetaftError
from metaft.flags import parse
from metaft.options import Config, Settings, flat, from_mapping
from metaft.runs.recorded import of_run
from metaft.support.collector import uncollected
from metaft.support.names import is_text


@uncollected()
def settings(
    arguments: type[Settings], config: type[Config], argv: Sequence[str], *, prog: str, launch: str | None = None
) -> tuple[Config, Path | None]:
    """Settings of a command that has `--config` and `--resume`: (what holds now, the run folder to go on with).

    `arguments` is `config` with the group `Origin` added. What the command line leaves out is as in the TOML file or in
    the run. A `launch` that was restarted goes on with the run that it began. Raises MetaftError for what `parse` and
    `from_mapping` refuse, and for options that contradict each other.
    """
    for word in argv:
        if not is_text(word):
            raise MetaftError(f"{word!r} is not text; rename the file or folder")
    given = parse(arguments, argv, prog=prog)
    file, resume, auto_resume = (given.pop(name, None) for name in ("config", "resume", "auto_resume"))
    if resume is not None and file is not None:
        raise MetaftError("config: a resumed run has its own settings; give --resume or --config, not both")
    if resume is not None and given.get("out") is not None:
        raise MetaftError(f"out: a resumed run stays in its folder {resume}; leave --out {given['out']} away")
    base = config()
    if file is not None:
        base = from_mapping(config, read_toml(Path(file)), origin=file)
    elif resume is not None:
        from metaft.runs.folder import RunFolder

        try:
            base = of_run(config, RunFolder.open(Path(resume)).config, "resume")
        except CheckpointError as error:
            raise CheckpointError(f"resume: {error}") from None
    asked = dataclasses.replace(base, **given)
    if resume is None and (auto_resume or _began(flat(asked)["out"], launch)):
        return _taken_up(config, asked)
    return asked, None if resume is None else Path(resume)


def _began(out: str | None, launch: str | None) -> bool:
    """Whether the run in `--out` is one that this launch began before it was restarted, and no other's."""
    from metaft.runs.folder import RunFolder

    return out is not None and launch is not None and RunFolder(Path(out)).began_by(launch)


def _taken_up(kind: type[Config], config: Config) -> tuple[Config, Path | None]:
    """Settings as given, and the run in `--out` where there is one to go on with."""
    from metaft.runs.folder import RunFolder

    out = flat(config)["out"]
    if out is None:
        raise MetaftError("auto_resume: give --out too, the folder of the run to go on with")
    folder = RunFolder(Path(out))
    if not folder.config.exists():
        return config, None
    recorded = of_run(kind, folder.config, "out")
    config = dataclasses.replace(config, out=None)
    if flat(config).get("engine") == "tune":  # once, for all
        tuned = {name: flat(recorded)[name] for name in ("engine", "task_chunk")}
        config = dataclasses.replace(config, **tuned)
    return config, folder.path
