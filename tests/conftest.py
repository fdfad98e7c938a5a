"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# One intra-op thread, here and in every process that a test starts, unless the caller wants another number: what the
# tests compute is so small that a second thread only waits, and it waits by spinning, on the core of the other pytest
# worker. Measured: an eighth of the CPU time in tests/test_finetune.py. What several threads do is tested where they
# are asked for. This has to stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# --doctest-modules would collect them as tests too, and of two files of one name pytest can import only one so.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' cache of rendered images out of the user's, unless METAFT_CACHE names one already."""
    with pytest.MonkeyPatch.context() as patch:
        if "METAFT_CACHE" not in os.environ:
            patch.setenv("METAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pages() -> Iterator[None]:
    """Runs write no page at their end, which takes longer than they do; test_look.py has those that do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.look.at_end", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def _same_values_each_time() -> None:
    """Values that a test leaves to torch's own generator do not hang on which tests ran before it in its worker. By a
    number that nothing else begins with, so that what seeds the generator and forgets to put it back is seen."""
    import torch

    torch.manual_seed(748_219_603)


@pytest.fixture(autouse=True)
def _no_compile_pool() -> Iterator[None]:
    """End the threads that torch.compile keeps for its next call: beside them no test that follows could fork."""
    yield
    compiler = sys.modules.get("torch._inductor.async_compile")
    if compiler is not None and compiler.AsyncCompile.pool.cache_info().currsize:
        compiler.AsyncCompile.pool().shutdown()
        compiler.AsyncCompile.pool.cache_clear()


@pytest.fixture
def own_algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What a test or its plugins register ends with it, or where it calls this, as if another process began."""
    from metaft import algorithms

    ours = algorithms.ALGORITHMS

    def forget() -> None:
        monkeypatch.setattr(algorithms, "ALGORITHMS", dict(ours))
        for name in [name for name in sys.modules if name.startswith("metaft_plugin_")]:
            del sys.modules[name]

    forget()
    yield forget
    forget()


@pytest.fixture
def float64_runs() -> Iterator[None]:
    """What `helpers.in_float64` says, for the whole test."""
    from helpers import in_float64

    with in_float64():
        yield


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
