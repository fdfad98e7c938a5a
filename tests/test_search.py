"""Searching settings: what a space says, what is tried, and that each trial runs once whatever happens."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SINUSOID, one_line, write_target

from metaft import adapt, meta_train, search
from metaft.config import AdaptConfig, MetaTrainConfig, SearchConfig, read_toml
from metaft.errors import CheckpointError, Interrupted, MetaftError, TrialsFailed
from metaft.plots.search import history_figure, settings_figure
from metaft.runs.checkpoint import write_atomically
from metaft.runs.recorded import CONFIGS
from metaft.search import finish
from metaft.trials import processes, report, searching
from metaft.trials.journal import Journal
from metaft.trials.methods import METHODS
from metaft.trials.methods.at_random import AtRandom
from metaft.trials.methods.grid import Grid
from metaft.trials.over import OVER, check_searched, in_full
from metaft.trials.processes import Trial
from metaft.trials.searching import Search, as_given
from metaft.trials.space import Choices, Range, Space, made

Text = pytest.CaptureFixture[str]

STUB = (sys.executable, "-S", str(Path(__file__).parent / "trial_stub.py"))

LR = {"low": 1e-4, "high": 1.0, "log": True}


def space_of(**values: Any) -> Space:
    return made("adapt", AdaptConfig, values, origin="s.toml")


# ---- what a space says --------------------------------------------------------------------------------------------


def test_a_file_says_what_is_fixed_and_what_is_searched() -> None:
    space = space_of(
        data="glyphs:Hebrew", lr=LR, epochs={"low": 4, "high": 11, "step": 3}, strategy=["head", "lora:rank=8"],
        extra=[[], ["mixup:alpha=0.2"]], compare=["none"], ema=[0, 0.5],
    )  # fmt: skip
    assert space.fixed == {"data": "glyphs:Hebrew", "compare": ("none",)}
    assert space.searched == (
        Range("lr", 1e-4, 1.0, log=True), Range("epochs", 4, 11, step=3, whole=True),
        Choices("strategy", ("head", "lora:rank=8")), Choices("extra", ((), ("mixup:alpha=0.2",))),
        Choices("ema", (0.0, 0.5)),
    )  # fmt: skip
    plain = json.loads(json.dumps(space.plain()))
    assert made(plain.pop("command"), AdaptConfig, plain, origin="journal") == space
    assert list(space.searched[1].values or ()) == [4, 7, 10]
    assert list(Range("dropout", 0.0, 0.3, step=0.1).values or ()) == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-15)
    assert Range("dropout", 0.0, 0.3).values is None and list(Range("epochs", 2, 4, whole=True).values or ()) == [
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"foo": [1]}, ["unknown field 'foo'"]),
        ({"epoch": [1]}, ["unknown field 'epoch'", "did you mean 'epochs'"]),
        ({"lr": 0.1}, ["nothing to search"]),
        ({"lr": []}, ["lr", "empty"]),
        ({"lr": [0.1, "x"]}, ["lr must be float", "'x'"]),
        ({"lr": [0.1, -1]}, ["lr must be above 0", "-1"]),
        ({"epochs": [1.5]}, ["epochs must be int", "1.5"]),
        ({"epochs": [True]}, ["epochs must be int", "True"]),
        ({"head": ["linear", "linaer"]}, ["head must be one of", "'linaer'", "did you mean 'linear'"]),
        ({"head": ["linear", "linear"]}, ["head", "'linear' is there twice"]),
        ({"lr": [1, 1.0]}, ["lr", "1.0 is there twice"]),
        ({"extra": [["mixup"], "cutmix"]}, ["extra", "'cutmix'"]),
        ({"lr": {"low": 1}}, ["lr", "needs high"]),
        ({"lr": {"high": 1}}, ["lr", "needs low"]),
        ({"lr": {"low": 0, "high": 1}}, ["lr must be above 0", "0"]),
        ({"dropout": {"low": 0, "high": 0.5, "log": True}}, ["dropout", "low must be above 0", "0.0"]),
        ({"lr": {"low": 1, "high": 1}}, ["lr", "low must be below high", "1.0"]),
        ({"lr": {"low": 1, "high": 2, "steps": 1}}, ["lr", "no 'steps'", "did you mean 'step'"]),
        ({"lr": {"low": 1, "high": 2, "log": 1}}, ["lr", "log must be true or false", "1"]),
        ({"lr": {"low": 1, "high": 2, "step": 3}}, ["lr", "step must be float", "3"]),
        ({"epochs": {"low": 1, "high": 3, "step": 0.5}}, ["epochs", "step must be int", "0.5"]),
        ({"epochs": {"low": 1, "high": 3, "step": 0}}, ["epochs", "step must be int", "0"]),
        ({"epochs": {"low": 1, "high": 3, "step": 1, "log": True}}, ["epochs", "step = 1"]),
        ({"epochs": {"low": 1.5, "high": 3}}, ["epochs must be int", "1.5"]),
        ({"strategy": {"low": 1, "high": 3}}, ["strategy", "a range is for numbers"]),
        ({"skip_bad": {"low": 0, "high": 1}}, ["skip_bad", "a range is for numbers"]),
    ],
    ids=str,
)
def test_what_is_no_space_is_one_line(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(MetaftError) as caught:
        space_of(**values)
    assert str(caught.value).startswith("s.toml: ") and all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("command", OVER)
def test_what_trials_are_judged_by_is_not_searched(command: str) -> None:
    over = OVER[command]
    assert over.not_searched.keys() <= search.options(CONFIGS[command]).keys()
    for name in ("seed", "out", "device"):
        with pytest.raises(MetaftError, match=rf"^s: {name}: it cannot be searched"):
            check_searched(Space(command, {}, (Choices(name, (1, 2)),)), "s")
    with pytest.raises(MetaftError, match=r"^s: out: .*'x'"):
        check_searched(Space(command, {"out": "x"}, ()), "s")
    for name in ("data", "shots_per_class", "dataset", "split", "eval_seed", "test_shots"):
        assert (name in over.not_searched) == (name in search.options(CONFIGS[command]))


# ---- what is tried ------------------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_the_last_the_fastest() -> None:
    space = space_of(strategy=["head", "full"], epochs={"low": 1, "high": 5, "step": 2}, extra=[[], ["mixup"]])
    grid = Grid(space, 0, True)
    expected = itertools.product(("head", "full"), (1, 3, 5), ((), ("mixup",)))
    assert grid.size == 12
    assert [tuple(grid.ask(i).values()) for i in range(12)] == list(expected)
    assert list(grid.ask(3)) == ["strategy", "epochs", "extra"]
    with pytest.raises(MetaftError, match=r"^method: .*lr has neither"):
        Grid(space_of(lr=LR), 0, True)


def test_a_number_in_0_to_1_is_a_place_in_a_range() -> None:
    """Against the inverses of the distributions."""
    uniform = (np.arange(1000) + 0.5) / 1000
    log, linear = Range("lr", 1e-4, 1.0, log=True), Range("dropout", 0.1, 0.5)
    assert [log.at(u) for u in uniform] == pytest.approx(1e-4 * 1e4**uniform)
    assert [linear.at(u) for u in uniform] == pytest.approx(0.1 + 0.4 * uniform)
    assert [log.at(0), linear.at(0)] == [1e-4, 0.1] and log.at(1 - 2**-53) <= 1 and linear.at(1 - 2**-53) <= 0.5
    stepped = [Range("epochs", 4, 12, step=4, whole=True).at(u) for u in uniform]
    assert np.unique(stepped, return_counts=True)[1] == pytest.approx([333, 334, 333], abs=1)
    chosen = [Choices("head", "abcd").at(u) for u in uniform]
    assert chosen == ["abcd"[int(4 * u)] for u in uniform]
    whole = [Range("epochs", 2, 5, log=True, whole=True).at(u) for u in uniform]
    shares = [math.log((k + 1) / k) / math.log(6 / 2) for k in range(2, 6)]
    assert np.bincount(whole)[2:] / 1000 == pytest.approx(shares, abs=2e-3)
    assert Range("epochs", 2, 5, log=True, whole=True).at(1 - 2**-53) == 5


def test_random_trials_are_uniform_and_independent() -> None:
    """Mean and correlation of n uniform numbers: within 4.5 standard errors, 1/sqrt(12 n) and 1/sqrt(n)."""
    method, n = AtRandom(space_of(lr=LR, dropout={"low": 0, "high": 0.8}, head=["linear", "cosine"]), 3, True), 2000
    trials = [method.ask(i) for i in range(n)]
    places = np.array([[math.log(t["lr"] / 1e-4) / math.log(1e4), t["dropout"] / 0.8] for t in trials])
    assert np.abs(places.mean(0) - 0.5).max() < 4.5 / math.sqrt(12 * n)
    assert abs(np.corrcoef(places.T)[0, 1]) < 4.5 / math.sqrt(n)
    assert abs(np.corrcoef(places[1:, 0], places[:-1, 0])[0, 1]) < 4.5 / math.sqrt(n)
    heads = np.mean([t["head"] == "linear" for t in trials])
    assert abs(heads - 0.5) < 4.5 / math.sqrt(4 * n)


def test_random_trials_of_a_finite_space_are_all_different() -> None:
    """And come in an order of the seed's: each combination is as likely as another to be the first."""
    space = space_of(
        head=["linear", "cosine", "prototype"],
        epochs={"low": 1, "high": 4},
        dropout={"low": 0, "high": 0.8, "step": 0.4},
    )
    assert space.size == AtRandom(space, 0, True).size == 36
    for seed in (0, 1):
        method = AtRandom(space, seed, True)
        trials = [method.ask(i) for i in range(36)]
        assert len({tuple(t.values()) for t in trials}) == 36
        assert [AtRandom(space, seed, True).ask(i) for i in (20, 3)] == [trials[20], trials[3]]
    method, tried = AtRandom(space, 0, True), {"head": "cosine", "epochs": 2, "dropout": 0.4}
    assert [method.ask(i, tried) for i in (0, 1)] == [tried] * 2  # as another version had it
    rest = [method.ask(i) for i in range(2, 37)]
    assert len({tuple(t.values()) for t in rest}) == 35 and tried not in rest
    firsts = [AtRandom(space_of(head=["linear", "cosine"]), seed, True).ask(0)["head"] for seed in range(400)]
    assert abs(firsts.count("linear") - 200) < 4.5 * math.sqrt(100)
    assert space_of(lr=LR, head=["linear", "cosine"]).size is None


