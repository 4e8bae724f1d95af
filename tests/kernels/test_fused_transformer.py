"""Transformer sublayers that are one node each: the bytes of the same layers module by module."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from numeric import assert_close

from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.models.transformer import DecoderLayer, EncoderLayer, TransformerConfig, attention_mask, transformer
from fp8repro.precision import fused_transformer
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_transformer import FusedDecoderLayer, FusedEncoderLayer
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEADS, FFN, STEPS, LENGTH, BATCH = 16, 2, 24, 2, 3, 2
SIZE = {"width": WIDTH, "heads": HEADS, "ffn_width": FFN, "dropout": 0.0}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the oracle computes exponentials as the interpreter does")


class InterpretedSoftmax(torch.autograd.Function):
    """Softmax by the interpreter's exponentials and sums; torch's differ in their last bits."""

    @staticmethod
    def padded(x, value):
        columns = x.shape[-1]
        rows = x.detach().reshape(-1, columns).numpy()
        pad = triton.next_power_of_2(columns) - columns
        return np.pad(rows, ((0, 0), (0, pad)), constant_values=value)

    @staticmethod
    def forward(ctx, x):
        rows = InterpretedSoftmax.padded(x, -np.inf)
        weights = np.exp(rows - rows.max(1, keepdims=True))
        weights = weights / weights.sum(1, keepdims=True)
        ctx.weights = weights
        return torch.from_numpy(weights[:, : x.shape[-1]].copy()).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        weighted = ctx.weights * InterpretedSoftmax.padded(grad, 0.0)
        result = weighted - ctx.weights * weighted.sum(1, keepdims=True)
        return torch.from_numpy(result[:, : grad.shape[-1]].copy()).view(grad.shape)


def modules_alone(monkeypatch):
    monkeypatch.setattr(fused_transformer, "_taken", lambda *_: False)
    monkeypatch.setattr(torch, "softmax", lambda x, dim, dtype: InterpretedSoftmax.apply(x))


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def converted(model, recipe="fp8", **options):
    inject(model, load_recipe(recipe), StepContext(seed=5), "triton", **options)
    return model


class Layers(torch.nn.Module):
    """An encoder and a decoder layer, and a linear layer that is exempt as the last one."""

    def __init__(self, **size):
        super().__init__()
        torch.manual_seed(3)
        config = TransformerConfig(12, **(SIZE | size))
        self.encoder, self.decoder = EncoderLayer(config), DecoderLayer(config)
        self.last = torch.nn.Linear(1, 1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5)


MASK = attention_mask(torch.arange(LENGTH) >= torch.tensor([3, 2])[:, None])[:, None, None].to(DEVICE)
CAUSAL = attention_mask(torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1)).to(DEVICE)


def layer_pass(model, which, step=3):
    """Output and gradients of a layer by name."""
    x = draw(LENGTH if which == "encoder" else STEPS, BATCH, WIDTH).requires_grad_()
    encoded = draw(LENGTH, BATCH, WIDTH, seed=1).requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    model.fp8_context.begin(step)
    if which == "encoder":
        y = model.encoder(x, MASK)
    else:
        y = model.decoder(x, model.decoder.cache(encoded), MASK, CAUSAL)
    (512 * y * draw(*y.shape, seed=9)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "encoded": encoded.grad}
    return found | {name: parameter.grad for name, parameter in getattr(model, which).named_parameters()}


def compare(given, expected, model):
    assert given.keys() == expected.keys()
    for name, values in expected.items():
        if values is None:
            assert given[name] is None, name
        elif "norm" in name or name.endswith("bias"):
            # Sums over rows in another order; nothing rounds them afterwards.
            assert_close(given[name], values, 1e-5, norm=True)
        else:
            assert torch.equal(given[name], values), name


@interpreted
@pytest.mark.parametrize("recipe", ["fp8", "fp8_nearest"])
@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_a_layers_pass_gives_the_bytes_of_its_modules(which, recipe, monkeypatch):
    model = converted(Layers(), recipe)
    assert (type(model.encoder), type(model.decoder)) == (FusedEncoderLayer, FusedDecoderLayer)
    given = layer_pass(model, which)
    modules_alone(monkeypatch)
    compare(given, layer_pass(model, which), model)


def test_nothing_is_turned_and_little_launched():
    model = converted(Layers())
    layer_pass(model, "encoder")
    with counted_launches() as launched:
        layer_pass(model, "encoder")
    assert launched["transpose"] == 0
    # Query, key, value, scores, context and out, with their errors, and two gradients, for three weights have one.
    attention = 6 + (4 + 2 * 2) + 2
    assert launched["multiply"] == attention + 2 * 3
    others = {"reround": 4 + 2, "softmax_forward": 1, "softmax_backward": 1, "finish_gradients": 2 + 2}
    others |= {"sum_rounded": 2, "residual_norm_forward": 2, "residual_norm_backward": 2}
    assert {name: launched[name] for name in others} == others
