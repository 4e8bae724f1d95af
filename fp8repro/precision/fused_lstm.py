"""An LSTM layer's recurrence in one autograd node: two launches a time step, forward and backward; on a CPU its cells.

The kernels compute what the layer's modules would one by one, with the same roundings and random bits. Nothing here may
choose a rounding; what is measured, observed, hooked or traced takes the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# As in `functional`.
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from fp8repro.engines.cpu import lstm as native
from fp8repro.engines.guards import plain
from fp8repro.engines.products import Operand
from fp8repro.engines.quantizer import round_into
from fp8repro.models.gnmt import LSTMCell, LSTMLayer
from fp8repro.numerics.formats import FP32, FloatFormat
from fp8repro.numerics.rounding import IDENTITY
from fp8repro.precision.become import become
from fp8repro.precision.bypass import has_hooks, is_observed
from fp8repro.precision.functional import without_autocast
from fp8repro.precision.fused_normalization import storage_format
from fp8repro.precision.site import Site


class FusedLSTMLayer(LSTMLayer):
    """`LSTMLayer` whose cells Triton kernels compute, with the roundings around them.

    Attributes:
        gates_format: holds the values that `input_gates` gives.
    """

    gates_format: FloatFormat

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `LSTMLayer`."""
        given = (x, *(state or ()))
        fits = all(t.dtype == torch.float32 for t in given) and x.numel() > 0
        if not (fits and plain(*given) and _unwatched(self.hidden_gates)):
            return super().forward(x, state)
        return _recurrence(self, self.input_gates(x), state)


def _unwatched(module: nn.Module) -> bool:
    """True where nobody asked to see a layer's calls."""
    site: Site = module.site  # type: ignore[assignment]
    return not (has_hooks([module]) or site.context.telemetry.active or is_observed(site.context))


class NativeLSTMLayer(LSTMLayer):
    """`LSTMLayer` whose cells the C++ engine computes, to the same bits, where it takes them."""

    def cell(self, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """See `LSTMLayer`."""
        if not native.takes(gates, cell):
            return super().cell(gates, cell)
        hidden, new_cell = _NativeCell.apply(gates, cell)
        return hidden, new_cell


class _NativeCell(LSTMCell):
    """`LSTMCell` by the C++ engine."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        width = cell.shape[-1]
        activated = torch.sigmoid(gates)
        torch.tanh(gates.narrow(-1, 2 * width, width), out=activated.narrow(-1, 2 * width, width))
        new_cell = native.cell_state(activated, cell)
        squashed = torch.tanh(new_cell)
        ctx.save_for_backward(activated, cell, squashed)
        return activated.narrow(-1, 3 * width, width) * squashed, new_cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_hidden, grad_cell = (g.contiguous() for g in grads)
        # Who differentiates twice, or traces, gets torch's operators.
        if torch.is_grad_enabled() or not native.takes(grad_hidden, grad_cell):
            return LSTMCell.backward(ctx, grad_hidden, grad_cell)
        activated, cell, squashed = ctx.saved_tensors
        return native.cell_gradients(activated, cell, squashed, grad_hidden, grad_cell)


@_disable_dynamo
def _recurrence(
    layer: FusedLSTMLayer, gates: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    weights = layer.hidden_gates
    site: Site = weights.site  # type: ignore[assignment]
    hidden, cell = state or (None, None)
    site.check(gates, weights.weight, weights.bias)
    arguments = (site, layer.gates_format, layer.training)
    outputs, last, codes, transposed = _Recurrence.apply(gates, hidden, cell, weights.weight, weights.bias, *arguments)
    how = site.spec("activation", layer.training)
    if not how.is_stochastic:
        site.context.offers.make(outputs, how, codes.detach(), None if transposed is None else transposed.detach())
    return outputs, (outputs[-1], last)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        hidden: Tensor | None,
        cell: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        site: Site,
        gates_format: FloatFormat,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gates of the inputs [T, B, 4h], state [B, h], recurrent weight [4h, h] -> hidden states and last cell.

        Also the codes of the hidden states [T, B, h] and, for a backward pass, their transpose [h, T * B].
        """
        from fp8repro.kernels.lstm.launch import cell_forward

        steps, rows, width = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        keep, how = any(ctx.needs_input_grad), site.spec("activation", training)
        new, dtype = gates.new_empty, how.format.dtype
        outputs, cells = new(steps, rows, width), new(steps, rows, width)
        last = new(rows, width)
        # The state before each step, and after the last.
        codes = new(steps + 1, rows, width, dtype=dtype)
        transposed = new(width, steps + 1, rows, dtype=dtype) if keep else None
        kept_gates = new(gates.shape, dtype=gates_format.dtype) if keep and gates_format is not FP32 else None
        kept = new(gates.shape, dtype=storage_format(site).dtype) if keep else None
        calls = [site.next_call(training) for _ in range(steps)]
        with without_autocast(gates.device.type):
            recurrent = site.weight(weight, training, training)
            _first_state(codes[0], hidden, site, calls[0], training)
            if transposed is not None:
                _bytes(transposed)[:, 0].copy_(_bytes(codes[0]).t())
            if cell is None:
                cells[0].zero_()
            else:
                cells[0].copy_(cell)
            role = "activation" if site.round_outputs else None
            for step, call in enumerate(calls):
                x = Operand(codes[step], how.format)
                site.announce("forward", x, recurrent)
                product = site.product(lambda b: b.linear(x, recurrent, bias), role, "output", call, training)  # noqa: B023
                final = step + 1 == steps
                # Nobody takes the last state; it is rounded for the layers behind.
                bits = site.bits(how, "activation", "input", call if final else calls[step + 1])
                cell_forward(
                    gates[step],
                    product,
                    cells[step],
                    outputs[step],
                    last if final else cells[step + 1],
                    how,
                    bits,
                    codes=codes[step + 1],
                    transposed=None if transposed is None else transposed[:, step + 1],
                    kept=(
                        None if kept_gates is None else kept_gates[step],
                        None if kept is None else kept[step],
                    ),
                )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes)
        if transposed is None:
            return outputs, last, codes[1:], None
        ctx.save_for_backward(gates if kept_gates is None else kept_gates, kept, cells, transposed)
        # As in `functional`: no saved tensor, so that what its backend made of it stays with it.
        ctx.weight, ctx.site, ctx.calls, ctx.training = recurrent, site, calls, training
        ctx.place = site.context.place
        behind = transposed[:, 1:].flatten(1)
        ctx.mark_non_differentiable(behind)
        return outputs, last, codes[1:], behind

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        with without_autocast(ctx.saved_tensors[0].device.type), ctx.site.context.at(ctx.place):
            gradients = _backward(ctx, grad, grad_last)
        ctx.site.context.returned(ctx.site.name)
        return *gradients, *[None] * 3


