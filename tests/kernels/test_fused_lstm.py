"""LSTM layers whose recurrence is one node: the bytes of the same layers module by module."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close
from torch import nn

from fp8repro.engines import quantizer
from fp8repro.kernels import ops
from fp8repro.kernels.lstm.launch import cell_backward, cell_forward
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.models import gnmt as models
from fp8repro.models.gnmt import LSTMLayer, gnmt
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.numerics.streams import StreamTable
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_lstm import FusedLSTMLayer
from fp8repro.precision.injection import inject
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, ROWS, WIDTH = 3, 6, 16


class KernelCell(torch.autograd.Function):
    """The element-wise part of a cell by the same kernels: exponentials differ from torch's in their last bits."""

    @staticmethod
    def forward(ctx, gates, cell):
        hidden, new = torch.empty_like(cell), torch.empty_like(cell)
        zeros = torch.zeros_like(gates)
        cell_forward(gates, zeros, cell.contiguous(), hidden, new)
        ctx.save_for_backward(gates, zeros, cell.contiguous())
        return hidden, new

    @staticmethod
    def backward(ctx, grad_hidden, grad_cell):
        gates, zeros, cell = ctx.saved_tensors
        grad_gates, codes = torch.empty_like(gates), torch.empty_like(gates, dtype=torch.float8_e5m2)
        grad_cell, turned = grad_cell.clone(), torch.empty_like(codes.t().contiguous())
        given = (grad_hidden.contiguous(), None, grad_cell, (gates, zeros), cell, grad_gates, codes, turned)
        cell_backward(*given, Rounding(E5M2), RandomBits())
        return grad_gates, grad_cell


def modules_alone(monkeypatch):
    monkeypatch.setattr(models, "LSTMCell", KernelCell)
    monkeypatch.setattr(FusedLSTMLayer, "forward", LSTMLayer.forward)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def converted(model, recipe):
    inject(model, load_recipe(recipe), StepContext(seed=5), "triton")
    return model


