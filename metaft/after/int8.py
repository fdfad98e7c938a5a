"""An ONNX model in 8-bit integers, by onnxruntime's static quantisation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaft.after.formats import META, quiet
from metaft.errors import MetaftError
from metaft.inputs.base import Examples
from metaft.support.foreign import in_our_words

FILE = "model-int8.onnx"

AT_LEAST, AT_MOST, AT_ONCE = 10, 256, 16
"""Pictures to calibrate with, and how many of them pass at a time."""

_FRONT = {"Cast", "Mul", "Sub", "Add", "Div"}
"""What the preprocessing consists of."""

_LAYERS = {"Conv", "Gemm", "MatMul"}

LEFT = 5e-4
"""The first layers stay as they are as long as they hold no more than this share of all weights. They cost next to no
bytes, and an error there goes through all others: of EfficientNet-Lite0, where three stay, the root mean square error
of logits fell from 0.52 to 0.37, and 95.7 % of labels were the same in the place of 93.8 (CIFAR-10, 1,000 pictures)."""


def check_enough(examples: Examples, where: str) -> None:
    """Raises MetaftError for too few pictures to learn from how large activations get."""
    if len(examples) < AT_LEAST:
        raise MetaftError(f"int8: needs {AT_LEAST} pictures or more to calibrate with, and {where} has {len(examples)}")


def quantise(model: Path, out: Path, examples: Examples) -> None:
    """Write the model with weights and activations as 8-bit integers, quantised and dequantised around each operation
    (QDQ), weights per channel, activations by the smallest and largest values that up to `AT_MOST` of the pictures
    make. The preprocessing stays as it is, and so do the first layers (see `LEFT`). On a processor without VNNI weights
    have 7 bits, since its products of two bytes are added up in 16. Raises MetaftError where onnxruntime cannot."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts = _parts(examples)

        def get_next(self) -> Any:
            part = next(self.parts, None)
            return None if part is None else {"pictures": part.numpy()}

    left, reduced = untouched(model), not has_vnni()
    with in_our_words("int8: the model cannot be quantised", passing=(OSError,)), quiet():
        quantize_static(
            str(model), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=reduced, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_exclude=left,
        )  # fmt: skip
    _note(out, {"calibrated_with": min(AT_MOST, len(examples)), "reduce_range": reduced, "left_as_they_are": left})


def _note(path: Path, how: dict[str, Any]) -> None:
    """Add to the file's metadata how it was quantised."""
    import onnx

    model = onnx.load(str(path))
    for entry in model.metadata_props:
        if entry.key == META:
            entry.value = json.dumps({**json.loads(entry.value), "int8": how})
    onnx.save(model, str(path))


def _parts(examples: Examples) -> Iterator[Tensor]:
    count = min(AT_MOST, len(examples))
    rows = torch.linspace(0, len(examples) - 1, count).long()
    for part in rows.split(AT_ONCE):
        yield examples[part]


def untouched(model: Path) -> list[str]:
    """Names of the nodes that stay as they are: those between the pictures and the first layer, and the first layers
    as `LEFT` says."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    layers = [(node.name, sizes.get(node.input[1], 0)) for node in graph.node if node.op_type in _LAYERS]
    names, reached = [], {"pictures"}
    for node in graph.node:  # in the order in which they compute
        if node.op_type in _FRONT and reached & set(node.input):
            names.append(node.name)
            reached |= set(node.output)
    left = LEFT * sum(sizes.values())
    for name, size in layers:
        left -= size
        if left < 0:
            break
        names.append(name)
    return names


def has_vnni() -> bool:
    """Whether the processor adds products of bytes up in 32 bits; one that does not say so is taken for one that
    cannot."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_vnni|avx_vnni|asimddp)\b", flags) is not None
