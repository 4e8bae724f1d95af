"""What lies between the products of translation models, one launch each, relative to copy bandwidth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fp8repro.bench.gpu import Bench
from fp8repro.kernels.attention.launch import Dropout, Rerounded, empty_operand, reround, residual_norm, softmax
from fp8repro.kernels.lstm.launch import cell_backward, cell_forward, summed_gradient
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding

NEAREST, STOCHASTIC, BITS = Rounding(E5M2), Rounding(E5M2, "stochastic"), RandomBits(1, 2)


def measure_lstm(bench: Bench, rate: float) -> None:
    """A cell of GNMT (128 sentences, width 1,024) each way, and the gradient of its recurrent weight over 50 steps.

    Args:
        bench: where the numbers go.
        rate: bytes a millisecond of a plain copy.
    """
    rows, width, steps = bench.size(128), bench.size(1024), 50 if bench.scale == 1 else 2
    cell, grad, hidden, new = (torch.randn(rows, width, device=bench.device) for _ in range(4))
    gates, product, grad_gates = (torch.randn(rows, 4 * width, device=bench.device) for _ in range(3))
    codes = torch.empty_like(cell, dtype=E5M2.dtype)
    kept = (gates.to(E5M2.dtype), product.to(E5M2.dtype))
    turned = torch.empty(width, rows, dtype=E5M2.dtype, device=bench.device)
    shape = f"{rows}x{width}"
    outputs: dict[str, Any] = {"codes": codes, "transposed": turned, "kept": kept}
    ms = bench.milliseconds(partial(cell_forward, gates, product, cell, hidden, new, NEAREST, BITS, **outputs))
    bench.add("LSTM cell", shape, ms, rows * width * (32 + 12 + 2 + 8) / ms / rate, "copy bandwidth", None)
    error = torch.empty_like(gates, dtype=E5M2.dtype)
    error_turned = torch.empty(4 * width, rows, dtype=E5M2.dtype, device=bench.device)
    given = (grad, hidden[None], new, kept, cell, grad_gates, error, error_turned, STOCHASTIC, BITS, STOCHASTIC, BITS)
    ms = bench.milliseconds(partial(cell_backward, *given))
    bench.add("LSTM cell gradient", shape, ms, rows * width * (20 + 8 + 16 + 8) / ms / rate, "copy bandwidth", None)
    errors, inputs = (torch.randn(n, steps * rows, device=bench.device).to(E5M2.dtype) for n in (4 * width, width))
    streams = list(range(steps))
    ms = bench.milliseconds(partial(summed_gradient, errors, inputs, steps, STOCHASTIC, 1, streams))
    speed = 8 * steps * rows * width * width / ms / 1e9
    name = f"LSTM recurrent weight gradient, {speed:.0f} TFLOP/s"
    bench.add(name, f"{steps} steps, {shape}", ms, None, None, None)


def measure_sublayers(bench: Bench, rate: float) -> None:
    """Roundings of heads, softmax and residual normalization of the base Transformer (128 sentences of 32 tokens).

    Args:
        bench: where the numbers go.
        rate: bytes a millisecond of a plain copy.
    """
    steps, batch, heads, depth = 32, bench.size(128), 8, 64
    x = torch.randn(steps, batch, heads, depth, device=bench.device)
    shape = f"{steps}x{batch}x{heads * depth}"
    codes = x.new_empty(batch, heads, steps, depth, dtype=E5M2.dtype)
    turned = empty_operand(batch, heads, depth, steps, like=x, dtype=E5M2.dtype)
    tensor = Rerounded(x.permute(1, 2, 0, 3), codes, turned, BITS, BITS)
    ms = bench.milliseconds(partial(reround, [tensor] * 3, STOCHASTIC, STOCHASTIC))
    bench.add("heads rounded twice", f"3 of {shape}", ms, 3 * 6 * x.numel() / ms / rate, "copy bandwidth", None)
    scores = torch.randn(batch, heads, steps, steps, device=bench.device)
    weights, weights_turned = (empty_operand(batch, heads, steps, steps, like=x, dtype=E5M2.dtype) for _ in range(2))
    ms = bench.milliseconds(partial(softmax, scores, None, NEAREST, weights, weights_turned))
    bench.add("softmax -> E5M2", str(tuple(scores.shape)), ms, 6 * scores.numel() / ms / rate, "copy bandwidth", None)
    rows = x.view(steps * batch, heads * depth)
    y, weight = torch.empty_like(rows, dtype=E5M2.dtype), torch.ones(heads * depth, device=bench.device)
    rows_turned = empty_operand(*rows.shape[::-1], like=rows, dtype=E5M2.dtype)
    given = (rows, rows, weight, weight, 1e-5, Dropout.of(0.1, BITS), NEAREST, y, rows_turned)
    ms = bench.milliseconds(partial(residual_norm, *given))
    bench.add("dropout + sum + layer norm", shape, ms, 18 * rows.numel() / ms / rate, "copy bandwidth", None)
