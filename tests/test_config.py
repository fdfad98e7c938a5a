"""Settings: types, bounds and names are checked with the offending value, and TOML holds what the command line does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import pool

from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.config import (
    AdaptConfig,
    EvaluateConfig,
    MetaTrainConfig,
    PredictConfig,
    Settled,
    read_toml,
    to_toml,
)
from metaft.defaults import hyper, resolve
from metaft.errors import MetaftError
from metaft.options import flat, from_mapping, options
from metaft.settings.compute import Compute
from metaft.tasks import Sinusoid


def message(values: dict[str, Any], cls: Any = MetaTrainConfig) -> str:
    with pytest.raises(MetaftError) as caught:
        from_mapping(cls, values, origin="file.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("ways", 0, "at least 1"),
        ("ways", "5", "must be int or nothing"),
        ("ways", 5.0, "must be int or nothing"),
        ("ways", True, "must be int or nothing"),
        ("ways", [5], "must be int or nothing"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "below 2**63"),
        ("eval_seed", 2**63, "below 2**63"),
        ("outer_lr", 0, "above 0"),
        ("outer_lr", "fast", "must be float"),
        ("outer_lr", float("nan"), "finite"),
        ("inner_lr", float("inf"), "finite"),
        ("inner_lr", -0.1, "at least 0"),
        ("clip_norm", 0.0, "above 0"),
        ("clip_value", -1.0, "above 0"),
        ("batch_norm", "inductve", "did you mean 'inductive'"),
        ("outer_schedule", 3, "must be str or nothing"),
        ("rotate", 1, "must be bool or nothing"),
        ("download", "yes", "must be bool"),
        ("device", "gpu", "cuda:N"),
        ("device", "cuda:", "cuda:N"),
        ("channels", 2, "1 or 3"),
        ("dataset", 3, "must be str"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_file_and_rule(field: str, value: object, rule: str):
    said = message({field: value})
    assert said.startswith(f"file.toml: {field} must be")
    assert rule in said
    assert (repr(value) in said) or (str(value) in said)
    assert "\n" not in said


def test_the_smallest_allowed_values_are_taken():
    MetaTrainConfig(ways=1, shots=1, inner_steps=0, inner_lr=0, seed=0, iterations=1, outer_lr=1e-300, channels=3)
    MetaTrainConfig(seed=2**63 - 1, device="cuda:11", outer_lr=1)  # an int where a float is wanted


@pytest.mark.parametrize(
    ("cls", "key", "near"),
    [
        (MetaTrainConfig, "inner_step", "inner_steps"),
        (MetaTrainConfig, "way", "ways"),
        (EvaluateConfig, "episode", "episodes"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(cls: Any, key: str, near: str):
    assert message({key: 1}, cls) == f"file.toml: unknown field {key!r}; did you mean {near!r}?"


def test_a_key_like_no_other_gets_no_suggestion():
    assert message({"zzzzzz": 1}) == "file.toml: unknown field 'zzzzzz'"


CONFIGS = [MetaTrainConfig, EvaluateConfig, AdaptConfig, PredictConfig]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_number_has_a_lower_bound(cls: Any):
    """A field added without one would let a negative number through to torch."""
    for name, field in options(cls).items():
        if {*field.types} & {int, float}:
            assert "must be" in message({name: -1}, cls), name


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_has_one_line_of_help(cls: Any):
    for name, field in options(cls).items():
        assert field.option.help.endswith("."), name
        assert "\n" not in field.option.help, name


def test_settled_is_the_same_list_of_fields():
    assert options(Settled).keys() == options(MetaTrainConfig).keys()


def test_toml_round_trip(tmp_path: Path):
    config = MetaTrainConfig(
        dataset='folder:/tmp/a "b" \\ ü', ways=7, rotate=False, inner_lr=0.1, outer_lr=1, clip_norm=1e-30
    )
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert from_mapping(MetaTrainConfig, read_toml(file), origin="c") == config


def test_toml_keys_may_be_spelt_like_options(tmp_path: Path):
    file = tmp_path / "c.toml"
    file.write_text("inner-steps = 3\nquery_shots = 2\n")
    assert read_toml(file) == {"inner_steps": 3, "query_shots": 2}


@pytest.mark.parametrize(("first", "second"), [("inner-lr", "inner_lr"), ("inner_lr", "inner-lr")])
def test_a_toml_key_in_both_spellings_is_refused(tmp_path: Path, first: str, second: str):
    file = tmp_path / "c.toml"
    file.write_text(f"{first} = 0.5\n{second} = 0.25\n")
    with pytest.raises(MetaftError, match=rf"^{second}: .*c\.toml has it in both spellings, with - and with _$"):
        read_toml(file)


@pytest.mark.parametrize("field", ["out", "plugin", "data_root"])
def test_no_place_is_empty(field: str):
    with pytest.raises(MetaftError, match=f"^{field} must not be empty, got ''$"):
        MetaTrainConfig(**{field: ""})


@pytest.mark.parametrize("text", [b"ways = ", b"\xff\xfe", b"ways = 1\nways = 2", b"[a", b"\x00"])
def test_malformed_toml_is_one_line_that_names_the_file(tmp_path: Path, text: bytes):
    file = tmp_path / "c.toml"
    file.write_bytes(text)
    with pytest.raises(MetaftError, match=r"^config: .*c\.toml is not valid TOML") as caught:
        read_toml(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_toml_that_cannot_be_read(tmp_path: Path, name: str):
    with pytest.raises(MetaftError, match="config: cannot read"):
        read_toml(tmp_path / name)


turned = dataclasses.replace(pool(), default_rotate=True)


def test_defaults_follow_data_set_and_algorithm():
    curve = resolve(MetaTrainConfig(dataset="sinusoid"), Sinusoid())
    assert (curve.task.ways, curve.task.shots, curve.task.query_shots, curve.task.meta_batch) == (1, 10, 10, 25)
    assert (curve.learner.model, curve.learner.width, curve.inner.inner_lr, curve.inner.inner_steps) == (
        "mlp",
        40,
        0.01,
        1,
    )
    assert (curve.test.test_query_shots, curve.test.test_inner_steps) == (100, 10)
    image = resolve(MetaTrainConfig(shots=3), turned)
    assert (image.task.ways, image.task.shots, image.test.test_ways, image.test.test_shots, image.data.rotate) == (
        5,
        3,
        5,
        3,
        True,
    )
    assert (image.learner.model, image.learner.width, image.inner.inner_lr, image.test.test_inner_steps) == (
        "conv4",
        64,
        0.4,
        3,
    )
    proto = resolve(MetaTrainConfig(algorithm="protonet", ways=12), pool(64))
    assert (proto.learner.model, proto.task.meta_batch, proto.test.test_inner_steps) == ("conv4-pool", 4, 0)
    assert (proto.inner.inner_lr, proto.inner.inner_steps) == (None, None)
    for dataset in (Sinusoid(), pool()):
        given = MetaTrainConfig(algorithm="reptile", dataset=dataset.name)
        reptile = resolve(given, dataset)
        assert (reptile.outer.outer_optimizer, reptile.outer.outer_lr, reptile.outer.outer_schedule) == (
            "sgd",
            1.0,
            "linear",
        )
        assert reptile.test.test_inner_steps == 10
        longer = resolve(dataclasses.replace(given, inner_steps=12), dataset)
        assert longer.test.test_inner_steps == 12, "no fewer than in training"
        assert resolve(dataclasses.replace(given, algorithm="cavia"), dataset).inner.inner_lr == 1.0


MINI = ("conv4-pool", 32, 5, 0.01, 10, 4, 15, 1e-3, 10.0)
"""Finn et al. 2017: model, filters, inner steps and rate, steps at test, tasks, queries, outer rate, clip value."""


def mini(config: MetaTrainConfig, dataset: Any, *, custom_model: bool = False) -> tuple[object, ...]:
    s = resolve(config, dataset, custom_model=custom_model)
    inner = (s.inner.inner_steps, s.inner.inner_lr, s.test.test_inner_steps)
    return (
        s.learner.model,
        s.learner.width,
        *inner,
        s.task.meta_batch,
        s.task.query_shots,
        s.outer.outer_lr,
        s.outer.clip_value,
    )


def test_defaults_of_photos_follow_model_and_data():
    assert mini(MetaTrainConfig(), pool(84)) == MINI
    assert mini(MetaTrainConfig(algorithm="fomaml"), pool(33)) == MINI
    assert mini(MetaTrainConfig(model="conv4-pool"), pool()) == MINI, "by the model alone"
    assert mini(MetaTrainConfig(model="conv4"), pool(84)) == ("conv4", 64, *MINI[2:]), "by the data alone"
    assert mini(MetaTrainConfig(), pool(84), custom_model=True)[2:] == MINI[2:], "a module of the user's own"
    assert mini(MetaTrainConfig(), pool(32)) == ("conv4", 64, 1, 0.4, 3, 16, 5, 3e-3, None)
    for shots, tasks in ((4, 4), (5, 2), (6, 2)):
        assert resolve(MetaTrainConfig(shots=shots), pool(84)).task.meta_batch == tasks
    given = MetaTrainConfig(
        width=8, inner_steps=2, inner_lr=0.3, test_inner_steps=4, meta_batch=3, query_shots=2, outer_lr=0.1,
        clip_value=7.0,
    )  # fmt: skip
    assert mini(given, pool(84)) == ("conv4-pool", 8, 2, 0.3, 4, 3, 2, 0.1, 7.0), "what the user sets wins"
    assert mini(MetaTrainConfig(clip_norm=1.0), pool(84))[-1] is None, "one clipping, the user's"


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_what_members_say_of_themselves_holds_for_photos_too(name: str):
    small, photos = (resolve(MetaTrainConfig(algorithm=name), pool(side)) for side in (28, 84))
    assert (photos.task.meta_batch, photos.task.query_shots, photos.learner.width) == (4, 15, 32)
    kept = {
        "reptile": ("inner_lr", "inner_optimizer", "outer_optimizer", "outer_lr", "outer_schedule", "test_inner_steps"),
        "cavia": ("inner_lr", "inner_steps", "test_inner_steps"),
        "imaml": ("inner_steps", "test_inner_steps"),
        "baseline": ("inner_lr", "outer_lr", "test_inner_steps"),
        "protonet": ("inner_lr", "inner_steps", "test_inner_steps"),
    }
    for field in ("adapt_norm", "outer_optimizer", *kept.get(name, ())):
        assert flat(photos)[field] == flat(small)[field], field
    assert (photos.inner.inner_lr is None) == (small.inner.inner_lr is None)
    assert photos.inner.inner_lr is None or photos.inner.inner_lr < 0.1 or name in ("boil", "cavia"), (
        "Omniglot's is far too large"
    )


def test_settings_of_an_older_run_stay_as_they_are():
    new = resolve(MetaTrainConfig(), pool(84))
    assert resolve(new, pool(84)) == new
    old = dataclasses.replace(new, clip_value=None, width=64, inner_lr=0.4)
    assert resolve(old, pool(84)) == old, "its gradient was not clipped"


def test_what_the_user_gave_is_kept():
    given = MetaTrainConfig(ways=3, inner_lr=0.0, inner_steps=0, rotate=False, test_shots=2, width=8, adapt_norm=False)
    settled = resolve(given, turned)
    for field in ("ways", "inner_lr", "inner_steps", "rotate", "test_shots", "width", "adapt_norm"):
        assert flat(settled)[field] == flat(given)[field]
    assert hyper(settled, "cross_entropy") == {
        "loss": "cross_entropy",
        "norm": "transductive",
        "inner_lr": 0.0,
        "inner_steps": 0,
        "inner_optimizer": "sgd",
        "inner_augment": "none",
        "adapt_norm": False,
    }


def test_settling_twice_changes_nothing():
    once = resolve(MetaTrainConfig(), turned)
    assert resolve(once, pool()) == once


def test_curves_cannot_be_rotated_or_shifted():
    with pytest.raises(MetaftError, match="rotate: sinusoid"):
        resolve(MetaTrainConfig(dataset="sinusoid", rotate=True), Sinusoid())
    with pytest.raises(MetaftError, match="inner_augment: sinusoid has no images to shift"):
        resolve(MetaTrainConfig(dataset="sinusoid", inner_augment="shift"), Sinusoid())
    with pytest.raises(MetaftError, match=r"dropout: protonet takes none in its inner loop \(given 0.5\)"):
        resolve(MetaTrainConfig(algorithm="protonet", dropout=0.5), pool())


def test_tests_take_no_fewer_inner_steps_than_training():
    for steps, tested in ((1, 3), (5, 5)):
        assert resolve(MetaTrainConfig(inner_steps=steps), pool()).test.test_inner_steps == tested


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_member_is_tested_with_fewer_inner_steps_than_it_takes_in_training(name: str):
    steps = 40 if "inner_steps" in hyper_parameters(name) else None
    settled = resolve(MetaTrainConfig(algorithm=name, inner_steps=steps), pool())
    assert settled.test.test_inner_steps >= (settled.inner.inner_steps or 0)


@pytest.mark.parametrize(
    ("name", "outer", "tested"),
    [
        ("maml", ("adam", 3e-3, "cosine"), 3),
        ("reptile", ("sgd", 1.0, "linear"), 10),
        ("imaml", ("adam", 3e-3, "cosine"), 16),
        ("cavia", ("adam", 3e-3, "cosine"), 3),
        ("unicorn-maml", ("adam", 3e-3, "cosine"), 5),
        ("baseline++", ("adam", 1e-3, "cosine"), 100),
    ],
)
def test_members_have_outer_settings_and_test_steps_of_their_own(name: str, outer: tuple[str, float, str], tested: int):
    settled = resolve(MetaTrainConfig(algorithm=name), pool())
    assert (settled.outer.outer_optimizer, settled.outer.outer_lr, settled.outer.outer_schedule) == outer
    assert settled.test.test_inner_steps == tested


def test_defaults_of_maml_plus_plus():
    config = MetaTrainConfig(algorithm="maml++", dataset="sinusoid", hyper=("multi_step=0",))
    settled = resolve(config, Sinusoid())
    assert (settled.inner.inner_steps, settled.inner.adapt_norm, settled.outer.outer_schedule) == (5, False, "cosine")
    given = hyper(settled, "mse")
    assert (given["iterations"], given["multi_step"]) == (15000, 0.0)
    assert "iterations" not in hyper(dataclasses.replace(settled, algorithm="maml", hyper=()), "mse")
    with pytest.raises(MetaftError, match="--iterations is an option by itself"):
        hyper(dataclasses.replace(settled, hyper=("iterations=5",)), "mse")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["first_order"], "'first_order' is not NAME=VALUE"),
        (["firstorder=true"], "anil has no 'firstorder'.*did you mean 'first_order'"),
        (["inner_lr=0.1"], "anil has no 'inner_lr'.*--inner-lr is an option by itself"),
        (["first_order=true", "first_order=false"], "'first_order' is given twice"),
        (["first_order=1"], "'first_order=1' must be true or false"),
    ],
)
def test_a_members_own_settings_are_checked(assignments: list[str], message: str) -> None:
    config = MetaTrainConfig(algorithm="anil", hyper=tuple(assignments))
    with pytest.raises(MetaftError, match=message):
        hyper(config, "cross_entropy")


def test_a_members_own_settings_come_from_toml_and_go_there(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('algorithm = "anil"\nhyper = ["first_order=True"]')
    config = from_mapping(MetaTrainConfig, read_toml(file), origin=str(file))
    assert hyper(config, "cross_entropy")["first_order"] is True
    file.write_text(to_toml(config))
    assert from_mapping(MetaTrainConfig, read_toml(file), origin=str(file)) == config
    assert "hyper must be str, got 3" in message({"hyper": [3]})


@pytest.mark.parametrize("group", ["draws", "compute", "output"])
def test_a_group_that_cannot_be_left_out_is_not(group: str) -> None:
    with pytest.raises(MetaftError, match=f"^{group} must be [A-Z][A-Za-z]*, got None"):
        AdaptConfig(**{group: None})


def test_a_group_with_more_options_than_a_command_has_is_refused() -> None:
    with pytest.raises(MetaftError, match=r"^compute must be .*, got a group with .*engine"):
        AdaptConfig(compute=Compute())


def test_an_option_that_is_asked_for_flat_says_which_group_has_it() -> None:
    config = MetaTrainConfig(ways=3)
    with pytest.raises(AttributeError, match=r"^MetaTrainConfig has no attribute 'ways'; it is \.task\.ways$"):
        _ = config.ways
    with pytest.raises(AttributeError, match=r"no attribute 'wayz'; did you mean 'ways'\?$"):
        _ = config.wayz
    assert not hasattr(config, "ways")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_table_in_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[data]\nways = 3\n")
    said = message(read_toml(tmp_path / "a.toml"))
    assert said == "file.toml: 'data' must be one value, got a table; options stand by themselves: NAME = VALUE"
