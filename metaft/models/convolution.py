"""Convolutions with one weight per task in the form that is faster for their shape, as measured on the device at hand.

Under `torch.func.vmap` a convolution whose weight is a task's own becomes a grouped one, which libraries compute at
anything between a small part and nearly all of a single one's rate. The other form writes the patches out (im2col), so
that all tasks are one batched matrix product. Both can be differentiated any number of times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["grouped", "im2col"]
Record = Callable[[Callable[[], None]], Callable[[], None]]

# torch has no public question for what wraps a tensor.
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

FORMS: tuple[Form, ...] = get_args(Form)
_MARGIN = 0.95
"""Of the grouped form's time: what the other one has to stay below."""


class Shape(NamedTuple):
    """All that the time of a layer's convolution depends on, besides the machine."""

    channels: int
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    height: int
    width: int
    images: int
    """Of one task."""
    tasks: int
    own: bool
    """Whether each task has a weight of its own; before their first inner step they share one."""
    data: bool
    """Whether the input is data, in which nothing is differentiated."""
    dtype: str

    @property
    def key(self) -> str:
        return json.dumps(self)


_form_of: ContextVar[Callable[[Shape], Form] | None] = ContextVar("form_of", default=None)


@contextlib.contextmanager
def forms(form_of: Callable[[Shape], Form] | None) -> Iterator[None]:
    """Inside, in this thread, every TaskConv2d of tasks under vmap asks for its form; elsewhere all are grouped."""
    token = _form_of.set(form_of)
    try:
        yield
    finally:
        _form_of.reset(token)


def in_use() -> Callable[[Shape], Form] | None:
    """What the `forms` was given that this is in."""
    return _form_of.get()


def by_key(chosen: Mapping[str, Form]) -> Callable[[Shape], Form]:
    """What `choose` chose, as `forms` wants it; shapes that it did not see are grouped."""
    return lambda shape: chosen.get(shape.key, "grouped")


class TaskConv2d(nn.Conv2d):
    """nn.Conv2d, in the form that `forms` gives for its shape."""

    def forward(self, input: Tensor) -> Tensor:
        form_of = _form_of.get()
        if form_of is None or input.dim() != 4:
            return super().forward(input)
        shape = self._shape(input)
        if shape.tasks == 1 or form_of(shape) == "grouped":
            return super().forward(input)
        return im2col(input, self.weight, self.bias, shape)

    def _shape(self, x: Tensor) -> Shape:
        tasks, differentiated = _wrapping(x)
        weights, _ = _wrapping(self.weight)
        padding = tuple(map(int, self.padding))
        return Shape(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, padding, self.dilation, x.shape[2],
            x.shape[3], len(x), max(tasks, weights), weights > 1, not differentiated, str(x.dtype),
        )  # fmt: skip


def task_convolutions(module: nn.Module) -> nn.Module:
    """Make plain nn.Conv2d layers TaskConv2d, in place; returns the module. Other convolutions stay as they are."""
    for part in module.modules():
        if (
            type(part) is nn.Conv2d
            and part.groups == 1
            and part.padding_mode == "zeros"
            and type(part.padding) is tuple
        ):
            part.__class__ = TaskConv2d  # the same attributes, parameters and hooks
    return module


