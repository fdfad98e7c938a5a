"""The grammar of `name[:POSITIONAL][:key=value,...]`: what is read, how it is typed, and what is said of the rest."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import SINUSOID, one_line, options
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metaft import inner_augment, inner_optim, meta_train, targets, tasks
from metaft.errors import MetaftError, no_such
from metaft.spec import Spec, Takes, bind, convert, name_of, parameters, parse, takes, write
from metaft.support import places


def birds(path: str, /, *, size: int = 3, mode: Literal["grey", "colour"] = "grey", rate: float | None = None) -> Any:
    return path, size, mode, rate


def noise(strength: float = 0.5, /, keep: bool = True) -> Any:
    return strength, keep


def given_more(model: object, *, steps: int, name: str = "x", scale=2.0) -> Any:
    return model, steps, name, scale


TOYS = {"birds": birds, "noise": noise, "more": given_more, "fixed": functools.partial(given_more, steps=3)}
TAKES = {name: takes(factory) for name, factory in TOYS.items()}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("birds:/data/a", ("/data/a", 3, "grey", None)),
        ("birds:/data/a b,c:d", ("/data/a b,c:d", 3, "grey", None)),
        ("birds:C:\\a:size=4", ("C:\\a", 4, "grey", None)),
        ("birds:/a:x=4", ("/a:x=4", 3, "grey", None)),  # no key of its factory
        ("birds:/a:size=4,x=4", ("/a:size=4,x=4", 3, "grey", None)),
        ("birds:size=4", ("size=4", 3, "grey", None)),  # there must be a positional, so this is it
        ("birds:/a:size=4:size=5", ("/a:size=4", 5, "grey", None)),
        ('birds:"/a:size=4"', ("/a:size=4", 3, "grey", None)),
        ("birds:'it''s':mode=colour,rate=1e-3", ("it's", 3, "colour", 1e-3)),
        ('birds:"a"b', ('"a"b', 3, "grey", None)),
        ("birds:a:rate=none", ("a", 3, "grey", None)),
        ('birds:a:mode="colour"', ("a", 3, "colour", None)),
        ("noise", (0.5, True)),
        ("noise:", (0.5, True)),
        ("noise:2", (2.0, True)),
        ("noise:keep=False", (0.5, False)),
        ("noise:2:keep=FALSE", (2.0, False)),
    ],
)
def test_members_are_made_as_they_are_written(text: str, made: Any) -> None:
    assert bind("toy", text, TOYS)() == made


def test_what_is_of_no_plain_type_is_the_callers() -> None:
    assert bind("toy", 'more:steps=2,name="a,b=c:d"', TOYS)("model") == ("model", 2, "a,b=c:d", 2.0)
    assert bind("toy", "fixed:scale=3", TOYS)("model") == ("model", 3, "x", 3.0)
    assert list(takes(given_more, reserved=["name"]).options) == ["steps", "scale"]
    assert bind("toy", Spec("birds", "a:size=4", (("size", "5"),)), TOYS)() == ("a:size=4", 5, "grey", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bird:a", "toy: no 'bird:a', known are birds:PATH, noise, more, fixed; did you mean 'birds'?"),
        ("birds", "toy: write 'birds:PATH:size=3,mode=grey,rate=None', not 'birds'"),
        ('birds:""', """toy: write 'birds:PATH:size=3,mode=grey,rate=None', not 'birds:""'"""),
        ('birds:"a":siez=3', "toy: birds has no 'siez' (given 'birds:\"a\":siez=3'); it has size, mode, rate"),
        ('birds:"a":siez=3', "; did you mean 'size'?"),
        ("birds:a:size=3.5", "toy: 'size=3.5' must be int (given 'birds:a:size=3.5')"),
        ("birds:a:size=3,size=3", "; 'size' is given twice"),
        ("birds:a:mode=blue", "'mode=blue' must be one of grey, colour"),
        ("birds:a:rate=inf", "must be finite"),
        ("birds:a:rate=much", "must be none or float"),
        ('birds:a:rate="1', "a quote ends before a comma or the end"),
        ("noise:loud", "toy: 'loud' must be float (given 'noise:loud')"),
        ("noise:keep=1", "must be true or false"),
        ("more", "toy: 'more' lacks steps; it is as in 'more:steps=STEPS,name=x,scale=2.0'"),
        ("more:3", "cannot read '3' of 'more:3'; write 'more:steps=STEPS"),
        ("more:steps=1,", "cannot read '' of 'more:steps=1,'"),
        ("fixed:steps=1", "toy: fixed has no 'steps' (given 'fixed:steps=1'); it has name, scale"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_field_and_what_was_given(text: str, message: str) -> None:
    with pytest.raises(MetaftError) as error:
        bind("toy", text, TOYS)
    assert str(error.value).startswith("toy: ") and message in str(error.value)
    assert "\n" not in str(error.value)


TEXT = st.text(st.sampled_from("ab:,='\"\\ /é0.") | st.characters(), max_size=12)
WRITTEN = {
    "birds": st.fixed_dictionaries({}, optional=dict.fromkeys(("size", "mode", "rate"), TEXT)),
    "noise": st.fixed_dictionaries({}, optional={"keep": TEXT}),
    "more": st.fixed_dictionaries({}, optional=dict.fromkeys(("steps", "name", "scale"), TEXT)),
}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    name = draw(st.sampled_from(sorted(WRITTEN)))
    texts = TEXT.filter(bool) | st.sampled_from(["size=3", "keep=1", "a:size=3", '"a"', "'a':size=3", '"a":x=1', "a:b"])
    positional = {"birds": texts, "noise": texts | st.none(), "more": st.none()}[name]
    return Spec(name, draw(positional), tuple(draw(WRITTEN[name]).items()))


@settings(max_examples=500)
@given(specs())
@example(Spec("noise", "keep=1"))
@example(Spec("noise", None, (("keep", ":"),)))
@example(Spec("noise", None, (("keep", "a:keep=1"),)))
@example(Spec("birds", "a", (("size", "a:size=1"), ("mode", "b"))))
@example(Spec("birds", "a:size=3", (("size", 'a","b'),)))
def test_what_is_written_is_read_as_the_same(spec: Spec) -> None:
    assert parse("toy", write(spec, TAKES[spec.name]), TAKES) == spec


@settings(max_examples=500)
@given(st.sampled_from(["", *TOYS]), TEXT)
def test_any_text_is_read_or_refused_in_one_line(name: str, text: str) -> None:
    try:
        spec = parse("toy", f"{name}:{text}", TAKES)
    except MetaftError as error:
        said = str(error)
    else:
        said = "toy: "
        assert parse("toy", write(spec, TAKES[spec.name]), TAKES) == spec
    assert said.startswith("toy: ")


@given(TEXT.filter(bool).filter(lambda text: text[0] not in "'\""))
def test_a_path_without_a_quote_before_it_is_read_as_it_is(text: str) -> None:
    assert places.folder_of(f"folder:{text}") == text
    known = {name: Takes(kind.place) for name, kind in targets.KINDS.items()}
    assert parse("data", f"folder:{text}", known).positional == text


def test_types_come_from_annotations_and_where_there_is_none_from_defaults() -> None:
    def known(a: int | None = None, b=1, c=None, d: str | int = "x") -> None: ...

    assert [convert("3", p) for p in parameters(known).values()] == [3, 3, 3.0, 3]
    assert [type(convert("3", p)) for p in parameters(known).values()] == [int, int, float, int]
    assert convert("None", parameters(known)["a"]) is None
    assert list(takes(known).options) == ["a", "b", "d"]  # of the other nobody says what it is

    def unknown(e: Unknown = 2.0, f: Unknown = None) -> None: ...  # noqa: F821 # pyright: ignore[reportUndefinedVariable]

    assert list(takes(unknown).options) == ["e"]
    assert convert("3", parameters(unknown)["e"]) == 3.0


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, metaft.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_may_hold_colons() -> None:
    assert name_of("mine:v2:steps=1", ["mine", "mine:v2"]) == "mine:v2"
    assert parse("toy", "mine:v2", {"mine": Takes(), "mine:v2": Takes()}) == Spec("mine:v2")


def test_what_is_known_is_said_in_one_way() -> None:
    assert str(no_such("head", "liner", ["linear"])) == "head: no 'liner', known are linear; did you mean 'linear'?"
    where = Path(inspect.getfile(no_such)).parent
    copies = [file.name for file in where.rglob("*.py") if "known are" in file.read_text(encoding="utf-8")]
    assert copies == ["errors.py"]


# ---- the options that are written so ------------------------------------------------------------------------------


def test_a_row_of_a_table_is_all_that_a_member_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(share: float = 0.5) -> inner_optim.InnerOptimizer:
        return inner_optim.momentum(share)

    monkeypatch.setitem(inner_optim.OPTIMIZERS, "half", half)
    state = inner_optim.make("half:share=0.25").update({}, {}, 0)
    assert state == ({}, {})
    with pytest.raises(MetaftError, match=r"^inner_optimizer: half has no 'shaer' .*did you mean 'share'\?"):
        inner_optim.make("half:shaer=1")
    monkeypatch.setitem(inner_augment.AUGMENTS, "same", lambda x, key, step: x)
    assert inner_augment.named("same")(3, 0, 0) == 3  # pyright: ignore[reportArgumentType]
    with pytest.raises(MetaftError, match=r"^inner_augment: .*'shift'"):
        inner_augment.named("shift:3")


def test_data_are_named_as_they_were_and_in_quotes(tmp_path: Path) -> None:
    for name in ("a:b", "a,b=c", "c d", "x:size=3"):
        assert places.folder_of(f"folder:{tmp_path}/{name}") == f"{tmp_path}/{name}"
        assert places.named_in_full(f"folder:{tmp_path}/{name}") == f"folder:{tmp_path}/{name}"
        assert places.named_in_full(f'folder:"{tmp_path}/{name}"') == f"folder:{tmp_path}/{name}"
    for name in ("folder", "folder:", 'folder:""', "glyphs", "l2l:x"):
        assert places.folder_of(name) is None
    with pytest.raises(MetaftError, match=r"""^dataset: write 'folder:PATH', not 'folder:""'"""):
        tasks.load('folder:""')
    with pytest.raises(MetaftError, match=r"^data: no 'glyph:Thai', known are folder:PATH, .*; did you mean"):
        targets.load("glyph:Thai")
    for load, field in ((tasks.load, "dataset"), (targets.load, "data")):
        with pytest.raises(MetaftError, match=f"^{field}: '{tmp_path}' is a path .*; write 'folder:{tmp_path}'"):
            load(str(tmp_path))
        table = tmp_path / "t.csv"
        table.touch()
        with pytest.raises(MetaftError, match=f"^{field}: .*; write 'csv:{table}'"):
            load(str(table))
    assert targets.load('glyphs:"Hebrew"').name == "glyphs:Hebrew"


@pytest.mark.usefixtures("in_tmp")
def test_an_algorithm_brings_its_settings_and_the_run_keeps_them_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    words = options(SINUSOID, out="one", algorithm="maml++:multi_step=0,step_norm=false", hyper="first_order=true")
    assert meta_train.main(words) == 0
    hyper = ["--hyper", "multi_step=0", "step_norm=false", "first_order=true"]
    assert meta_train.main([*options(SINUSOID, out="other", algorithm="maml++"), *hyper]) == 0
    one, other = (Path(name) for name in ("one", "other"))
    for part in ("config.toml", "metrics.jsonl", "checkpoints/last.safetensors"):
        assert (one / part).read_bytes() == (other / part).read_bytes()
    # The command that began a run goes on with it, whichever way the settings were written.
    for name, begun in (("other", words), ("one", [*options(SINUSOID, algorithm="maml++"), *hyper])):
        kept = (Path(name) / "config.toml").read_bytes()
        assert meta_train.main([*begun, "--out", name, "--auto-resume"]) == 0
        assert (Path(name) / "config.toml").read_bytes() == kept
    assert meta_train.main(["--resume", "one", "--algorithm", "maml++:multi_step=0"]) == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--algorithm maml++:multi_stp=0", ["algorithm: ", "maml++ has no 'multi_stp'", "did you mean 'multi_step'"]),
        ("--algorithm maml++:multi_step=x", ["algorithm: ", "'multi_step=x' must be float"]),
        ("--algorithm maml++:multi_step=0,multi_step=1", ["algorithm: ", "'multi_step' is given twice"]),
        ("--algorithm maml:inner_lr=1", ["algorithm: ", "--inner-lr is an option by itself"]),
        ("--algorithm maml:first", ["algorithm: ", "'maml:first'", "write 'maml:first_order=False'"]),
        ("--algorithm maml:", ["algorithm: write 'maml:first_order=False', not 'maml:'"]),
        ("--algorithm mam:first_order=true", ["algorithm: ", "'mam'", "did you mean 'maml'"]),
        (
            "--algorithm maml++:multi_step=0 --hyper multi_step=0",
            ["algorithm: 'multi_step' is given in", "and as --hyper"],
        ),
    ],
)
def test_settings_of_an_algorithm_are_checked(
    words: str, parts: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert meta_train.main([*options(SINUSOID, out="run"), *words.split()]) == 2
    one_line(capsys, *parts)
    assert not (in_tmp / "run").exists()


@pytest.mark.usefixtures("in_tmp")
def test_a_resumed_run_keeps_the_settings_of_its_algorithm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    assert meta_train.main(options(SINUSOID, out="run", algorithm="maml++:multi_step=0", iterations=2)) == 0
    capsys.readouterr()
    assert meta_train.main(["--resume", "run", "--algorithm", "maml++:multi_step=1"]) == 2
    one_line(capsys, "hyper: a resumed run keeps its settings", "multi_step=0", "multi_step=1")
