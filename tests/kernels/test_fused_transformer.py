"""Transformer sublayers that are one node each: the bytes of the same layers module by module."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from numeric import assert_close

from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.models.transformer import DecoderLayer, EncoderLayer, TransformerConfig, attention_mask, transformer
from fp8repro.numerics.streams import StreamTable
from fp8repro.precision import fused_transformer
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_transformer import FusedDecoderLayer, FusedEncoderLayer, LaterCache
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
    y = model.encoder(x, MASK) if which == "encoder" else model.decoder(x, model.decoder.cache(encoded), MASK, CAUSAL)
    (512 * y * draw(*y.shape, seed=9)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "encoded": encoded.grad}
    return found | {name: parameter.grad for name, parameter in getattr(model, which).named_parameters()}


def compare(given, expected):
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
@pytest.mark.parametrize(
    ("which", "recipe"), [pytest.param("encoder", "fp8_nearest", marks=pytest.mark.long), ("decoder", "fp8")]
)
def test_a_layers_pass_gives_the_bytes_of_its_modules(which, recipe, monkeypatch):
    model = converted(Layers(), recipe)
    assert (type(model.encoder), type(model.decoder)) == (FusedEncoderLayer, FusedDecoderLayer)
    with counted_launches() as launched:
        given = layer_pass(model, which)
    # Query, key, value, scores, context and out, with their errors, and two gradients, for three weights have one; a
    # third one where keys and values are another's.
    attention = 6 + (4 + 2 * 2) + 2
    expected = {"multiply": attention + 2 * 3, "reround": 4 + 2, "softmax_forward": 1, "softmax_backward": 1}
    expected |= {"finish_gradients": 2 + 2, "sum_rounded": 2, "residual_norm_forward": 2, "residual_norm_backward": 2}
    if which == "decoder":
        more = {"multiply": attention + 1, "reround": 4, "softmax_forward": 1, "softmax_backward": 1}
        more |= {"finish_gradients": 3, "sum_rounded": 2, "residual_norm_forward": 1, "residual_norm_backward": 1}
        expected = {name: count + more[name] for name, count in expected.items()}
    assert dict(launched) == expected
    modules_alone(monkeypatch)
    compare(given, layer_pass(model, which))


def test_streams_may_lie_in_memory_as_a_graph_wants_them():
    model = converted(Layers(dropout=0.25))
    expected = layer_pass(model, "encoder", 7)
    context, slots = model.fp8_context, StreamTable(torch.device(DEVICE), 64)
    with context.streams_in_memory(slots):
        layer_pass(model, "encoder", 3)
        context.begin(7)
        slots.refresh(context.stream_number)
        given = layer_pass(model, "encoder", 7)
    assert len(slots) > 20
    for name, values in expected.items():
        assert values is None or torch.equal(given[name], values), name


def tiny():
    torch.manual_seed(1)
    return transformer(13, encoder_layers=1, decoder_layers=1, **SIZE).to(DEVICE)


SOURCE = torch.tensor([[5, 6, 2], [9, 2, 1]], device=DEVICE)


def test_a_decoder_that_was_trained_goes_on_token_by_token(monkeypatch):
    model, given = converted(tiny()), []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(fused_transformer, "_taken", lambda *_: False)
        model.fp8_context.begin(0)
        state = model.begin(SOURCE)
        assert isinstance(state.layers[0], LaterCache) == fused
        model.decoder(torch.tensor([[2, 6], [2, 9]], device=DEVICE), state)
        for token in (7, 8):
            state.select(torch.tensor([1, 0], device=DEVICE))
            logits, _ = model.step(torch.tensor([token, token + 1], device=DEVICE), state)
        given.append(logits)
    assert_close(given[0], given[1], 1e-2, norm=True)


@pytest.mark.parametrize("watched", ["hook", "observer", "telemetry", "evaluation", "dropout", "frozen"])
def test_passes_that_the_kernels_cannot_make_take_the_modules(watched):
    model, seen = converted(Layers(attention_dropout=0.5 * (watched == "dropout"))), []
    context = model.fp8_context
    if watched == "hook":
        model.encoder.self_attn.product.scores.register_forward_hook(lambda *_: seen.append(1))
    elif watched == "observer":
        context.observers.append(lambda name, product, operands: seen.append(1))
    elif watched == "telemetry":
        context.telemetry.active = True
    elif watched == "evaluation":
        model.eval()
    elif watched == "frozen":
        model.encoder.fc1.weight.requires_grad_(False)
    context.begin(0)
    with counted_launches() as launched:
        model.encoder(draw(LENGTH, BATCH, WIDTH), MASK)
    assert launched["residual_norm_forward"] == 0
    assert bool(seen) == (watched in ("hook", "observer"))


@pytest.mark.parametrize("recipe", ["fp8_stochastic", "fp8_hybrid", "fp16"])
def test_layers_under_other_recipes_stay_as_they_are(recipe):
    assert type(converted(Layers(), recipe).encoder) is EncoderLayer


def test_layers_with_a_part_in_fp32_stay_as_they_are():
    model = converted(Layers(), leave=["encoder.fc2"])
    assert (type(model.encoder), type(model.decoder)) == (EncoderLayer, FusedDecoderLayer)


@interpreted
@pytest.mark.long
def test_a_training_step_of_a_model_gives_the_bytes_of_its_modules(monkeypatch):
    model, found = converted(tiny()), []
    for fused in (True, False):
        if not fused:
            modules_alone(monkeypatch)
        model.fp8_context.begin(0)
        target = torch.tensor([[2, 6], [2, 9]], device=DEVICE)
        logits = model(SOURCE, target)
        model.zero_grad()
        (256 * F.cross_entropy(logits.flatten(0, 1), target.flatten())).backward()
        found.append({"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()})
    compare(*found)
