"""The benchmarks over the whole family: sine waves, and what a meta-step costs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_float64, one_thread

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import family, sinusoid
from benchmarks.peers import child
from benchmarks.peers.workloads import WORKLOADS, Options, draw_params
from metaft import algorithms, engines, models
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.options import flat

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    with one_thread():
        yield


def test_every_member_is_measured_on_curves_or_has_a_reason() -> None:
    fit, others = sinusoid.members()
    assert {*fit, *others} == set(ALGORITHMS)
    assert {"maml", "fomaml", "anil", "boil", "meta-sgd"} <= set(fit)
    assert "cannot learn a data set whose loss is 'mse'" in others["protonet"]


def test_members_learn_curves_as_the_paper_does_or_by_settings_of_their_own_that_are_named() -> None:
    of_paper = sinusoid.config_of("maml", 5, sinusoid.Settings(3, 6, 0), Path("x"))
    shown = (
        of_paper.inner.inner_steps,
        of_paper.inner.inner_lr,
        of_paper.task.meta_batch,
        of_paper.task.query_shots,
        of_paper.learner.width,
    )
    assert shown == (1, 0.01, 25, 5, 40)
    assert (of_paper.outer.outer_optimizer, of_paper.outer.outer_lr, of_paper.outer.outer_schedule) == (
        "adam",
        1e-3,
        "constant",
    )
    for name in sinusoid.members()[0]:
        config = sinusoid.config_of(name, 5, sinusoid.Settings(3, 6, 0), Path("x"))
        differ = {k for k, v in flat(config).items() if v != flat(of_paper)[k]} - {"algorithm"}
        own = sinusoid.OWN.get(name, {})
        assert differ == {*own.get("settings", {}), *(["query_shots"] if "points" in own else [])}
        assert not own or own["source"]
    assert sinusoid.config_of("reptile", 10, sinusoid.Settings(3, 6, 0), Path("x")).task.query_shots == 40


def test_unicorn_maml_of_one_output_is_maml() -> None:
    """Why it has no row of its own."""
    from metaft import outer
    from metaft.tasks import Sinusoid

    model = models.build("mlp", ways=1, shape=(1,), width=8, seed=0, dtype=torch.float64)
    tasks = Sinusoid().source(shots=5, query_shots=5).episodes(0, "train", range(3))
    tasks = type(tasks)(*(t.double() if t.is_floating_point() else t for t in tasks))
    found = []
    for name in ("unicorn-maml", "maml"):
        member = algorithms.build(name, model, {"loss": "mse", "inner_lr": 0.01, "inner_steps": 2})
        meta, state = member.init(0)
        with engines.engine("threads", threads=1) as engine:
            found.append(outer.meta_gradient(engine, member, meta, state, tasks).grads)
    assert found[0].keys() == found[1].keys()
    assert all(g.any() and torch.equal(found[0][k], g) for k, g in found[1].items())


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # at the strength of its paper, undamped
@pytest.mark.parametrize("name", sinusoid.members()[0])
@pytest.mark.slow
def test_every_member_with_an_inner_loop_learns_curves(name: str) -> None:
    """The training loss of a fixed meta-batch goes down."""
    from metaft import outer
    from metaft.tasks import Sinusoid

    single, model = (
        models.build("mlp", ways=1, shape=(1,), width=8, seed=0, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for k, p in single.params.items():  # from a start of which all members learn, iMAML least: to 0.82
        model.params[k].copy_(p)
    own = {"strength": 2.0, "damping": 0.0} if name == "imaml" else {}
    member = algorithms.build(name, model, {"loss": "mse", "inner_lr": 0.01, **own})
    meta, state = member.init(0)
    with in_float64():
        tasks = Sinusoid().source(shots=5, query_shots=5).episodes(0, "train", range(8))
    adam = torch.optim.Adam(meta.values(), lr=1e-2)
    losses = []
    with engines.engine("vmap") as engine:
        for step in range(30):
            found = outer.meta_gradient(engine, member, meta, state, tasks, step=step)
            for k, p in meta.items():
                p.grad = found.grads[k]
            adam.step()
            state = found.state
            losses.append(found.metrics["mse"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_the_sinusoid_table_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    monkeypatch.setattr(sinusoid, "WIDTH", 4)
    out = tmp_path / "curves.json"
    argv = ["--iterations", "3", "--episodes", "6", "--out", str(out), "--shots", "5"]
    assert sinusoid.main([*argv, "--members", "maml"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert sinusoid.main([*argv, "--members", "maml", "anil", "pre-training", "--shots", "5", "10"]) == 0
    results = json.loads(out.read_text())
    assert results["rows"][0] == first[0]
    pairs = [("maml", 5), ("maml", 10), ("anil", 5), ("anil", 10), ("pre-training", 5), ("pre-training", 10)]
    assert [(row["member"], row["shots"]) for row in results["rows"]] == pairs
    for row in results["rows"]:
        assert len(row["mse"]) == len(row["ci95"]) == 11
    maml = json.loads((tmp_path / "maml-5/result.json").read_text())
    assert first[0]["mse"] == maml["test"]["transductive"]["mse_per_step"]
    assert results["rows"][-1]["inner_lr"] in sinusoid.RATES
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[5].startswith(f"| `maml` | 5 | {first[0]['mse'][0]:.3f} ± ")
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert sinusoid.main([*argv[:1], "4", *argv[2:]]) == 2
    assert "holds figures of {'iterations': 3" in capsys.readouterr().err
    # A run that was stopped goes on from its checkpoint.
    config = (tmp_path / "anil-5/config.toml").read_text()
    assert 'outer_schedule = "constant"' in config
    results["rows"] = [row for row in results["rows"] if row["member"] != "anil"]
    out.write_text(json.dumps(results))
    assert sinusoid.main([*argv, "--members", "anil"]) == 0
    assert "resuming" in capsys.readouterr().err


def test_a_row_of_other_settings_is_not_taken_for_one_of_these(tmp_path: Path, capsys: Text) -> None:
    out = tmp_path / "curves.json"
    row = {"member": "cavia", "shots": 5, "mse": [1.0] * 11, "ci95": [0.1] * 11}  # of before cavia had its own
    out.write_text(json.dumps({"rows": [row], "settings": {"iterations": 3, "episodes": 6, "seed": 0}}))
    argv = ["--iterations", "3", "--episodes", "6", "--out", str(out), "--shots", "5", "--members", "cavia"]
    assert sinusoid.main(argv) == 2
    assert "holds a row of cavia with other settings than it has now" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes half a minute: make test-faults")
@pytest.mark.slow
def test_rows_in_processes_of_their_own(tmp_path: Path, capsys: Text) -> None:
    out = tmp_path / "curves.json"
    argv = ["--iterations", "3", "--episodes", "6", "--out", str(out), "--shots", "5", "--jobs", "2"]
    assert sinusoid.main([*argv, "--members", "pre-training", "cavia"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["member"] for row in rows] == ["cavia", "pre-training"]
    assert rows[0]["own"]["settings"]["inner_lr"] == 1.0
    table = out.with_suffix(".md").read_text()
    assert "| `cavia` * | 5 |" in table
    assert "- * `cavia`: inner_lr 1.0, hyper context=5 (its authors' code" in table
    # One that fails does not keep the others from being measured.
    (tmp_path / "anil-5").mkdir()
    (tmp_path / "anil-5/config.toml").write_text("shots = 6")
    capsys.readouterr()
    assert sinusoid.main([*argv, "--members", "anil", "boil"]) == 2
    assert "anil-5: sinusoid: " in capsys.readouterr().err
    assert "boil" in [row["member"] for row in json.loads(out.read_text())["rows"]]


def test_pre_training_learns_the_mean_curve() -> None:
    """It knows nothing of a task before the first step, and adapts worse than it could: the paper's point."""
    row = sinusoid.pre_trained(10, sinusoid.Settings(iterations=150, episodes=100, seed=0))
    assert row["mse"][0] < 5
    assert row["mse"][-1] < row["mse"][0]


