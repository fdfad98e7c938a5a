"""Many tasks as one operation, by vmap and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.algorithms.base import TaskGrad
from metaft.engines.batching import Out, Shared, TaskFunction, Tree, vmapped
from metaft.engines.compilation import check_compiled, precision_of
from metaft.engines.trees import summed
from metaft.engines.vmap import Vmap
from metaft.errors import MetaftError
from metaft.models.functional import plain_operations
from metaft.support.foreign import in_our_words


def _not_compiled(error: Exception) -> MetaftError:
    """Whatever the compiler could not do, other engines can."""
    reason = " ".join(str(error).split("\n\n")[0].split())
    return MetaftError(f"engine: torch.compile failed ({reason}); use --engine processes or threads")


class Compiled(Vmap):
    """As `Vmap`, with sums compiled by torch.compile: minutes once per function and shape, then fused operations.

    The function is traced by running it (`make_fx`), so that nothing of what it does in Python is left. Needs what
    torch.compile needs, on a CPU a C++ compiler. Raises MetaftError where that fails, or where the first sum is another
    one than without compiling by more than rounding.
    """

    name = "compiled"

    def __init__(self, chunk: int | None = None, threads: int = 1) -> None:
        super().__init__(chunk, threads)
        self._compiled: dict[Any, tuple[Callable[..., list[Tensor]], pytree.TreeSpec]] = {}

    def _sum_of(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        inputs, spec = pytree.tree_flatten((shared, tasks))
        key = (fn, spec, *((leaf.shape, leaf.dtype, leaf.device) for leaf in inputs))
        if key not in self._compiled:
            self._compiled[key] = self._compile(fn, inputs, spec)
        compiled, spec = self._compiled[key]
        with torch.no_grad():
            return pytree.tree_unflatten(compiled(*inputs), spec)

    @staticmethod
    def _compile(
        fn: TaskFunction[Any, Any, Any], inputs: list[Tensor], spec: pytree.TreeSpec
    ) -> tuple[Callable[..., list[Tensor]], pytree.TreeSpec]:
        from torch.fx.experimental.proxy_tensor import make_fx  # heavy, and only here

        traced: list[Any] = []

        def flat(*inputs: Tensor) -> list[Tensor]:
            shared, tasks = pytree.tree_unflatten(list(inputs), spec)
            traced[:] = [summed(vmapped(fn, shared, tasks))]
            return pytree.tree_leaves(traced[0])

        with in_our_words(_not_compiled), plain_operations(), torch.no_grad():
            graph = make_fx(flat)(*inputs)
            compiled = torch.compile(graph, dynamic=False, fullgraph=True)
            first = compiled(*inputs)
        # The tracing computed this sum already. A figure may turn by a rounding, such as a tie that is counted as
        # right, so gradients alone are compared; they come first among the leaves.
        (result,) = traced
        expected = pytree.tree_leaves(result.grads if isinstance(result, TaskGrad) else result)
        check_compiled(first[: len(expected)], expected, precision_of(graph, expected))
        return compiled, pytree.tree_structure(result)
