"""Every option of every command with what it cannot be: status 2, one line with option and value, nothing written.

The options are those of the commands' dataclasses, so a new one without rows fails `test_every_option_has_its_rows`.
Wrong types and ranges are made from the type; words and paths stand in the tables, to which a row is easily added.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from helpers import COMMANDS, IMAGES, finished, meta_trained, one_line, one_thread, options, write_folder, write_target
from helpers import words as adapt_words

from metaft import adapt, meta_train
from metaft.config import AdaptConfig, MetaTrainConfig, read_toml
from metaft.options import options as options_of

Text = pytest.CaptureFixture[str]


BASE: dict[str, str] = {
    "meta_train": " ".join(options(IMAGES, dataset="folder:{squares}", image_size=8)),
    "evaluate": "{run}",
    "adapt": "--init {run} --data folder:{target}",
    "predict": "{adapted} {picture}",
    "look": "{run} --out page.html",
    "choose": "--data folder:{target} --starts {run} --only --out out",
    "compare": "{adapted} {again}",
    "search": "{space.toml} --dataset sinusoid --out out",
    "export": "{adapted} --format torch-export --out out",
    "compress": "{adapted} --out out",
}
"""A good command line, to which one bad option is added. What is in braces is a path, see `paths`."""

ZERO = (
    "dropout", "inner_steps", "test_inner_steps", "inner_lr", "seed", "eval_seed", "label_smoothing", "ema",
    "snapshots", "search_seed", "points",
)  # fmt: skip
"""Numbers that may be 0; none may be below it."""

POSITIONAL = ("run", "runs", "images", "space")


class Row(NamedTuple):
    """A bad option: the words to add, and what the line must hold besides the option's name."""

    command: str
    option: str
    kind: str
    argv: tuple[str, ...]
    parts: tuple[str, ...]
    base: str | None = None
    """Words to begin with, in place of the command's own."""


# ---- made from the types ------------------------------------------------------------------------------------------


def fields(command: str) -> dict[str, Any]:
    """Option -> type, without None."""
    known = options_of(COMMANDS[command].Arguments)
    return {name: next(kind for kind in field.types if kind is not type(None)) for name, field in known.items()}


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def of_type(command: str, option: str, kind: Any) -> Iterator[Row]:
    """Values of the wrong type, and beyond what a number may be."""

    def row(what: str, value: str, *parts: str) -> Row:
        return Row(command, option, what, (f"{flag(option)}={value}",), (value, *parts))

    if kind is int:
        yield row("type", "five")
        yield row("type", "2.5")
        yield row("range", "-1")
        if option not in ZERO:
            yield row("range", "0")
        if option == "image_size":
            yield row("range", "4097", "at most 4096, got")
        else:
            yield row("range", str(2**63), "below 2**63")
    elif kind is float:
        yield row("type", "fast")
        yield from (row("range", value, "finite") for value in ("nan", "inf", "-inf"))
        yield row("range", "-0.5")
        if option not in ZERO:
            yield row("range", "0.0")
    elif kind is bool:
        yield row("type", "perhaps")
    elif typing.get_origin(kind) is Literal:
        yield row("type", "nonsense", *typing.get_args(kind))
        yield row("type", typing.get_args(kind)[0].upper())
    if kind is not bool and typing.get_origin(kind) is not tuple and option not in POSITIONAL:
        yield Row(command, option, "nothing", (flag(option),), ())


# ---- words --------------------------------------------------------------------------------------------------------

TRAINS = ("meta_train", "evaluate")
ON_DEVICES = ("meta_train", "evaluate", "adapt", "predict")