def test_what_is_improbable_is_tried_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 and 200 whole numbers on a log scale the last has a share of 1 in 2,100."""
    monkeypatch.setattr("metaft.trials.methods.at_random.PATIENCE", 30)
    space = space_of(epochs={"low": 1, "high": 200, "log": True}, head=["linear", "cosine"])
    method = AtRandom(space, 0, True)
    assert len({tuple(method.ask(i).values()) for i in range(400)}) == space.size == 400
    assert method._draws < 12_000
    assert space_of(epochs={"low": 1, "high": 2**63 - 1, "log": True}, head=["linear", "cosine"]).size is None


def test_how_many_trials_there_are(tmp_path: Path) -> None:
    def trials(method: str, given: int | None, **space: Any) -> int:
        path = tmp_path / f"{method}{given}{len(space)}{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        header = {"method": method, "seed": 0, "trials": given, "measure": "accuracy", "notes": [], "chosen": {}}
        asked = made("adapt", AdaptConfig, {"init": "none", **space}, origin="s.toml")
        return Search(path, Journal.begin(path / "j", {"space": asked.plain(), **header}), asked).trials

    few, many = {"head": ["linear", "cosine"]}, {"epochs": {"low": 1, "high": 50}}
    assert [trials(m, None, **few) for m in ("grid", "random")] == [2, 2]
    assert [trials(m, 1, **few) for m in ("grid", "random")] == [1, 1]
    assert [trials(m, None, **many) for m in ("grid", "random")] == [50, 20]
    assert [trials(m, 30, **many) for m in ("grid", "random")] == [30, 30]
    assert trials("random", None, lr=LR) == 20


def test_random_trial_i_is_a_function_of_seed_and_i() -> None:
    space = space_of(lr=LR, epochs={"low": 1, "high": 9})
    first = AtRandom(space, 0, True)
    trials = [first.ask(i) for i in range(5)]
    assert AtRandom(space, 0, False).ask(3) == trials[3]
    assert AtRandom(space, 1, True).ask(3) != trials[3] and len({t["lr"] for t in trials}) == 5
    assert first.ask(4, {"lr": 1.0}) == {"lr": 1.0}  # what was tried before stays, whatever this version draws


# ---- Optuna -------------------------------------------------------------------------------------------------------


def bowl(values: Mapping[str, Any]) -> float:
    return (math.log10(values["lr"]) + 2) ** 2 + abs(values["epochs"] - 7) / 5 + (values["head"] == "cosine")


OPTUNA = {"lr": LR, "epochs": {"low": 1, "high": 10}, "head": ["linear", "cosine", "prototype"]}


@pytest.mark.parametrize("sign", [1, -1])
def test_tpe_is_optunas_with_the_same_seed(sign: int) -> None:
    """The lowest of a figure, and the highest of what is it with the other sign."""
    optuna = pytest.importorskip("optuna")
    tpe, tried = METHODS["tpe"](space_of(**OPTUNA), 5, sign < 0), []
    for number in range(20):
        values = tpe.ask(number)
        tried.append(dict(values))
        tpe.tell(number, None if number % 6 == 5 else sign * bowl(values))

    def objective(trial: Any) -> float:
        lr, epochs = trial.suggest_float("lr", 1e-4, 1.0, log=True), trial.suggest_int("epochs", 1, 10)
        head = ("linear", "cosine", "prototype")[trial.suggest_categorical("head", (0, 1, 2))]
        if trial.number % 6 == 5:
            raise ValueError
        return bowl({"lr": lr, "epochs": epochs, "head": head})

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=5))
    study.optimize(objective, n_trials=20, catch=(ValueError,))
    names = ("linear", "cosine", "prototype")
    assert tried == [{**t.params, "head": names[t.params["head"]]} for t in study.trials]


def test_tpe_goes_on_as_if_it_had_never_stopped() -> None:
    pytest.importorskip("optuna")
    space = space_of(**OPTUNA)
    whole, again, tried = METHODS["tpe"](space, 0, False), METHODS["tpe"](space, 0, False), []
    for number in range(18):
        tried.append(dict(whole.ask(number)))
        whole.tell(number, bowl(tried[number]))
    for number in range(13):
        assert again.ask(number, tried[number]) == tried[number]
        again.tell(number, bowl(tried[number]))
    for number in range(13, 18):
        assert again.ask(number) == tried[number]
        again.tell(number, bowl(tried[number]))


def test_what_another_optuna_proposed_stays_in_the_study() -> None:
    pytest.importorskip("optuna")
    tpe: Any = METHODS["tpe"](space_of(**OPTUNA), 0, False)
    other = {"lr": 0.5, "epochs": 3, "head": "cosine"}
    assert tpe.ask(0, other) == other
    tpe.tell(0, 7.0)
    finished = [trial for trial in tpe._study.trials if trial.value is not None]
    assert [(t.value, t.params) for t in finished] == [(7.0, {"lr": 0.5, "epochs": 3, "head": 1})]
    assert tpe.ask(1)["lr"] != 0.5


def test_tpe_without_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MetaftError, match=r"^method: tpe needs Optuna.*pip install '.\[search\]'"):
        METHODS["tpe"](space_of(lr=LR), 0, True)


# ---- the journal --------------------------------------------------------------------------------------------------


def told(number: int, value: float | None = 0.5, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {"told": number, "value": value, "loss": loss, "status": 0, "seconds": 1.0, "at": 2.0 + number, **more}


def test_a_journal_that_is_cut_at_any_byte_is_what_was_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda number: None)
    path = tmp_path / "journal.jsonl"
    rows: list[dict[str, Any]] = [{"asked": 0, "values": {"lr": 0.1}}, {"asked": 1, "values": {"lr": 0.2}}]
    rows += [told(1), {"trials": 7}, told(0, None, None, message="é")]
    journal = Journal.begin(path, {"trials": 3})
    for row in rows:
        journal.write(row)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        if whole == 0:
            with pytest.raises(CheckpointError, match="not the journal of a search"):
                Journal(path)
            continue
        torn = Journal(path)
        assert path.read_bytes() == data[: ends[whole - 1]]
        assert len(torn.events) == sum("trials" not in row for row in rows[: whole - 1])
        assert torn.search == {"trials": 7 if whole > 4 else 3}
        for row in rows[whole - 1 :]:
            torn.write(row)
        assert path.read_bytes() == data
        assert (torn.events, torn.told, torn.asked) == (journal.events, journal.told, journal.asked)


@pytest.mark.parametrize(
    "row",
    [
        *(told(1), told(0), {"asked": 2, "values": {}}, {"asked": 0, "values": {}}, {"asked": 1}, {}),
        *({"told": []}, {"told": 1, "value": 0.5}, {**told(1), "value": "x"}),
    ],
    ids=str,
)
def test_a_line_that_cannot_come_there_is_damage(tmp_path: Path, row: dict[str, Any]) -> None:
    journal = Journal.begin(tmp_path / "j", {})
    for good in ({"asked": 0, "values": {}}, told(0)):
        journal.write(good)
    with open(tmp_path / "j", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError, match=r"j, line 4: not what comes there"):
        Journal(tmp_path / "j")


@pytest.mark.parametrize("lost", ["space", "method", "seed", "trials", "measure", "chosen"])
def test_a_journal_that_lacks_something_is_damage(tmp_path: Path, capsys: Text, lost: str) -> None:
    journal = begun(tmp_path / "s").journal
    del journal.search[lost]
    Journal.begin(journal.path, journal.search)
    assert search.main(["--resume", str(tmp_path / "s")]) == 2
    one_line(capsys, "journal.jsonl is damaged", lost)


# ---- trials in processes of their own ----------------------------------------------------------------------------


def begun(path: Path, method: str = "random", trials: int | None = 4, **values: Any) -> Search:
    """A search of stubs, which is not checked."""
    space = space_of(**{"data": "glyphs:Hebrew", "lr": LR, "epochs": [1, 5], **values})
    path.mkdir()
    search = {"method": method, "seed": 0, "trials": trials, "measure": "accuracy", "notes": [], "chosen": {}}
    return opened(path, Journal.begin(path / "journal.jsonl", {"space": space.plain(), **search}))


def opened(path: Path, journal: Journal | None = None) -> Search:
    journal = journal or Journal(path / "journal.jsonl")
    space = dict(journal.search["space"])
    return Search(path, journal, made(space.pop("command"), AdaptConfig, space, origin="journal"))


def go_on(search: Search, *, workers: int = 2, **more: Any) -> Search:
    search.run(workers=workers, seconds=more.pop("seconds", None), launch=STUB, **more)
    return search


def work(search: Search, number: int) -> list[str]:
    return (search.folder(number).path / "work").read_text().split()


def test_trials_are_judged_on_validation_and_the_winner_alone_is_tested(tmp_path: Path, capsys: Text) -> None:
    search = begun(tmp_path / "s", "grid", None, lr=[0.5, 0.02, 0.03], epochs=[1, 2, 3])
    assert search.trials == 9
    go_on(search)
    told = search.journal.told
    assert sorted(told) == list(range(9))
    # Of the draws 0.1 is lost in one: the mean of both, in the epoch of the lowest validation loss.
    assert [told[n]["value"] for n in (0, 3, 6)] == pytest.approx([0.51 - 0.05, 0.99 - 0.05, 0.98 - 0.05])
    assert told[3]["loss"] == 1.0 and told[3]["seconds"] == 1.5
    for number in (1, 4, 7):
        assert (told[number]["status"], told[number]["message"]) == (2, "epochs: two are too few")
    for number in (2, 5, 8):
        assert (told[number]["status"], told[number]["message"]) == (0, "it has no validation figure")
    assert search.order() == [3, 6, 0]
    for number in (0, 6):  # what nobody may look at
        (search.folder(number).path / "result.json").write_text("{")
    result = finish(search)
    said = capsys.readouterr().out
    assert result["best"]["test"] == {"accuracy": 0.25 + 0.02, "ci95": 0.125} and result["failed"] == 6
    assert "test accuracy 27.00 % ± 12.50 % (95 % interval), of this trial alone" in said and "12.34" not in said
    assert "two are too few" in said and "validation accuracy 94.00 %, the best of 3" in said
    best = read_toml(search.path / "best.toml")
    assert best == {"data": "glyphs:Hebrew", "lr": 0.02, "epochs": 1}
    run = read_toml(search.path / "trials" / "0003.toml")
    assert run == {**best, "probe": False, "random": False, "report": False}
    assert sorted(p.name for p in (search.path / "plots").iterdir()) == ["history.png", "settings.png"]
    assert json.loads((search.path / "result.json").read_text())["trials"][3]["values"] == {"lr": 0.02, "epochs": 1}


def test_equal_values_are_told_apart_by_the_loss_and_then_by_the_number(tmp_path: Path) -> None:
    search = begun(tmp_path / "s")
    for number in range(4):
        search.journal.write({"asked": number, "values": {"lr": 0.1, "epochs": 1}})
    for row in (told(2, 0.5, 2.0), told(0, 0.5, 3.0), told(3, 0.4, 0.1), told(1, 0.5, 2.0)):
        search.journal.write(row)
    assert search.order() == [1, 2, 0, 3]
    search.measure = "rmse"
    assert search.order() == [3, 1, 2, 0]


def test_what_was_chosen_once_is_chosen_for_all_trials(tmp_path: Path) -> None:
    search = begun(tmp_path / "s")
    search.journal.search["chosen"] = {"init": "none"}
    search.journal.write({"asked": 0, "values": {"lr": 0.5, "epochs": 1}})
    again = Search(search.path, search.journal, space_of(data="glyphs:Hebrew", lr=LR, epochs=[1, 5]))
    (tmp_path / "best.toml").write_text(again.toml(0))
    assert read_toml(tmp_path / "best.toml") == {"data": "glyphs:Hebrew", "init": "none", "lr": 0.5, "epochs": 1}


def test_a_killed_trial_goes_on_once(tmp_path: Path) -> None:
    search = go_on(begun(tmp_path / "s", "grid", None, lr=[0.02], epochs=[4, 1]))
    assert [search.journal.told[n]["status"] for n in (0, 1)] == [0, 0]
    assert work(search, 0) == ["0", "1", "2"]


def test_a_command_stops_when_the_search_has_ended() -> None:
    code = (
        "import sys, time, types; from metaft.trials import worker; fake = types.ModuleType('metaft.fake');"
        "fake.main = lambda argv: print(*argv, flush=True) or time.sleep(60); sys.modules['metaft.fake'] = fake;"
        "worker.main(['fake', 'a', 'b'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"a b\n" and process.poll() is None
    process.stdin.close()
    assert process.wait(30) == -signal.SIGTERM
    process.stdout.close()


def test_a_trial_that_is_killed_each_time_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, ended = begun(tmp_path / "s"), []
    monkeypatch.setattr(processes, "LOOK_EVERY", 0.01)
    kill = (sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)")
    given = [Trial(0, [], tmp_path / "log", tmp_path / "none" / "lock")]
    processes.run_all(lambda: given.pop() if given else None, lambda *of: ended.append(of), workers=1, launch=kill)
    assert ended == [(0, -9)]
    search.journal.write({"asked": 0, "values": {"lr": 0.1, "epochs": 1}})
    search.method.ask(0)
    search._ended(0, -9)
    assert search.journal.told[0]["message"] == "killed by signal 9"
    with pytest.raises(TrialsFailed, match=r"none of 1 trials came to a figure; trial 0: killed by signal 9"):
        finish(search)


def test_no_trial_begins_after_the_time_is_up(tmp_path: Path, capsys: Text) -> None:
    search = go_on(begun(tmp_path / "s"), seconds=1e-9)
    assert len(search.journal.told) == 1  # one at least
    assert len(go_on(opened(search.path), seconds=1e-9).journal.told) == 1
    finish(search, workers=2)
    assert (
        f"1 of 4 trials; more: python -m metaft.search --resume {search.path} --workers 2\n" in capsys.readouterr().out
    )
    assert len(go_on(opened(search.path)).journal.told) == 4


def test_a_signal_stops_all_and_the_search_goes_on(tmp_path: Path) -> None:
    search = begun(tmp_path / "s", trials=5)

    def should_stop() -> None:  # however fast the machine is: in the middle
        if search.journal.told and [*search.journal.pending()]:
            raise Interrupted("stopped", signal.SIGTERM)

    with pytest.raises(Interrupted):
        go_on(search, should_stop=should_stop)
    assert 0 < len(search.journal.told) < 5 and [*search.journal.pending()]
    whole = go_on(opened(search.path))
    check_each_once(whole, 5)
    never_stopped = go_on(begun(tmp_path / "t", trials=5))
    assert whole.journal.asked == never_stopped.journal.asked
    values = [{n: row["value"] for n, row in s.journal.told.items()} for s in (whole, never_stopped)]
    assert values[0] == values[1]


def check_each_once(search: Search, trials: int) -> None:
    assert sorted(search.journal.asked) == sorted(search.journal.told) == list(range(trials))
    assert len(search.journal.events) == len({*search.journal.events}) == 2 * trials
    assert all(row["status"] == 0 for row in search.journal.told.values())
    assert [work(search, number) for number in range(trials)] == [["0", "1", "2"]] * trials


@pytest.mark.slow
def test_20_kills_with_two_workers_lose_nothing(tmp_path: Path) -> None:
    trials, kills, wait = 24, 0, random.Random(0)
    path = begun(tmp_path / "s", trials=trials).path
    while kills < 20:
        child = os.fork()
        if child == 0:
            try:
                go_on(opened(path))
            finally:
                os._exit(0)
        time.sleep(wait.uniform(0.02, 0.5))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if len(Journal(path / "journal.jsonl").told) > trials - 3:  # still something to kill
            journal = Journal(path / "journal.jsonl")
            trials += 6
            journal.write({"trials": trials})
    check_each_once(go_on(opened(path)), trials)


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in this process, one after the other, without pictures."""

    def run_all(following: Callable[[], Trial | None], ended: Callable[[int, int], None], **_: Any) -> None:
        while (trial := following()) is not None:
            command = {"adapt": adapt, "meta_train": meta_train}[trial.words[0]]
            ended(trial.number, command.main(trial.words[1:]))

    monkeypatch.setattr(searching, "run_all", run_all)
    for part in ("runs.report", "finetune.report", "trials.report"):
        monkeypatch.setattr(f"metaft.{part}.draw_pictures", lambda *_: [])


