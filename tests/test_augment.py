"""Training pictures that are changed: by whom, by what they are drawn, and that nothing else is."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
import torch
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor

from metaft.finetune.augment import AUGMENTS, keys_of, of_epoch
from metaft.finetune.fit import Fitted, fit
from metaft.options import options
from metaft.settings.finetuning import Recipe
from metaft.support.vision import transforms

POLICIES = {"trivial": transforms.TrivialAugmentWide, "randaug": transforms.RandAugment}


def pictures(channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (12, channels, 10, 10), dtype=torch.uint8, generator=g)


def changed(name: str, images: Tensor, rows: Tensor, *, n: int = 40, seed: int = 1, epoch: int = 2) -> Tensor:
    change = of_epoch(name, n, seed, epoch)
    assert change is not None
    return change(images, rows)


def test_every_augmentation_is_an_option() -> None:
    assert {"none", *AUGMENTS} == set(options(Recipe)["augment"].choices)
    assert of_epoch("none", 3, 0, 0) is None
    assert set(get_args(Literal["basic"])) | POLICIES.keys() == AUGMENTS.keys()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTS)
def test_what_becomes_of_a_picture_is_a_function_of_seed_epoch_and_picture(name: str, channels: int) -> None:
    images, rows = pictures(channels), torch.arange(20, 32)
    kept, state = images.clone(), torch.random.get_rng_state()
    whole = changed(name, images, rows)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape
    assert not torch.equal(whole, images) and torch.equal(images, kept)
    torch.manual_seed(99)  # whatever the global generator is at
    some = torch.tensor([7, 2, 11])
    assert torch.equal(changed(name, images[some], rows[some]), whole[some])
    torch.random.set_rng_state(state)
    changed(name, images, rows)
    assert torch.equal(torch.random.get_rng_state(), state), "which is left alone"
    others = [changed(name, images, rows, **more) for more in ({"seed": 2}, {"epoch": 3})]
    others.append(changed(name, images, rows - 12))
    assert not any(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_torchvisions(name: str) -> None:
    images, rows = pictures(), torch.arange(12)
    policy = POLICIES[name](interpolation=transforms.InterpolationMode.BILINEAR)
    with torch.random.fork_rng(devices=[]):
        for image, found, key in zip(images, changed(name, images, rows), keys_of(rows, 1, 2), strict=True):
            torch.manual_seed(key)
            assert torch.equal(found, policy(image))
    assert len(set(keys_of(rows, 1, 2) + keys_of(rows, 1, 3) + keys_of(rows, 2, 2))) == 36


@pytest.mark.parametrize("name", AUGMENTS)
def test_validation_and_the_stored_moments_are_of_pictures_as_they_are_and_a_resume_gives_the_same_bits(
    name: Literal["basic", "trivial", "randaug"],
) -> None:
    val = dict(zip(("val_examples", "val_labels"), toy(9, seed=3), strict=True))

    def tuned(augment: Literal["none", "basic", "trivial", "randaug"], lr: float, **more: Any) -> Fitted:
        return fit(
            body(), INPUTS, *toy(21), CLASSES, Recipe(epochs=3, batch_size=8, lr=lr, augment=augment), **val, **more
        )

    plain, moved = tuned("none", 1e-30), tuned(name, 1e-30)
    assert [row["val_loss"] for row in plain.curve] == [row["val_loss"] for row in moved.curve]
    assert [row["loss"] for row in plain.curve] != [row["loss"] for row in moved.curve]
    for key, value in bits(plain).items():  # a bias at 0 may have moved by the rate
        torch.testing.assert_close(bits(moved)[key], value, rtol=0, atol=1e-20)
    states: list[dict[str, Any]] = []
    whole = tuned(name, 0.01, on_epoch=states.append)
    again = tuned(name, 0.01, resume=states[1])
    assert same(bits(again), bits(whole)) and again.curve == whole.curve
