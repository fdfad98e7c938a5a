"""Whatever bytes lie where settings, run folders and images are expected: metaft's own errors are all that come out."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from helpers import finished, meta_trained, one_thread, sinusoid, words, write_folder, write_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metaft import adapt, meta_train, targets
from metaft.config import AdaptConfig, EvaluateConfig, MetaTrainConfig, PredictConfig, read_toml
from metaft.errors import DataError, MetaftError
from metaft.finetune import journal
from metaft.finetune.classifier import load
from metaft.inputs.listing import list_below
from metaft.inputs.reading import open_image
from metaft.options import flat, from_mapping, options
from metaft.runs import report
from metaft.runs.folder import RunFolder, cut_back, read_rows
from metaft.runs.opened import open_run
from metaft.tasks import folder

CONFIGS: list[Any] = [MetaTrainConfig, AdaptConfig, EvaluateConfig, PredictConfig]
FIELDS = sorted({name for cls in CONFIGS for name in options(cls)})

# The folder of a test is written over by each example, which is what is wanted; how long one takes depends on the disk.
FULL = os.environ.get("METAFT_FAULTS") == "full"  # ten times as many examples, other ones each time
ours = settings(
    deadline=None,
    derandomize=not FULL,
    max_examples=1000 if FULL else 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(ours, max_examples=500 if FULL else 50)
many = settings(ours, max_examples=3000 if FULL else 300)


@contextlib.contextmanager
def only_ours(kind: type[Exception] = MetaftError) -> Iterator[None]:
    """Inside, an error of this kind may be raised, in one line, and no other."""
    try:
        yield
    except kind as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


# ---- settings -----------------------------------------------------------------------------------------------------

key = st.sampled_from(FIELDS) | st.text(max_size=9)
plain = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.sampled_from(["maml", "auto", "cpu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@ours
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_toml_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.toml").write_bytes(data)
    with only_ours():
        read_toml(tmp_path / "c.toml")


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 5000, "a" + ".a" * 5000 + " = 1", "a = 1" + "0" * 5000, "a = 9999-99-99"],
    ids=["depth", "dots", "digits", "day"],
)
def test_toml_that_a_parser_chokes_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(MetaftError, match=r"c\.toml"):
        from_mapping(MetaTrainConfig, read_toml(tmp_path / "c.toml"), origin="c.toml")


@ours
@given(
    cls=st.sampled_from(CONFIGS),
    values=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=9), plain, max_size=4),
)
def test_any_values_as_settings(tmp_path: Path, cls: Any, values: dict[str, Any]) -> None:
    with only_ours():
        from_mapping(cls, values, origin="c.toml")
    with contextlib.suppress(ValueError, UnicodeEncodeError):  # what TOML itself cannot hold
        (tmp_path / "c.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        with only_ours():
            from_mapping(cls, read_toml(tmp_path / "c.toml"), origin="c.toml")


@ours
@given(field=st.sampled_from(list(options(MetaTrainConfig))), value=plain)
def test_any_value_of_one_setting_comes_back_or_is_refused_by_name(field: str, value: Any) -> None:
    try:
        config = from_mapping(MetaTrainConfig, {field: value}, origin="c.toml")
    except MetaftError as error:
        assert str(error).startswith(f"c.toml: {field} must be ")  # noqa: PT017
    else:
        found = flat(config)[field]
        assert (list(found) if isinstance(found, tuple) else found) == value  # TOML has lists


# ---- run folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "curve"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda *_: [])
        meta_train.run(sinusoid(out, iterations=2, eval_episodes=2, test_episodes=2))
    return out


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    init = meta_trained(base / "init", write_folder(base / "squares"))
    return finished(words(init, write_target(base / "target", {"train": 3, "test": 2}), base / "adapted", epochs=1))


@st.composite
def harm(draw: st.DrawFn, data: bytes) -> bytes | None:
    """The bytes of a file cut off, changed, repeated or replaced; None for a file that is gone."""
    how = draw(st.sampled_from(["gone", "cut", "change", "insert", "drop", "other", "rows"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    other = draw(st.binary(max_size=30))
    if how == "gone":
        return None
    if how == "rows":  # good JSON of the wrong kind
        row = draw(st.sampled_from([b"3", b"null", b"[]", b"{}", b'{"step": "x"}', b'{"step": null}', b"[" * 5000]))
        lines = data.split(b"\n")
        lines.insert(draw(st.integers(0, len(lines))), row)
        return b"\n".join(lines)
    size = draw(st.integers(1, 20))
    return {
        "cut": data[:place],
        "change": data[:place] + other + data[place + len(other) :],
        "insert": data[:place] + other + data[place:],
        "drop": data[:place] + data[place + size :],
        "other": other,
    }[how]


def read_everything(path: Path) -> None:
    """All that the commands read of a run, each by itself."""
    run = RunFolder(path)
    with only_ours():
        RunFolder.open(path)
    for which in ("best", "last"):
        with only_ours():
            open_run(path, which=which)
    with only_ours():
        journal.read(run)
    with only_ours(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        load(path)
    for file in (run.metrics, run.timing):
        with only_ours():
            read_rows(file)
        with only_ours():
            cut_back(file, 1, 1)


def harmed(draw: st.DataObject, whole: Path, copy: Path, *, but: str = "") -> None:
    """A copy of a run with one to three of its files harmed, `but` not this one."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name != but)
    for name in draw.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        data = draw.draw(harm((whole / name).read_bytes()))
        (copy / name).unlink()
        if data is not None:
            (copy / name).write_bytes(data)
        elif draw.draw(st.booleans()):
            (copy / name).mkdir()


