"""`glyphs:SCRIPT`: the letters of a script that no run has seen."""

from __future__ import annotations

import numpy as np
import torch

from metaft.errors import MetaftError, no_such
from metaft.inputs import ImageInputs
from metaft.targets.base import Target
from metaft.tasks.glyphs import glyphs


def script_of(script: str, given: ImageInputs | None) -> Target:
    """Raises MetaftError for a script that is none of the held-out ones, and inputs of another shape."""
    pool = glyphs()
    p = given or pool.inputs
    if p.channels != 1 or (p.height, p.width) != pool.shape[1:]:
        raise MetaftError(
            f"data: glyphs are [1, 28, 28], but the run's images are [{p.channels}, {p.height}, {p.width}]"
        )
    scripts = {pool.class_names[c].split("/")[0] for c in pool.splits["test"]}
    if script not in scripts:
        raise no_such("data", script, sorted(scripts), lacks="no held-out script", says="there are")
    classes = [int(c) for c in pool.splits["test"] if pool.class_names[c].startswith(f"{script}/")]
    rows = np.concatenate([np.arange(pool.starts[c], pool.starts[c] + pool.counts[c]) for c in classes])
    labels = np.repeat(np.arange(len(classes)), pool.counts[classes])
    names = tuple(pool.class_names[c] for c in classes)
    return Target(
        name=f"glyphs:{script}",
        class_names=names,
        examples=pool.images[torch.from_numpy(rows)],
        labels=torch.from_numpy(labels),
        parts={"all": np.arange(len(rows))},
        files=tuple(f"{names[label]} #{i % 20}" for i, label in enumerate(labels)),
        inputs=p,
        changes=(),
    )
