"""Recurrent layers and weight_norm as plain operations, which vmap can map and autograd can differentiate twice.

PyTorch's own are single operations without a rule for vmap, and on a GPU without a second derivative; recurrent ones
take their weights from a list beside the parameters.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from metaft.errors import MetaftError

State = tuple[Tensor, ...]
"""(hidden [n, H]), and for an LSTM (hidden, cell)"""


def plain_layers(module: nn.Module) -> nn.Module:
    """Have nn.RNN, LSTM, GRU, their cells and weight_norm compute by plain operations, in place; returns the module.

    Layers with a forward pass of their own stay as they are.
    """
    for part in module.modules():
        if isinstance(part, _WeightNorm):
            part.forward = types.MethodType(_normed, part)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                hook.compute_weight = types.MethodType(_hooked, hook)
        for kind, forward in _FORWARDS.items():
            if isinstance(part, kind) and type(part).forward is kind.forward:
                part.forward = types.MethodType(forward, part)  # the class stays, with its parameters and hooks
    return module


def _normed(self: Any, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    """`forward` of the parametrization of torch.nn.utils.parametrizations.weight_norm."""
    # torch.norm_except_dim has no rule for vmap: PyTorch would go through the tasks one by one, with a warning.
    kept = None if self.dim in (None, -1) else self.dim % weight_v.dim()
    axes = [axis for axis in range(weight_v.dim()) if axis != kept]
    squares = weight_v.square()
    total = squares.sum() if kept is None else squares.sum(axes, keepdim=True)
    return weight_v * (weight_g / total.sqrt())


def _hooked(self: Any, module: nn.Module) -> Tensor:
    """The same for the hook of torch.nn.utils.weight_norm."""
    return _normed(self, getattr(module, f"{self.name}_g"), getattr(module, f"{self.name}_v"))


def _tanh(gates: Tensor, recurrent: Tensor, state: State) -> State:
    return (torch.tanh(gates + recurrent),)


def _relu(gates: Tensor, recurrent: Tensor, state: State) -> State:
    return (torch.relu(gates + recurrent),)


def _lstm(gates: Tensor, recurrent: Tensor, state: State) -> State:
    enter, forget, new, out = (gates + recurrent).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _gru(gates: Tensor, recurrent: Tensor, state: State) -> State:
    (reset, keep, new), (reset_h, keep_h, new_h) = gates.chunk(3, -1), recurrent.chunk(3, -1)
    share = (keep + keep_h).sigmoid()
    return ((1 - share) * (new + (reset + reset_h).sigmoid() * new_h).tanh() + share * state[0],)


_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
    "LSTM": _lstm,
    "GRU": _gru,
}


def _sequence(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """`forward` of nn.RNN, nn.LSTM and nn.GRU. Raises MetaftError for a packed sequence."""
    if not isinstance(input, Tensor):
        raise MetaftError(f"module: a {type(self).__name__} takes tensors here, not a {type(input).__name__}")
    single = input.dim() == 2
    x = input.unsqueeze(0 if self.batch_first else 1) if single else input
    x = x.transpose(0, 1) if self.batch_first else x  # [steps, n, features]
    is_lstm, directions = self.mode == "LSTM", 2 if self.bidirectional else 1
    first = (() if hx is None else tuple(hx) if is_lstm else (hx,)) or None
    if first is not None and single:
        first = tuple(part.unsqueeze(1) for part in first)
    ends: list[State] = []
    for layer in range(self.num_layers):
        ways = []
        for direction in range(directions):
            number = layer * directions + direction
            state = None if first is None else tuple(part[number] for part in first)
            name = f"l{layer}{'_reverse' if direction else ''}"
            out, end = _one_way(self, name, x.flip(0) if direction else x, state)
            ways.append(out.flip(0) if direction else out)
            ends.append(end)
        x = torch.cat(ways, -1) if directions > 1 else ways[0]
    x = x.transpose(0, 1) if self.batch_first else x
    last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    if single:
        x, last = x.squeeze(0 if self.batch_first else 1), tuple(part.squeeze(1) for part in last)
    return x, last if is_lstm else last[0]


def _one_way(self: Any, name: str, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs [steps, n, H] and the state it ends with."""

    def weight(kind: str, there: bool = True) -> Tensor | None:
        return getattr(self, f"{kind}_{name}") if there else None

    step, w_hh, b_hh = _STEPS[self.mode], weight("weight_hh"), weight("bias_hh", self.bias)
    projection = weight("weight_hr", self.proj_size > 0)
    w_ih = weight("weight_ih")
    assert w_ih is not None and w_hh is not None
    gates = F.linear(x, w_ih, weight("bias_ih", self.bias))
    if state is None:
        zeros = gates.new_zeros(x.shape[1], self.proj_size or self.hidden_size)
        state = (zeros, gates.new_zeros(x.shape[1], self.hidden_size)) if self.mode == "LSTM" else (zeros,)
    outputs = []
    for each in gates.unbind(0):
        state = step(each, F.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _cell(self: Any, input: Tensor, hx: Any = None) -> Any:
    """`forward` of nn.RNNCell, nn.LSTMCell and nn.GRUCell."""
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(_kind(self)) or f"RNN_{self.nonlinearity.upper()}"
    gates = F.linear(input, self.weight_ih, self.bias_ih)
    if hx is None:
        zeros = gates.new_zeros(*gates.shape[:-1], self.hidden_size)
        hx = (zeros, zeros) if mode == "LSTM" else zeros
    state = tuple(hx) if mode == "LSTM" else (hx,)
    state = _STEPS[mode](gates, F.linear(state[0], self.weight_hh, self.bias_hh), state)
    return state if mode == "LSTM" else state[0]


def _kind(layer: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _FORWARDS if isinstance(layer, kind))


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.RNN: _sequence,
    nn.LSTM: _sequence,
    nn.GRU: _sequence,
    nn.RNNCell: _cell,
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
}
