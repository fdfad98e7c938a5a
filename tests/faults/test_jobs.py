"""Jobs of real processes: the numbers of one process, and one message and the same bytes when some of them are lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import rank_gradients
import scenarios
import torch
from helpers import IMAGES, SAME_RUN, SINUSOID, options, rounded_alike
from jobs import Job, settled
from victims import DONE, FULL, Plan, completed, kill_tree, one_error, same_tree, tree

from metaft.dist.ranks import ALONE
from metaft.runs.folder import read_rows
from metaft.runs.snapshot import load_snapshot

STEPS = 12
RUN = options(SINUSOID, iterations=STEPS, checkpoint_every=3, eval_every=5)
"""Three tasks in each step, on two ranks."""

JOB = Path(__file__).parents[1] / "rank_job.py"
LAUNCH = "torchrun --standalone --nproc-per-node 2"


def go_on(out: Path, step: int | None = None) -> str:
    """What rank 0 says, who knows the step, or another one."""
    last = f"{out / 'checkpoints/last.safetensors'}{'' if step is None else f' of step {step}'}"
    return f"the last checkpoint is {last}, go on with: {LAUNCH} -m metaft.meta_train --resume {out}"


def lost(rank: int, out: Path, step: int | None = None) -> str:
    return f"metaft: error: rank {rank} of 2 does not answer, it died or hangs; {go_on(out, step)}"


def stopped(out: Path) -> str:
    hint = f"go on with: {LAUNCH} -m metaft.meta_train --resume {out}"
    return f"metaft: stopped; a checkpoint is in {out}/checkpoints, {hint}"


def job(out: Path, *attempts: Mapping[int, Plan], **how: Any) -> Job:
    return Job("meta_train", [*RUN, "--out", str(out)], *attempts, **how)


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "conv4"])
def test_ranks_that_add_up_through_gloo_give_the_meta_gradient_of_one_process(model: str, tmp_path: Path) -> None:
    """In float64; five tasks on two and on three ranks."""
    members = [name for name in rank_gradients.MEMBERS if model == "mlp" or name in ("maml", "protonet")]
    jobs = []
    for count in (2, 3):
        (tmp_path / str(count)).mkdir()
        jobs.append(Job("rank_gradients", [str(tmp_path / str(count)), model, *members], count=count))
    settled(*jobs)
    for count, each in zip((2, 3), jobs, strict=True):
        assert each.statuses() == [0] * count, each.said()
        found = [torch.load(tmp_path / f"{count}/{rank}.pt") for rank in range(count)]
        for member in members:
            expected = rank_gradients.meta_gradient(member, torch.float64, ALONE, model)
            assert scenarios.relative_error(found[0][member]["grads"], expected.grads) < 1e-12
            if expected.state:
                assert scenarios.relative_error(found[0][member]["state"], expected.state) < 1e-12
            assert found[0][member]["metrics"] == pytest.approx(expected.metrics, rel=1e-12)
            for other in found[1:]:
                for part in ("grads", "state"):
                    mine, theirs = (each[member][part] for each in (found[0], other))
                    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "ranks would drift apart"


@pytest.mark.slow
def test_a_job_gives_the_run_of_one_process_and_the_same_test_episodes(squares: Path, tmp_path: Path) -> None:
    """Three tasks of images on two ranks, with a worker process each: other chunks, hence in float64."""
    images = {**IMAGES, "dataset": f"folder:{squares}", "image_size": 8, "meta_batch": 3, "threads": 1}
    argv = ["meta_train", *options(images, engine="processes")]
    one, two = tmp_path / "one", tmp_path / "two"
    both = Job("wide", [*argv, "--out", str(two)])
    completed("wide", [*argv, "--out", str(one)])
    settled(both)
    assert both.statuses() == [0, 0], both.said()
    assert both.said().count("result:") == 1
    results = [json.loads((path / "result.json").read_text()) for path in (one, two)]
    assert [result["engine"] for result in results] == ["processes"] * 2
    assert [result["ranks"] for result in results] == [1, 2]
    assert rounded_alike(results[1]["test"], results[0]["test"])
    rows = [read_rows(path / "metrics.jsonl") for path in (one, two)]
    assert rounded_alike(rows[1], rows[0])
    last, expected = (load_snapshot(path / "checkpoints/last.safetensors").meta for path in (two, one))
    assert {v.dtype for v in last.values()} == {torch.float64}
    assert scenarios.relative_error(last, expected) < SAME_RUN

    ask = ["evaluate", str(two), "--episodes", "7", "--device", "cpu"]
    both = Job("wide", [*ask, "--out", str(tmp_path / "b")])
    completed("wide", [*ask, "--out", str(tmp_path / "a")])
    settled(both)
    assert both.statuses() == [0, 0], both.said()
    figures = [json.loads((tmp_path / name).read_text())["test"] for name in "ab"]
    assert figures[0] == figures[1], "one task at a time, in the same process or not"


# ---- ranks that are lost ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What a job leaves that nothing befell, and the moments of its rank 0."""
    out = tmp_path_factory.mktemp("jobs") / "whole"
    alone = job(out)
    settled(alone)
    assert alone.statuses() == [0, 0], alone.said()
    return tree(out), alone.ranks[0].moments


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A job under torchrun, which does its part while other jobs here wait for each other."""
    folder = tmp_path_factory.mktemp("torchrun")
    misfortunes = ["1", "4", "kill", "0", "7", "kill", "1", "10", "rest"]
    path = os.pathsep.join([str(JOB.parent.parent), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = subprocess.Popen(
        [sys.executable, *launch, str(JOB), "meta_train", *misfortunes, "--", *RUN, "--out", str(folder / "r")],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield folder, process
    if process.poll() is None:
        kill_tree(process.pid)
    process.communicate()


@pytest.mark.slow
@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("group", range(6 if FULL else 1))
def test_a_job_that_is_killed_twice_ends_with_the_same_bytes(
    group: int, whole: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """Rank 0 while it writes a checkpoint or at any moment of what it does to the disk, rank 1 before any step; started
    again after each, as with --max-restarts 2. Three jobs run at the same time."""
    left, moments = whole
    rng = random.Random(group)
    writes = [n for n, name in enumerate(moments, 1) if name.startswith("write") and ".safetensors" in name]
    early = writes[: len(writes) // 2]  # so that enough is left to do for the second misfortune
    assert len(early) >= 3
    assert len(moments) > 60
    plans = [
        ({0: Plan(kill_at=rng.choice(early))}, {1: Plan(at_step=(STEPS - 1, "kill"))}),
        ({1: Plan(at_step=(rng.randrange(STEPS - 3), "kill"))}, {0: Plan(kill_at=rng.randint(1, 20))}),
        ({0: Plan(kill_at=rng.randint(1, len(moments) // 3))}, {0: Plan(kill_at=rng.randint(20, len(moments) // 3))}),
    ]
    jobs = [job(tmp_path / str(number), *each, {}) for number, each in enumerate(plans)]
    settled(*jobs)
    for number, (each, plan) in enumerate(zip(jobs, plans, strict=True)):
        out = tmp_path / str(number)
        assert each.statuses() == [0, 0], (plan, each.said())
        for attempt, misfortune in enumerate(plan):
            [(dead, befell)] = misfortune.items()
            words = lost(dead, out, befell.at_step[0] if befell.at_step else None)
            assert each.statuses(attempt)[dead] == -signal.SIGKILL, (plan, each.said(attempt))
            assert each.statuses(attempt)[1 - dead] == 1
            [line] = each.lines(attempt)
            # Before it has made the run folder, which the third job may not have, no checkpoint in it is named.
            assert line == words or ((number, attempt) == (2, 0) and words.startswith(f"{line}; "))
            DONE["kills of ranks"] += 1
        same_tree(tree(out), left)


@pytest.mark.slow
@pytest.mark.usefixtures("started")
def test_a_rank_that_hangs_or_fails_ends_the_job_with_one_message(tmp_path: Path) -> None:
    """Four jobs at the same time. A bug keeps its traceback, beside which the other rank says how to go on."""
    what = ["hang", "error", "bug", "kill"]
    limits = {"hang": 8}
    jobs = {
        name: job(tmp_path / name, {n % 2: Plan(at_step=(4, name))}, timeout=limits.get(name, 60))
        for n, name in enumerate(what)
    }
    began = time.monotonic()
    settled(*jobs.values())
    assert time.monotonic() - began < 60
    for name, each in jobs.items():
        out = tmp_path / name
        print(each.said())
        assert each.statuses() == {"kill": [1, -signal.SIGKILL], "error": [1, 2]}.get(name, [1, 1])
        reason = f"metaft: error: rank 1: data: the disk is gone; {go_on(out, 4)}"
        assert each.lines() == [
            {"hang": lost(0, out), "error": reason, "bug": lost(0, out), "kill": lost(1, out, 4)}[name]
        ]
        assert ("The size of tensor a (3)" in each.said()) == ("Traceback" in each.said()) == (name == "bug")
        assert load_snapshot(out / "checkpoints/last.safetensors").position.step == 4


@pytest.mark.slow
def test_a_rank_whose_data_take_too_long_is_named(tmp_path: Path) -> None:
    """Three jobs at the same time, of which all ranks live: they come back before the others have said that they go, or
    later. Rank 1 has its turn when rank 0 is done."""
    late = "kept the others waiting for METAFT_RANKS_TIMEOUT=4 s, preparing the data"
    gone = "does not answer, it died or hangs, or is still preparing the data after METAFT_RANKS_TIMEOUT=4 s"
    said = {
        (0, 6.5): f"rank 0 of 2 {late}",
        (1, 6.5): f"rank 1 of 2 {late}",
        (0, 11.0): f"rank 0 of 2 {gone}",
    }
    jobs = [job(tmp_path / str(n), {rank: Plan(slow_data=s)}, timeout=4) for n, (rank, s) in enumerate(said)]
    settled(*jobs)
    for each, reason in zip(jobs, said.values(), strict=True):
        assert each.lines() == [f"metaft: error: {reason}"], each.said()
        assert each.statuses() == [1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_all_with_its_status(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "r"
    endless = Job("meta_train", options(SINUSOID, iterations=10**6, out=out))
    endless.ranks[1].wait_for(lambda: (out / "metrics.jsonl").exists())
    os.kill(endless.ranks[1].process.pid or 0, number)
    settled(endless)
    assert endless.statuses() == [128 + number] * 2
    assert endless.lines() == [stopped(out)]


@pytest.mark.slow
def test_a_second_job_on_a_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "r"
    argv = options(SINUSOID, iterations=10**6, out=out)
    first = Job("meta_train", argv)
    first.ranks[0].wait_for(lambda: (out / "checkpoints/last.safetensors").exists())
    again = [
        Job("meta_train", argv, name="another job"),
        Job("meta_train", ["--resume", str(out)], name="another job"),
        Job("meta_train", argv),  # of the same name: two that were started with one --rdzv-id, or a restart too early
    ]
    settled(*again)
    for each in again:
        assert each.statuses() == [2, 2]
        one_error(each.said(), f"{out} is in use by process {first.ranks[0].process.pid} on ")
    assert first.statuses() == [None, None]
    first.send(signal.SIGTERM)
    settled(first)
    assert first.statuses() == [128 + signal.SIGTERM] * 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_launch_of_the_same_id_leaves_what_the_one_before_it_made(count: int, tmp_path: Path) -> None:
    """The same command with one --rdzv-id again, restarted after it was refused; its own run a restart does take up."""
    out = tmp_path / "r"
    argv = options(SINUSOID, iterations=2, out=out)
    first = Job("meta_train", argv, {0: Plan(at_step=(1, "bug"))}, {}, count=count)
    settled(first)
    assert first.statuses() == [0] * count, first.said()
    assert (first.statuses(0)[0], len(first.attempts)) == (1, 2)
    left = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    again = Job("meta_train", [*argv, "--iterations", "4"], {}, {}, count=count)
    settled(again)
    for attempt in range(2):
        assert again.statuses(attempt) == [2] * count, again.said(attempt)
        one_error(again.said(attempt), f"out: {out} already exists")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == left


# ---- torchrun itself ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="three starts of two processes: make test-faults")
def test_torchrun_restarts_a_job_twice_and_stops_it(
    started: tuple[Path, subprocess.Popen[str]], whole: tuple[dict[str, Any], list[str]]
) -> None:
    """Rank 1 is killed, then rank 0; each time rank 0 comes back later than the other. Then torchrun gets SIGTERM."""
    folder, process = started
    out, resting = folder / "r", folder / "resting"
    until = time.monotonic() + 200
    while not resting.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    print(said)
    lines = [line for line in said.splitlines() if line.startswith("metaft: ")]
    assert lines == [lost(1, out, 4), lost(0, out), stopped(out)]
    assert load_snapshot(out / "checkpoints/last.safetensors").position.step == 11
    rows = [row["step"] for row in read_rows(out / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[-1] == 10, "the row of the last step is written when the run goes on"
    rest = Job("meta_train", ["--resume", str(out)])
    settled(rest)
    assert rest.statuses() == [0, 0], rest.said()
    same_tree(tree(out), whole[0])
