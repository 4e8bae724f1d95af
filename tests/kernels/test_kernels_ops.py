"""Products and normalizations as torch operators: what torch asks of them, compiled graphs, derivatives."""

import pytest
import torch
from numeric import assert_close

from fp8repro.engines import quantizer
from fp8repro.engines.guards import spell
from fp8repro.kernels import ops
from fp8repro.kernels.norm import operators as norm_ops
from fp8repro.numerics.formats import E5M2, FP16
from fp8repro.numerics.rounding import Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


OPERATORS = ["round_transpose", "matmul", "conv2d", "conv2d_error", "conv2d_gradient"]


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_hold_what_torch_asks_of_them(op):
    # In 16 bit: the checker itself cannot compute with FP8 tensors.
    def half(*shape):
        return draw(*shape).half()

    geometry = ([2, 2], [1, 1], [1, 1], 1.0, "promoted")
    arguments = {
        "round_transpose": (draw(5, 8), spell(Rounding(FP16, "stochastic")), -1, 5, half(5, 8), half(8, 5), None),
        "matmul": (half(2, 5, 8), half(2, 8, 3), draw(3), 1.0, "promoted", spell(Rounding(E5M2, "stochastic")), -1, 5),
        "conv2d": (half(2, 4, 7, 7), half(6, 4, 3, 3), draw(6), *geometry),
        "conv2d_error": (half(2, 6, 4, 4), half(6, 4, 3, 3), [2, 4, 7, 7], *geometry),
        "conv2d_gradient": (half(2, 6, 4, 4), half(2, 4, 7, 7), [6, 4, 3, 3], *geometry),
    }[op]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ops, op), arguments, test_utils=utilities)


def test_compiled_graph_holds_the_operators():
    def product(x, w):
        codes = torch.empty_like(x, dtype=torch.float8_e5m2)
        quantizer.rounded_into(x, spell(Rounding(E5M2, "stochastic")), 1, 2, None, codes, None)
        return ops.matmul(codes, w.t(), None, 1.0, "promoted") + 1

    x, w = draw(5, 16), draw(7, 16).to(torch.float8_e5m2)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, w), product(x, w))


def test_a_compiled_graph_differentiates_quantizer_and_normalizations():
    def loss(image, weight, bias, rows, scale):
        image = quantizer.rounded(image, spell(Rounding(E5M2, "stochastic")), 1, 2)
        how = (True, "e5m2", spell(Rounding(E5M2)))
        y = norm_ops.normalize_batch(image, weight, bias, None, running, 0.5, 1e-5, *how)[0]
        z = norm_ops.layer_norm(rows, scale, scale, 1e-5, "")[0]
        return y.square().sum() + z.pow(3).sum()

    inputs = [draw(2, 3, 4, 5), draw(3), draw(3, seed=1), draw(4, 6), draw(6)]
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for f in (loss, compiled):
        running = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), torch.tensor(0, device=DEVICE)
        value = f(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs), *running])
        assert running[2].item() == 1
    for given, expected in zip(*results, strict=True):
        assert_close(given, expected)


def test_products_leave_derivatives_to_the_recipe():
    a, b = draw(2, 3).half().requires_grad_(), draw(3, 2).half()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        ops.matmul(a, b, None, 1.0, "promoted").sum().backward()
