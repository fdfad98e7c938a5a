"""Whether what a run wrote is what views take it for, before any of them reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaft.errors import CheckpointError
from metaft.objective import figure_of
from metaft.types import NORMS

TEXT, WHOLE, NUMBER, LIST, TABLE = (str,), (int,), (int, float, type(None)), (list,), (dict,)
"""JSON has no NaN: a figure that does not exist is null there."""
FIGURE = (int, float)

_RUN = {"version": TEXT, "seed": WHOLE, "device": TEXT, "environment": TABLE, "seconds": NUMBER}
_META_TRAIN = {
    **_RUN, "dataset": TEXT, "algorithm": TEXT, "ways": WHOLE, "shots": WHOLE, "iterations": WHOLE, "best_step": WHOLE,
    "engine": TEXT, "test": TABLE,
}  # fmt: skip
_TEST = {"ways": WHOLE, "shots": WHOLE, "query_shots": WHOLE, "eval_seed": WHOLE, "inner_steps": WHOLE, "split": TEXT}
_ADAPT = {
    **_RUN, "init": TEXT, "init_about": TABLE, "data": TEXT, "classes": LIST, "method": TEXT, "train_images": WHOLE,
    "val_images": WHOLE, "test_images": WHOLE, "folds": WHOLE, "notes": LIST, "starts": LIST, "gains": LIST,
    "last_seed": WHOLE, "train_images_per_class": (int, type(None)),
}  # fmt: skip
_START = {"name": TEXT, "mean": TABLE, "epochs": WHOLE, "kept_epoch": NUMBER}
_OF_CLASSES = {
    "accuracy": FIGURE, "balanced_accuracy": NUMBER, "macro_f1": NUMBER, "calibration_error": FIGURE,
    "calibration": LIST, "confusion": LIST, "per_class": LIST,
}  # fmt: skip
_ROWS: dict[str, Mapping[str, tuple[type, ...]]] = {
    "calibration": {"confidence": FIGURE, "accuracy": FIGURE, "images": WHOLE},
    "per_class": {"class": TEXT, "test_images": WHOLE, "precision": NUMBER, "recall": NUMBER, "f1": NUMBER},
}
"""What the rows of a list hold."""
_GAIN = {"of": TEXT, "over": TEXT, "mean": NUMBER, "ci95": NUMBER, "draws": WHOLE}
_ALSO = {
    "data": TEXT, "classes": LIST, "file": TEXT, "test_images": WHOLE, "together": TABLE, "alone": TABLE, "gain": TABLE,
}  # fmt: skip
_MEAN = {"accuracy": NUMBER, "ci95": NUMBER, "draws": WHOLE}
_COMPRESSED = {"kept": TEXT, "unmet": LIST, "steps": LIST}
_STEP = {
    "model": TEXT, "share": NUMBER, "parameters": WHOLE, "flops": WHOLE, "bytes": WHOLE, "latency": (int, float),
    "validation": TABLE, "agreement": NUMBER,
}  # fmt: skip
_OF_NUMBERS = {"mae": NUMBER, "rmse": NUMBER, "r2": NUMBER, "predictions": LIST}


def check(result: Any, file: str) -> None:
    """Raises CheckpointError, naming the file and the first key, for a result that is no run's, or a damaged one."""
    if not isinstance(result, dict):
        raise CheckpointError(f"{file} is no table of values")
    command = result.get("command")
    if command == "meta_train":
        _need(result, _META_TRAIN, file)
        test = result["test"]
        _need(test, _TEST, f"{file}: test")
        if "pixel_nearest_neighbour" in test:
            _need(
                test["pixel_nearest_neighbour"],
                {"accuracy": FIGURE, "ci95": NUMBER},
                f"{file}: test.pixel_nearest_neighbour",
            )
        for norm in NORMS:
            _need(test, {norm: TABLE}, f"{file}: test")
            figures = test[norm]
            _need(figures, {"episodes": WHOLE, "ci95": NUMBER, "ci95_per_step": LIST}, f"{file}: test.{norm}")
            name = next((key for key in figures if f"{key}_per_step" in figures and key != "ci95"), None)
            if name is None or name != figure_of(figures):
                raise CheckpointError(f"{file}: test.{norm} holds no figure of its own")
            _need(figures, {name: NUMBER, f"{name}_per_step": LIST}, f"{file}: test.{norm}")
            steps = test["inner_steps"] + 1
            for key in (f"{name}_per_step", "ci95_per_step"):
                if len(figures[key]) != steps or not all(isinstance(value, NUMBER) for value in figures[key]):
                    raise CheckpointError(f"{file}: test.{norm}.{key} has no {steps} numbers")
        return
    if command != "adapt":
        raise CheckpointError(f"{file}: it is the result of {command!r}, and not of meta_train or adapt")
    _need(result, _ADAPT, file)
    if not result["starts"]:
        raise CheckpointError(f"{file}: 'starts' is empty")
    if result["method"] == "finetune":
        _need(result, {"strategy": TEXT}, file)
    figures, classes = _OF_CLASSES if result["classes"] else _OF_NUMBERS, len(result["classes"])
    for number, start in enumerate(result["starts"]):
        where = f"{file}: starts[{number}]"
        _need(start, {**_START, **figures}, where)
        if not _is_list(start.get("warnings", []), TEXT):
            raise CheckpointError(f"{where}: 'warnings' is no list of texts")
        _need(start["mean"], _MEAN if classes else {"rmse": NUMBER, "ci95": NUMBER, "draws": WHOLE}, where)
        if classes:
            rows = start["confusion"]
            if len(rows) != classes or any(not _is_list(row, WHOLE) or len(row) != classes for row in rows):
                raise CheckpointError(f"{where}: confusion has no {classes} rows of {classes} counts")
            for key, needed in _ROWS.items():
                for i, row in enumerate(start[key]):
                    _need(row, needed, f"{where}.{key}[{i}]")
            if len(start["per_class"]) != classes:
                raise CheckpointError(f"{where}: per_class has no {classes} rows")
    if len(result["gains"]) != len(result["starts"]) - 1:
        raise CheckpointError(f"{file}: 'gains' are not one for each of the other starts")
    for i, gain in enumerate(result["gains"]):
        _need(gain, _GAIN, f"{file}: gains[{i}]")
    for key in ("notes", "classes"):
        if not _is_list(result[key], TEXT):
            raise CheckpointError(f"{file}: {key!r} is no list of texts")
    if "also" in result:
        _check_also(result, file)
    if "compressed" in result:
        _check_compressed(result["compressed"], f"{file}: compressed")