def _first_state(codes: Tensor, hidden: Tensor | None, site: Site, call: int, training: bool) -> None:
    if hidden is None:
        _bytes(codes).zero_()
    else:
        how = site.spec("activation", training)
        round_into(hidden.detach(), how, site.bits(how, "activation", "input", call), codes=codes)


def _backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of gates, state, weight and bias, as far as they are wanted."""
    from fp8repro.kernels.lstm.launch import cell_backward

    site, backend, calls, training = ctx.site, ctx.site.backend, ctx.calls, ctx.training
    kept_gates, kept, cells, transposed = ctx.saved_tensors
    steps, rows, width = cells.shape
    _, needs_hidden, needs_cell, needs_weight, needs_bias = ctx.needs_input_grad[:5]
    how, format = site.spec("error", training), site.spec("activation", training).format
    grad_gates = cells.new_empty(steps, rows, 4 * width)
    errors = cells.new_empty(steps, rows, 4 * width, dtype=how.format.dtype)
    turned = cells.new_empty(4 * width, steps, rows, dtype=how.format.dtype)
    grad_cell = cells.new_zeros(rows, width) if grad_last is None else grad_last.clone()
    grad = grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()
    product, rounding = None, (how if site.round_input_errors else IDENTITY)
    for step in reversed(range(steps)):
        following = calls[min(step + 1, steps - 1)]
        cell_backward(
            None if grad is None else grad[step],
            product,
            grad_cell,
            (kept_gates[step], kept[step]),
            cells[step],
            grad_gates[step],
            errors[step],
            turned[:, step],
            how,
            site.bits(how, "error", "output_error", calls[step]),
            rounding,
            site.bits(rounding, "error", "input_error", following),
        )
        if step > 0:
            # The step before adds its parts up, and rounds it.
            product = backend.linear_error_parts(Operand(errors[step], how.format), ctx.weight)
    grad_hidden = None
    if needs_hidden:
        error, role = Operand(errors[0], how.format), "error" if site.round_input_errors else None
        grad_hidden = site.product(lambda b: b.linear_error(error, ctx.weight), role, "input_error", calls[0], training)
    # Of all steps, each with its transpose.
    x = Operand(transposed[:, :steps].flatten(1).t(), format, transposed=transposed[:, :steps].flatten(1))
    error = Operand(errors.flatten(0, 1), how.format, transposed=turned.flatten(1))
    grad_weight = _weight_gradient(site, error, x, calls, training) if needs_weight else None
    grad_bias = error.decoded().sum(0) if needs_bias else None
    return grad_gates, grad_hidden, grad_cell if needs_cell else None, grad_weight, grad_bias


def _weight_gradient(site: Site, error: Operand, x: Operand, calls: list[int], training: bool) -> Tensor:
    """As the recipe rounds it: at each step, or once over all of them, by the call whose backward pass ran last."""
    if site.recurrent_gradients == "sequence":
        multiply = lambda b: b.linear_gradient(error, x)  # noqa: E731
        return site.product(multiply, "gradient", "weight_gradient", calls[0], training)
    from fp8repro.kernels.lstm.launch import summed_gradient

    how = site.spec("gradient", training)
    bits = [site.bits(how, "gradient", "weight_gradient", call) for call in calls]
    streams, accumulate = [b.stream for b in bits], site.backend.accumulate  # type: ignore[attr-defined]
    assert error.transposed is not None
    assert x.transposed is not None
    return summed_gradient(error.transposed, x.transposed, len(calls), how, bits[0].seed, streams, accumulate)


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def use_native_cells(model: nn.Module) -> None:
    """Let the C++ engine compute the cells of LSTM layers, in place."""
    for module in model.modules():
        if type(module) is LSTMLayer:
            become(module, NativeLSTMLayer)


def use_lstm_kernels(model: nn.Module) -> None:
    """Let Triton kernels do the recurrences of LSTM layers whose recurrent products are FP8, in place."""
    for module in model.modules():
        site = getattr(module.hidden_gates, "site", None) if type(module) is LSTMLayer else None
        if isinstance(site, Site) and _fusible(site):
            inner = getattr(module.input_gates, "site", None)
            become(module, FusedLSTMLayer, gates_format=storage_format(inner) if isinstance(inner, Site) else FP32)


def _fusible(site: Site) -> bool:
    fp8 = all(site.roles[role].format.is_fp8 for role in ("activation", "error"))
    return fp8 and all(spec.scaling == "none" for spec in site.roles.values())
