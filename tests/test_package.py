"""The package as a guest in someone's process: it takes nothing, leaves nothing and answers `--help` at once."""

from __future__ import annotations

import ast
import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import images, pool, sinusoid

import metaft
from metaft import evaluate, meta_train
from metaft.__main__ import COMMANDS
from metaft.config import read_toml
from metaft.runs import report

ROOT = Path(__file__).parents[1]


def in_new_process(code: str, folder: Path) -> str:
    """Run it with warnings as errors in an empty folder and home; returns stdout."""
    environment = {
        **os.environ,
        "HOME": str(folder / "home"),
        "METAFT_CACHE": str(folder / "home" / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


HEAVY = "{'torch', 'numpy', 'matplotlib', 'torchvision', 'PIL', 'tqdm', 'safetensors'}"


def test_import_is_light_and_has_no_effect(tmp_path: Path):
    out = in_new_process(
        "import os, signal, sys, threading\n"
        "def look(): return (dict(os.environ), signal.getsignal(2), threading.active_count(), list(sys.path))\n"
        "before = look()\n"
        "import metaft\n"
        "assert look() == before\n"
        f"print(sorted({HEAVY} & set(sys.modules)), metaft.__version__)",
        tmp_path,
    )
    assert out == f"[] {metaft.__version__}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["meta_train", "evaluate"])
def test_help_and_bad_options_do_not_wait_for_torch(tmp_path: Path, command: str):
    out = in_new_process(
        f"import sys, metaft.{command} as command, contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as error:\n"
        "    assert command.main(['--help']) == 0\n"
        "    assert command.main(['run', '--nonsense']) == 2\n"
        "assert '--shots' in said.getvalue() and '--nonsense' in error.getvalue()\n"
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))",
        tmp_path,
    )
    assert out == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_a_meta_step_does_not_wait_for_torchs_compiler(tmp_path: Path):
    """Which torch.optim's classes import, for two seconds, nor for sympy, which Module.to_empty does."""
    out = in_new_process(
        "import sys, torch\n"
        "from metaft import models\n"
        "model = models.build('conv4', ways=2, shape=(1, 16, 16), width=4, seed=0)\n"
        "print(list(model.apply(model.params, torch.zeros(3, 1, 16, 16), None).shape))\n"
        f"sys.path.append({str(ROOT / 'tests')!r})\n"
        "from helpers import settled\n"
        "from metaft.outer.update import Outer\n"
        "for kind in ('adam', 'sgd'):\n"
        "    outer = Outer(settled(outer_optimizer=kind), {'a': torch.ones(2)})\n"
        "    outer.step({'a': torch.ones(2)}, 0)\n"
        "    print({'torch._dynamo', 'sympy'} & {*sys.modules}, bool((outer.meta['a'] < 1).all()))",
        tmp_path,
    )
    assert out == "[3, 2]\n" + "set() True\n" * 2


def test_the_layers_of_a_page_do_not_wait_for_it_either(tmp_path: Path):
    """A dispatch mode imports it, unless it says that it need not."""
    out = in_new_process(
        "import sys, torch\n"
        "from metaft.views.layers import layers_of\n"
        "print([layer.flops for layer in layers_of(torch.nn.Linear(3, 2), torch.zeros(1, 3))])\n"
        "print({'torch._dynamo', 'sympy'} & {*sys.modules})",
        tmp_path,
    )
    assert out == "[12]\nset()\n"


def test_every_public_name_is_there():
    for name in metaft.__all__:
        assert getattr(metaft, name) is not None, name
    assert dir(metaft) == sorted(metaft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = metaft.nonsense  # type: ignore[attr-defined]


def test_names_for_readers_and_for_type_checkers_are_the_same():
    source = (ROOT / "metaft" / "__init__.py").read_text(encoding="utf-8")
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
    shown = {alias.name for node in imports for alias in node.names}
    assert shown | {"__version__"} == set(metaft.__all__)


def test_the_commands_exist():
    for name in COMMANDS:
        assert callable(importlib.import_module(f"metaft.{name}").main)


def test_the_console_script_is_the_module():
    project = read_toml(ROOT / "pyproject.toml")["project"]
    assert project["scripts"] == {"metaft": "metaft.__main__:main"}
    done = subprocess.run([sys.executable, "-m", "metaft", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{metaft.__version__}\n"


@pytest.mark.parametrize("kind", ["curves", "pictures"])
@pytest.mark.slow
def test_a_whole_run_leaves_the_global_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """Random generators, threads, grad mode, default type: as the user's process had them; and none of it matters."""
    if kind == "pictures":
        monkeypatch.setattr(report, "draw_pictures", lambda *_: [])

    def state() -> tuple[object, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return (
            *(repr(part) for part in numpy_state),
            random.getstate(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            os.getcwd(),
        )

    for seed in (3, 4):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        torch.manual_seed(seed)
        before = state()
        out = tmp_path / str(seed)
        if kind == "curves":
            meta_train.run(sinusoid(out))
            evaluate.run(out)
        else:
            meta_train.run(images(out, threads=2), dataset=pool())
            evaluate.run(out, dataset=pool())
        assert state() == before
    a, b = ((tmp_path / seed / "checkpoints/last.safetensors").read_bytes() for seed in ("3", "4"))
    assert a == b


def test_opening_a_classifier_reaches_what_a_classifier_needs_and_no_more(tmp_path: Path):
    """No engine, member, data set or command: a program that labels pictures starts fast, and breaks by little."""
    code = "import metaft, sys; metaft.load; print(*(m for m in sys.modules if m.startswith('metaft')))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    reached = said.stdout.split()
    assert "metaft.finetune.classifier" in reached
    apart = [name for name in reached if not name.startswith("metaft.models.fused.")]  # one operation in six files
    assert len(apart) <= 42, reached  # each of our architectures is one of them
    parts = {name.split(".")[1] for name in reached if "." in name}
    assert parts.isdisjoint({"algorithms", "engines", "outer", "dist", "tasks", "plots", "config", "cli"})


def imports_of(file: Path, package: Path) -> set[str]:
    """Modules of metaft that a file imports when it is imported itself."""
    tree, names = ast.parse(file.read_text(encoding="utf-8")), set()
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.If, ast.Try)):
            todo += node.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metaft"):
            base = str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}".replace(".", "/")
                is_module = any((package.parent / f"{inner}{end}").exists() for end in (".py", "/__init__.py"))
                names.add(f"{base}.{alias.name}" if is_module else base)
    return names


def test_no_import_goes_round_in_a_circle():
    package = Path(metaft.__file__).parent
    graph = {}
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports_of(file, package) - {"metaft"}
    assert len(graph) > 100
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done | {name}}:
        done |= ready
    assert graph.keys() == done, {name: needs - done for name, needs in graph.items() if name not in done}


def test_every_folder_of_modules_is_a_package_that_git_keeps():
    """A folder without `__init__.py` works in a checkout, and is in no wheel; one that git ignores loses new files."""
    package = Path(metaft.__file__).parent
    folders = {file.parent for file in package.rglob("*.py")}
    assert len(folders) > 10
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    rules = (package.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"{folder.name}/" for folder in folders}.isdisjoint(rules)