def _check_also(result: Mapping[str, Any], file: str) -> None:
    _need(result, {"also": LIST, "tasks": TEXT}, file)
    if result["also"] and not result["gains"]:
        raise CheckpointError(f"{file}: 'starts' has no model of the first target alone, and there are several")
    for number, target in enumerate(result["also"]):
        where = f"{file}: also[{number}]"
        _need(target, _ALSO, where)
        for key in ("together", "alone"):
            _need(target[key], {"mean": TABLE}, f"{where}.{key}")
            _need(target[key]["mean"], _MEAN, f"{where}.{key}.mean")
        _need(target["gain"], _GAIN, f"{where}.gain")


def _check_compressed(made: Any, where: str) -> None:
    _need(made, _COMPRESSED, where)
    for number, step in enumerate(made["steps"]):
        _need(step, _STEP, f"{where}.steps[{number}]")
        held: dict[str, tuple[type, ...]] = {"held": WHOLE, "accuracy": (int, float), "points": (int, float)}
        _need(step["validation"], held, f"{where}.steps[{number}].validation")
    if made["kept"] not in [step["model"] for step in made["steps"]]:
        raise CheckpointError(f"{where}: the kept network {made['kept']!r} is none of its steps")


def _is_list(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(each, kinds) and not isinstance(each, bool) for each in value)


def _need(value: Any, keys: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is no table of values")
    for key, kinds in keys.items():
        if key not in value:
            raise CheckpointError(f"{where} lacks {key!r}, which a run writes")
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            raise CheckpointError(f"{where} has {key} = {str(value[key])[:40]!r}, which no run writes")
