"""Members of the user's own: a run keeps the plugin that registers its algorithm, so that every command can open it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ADAPT, IMAGES, SINUSOID, inner_words, one_line, options, sinusoid, words, write_folder, write_target

from metaft import adapt, algorithms, evaluate, meta_train, plugin
from metaft.config import read_toml
from metaft.errors import MetaftError

Text = pytest.CaptureFixture[str]
Forget = Callable[[], None]

ROOT = Path(__file__).parents[1]

WITHOUT_PICTURES = """
import sys
import metaft.__main__, metaft.finetune.report, metaft.runs.report
metaft.runs.report.draw_pictures = metaft.finetune.report.draw_pictures = lambda *_: []
sys.exit(metaft.__main__.main())
"""

MINE = """
import functools
from metaft.algorithms import ALGORITHMS, maml
ALGORITHMS["mine"] = functools.partial(maml, first_order=True)
"""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])


@pytest.fixture
def forget(own_algorithms: Forget) -> Forget:
    return own_algorithms


@pytest.fixture
def mine(in_tmp: Path, forget: Forget) -> Path:
    """A plugin in the folder that is worked in."""
    (in_tmp / "mine.py").write_text(MINE)
    return in_tmp / "mine.py"


def trained(*changes: str) -> Path:
    assert meta_train.main([*options(SINUSOID, algorithm="mine", out="r"), *changes]) == 0
    return Path("r").absolute()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("else").mkdir()
    monkeypatch.chdir("else")


@pytest.mark.slow
def test_every_command_opens_the_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The example as a plugin, on workers that are forked."""
    squares, target = write_folder(tmp_path / "squares"), write_target(tmp_path / "target", {"train": 3, "test": 2})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    shutil.copy(ROOT / "examples" / "new_algorithm.py", folders[0] / "own.py")

    def run(folder: Path, *argv: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error", "-c", WITHOUT_PICTURES, *argv]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    settings = {**IMAGES, "dataset": f"folder:{squares}", "image_size": 8, "iterations": 2, "engine": "processes"}
    named = ("--plugin", "own.py", "--algorithm", "sign-maml", "--out", "r")
    run(folders[0], "meta_train", *options(settings, threads=1), *named)
    path = folders[0] / "r"
    assert read_toml(path / "config.toml")["plugin"] == str(folders[0] / "own.py")
    run(folders[1], "evaluate", str(path), "--shots", "2", "--out", "e.json")
    assert json.loads((folders[1] / "e.json").read_text())["algorithm"] == "sign-maml"
    run(folders[1], "meta_train", "--resume", str(path), "--iterations", "3")
    assert json.loads((path / "result.json").read_text())["iterations"] == 3
    run(folders[1], "adapt", *inner_words(path, target, Path("a")))
    assert json.loads((folders[1] / "a" / "result.json").read_text())["init_about"]["algorithm"] == "sign-maml"


def test_a_file_is_kept_in_full_and_a_module_by_name(
    mine: Path, forget: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(mine, "own_module.py")
    monkeypatch.syspath_prepend(mine.parent)
    path = trained("--plugin", "./mine.py")
    assert read_toml(path / "config.toml")["plugin"] == str(mine)
    other = trained("--plugin", "own_module", "--out", "s").with_name("s")
    assert read_toml(other / "config.toml")["plugin"] == "own_module"
    elsewhere(monkeypatch)
    for run in (path, other):
        forget()
        sys.modules.pop("own_module", None)
        assert evaluate.main([str(run), "--episodes", "2"]) == 0
    del sys.modules["own_module"]


def test_a_plugin_is_imported_once_whatever_it_is_called(
    mine: Path, forget: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.write_text(MINE + "with open('count', 'a') as file: file.write('x')\n")
    monkeypatch.setenv("HOME", str(mine.parent))
    for name in (str(mine), "mine.py", "./else/../mine.py", "~/mine.py"):
        assert plugin.load(name, "mine") == str(mine)
    assert Path("count").read_text() == "x"
    forget()
    plugin.load("mine.py", "mine")
    assert Path("count").read_text() == "xx"


def test_what_is_defined_in_a_plugin_can_be_sent_to_other_processes(mine: Path) -> None:
    """An exception of its own, from a worker to its parent."""
    import pickle

    mine.write_text(MINE + "class Mine(Exception): pass\nALGORITHMS['mine'].error = Mine('x')\n")
    plugin.load("mine.py", "mine")
    error = algorithms.ALGORITHMS["mine"].error  # type: ignore[attr-defined]
    assert type(pickle.loads(pickle.dumps(error))) is type(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = (", r"SyntaxError: .*mine\.py, line 1\)"),
        ("import none_such", "ModuleNotFoundError: No module named 'none_such'"),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise AssertionError", "AssertionError"),
        ("raise ValueError('x' * 300 + ', line 7')", "ValueError: x{300}, line 7"),  # the end says where
    ],
)
def test_a_plugin_that_raises_is_named_with_what_it_raised(
    text: str, said: str, mine: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(mine.parent)
    Path("own_raises.py").write_text(text)
    mine.write_text(text)
    for name, named in (("mine.py", str(mine)), ("own_raises", "own_raises")):
        assert meta_train.main([*options(SINUSOID, algorithm="mine", out="r"), "--plugin", name]) == 2
        line = one_line(capsys)
        assert re.search(rf"error: plugin: {named} raised {said.replace('mine', Path(name).stem)}$", line), line
    assert not Path("r").exists()
    mine.write_text(MINE + "# mended\n")
    assert plugin.load("mine.py", "mine") == str(mine), "it is tried again"


def test_not_enough_memory_and_ctrl_c_are_not_the_plugins_fault(mine: Path) -> None:
    for error in (MemoryError, KeyboardInterrupt):
        mine.write_text(f"raise {error.__name__}")
        with pytest.raises(error):
            plugin.load("mine.py", "mine")


def test_an_algorithm_that_the_plugin_does_not_register(mine: Path, capsys: Text) -> None:
    assert meta_train.main([*options(SINUSOID, algorithm="min", out="r"), "--plugin", "mine.py"]) == 2
    one_line(capsys, "algorithm: no 'min'", "did you mean 'mine'", f"(plugin {mine} does not register it)")


def test_a_plugin_that_moved_is_named_again(mine: Path, forget: Forget, capsys: Text) -> None:
    path = trained("--plugin", "mine.py")
    moved = mine.rename(mine.with_name("moved.py"))
    for command, *argv in ((evaluate, str(path), "--episodes", "2"), (meta_train, "--resume", str(path))):
        forget()
        capsys.readouterr()
        assert command.main(argv) == 2
        one_line(capsys, f"plugin: cannot read {mine}")
        assert command.main([*argv, "--plugin", "moved.py"]) == 0
    assert read_toml(path / "config.toml")["plugin"] == str(moved)
    forget()
    assert evaluate.main([str(path), "--episodes", "2"]) == 0


@pytest.mark.slow
def test_adapting_needs_the_plugin_for_the_inner_loop_alone(mine: Path, forget: Forget, capsys: Text) -> None:
    """Fine-tuning takes the parameters alone, so it runs no code of the run, and none of those it looks through."""
    squares, target = write_folder(mine.with_name("squares")), write_target(mine.with_name("target"), {".": 3})
    settings = {**IMAGES, "dataset": f"folder:{squares}", "image_size": 8, "algorithm": "mine", "plugin": "mine.py"}
    assert meta_train.main(options(settings, out="runs/r")) == 0
    forget()
    assert adapt.main(inner_words(Path("runs/r"), target, Path("a"))) == 0
    assert read_toml(Path("a/config.toml"))["plugin"] == str(mine)
    forget()
    assert adapt.main(["--resume", "a", "--seeds", "2"]) == 0
    mine.rename("moved.py")
    forget()
    capsys.readouterr()
    for argv in (["--resume", "a", "--seeds", "3"], inner_words(Path("runs/r"), target, Path("b"))):
        assert adapt.main(argv) == 2
        one_line(capsys, f"plugin: cannot read {mine}")
    assert adapt.main(["--resume", "a", "--seeds", "3", "--plugin", "moved.py"]) == 0
    forget()
    Path("moved.py").unlink()
    assert adapt.main(words(Path("runs/r"), target, Path("c"), epochs=1)) == 0
    assert adapt.main(options({**ADAPT, "data": f"folder:{target}", "out": "d"})) == 0, "the newest run is looked for"


def test_an_algorithm_that_was_registered_in_python_alone(mine: Path, forget: Forget, capsys: Text) -> None:
    exec(MINE, {})
    meta_train.run(sinusoid(Path("r"), algorithm="mine"))
    (line,) = re.findall(r"^next: +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert line.endswith(" --plugin YOUR_FILE.py  # registers 'mine', which no process but this one knows")
    forget()
    for command, *argv in ((evaluate, "r", "--episodes", "2"), (meta_train, "--resume", "r")):
        assert command.main(argv) == 2
        one_line(capsys, "algorithm: no 'mine'", "not metaft's own", "register it before", "--plugin")
    assert evaluate.main(["r", "--episodes", "2", "--plugin", "mine.py"]) == 0
    assert meta_train.main(["--resume", "r", "--plugin", "mine.py"]) == 0
    assert "YOUR_FILE" not in capsys.readouterr().out
    forget()
    assert evaluate.main(["r", "--episodes", "2"]) == 0, "the run has it from now on"


@pytest.mark.usefixtures("forget")
def test_a_member_of_metafts_that_was_replaced_is_not_ours() -> None:
    assert all(algorithms.is_ours(name) for name in algorithms.ALGORITHMS)
    algorithms.ALGORITHMS["maml"] = algorithms.anil
    assert not algorithms.is_ours("maml")


def test_names_that_are_neither_files_nor_modules() -> None:
    for name in ("", "a-b", "mine/own", "a..b", ".a", "x.py/"):
        with pytest.raises(MetaftError, match="plugin: name a file"):
            plugin.load(name, "maml")
    with pytest.raises(MetaftError, match="plugin: cannot read"):
        plugin.load("a\0b.py", "maml")


WITHOUT_RATE = {option: value for option, value in SINUSOID.items() if option != "inner_lr"}

WITH_STEPS = """
import dataclasses
from beside import algorithms
def mine(model, *, loss, norm, inner_steps: int = 2):
    return algorithms.maml(model, loss=loss, norm=norm, inner_lr=0.01, inner_steps=inner_steps)
algorithms.ALGORITHMS["mine"] = mine
"""


def test_a_member_with_steps_but_no_rate_and_a_file_beside_it(
    in_tmp: Path, forget: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is opened from elsewhere by the settings that it wrote down itself, and the file finds its neighbour."""
    (in_tmp / "pl").mkdir()
    (in_tmp / "pl/beside.py").write_text("from metaft import algorithms")
    (in_tmp / "pl/mine.py").write_text(WITH_STEPS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert meta_train.main(options(WITHOUT_RATE, algorithm="mine", plugin="pl/mine.py", out="r")) == 0
    run = Path("r").absolute()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("pl")])
    monkeypatch.delitem(sys.modules, "beside")
    forget()
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    assert evaluate.main([str(run), "--episodes", "2", "--inner-steps", "3"]) == 0
    assert meta_train.main(["--resume", str(run)]) == 0
    monkeypatch.delitem(sys.modules, "beside")


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("model, *, loss", "must be a function (model, *, loss, norm, ...)"),
        ("model, **settings", "must be a function (model, *, loss, norm, ...)"),
        ("model, *, loss, norm, inner_lr, depth", "in which what follows has defaults; inner_lr, depth has none"),
        ("model, *, loss, norm, inner_steps=1", "must return an Algorithm, not NoneType"),
    ],
)
def test_what_cannot_be_a_member_says_why(
    signature: str, message: str, in_tmp: Path, forget: Forget, capsys: Text
) -> None:
    text = f"from metaft.algorithms import ALGORITHMS\ndef mine({signature}): ...\nALGORITHMS['mine'] = mine"
    (in_tmp / "mine.py").write_text(text)
    assert meta_train.main(options(WITHOUT_RATE, algorithm="mine", plugin="mine.py", out="r")) == 2
    assert "does not register" not in one_line(capsys, "'mine'", message)
    assert not Path("r").exists()


def test_threads_do_not_meet_a_plugin_that_is_half_imported(in_tmp: Path, forget: Forget) -> None:
    (in_tmp / "mine.py").write_text("import time\ntime.sleep(0.2)\n" + MINE)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: plugin.load(Path("mine.py"), "mine"), range(4)))
    assert found == [str(in_tmp / "mine.py")] * 4
