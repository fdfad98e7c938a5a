"""torch.export's files: a graph of PyTorch's own operations with its weights, which any later torch runs."""

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
    """One file; the first axis of its input is the batch."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(whole, (example_of(whole),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path, extra_files={META: json.dumps(about)})


def opened(path: Path) -> tuple[Run, str | None]:
    extra = {META: ""}
    module = torch.export.load(path, extra_files=extra).module()

    @torch.no_grad()
    def run(raw: Tensor) -> Tensor:
        return module(raw)

    return run, extra[META]
