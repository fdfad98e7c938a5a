"""The page: views of a subject, with what was run, its result in plain words, its settings, and how to repeat it."""

from __future__ import annotations

import itertools
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from metaft.after.settings import of_compress, settings_of
from metaft.config import CompressConfig, read_toml
from metaft.errors import MetaftError
from metaft.finetune.words import plainly as of_adapting
from metaft.options import Field, flat, options
from metaft.runs.recorded import CONFIGS
from metaft.runs.words import plainly as of_meta_training
from metaft.support.progress import duration
from metaft.views import VIEWS
from metaft.views.base import Cell, Column, Missing, Part, Table, View
from metaft.views.subject import Subject
from metaft.views.template import included, rendered


class Line(NamedTuple):
    """Of how to repeat a run."""

    says: str
    code: str = ""


def page(subject: Subject, *, slow: bool) -> str:
    """HTML that needs nothing else. `slow` says whether views that read data or compute for long are wanted.

    Raises MetaftError where the run is damaged.
    """
    views, missing = seen(subject, slow=slow)
    return rendered(
        "page.html", title=subject.name, subtitle=_subtitle(subject), words=_words(subject), ran=_ran(subject),
        views=views, missing=missing, settings=_settings(subject), repeat=_repeat(subject), runs=_runs,
        numeric=_numeric, style=included("page.css"), script=included("page.js"),
    )  # fmt: skip


def seen(subject: Subject, *, slow: bool) -> tuple[list[tuple[str, str, View]], list[tuple[str, str]]]:
    """(key, title and view of each that applies; title of each other, and why it does not)."""
    views, missing = [], []
    for key, (title, of, is_slow) in VIEWS.items():
        if is_slow and not slow:
            missing.append((title, "it takes longer: python -m metaft.look RUN adds it"))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that a font lacks, or of axes without an extent
            view = of(subject)
        if isinstance(view, Missing):
            missing.append((title, view.why))
        else:
            views.append((key, title, view))
    return views, missing


def _runs(parts: Sequence[Part]) -> Iterator[tuple[str, list[Part]]]:
    """Parts of one kind that follow one another together: pictures stand side by side where there is room."""
    for kind, same in itertools.groupby(parts, lambda part: type(part).__name__):
        yield kind, list(same)


def _numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers, by which it is sorted."""
    cells = [row[column] for row in table.rows]
    return any(cell is not None for cell in cells) and not any(isinstance(cell, str) for cell in cells)


def _subtitle(subject: Subject) -> str:
    r = subject.result
    if subject.command == "meta_train":
        return f"Meta-training: {r['algorithm']} on {r['dataset']}, {r['ways']}-way {r['shots']}-shot"
    if subject.command == "adapt":
        what = f"{len(r['classes'])} classes" if r["classes"] else "numbers"
        return f"Fine-tuning: {r['data']}, {what}, from {r['init']}"
    return "A start: what training can begin with"


def _words(subject: Subject) -> list[str]:
    r = subject.result
    if subject.command == "meta_train":
        return [of_meta_training(r)]
    if subject.command == "adapt":
        return [of_adapting(r), *(f"Note: {note}." for note in r["notes"])]
    start = subject.start
    values = f"with weights of {start.about['weights']}" if "weights" in start.about else "with values drawn at random"
    return [f"{subject.name} is {start.architecture['name']} {values}.", *(f"Note: {note}." for note in start.notes)]


def _ran(subject: Subject) -> Table:
    """What was run, on what, by which versions."""
    r = subject.result
    if subject.command == "start":
        facts: dict[str, Cell] = {"start": subject.name, "architecture": str(subject.start.architecture["name"])}
        facts["inputs"] = " × ".join(map(str, subject.start.shape))
        facts |= {str(k): str(v) for k, v in subject.start.about.items()}
        return Table("What it is", [Column("what"), Column("value")], [[*pair] for pair in facts.items()])
    machine = r["environment"]
    command = "compress" if _is_compressed(subject) else r["command"]
    facts = {"command": _command_line(subject, command), "metaft": r["version"], "PyTorch": machine.get("torch")}
    if subject.command == "meta_train":
        facts |= {
            "data": r["dataset"], "class split": r.get("class_split"), "digest of the class split": r.get("split_hash"),
            "algorithm": r["algorithm"], "tasks": f"{r['ways']}-way {r['shots']}-shot",
            "meta-steps": f"{r['iterations']:,}", "kept": f"step {r['best_step']:,}, the best on validation",
        }  # fmt: skip
    else:
        facts |= {
            "data": r["data"], "began with": r["init"], "method": _method(r),
            "images": f"{r['train_images']} to train, {r['val_images']} to validate, {r['test_images']} to test",
            "folds": str(r["folds"]) if r["folds"] > 1 else None,
        }  # fmt: skip
    last = r.get("last_seed", r["seed"])
    facts |= {
        "seed": str(r["seed"]) if last == r["seed"] else f"{r['seed']} to {last}",
        "computed on": f"{r['device']}, {machine.get('processor') or machine.get('machine', '')}",
        "took": None if r["seconds"] is None else duration(r["seconds"]),
    }
    rows: list[list[Cell]] = [[k, str(v)] for k, v in facts.items() if v not in (None, "")]
    return Table("What was run", [Column("what"), Column("value")], rows)


def _command_line(subject: Subject, command: str) -> str:
    """With the settings that are not the command's own, those too that were left open and have been settled."""
    words = ["python", "-m", f"metaft.{command}"]
    if command == "compress" or subject.config is None:
        return shlex.join(words)
    usual = flat(CONFIGS[subject.command]())
    for name, value in flat(subject.config).items():
        if value != usual.get(name) and value not in (None, ()) and name not in ("out", "report"):
            words += _flag(name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    """The words of a command line for an option."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]


def _is_compressed(subject: Subject) -> bool:
    """Whether metaft.compress made the folder, which is an adapt run's besides."""
    return subject.folder is not None and subject.folder.compress.exists()


def _method(r: Any) -> str:
    if r["method"] == "inner":
        return f"the run's own inner loop, {r.get('inner_steps')} steps"
    chosen = r["starts"][0].get("chosen")
    return f"strategy {chosen['strategy']}, which was chosen" if chosen else f"strategy {r.get('strategy')}"


def _settings(subject: Subject) -> Table:
    """Each option that has a value, with its help line."""
    if subject.config is None:
        return Table("Settings", [], [])
    assert subject.folder is not None
    known = options(CONFIGS[subject.command])
    rows: list[list[Cell]] = [
        [name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value), _help_of(name, known)]
        for name, value in settings_of(subject.folder, subject.config, subject.result).items()
        if value not in (None, (), []) and name != "out"
    ]
    return Table("Settings", [Column("option"), Column("value"), Column("what it is")], rows)