def layer_pass(model, state, training=True):
    """A step's outputs and gradients by name."""
    model.train(training)
    x = draw(STEPS, ROWS, 8).requires_grad_()
    leaves = [] if state is None else [t.clone().requires_grad_() for t in state]
    for parameter in model.parameters():
        parameter.grad = None
    model.fp8_context.begin(3)
    outputs, (hidden, cell) = model[0](x, tuple(leaves) or None)
    weights = draw(STEPS, ROWS, WIDTH, seed=9)
    loss = (1024 * outputs * weights).sum()
    loss = loss if state is None else loss + (512 * hidden * cell).sum()
    loss.backward()
    found = {"outputs": outputs, "hidden": hidden, "cell": cell, "x": x.grad}
    found |= {f"state {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


def layer():
    torch.manual_seed(2)
    # The last fully connected layer would be exempt.
    return nn.Sequential(LSTMLayer(8, WIDTH, 0.4), nn.Linear(1, 1)).to(DEVICE)


@pytest.mark.parametrize(
    ("recipe", "with_state", "training"),
    [("fp8", False, True), ("fp8_stochastic", True, True), ("fp8_sequence", False, True), ("fp8", True, False)],
)
def test_a_pass_gives_the_bytes_of_its_modules(recipe, with_state, training, monkeypatch):
    fused = converted(layer(), recipe)
    assert type(fused[0]) is FusedLSTMLayer
    state = (draw(ROWS, WIDTH, seed=1), draw(ROWS, WIDTH, seed=2)) if with_state else None
    given = layer_pass(fused, state, training)
    modules_alone(monkeypatch)
    expected = layer_pass(fused, state, training)
    for name, values in expected.items():
        if values is None:
            assert given[name] is None
        elif name == "0.hidden_gates.bias" or (name == "0.hidden_gates.weight" and recipe == "fp8_sequence"):
            # Sums over all steps at once, in another order.
            assert_close(given[name], values, 1e-6 if name.endswith("bias") else 0.05, norm=True)
        else:
            assert torch.equal(given[name], values), name


def test_streams_may_lie_in_memory_as_a_graph_wants_them(monkeypatch):
    if INTERPRETED:
        # Kernels round here what they round on a GPU; C++ knows no stream in memory.
        monkeypatch.setattr(quantizer.native, "available", lambda: False)
        monkeypatch.setattr(quantizer, "_torch_round_into", round_into)
        monkeypatch.setattr(quantizer, "_round_both_layouts", ops.transpose_engine)
    model = converted(layer(), "fp8")
    context, slots = model.fp8_context, StreamTable(torch.device(DEVICE), 64)
    found = []
    for in_memory in (False, True):
        with context.streams_in_memory(slots) if in_memory else nullcontext():
            if in_memory:
                layer_pass(model, None)
                context.begin(3)
                slots.refresh(context.stream_number)
            found.append(layer_pass(model, None))
    assert len(slots) > 3 * STEPS
    for name, values in found[0].items():
        assert values is None or torch.equal(found[1][name], values), name


def rounding_passes(monkeypatch):
    """Role and name of each tensor that is rounded in a pass of its own from now on."""
    passes, round_one = [], Site._round

    def spy(site, x, spec, role, name, *rest, **options):
        passes.append((role, name))
        return round_one(site, x, spec, role, name, *rest, **options)

    monkeypatch.setattr(Site, "_round", spy)
    return passes


def test_no_pass_of_its_own_rounds_states_and_errors(monkeypatch):
    model, passes = converted(layer(), "fp8"), rounding_passes(monkeypatch)
    with counted_launches() as launched:
        layer_pass(model, None)
    assert launched["cell_forward"] == launched["cell_backward"] == STEPS
    assert launched["summed_gradient"] == 1
    # Of the sequence: one product of the inputs each way and their weights' gradient.
    assert launched["multiply"] == STEPS + (STEPS - 1) + 3
    assert passes == [("activation", "input"), ("weight", "weight"), ("weight", "weight"), ("error", "output_error")]


def test_hidden_states_are_offered_to_the_layers_behind(monkeypatch):
    model = converted(nn.Sequential(*layer(), nn.Linear(WIDTH, 4), nn.Linear(1, 1)).to(DEVICE), "fp8")
    model.fp8_context.begin(0)
    outputs, _ = model[0](draw(STEPS, ROWS, 8))
    passes = rounding_passes(monkeypatch)
    y = model[2](outputs)
    assert passes == [("weight", "weight")]
    y.sum().backward()
    gradient = model[2].weight.grad.clone()
    model[2].weight.grad = None
    model.fp8_context.begin(0)
    model[2](outputs.detach().clone()).sum().backward()
    assert torch.equal(gradient, model[2].weight.grad)


@pytest.mark.parametrize("watched", ["hook", "observer", "telemetry"])
def test_who_watches_the_products_sees_each(watched):
    model = converted(layer(), "fp8")
    context, seen = model.fp8_context, []
    if watched == "hook":
        model[0].hidden_gates.register_forward_hook(lambda *_: seen.append(1))
    elif watched == "telemetry":
        context.telemetry.active = True
    context.begin(0)
    with counted_launches() as launched:
        if watched == "observer":
            with context.observe(lambda name, product, operands: seen.append(1)):
                model[0](draw(STEPS, ROWS, 8))
        else:
            model[0](draw(STEPS, ROWS, 8))
    assert launched["cell_forward"] == 0
    assert watched == "telemetry" or len(seen) >= STEPS


def tiny_gnmt():
    torch.manual_seed(1)
    return gnmt(13, layers=2, width=8, init_range=0.7, dropout=0.0).to(DEVICE)


def step_of(model):
    source = torch.tensor([[5, 6, 2], [9, 2, 1]], device=DEVICE)
    target = torch.tensor([[2, 6], [2, 9]], device=DEVICE)
    model.fp8_context.begin(0)
    logits = model(source, target)
    (256 * F.cross_entropy(logits.flatten(0, 1), target.flatten())).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.long
def test_a_training_step_of_gnmt_gives_the_bytes_of_its_modules(monkeypatch):
    model = converted(tiny_gnmt(), "fp8")
    copied = copy.deepcopy(model)
    given = step_of(model)
    modules_alone(monkeypatch)
    for name, values in step_of(copied).items():
        if name.endswith("hidden_gates.bias"):
            assert_close(given[name], values, 1e-6, norm=True)
        else:
            assert torch.equal(given[name], values), name


def test_a_translation_gives_the_same_words(monkeypatch):
    model = converted(tiny_gnmt(), "fp8").eval()
    source = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1]], device=DEVICE)

    def fed():
        state = model.begin(source)
        logits = []
        for token in (2, 6):
            logits.append(model.step(torch.full((2,), token, device=DEVICE), state)[0])
            state.select(torch.tensor([1, 0], device=DEVICE))
        return torch.stack(logits)

    with torch.no_grad():
        given = fed()
        modules_alone(monkeypatch)
        assert torch.equal(given, fed())


@pytest.mark.parametrize(("recipe", "left"), [("fp8", ["0.hidden_gates"]), ("fp8_hybrid", [])])
def test_layers_with_other_formats_or_scales_stay_as_they_are(recipe, left):
    model = layer()
    inject(model, load_recipe(recipe), backend="triton", leave=left)
    assert type(model[0]) is LSTMLayer