@few
@given(draw=st.data())
@pytest.mark.parametrize("which", ["trained", "adapted"])
def test_a_run_folder_with_any_file_harmed(
    which: str, draw: st.DataObject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    harmed(draw, request.getfixturevalue(which), tmp_path / "r")
    read_everything(tmp_path / "r")


@few
@given(draw=st.data())
@pytest.mark.parametrize("which", ["trained", "adapted"])
def test_a_harmed_run_is_resumed_or_refused_in_one_line(
    which: str, draw: st.DataObject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """By the command itself, without its pictures."""
    # Settings with another digit could train for days.
    harmed(draw, request.getfixturevalue(which), tmp_path / "r", but="config.toml")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setattr(report, "draw_pictures", lambda *_: [])
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        status = (meta_train if which == "trained" else adapt).main(["--resume", str(tmp_path / "r")])
    assert status in (0, 2), said.getvalue()
    assert sum(line.startswith("metaft: error: ") for line in said.getvalue().splitlines()) == (status == 2)


# ---- images -------------------------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in FORMATS}


@many
@given(draw=st.data())
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some that it reads
def test_any_bytes_as_an_image(draw: st.DataObject, tmp_path: Path) -> None:
    data = draw.draw(st.sampled_from(FORMATS).flatmap(lambda kind: harm(PICTURES[kind])) | st.binary(max_size=100))
    file = tmp_path / "x.png"
    file.write_bytes(data or b"")
    with only_ours(DataError):
        assert open_image(file).mode in ("L", "RGB")


name = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
odd = name | st.sampled_from(
    ["train", "val", "test", ".git", "__MACOSX", "a.png", " ", "-", "\n", "é", "e\u0301", "x" * 250]
)
content = st.sampled_from([PICTURES["PNG"], PICTURES["JPEG"], PICTURES["PNG"], b"", b"text"]) | st.binary(max_size=20)
entry = st.one_of(
    st.tuples(st.just("file"), odd.map(lambda stem: f"{stem}.png") | odd, content),
    st.tuples(st.just("link"), odd, st.sampled_from([".", "..", "/none", "a", "../a", "a.png"])),
)
tree = st.recursive(
    st.lists(entry, max_size=4), lambda inner: st.lists(entry | st.tuples(st.just("folder"), odd, inner), max_size=4)
)


def plant(place: Path, entries: Any) -> None:
    """Files, links and folders as they were drawn; what this file system does not take is left out."""
    with contextlib.suppress(FileExistsError):
        place.mkdir()
    for kind, called, inside in entries:
        if os.path.islink(place) or called in (".", ".."):  # what is planted stays inside
            continue
        with contextlib.suppress(OSError, ValueError):
            if os.path.lexists(place / called) and kind != "folder":
                continue
            if kind == "file":
                (place / called).write_bytes(inside)
            elif kind == "link":
                os.symlink(inside, place / called)
            else:
                plant(place / called, inside)


@ours
@given(entries=tree, more=tree)
@pytest.mark.filterwarnings("ignore")
def test_any_tree_of_files_as_a_folder_of_images(entries: Any, more: Any, tmp_path: Path) -> None:
    base = tmp_path / "data"
    shutil.rmtree(base, ignore_errors=True)
    plant(base, entries)
    for part in ("a", "b"):  # so that some of them are good
        plant(base / part, [("file", "1.png", PICTURES["PNG"])])
    plant(base / "c", more)
    readers = (folder, lambda path: targets.load(f"folder:{path}"), lambda path: targets.shape_of(f"folder:{path}"))
    for read in (*readers, list_below):
        with contextlib.suppress(MetaftError):  # in one line when a command says it, whatever is in the names
            read(base)
