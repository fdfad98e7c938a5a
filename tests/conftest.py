"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' cache of rendered images out of the user's, unless METAFT_CACHE names one already."""
    with pytest.MonkeyPatch.context() as patch:
        import os

        if "METAFT_CACHE" not in os.environ:
            patch.setenv("METAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
