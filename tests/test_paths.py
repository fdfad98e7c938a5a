"""Paths are read in one way everywhere, run folders know where their data are, and find those that moved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ADAPT, IMAGES, one_thread, options, write_folder, write_target

import metaft
from metaft import adapt, evaluate, meta_train, predict
from metaft.config import AdaptConfig, MetaTrainConfig, read_toml, to_toml
from metaft.errors import DataError, MetaftError
from metaft.support import paths, places
from metaft.tasks import load

Text = pytest.CaptureFixture[str]

QUICK: dict[str, Any] = {**IMAGES, "image_size": 8, "iterations": 2, "eval_episodes": 2, "test_episodes": 2}
BOTH = ["--episodes", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
    monkeypatch.delenv("METAFT_DATA", raising=False)
    with one_thread():
        yield


@pytest.fixture
def home(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with pictures; the test runs in its neighbour."""
    write_folder(in_tmp / "home/pets")
    write_target(in_tmp / "home/flat", {".": 3})
    monkeypatch.setenv("HOME", str(in_tmp / "home"))
    (in_tmp / "work").mkdir()
    monkeypatch.chdir(in_tmp / "work")
    return in_tmp / "home"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, a `run` on folder:data and an adapt run `mine` on folder:flat. Tests copy it."""
    base = tmp_path_factory.mktemp("begun")
    write_folder(base / "data")
    write_target(base / "flat", {".": 3})
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        patch.chdir(base)
        assert meta_train.main(options(QUICK, dataset="folder:data", out="run")) == 0
        assert adapt.main(options(ADAPT, init="run", data="folder:flat", out="mine")) == 0
    return base


@pytest.fixture
def there(begun: Path, in_tmp: Path) -> Path:
    """A copy of it, made to know its new place; the test runs elsewhere."""
    base = in_tmp / "there"
    shutil.copytree(begun, base)
    for run in ("run", "mine"):
        file = base / run / "config.toml"
        file.write_text(file.read_text().replace(str(begun), str(base)))
    return base


# ---- one parser ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_for_every_path_of_every_command(home: Path) -> None:
    (home / "my.toml").write_text('dataset = "folder:~/pets"\nout = "~/run"\n')
    assert meta_train.main([*options(QUICK), "--config", "~/my.toml"]) == 0
    assert meta_train.main(["--resume", "~/run", "--iterations", "3"]) == 0
    assert evaluate.main(["~/run", *BOTH, "--dataset", "folder:~/pets", "--out", "~/e.json"]) == 0
    assert adapt.main([*options(ADAPT, init="~/run", data="folder:~/flat", out="~/mine")]) == 0
    assert adapt.main([*options(ADAPT, init="none", data="folder:~/flat", out="~/other")]) == 0
    assert adapt.main(["--resume", "~/mine"]) == 0
    assert predict.main(["~/mine", "~/flat/apple", "--csv", "~/labels.csv"]) == 0
    assert metaft.load("~/mine").label(["~/flat/apple/00.png"])
    assert {path.name for path in home.iterdir()} == {
        *("pets", "flat", "my.toml", "run", "e.json", "mine", "other", "labels.csv")
    }
    assert list(Path.cwd().iterdir()) == []


def test_a_plugin_the_cache_and_the_data_folder_likewise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaft import plugin
    from metaft.support.cache import cache_folder

    (home / "mine.py").write_text("")
    assert plugin.load("~/mine.py", "maml") == str(home / "mine.py")
    monkeypatch.setenv("METAFT_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    for given in ({"data_root": "~/nowhere"}, {}):
        monkeypatch.setenv("METAFT_DATA", "~/nowhere")
        with pytest.raises(DataError, match=f"under {home}/nowhere"):
            load("omniglot", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "$HOME/x", "%HOME%", "./~/x"])
def test_nothing_else_is_expanded_and_a_user_nobody_knows_is_a_missing_folder(
    path: str, home: Path, capsys: Text
) -> None:
    for main, field in ((meta_train, "dataset"), (adapt, "data")):
        assert main.main([f"--{field}", f"folder:{path}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"metaft: error: {field}: folder") and "does not exist" in said
        assert path.removeprefix("./") in said


@pytest.mark.parametrize("spelt", ["pets/", "../home/pets", "./pets//", "link/../pets"])
def test_spellings_of_a_folder_are_one_folder(spelt: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home.parent / "deep/er").mkdir(parents=True)
    (home / "link").symlink_to(home.parent / "deep/er")
    (home.parent / "deep/pets").symlink_to(home / "pets")  # what the system finds behind the link
    wanted = "deep/pets" if spelt.startswith("link") else "pets"
    full = places.named_in_full(f"folder:{spelt}")
    assert os.path.samefile(full.removeprefix("folder:"), home / "pets")
    assert wanted == "deep/pets" or full == f"folder:{home}/pets"
    assert load(f"folder:{spelt}", image_size=8).shape == (1, 8, 8)


def test_settings_in_full_are_absolute_and_no_other_value_changes(home: Path) -> None:
    config = MetaTrainConfig(dataset="folder:a", data_root="b", out="c")
    full = places.in_full(config)
    assert (full.data.dataset, full.data.data_root, full.output.out) == (
        f"folder:{Path.cwd()}/a",
        f"{Path.cwd()}/b",
        "c",
    )
    assert places.in_full(full) == full
    for same in (MetaTrainConfig(), AdaptConfig(init="none"), AdaptConfig(init="")):
        assert places.in_full(same) == same
    assert places.in_full(MetaTrainConfig(dataset="l2l:x/y")).data.dataset == "l2l:x/y"


def test_names_stay_short(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    """Where the command runs a folder is called as it was; files that people name runs by are named as before."""
    monkeypatch.chdir(home)
    assert meta_train.main(options(QUICK, dataset="folder:pets", iterations=1)) == 0
    assert adapt.main(options(ADAPT, init="none", data="folder:flat", epochs=1)) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"folder-pets-maml-3w1s-0", "adapt-folder-flat-none-0"}
    said = capsys.readouterr()
    assert said.err.startswith("folder:pets · maml") and said.out.startswith("folder:pets · maml")
    assert "\nfolder:flat · 3 classes" in said.out
    assert evaluate.main(["runs/folder-pets-maml-3w1s-0", *BOTH]) == 0
    [file] = Path("runs/folder-pets-maml-3w1s-0/evaluations").iterdir()
    assert file.name.startswith("folder-pets-test-3w1s2q")
    assert places.shown("glyphs") == "glyphs"
    assert places.shown("folder:/x/y") == "folder:/x/y"


# ---- run folders --------------------------------------------------------------------------------------------------


def test_a_run_knows_its_data_wherever_it_is_opened(there: Path) -> None:
    assert read_toml(there / "run/config.toml")["dataset"] == f"folder:{there}/data"
    own = read_toml(there / "mine/config.toml")
    assert (own["data"], own["init"]) == (f"folder:{there}/flat", f"{there}/run")
    assert evaluate.main(["there/run", *BOTH]) == 0
    assert meta_train.main(["--resume", "there/run", "--iterations", "3"]) == 0
    assert adapt.main(["--resume", "there/mine", "--seeds", "2"]) == 0


def test_a_folder_may_be_spelt_in_another_way_when_a_run_goes_on(there: Path, capsys: Text) -> None:
    words = ["--resume", "there/run", "--iterations", "3", "--dataset"]
    assert meta_train.main([*words, "folder:there/../there/data/"]) == 0
    assert meta_train.main([*words, "folder:there/other"]) == 2
    assert "dataset: a resumed run keeps its settings" in capsys.readouterr().err


def test_an_old_run_with_a_relative_path_opens_where_it_was_made(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    for run, field, name in (("run", "dataset", "data"), ("mine", "data", "flat")):
        file = there / run / "config.toml"
        text = file.read_text()
        file.write_text(text.replace(f'{field} = "folder:{there}/{name}"', f'{field} = "folder:{name}"'))
        assert file.read_text() != text
    assert evaluate.main(["there/run", *BOTH]) == 2
    said = capsys.readouterr().err
    assert f"dataset: folder: {there.parent}/data does not exist; where it moved, --data-root names" in said
    assert evaluate.main(["there/run", *BOTH, "--data-root", "there"]) == 0
    monkeypatch.chdir(there)
    assert evaluate.main(["run", *BOTH]) == 0
    assert meta_train.main(["--resume", "run", "--iterations", "3"]) == 0
    assert adapt.main(["--resume", "mine"]) == 0


@pytest.mark.parametrize("place", ["new/data", "new"])
@pytest.mark.parametrize("how", ["option", "environment"])
def test_data_that_moved_are_found(
    place: str, how: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """By the folder's last name, or because its classes lie in the folder that is named."""
    Path("new").mkdir()
    (there / "data").rename("new/data" if place == "new/data" else "moved")
    if place == "new":
        Path("new").rmdir()
        Path("moved").rename("new")
    where = Path(place).absolute()
    words = ["--data-root", "new"] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv("METAFT_DATA", "new")
    assert evaluate.main(["there/run", *BOTH, "--out", "e.json", *words]) == 0
    assert f"note: {there}/data does not exist; the data are read from {where}\n" in capsys.readouterr().err
    assert json.loads(Path("e.json").read_text())["classes_seen_in_training"] == 0
    assert meta_train.main(["--resume", "there/run", "--iterations", "3", *words]) == 0
    assert read_toml(there / "run/config.toml")["dataset"] == f"folder:{where}"
    assert evaluate.main(["there/run", *BOTH]) == 0  # by now it is known


