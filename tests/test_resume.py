"""The contract's row "resume": every member goes on from a checkpoint, in another process, with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import scenarios
import torch
from helpers import settled
from test_algorithms import TABLE, Row

from metaft import algorithms, engines
from metaft.algorithms import ALGORITHMS
from metaft.errors import Interrupted
from metaft.runs.assemble import Parts, fill
from metaft.runs.folder import RunFolder
from metaft.runs.snapshot import Snapshot, begin, load_snapshot, tensors_of
from metaft.runs.training import train

pytestmark = pytest.mark.slow

STEPS, FIRST = 4, 2

VARIANTS = [
    # In the table they anneal over a run of 1,500 steps.
    Row(
        "maml++-annealed-over-these-steps",
        lambda m, norm: algorithms.maml_plus_plus(
            m, inner_steps=2, norm=norm, multi_step=0.75, order_annealing=0.5, iterations=STEPS
        ),
    ),
    Row(
        "maml++-annealed-statistics",
        lambda m, norm: algorithms.maml_plus_plus(
            m, inner_steps=2, norm=norm, multi_step=0.75, step_statistics=True, iterations=STEPS
        ),
    ),
    Row(
        "reptile-kept-momentum",
        lambda m, norm: algorithms.reptile(
            m, inner_lr=0.01, inner_steps=3, keep_moments=True, norm=norm, inner_optimizer="momentum"
        ),
    ),
    # So weak a pull that some tasks have negative curvature, which is in the unfinished row of metrics.jsonl.
    Row("imaml-undamped", lambda m, norm: algorithms.imaml(m, inner_steps=2, strength=0.01, damping=0.0, norm=norm)),
]
WITH_STATE = ("maml-dropout", "maml++-statistics", "reptile-kept-moments", "toy-multi-step", "toy-state")
ROWS = {row.name: row for row in TABLE if row.name in {*ALGORITHMS, *WITH_STATE}} | {row.name: row for row in VARIANTS}
POOL = scenarios.noise_pool()


def parts_of(name: str) -> Parts:
    """All of a run, made anew; the rate of its outer loop falls over its steps."""
    model = scenarios.model(width=2, dtype=torch.float32, dropout=ROWS[name].dropout)
    algorithm = ROWS[name].build(model, "inductive")
    reptile = algorithm.name == "reptile"
    config = settled(
        ways=3, shots=2, query_shots=2, meta_batch=2, batch_norm="inductive", iterations=STEPS, seed=3,
        outer_optimizer="sgd" if reptile else "adam", outer_lr=1.0 if reptile else 0.01, outer_schedule="cosine",
        log_every=3, eval_every=STEPS, eval_episodes=2, test_inner_steps=2, checkpoint_every=100,
    )  # fmt: skip
    return Parts(config, POOL, model, algorithm, "cpu")


def trained(folder: Path, name: str, *, stop_after: int = STEPS) -> Snapshot:
    """Train from the folder's checkpoint, where it has one, to the end or to a stop after some steps."""
    parts = parts_of(name)
    config, algorithm = parts.config, parts.algorithm
    run = RunFolder.open(folder) if folder.exists() else RunFolder.create(folder, "")
    start = fill(parts, load_snapshot(run.last)) if run.last.exists() else begin(algorithm, config.compute.seed, {})
    source = POOL.source(ways=3, shots=2, query_shots=2)
    taken = start.position.step

    def should_stop() -> None:
        nonlocal taken
        taken += 1
        if taken == stop_after < STEPS:
            raise Interrupted("stopped", 15)

    with engines.engine("threads", threads=1) as engine:
        return train(run, config, algorithm, engine, source, source, start, should_stop=should_stop)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, one per member, that were stopped in this process and went on in another."""
    base = tmp_path_factory.mktemp("resumed")
    for name in ROWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Interrupted):
                trained(base / name, name, stop_after=FIRST)
    # Another hash seed: the order of a set must not matter.
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, __file__, str(base)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.filterwarnings("ignore:imaml. I . H:metaft.MetaftWarning")
@pytest.mark.parametrize("name", list(ROWS))
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    name: str, resumed: Path, tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", name)
    halfway, ended = (load_snapshot(getattr(RunFolder(resumed / name), which)) for which in ("previous", "last"))
    assert halfway.position.step == FIRST and len(halfway.position.window) == FIRST
    assert ended.position == whole.position
    assert same_bits(tensors_of(ended), tensors_of(whole))
    assert not same_bits(ended.meta, halfway.meta)
    assert not halfway.state or not same_bits(ended.state, halfway.state)
    rows = [(folder / "metrics.jsonl").read_bytes() for folder in (resumed / name, tmp_path / "whole")]
    assert rows[0] == rows[1]


def test_every_published_member_is_resumed() -> None:
    assert set(ALGORITHMS) <= set(ROWS)


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


if __name__ == "__main__":
    torch.manual_seed(99)
    torch.set_num_threads(1)
    for run_name in ROWS:
        trained(Path(sys.argv[1]) / run_name, run_name)