def _help_of(name: str, known: Mapping[str, Field]) -> str:
    """What an option is: one of the subject's command, or of metaft.compress, which names no run among its own."""
    own = of_compress(name)
    if own is None:
        return known[name].option.help
    of = options(CompressConfig)
    return of[own].option.help if own in of else "The run whose classifier was made smaller."


def _repeat(subject: Subject) -> list[Line]:
    if subject.command == "start":
        return [Line("Begin with it:", f"python -m metaft.adapt --init {_quoted(subject)} --data folder:YOUR_IMAGES")]
    assert subject.folder is not None
    r, kind = subject.result, subject.command
    torch = str(r["environment"].get("torch", "")).partition("+")[0]
    said = [
        Line(
            f"In these commands RUN is the folder of this run, {subject.name}. Install metaft {r['version']}"
            + (" and the PyTorch that it was run with:" if torch else "."),
            f"pip install torch=={torch}" if torch else "",
        ),
        Line(
            "Save these settings as config.toml:",
            subject.folder.config.read_text(encoding="utf-8", errors="replace").strip(),
        ),
        Line("and run them into a new folder:", f"python -m metaft.{kind} --config config.toml --out NEW_FOLDER"),
    ]
    if _is_compressed(subject):  # of whose folder config.toml is that of the run it was made of
        given = read_toml(subject.folder.compress)
        flags = shlex.join(word for name, value in given.items() for word in _flag(name, value))
        said[2] = Line("run them into a new folder:", f"python -m metaft.{kind} --config config.toml --out WHOLE")
        said.insert(3, Line("and make that run smaller:", f"python -m metaft.compress WHOLE {flags} --out NEW_FOLDER"))
    if brought := _brought(subject):
        said.insert(0, Line(f"This run was handed {brought} in Python, which has to be handed over again there."))
    if kind == "adapt":
        said.append(Line("Label images with it:", "python -m metaft.predict RUN IMAGE_OR_FOLDER..."))
    else:
        said.append(Line("Test it again:", "python -m metaft.evaluate RUN"))
    said.append(Line("Write this page again:", "python -m metaft.look RUN"))
    return said


def _quoted(subject: Subject) -> str:
    return shlex.quote(subject.name)


def _brought(subject: Subject) -> str:
    """What no command line has."""
    try:
        custom = subject.module is not None or _architecture(subject) == "custom"
    except MetaftError:
        custom = False
    return "a module" if custom else ""


def _architecture(subject: Subject) -> str:
    return str(subject.start.architecture["name"]) if subject.command == "meta_train" else ""
