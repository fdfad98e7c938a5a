"""Several targets on one backbone: how their gradients are combined, and that a fit does what the formulas say."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import adapted, one_line, options, write_target
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor

from metaft import adapt, load, look
from metaft.config import AdaptConfig, LookConfig, read_toml
from metaft.errors import Interrupted, MetaftError
from metaft.finetune import strategies
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.journal import Journal
from metaft.finetune.lessons import Labelled, Turn, turns
from metaft.finetune.states import flatten, unflatten
from metaft.finetune.tasks import TASKS, Given, named, orders_of
from metaft.finetune.training import Training, begin
from metaft.settings.finetuning import Recipe
from metaft.views import VIEWS
from metaft.views.base import Missing, Table, View
from metaft.views.checked import check
from metaft.views.subject import open_subject

OTHER = 2
"""Classes of the second target."""


def given(gradients: Tensor, losses: Tensor | None = None, s: Tensor | None = None) -> Given:
    none = gradients.new_zeros(len(gradients))
    orders = orders_of(len(gradients), 5, 7)
    return Given(none if losses is None else losses, gradients, none if s is None else s, orders)


# The rules


def test_two_gradients_in_conflict_lose_what_they_have_against_one_another() -> None:
    """(1, 0) and (-1, 1) by hand: (1, 0) + 1/2 (-1, 1) = (1/2, 1/2), and (-1, 1) + (1, 0) = (0, 1)."""
    combined = TASKS["pcgrad"].combine(given(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])))
    torch.testing.assert_close(combined.shared, torch.tensor([0.5, 1.5]))
    assert combined.factors.tolist() == [1, 1]
    assert combined.log_variances.tolist() == [0, 0]


@pytest.mark.parametrize("targets", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_algorithm_1(targets: int, seed: int) -> None:
    gradients = torch.randn(targets, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    asked = given(gradients)._replace(orders=orders_of(targets, seed, 1))
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(targets):
        left = gradients[i].clone()
        for j in asked.orders[i]:
            cosine = F.cosine_similarity(left, gradients[j], dim=0)
            if cosine < 0:
                left = left - cosine * left.norm() * gradients[j] / gradients[j].norm()
            if targets == 2:
                assert float(left @ gradients[j]) >= -1e-12
        total += left
    torch.testing.assert_close(TASKS["pcgrad"].combine(asked).shared, total)


def test_without_a_conflict_it_is_the_sum() -> None:
    gradients = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients[2] = 0  # a target that has nothing to learn any more
    torch.testing.assert_close(TASKS["pcgrad"].combine(given(gradients)).shared, gradients.sum(0))
    assert torch.equal(TASKS["sum"].combine(given(gradients)).shared, gradients.sum(0))


def test_orders_are_those_of_the_others_and_all_of_them_come() -> None:
    seen = [tuple(map(tuple, orders_of(3, 0, step))) for step in range(60)]
    assert {orders[1] for orders in seen} == {(0, 2), (2, 0)}
    assert len(set(seen)) == 8
    assert seen == [tuple(map(tuple, orders_of(3, 0, step))) for step in range(60)]
    assert seen != [tuple(map(tuple, orders_of(3, 1, step))) for step in range(60)]


def test_uncertainty_is_the_gradient_of_its_loss() -> None:
    """By central differences of sum exp(-s) L + s / 2, in one shared number, each head and each s."""
    s = torch.tensor([0.3, -0.7], dtype=torch.float64)
    shared, heads = torch.tensor(0.4, dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64)

    def losses(shared: Tensor, heads: Tensor) -> Tensor:
        return torch.stack([(shared * heads[0] - 1) ** 2, (shared + heads[1] * 2).exp()])

    def total(shared: Tensor, heads: Tensor, s: Tensor) -> float:
        return float(((-s).exp() * losses(shared, heads) + s / 2).sum())

    jacobian = torch.func.jacrev(losses, argnums=(0, 1))(shared, heads)
    combined = TASKS["uncertainty"].combine(given(jacobian[0][:, None], losses(shared, heads), s))
    h = 1e-6
    by_shared = (total(shared + h, heads, s) - total(shared - h, heads, s)) / (2 * h)
    assert combined.shared.item() == pytest.approx(by_shared, rel=1e-6)
    for i, step in enumerate(torch.eye(2, dtype=torch.float64) * h):
        by_s = (total(shared, heads, s + step) - total(shared, heads, s - step)) / (2 * h)
        assert combined.log_variances[i].item() == pytest.approx(by_s, rel=1e-6)
        by_head = (total(shared, heads + step, s) - total(shared, heads - step, s)) / (2 * h)
        assert (combined.factors[i] * jacobian[1][i, i]).item() == pytest.approx(by_head, rel=1e-6)


def test_names_are_those_of_the_dict() -> None:
    assert named("pcgrad") is TASKS["pcgrad"]
    with pytest.raises(MetaftError, match=r"tasks: .*mean.*sum"):
        named("mean")


# Steps


def labelled(n: int, seed: int = 0, classes: int = CLASSES, val: int = 0) -> Labelled:
    images, labels = toy(n, seed)
    some, theirs = (None, None) if not val else toy(val, seed + 100)
    return Labelled(INPUTS, images, labels % classes, classes, some, None if theirs is None else theirs % classes)


def begun(way: str | None, *targets: Labelled, **changes: Any) -> Training:
    recipe = Recipe(**{"epochs": 1, "batch_size": 8, "lr": 0.1, "optimizer": "sgd", **changes})
    first, *also = targets
    tasks = None if way is None else named(way)
    strategy = strategies.named(recipe.trains)
    return begin(body(dtype=torch.float64), first, recipe, strategy, (), 3, also=also, tasks=tasks)


def stepped(training: Training, *batches: Turn) -> dict[str, Tensor]:
    """How far each parameter moved in one step."""
    orders = orders_of(len(batches), 3, 0)
    training.step(batches, training.rates(0), training.recipe.rate, on_features=False, orders=orders)
    return {name: p.detach() - training.start[name] for name, p in training.model.named_parameters()}


def first_turn(training: Training, which: int = 0) -> Turn:
    return next(turns(len(training.lessons[which].train), training.recipe, 3, 0, training.per_epoch))


def test_the_sum_of_two_equal_targets_moves_the_backbone_twice_as_far() -> None:
    alone, twice = begun(None, labelled(16)), begun("sum", labelled(16), labelled(16))
    one = stepped(alone, first_turn(alone))
    two = stepped(twice, first_turn(twice), first_turn(twice, 1))
    for name, moved in one.items():
        factor = 2 if name.startswith("body.") else 1
        torch.testing.assert_close(two[name], factor * moved, msg=name)
        if name.startswith("head."):
            torch.testing.assert_close(two[name.replace("head.", "also.0.")], moved, msg=name)
    assert max(float(moved.abs().max()) for name, moved in one.items() if name.startswith("body.")) > 1e-4


@pytest.mark.parametrize("way", TASKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_on_the_gradients_of_each_target(way: str, accumulate: int) -> None:
    """Against the targets' gradients by themselves, which steps of each alone show, and the rule. The backbone has no
    statistics of its batches to take, so that accumulated ones are one batch."""
    targets = labelled(16), labelled(16, 1, OTHER)
    changes = {"batch_size": 8, "accumulate": accumulate}
    together = begun(way, *targets, **changes)
    s = torch.tensor([0.5, -0.3], dtype=torch.float64) * TASKS[way].weighs
    if TASKS[way].weighs:
        for values in (together.model.get_parameter("tasks.s").data, together.start["tasks.s"]):
            values.copy_(s)
    joint = stepped(together, first_turn(together), first_turn(together, 1))
    moved, losses = [], []
    for which, target in enumerate(targets):
        alone = begun(None, target, **changes)
        turn = first_turn(together, which)
        moved.append(stepped(alone, turn))
        again = begun(None, target, **changes)
        [total] = again.step([turn], again.rates(0), 0.1, on_features=False)
        losses.append(total / len(turn.batch))
    shared = [name for name in moved[0] if name.startswith("body.")]
    gradients = torch.stack([-torch.cat([each[name].flatten() for name in shared]) / 0.1 for each in moved])
    combined = TASKS[way].combine(given(gradients, gradients.new_tensor(losses), s)._replace(orders=orders_of(2, 3, 0)))
    torch.testing.assert_close(torch.cat([joint[name].flatten() for name in shared]), -0.1 * combined.shared)
    torch.testing.assert_close(joint["head.weight"], combined.factors[0] * moved[0]["head.weight"])
    torch.testing.assert_close(joint["also.0.weight"], combined.factors[1] * moved[1]["head.weight"])
    if TASKS[way].weighs:
        torch.testing.assert_close(joint["tasks.s"], -0.1 * combined.log_variances)


# Fits


def fitted(way: str, *, also: tuple[Labelled, ...] | None = None, **given: Any) -> Fitted:
    images, labels = toy(20)
    val_images, val_labels = toy(9, 5)
    recipe = Recipe(**{"epochs": 3, "batch_size": 8, "lr": 0.02, **given.pop("changes", {})})
    also = (labelled(9, 1, OTHER, val=6),) if also is None else also
    return fit(
        body(), INPUTS, images, labels, CLASSES, recipe, also=also, together=way, seed=2, val_examples=val_images,
        val_labels=val_labels, **given,
    )  # fmt: skip


def all_bits(made: Fitted) -> dict[str, Tensor]:
    further = [
        {f"further.{n}.{part}.{k}": v for k, v in module.state_dict().items()}
        for n, pair in enumerate(made.further)
        for part, module in zip(("body", "head"), pair, strict=True)
    ]
    return {**bits(made), **dict(itertools.chain.from_iterable(map(dict.items, further)))}


@pytest.mark.parametrize("way", TASKS)
def test_a_fit_goes_on_to_the_same_bytes(way: str) -> None:
    states: list[Any] = []
    changes = {"ema": 0.9}
    whole = fitted(way, on_epoch=states.append, changes=changes)
    assert len(states) == 3
    for state in states[:2]:
        resumed = fitted(way, resume=unflatten(*flatten(state)), changes=changes)
        assert same(all_bits(resumed), all_bits(whole))
        assert resumed.curve == whole.curve
    assert ("log_variances" in whole.trained) == TASKS[way].weighs
    last = whole.curve[-1]
    assert last["loss_sum"] == last["loss"] + last["loss_2"]
    assert whole.kept == min(whole.curve, key=lambda row: row["val_loss"] + row["val_loss_2"])["epoch"]


@pytest.mark.parametrize("strategy", ["head", "full", "lora:rank=2", "lp-ft:share=0.5"])
def test_heads_have_their_own_classes_and_backbones_the_same_weights(strategy: str) -> None:
    made = fitted("sum", changes={"strategy": strategy})
    [(theirs, head)] = made.further
    assert head(theirs(INPUTS(toy(4)[0]))).shape == (4, OTHER)
    parameters = dict(theirs.named_parameters())
    for name, value in made.body.named_parameters():
        assert torch.equal(parameters[name], value), name
    buffers = dict(theirs.named_buffers())
    assert any(not torch.equal(buffers[name], value) for name, value in made.body.named_buffers()), (
        "moments are its own"
    )


def test_a_head_alone_is_what_it_is_without_others() -> None:
    """Nothing is shared that moves; epochs have as many steps as alone, since both have as many images."""
    other = labelled(20, 1, OTHER)
    made = fitted("sum", also=(other,), changes={"strategy": "head"})
    recipe = Recipe(epochs=3, batch_size=8, lr=0.02, strategy="head")
    alone = fit(body(), INPUTS, other.examples, other.labels, OTHER, recipe, seed=2)  # pyright: ignore[reportArgumentType]
    [(theirs, head)] = made.further
    torch.testing.assert_close(head.state_dict(), alone.head.state_dict())
    assert same(dict(theirs.state_dict()), dict(alone.body.state_dict()))


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two targets, of three classes and of two, and one without a test part."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "first": write_target(folder / "first", {"train": 4, "test": 3}),
        "second": write_target(folder / "second", {"train": 3, "test": 3}, classes=("x", "y")),
        "whole": write_target(folder / "whole", {".": 4}, classes=("x", "y")),
        "many": write_target(folder / "many", {"train": 10, "test": 1}, classes=("x", "y")),
    }


def run(data: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "data": f"folder:{data['first']}", "also": (f"folder:{data['second']}",), "init": "none", "image_size": 8,
        "epochs": 2, "lr": 0.05, "batch_size": 8, "seeds": 2, "device": "cpu", "report": False, "tasks": "uncertainty",
        "out": str(out),
    }  # fmt: skip
    return adapt.run(AdaptConfig(**{k: v for k, v in {**settings, **changes}.items() if v is not None}))


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def done(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    run(data, out)
    return out


def test_a_run_has_a_classifier_and_a_paired_gain_for_each_target(done: Path, data: dict[str, Path]) -> None:
    result = json.loads((done / "result.json").read_text())
    assert [start["name"] for start in result["starts"]] == ["random", "alone"]
    [second] = result["also"]
    assert (second["classes"], second["train_images"], second["test_images"]) == (["x", "y"], 6, 6)
    assert second["gain"]["draws"] == 2
    difference = second["together"]["mean"]["accuracy"] - second["alone"]["mean"]["accuracy"]
    assert second["gain"]["mean"] == pytest.approx(difference)
    assert len(result["starts"][0]["trained"]["log_variances"]) == 2
    for file, name, accuracy in (
        ("classifier.safetensors", "first", result["starts"][0]["accuracy"]),
        (second["file"], "second", second["together"]["accuracy"]),
    ):
        pictures = sorted((data[name] / "test").rglob("*.png"))
        labels = load(done / file).label(pictures)
        right = [label == picture.parent.name for label, picture in zip(labels, pictures, strict=True)]
        assert sum(right) / len(right) == pytest.approx(accuracy), file
    said = (done / "report.txt").read_text()
    assert "2 targets on one backbone (uncertainty, losses weighted at the end by" in said
    assert "classifier-2.safetensors" in said
    assert "A model of this target alone gets" in said


def test_without_snapshots_no_plane_takes_the_joint_classifier_for_one_alone(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/snapshots", ignore_errors=True)
    subject = open_subject(str(tmp_path / "run"))
    subject.landscape = True
    view = VIEWS["landscape"].of(subject)
    assert isinstance(view, Missing) and "no snapshots of its training" in view.why


def test_the_page_has_each_target_and_says_whose_its_pictures_are(done: Path, tmp_path: Path) -> None:
    subject = open_subject(str(done))
    view = VIEWS["targets"].of(subject)
    assert isinstance(view, View)
    assert "2 targets" in view.caption and "pictures, are of the first one, folder:" in view.caption
    [table] = view.parts
    assert isinstance(table, Table)
    first, second = table.rows
    result = subject.result
    (whole, alone), [further] = result["starts"], result["also"]
    for row, name, together, by_itself, gain, file in (
        (first, "first", whole, alone, result["gains"][0], "classifier.safetensors"),
        (second, "second", further["together"], further["alone"], further["gain"], "classifier-2.safetensors"),
    ):
        assert str(row[0]).endswith(name) and row[-1] == file
        figures = [each[key] for each in (together["mean"], by_itself["mean"]) for key in ("accuracy", "ci95")]
        assert list(row[3:-1]) == [*figures, gain["mean"], gain["ci95"], 2]
    assert first[1:3] == [3, 9] and second[1:3] == [2, 6]
    html = look.run(done, LookConfig(out=str(tmp_path / "page.html"))).read_text(encoding="utf-8")
    assert html.index('<section id="targets"') < html.index('<section id="training"')


@pytest.mark.parametrize("path", [("together", "mean", "accuracy"), ("gain", "ci95"), ("alone",), ("file",)])
def test_what_a_result_lacks_of_a_target_is_said(path: tuple[str, ...], done: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    check(result, "result.json")
    [holder] = result["also"]
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    with pytest.raises(MetaftError, match=rf"^result.json: also\[0\].*lacks '{path[-1]}'"):
        check(result, "result.json")


def test_alone_is_a_run_of_that_target(done: Path, data: dict[str, Path], tmp_path: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    alone = run({**data, "first": data["second"]}, tmp_path / "r", also=(), tasks=None)
    assert alone["starts"][0]["mean"] == result["also"][0]["alone"]["mean"]
    assert "also" not in alone


def test_a_run_goes_on_from_anywhere(done: Path, data: dict[str, Path], tmp_path: Path) -> None:
    for epoch in (1, 3):
        out = tmp_path / str(epoch)
        seen = iter(range(epoch))
        with pytest.MonkeyPatch.context() as patch:
            wrapped = Journal.epoch

            def stop(self: Journal, *given: Any, wrapped: Any = wrapped, seen: Any = seen) -> None:
                wrapped(self, *given)
                if next(seen, None) is None:
                    raise RuntimeError("stopped")

            patch.setattr(Journal, "epoch", stop)
            with pytest.raises(RuntimeError, match="stopped"):
                run(data, out)
        adapt.resume_run(out)
        assert adapted(out) == adapted(done)
        assert (out / "classifier-2.safetensors").read_bytes() == (done / "classifier-2.safetensors").read_bytes()


@pytest.fixture
def moved(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A run that was stopped after an epoch and whose further target moved to new/second, and the words that began
    it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METAFT_DATA", raising=False)
    for name in ("first", "second"):
        shutil.copytree(data[name], name)
    words = options({
        "data": "folder:first", "also": "folder:second", "init": "none", "image_size": 8, "epochs": 2, "lr": 0.05,
        "batch_size": 8, "seeds": 2, "device": "cpu", "tasks": "uncertainty", "out": "run",
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        wrapped = Journal.epoch

        def stop(self: Journal, *given: Any) -> None:
            wrapped(self, *given)
            raise Interrupted("stopped", 15)

        patch.setattr(Journal, "epoch", stop)
        assert adapt.main([*words, "--no-report"]) == 143
    Path("new").mkdir()
    Path("second").rename("new/second")
    return tmp_path, [*words, "--no-report"]


@pytest.mark.parametrize("root", ["new", "new/second"])
@pytest.mark.parametrize("again", [False, True], ids=["resume", "auto-resume"])
def test_a_further_target_that_moved_is_found(
    root: str, again: bool, moved: tuple[Path, list[str]], done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, words = moved
    words = [*words, "--auto-resume"] if again else ["--resume", "run"]
    capsys.readouterr()
    assert adapt.main(words) == 2
    one_line(capsys, f"also: folder {base}/second does not exist; where it moved, --data-root names the folder")
    assert adapt.main([*words, "--data-root", root]) == 0
    assert f"{base}/second does not exist; the data are read from {base}/new/second\n" in capsys.readouterr().err
    assert Path("run/metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert read_toml(Path("run/config.toml"))["also"] == [f"folder:{base}/new/second"]
    assert adapt.main(words) == 0, "by now the run knows the place"


def test_what_took_the_place_of_a_further_target_is_refused(
    moved: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = moved
    capsys.readouterr()
    shutil.copytree("first", "other/second")
    assert adapt.main(["--resume", "run", "--data-root", "other"]) == 2
    said = capsys.readouterr().err
    assert f"metaft: error: also: the images of folder:{base}/other/second changed since run began\n" in said
    Path("other/second").rename("second")
    config = AdaptConfig(data=f"folder:{base}/first", also=(f"folder:{base}/x/first",), data_root=str(base))
    with pytest.raises(MetaftError, match=rf"^also: folder:{base}/x/first is found at {base}/first, as another "):
        adapt.run(config)
    assert read_toml(Path("run/config.toml"))["also"] == [f"folder:{base}/second"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "inner", **dict.fromkeys(("epochs", "lr", "batch_size"), None)}, "method"),
    ({"auto": 1.0, "lr": None}, "auto"),
    ({"strategy": "chosen", "lr": None}, "strategy"),
    ({"lr": "auto"}, "lr"),
    ({"soup": 2}, "soup"),
    ({"snapshots": 5}, "snapshots"),
    ({"robust": ("2/255",)}, "robust"),
    ({"compare": ("none",)}, "compare"),
    ({"extra": ("mixup",)}, "extra"),
    ({"loss": "mse"}, "loss"),
]


@pytest.mark.parametrize(("changes", "option"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_several_targets_do_not_go_with_is_said(changes: dict[str, Any], option: str, tmp_path: Path) -> None:
    none = {"first": tmp_path / "a", "second": tmp_path / "b"}
    with pytest.raises(MetaftError, match=rf"^also: several targets do not go with --{option} yet \(given .+\)$"):
        run(none, tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()


def test_targets_that_do_not_fit_together_are_refused(data: dict[str, Path], tmp_path: Path) -> None:
    for changes, said in (
        ({"also": ()}, r"^tasks: it is for several targets.*\(given uncertainty\)$"),
        ({"also": (f"folder:{data['first']}",)}, r"^also: 'folder:.*first' is given twice"),
        ({"also": (f"folder:{data['whole']}",)}, r"^also: without a test part there are folds.*whole"),
        ({"also": (f"folder:{data['many']}",)}, r"^also: .*first has no images to validate with"),
        ({"also": ("folder:gone",)}, r"^also: .*gone"),
    ):
        with pytest.raises(MetaftError, match=said):
            run(data, tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()