def test_the_images_of_an_adapt_run_too(there: Path, capsys: Text) -> None:
    Path("new").mkdir()
    (there / "flat").rename("new/flat")
    assert adapt.main(["--resume", "there/mine"]) == 2
    assert f"data: folder {there}/flat does not exist; where it moved, --data-root" in capsys.readouterr().err
    for root in ("new", "new/flat"):
        shutil.copytree(there / "mine", root.replace("/", "-") + "-mine")
        assert adapt.main(["--resume", root.replace("/", "-") + "-mine", "--data-root", root]) == 0
    assert adapt.main(options(ADAPT, init="there/run", data="folder:flat", data_root="new", out="again")) == 0
    assert read_toml(Path("again/config.toml"))["data"] == f"folder:{Path.cwd()}/new/flat"


@pytest.mark.parametrize("command", ["meta_train", "adapt"])
def test_the_command_that_began_a_run_goes_on_wherever_its_data_moved(
    command: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.chdir(there)
    main, field, name, run, words = {
        "meta_train": (meta_train.main, "dataset", "data", "run", options(QUICK, dataset="folder:data", out="run")),
        "adapt": (adapt.main, "data", "flat", "mine", options(ADAPT, init="run", data="folder:flat", out="mine")),
    }[command]
    former = there / name

    def go_on(*more: str) -> str:
        assert main([*words, "--auto-resume", *more]) == 0
        return str(read_toml(Path(run) / "config.toml")[field])

    for place in ("new", "newer"):  # and again from there, by the name that it had at first
        Path(place).mkdir()
        former = former.rename(there / place / name)
        for _ in range(2):
            assert go_on("--data-root", place) == f"folder:{former}"
            assert f"note: {there}/{name} does not exist; the data are read from {former}\n" in capsys.readouterr().err
    assert go_on() == f"folder:{former}"  # the run knows the place
    shutil.copytree(former, f"other/{name}")
    for path, root in ((f"other/{name}", "newer"), (name, "other"), ("else", "newer")):
        assert main([*words, "--auto-resume", f"--{field}", f"folder:{path}", "--data-root", root]) == 2
        assert f"{field}: a resumed run keeps its settings; {run} was started with" in capsys.readouterr().err


def test_what_is_nowhere_is_listed_with_all_places(there: Path, capsys: Text) -> None:
    (there / "data").rename(there / "gone")
    Path("new/empty").mkdir(parents=True)
    assert evaluate.main(["there/run", *BOTH, "--data-root", "new"]) == 2
    here = Path.cwd()
    assert capsys.readouterr().err == (
        f"metaft: error: dataset: folder: {there}/data does not exist, nor does {here}/new/data (from data_root), and "
        f"{here}/new does not hold its class folders\n"
    )
    # A run that begins knows no classes: the root alone is not taken for its data.
    words = options(QUICK, dataset="folder:none", data_root="there/gone")
    assert meta_train.main(words) == 2
    assert f"nor does {there}/gone/none (from data_root)\n" in capsys.readouterr().err


def test_data_that_are_still_there_win_and_that_is_said(there: Path, capsys: Text) -> None:
    shutil.copytree(there / "data", "new/data")
    assert evaluate.main(["there/run", *BOTH, "--data-root", "new"]) == 0
    line = f"note: data_root: {there}/data is there, so {Path.cwd()}/new/data is not read\n"
    assert line in capsys.readouterr().err
    assert evaluate.main(["there/run", *BOTH, "--data-root", "there"]) == 0
    assert "note" not in capsys.readouterr().err


def test_sources_from_python_keep_their_names(there: Path) -> None:
    from metaft.tasks import folder

    pool = folder(Path("there/data"), 8)
    assert pool.name == "folder:there/data"
    config = MetaTrainConfig(**{k: v for k, v in QUICK.items() if k != "image_size"}, out="run")
    assert meta_train.run(config, dataset=pool)["dataset"] == "folder:there/data"
    assert meta_train.resume_run(Path("run"), dataset=pool)["dataset"] == "folder:there/data"
    assert evaluate.run(Path("run"), dataset=pool)["dataset"] == "folder:there/data"


def test_a_working_folder_that_is_gone_is_no_traceback(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("os.getcwd", gone)
    assert paths.absolute("x") == Path("x")
    assert places.shown(f"folder:{in_tmp}") == f"folder:{in_tmp}"
    with pytest.raises(MetaftError, match="x does not exist"):
        load("folder:x")
    assert "x" in to_toml(places.in_full(MetaTrainConfig(dataset="folder:x")))
