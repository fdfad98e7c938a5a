"""What an adapt run found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaft.metrics import verdict


def plainly(result: Mapping[str, Any]) -> str:
    """What was gained, in a sentence for each start that the first one is compared with, and what follows from it."""
    first, *others = result["starts"]
    several = first["mean"]["draws"] > 1
    if not result["classes"]:
        return _plain_numbers(result)
    right = [_of_100(start["mean"]["accuracy"] if several else start["accuracy"]) for start in result["starts"]]
    said = [f"With {_shots(result)}, {right[0]} of 100 new images get the right label from {_from(first, result)}."]
    for start, share, gain in zip(others, right[1:], result["gains"], strict=True):
        points = gain["mean"] if several else first["accuracy"] - start["accuracy"]
        over = f" (mean of {gain['draws']} draws, ± {100 * gain['ci95']:.1f})" if several else ""
        word = "gained" if points >= 0 else "lost"
        said.append(f"{_instead(start, result)} {share}: {abs(100 * points):.1f} points {word}{over}, {_sure(gain)}.")
    return " ".join(said)


def _plain_numbers(r: Mapping[str, Any]) -> str:
    """The same where labels are numbers."""
    first, *others = r["starts"]
    several = first["mean"]["draws"] > 1
    off = f"are off by {first['mae']:.4g} on average (RMSE {first['rmse']:.4g})"
    if several:
        off = f"have an RMSE of {first['mean']['rmse']:.4g}"
    said = [f"With {_shots(r)}, predictions for new images {off} from {_from(first, r)}."]
    for start, gain in zip(others, r["gains"], strict=True):
        less = gain["mean"] if several else start["rmse"] - first["rmse"]
        over = f" (mean of {gain['draws']} draws, ± {gain['ci95']:.3g})" if several else ""
        word = "gained" if less >= 0 else "lost"
        rmse = start["mean"]["rmse"] if several else start["rmse"]
        said.append(f"{_instead(start, r)} an RMSE of {rmse:.4g}: {abs(less):.3g} {word}{over}, {_sure(gain)}.")
    return " ".join(said)


def _shots(r: Mapping[str, Any]) -> str:
    shots = r["train_images_per_class"]
    images = f"{shots} image{'s' if shots != 1 else ''} per class" if shots else f"{r['train_images']} images"
    images += " to train on"
    if r["val_images"]:
        val = r["val_images_per_class"]
        images += f" and {val} to validate" if shots and val else f" and {r['val_images']} in all to validate"
    return images


def _from(first: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    if r["method"] == "inner":
        how = "the run's inner loop"
    elif "chosen" in first:
        how = f"strategy {first['chosen']['strategy']}, which was chosen"
    else:
        how = f"strategy {r['strategy']}"
    return f"the {called(first)} start by {how}"


def _instead(start: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    """The beginning of the sentence on another start."""
    if start["name"] == "probe":
        return f"The probe, a {'logistic' if r['classes'] else 'ridge'} regression on the same start's features, gets"
    if start["name"] == "alone" and r.get("also"):
        return "A model of this target alone gets"
    if start["name"] == "random":
        return f"A random start{'' if r['method'] == 'inner' else ', all of it trained,'} gets"
    return f"The {called(start)} start gets"


def _sure(gain: Mapping[str, Any]) -> str:
    """What a paired interval says of a difference."""
    found = verdict(gain["mean"], gain["ci95"])
    return _SURE[found] + (": the probe is the better one here" if (found, gain["over"]) == ("below", "probe") else "")


_SURE = {
    "alone": "one draw, which tells nothing of the next",
    "equal": "which all draws happen to agree on: no interval, and no word on the next",
    "chance": "no difference that these draws can tell from chance",
    "above": "more than chance",
    "below": "less, and not by chance",
}


def called(start: Mapping[str, Any]) -> str:
    """A start's name, as a reader knows it."""
    return "handed over" if start["name"] == "own values" else start["name"]


def _of_100(share: float) -> str:
    return f"{100 * share:.0f}"
