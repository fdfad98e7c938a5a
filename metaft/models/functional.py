"""A module as pure functions of its parameters, safe to call from many threads at once."""

# Above 300 lines: a `Model`, and the checks of a module that its parts share.
from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.models.conv4 import Conv4
from metaft.models.convolution import task_convolutions
from metaft.models.derivatives import check_twice_differentiable
from metaft.models.dropout import drops, episode_dropout
from metaft.models.handed import buffers, class_of, copied, eagerly, frozen, taken
from metaft.models.head import body_of, watched, watching
from metaft.models.norm import EpisodeNorm, episode_norms, in_transform, measure_moments, use_moments
from metaft.models.plain import plain_layers
from metaft.objective import loss_value
from metaft.support.foreign import in_our_words
from metaft.support.modes import in_usual_modes_but_type
from metaft.types import Loss, Moments, Params

_plain: ContextVar[bool] = ContextVar("plain_operations", default=False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Inside, `Model.loss` is composed from PyTorch's operations: a compiler fuses those better than what is fused."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class LossOf(Protocol):
    def __call__(
        self, params: Params, x: Tensor, y: Tensor, loss: Loss, *, curvature: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the prediction [batch, outputs], through which only the loss can be differentiated.

        `curvature` says that the loss's gradient will be differentiated as well; where it is not said, that works too
        but may be slower.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """An architecture as pure functions, with the parameters it starts from.

    `apply(params, x, moments)` gives [batch, outputs]; `features` the same without the head, flattened to
    [batch, D]. `moments=None` normalises the batch with its own statistics, otherwise with those given.
    """

    params: Params
    apply: Callable[[Params, Tensor, Moments | None], Tensor]
    features: Callable[[Params, Tensor, Moments | None], Tensor]
    of_head: Callable[[Params, Tensor], Callable[[Params], Tensor] | None]
    """(params, x): `apply(..., x, None)` as a function of the head's parameters alone, on features computed once. None
    for a module of which that is not true: it does something to what its head gives, or uses the head's weights twice.
    """
    measure: Callable[[Params, Tensor], Moments]
    """Moments of a batch at every normalisation layer, in forward order."""
    loss: LossOf
    """Mean loss and prediction of a batch normalised with its own moments; see `LossOf`."""
    fuses: Callable[[Tensor, Loss], bool]
    """(x, loss): whether `loss` of such images is one operation, which takes them in bfloat16 too (`models.fused`)."""
    infers: Callable[[Params, Tensor], bool]
    """(params, x): whether `apply`, `features`, `of_head` and `measure`, where they are called now, have no derivative
    and take such images in bfloat16 likewise."""
    head: tuple[str, ...]
    """Names of the head's parameters."""
    norm: tuple[str, ...]
    """Names of the normalisation layers' parameters."""
    outputs: int
    convolutional: bool
    drops: bool
    """Whether a layer drops entries in inner steps."""
    architecture: Mapping[str, object]
    """Plain data from which `metaft.models.build` makes the same model again."""
    frozen: Params = dataclasses.field(default_factory=dict)
    """Parameters that the user froze (requires_grad=False): constants like the buffers, and in none of the others."""
    buffers: Params = dataclasses.field(default_factory=dict)
    """Those that the module's state_dict has."""
    head_bound: str = ""
    """Why nothing else can take the place of the head's weight and bias, "" where it can."""

    def check_head(self, member: str) -> None:
        """Raises MetaftError, for a member that makes the head's weight and bias anew, where it cannot."""
        if self.head_bound:
            raise MetaftError(f"algorithm: {member} makes the head of a task anew, and {self.head_bound}")


# Above 60 lines: the closures of one `Model`, a few lines each.
@in_usual_modes_but_type
def functional(
    module: nn.Module, *, head: str | None = None, architecture: Mapping[str, object] | None = None
) -> Model:
    """Turn a module into a `Model`. The module itself is neither changed nor kept.

    `head` names the final linear layer; by default it is the last `nn.Linear`. Batch normalisation layers become
    `EpisodeNorm`, dropout layers `EpisodeDropout`, and recurrent layers compute by plain operations. Parameters keep
    the module's device and dtype; buffers and frozen parameters (requires_grad=False) travel along as constants. What
    compiles or copies a module (torch.compile, nn.DataParallel) is taken away.

    Raises MetaftError for a module without a linear head, with lazy parameters, of another type than float32 or
    float64 or of several, with nothing to learn, or with layers that cannot be converted.
    """
    module, head = prepared(module, head)
    whole = _pure(module)
    still, dtype = frozen(module), next(module.parameters()).dtype
    # Not on a GPU, where many small calls are what costs.
    fused = module if isinstance(module, Conv4) and head == "head" and not still and _as_written(module) else None
    last = linear(module, head)
    bare, top, seen = _pure(body_of(module, head)), _pure(last), _pure(watched(module, head))
    names = [name for name, _ in module.named_parameters() if name not in still]
    parts = {part: f"{head}.{part}" for part, p in last.named_parameters() if p.requires_grad}
    last_ids = {id(p) for p in last.parameters()}
    tied = len(last_ids) < sum(id(p) in last_ids for _, p in module.named_parameters(remove_duplicate=False))

    def at_once(params: Params, x: Tensor, *more: torch.dtype) -> Conv4 | None:
        """What computes x in few operations, where there is such a thing."""
        if fused is None or x.device.type != "cpu" or not len(x) or _plain.get():
            return None
        return fused if x.dtype in (dtype, *more) and params["blocks.0.weight"].dtype == dtype else None

    def inferred(params: Params, x: Tensor) -> Conv4 | None:
        """The same where nobody asks for a derivative and tasks come one by one, for images in bfloat16 too."""
        return at_once(params, x, torch.bfloat16) if not torch.is_grad_enabled() and not in_transform() else None

    def apply(params: Params, x: Tensor, moments: Moments | None = None) -> Tensor:
        if (conv4 := inferred(params, x)) is not None:
            found, _ = conv4.inferred(params, x, moments)
            return F.linear(found, params[f"{head}.weight"], params[f"{head}.bias"])
        return whole(params, x, moments)

    def features(params: Params, x: Tensor, moments: Moments | None = None) -> Tensor:
        if (conv4 := inferred(params, x)) is not None:
            return conv4.inferred(params, x, moments)[0]
        derived = moments is None and torch.is_grad_enabled() and not x.requires_grad
        if derived and (conv4 := at_once(params, x)) is not None:
            return conv4.embedded(params, x)
        return bare(params, x, moments)

    def of_head(params: Params, x: Tensor) -> Callable[[Params], Tensor] | None:
        if tied:
            return None
        if (inferred(params, x) or at_once(params, x)) is not None:  # its head is known, and nothing comes after it
            embedded = features(params, x, None)
            return lambda own: F.linear(embedded, own[f"{head}.weight"], own[f"{head}.bias"])
        with watching() as watch:
            result = seen(params, x, None)
        given = watch.features(result)
        if given is None:
            return None
        return lambda own: top({part: own[name] for part, name in parts.items()}, given, None)

    def fuses(x: Tensor, loss: Loss) -> bool:
        return fused is not None and loss == "cross_entropy" and x.device.type == "cpu" and not _plain.get()

    checked: list[bool] = []  # once is enough, in each process

    def loss_of(params: Params, x: Tensor, y: Tensor, loss: Loss, *, curvature: bool = False) -> tuple[Tensor, Tensor]:
        if fused is not None and fuses(x, loss):
            return fused.cross_entropy(params, x, y, curvature=curvature)
        prediction = whole(params, x, None)
        value = loss_value(loss, prediction, y)
        if curvature and not checked and value.grad_fn is not None:
            check_twice_differentiable(value)
            checked.append(True)
        return value, prediction.detach()

    norms = [path for path, part in module.named_modules() if isinstance(part, EpisodeNorm)]

    def measure(params: Params, x: Tensor) -> Moments:
        if not norms:
            return ()
        if (conv4 := inferred(params, x)) is not None:
            return conv4.inferred(params, x, None)[1]
        with measure_moments() as measured:
            bare(params, x, None)
        return tuple(measured)

    return Model(
        params={name: p.detach().clone() for name, p in module.named_parameters() if name not in still},
        apply=apply,
        features=features,
        of_head=of_head,
        measure=measure,
        loss=loss_of,
        fuses=fuses,
        infers=lambda params, x: inferred(params, x) is not None,
        head=tuple(n for n in names if n.startswith(f"{head}.")),
        norm=tuple(n for n in names if n.rpartition(".")[0] in norms),
        outputs=linear(module, head).out_features,
        drops=drops(module),
        convolutional=any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()),
        architecture=architecture or {"name": "custom", "class": class_of(module)},
        frozen=still,
        buffers=buffers(module),
        head_bound=_bound(last, head),
    )


def prepared(module: nn.Module, head: str | None = None) -> tuple[nn.Module, str]:
    """A copy of a module as tasks can share it, with EpisodeNorm, EpisodeDropout and TaskConv2d layers and recurrent
    ones of plain operations, and the name of its head.

    Raises MetaftError as `functional` does.
    """
    module = plain_layers(task_convolutions(episode_dropout(episode_norms(taken(module)))))
    head = head if head is not None else _last_linear(module)
    linear(module, head)
    return module, head


def _as_written(module: Conv4) -> bool:
    """Whether nothing of it was changed after it was made, which the fused operations could not know of: no layer, no
    setting of one, no parameter, no hook and no dropout."""
    first = dict(module.named_parameters()).get("blocks.0.weight")
    if type(module) is not Conv4 or drops(module) or first is None or first.dim() != 4:
        return False
    width, channels = first.shape[:2]
    with torch.device("meta"):  # the constructor would draw from the global generator
        made = Conv4(2, (channels, 16, 16), width, "stride" if module.average else "pool")
        made = task_convolutions(episode_norms(made))
    assert isinstance(made, Conv4)
    hooked = any(vars(part)[kind] for part in module.modules() for kind in ("_forward_hooks", "_forward_pre_hooks"))
    names = [[name for name, _ in each.named_parameters()] for each in (module, made)]
    return not hooked and repr(module.blocks) == repr(made.blocks) and names[0] == names[1] and is_plain(module.head)


def linear(module: nn.Module, head: str) -> nn.Linear:
    """The head. Raises MetaftError where there is no linear layer of that name."""
    layer = dict(module.named_modules()).get(head)
    if not isinstance(layer, nn.Linear):
        raise MetaftError(f"head {head!r} is not an nn.Linear of this module; its linear layers are {_linears(module)}")
    return layer


def is_plain(layer: nn.Linear) -> bool:
    """Whether weight and bias are all that there is to a linear layer."""
    hooked = any(vars(layer)[kind] for kind in ("_forward_hooks", "_forward_pre_hooks"))
    return type(layer) is nn.Linear and not hooked and layer._parameters.keys() == {"weight", "bias"}


def _bound(layer: nn.Linear, head: str) -> str:
    if not is_plain(layer):
        return f"{head!r} is no plain nn.Linear ({type(layer).__name__}, or one with hooks)"
    if not all(p.requires_grad for p in layer.parameters()):
        return f"{head!r} is frozen (requires_grad=False)"
    return ""


def _pure(module: nn.Module) -> Callable[[Params, Tensor, Moments | None], Tensor]:
    fixed = {name: b.detach().clone() for name, b in module.named_buffers()} | frozen(module)
    # Tied weights appear once in `params` but must be filled in under every name.
    first = {id(p): name for name, p in module.named_parameters()}
    names = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    local = threading.local()

    def call(params: Params, x: Tensor, moments: Moments | None) -> Tensor:
        # functional_call swaps tensors inside the module while it runs, so each thread owns a skeleton. It lives on
        # the meta device: a tensor that was not handed in raises instead of silently serving a stale weight.
        skeleton = getattr(local, "skeleton", None)
        if skeleton is None:
            skeleton = local.skeleton = copied(module).to("meta")
        if wide and x.dtype == torch.float32:  # as data comes
            x = x.double()
        constants = {name: fixed[source] for name, source in names.items() if source in fixed}
        learned = {name: params[source] for name, source in names.items() if source not in fixed}
        given = contextlib.nullcontext() if moments is None else use_moments(moments)
        with eagerly(), given:
            result = torch.func.functional_call(skeleton, {**fixed, **constants, **learned}, (x,), tie_weights=False)
        if not isinstance(result, Tensor):
            raise MetaftError(
                f"module: the forward pass of {class_of(module)} returns a {type(result).__name__}; it must return the "
                "outputs alone, one tensor [n, outputs]"
            )
        return result

    return call


def probe_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A batch [2, *shape] of floats to try a module on."""
    return torch.linspace(-1, 1, 2 * math.prod(shape), dtype=dtype).view(2, *shape)


def check_repeats(model: Model, shape: tuple[int, ...], x: Tensor | None = None) -> None:
    """Raises MetaftError for a module that cannot take x [2, *shape], does not give [2, outputs], or whose forward pass
    is not a function of parameters and input. Without `x` that is a batch of floats.

    That catches what no list of layers can: functional dropout, and state that a forward pass writes.
    """
    name = model.architecture.get("class", "the module")
    probe = next(iter(model.params.values()))
    x = (probe_of(shape, probe.dtype) if x is None else x).to(probe.device)
    takes = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    before = torch.get_rng_state()
    try:
        with in_our_words(f"module: {name} cannot take inputs of {takes}"):
            first, second = model.apply(model.params, x, None), model.apply(model.params, x, None)
    finally:
        drew = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
    if first.shape != (2, model.outputs):
        raise MetaftError(
            f"module: {name} gives {list(first.shape)} for 2 inputs, not [2, {model.outputs}] as its head does"
        )
    if drew or not torch.equal(first, second):
        raise MetaftError(
            f"model: {name} gives two results for one input "
            "(dropout in its forward, or a buffer that it writes?); tasks could not be reproduced"
        )


def _linears(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]


def _last_linear(module: nn.Module) -> str:
    linears = [path for path in _linears(module) if path]
    if not linears:
        raise MetaftError(f"{type(module).__name__} has no nn.Linear inside it to serve as head")
    return linears[-1]
