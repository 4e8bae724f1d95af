"""Every kind of layer takes 16-bit inputs as their FP32 values, and names what it cannot honour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fp8repro.errors import UserError
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

FP8 = replace(load_recipe("fp8_stochastic"), exempt=())
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 4), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (3, 2, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding_mode="reflect", padding=1), (3, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2), (3, 2, 4, 4)),
    "lstm": (lambda: nn.LSTM(8, 4, proj_size=2, bidirectional=True, num_layers=2), (5, 3, 8)),
    "gru": (lambda: nn.GRU(8, 4, batch_first=True), (5, 3, 8)),
    "rnn": (lambda: nn.RNN(8, 4), (5, 3, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (5, 3, 8)),
    "cell": (lambda: nn.LSTMCell(8, 4), (3, 8)),
}


def converted(kind: str) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleList([LAYERS[kind][0]()])
    inject(model, FP8, StepContext(seed=2))
    return model


def run(model: Any, *inputs: Any) -> Tensor:
    model.fp8_context.begin(0)
    result = model[0](*inputs)
    while not isinstance(result, Tensor):
        result = result[0]
    result.square().sum().backward()
    assert result.dtype == torch.float32
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_16_bits_are_their_values_in_fp32(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(1)).to(dtype)
    models = [converted(kind), converted(kind)]
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    results = [run(model, given) for model, given in zip(models, inputs, strict=True)]
    assert torch.equal(*results)
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert inputs[0].grad.dtype == dtype
    # A single product's errors are E5M2's; sums of up to four (projections, mirrored borders, directions) are rounded.
    rounding = 4 * torch.finfo(dtype).eps if kind in ("attention", "conv2d", "lstm") else 0.0
    torch.testing.assert_close(inputs[0].grad.float(), inputs[1].grad, rtol=rounding, atol=1e-6 if rounding else 0.0)


def test_states_and_packed_sequences_of_16_bit_too() -> None:
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1)).half()
    state = (torch.ones(1, 3, 4).half(), torch.ones(1, 3, 4).half())
    results = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        model: Any = nn.ModuleList([nn.LSTM(8, 4)])
        inject(model, FP8, StepContext(seed=2))
        packed = pack_padded_sequence(x.to(dtype), torch.tensor([4, 2, 1]))
        results.append(run(model, packed, tuple(part.to(dtype) for part in state)))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", sorted(set(LAYERS) - {"lstm", "gru", "rnn", "cell"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_what_would_be_rounded_twice_is_named(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=rf"layer 0.*: got an input of {dtype}, expected float32, float16 or bfloat16"):
        run(converted(kind), torch.ones(LAYERS[kind][1], dtype=dtype))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_layers_leave_that_to_torch(kind: str) -> None:
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match"):
        run(converted(kind), torch.ones(LAYERS[kind][1], dtype=torch.float64))
