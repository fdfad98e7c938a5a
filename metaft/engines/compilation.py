"""Whether what torch.compile made computes what it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from metaft.errors import MetaftError

ROUNDING = {"float64": 1e-4, "float32": 0.5, "coarse": 10.0}
"""How far a tensor of a gradient may lie from the same one that was added up in another order, in the norm of one of
them. Unrelated numbers of the same size are 1.4 apart, and of another size by the factor between them.

A meta-gradient goes through a second derivative and many kinks, so that it holds fewer digits than its type. In float32
the worst that was measured, against float64, on Conv-4 and five steps, is 0.07 of the whole; in float64 that is 1e-10.
In bfloat16 gradients of one function were 0.03 to 1 apart, so that there only another size can be told from rounding,
and tf32 has but two more bits.
"""

SHARE = 0.2
"""Of the whole gradient's norm, which a smaller tensor counts as having: what is near 0 is mostly rounding error."""


def precision_of(graph: GraphModule, outputs: Sequence[Tensor]) -> str:
    """The key of `ROUNDING` for a traced function: of the shortest type that it computes in."""
    if any(torch.bfloat16 in (*node.args, *node.kwargs.values()) for node in graph.graph.nodes):
        return "coarse"
    if outputs[0].is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        return "coarse"
    return "float64" if outputs[0].dtype is torch.float64 else "float32"


def check_compiled(compiled: Sequence[Tensor], expected: Sequence[Tensor], precision: str) -> None:
    """Raise MetaftError where a compiled function's gradients lie further from those of the plain one than rounding.

    PyTorch keeps kernels in a folder, and gives those that were compiled for one processor to another, where they
    compute anything (seen: gradients of 1e288, and no message). A plain result that is not finite says nothing.
    """
    size = math.hypot(*map(_norm, expected))
    if not math.isfinite(size):
        return
    for a, b in zip(compiled, expected, strict=True):
        # A whole gradient that is 0 in truth has rounding errors of 1 in each entry at most.
        least = torch.finfo(b.dtype).eps * math.sqrt(b.numel())
        off, limit = _norm(a.double() - b.double()), ROUNDING[precision] * max(_norm(b), SHARE * size) + least
        if not off <= limit:
            raise MetaftError(
                "engine: what torch.compile made is wrong, as with kernels that were compiled for another processor: "
                f"its first meta-gradient is off by {off:.3g}, where rounding allows for {limit:.3g}; "
                f"empty {_cache()}, or set TORCHINDUCTOR_CACHE_DIR to a new folder, or use another engine"
            )


def _norm(values: Tensor) -> float:
    return float(values.double().norm())


def _cache() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # heavy, and only here

    return cache_dir()