@pytest.mark.usefixtures("_here")
def test_a_run_from_best_toml_comes_to_the_same(in_tmp: Path, capsys: Text) -> None:
    tiny = {**SINUSOID, "iterations": 2, "eval_every": 1, "eval_episodes": 4, "test_episodes": 4}
    space = {"command": "meta_train", **tiny, "outer_lr": LR, "inner_optimizer": ["sgd", "momentum"]}
    result = search.run(space, SearchConfig(trials=3, out="s"))
    assert result["measure"] == "mse" and len(result["trials"]) == 3
    assert result["best"]["validation"]["mse"] == min(trial["value"] for trial in result["trials"])
    assert meta_train.main(["--config", "s/best.toml", "--out", "again"]) == 0
    again = OVER["meta_train"].validated(searching.RunFolder(Path("again")))
    assert again.value == result["best"]["validation"]["mse"]
    assert json.loads(Path("again/result.json").read_text())["test"]["transductive"]["mse"] == pytest.approx(
        result["best"]["test"]["mse"]
    )
    # Going on where all is done says the same again, and more trials follow the same stream.
    assert search.run(None, SearchConfig(resume="s"))["trials"] == result["trials"]
    more = search.run(None, SearchConfig(resume="s", trials=4))
    assert more["trials"][:3] == result["trials"] and len(more["trials"]) == 4
    capsys.readouterr()
    assert search.main(["--resume", "s", "--trials", "2"]) == 2
    one_line(capsys, "trials must be at least the 4 already begun, got 2")


