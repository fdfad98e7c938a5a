"""The modes of PyTorch that a caller may have changed, and how metaft's public functions do without."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def usual_modes(*, whole: bool = True) -> Iterator[None]:
    """Inside, PyTorch is as in a fresh program: no inference mode, no autocast, tensors on the CPU, and, where `whole`,
    float32 and gradients. What the caller had is back afterwards.

    Not `whole` is for what may be part of the caller's own graph, or computes in the type of the caller's own module.
    The default type is the process's: other threads see it change.
    """
    import torch  # here, since the commands say what their options are without it

    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if whole and not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if whole and torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield


def in_usual_modes(function: Function) -> Function:
    """A public function that takes its `usual_modes` with it."""
    return _inside(function, whole=True)


def in_usual_modes_but_type(function: Function) -> Function:
    """The same for one that computes in the type of what it is given, and leaves gradients as they are."""
    return _inside(function, whole=False)


def _inside(function: Any, *, whole: bool) -> Any:
    if getattr(function, "in_usual_modes", False):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with usual_modes(whole=whole):
            args, kwargs = ordinary((args, kwargs))
            return function(*args, **kwargs)

    call.in_usual_modes = True  # type: ignore[reportFunctionMemberAccess]
    return call


def ordinary(tree: Any) -> Any:
    """Copies of what was made in inference mode, of which autograd could not keep anything; all else as it is."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, tree)
