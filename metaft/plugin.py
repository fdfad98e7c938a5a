"""Code of the user's own that a run needs: a file or module that registers members of the family when it is imported.

    from metaft.algorithms import ALGORITHMS
    ALGORITHMS["mine"] = mine

A run keeps the name of its plugin in its settings, and whatever trains, tests or adapts by the run's algorithm later
imports it again. So to open a run folder in this way is to run the code that it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator

from metaft import algorithms
from metaft.errors import MetaftError, class_and_words
from metaft.spec import name_of
from metaft.support.foreign import ran_out
from metaft.support.paths import absolute

_one_at_a_time = threading.RLock()


def load(plugin: str | os.PathLike[str] | None, algorithm: str) -> str | None:
    """Import a plugin, if there is one, once per process; returns the name that holds anywhere: a file's in full.

    What lies beside a file can be imported by it, as by a script.

    Raises MetaftError for a plugin that is not there or raises, and where `algorithm` (a name, perhaps with
    settings behind a colon) is not known even so.
    """
    if plugin is not None:
        plugin = os.fspath(plugin)
        with _one_at_a_time:
            plugin = _of_file(plugin) if plugin.endswith(".py") else _of_module(plugin)
    algorithm = name_of(algorithm, algorithms.ALGORITHMS)
    try:
        algorithms.hyper_parameters(algorithm)
    except MetaftError as error:
        if algorithm in algorithms.ALGORITHMS:  # it is there, and cannot be a member
            raise
        why = f"plugin {plugin} does not register it"
        if plugin is None:
            why = "not metaft's own; if it is yours, register it before, or name the file that does so with --plugin"
        raise MetaftError(f"{error} ({why})") from None
    return plugin


def _of_file(plugin: str) -> str:
    path = str(absolute(plugin))
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise MetaftError(f"plugin: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a letter that no path can have
        raise MetaftError(f"plugin: cannot read {path}: {error}") from None
    name = f"metaft_plugin_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            with _blamed(path):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return path


def _of_module(plugin: str) -> str:
    if not all(part.isidentifier() for part in plugin.split(".")):
        raise MetaftError(f"plugin: name a file (PATH.py) or a module, not {plugin!r}")
    try:
        with _blamed(plugin):
            importlib.import_module(plugin)
    except MetaftError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{plugin}.".startswith(f"{cause.name}."):
            raise MetaftError(
                f"plugin: no module {plugin!r} can be found where Python looks (PYTHONPATH); a file is named as PATH.py"
            ) from None
        raise
    return plugin


@contextlib.contextmanager
def _blamed(plugin: str) -> Iterator[None]:
    """Inside, what is raised is the plugin's doing, and becomes one line; but Ctrl-C and a full memory are not."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception) and ran_out(error):
            raise
        raise MetaftError(f"plugin: {plugin} raised {class_and_words(error, at_most=None)}") from error