@pytest.mark.usefixtures("_here")
def test_images_of_validation_choose_and_those_of_the_test_do_not(in_tmp: Path, capsys: Text) -> None:
    data = write_target(in_tmp / "data", {"train": 10, "test": 2})
    Path("s.toml").write_text('init = "none"\nlr = [0.03, 0.003]\n')
    words = ["s.toml", "--data", "folder:data", "--epochs", "2", "--device", "cpu", "--method", "grid", "--out", "s"]
    assert search.main([*words, "--seeds", "2"]) == 0
    result = json.loads(Path("s/result.json").read_text())
    assert len(result["trials"]) == 2 and result["failed"] == 0 and result["notes"] == []
    number = result["best"]["number"]
    rows = [json.loads(line) for line in Path(f"s/trials/{number:04d}/metrics.jsonl").read_text().splitlines()]
    kept = [min((r for r in rows if r["draw"] == draw), key=lambda r: r["val_loss"]) for draw in (0, 1)]
    assert result["best"]["validation"]["accuracy"] == np.mean([row["val_accuracy"] for row in kept])
    assert result["space"]["data"] == f"folder:{data}"
    capsys.readouterr()
    assert search.main(words) == 2
    one_line(capsys, "out: s is a search already", "--resume s")
    for changed, parts in {"--epochs 3": ["space", "another --out"], "--search-seed 3": ["search_seed", "3"]}.items():
        assert search.main([*words, "--seeds", "2", *changed.split(), "--auto-resume"]) == 2
        one_line(capsys, *parts)
    assert search.main([*words, "--seeds", "2", "--auto-resume"]) == 0


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("--lr 0.1", ["lr", "s.toml searches it", "0.1"]),
        ("--epochs 0", ["epochs must be at least 1"]),
        ("--strategy heda", ["strategy", "'heda'"]),
        ("--strategy chosen", ["strategy", "'chosen'"]),
        ("--shots-per-class 3", ["patience", "fewer than 10 images"]),
        ("--soup 2", ["soup: "]),
        ("--method tpo", ["method", "'tpe'"]),
        ("--resume x", ["space", "--resume"]),
        ("--auto-resume", ["auto_resume", "--out"]),
        ("--iterations 3", ["--iterations"]),
    ],
)
def test_what_no_trial_can_be_judged_by_is_one_line(in_tmp: Path, capsys: Text, more: str, parts: list[str]) -> None:
    write_target(in_tmp / "data", {"train": 10, "test": 2})
    Path("s.toml").write_text('init = "none"\nlr = [0.03, 0.003]\n')
    assert search.main(["s.toml", "--data", "folder:data", *more.split()]) == 2
    one_line(capsys, *parts)
    assert sorted(p.name for p in in_tmp.iterdir()) == ["data", "s.toml"]


