"""ONNX files: written by torch.onnx, run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaft.after.formats import META, Run
from metaft.after.whole import Whole, example_of


def write(whole: Whole, path: Path, about: Mapping[str, Any]) -> None:
    """One file, weights inside; the first axis of "pictures" and "logits" is the batch. In float32, since onnxruntime
    convolves nothing else on a CPU."""
    program = torch.onnx.export(
        whole.single(), (example_of(whole),), input_names=["pictures"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    for node in program.model.graph:  # where in whose files it was traced
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.metadata_props[META] = json.dumps(about)
    program.save(path, external_data=False)


def opened(path: Path) -> tuple[Run, str | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # of the graph's own; errors are raised
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(raw: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"pictures": raw.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map.get(META)
