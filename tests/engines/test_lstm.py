"""The C++ engine's part of an LSTM cell: the bits of torch's operators."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fp8repro.engines.cpu import lstm
from fp8repro.models.gnmt import LSTMCell, LSTMLayer, gnmt
from fp8repro.precision import fused_lstm
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_lstm import NativeLSTMLayer
from fp8repro.precision.injection import inject

pytestmark = pytest.mark.skipif(lstm._library() is None, reason="needs a C++ compiler")
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 259), (70, 512)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def passed(cell_of, gates, cell, weights):
    """Results and gradients of a cell."""
    leaves = [gates.clone().requires_grad_(), cell.clone().requires_grad_()]
    hidden, new = cell_of.apply(*leaves)
    return [hidden, new, *torch.autograd.grad([hidden, new], leaves, weights)]


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_cell_gives_torchs_bits(shape, magnitude, threads):
    rows, width = shape
    gates, cell = magnitude * draw(rows, 4 * width), magnitude * draw(rows, width, seed=1)
    weights = [draw(rows, width, seed=2), magnitude * draw(rows, width, seed=3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert lstm.takes(gates, cell)
        expected = passed(LSTMCell, gates, cell, weights)
        assert all(map(same, passed(fused_lstm._NativeCell, gates, cell, weights), expected))
    finally:
        torch.set_num_threads(before)


def test_infinities_and_nans_are_torchs():
    gates = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0] * 4])
    cell = torch.tensor([[1.0, torch.inf, 2.0, torch.nan]])
    weights = [draw(1, 4), draw(1, 4, seed=1)]
    given, expected = (passed(c, gates, cell, weights) for c in (fused_lstm._NativeCell, LSTMCell))
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_what_torch_fuses_elsewhere_is_fused(capability):
    # torch picks its instructions when it is imported.
    code = (
        "import test_lstm as t\n"
        "for shape in t.SHAPES: t.test_a_cell_gives_torchs_bits(shape, 3.0, 1)\n"
        "print(t.lstm._fused())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if capability == "default":
        assert done.stdout == "False\n"


def test_other_tensors_are_torchs():
    gates, cell = draw(4, 32), draw(4, 8)
    assert not lstm.takes(gates.double(), cell)
    assert not lstm.takes(draw(32, 4).t(), cell)
    assert not lstm.takes(gates.to("meta"), cell)


def step_of(model):
    source = torch.tensor([[5, 6, 7, 2], [9, 4, 2, 1]])
    target = torch.tensor([[2, 6, 5], [2, 9, 7]])
    model.fp8_context.begin(0)
    logits = model(source, target)
    (256 * F.cross_entropy(logits.flatten(0, 1), target.flatten())).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("recipe", ["fp8", "fp8_sequence"])
def test_a_step_of_gnmt_gives_the_bits_of_its_modules(recipe):
    torch.manual_seed(0)
    model = gnmt(13, layers=2, width=16, init_range=0.5, dropout=0.0)
    inject(model, recipe, StepContext(seed=1), "emulate")
    layers = [m for m in model.modules() if isinstance(m, LSTMLayer)]
    assert {type(m) for m in layers} == {NativeLSTMLayer}
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if type(module) is NativeLSTMLayer:
            module.__class__ = LSTMLayer
    assert all(map(same, step_of(model), step_of(alone)))