def test_a_search_is_for_one_target(in_tmp: Path, capsys: Text) -> None:
    write_target(in_tmp / "data", {"train": 10, "test": 2})
    Path("s.toml").write_text('init = "none"\nlr = [0.03, 0.003]\nalso = ["folder:other"]\n')
    assert search.main(["s.toml", "--data", "folder:data", "--out", "s"]) == 2
    one_line(capsys, "also: a search is for one target", "other)")
    assert not Path("s").exists()


@pytest.mark.usefixtures("_here")
def test_a_first_trial_whose_settings_do_not_go_together_ends_no_search(in_tmp: Path) -> None:
    write_target(in_tmp / "data", {"train": 10, "test": 2})
    Path("s.toml").write_text('init = "none"\nstrategy = ["full", "head"]\nfreeze = ["backbone", "none"]\nepochs = 1\n')
    Path("s").mkdir()  # as a search that was killed at once leaves it
    words = ["--data", "folder:data", "--method", "grid", "--out", "s", "--auto-resume", "--probe", "None"]
    assert search.main(["s.toml", *words]) == 0
    rows = json.loads(Path("s/result.json").read_text())["trials"]
    assert [row["number"] for row in rows if row["value"] is None] == [0]


def test_tasks_of_validation_are_not_searched(in_tmp: Path, capsys: Text) -> None:
    for text, parts in {
        "ways = [3, 5]": ["ways", "test_ways"],
        'outer_schedule = ["cosine", "plateau"]': ["outer_schedule", "plateau"],
        'algorithm = ["maml", "mamll"]': ["algorithm", "'mamll'"],
        'inner_optimizer = ["adm"]': ["inner_optimizer", "'adm'"],
        "eval_episodes = [3, 5]": ["eval_episodes", "cannot be searched"],
    }.items():
        Path("s.toml").write_text(f'command = "meta_train"\ndataset = "sinusoid"\n{text}\n')
        assert search.main(["s.toml"]) == 2
        one_line(capsys, *parts)
    assert [p.name for p in in_tmp.iterdir()] == ["s.toml"]