def im2col(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """F.conv2d of [images, channels, height, width] as one matrix product over the patches of all images."""
    patches = F.unfold(x, shape.kernel, shape.dilation, shape.padding, shape.stride)  # [images, channels k k, pixels]
    rows = weight.flatten(1) @ patches.transpose(0, 1).flatten(1)
    size = [
        (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for side, pad, dilation, kernel, stride in zip(
            x.shape[2:], shape.padding, shape.dilation, shape.kernel, shape.stride, strict=True
        )
    ]
    out = rows.unflatten(1, (len(x), *size)).transpose(0, 1)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _wrapping(tensor: Tensor) -> tuple[int, bool]:
    """Of how many tasks this is under vmap, and whether anything differentiates in it."""
    tasks, differentiated = 1, tensor.requires_grad
    while _functorch.is_functorch_wrapped_tensor(tensor):
        inner = _functorch.get_unwrapped(tensor)
        if _functorch.is_batchedtensor(tensor):
            tasks *= inner.shape[_functorch.maybe_get_bdim(tensor)]
        tensor = inner
        differentiated |= tensor.requires_grad
    return tasks, differentiated


def shapes_of(run: Callable[[], object]) -> tuple[Shape, ...]:
    """The layer shapes that `run` meets, each once."""
    seen: dict[Shape, None] = {}

    def form_of(shape: Shape) -> Form:
        seen[shape] = None
        return "grouped"

    with forms(form_of):
        run()
    return tuple(seen)


def seconds(shape: Shape, form: Form, device: str | torch.device, *, record: Record | None = None) -> float:
    """Median seconds of the convolution, its gradient and that gradient's own, for all tasks at once.

    `record` turns a function into what runs it as a training step would be run (see `metaft.outer.static.recorded`).
    """
    wait = functools.partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    dtype = getattr(torch, shape.dtype.removeprefix("torch."))
    generator = torch.Generator(device).manual_seed(0)  # values do not matter, and the program's own draws stay
    weights = (shape.filters, shape.channels, *shape.kernel)
    w = torch.randn((shape.tasks, *weights) if shape.own else weights, generator=generator, device=device)
    w = (w / math.prod(weights[1:]) ** 0.5).to(dtype)
    x = torch.randn(
        shape.tasks, shape.images, shape.channels, shape.height, shape.width, generator=generator, device=device
    ).to(dtype)
    of = (0,) if shape.data else (0, 1)

    def square(w: Tensor, x: Tensor) -> Tensor:
        if form == "im2col":
            return im2col(x, w, None, shape).square().sum()
        return F.conv2d(x, w, None, shape.stride, shape.padding, shape.dilation).square().sum()

    def of_gradient(w: Tensor, x: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.func.grad(square, of)(w, x)]).sum()

    mapped = torch.func.vmap(torch.func.grad(of_gradient, of), in_dims=(0 if shape.own else None, 0))

    def once() -> None:
        with torch.no_grad():
            mapped(w, x)

    run = once if record is None else record(once)
    times: list[float] = []
    for i in range(13):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        if i >= 3:  # libraries prepare in the first ones
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


_FILE = "convolutions.json"

_known: dict[str, Form] = {}
"""What this process has measured or read, by machine and shape."""


def choose(shapes: Iterable[Shape], measure: Callable[[Shape, Form], float], *, machine: str) -> dict[str, Form]:
    """The faster form of each shape, by its key: from this process, from the cache folder, or measured.

    `machine` names all else that times depend on. The grouped form stays where the other is not 5 % faster, and where
    that does not fit into memory.
    """
    keys = {shape: f"{machine} {shape.key}" for shape in shapes}
    if not set(keys.values()) <= _known.keys():
        _known.update({**_read(), **_known})
    new = [shape for shape, key in keys.items() if key not in _known]
    for shape in new:
        _known[keys[shape]] = faster(*(_time(measure, shape, form) for form in FORMS))
    if new:
        _write()
    return {shape.key: _known[key] for shape, key in keys.items()}


def faster(grouped: float, im2col: float) -> Form:
    """The form to choose where they take so long."""
    return "im2col" if im2col < _MARGIN * grouped else "grouped"


def _time(measure: Callable[[Shape, Form], float], shape: Shape, form: Form) -> float:
    try:
        return measure(shape, form)
    except torch.OutOfMemoryError:
        return math.inf


def _read() -> dict[str, Form]:
    """The cache file; what is not whole counts as not there."""
    from metaft.support.cache import cache_folder  # that package imports this one's

    try:
        folder = cache_folder()
        forms = {} if folder is None else json.loads((folder / _FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in forms.items() if v in FORMS} if isinstance(forms, dict) else {}


def _write() -> None:
    from metaft.support.cache import keep

    merged = json.dumps({**_read(), **_known}, indent=0, sort_keys=True)  # another process may have written since
    keep(_FILE, lambda stream: stream.write(merged.encode()))
