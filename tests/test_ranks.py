"""Many processes: the numbers of one, the same bytes after a restart, and one message when a process is lost.

The ranks here are threads of one process that meet at a barrier; real jobs are in `faults/test_jobs.py`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import scenarios
import torch
from helpers import SAME_RUN, SINUSOID, images, on_threads, options, pool, remains, rounded_alike, sinusoid, untimed
from rank_gradients import MEMBERS, meta_gradient
from torch import distributed

from metaft import adapt, algorithms, engines, evaluate, meta_train, predict
from metaft.cli import StopSignals
from metaft.config import EvaluateConfig, MetaTrainConfig, to_toml
from metaft.dist import group
from metaft.dist.ranks import ALONE, Ranks
from metaft.dist.torchrun import launcher
from metaft.engines.workers import OWN_THREADS
from metaft.errors import CheckpointError, Interrupted, MetaftError, NonFiniteError, RankLost
from metaft.meta_train import resume_run, run
from metaft.origin import settings
from metaft.runs import checkpoint, report, training
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.snapshot import load_snapshot
from metaft.tasks.pool import ClassPool
from metaft.testing import meta_test, score_episodes

Found = TypeVar("Found")


class Meeting:
    """Where threads exchange values, as ranks do through torch.distributed."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.values: list[Any] = [None] * count
        self.sums = 0

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        try:
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost("another thread failed") from None
        return found