def test_paths_hold_from_any_folder(in_tmp: Path) -> None:
    space = in_full(space_of(data="folder:x", init=["none", "runs/a"], lr=[0.1], extra=[["distil:teacher=t"], []]))
    assert space.fixed["data"] == f"folder:{in_tmp}/x"
    assert space.searched[0].values == ("none", f"{in_tmp}/runs/a")
    assert space.searched[2].values == ((f"distil:teacher={in_tmp}/t",), ())
    assert as_given(space, {"init": "none", "lr": 0.1, "extra": []}) == {"init": "none", "lr": 0.1, "extra": ()}


def test_a_folder_that_is_no_search_is_one_line(in_tmp: Path, capsys: Text) -> None:
    Path("x").mkdir()
    assert search.main(["--resume", "x"]) == 2
    one_line(capsys, "resume", "x is no folder of a search")
    write_atomically(Path("x/journal.jsonl"), b'{"step": 1}\n')
    assert search.main(["--resume", "x"]) == 2
    one_line(capsys, "not the journal of a search")
    assert search.main(["--lr", "1"]) == 2
    assert search.main([]) == 2
    assert "SPACE.toml is missing" in capsys.readouterr().err


# ---- pictures and words -------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"number": 1, "value": 0.5, "at": 400.0, "values": {"lr": 0.1, "head": "linear", "epochs": 3}},
    {"number": 0, "value": None, "at": 500.0, "values": {"lr": 0.2, "head": "cosine", "epochs": 4}},
    {"number": 2, "value": 0.4, "at": 600.0, "values": {"lr": 0.3, "head": "cosine", "epochs": 5}},
    {"number": 3, "value": 0.7, "at": 900.0, "values": {"lr": 0.4, "head": "linear", "epochs": 6}},
]