@pytest.mark.filterwarnings("ignore:imaml. I . H / strength is not positive definite")
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_member_takes_the_workload(name: str) -> None:
    workload = WORKLOADS["tiny"]
    grads = child.meta_gradient("metaft-member", workload, Options(algorithm=name))
    assert {k: g.shape for k, g in grads.items()} == {k: p.shape for k, p in draw_params(workload).items()}
    assert any(float(g.abs().max()) > 0 for g in grads.values())
    if name == "maml":
        hyper: Any = hyper_parameters("maml")
        same = dataclasses.replace(workload, inner_lr=hyper["inner_lr"])
        expected = child.meta_gradient("plain", same, Options())
        assert all(torch.allclose(grads[k], expected[k], rtol=1e-9, atol=1e-12) for k in grads)
    if name == "unicorn-maml":  # 1 and 5 steps
        own = child.meta_gradient("metaft-member", workload, Options(algorithm=name, own_steps=True))
        member = hyper_parameters(name)["inner_steps"]
        same = dataclasses.replace(workload, inner_steps=member)  # type: ignore[arg-type]
        expected = child.meta_gradient("metaft-member", same, Options(algorithm=name))
        assert workload.inner_steps != member
        assert all(torch.equal(own[k], expected[k]) for k in own)
        assert any(not torch.equal(own[k], grads[k]) for k in own)


@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes half a minute: make test-faults")
@pytest.mark.slow
def test_costs_of_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    monkeypatch.setattr(family, "BASE", WORKLOADS["tiny"])
    out = tmp_path / "family.json"
    argv = ["--members", "protonet", "cavia", "--threads", "1", "--engine", "threads", "--seconds", "0.1"]
    assert family.main([*argv, "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["members"]
    assert list(found) == ["maml", "protonet", "cavia", "cavia, 2 steps"]
    assert [own["inner_steps"] for own in found.values()] == [1, None, 1, 2]
    assert found["maml"]["relative_to_maml"] == 1
    assert all(own["n"] >= 2 and own["ms"]["median"] > 0 for own in found.values())
    rows = out.with_suffix(".md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    table = [row for row in cells if len(row) == 7][2:]
    assert [row[:2] for row in table] == [["`maml`", "1"], ["`protonet`", "-"], ["`cavia`", "1"], ["`cavia`", "2"]]
    assert table[0][5] == "1.00"
    pasted = {row[0]: row[1:] for row in cells[-3:]}
    assert list(pasted) == ["`maml`", "`protonet`", "`cavia`"]
    assert pasted["`maml`"] == [table[0][6], "1.00"]
    assert pasted["`cavia`"] == [table[3][6], f"{table[3][5]} ({table[2][5]})"]
    capsys.readouterr()
    assert family.main(["--seconds", "0"]) == 2
    assert capsys.readouterr().err == "family: seconds must be above 0, got 0.0\n"
