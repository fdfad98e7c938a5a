"""From a library's module with its weights to a start: which tensors fit, and how pictures become its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.inputs import ImageInputs
from metaft.inputs.fitting import Interpolation
from metaft.models import published
from metaft.models.architecture import NormOf, build, is_of
from metaft.starts.base import Start
from metaft.starts.names import label_of
from metaft.types import Params

COUNTER = "num_batches_tracked"
"""A number in batch normalisation that no prediction depends on, and that many files lack."""


def in_order(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A module's names with the tensors of a file that has them by other names in the same order.

    Raises MetaftError where they are not as many, which is another version of the file.
    """
    mine = [key for key in module.state_dict() if not key.endswith(COUNTER)]
    theirs = [key for key in tensors if not key.endswith(COUNTER)]
    if len(mine) != len(theirs):
        raise MetaftError(
            f"init: {source} holds {len(theirs)} tensors, and its architecture has {len(mine)}: another version of it?"
        )
    return {key: tensors[other] for key, other in zip(mine, theirs, strict=True)}


def load_into(module: nn.Module, head: str, tensors: Mapping[str, Tensor], source: str, name: str) -> list[str]:
    """Fill a library's module of this architecture, in place; returns notes on what was loaded, and what was not.

    Its head may be missing or have another shape, since it is replaced; auxiliary heads are left out. Raises
    MetaftError where tensors of the backbone are missing or have another shape: that is another architecture.
    """
    wanted = module.state_dict()
    of_body = [name for name in wanted if not is_of(name, head) and not name.endswith(COUNTER)]
    missing = [name for name in of_body if name not in tensors]
    reshaped = [name for name in of_body if name in tensors and tensors[name].shape != wanted[name].shape]
    if missing or reshaped:
        key = (missing or reshaped)[0]
        why = f"no {key!r}" if missing else f"{key!r} is {list(tensors[key].shape)}, not {list(wanted[key].shape)}"
        raise MetaftError(
            f"init: {source} is of another architecture{'' if missing else ' or image size'} than {name}: of its "
            "backbone's "
            f"{len(of_body)} tensors {len(missing)} are missing and {len(reshaped)} have another shape ({why})"
        )
    odd = [name for name in of_body if not tensors[name].isfinite().all()]
    if odd:
        raise MetaftError(f"init: {source} holds values that are not finite, in {odd[0]!r}")
    others = [name for name in tensors if name not in wanted and not name.endswith(COUNTER)]
    fitting = {k: v for k, v in tensors.items() if k in wanted and v.shape == wanted[k].shape}
    module.load_state_dict(fitting, strict=False)
    notes = [f"{source}: all {len(of_body)} tensors of the backbone loaded; its head is replaced"]
    if others:
        listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        notes.append(f"{source} holds {len(others)} tensors that the architecture has not, left out: {listed}")
    return notes


def source_head(module: nn.Module, head: str, tensors: Mapping[str, Tensor]) -> Params:
    """The weight and bias of these weights' own head, where it is a linear layer as the module's is; else nothing."""
    layer, own = module.get_submodule(head), {part: f"{head}.{part}" for part in ("weight", "bias")}
    if not isinstance(layer, nn.Linear) or not own.keys() <= layer._parameters.keys():
        return {}
    found = {part: tensors[name] for part, name in own.items() if name in tensors}
    return found if len(found) == 2 and found["weight"].shape[1] == layer.in_features else {}


def image_inputs(
    shape: tuple[int, int, int],
    resize: int,
    interpolation: Interpolation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int | None,
) -> ImageInputs:
    """Inputs as published weights were trained with; another size keeps the part of a picture that is seen."""
    side = shape[-1] if image_size is None else image_size
    scaled = max(side, round(resize * side / shape[-1]))
    return ImageInputs(shape[0], side, side, mean=mean, std=std, resize=scaled, interpolation=interpolation)


def start_of(
    module: nn.Module,
    name: str,
    inputs: ImageInputs,
    *,
    init: str,
    about: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    norm: NormOf = "keep",
    source: Params | None = None,
) -> Start:
    """A start from a library's `module`, filled, whose architecture has this name. The module is taken apart for it.

    Raises MetaftError as `published.build` does.
    """
    shape = list(inputs.shape)
    architecture = {"name": name, "ways": 2, "shape": shape, "norm": norm}
    headed = published.headed(module, name, 2, shape)
    whole, head = build(architecture, None, module=headed, norm=norm)
    params = {k: p.detach() for k, p in whole.named_parameters() if not is_of(k, head)}
    buffers = {k: b.detach() for k, b in whole.named_buffers()}
    return Start(
        name=init, architecture=architecture, shape=shape, inputs=inputs, settings=None, meta=params, state={},
        module=None, about=about, label=label_of(init), norm=norm, buffers=buffers, notes=notes,
        source=source or {},
    )  # fmt: skip


def named_tensors(tensors: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie one level down or have a prefix of torch.compile or nn.DataParallel.

    Raises MetaftError where there are none.
    """
    for key in ("state_dict", "model_state", "model_state_dict", "model"):
        if isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
            break
    kept = {
        str(k).removeprefix("_orig_mod.").removeprefix("module."): v
        for k, v in tensors.items()
        if isinstance(v, torch.Tensor)
    }
    if not kept:
        raise MetaftError(f"init: {source} holds no tensors by name, as a state_dict does")
    return kept