def points(line: Any) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def test_pictures_have_the_best_so_far_and_each_setting() -> None:
    first, second = history_figure(ROWS, "accuracy", higher=True).axes
    assert points(first.lines[1]) == [[1, 0.5], [3, 0.5], [4, 0.7]]
    assert [x for x, _ in points(second.lines[1])] == pytest.approx([400 / 60, 10, 15])
    assert second.get_xlabel() == "minutes" and [x for x, _ in points(first.lines[2])] == [2]
    lowest = history_figure(ROWS, "rmse", higher=False).axes[0].lines[1]
    assert [y for _, y in points(lowest)] == [0.5, 0.4, 0.4]
    panels = settings_figure(ROWS, "accuracy", {"lr": True, "head": False, "epochs": False}, best=3).axes
    assert [panel.get_xlabel() for panel in panels] == ["lr", "head", "epochs"]
    assert panels[0].get_xscale() == "log" and panels[1].get_xscale() == "linear"
    assert [x for x, _ in points(panels[0].lines[0])] == [0.1, 0.3, 0.4]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["cosine", "linear"]
    assert [points(panel.lines[1]) for panel in panels] == [[[0.4, 0.7]], [[1, 0.7]], [[6, 0.7]]]


def test_the_table_has_the_best_first_and_what_failed_last(tmp_path: Path) -> None:
    search = begun(tmp_path / "s", extra=[[], ["mixup"]])
    for number in range(3):
        search.journal.write({"asked": number, "values": {"lr": 0.1 + number, "epochs": 1, "extra": ["mixup"]}})
    for row in (told(2, None, None, message="why"), told(0, 0.25), told(1, 0.5)):
        search.journal.write(row)
    assert report.table(search) == [
        ["trial", "accuracy", "loss", "time", "lr", "epochs", "extra", ""],
        ["1", "50.00 %", "1", "0:01", "1.1", "1", "mixup", ""],
        ["0", "25.00 %", "1", "0:01", "0.1", "1", "mixup", ""],
        ["2", "failed", "", "0:01", "2.1", "1", "mixup", "why"],
    ]


def test_the_settings_are_those_of_the_commands() -> None:
    assert OVER.keys() == search.ARGUMENTS.keys() == CONFIGS.keys()
    assert {"adapt": AdaptConfig, "meta_train": MetaTrainConfig} == CONFIGS
