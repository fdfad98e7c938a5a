"""Options in groups: what a command line gives, what `--help` shows, and the flat text that run folders keep."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from helpers import COMMANDS, CONFIGS

from metaft import meta_train
from metaft.config import (
    AdaptConfig,
    MetaTrainConfig,
    Settled,
    read_toml,
    to_toml,
)
from metaft.errors import MetaftError
from metaft.flags import flag, parse
from metaft.options import Group, Option, Settings, flat, from_mapping, options
from metaft.runs.checkpoint import load
from metaft.settings.finetuning import InnerMethod, Recipe
from metaft.settings.meta_training import TaskSettings


def given(command: str, *argv: str) -> dict[str, Any]:
    return parse(COMMANDS[command].Arguments, argv, prog=command)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--meta-batch", "3"], {"meta_batch": 3}),
        (["--meta_batch", "3", "--inner_lr=0.5"], {"meta_batch": 3, "inner_lr": 0.5}),
        (["--ways", "3", "--ways=4"], {"ways": 4}),
        (["--inner-lr", "-1e-3", "--seed", "-1"], {"inner_lr": -1e-3, "seed": -1}),
        (["--outer-lr", "-inf"], {"outer_lr": float("-inf")}),
        (["--out", ""], {"out": ""}),
        (["--rotate", "--ways", "2"], {"rotate": True, "ways": 2}),
        (["--no-rotate"], {"rotate": False}),
        (["--no-adapt-norm"], {"adapt_norm": False}),
        (["--no_adapt_norm", "--adapt_norm"], {"adapt_norm": True}),
        (["--no-adapt_norm"], {"adapt_norm": False}),
        (["--rotate", "False", "--adapt-norm=None"], {"rotate": False, "adapt_norm": None}),
        (["--skip_bad", "--no-download"], {"skip_bad": True, "download": False}),
        (["--clip-norm", "None"], {"clip_norm": None}),
        (["--hyper", "a=1", "b=-2", "--ways", "3"], {"hyper": ("a=1", "b=-2"), "ways": 3}),
        (["--hyper=a=1"], {"hyper": ("a=1",)}),
        (["--hyper", "a=1", "b=2", "--ways", "3", "--hyper=c=3"], {"hyper": ("a=1", "b=2", "c=3"), "ways": 3}),
        (["--hyper", "--hyper", "a=1"], {"hyper": ("a=1",)}),
        (["--engine", "vmap", "--config", "c.toml"], {"engine": "vmap", "config": "c.toml"}),
    ],
    ids=" ".join,
)
def test_what_is_given_is_taken_and_nothing_else(argv: list[str], expected: dict[str, Any]) -> None:
    taken = given("meta_train", *argv)
    assert taken == expected
    assert [type(value) for value in taken.values()] == [type(taken[name]) for name in expected]


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        ("evaluate", ["r", "--shots", "5"], {"run": "r", "shots": 5}),
        ("evaluate", ["--rotate", "r"], {"run": "r", "rotate": True}),
        ("evaluate", ["--", "--r"], {"run": "--r"}),
        ("predict", ["r", "a", "--top", "2", "b"], {"run": "r", "images": ("a", "b"), "top": 2}),
        ("predict", ["--top", "2", "r", "--", "-a.png", "b"], {"run": "r", "images": ("-a.png", "b"), "top": 2}),
        ("search", ["s", "--trials", "2"], {"space": "s", "trials": 2}),
        ("search", ["--resume", "r"], {"resume": "r"}),
    ],
    ids=str,
)
def test_words_without_a_flag_may_stand_anywhere(command: str, argv: list[str], expected: dict[str, Any]) -> None:
    assert given(command, *argv) == expected


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        ("meta_train", "--wayz 3", "unknown option --wayz; did you mean '--ways'?"),
        ("meta_train", "-out x", "unknown option -out; did you mean '--out'?"),
        ("meta_train", "--iter 3", "unknown option --iter"),  # no abbreviations
        ("meta_train", "--loss=x", "unknown option --loss=x; what only some algorithms have is given as --hyper loss="),
        ("meta_train", "--ways", "--ways: expected one argument"),
        ("meta_train", "--ways 2.5", "ways must be a whole number, got '2.5'"),
        ("meta_train", "--seed None", "seed must be a whole number, got 'None'"),
        ("meta_train", "--inner_lr fast", "inner_lr must be a number, got 'fast'"),
        ("meta_train", "--engine thread", "engine must be one of auto, .*, got 'thread'; did you mean 'threads'?"),
        ("meta_train", "--rotate=yes", "--rotate takes no value, got 'yes'"),
        ("meta_train", "--no-rotate=True", "--no-rotate takes no value, got 'True'"),
        ("meta_train", "--skip-bad=True", "--skip-bad takes no value, got 'True'"),
        ("meta_train", "--no_skip_bad=", "--no_skip_bad takes no value, got ''"),
        ("meta_train", "--download True", "unexpected 'True'; options begin with --"),
        ("meta_train", "--no-rotate False", "unexpected 'False'; options begin with --"),
        ("meta_train", "omniglot", "unexpected 'omniglot'; options begin with --"),
        ("evaluate", "--shots 3", "run: RUN is missing: Run folder of metaft.meta_train."),
        ("evaluate", "r s", "unexpected 's'; options begin with --"),
        ("evaluate", "--episode 3", "unknown option --episode; did you mean '--episodes'?"),
        ("predict", "r i --tops 3", "unknown option --tops; did you mean '--top'?"),
        ("predict", "r", "images: IMAGE|FOLDER... is missing: Picture files, or folders"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command: str, line: str, said: str) -> None:
    with pytest.raises(MetaftError) as caught:
        given(command, *line.split())
    pattern = re.escape(said).replace(r"\.\*", ".*")
    assert re.match(pattern, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["--unknown", "--xyz"])
def test_nothing_is_suggested_that_is_not_near(word: str) -> None:
    with pytest.raises(MetaftError) as caught:
        given("adapt", word, "3")
    assert str(caught.value) == f"unknown option {word}"


# ---- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_panel_for_each_group(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as done:
        given(command, "--help")
    text, known = said.getvalue(), options(COMMANDS[command].Arguments)
    assert done.value.code == 0
    assert max(map(len, text.splitlines())) < columns
    assert "None" not in text
    assert "SUPPRESS" not in text
    assert "[]" not in text
    blocks = [block for block in text.split("\n\n") if "  --" in block]
    panels = {re.findall(r"^(\S.*):$", block, re.MULTILINE)[0]: block for block in blocks}
    for name, field in known.items():
        if field.option.positional:
            assert f"\n{field.option.metavar}:\n" in text
            continue
        panel = panels["This command" if field.group is None else field.title]
        [shown] = re.findall(rf"^  {flag(name)}(?![\w-]).*\n(?:      .*\n?)*", panel + "\n", re.MULTILINE)
        words = " ".join(shown.split())
        assert " ".join(field.option.help.split()) in words.replace("- ", "-") or field.option.help in words
        says = field.default not in (None, ()) and field.default is not False and "(auto" not in field.option.help
        assert (f"(default: {field.default})" in words) == says, name
        assert (f"--no-{flag(name)[2:]}" in words) == (bool in field.types and field.open), name
    assert text.count("\n  --") == len([f for f in known.values() if not f.option.positional])


# ---- groups -------------------------------------------------------------------------------------------------------


def test_keywords_are_options_or_groups_or_both() -> None:
    config = MetaTrainConfig(ways=3, task=TaskSettings(ways=4, shots=2), seed=7)
    assert (config.task.ways, config.task.shots, config.compute.seed) == (3, 2, 7)
    again = dataclasses.replace(config, shots=5, engine="vmap")
    assert (again.task, again.compute.seed, again.compute.engine) == (TaskSettings(ways=3, shots=5), 7, "vmap")
    assert config == MetaTrainConfig(ways=3, shots=2, seed=7) != again
    with pytest.raises(MetaftError, match="unknown field 'wayz'; did you mean 'ways'"):
        MetaTrainConfig(wayz=3)
    with pytest.raises(MetaftError, match="task must be TaskSettings, got 3"):
        MetaTrainConfig(task=3)
    with pytest.raises(MetaftError, match=r"^c\.toml: unknown field 'task'"):
        from_mapping(MetaTrainConfig, {"task": 3}, origin="c.toml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.task = TaskSettings()  # type: ignore[misc]


def test_a_group_checks_itself_wherever_it_is_made() -> None:
    for make in (Recipe, AdaptConfig):
        with pytest.raises(MetaftError, match=r"^lr must be above 0, got 0$"):
            make(lr=0)
        with pytest.raises(MetaftError, match=r"^batch_size must be at least 2, got 1$"):
            make(batch_size=1)


def test_a_recipe_is_none_until_something_of_it_is_given() -> None:
    assert AdaptConfig().recipe is AdaptConfig(method="inner", epochs=None).recipe is None
    assert AdaptConfig(epochs=3, lr=None).recipe == Recipe(epochs=3)
    assert dataclasses.replace(AdaptConfig(epochs=3), lr=0.1).recipe == Recipe(epochs=3, lr=0.1)
    assert not flat(AdaptConfig()).keys() & options(Recipe).keys()
    assert (Recipe().lr, Recipe().rate) == (None, 0.003)


@pytest.mark.parametrize(("name", "value"), [("lr", 0.003), ("epochs", 5), ("head", "linear")])
def test_a_setting_of_the_other_method_is_named_even_at_its_default(name: str, value: object) -> None:
    with pytest.raises(MetaftError, match=rf"^{name}: --method inner has no such setting \(given {value}\)$"):
        AdaptConfig(method="inner", **{name: value})


@pytest.mark.parametrize("cls", CONFIGS)
def test_flat_and_from_mapping_are_inverse(cls: Any) -> None:
    other = {int: 7, float: 0.25, bool: True, str: "cpu", tuple: ("a=1",)}
    values = {
        name: field.choices[-1] if field.choices else other[_plain(field)]
        for name, field in options(cls).items()
        if cls is not AdaptConfig or name not in options(InnerMethod)
    } | ({"method": "finetune"} if cls is AdaptConfig else {})
    config = from_mapping(cls, values, origin="c.toml")
    assert {name: flat(config)[name] for name in values} == values
    assert from_mapping(cls, flat(config), origin="c.toml") == config
    assert list(flat(config)) == list(options(cls))


def _plain(field: Any) -> Any:
    kind = next(kind for kind in field.types if kind is not type(None))
    return getattr(kind, "__origin__", kind)


@dataclasses.dataclass(frozen=True, init=False)
class Twice(Settings):
    """A command with one name in two places."""

    recipe: Recipe
    epochs: Annotated[int, Option("Again.")] = 1


def test_no_name_is_in_two_groups() -> None:
    with pytest.raises(AssertionError, match=r"Twice: \['epochs'\] twice"):
        options(Twice)


def test_nothing_is_open_in_settled_settings() -> None:
    with pytest.raises(MetaftError, match=r"^rotate must be bool, got None"):
        Settled()
    assert set(options(Settled)) == set(options(MetaTrainConfig))
    narrowed = {name for name, field in options(Settled).items() if field.types != options(MetaTrainConfig)[name].types}
    assert len(narrowed) == 16
    assert not any(options(Settled)[name].open for name in narrowed)


def test_every_group_has_a_title_and_its_fields_are_options() -> None:
    def below(cls: type[Group]) -> list[type[Group]]:
        return [cls, *(c for sub in cls.__subclasses__() for c in below(sub))]

    for group in below(Group)[1:]:
        assert group.__doc__
        assert not group.__doc__.startswith(f"{group.__name__}("), group  # a dataclass's own
        assert options(group)


# ---- what is written ----------------------------------------------------------------------------------------------

TRAINED = """\
dataset = "sinusoid"
download = false
rotate = false
skip_bad = false
ways = 1
shots = 10
query_shots = 10
meta_batch = 2
algorithm = "anil"
model = "mlp"
width = 4
dropout = 0.0
batch_norm = "transductive"
inner_steps = 1
inner_lr = 0.01
inner_optimizer = "sgd"
inner_augment = "none"
hyper = [
    "first_order=true",
]
iterations = 1
outer_optimizer = "adam"
outer_lr = 0.001
outer_schedule = "cosine"
clip_norm = 1.0
eval_every = 1
eval_episodes = 2
eval_modes = "training"
keep_best = 1
eval_seed = 1234
test_ways = 1
test_shots = 10
test_query_shots = 100
test_inner_steps = 10
test_episodes = 2
seed = 0
device = "cpu"
engine = "vmap"
precision = "fp32"
inner_checkpoint = false
log_every = 10
checkpoint_every = 100
"""
"""As the release before groups wrote it."""


def test_a_run_keeps_the_same_flat_text_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    words = "--dataset sinusoid --algorithm anil --hyper first_order=true --iterations 1 --eval-every 1 --meta-batch 2 "
    words += "--width 4 --eval-episodes 2 --test-episodes 2 --clip-norm 1 --device cpu --engine vmap"
    assert meta_train.main([*words.split(), "--out", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r/config.toml").read_text() == TRAINED
    kept = load(tmp_path / "r/checkpoints/last.safetensors")[1]["config"]
    assert kept == read_toml(tmp_path / "r/config.toml")


def test_adapt_keeps_the_same_flat_text_as_ever() -> None:
    shared = 'init = "none"\ndata = "glyphs:Hebrew"\nskip_bad = false\nshots_per_class = 5\n'
    end = 'seed = 0\nseeds = 1\ndevice = "cpu"\n'
    recipe = (
        'epochs = 1\nlr = 0.01\noptimizer = "adam"\nschedule = "constant"\nbatch_size = 32\naccumulate = 1\n'
        'head = "linear"\nfreeze = "none"\naugment = "none"\nloss = "cross_entropy"\nbalance = "none"\n'
        "dropout = 0.0\nlabel_smoothing = 0.0\n"
    )
    config = AdaptConfig(init="none", shots_per_class=5, device="cpu")
    tuned = dataclasses.replace(config, epochs=1, lr=0.01, schedule="constant")
    assert to_toml(tuned) == f'{shared}method = "finetune"\n{recipe}{end}'
    inner = dataclasses.replace(config, method="inner", inner_steps=2, plugin="p.py")
    assert to_toml(inner) == f'{shared}method = "inner"\ninner_steps = 2\nplugin = "p.py"\n{end}'