WORDS: dict[tuple[str, str], list[tuple[str, str]]] = {
    # (command, option): (value, what else the line holds)
    **{(command, "device"): [("gpu", "cuda:N"), ("cuda:77", "is not there"), ("", "''")] for command in ON_DEVICES},
    ("meta_train", "dataset"): [
        *[("glyph", "did you mean 'glyphs'"), ("", "''"), ("folder", "folder:PATH"), ("folder:", "folder:PATH")],
        *[("glyphs:Hebrew", "write 'glyphs'"), ("Omniglot", "did you mean 'omniglot'")],
    ],
    ("meta_train", "split"): [("finn", "folder"), ("", "''")],
    ("meta_train", "algorithm"): [("mam", "did you mean 'maml'"), ("", "''"), ("MAML", "did you mean 'maml'")],
    **{(command, "plugin"): [("", "''"), ("none-such", "PATH.py"), ("none_such", "no module")] for command in TRAINS},
    ("meta_train", "model"): [("conv5", "did you mean 'conv4'"), ("", "''"), ("custom", "module from Python")],
    ("meta_train", "hyper"): [
        ("inner_lr=1", "option by itself"),
        ("x", "NAME=VALUE"),
        ("nothing=1", "'nothing'"),
        ("=", "''"),
    ],
    ("meta_train", "inner_optimizer"): [
        *[("adm", "did you mean 'adam'"), ("", "''"), ("adam:beta=0", "no 'beta'"), ("adam:eps=small", "'eps=small'")],
        *[("momentum:momentum=2", "below 1, got 2.0"), ("sgd:x", "'x'")],
    ],
    ("meta_train", "inner_augment"): [("shfit", "did you mean 'shift'"), ("", "''")],
    ("evaluate", "dataset"): [("glyph", "did you mean 'glyphs'"), ("", "''"), ("sinusoid", "[1, 8, 8]")],
    ("evaluate", "split"): [("finn", "folder"), ("", "''")],
    ("meta_train", "init"): [("", "none"), ("torchvision:resnet19", "'resnet18'")],
    ("adapt", "strategy"): [
        ("heda", "did you mean 'head'"),
        ("choosen", "did you mean 'chosen'"),
        ("last:blocks=0", "at least 1"),
        ("gradual:every=0", "got 0"),
        ("lp-ft:then=head", "'head'"),
        ("", "''"),
    ],
    ("adapt", "robust"): [("2/x", "such as 2/255"), ("0", "above 0"), ("2", "at most 1"), ("", "''")],
    ("adapt", "also"): [("glyph:x", "did you mean 'glyphs'"), ("", "''")],
    ("adapt", "extra"): [("mixap", "did you mean 'mixup'"), ("l2-sp:alpha=-1", "at least 0, got -1.0"), ("", "''")],
    ("adapt", "optimizer"): [("adm", "did you mean 'adam'"), ("sgd:momentum=2", "below 1, got 2.0"), ("", "''")],
    ("meta_train", "outer_schedule"): [
        *[("cosin", "did you mean 'cosine'"), ("step:every=0", "above 0"), ("", "''"), ("plateau", "steps alone")],
    ],
    ("adapt", "schedule"): [("cosin", "did you mean 'cosine'"), ("cosine:warmup=1", "below 1, got 1.0"), ("", "''")],
    ("adapt", "lr"): [("autp", "'auto'")],
    ("adapt", "compare"): [("torchvision:resnet19", "'resnet18'"), ("nothing-such", "known are RUN")],
    ("adapt", "init"): [("", "none"), ("efficientnet", "did you mean"), ("torchvision:resnet19", "'resnet18'")],
    **{
        (command, "data"): [("glyphs:", "glyphs:SCRIPT"), ("", "''"), ("glyph:Hebrew", "glyphs:SCRIPT")]
        for command in ("adapt", "choose")
    },
    ("choose", "starts"): [("torchvision:resnet19", "'resnet18'"), ("nothing-such", "known are RUN")],
    ("compress", "into"): [("torchvision:resnet19", "'resnet18'"), ("nothing-such", "known are RUN")],
}

# ---- paths --------------------------------------------------------------------------------------------------------

LONG = "/" + "x" * 300  # a name that no file system takes
DEEP = "/" + "/".join(["deep"] * 1200)  # a path that no system takes
NOT_THERE = {"missing": "/none/x", "non-ASCII": "/none/Größe/数据", "long": LONG, "deep": DEEP, "file": "{file}/x"}
NO_PLACE = {kind: NOT_THERE[kind] for kind in ("long", "deep", "file")}
NO_FOLDER = {"empty": "{empty}", "a file": "{file}"}
NO_IMAGES = {"unreadable": "{broken}", "hollow": "{hollow}", "text": "{texts}"}

NO_PLUGIN = {**{kind: f"{path}.py" for kind, path in NOT_THERE.items()}, "a folder": "{empty}", "raises": "{plugin.py}"}

