"""One class alone is right whatever is learned, so it is refused wherever classes are told apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import scenarios
from helpers import images, options, pool, sinusoid, write_folder

import metaft
from metaft import algorithms, evaluate, meta_train, models
from metaft.algorithms import ALGORITHMS
from metaft.config import EvaluateConfig
from metaft.errors import MetaftError

REFUSED = "ways must be at least 2 where classes are told apart, got 1"


@pytest.mark.parametrize("field", ["ways", "test_ways"])
@pytest.mark.parametrize("name", ["maml", "reptile", "protonet", "baseline"])
def test_a_run_of_one_class_is_refused_before_anything_is_written(name: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(MetaftError, match=f"^{'test_' if field == 'test_ways' else ''}{REFUSED}$"):
        meta_train.run(images(tmp_path / "run", algorithm=name, **{field: 1}), dataset=pool())
    assert not (tmp_path / "run").exists()


def test_the_command_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))
    data = write_folder(tmp_path / "data")
    settings = {"query_shots": 2, "device": "cpu", "dataset": f"folder:{data}", "out": str(tmp_path / "run")}
    assert meta_train.main([*options(settings), "--ways", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"metaft: error: {REFUSED}"


def test_a_data_set_of_the_users_own_is_no_exception(tmp_path: Path) -> None:
    class Own:
        name, loss, shape, split_hash = "own", "cross_entropy", (4,), "0"

        def describe(self) -> dict[str, object]:
            return {}

        def source(self, **sizes: Any) -> Any:
            raise AssertionError("before any task is drawn")

    own: Any = Own()
    with pytest.raises(MetaftError, match=REFUSED):
        meta_train.run(images(tmp_path / "run", model=None, ways=1), dataset=own)


def test_regression_keeps_its_one_output(tmp_path: Path) -> None:
    assert meta_train.run(sinusoid(tmp_path / "run", ways=1))["ways"] == 1


def test_a_run_is_not_tested_on_one_class(tmp_path: Path) -> None:
    for name in ("protonet", "maml"):
        meta_train.run(images(tmp_path / name, algorithm=name, iterations=1, engine="vmap"), dataset=pool())
        with pytest.raises(MetaftError, match=REFUSED):
            evaluate.run(tmp_path / name, EvaluateConfig(ways=1, device="cpu"), dataset=pool())


def test_no_source_gives_episodes_of_one_class() -> None:
    with pytest.raises(MetaftError, match=REFUSED):
        pool().source(ways=1, shots=1, query_shots=1)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"baseline", "baseline++"}))
def test_no_member_trains_on_one_class(name: str) -> None:
    """Baselines train on all classes of the data set, whatever the ways of a task."""
    tasks = scenarios.episodes(tasks=1, ways=1)

    def train() -> None:
        member = algorithms.build(name, scenarios.model(ways=1), {})
        with metaft.engine("threads", threads=1) as engine:
            metaft.meta_gradient(engine, member, *member.init(0), tasks)

    with pytest.raises(MetaftError, match=REFUSED):
        train()


@dataclasses.dataclass(frozen=True)
class OneClass:
    ways: int = 1


@pytest.mark.parametrize("name", ["protonet", "baseline"])
def test_no_member_is_tested_on_one_class(name: str) -> None:
    source: Any = OneClass()
    member = algorithms.build(name, models.build("conv4", ways=3, shape=(1, 16, 16), width=4, seed=0), {})
    meta, state = member.init(0)
    with metaft.engine("threads", threads=1) as engine, pytest.raises(MetaftError, match=REFUSED):
        metaft.meta_test(engine, member, meta, state, source, split="test", seed=0, episodes=1, steps=1)