class Thread(Ranks):
    """One of several ranks in one process. Any other than rank 0 sees a run folder that is not there."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, len(meeting.values), rank)
        self.meeting = meeting

    def _add(self, flat: torch.Tensor) -> None:
        self.meeting.sums += self.rank == 0
        parts = self.meeting.exchange(self.rank, flat.clone())
        flat.copy_(torch.stack(parts).sum(0))

    def _all(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def _from_first(self, value: Any) -> Any:
        found = self.meeting.exchange(self.rank, value)[0]
        if self.rank and isinstance(found[0], RunFolder):
            return (RunFolder(found[0].path / "nowhere"), *found[1:])
        return found


def in_threads(count: int, function: Callable[[Ranks], Found]) -> list[Found]:
    """What `function` gives on each rank. Raises what the first of them raised that failed by itself."""
    meeting = Meeting(count)
    found: list[Any] = [None] * count
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = function(Thread(rank, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), name=f"{OWN_THREADS}-{rank}") for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, RankLost)):
        raise error
    return found


def errors_of(count: int, function: Callable[[Ranks], object]) -> list[MetaftError]:
    """What each rank raises."""

    def caught(ranks: Ranks) -> MetaftError:
        with pytest.raises(MetaftError) as raised:
            function(ranks)
        return raised.value

    return in_threads(count, caught)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


# ---- what ranks do together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 8))
def test_shares_are_contiguous_in_order_and_even(count: int):
    shares = [Ranks(rank, count).share(range(10, 15)) for rank in range(count)]
    assert [i for share in shares for i in share] == [10, 11, 12, 13, 14]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_sum_carries_every_shape_and_type():
    big = 2**40 + 1

    def add(ranks: Ranks) -> Any:
        r = ranks.rank + 1
        mine = [
            torch.full((2, 3), 0.1 * r, dtype=torch.float64),
            torch.tensor(0.5 * r),
            torch.full((3,), big * r),
            torch.empty(0),
            torch.full((2,), 1.5 * r, dtype=torch.bfloat16),
        ]
        kept = [t.clone() for t in mine]
        found = ranks.sum_flat(mine)
        assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True))
        assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in mine]
        assert ranks.meeting.sums == 1  # type: ignore[attr-defined]
        return found

    for wide, single, whole, none, half in in_threads(3, add):
        assert (wide - 0.6).abs().max() < 1e-15
        assert float(single) == 3.0
        assert whole.tolist() == [6 * big] * 3
        assert none.shape == (0,)
        assert half.tolist() == [9.0, 9.0]


def test_alone_nothing_is_computed_and_nothing_imported():
    t = torch.ones(3)
    assert ALONE.sum_flat([t])[0] is t
    ALONE.check_same("what", lambda: 1 / 0)
    assert group.join().count == 1
    code = "import sys, metaft.dist.group; metaft.dist.group.join(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_values_are_gathered_in_rank_order_and_differences_named():
    assert in_threads(3, lambda ranks: ranks.gather(ranks.rank)) == [[0, 1, 2]] * 3
    assert in_threads(3, lambda ranks: ranks.on_first(lambda: ranks.rank)) == [0, 0, 0]
    found = errors_of(4, lambda ranks: ranks.check_same("data", lambda: "ab"[ranks.rank > 1]))
    assert [str(error) for error in found] == ["data: b on ranks 2, 3, a on rank 0"] * 4


def test_one_rank_of_each_machine_goes_first():
    """Two machines of two ranks."""
    done: list[int] = []

    def start(ranks: Ranks) -> int:
        ranks.local = ranks.rank % 2

        def read() -> int:
            time.sleep(0 if ranks.local else 0.1)
            done.append(ranks.local)
            return ranks.rank

        return ranks.in_turn(read)

    assert in_threads(4, start) == [0, 1, 2, 3]
    assert done == [0, 0, 1, 1]


@pytest.mark.parametrize("meeting", ["sum_flat", "gather"])
def test_all_ranks_stop_with_one_status(meeting: str):
    """Whichever of them a signal was sent to; SIGTERM goes before SIGINT."""
    signals = {(2, 0, 0): 2, (0, 0, 2): 2, (2, 2, 2): 2, (0, 15, 0): 15, (2, 2, 15): 15, (15, 15, 15): 15, (0, 0, 0): 0}
    for sent, stop in signals.items():

        def ask(ranks: Ranks, sent: tuple[int, ...] = sent) -> int:
            ranks.asked = sent[ranks.rank]
            ranks.sum_flat([torch.ones(1)]) if meeting == "sum_flat" else ranks.gather(None)
            return ranks.stop

        assert in_threads(3, ask) == [stop] * 3


def test_an_error_of_the_first_rank_ends_all_with_its_status():
    def fail(ranks: Ranks) -> None:
        def broken() -> None:
            assert ranks.rank == 0
            raise NonFiniteError("the loss is nan")

        ranks.on_first(broken)

    first, second = errors_of(2, fail)
    assert (str(first), first.status) == ("the loss is nan", 1)
    assert (type(second).__name__, second.status) == ("SaidElsewhere", 1)


MEETING = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; start with torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1 to 2147483647, as torchrun sets it; got '0'"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1, as torchrun sets it; got '2'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT must be a whole number from 0 to 65535, as torchrun sets it; got 'x'"),
        ({"METAFT_RANKS_TIMEOUT": "soon"}, "METAFT_RANKS_TIMEOUT must be a number of seconds above 0, got 'soon'"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in (environment if "WORLD_SIZE" in environment else {**MEETING, **environment}).items():
        monkeypatch.setenv(name, value)
    assert meta_train.main([]) == 2
    assert capsys.readouterr().err == f"metaft: error: {message}\n"


def meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environment: object
) -> tuple[int, list[str]]:
    """(exit status, lines on stderr) of a rank that waits for the others for a fifth of a second."""
    fixed = {**MEETING, "METAFT_RANKS_TIMEOUT": "0.2", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    for name, value in {**fixed, **environment}.items():
        monkeypatch.setenv(name, str(value))
    status = meta_train.main([])
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("command", [adapt, predict])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_for_one_process_is_refused_to_several(
    command: Any, rank: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert command.main(["--help"]) == 2
    why = f"{command.__name__} is for one process, but WORLD_SIZE is 2; start it without torchrun"
    assert capsys.readouterr() == ("", "" if int(rank) else f"metaft: error: {why}\n")


@pytest.mark.parametrize("local", [0, 1])
def test_where_nobody_answers_one_rank_of_each_machine_says_so(
    local: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A wrong MASTER_ADDR or MASTER_PORT, or a torchrun that has died."""
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        status, lines = meet(monkeypatch, capsys, LOCAL_RANK=local, MASTER_PORT=port)
    assert (status, len(lines)) == (1, local == 0)
    for line in lines:
        assert line.startswith(f"metaft: error: the 2 processes did not meet at 127.0.0.1:{port}: The client socket")


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"RANK": 0}, "rank 1 of 2 did not come; waited 0 of METAFT_RANKS_TIMEOUT=0.2 s"),
        ({"RANK": 1}, "rank 0 of 2 did not come; waited 0 of METAFT_RANKS_TIMEOUT=0.2 s"),
        ({"RANK": 1, "GLOO_SOCKET_IFNAME": "none"}, "Unable to find address for: none"),
    ],
)
def test_ranks_that_do_not_meet_say_once_who_or_what_is_missing(
    environment: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if "GLOO_SOCKET_IFNAME" in environment:
        monkeypatch.setattr(group, "attempt_word", lambda *_: "a word")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    here = {**environment, "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for restart, said in ((0, 1), (0, 0), (1, 1)):  # the second rank to find out is silent, but not the next attempt
        again = {**here, "TORCHELASTIC_RESTART_COUNT": restart}
        status, lines = meet(monkeypatch, capsys, **again)
        assert (status, len(lines)) == (1, said)
        for line in lines:
            assert line.startswith(f"metaft: error: the 2 processes did not meet at 127.0.0.1:{store.port}: ")
            assert why in line


@pytest.mark.parametrize("local", [0, 1])
def test_a_torch_without_gloo_is_one_line(
    local: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(distributed, "is_gloo_available", lambda: False)
    status, lines = meet(monkeypatch, capsys, LOCAL_RANK=local)
    assert (status, len(lines)) == (2, local == 0)
    assert all("this PyTorch was built without gloo" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5018"), True),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"), True),
        (RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_is_no_lost_connection_keeps_its_own_traceback(
    error: Exception, lost: bool, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(distributed, name, fail)
    one = group._Group.__new__(group._Group)
    Ranks.__init__(one, 0, 2)
    one._timeout = 5.0
    calls = (lambda: one.sum_flat([torch.ones(2)]), lambda: one.gather(1), lambda: one.on_first(lambda: 1))
    for call in calls:
        with pytest.raises(RankLost if lost else type(error)) as caught:
            call()
        assert (caught.value is error) is not lost


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, device in ((0, "cpu"), (5, "cpu"), (1, "cuda"), (1, "cuda:1")):
        Ranks(9, 16, local).check_device(device)
    with pytest.raises(MetaftError, match="give cuda, not 'cuda:0'"):
        Ranks(1, 2, 1).check_device("cuda:0")
    with pytest.raises(MetaftError, match="3 processes or more on this machine, which has 2 GPUs; give --nproc-per"):
        Ranks(2, 4, 2).check_device("cuda")
    Ranks(0, 1).check_device("cuda:5")  # whose absence `device_of` has noticed


def test_a_launch_is_known_by_torchruns_store_and_without_one_by_its_process(monkeypatch: pytest.MonkeyPatch):
    assert group.join().launch is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    assert group.join().launch == f"17 {socket.gethostname()} {os.getppid()}"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    words: list[str | None] = []
    for _ in range(2):
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        words += [group.join().launch, group.join().launch]
    assert words[0] == words[1] != words[2] == words[3]
    assert None not in words


def test_how_to_start_again_is_said_for_one_machine_and_for_several(monkeypatch: pytest.MonkeyPatch):
    assert launcher(4) == "--standalone --nproc-per-node 4"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    there = "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29400 --rdzv-id NAME"
    assert launcher(6) == f"--nnodes 3 --nproc-per-node 2 {there}"


LAUNCH = "torchrun --standalone --nproc-per-node 2"

# ---- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("member", MEMBERS)
def test_ranks_give_the_meta_gradient_of_one_process(member: str, dtype: torch.dtype, tolerance: float):
    """Five tasks on two, three and five ranks.

    Each task's gradient has the same bits everywhere, since each is computed alone; only the sum of the five is taken
    in another order: in float32 eight roundings of 2^-24, times twenty where terms cancel.
    """
    expected, state = meta_gradient(member, dtype, ALONE), MEMBERS[member](scenarios.model("mlp")).init(0)[1]
    for count in (2, 3, 5):
        results = in_threads(count, lambda ranks: meta_gradient(member, dtype, ranks))
        assert scenarios.relative_error(results[0].grads, expected.grads) < tolerance
        if state:
            assert scenarios.relative_error(results[0].state, expected.state) < tolerance
        assert results[0].metrics == pytest.approx(expected.metrics, rel=tolerance)
        for other in results[1:]:
            assert other.metrics == results[0].metrics
            for mine, theirs in ((other.grads, results[0].grads), (other.state, results[0].state)):
                assert all(torch.equal(mine[k], theirs[k]) for k in theirs), "ranks would drift apart"


@pytest.mark.parametrize("episodes", [2, 13, 40])
@pytest.mark.slow
def test_episodes_and_scores_are_those_of_one_process(episodes: int):
    """Also where some ranks have none, and where the last chunk is cut short."""
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.maml(scenarios.model(ways=3, dtype=torch.float32), inner_lr=0.1)
    meta, state = algorithm.init(0)

    def scores(ranks: Ranks) -> tuple[torch.Tensor, list[int], dict[str, Any]]:
        done: list[int] = []
        how: dict[str, Any] = {"split": "val", "seed": 3, "episodes": episodes, "steps": 2, "ranks": ranks}
        with engines.engine("threads", threads=1) as engine:
            found = score_episodes(
                engine, algorithm, meta, state, source, **how, at_once=8, progress=lambda n: done.append(n)
            )
            return found, done, meta_test(engine, algorithm, meta, state, source, **how)

    expected, _, figures = scores(ALONE)
    for count in (2, 3):
        for found, done, test in in_threads(count, scores):
            assert torch.equal(found, expected)
            assert test == figures
            assert done == [*range(8 * count, episodes, 8 * count), episodes]


@pytest.mark.usefixtures("float64_runs")
def test_a_run_on_several_ranks_is_that_of_one(tmp_path: Path):
    """Validation, rows, checkpoints and meta-test too; the other ranks write nothing."""
    one = run(sinusoid(tmp_path / "one"))
    for count in (2, 3):
        path = tmp_path / str(count)
        results = in_threads(count, lambda ranks, path=path: run(sinusoid(path), ranks=ranks))
        assert all(result == results[0] for result in results)
        assert results[0]["ranks"] == count
        assert not (path / "nowhere").exists()
        assert rounded_alike(untimed(results[0]), untimed(one) | {"ranks": count})
        assert rounded_alike(read_rows(path / "metrics.jsonl"), read_rows(tmp_path / "one/metrics.jsonl"))
        tensors = [checkpoint.load(folder / "checkpoints/last.safetensors")[0] for folder in (tmp_path / "one", path)]
        assert scenarios.relative_error(tensors[1], tensors[0]) < SAME_RUN


def test_where_to_write_a_meta_test_is_rank_0s_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder need not be there, or writable, where another rank is."""
    run(sinusoid(tmp_path / "r", iterations=1))
    tried: list[int] = []
    out = EvaluateConfig(out=str(tmp_path / "a.json"), episodes=4)

    def start(ranks: Ranks) -> None:
        mine.rank = ranks.rank
        evaluate.run(tmp_path / "r", out, ranks=ranks)

    def check(*_: object) -> None:
        tried.append(mine.rank)
        if refusing:
            raise CheckpointError("out: cannot be written")

    mine, refusing = threading.local(), False
    monkeypatch.setattr(evaluate, "check_writable", check)
    in_threads(2, start)
    assert tried == [0]
    refusing = True
    assert [error.status for error in errors_of(2, start)] == [2, 2]


@pytest.mark.usefixtures("float64_runs")
def test_a_run_on_two_threads_is_that_of_one(tmp_path: Path):
    """With the engine and the chunk that each number stands for, where neither is asked for."""
    runs = []
    for count in (1, 2):
        with on_threads(count):
            runs.append(run(images(tmp_path / str(count), meta_batch=3), dataset=pool()))
    assert rounded_alike(untimed(runs[1]), untimed(runs[0]))
    found, expected = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("2", "1"))
    assert rounded_alike(found, expected)


@pytest.mark.usefixtures("float64_runs")
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_a_run_moves_between_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One process, then two, then one."""
    run(sinusoid(tmp_path / "whole"))
    path = tmp_path / "moved"
    with monkeypatch.context() as patch:
        steps_before_stop(patch, 3)
        with pytest.raises(Interrupted):
            run(sinusoid(path))
    real = training.meta_gradient

    def meta_gradient(*arguments: Any, step: int, ranks: Ranks, **more: Any) -> Any:
        if step == 4 and ranks.rank == 1:
            ranks.asked = signal.SIGINT
        return real(*arguments, step=step, ranks=ranks, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "meta_gradient", meta_gradient)
        found = errors_of(2, lambda ranks: resume_run(path, ranks=ranks))
    assert [error.status for error in found] == [128 + signal.SIGINT] * 2
    assert all(f"go on with: {LAUNCH} -m metaft.meta_train --resume" in str(error) for error in found)
    assert load_snapshot(path / "checkpoints/last.safetensors").position.step == 5
    assert load_snapshot(path / "checkpoints/last.safetensors").header["environment"]["ranks"] == "2"
    assert "note: ranks 1 -> 2: the run goes on to rounding (1e-6), not with the same bits" in capsys.readouterr().err
    resume_run(path)
    assert "note: ranks 2 -> 1: the run goes on to rounding" in capsys.readouterr().err
    assert rounded_alike(read_rows(path / "metrics.jsonl"), read_rows(tmp_path / "whole/metrics.jsonl"))


def steps_before_stop(patch: pytest.MonkeyPatch, steps: int) -> None:
    """A signal to the only process, after so many steps of a run."""
    done = [0]
    real = training.Outer.step

    def step(*arguments: Any) -> None:
        done[0] += 1
        real(*arguments)

    def check(self: StopSignals, message: str) -> None:
        if done[0] >= steps:
            raise Interrupted(message, signal.SIGTERM)

    patch.setattr(training.Outer, "step", step)
    patch.setattr(StopSignals, "check", check)


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = training.draw

    def draw(algorithm: Any, source: Any, seed: int, indices: range) -> Any:
        tasks = real(algorithm, source, seed, indices)
        if 3 * 4 + 2 in indices:  # the last task of the fifth step, which is the last rank's
            tasks.query_y[-1] = torch.nan
        return tasks

    monkeypatch.setattr(training, "draw", draw)
    found = errors_of(2, lambda ranks: run(sinusoid(tmp_path / "r"), ranks=ranks))
    assert [type(error) for error in found] == [NonFiniteError] * 2
    assert all(str(error).startswith("step 5: the loss is nan") for error in found)
    assert load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.step == 4


@pytest.mark.parametrize(("drift", "noticed", "settings"), [(4, 6, {}), (6, 7, {"checkpoint_every": 100})])
def test_ranks_that_drift_apart_are_noticed_before_anything_of_it_is_saved(
    drift: int, noticed: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the next checkpoint or validation; the last checkpoint stays what it was, and is named."""
    real = training.Outer.step
    path = tmp_path / "r"
    last = path / "checkpoints/last.safetensors"
    before: list[bytes] = []

    def step(self: training.Outer, grads: Any, number: int) -> None:
        real(self, grads, number)
        if number == drift and threading.current_thread() is drifting[0]:
            next(iter(self.meta.values())).add_(1e-6)
            before.append(last.read_bytes())

    drifting: list[threading.Thread] = []

    def start(ranks: Ranks) -> None:
        if ranks.rank == 1:
            drifting.append(threading.current_thread())
        run(sinusoid(path, iterations=7, eval_every=4, **settings), ranks=ranks)

    monkeypatch.setattr(training.Outer, "step", step)
    for error in errors_of(2, start):
        assert str(error).startswith(f"step {noticed}: the digest of the parameters: ")
        assert " on rank 1, " in str(error)
        assert "; the state of step 4 is kept in " in str(error)
    assert last.read_bytes() == before[0]
    assert load_snapshot(last).position.step == 4
    assert load_snapshot(path / "checkpoints/best.safetensors").position.step == 4


def test_more_ranks_than_tasks_are_refused_before_anything_is_written(tmp_path: Path):
    for error in errors_of(3, lambda ranks: run(sinusoid(tmp_path / "r", meta_batch=2), ranks=ranks)):
        assert str(error) == "meta_batch must be at least the number of processes, got 2 for 3"
    assert not (tmp_path / "r").exists()


def one_pixel_off() -> ClassPool:
    images = pool().images.clone()
    images[70, 0, 3, 3] ^= 1
    return dataclasses.replace(pool(), images=images)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda: dataclasses.replace(pool(), class_names=tuple("abcdefghijklmn")), "the class split of"),
        (one_pixel_off, "the digest of the images of"),
        (lambda: dataclasses.replace(pool(), starts=pool().starts[::-1].copy()), "the digest of the images of"),
        (
            lambda: dataclasses.replace(pool(), splits={**pool().splits, "train": np.arange(6)[::-1].copy()}),
            "the digest of the images of",
        ),
    ],
)
def test_ranks_with_other_data_are_refused(other: Callable[[], ClassPool], differs: str, tmp_path: Path):
    def start(ranks: Ranks) -> None:
        mine = pool() if ranks.rank == 0 else other()
        run(images(tmp_path / "r", engine="threads", threads=1), dataset=mine, ranks=ranks)

    for error in errors_of(2, start):
        assert str(error).startswith(f"dataset: {differs} squares-8: ")
        assert " on rank 1, " in str(error)
    assert not (tmp_path / "r").exists()


def test_a_chunk_leaves_work_for_every_thread_of_every_rank(tmp_path: Path):
    for count in (1, 2):
        path = tmp_path / str(count)
        config = images(path, iterations=1, meta_batch=8, engine="threads", threads=2)
        in_threads(count, lambda ranks, config=config: run(config, dataset=pool(), ranks=ranks))
        assert f"task_chunk = {8 // 2 // count}\n" in (path / "config.toml").read_text()


# ---- going on by itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_the_same_command_goes_on_where_there_is_a_run(tmp_path: Path, restarted: bool):
    def asked(arguments: Any, config: Any, *words: str) -> Any:
        again = [] if restarted else ["--auto-resume"]
        return settings(arguments, config, [*words, *again], prog="", launch="launch 7" if restarted else None)

    out = str(tmp_path / "r")
    words = ["--dataset", "sinusoid", "--engine", "tune", "--out", out]
    config, resume = asked(meta_train.Arguments, MetaTrainConfig, *words)
    assert (config.output.out, resume) == (out, None)
    tuned = dataclasses.replace(config, out=None, engine="vmap", task_chunk=3)
    RunFolder.create(tmp_path / "r", to_toml(tuned), launch="launch 7")
    config, resume = asked(meta_train.Arguments, MetaTrainConfig, *words)
    assert (config, resume) == (tuned, tmp_path / "r"), "tuned once is enough"
    with pytest.raises(MetaftError, match=r"is a run of metaft\.meta_train, not of metaft\.adapt"):
        asked(adapt.Arguments, adapt.AdaptConfig, "--out", out)
    if restarted:  # another launch's run is not this one's to go on with
        (tmp_path / "r/.metaft.job").write_text("launch 8")
        assert asked(meta_train.Arguments, MetaTrainConfig, *words)[1] is None
    else:
        with pytest.raises(MetaftError, match="auto_resume: give --out too"):
            asked(meta_train.Arguments, MetaTrainConfig)


def test_auto_resume_ends_with_the_same_bytes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert meta_train.main(options(SINUSOID, out=tmp_path / "whole")) == 0
    words = [*options(SINUSOID, out=tmp_path / "r"), "--auto-resume"]
    with monkeypatch.context() as patch:
        steps_before_stop(patch, 5)
        assert meta_train.main(words) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert meta_train.main([*words, "--inner-lr", "0.5"]) == 2
    assert "inner_lr: a resumed run keeps its settings" in capsys.readouterr().err
    assert meta_train.main(words) == 0
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")


def test_restarts_need_a_named_folder(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert meta_train.main(["--dataset", "sinusoid"]) == 2
    assert "out: with --max-restarts 3 give --out, so that a restart finds" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", -signal.SIGINT)])
def test_a_second_sigterm_changes_nothing_and_a_second_sigint_is_final(name: str, status: int):
    """A scheduler sends SIGTERM to every process of a job, and so does torchrun when it gets one."""
    code = f"""
import signal
from metaft.cli import StopSignals
with StopSignals() as signals:
    signal.raise_signal(signal.{name})
    signal.raise_signal(signal.{name})
assert signals.received == signal.{name}
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status