PATHS: dict[tuple[str, str], tuple[str, dict[str, str]]] = {
    # (command, option): how the path is written, what it is
    ("meta_train", "dataset"): ("folder:", {**NOT_THERE, **NO_FOLDER, **NO_IMAGES}),
    ("meta_train", "data_root"): ("", {**NOT_THERE, **NO_FOLDER}),
    **{(command, "plugin"): ("", NO_PLUGIN) for command in (*TRAINS, "adapt")},
    ("meta_train", "config"): ("", {**NOT_THERE, "a folder": "{empty}", "not TOML": "{garbage}"}),
    ("meta_train", "resume"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("meta_train", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("evaluate", "run"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("evaluate", "dataset"): ("folder:", {**NOT_THERE, **NO_FOLDER, **NO_IMAGES}),
    ("evaluate", "data_root"): ("", {**NOT_THERE, **NO_FOLDER}),
    ("evaluate", "episodes_file"): (
        "",
        {**NOT_THERE, "a folder": "{empty}", "empty": "{file}", "no JSON": "{garbage}"},
    ),
    ("evaluate", "out"): ("", {**NO_PLACE, "a folder": "{empty}"}),
    ("meta_train", "init"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("adapt", "init"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("adapt", "data"): ("folder:", {**NOT_THERE, **NO_FOLDER, **NO_IMAGES}),
    ("adapt", "data_root"): ("", {**NOT_THERE, **NO_FOLDER}),
    ("adapt", "config"): ("", {**NOT_THERE, "a folder": "{empty}", "not TOML": "{garbage}"}),
    ("adapt", "resume"): ("", {**NOT_THERE, **NO_FOLDER, "of meta_train": "{run}"}),
    ("adapt", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("predict", "run"): ("", {**NOT_THERE, **NO_FOLDER, "of meta_train": "{run}"}),
    ("predict", "images"): ("", {**NOT_THERE, "empty": "{empty}", "folder of texts": "{texts}"}),
    ("choose", "data"): ("folder:", {**NOT_THERE, **NO_FOLDER, **NO_IMAGES}),
    ("choose", "data_root"): ("", {**NOT_THERE, **NO_FOLDER}),
    ("choose", "starts"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("choose", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("compare", "runs"): ("", {**NOT_THERE, **NO_FOLDER, "of meta_train": "{run}", "twice": "{adapted}"}),
    ("compare", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("export", "run"): ("", {**NOT_THERE, **NO_FOLDER, "of meta_train": "{run}"}),
    ("export", "pictures"): ("", {**NOT_THERE, "empty": "{empty}", "folder of texts": "{texts}", "cut": "{broken}"}),
    ("export", "data_root"): ("", {**NOT_THERE, "a file": "{file}"}),
    ("export", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("look", "data_root"): ("", {**NOT_THERE, "a file": "{file}"}),
    ("look", "explain"): ("", {**NOT_THERE, "of meta_train": "{file}"}),
    ("compress", "run"): ("", {**NOT_THERE, **NO_FOLDER, "of meta_train": "{run}"}),
    ("compress", "into"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("compress", "data_root"): ("", {**NOT_THERE, "a file": "{file}"}),
    ("compress", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("look", "run"): ("", {**NOT_THERE, **NO_FOLDER}),
    ("look", "out"): ("", {**NO_PLACE, "a folder": "{empty}"}),
    ("search", "space"): ("", {**NOT_THERE, "a folder": "{empty}", "not TOML": "{garbage}"}),
    ("search", "resume"): ("", {**NOT_THERE, **NO_FOLDER, "of adapt": "{adapted}"}),
    ("search", "out"): ("", {**NO_PLACE, "a file": "{file}", "full": "{squares}"}),
    ("predict", "csv"): ("", {**NOT_THERE, "a folder": "{empty}"}),
}

WITH = {("meta_train", "data_root"): ["--dataset=omniglot"], ("evaluate", "data_root"): ["--dataset=omniglot"]}
WITH |= {("adapt", "plugin"): ["--method=inner"], ("adapt", "data_root"): ["--data=folder:/none/moved"]}
WITH |= {("choose", "data_root"): ["--data=folder:/none/moved"]}
"""What an option needs beside it to be looked at."""


def of_words(command: str, option: str) -> Iterator[Row]:
    for value, part in WORDS.get((command, option), []):
        yield Row(command, option, "word", (f"{flag(option)}={value}",), (value, part))
    prefix, kinds = PATHS.get((command, option), ("", {}))
    for kind, path in kinds.items():
        argv = (*WITH.get((command, option), []), f"{flag(option)}={prefix}{path}")
        base = "" if option in ("config", "resume") or (command, option) == ("meta_train", "data_root") else None
        if option == "run":
            argv, base = (path, "{picture}") if command == "predict" else (path,), ""
        elif option == "space":
            argv, base = (path,), ""
        elif option in ("runs", "images"):
            argv, base = (path,), "{adapted}"
        yield Row(command, option, kind, argv, (path,), base)


ROWS = [
    row
    for command in COMMANDS
    for option, kind in fields(command).items()
    for row in (*of_type(command, option, kind), *of_words(command, option))
]


def test_every_option_has_its_rows() -> None:
    for command in COMMANDS:
        for option, kind in fields(command).items():
            kinds = {row.kind for row in ROWS if (row.command, row.option) == (command, option)} - {"nothing"}
            assert kinds, f"{command} {flag(option)} ({kind}) has no rows: add some to WORDS or PATHS"
            if kind in (int, float):
                assert kinds >= {"type", "range"}, (command, option)
    named = {*WORDS, *PATHS, *WITH}
    assert named <= {(command, option) for command in COMMANDS for option in fields(command)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Good data and runs, and some with which something is wrong, by name."""
    base = tmp_path_factory.mktemp("wörld of wrong")
    squares, target = write_folder(base / "squares"), write_target(base / "target", {"train": 3, "test": 2})
    with one_thread():
        run = meta_trained(base / "run", squares)
        adapted = finished(adapt_words(run, target, base / "adapted", epochs=1))
    for name in ("empty", "hollow/a", "hollow/b", "hollow/c"):
        (base / name).mkdir(parents=True)
    (base / "file").write_text("")
    (base / "garbage").write_bytes(b"\xff = [")
    (base / "plugin.py").write_text("1 / 0")
    (base / "space.toml").write_text('command = "meta_train"\nouter_lr = [0.1, 0.01]\n')
    for name, like in (("broken", target), ("texts", target), ("again", adapted)):
        shutil.copytree(like, base / name)
    for number, file in enumerate(sorted((base / "broken").rglob("*.png"))):
        file.write_bytes(file.read_bytes()[:60] if number == 3 else file.read_bytes())
    for file in (base / "texts").rglob("*.png"):
        file.rename(file.with_suffix(".txt")).write_text("no picture")
    picture = next(target.rglob("*.png"))
    others = {"squares": squares, "target": target, "run": run, "adapted": adapted, "picture": picture}
    before = contents(base)
    yield {**{p.name: p for p in base.iterdir()}, **others}
    assert contents(base) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    """But for what Python leaves beside a plugin that it compiled, unless PYTHONDONTWRITEBYTECODE is set."""
    there = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {p: p.read_bytes() if p.is_file() else None for p in there}


def filled(text: str, paths: Mapping[str, Path]) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda found: str(paths[found[1]]), text)


def refuse(command: str, argv: list[str], capsys: Text, *parts: str) -> str:
    capsys.readouterr()
    assert COMMANDS[command].main(argv) == 2, argv
    return one_line(capsys, *parts)


def ids(row: Row) -> str:
    return f"{row.command} {row.option} {row.kind} {' '.join(row.argv)[-30:]}"


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_bad_option_is_one_line_status_2_and_writes_nothing(
    row: Row, paths: dict[str, Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.delenv("METAFT_DATA", raising=False)
    base = BASE[row.command] if row.base is None else row.base
    argv = [filled(word, paths) for word in (*base.split(), *row.argv)]
    line = refuse(row.command, argv, capsys, *(filled(part, paths) for part in row.parts))
    assert re.search(rf"\b{row.option}\b|{flag(row.option)}\b|\b{row.option.upper()}\b", line), line
    assert list(in_tmp.iterdir()) == []


# ---- what does not go together ------------------------------------------------------------------------------------

TOGETHER = [
    # command, words, what the line holds
    ("compare", "--markdown --latex", ["latex", "not both"]),
    ("adapt", "--strategy lora --extra l2-sp", ["extra", "l2-sp", "--strategy lora leaves"]),
    ("adapt", "--strategy chosen --lr auto", ["lr", "auto", "rates of its own"]),
    ("adapt", "--soup 2", ["soup", "fewer than 10 images", "2"]),
    ("adapt", "--soup 2 --auto 1", ["soup", "still to be chosen", "2"]),
    ("meta_train", "--engine tune --task-chunk 4", ["task_chunk", "--engine tune", "4"]),
    ("meta_train", "--ways 7", ["ways = 7", "6 classes"]),
    ("meta_train", "--test-ways 4", ["test_ways", "4 ways", "3 in training"]),
    ("meta_train", "--query-shots 10", ["10 images", "1 + 10 = 11"]),
    ("meta_train", "--algorithm protonet --inner-lr 0.1", ["inner_lr", "protonet", "0.1"]),
    ("meta_train", "--algorithm protonet --test-inner-steps 2", ["test_inner_steps", "protonet", "2"]),
    ("meta_train", "--model conv4-pool", ["conv4-pool", "8x8"]),
    ("meta_train", "--download", ["download", "folder"]),
    ("meta_train", "--algorithm mam --plugin json", ["algorithm", "'mam'", "did you mean 'maml'", "plugin json"]),
    ("meta_train", "--algorithm sign-maml", ["algorithm", "'sign-maml'", "not metaft's own", "--plugin"]),
    ("meta_train", "--resume {run} --config {garbage}", ["config", "not both"]),
    ("meta_train", "--resume {run} --out x", ["out", "stays in its folder", "x"]),
    ("evaluate", "--ways 4", ["ways", "3 outputs", "not 4-way"]),
    ("evaluate", "--shots 10", ["shots", "10"]),
    ("evaluate", "--download", ["download", "folder"]),
    ("evaluate", "--dataset glyphs", ["dataset", "[1, 8, 8]", "[1, 28, 28]"]),
    ("adapt", "--method inner --epochs 3", ["epochs: --method inner", "3"]),
    ("adapt", "--plugin x.py", ["plugin: --method finetune", "x.py"]),
    ("adapt", "--inner-steps 3", ["inner_steps: --method finetune", "3"]),
    ("adapt", "--method inner --init none", ["method", "none"]),
    ("adapt", "--shots-per-class 9", ["shots_per_class = 9", "3 images"]),
    ("adapt", "--data glyphs:Hebrwe --init none", ["data", "'Hebrwe'", "did you mean 'Hebrew'"]),
    ("adapt", "--tasks pcgrad", ["tasks", "--also", "pcgrad"]),
    ("adapt", "--also glyphs:Hebrew --auto 1", ["also", "--auto", "1"]),
    ("adapt", "--data glyphs:Hebrew", ["data", "[1, 28, 28]", "[1, 8, 8]"]),
    ("export", "--int8", ["int8", "torch-export"]),
    ("predict", "--top 4", ["top must be at most the 3 classes", "4"]),
]


@pytest.mark.parametrize(("command", "line", "parts"), TOGETHER, ids=[f"{row[0]} {row[1]}" for row in TOGETHER])
@pytest.mark.slow
def test_options_that_do_not_go_together_likewise(
    command: str, line: str, parts: list[str], paths: dict[str, Path], in_tmp: Path, capsys: Text
) -> None:
    base = "" if "--resume" in line else BASE[command]
    refuse(command, [filled(word, paths) for word in f"{base} {line}".split()], capsys, *parts)
    assert list(in_tmp.iterdir()) == []


OTHER: dict[str, Any] = {"dataset": "glyphs", "split": "finn", "algorithm": "fomaml", "model": "mlp", "init": "none"}
OTHER |= {
    "hyper": "a=1",
    "inner_optimizer": "adam",
    "inner_augment": "shift",
    "dropout": 0.5,
    "data": "glyphs:Hebrew",
    "channels": 3,
    "data_root": "x",
    "optimizer": "sgd",
    "schedule": "cosine",
    "outer_schedule": "linear",
    "strategy": "last",
    "compare": "none",
    "extra": "mixup",
    "robust": "2/255",
    "also": "glyphs:Greek",
    "label_smoothing": 0.5,
    "ema": 0.5,
}


def another(option: str, kind: Any, now: Any) -> Any:
    """A good value that is not the run's."""
    if typing.get_origin(kind) is Literal:
        return next(value for value in typing.get_args(kind) if value != now)
    return not now if kind is bool else OTHER[option] if option in OTHER else 1 + (now or 1)


KEPT = [
    (command, option)
    for command, of, may_change in (
        ("meta_train", MetaTrainConfig, meta_train.RESUMABLE),
        ("adapt", AdaptConfig, adapt.RESUMABLE),
    )
    for option in options_of(of)
    if option not in (*may_change, "out")
]


@pytest.mark.parametrize(("command", "option"), KEPT)
def test_a_resumed_run_keeps_every_setting_but_those_of_a_list(
    command: str, option: str, paths: dict[str, Path], in_tmp: Path, capsys: Text
) -> None:
    run = paths["run" if command == "meta_train" else "adapted"]
    kind, now = fields(command)[option], read_toml(run / "config.toml").get(option)
    value = another(option, kind, now)
    words = [flag(option), str(value)] if kind is not bool else [f"--{'' if value else 'no-'}{flag(option)[2:]}"]
    shown = value if typing.get_origin(kind) is tuple else repr(float(value) if kind is float else value)
    said = f"{option}: a resumed run keeps its settings"
    refuse(command, ["--resume", str(run), *words], capsys, said, repr(now) if now is not None else "", shown)
    assert list(in_tmp.iterdir()) == []


# ---- from a file --------------------------------------------------------------------------------------------------

CONFIGS = {"meta_train": MetaTrainConfig, "adapt": AdaptConfig}
TOML_ROWS = [
    row
    for row in ROWS
    if row.command in CONFIGS
    and row.option in options_of(CONFIGS[row.command])
    and row.kind in ("type", "range", "word")
]


@pytest.mark.parametrize("row", TOML_ROWS, ids=ids)
def test_in_a_file_the_file_is_named_too(row: Row, paths: dict[str, Path], in_tmp: Path, capsys: Text) -> None:
    """The same values, as TOML has them, in a file beside the good options on the command line."""
    text = row.argv[0].partition("=")[2]
    try:
        value = text if re.fullmatch("-?inf|nan", text) else json.dumps(json.loads(text))
    except ValueError:
        value = json.dumps(text)
    (in_tmp / "my.toml").write_text(f"{row.option} = {value}\n")
    good = [filled(word, paths) for word in BASE[row.command].split()]
    argv = [w for f, v in zip(good[::2], good[1::2], strict=True) if f != flag(row.option) for w in (f, v)]
    refuse(row.command, [*argv, "--config", "my.toml"], capsys, "my.toml: ", row.option, text)
    assert [p.name for p in in_tmp.iterdir()] == ["my.toml"]


@pytest.mark.parametrize("command", ["meta_train", "adapt"])
@pytest.mark.parametrize("text", ["a\\u0000b", "a\\nb"])
def test_letters_that_no_path_should_have(
    command: str, text: str, paths: dict[str, Path], in_tmp: Path, capsys: Text
) -> None:
    """One line even so."""
    option = "dataset" if command == "meta_train" else "data"
    (in_tmp / "my.toml").write_text(f'{option} = "folder:/none/{text}"\n')
    argv = [] if command == "meta_train" else ["--init", str(paths["run"])]
    refuse(command, [*argv, "--config", "my.toml"], capsys, "my.toml: ", option)


# ---- real processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "line", "parts"),
    [
        ("meta_train", "--dataset folder:/none/Größe", ["dataset", "/none/Größe does not exist"]),
        ("evaluate", "{run} --out {file}/x", ["out", "{file}/x"]),
        ("adapt", "--init {run} --data folder:{broken}", ["data", "{broken}", "cannot be read"]),
        ("predict", "{adapted} /none/数据", ["images", "/none/数据 does not exist"]),
    ],
)
def test_a_real_process(command: str, line: str, parts: list[str], paths: dict[str, Path], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", f"metaft.{command}", *(filled(word, paths) for word in line.split())]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [error] = done.stderr.splitlines()
    assert error.startswith("metaft: error: ")
    assert all(filled(part, paths) in error for part in parts), error
    assert list(tmp_path.iterdir()) == []
