"""`nn.LSTM`, `nn.GRU` and `nn.RNN` that multiply under a recipe, with every option of torch's.

torch's own forward pass checks, packs and permutes; only the operator at its heart is another. Each layer and direction
has one product for the inputs of all steps, one recurrent product a step and, with projections, another. States and
gates are FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from fp8repro.precision.function_products import WeightProduct
from fp8repro.precision.site import Site

States = tuple[Tensor, ...]
# Gates of the inputs, gates of the state, state -> state; hidden first.
Cell = Callable[[Tensor, Tensor, States], States]


def lstm_cell(x: Tensor, h: Tensor, state: States) -> States:
    """Gates in the order input, forget, cell, output."""
    i, f, g, o = (x + h).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_cell(x: Tensor, h: Tensor, state: States) -> States:
    """Gates in the order reset, update, new."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    update = torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (new + update * (state[0] - new),)


def tanh_cell(x: Tensor, h: Tensor, state: States) -> States:
    """One gate."""
    return (torch.tanh(x + h),)


def relu_cell(x: Tensor, h: Tensor, state: States) -> States:
    """One gate."""
    return (torch.relu(x + h),)


CELLS: dict[Any, Cell] = {
    torch.lstm: lstm_cell,
    torch.gru: gru_cell,
    torch.rnn_tanh: tanh_cell,
    torch.rnn_relu: relu_cell,
}


class FP8Recurrent(nn.RNNBase):
    """What recurrent layers that multiply under a recipe share.

    Attributes:
        site: the layer's place; its products have places of their own, named after it.
        products: the inputs', the recurrent and the projection's product of each layer and direction.
    """

    site: Site
    products: nn.ModuleDict

    def prepare(self) -> None:
        """Make the products."""
        kinds = ("input", "hidden", *(("projection",) if self.proj_size else ()))
        self.products = nn.ModuleDict()
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]:
                for kind in kinds:
                    name = f"{kind}_l{layer}{suffix}"
                    self.products[name] = WeightProduct(self.site.part(f"products.{name}"))

    def run(self, cell: Cell, x: Tensor, batch_sizes: list[int], hx: States, dropout: float) -> tuple[Tensor, ...]:
        """All layers over packed sequences.

        Args:
            cell: the arithmetic of a step.
            x: packed steps [sum(batch_sizes), input_size].
            batch_sizes: how many sequences have each step; never more than the step before.
            hx: states [layers * directions, B, width] each.
            dropout: between the layers.

        Returns:
            Packed results [sum(batch_sizes), directions * width], and the last states, shaped as `hx`.
        """
        weights = iter(self._flat_weights)
        last: list[States] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]:
                w_ih, w_hh = next(weights), next(weights)
                b_ih, b_hh = (next(weights), next(weights)) if self.bias else (None, None)
                gates = self.products[f"input_l{layer}{suffix}"](x, w_ih, b_ih)
                recurrent = self.products[f"hidden_l{layer}{suffix}"].repeated(w_hh, b_hh)  # type: ignore[operator]
                step = _step(cell, recurrent)
                if self.proj_size:
                    projection = self.products[f"projection_l{layer}{suffix}"]
                    step = _projected(step, projection.repeated(next(weights), None))  # type: ignore[operator]
                start = tuple(state[len(last)] for state in hx)
                output, end = (_backward if suffix else _forward)(step, gates, batch_sizes, start)
                outputs.append(output)
                last.append(end)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if dropout > 0 and layer + 1 < self.num_layers:
                x = F.dropout(x, dropout, self.training)
        return x, *(torch.stack(states) for states in zip(*last, strict=True))

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See torch's layer; inputs and states of 16 bit become FP32, as in every converted layer."""
        args, kwargs = tuple(map(_full, args)), {name: _full(arg) for name, arg in kwargs.items()}
        with _Instead(self):
            return super().forward(*args, **kwargs)


def _full(given: Any) -> Any:
    if isinstance(given, tuple) and not isinstance(given, PackedSequence):
        return tuple(map(_full, given))
    values = given.data if isinstance(given, PackedSequence) else given
    return given.float() if isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16) else given


def _step(cell: Cell, recurrent: Callable[[Tensor], Tensor]) -> Callable[[Tensor, States], States]:
    return lambda x, state: cell(x, recurrent(state[0]), state)


def _projected(
    step: Callable[[Tensor, States], States], projection: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, States], States]:
    def projected(x: Tensor, state: States) -> States:
        hidden, cell = step(x, state)
        return projection(hidden), cell

    return projected


def _forward(
    step: Callable[[Tensor, States], States], gates: Tensor, batch_sizes: list[int], state: States
) -> tuple[Tensor, States]:
    outputs, ended = [], []
    for rows in gates.split(batch_sizes):
        if len(rows) < len(state[0]):
            # Shorter sequences come last and end first.
            ended.append(tuple(s[len(rows) :] for s in state))
            state = tuple(s[: len(rows)] for s in state)
        state = step(rows, state)
        outputs.append(state[0])
    ended.append(state)
    return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))


def _backward(
    step: Callable[[Tensor, States], States], gates: Tensor, batch_sizes: list[int], start: States
) -> tuple[Tensor, States]:
    outputs: list[Tensor] = []
    state = tuple(s[:0] for s in start)
    for rows in reversed(gates.split(batch_sizes)):
        if len(rows) > len(state[0]):
            state = tuple(torch.cat([s, first[len(s) : len(rows)]]) for s, first in zip(state, start, strict=True))
        state = step(rows, state)
        outputs.append(state[0])
    return torch.cat(outputs[::-1]), state


class _Instead(TorchFunctionMode):
    """Runs a converted layer's own recurrence where torch's forward pass calls its operator."""

    def __init__(self, layer: FP8Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cell = CELLS.get(func)
        if cell is None:
            return func(*args, **(kwargs or {}))
        layer = self.layer
        if isinstance(args[3], bool):
            # A batch of sequences of one length: the weights, then whether there are biases.
            x, hx, dropout = args[0], args[1], args[5]
            x = x.transpose(0, 1) if layer.batch_first else x
            result, *states = layer.run(cell, x.flatten(0, 1), [x.shape[1]] * len(x), _states(hx), dropout)
            result = result.unflatten(0, x.shape[:2])
            return result.transpose(0, 1) if layer.batch_first else result, *states
        x, sizes, hx, dropout = args[0], args[1], args[2], args[6]
        return layer.run(cell, x, sizes.tolist(), _states(hx), dropout)


def _states(hx: Any) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


class FP8LSTM(FP8Recurrent, nn.LSTM):
    """`nn.LSTM` whose products follow a recipe."""


class FP8GRU(FP8Recurrent, nn.GRU):
    """`nn.GRU` whose products follow a recipe."""


class FP8RNN(FP8Recurrent, nn.RNN):
    """`nn.RNN` whose products follow a recipe."""
