"""The one way to torchvision: `from metaft.support.vision import torchvision`, inside the function that needs it.

torchvision's registry wheel is built against a CUDA torch. Beside a CPU-only torch its compiled operators do not load,
and `import torchvision` then fails with "operator torchvision::nms does not exist" (pytorch/vision#9085), because it
attaches fake kernels to operators that nobody has declared. Declaring their schemas is enough for its models,
transforms and data sets; the detection operators stay without a kernel, and metaft uses none.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from metaft.errors import MetaftError

_BOXES_TO_KEEP = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[torch.library.Library] = []
"""Keeps the declarations alive: they end with their Library object."""


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise MetaftError(f"torchvision is needed here and cannot be imported: {error}") from error
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + _BOXES_TO_KEEP)
    _declared.append(library)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
datasets = importlib.import_module("torchvision.datasets")
models = importlib.import_module("torchvision.models")
transforms = importlib.import_module("torchvision.transforms.v2")
