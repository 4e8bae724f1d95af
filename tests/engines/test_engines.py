"""Where no address may be taken: tensors without data, tracers, signs that memory does not hold; dtypes, gradients."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models import resnet18

from fp8repro import inject, quantize
from fp8repro.engines import quantizer
from fp8repro.engines.cpu import bf16_products as products
from fp8repro.engines.cpu import native
from fp8repro.engines.guards import read_format, spell, spell_format, untraced
from fp8repro.engines.products import decode
from fp8repro.engines.quantizer import round_into, rounded, rounded_into
from fp8repro.errors import UserError
from fp8repro.kernels.quantize import launch as kernels
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E4M3, E5M2, FORMATS, FP16, FloatFormat
from fp8repro.numerics.rounding import CHOICES, RandomBits, Rounding

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels take no CPU tensors")
ENGINES = [
    pytest.param(quantizer._torch_round_into, id="torch"),
    pytest.param(native.round_into, id="native", marks=needs_native),
    pytest.param(kernels.round_into, id="triton", marks=needs_interpreter),
]
SEED, STREAM = 2**64 - 3, 2**63 + 5


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(got, expected):
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got.float(), expected.float())


def rounds(x, out="float8"):
    return quantize(x, rounding="stochastic", seed=SEED, stream=STREAM, out=out)


def oracle(x):
    return reference.round_to_format(x, Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM))


class Rounds(nn.Module):
    def forward(self, x):
        return rounds(x).float() + rounds(x * 2, "float32")


# ---- Tensors without data, and tracers ----


@pytest.mark.parametrize("out", ["float8", "float32"])
def test_a_tensor_without_data_gives_one(out):
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    y = rounds(x, out)
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    with FakeTensorMode():
        y = rounds(torch.empty(4, 6).t(), out)
        assert (type(y).__name__, y.shape, y.stride()) == ("FakeTensor", (6, 4), (1, 6))
        values = torch.empty(3)
        round_into(torch.empty(3), Rounding(E5M2), values=values)
    round_into(x, Rounding(E5M2), values=torch.empty_like(x))
    assert decode(torch.empty(3, dtype=torch.float8_e5m2, device="meta")).is_meta


TRACERS = {
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx, fake": lambda f, x: make_fx(f, tracing_mode="fake")(x),
    "make_fx, symbolic": lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, x),
    "export": lambda f, x: torch.export.export(f, (x,)).module(),
    "compile": lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True),
    "functionalize": lambda f, x: torch.func.functionalize(f),
    "vmap": lambda f, x: lambda t: torch.func.vmap(f)(t[None])[0],
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_graph_rounds_what_it_is_run_on(tracer):
    graph = TRACERS[tracer](Rounds(), draw(5, 8))
    x = draw(5, 8, seed=1)
    assert torch.equal(graph(x), oracle(x) + oracle(x * 2))


@pytest.mark.parametrize("target", ["values", "codes", "both", "in place", "added"])
def test_a_graph_holds_what_is_rounded_into_given_tensors(target):
    def f(x):
        values, codes = torch.zeros_like(x), torch.zeros_like(x, dtype=E5M2.dtype)
        how, bits = Rounding(E5M2, "stochastic"), RandomBits(SEED, STREAM)
        if target == "in place":
            values = x * 1
            round_into(values, how, bits, values=values)
        elif target == "added":
            round_into(x, how, bits, values=values, add=True)
        else:
            given = {"values": values, "codes": codes}
            given = given if target == "both" else {target: given[target]}
            round_into(x, how, bits, **given)
        return codes.float() if target == "codes" else values

    x = draw(4, 6, seed=1)
    assert torch.equal(f(x), oracle(x))
    assert torch.equal(make_fx(f)(draw(4, 6))(x), oracle(x))


def test_a_format_of_ones_own_goes_through_a_graph():
    mine = FloatFormat("mine/1", 4, 5)
    graph = make_fx(lambda x: quantize(x, mine, out="float32"))(draw(9))
    x = draw(9, seed=1)
    assert torch.equal(graph(x), reference.round_to_format(x, Rounding(mine)))
    for format in (*FORMATS.values(), mine, FloatFormat("", 4, 3, False, E4M3.dtype)):
        assert read_format(spell_format(format)) == format


def test_operators_hold_what_torch_asks_of_them():
    # In 16 bit: the checker itself cannot compute with FP8 tensors.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = (-1, -(2**63))
    outputs = (draw(5, 8), draw(5, 8).half(), torch.zeros(4, dtype=torch.float64))
    torch.library.opcheck(
        rounded_into, (draw(5, 8), spell(Rounding(FP16, "stochastic")), *options, *outputs), test_utils=utilities
    )
    torch.library.opcheck(
        rounded, (draw(5, 8).t().requires_grad_(), spell(Rounding(E5M2, "stochastic")), *options), test_utils=utilities
    )
    torch.library.opcheck(
        rounded, (draw(5, 8).t(), spell(Rounding(FP16, "stochastic")), *options, "float8"), test_utils=utilities
    )


def test_nobody_pays_for_an_operator_where_nobody_traces(monkeypatch):
    calls = []
    monkeypatch.setattr(quantizer, "rounded", lambda *_: calls.append("rounded"))
    x = draw(7)
    quantize(x)
    quantize(nn.Parameter(x).detach())
    assert calls == []
    with torch.profiler.profile():
        quantize(x)
    assert calls == ["rounded"]
    assert not untraced(torch.empty(3, device="meta"))


# ---- Whole models ----


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=True), nn.ReLU(), nn.Linear(16, 4))
    return model, draw(6, 8)


def images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 9, 9))
    return model, draw(2, 3, 9, 9)


def residual():
    torch.manual_seed(0)
    return resnet18(num_classes=4), draw(2, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("build", [layers, images, residual])
@pytest.mark.parametrize("first", ["model without data", "converted"])
def test_a_converted_model_has_shapes_without_data(build, first):
    model, x = build()
    if first == "converted":
        inject(model, "fp8")
    model.to("meta")
    if first != "converted":
        inject(model, "fp8")
    y = model(x.to("meta"))
    y.square().sum().backward()
    assert y.is_meta
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
    fake, x = build()
    inject(fake, "fp8")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = fake(mode.from_tensor(x))
        gradients = torch.autograd.grad(y.square().sum(), list(fake.parameters()))
    assert [g.shape for g in gradients] == [p.shape for p in fake.parameters()]
    # Nothing without data stays behind.
    assert fake(x).isfinite().all()


@pytest.mark.parametrize("tracer", ["make_fx", "jit.trace", "export"])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_graph_of_a_converted_model_computes_on_its_own_input(tracer):
    model, x = layers()
    inject(model.eval(), "fp8")
    with torch.no_grad():
        if tracer == "export":
            graph = torch.export.export(model, (x,), strict=False).module()
        else:
            graph = TRACERS[tracer](model, x)
        other = draw(6, 8, seed=1)
        # Sums run in another order: a rounding of an output may fall on the other side.
        torch.testing.assert_close(graph(other), model(other), rtol=2.0**-3, atol=1e-2)
        assert not torch.equal(graph(other), graph(x))


@pytest.mark.parametrize("tracer", ["jit.trace", "export"])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_graph_of_a_training_step_would_repeat_its_bits_and_is_refused(tracer):
    model, x = layers()
    inject(model, "fp8")
    model(x)
    with pytest.raises(UserError, match=r"layer \d: got traced .* in training mode, expected model\.eval\(\)"):
        TRACERS[tracer](model, x)


needs_products = pytest.mark.skipif(products.library() is None, reason="a CPU without BF16 dot products")


@needs_products
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "meta"])
def test_products_do_not_depend_on_what_torch_makes_by_default(kind):
    a, b = (products.Operand(draw(*shape).to(E5M2.dtype), E5M2) for shape in ((8, 64), (32, 64)))
    x, w = (products.Operand(draw(*shape).to(E5M2.dtype), E5M2) for shape in ((2, 4, 9, 9), (8, 4, 3, 3)))
    backend, g = products.Bf16Backend(), products.Conv2dGeometry()
    expected = backend.linear(a, b, None), backend.conv2d(x, w, None, g)
    for operand in (a, b, x, w):
        operand.packed.clear()
    before = torch.get_default_dtype()
    try:
        if kind == "meta":
            torch.set_default_device(kind)
        else:
            torch.set_default_dtype(kind)
        found = backend.linear(a, b, None), backend.conv2d(x, w, None, g)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert all(same(f, e) for f, e in zip(found, expected, strict=True))


@needs_products
def test_operands_that_do_not_fit_are_refused_as_torch_does():
    def codes(*shape):
        return products.Operand(draw(*shape).to(E5M2.dtype), E5M2)

    backend, g = products.Bf16Backend(), products.Conv2dGeometry()
    for call in (
        lambda: backend.linear(codes(5, 7), codes(4, 8), None),
        lambda: backend.linear(codes(5, 8), codes(4, 8), torch.zeros(3)),
        lambda: backend.linear_error(codes(5, 3), codes(4, 8)),
        lambda: backend.linear_gradient(codes(5, 4), codes(6, 8)),
        lambda: backend.matmul(codes(2, 5, 7), codes(2, 8, 4)),
        lambda: backend.matmul_error_a(codes(2, 5, 7), codes(2, 8, 4)),
        lambda: backend.matmul_error_b(codes(2, 5, 7), codes(2, 6, 4)),
        lambda: backend.conv2d(codes(2, 6, 9, 9), codes(8, 4, 3, 3), None, g),
        lambda: backend.conv2d(codes(2, 4, 2, 2), codes(8, 4, 3, 3), None, g),
    ):
        with pytest.raises(RuntimeError):
            call()


@needs_products
def test_a_bias_is_read_as_torch_reads_it():
    x, w = (products.Operand(draw(*shape).to(E5M2.dtype), E5M2) for shape in ((5, 8), (6, 8)))
    for bias in (torch.ones(1), torch.ones(1).expand(6), draw(12)[::2], torch._neg_view(draw(6))):
        expected = F.linear(x.codes.float(), w.codes.float(), bias)
        torch.testing.assert_close(products.Bf16Backend().linear(x, w, bias), expected)


# ---- Signs that memory does not hold ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["x", "values", "codes"])
def test_views_with_a_sign_of_their_own_keep_it(engine, where):
    x, values, codes = draw(6, 5), torch.zeros(6, 5), torch.zeros(6, 5, dtype=FP16.dtype)
    expected = quantize(x, "fp16", "stochastic", seed=1, stream=2)
    if where == "x":
        x = torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag
        assert x.is_neg()
    elif where == "values":
        values = torch._neg_view(values)
    else:
        codes = torch._neg_view(codes)
    engine(x, Rounding(FP16, "stochastic"), RandomBits(1, 2), values, codes, None)
    assert same(values, expected.float())
    assert same(codes, expected)


def test_quantize_and_round_into_keep_signs():
    x = draw(6, 5)
    view = torch._neg_view(-x)
    assert same(quantize(view), quantize(x))
    for values in (torch.zeros(6, 5), torch._neg_view(torch.zeros(6, 5))):
        round_into(view, Rounding(E5M2), values=values)
        assert same(values, quantize(x, out="float32"))
        round_into(view, Rounding(E5M2), values=values, add=True)
        assert same(values, 2 * quantize(x, out="float32"))
    in_place = torch._neg_view(-x)
    round_into(in_place, Rounding(E5M2), values=in_place)
    assert same(in_place, quantize(x, out="float32"))
    assert not native.walks(view)
    options = (spell(Rounding(E5M2)), 0, 0)
    assert same(rounded(view, *options), quantize(x, out="float32"))
    values = torch.zeros(6, 5)
    rounded_into(view, *options, values, None, None)
    assert same(values, quantize(x, out="float32"))
    codes = torch._neg_view(quantize(x, "fp16"))
    assert same(decode(codes), -quantize(x, "fp16").float())


# ---- What is refused ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.float64), "float64"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(3, dtype=torch.int8), "int8"),
        (lambda: torch.ones(3, dtype=torch.bool), "bool"),
        (lambda: torch.ones(3).to(E5M2.dtype), "float8_e5m2"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "qint8"),
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested tensor"),
        (lambda: np.ones(3, dtype=np.float32), "ndarray"),
    ],
)
def test_what_is_no_dense_tensor_of_the_three_dtypes_is_refused(build, message):
    for call in (quantize, lambda x: round_into(x, Rounding(E5M2))):
        with pytest.raises(TypeError, match=rf"x: got .*{message}.*, expected a torch\.float32"):
            call(build())


def test_outputs_that_do_not_fit_are_refused_before_anything_is_written():
    x = draw(4, 6)
    fp8 = E5M2.dtype
    for outputs in (
        {"codes": torch.empty(3, dtype=fp8)},
        {"codes": torch.empty(4, 6, dtype=E4M3.dtype)},
        {"codes": torch.empty(4, 6, dtype=fp8, device="meta")},
        {"values": torch.empty(6, 4)},
        {"values": torch.empty(4, 6, dtype=torch.float64)},
        {"values": torch.zeros(4, 6), "stats": torch.zeros(3, dtype=torch.float64)},
        {"values": torch.zeros(4, 6), "stats": torch.zeros(4)},
    ):
        with pytest.raises(ValueError, match=r"got .*, expected"):
            round_into(x, Rounding(E5M2), **outputs)


def test_memory_that_was_given_back_is_not_read():
    x = draw(40)
    x.untyped_storage().resize_(0)
    if native.available():
        with pytest.raises(ValueError, match="without memory"):
            quantize(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed: got 1.5"),
        ({"stream": "1"}, TypeError, "stream: got '1'"),
        ({"format": FloatFormat("wide", 11, 52), "out": "float32"}, ValueError, "format: got wide"),
        ({"format": FloatFormat("flat", 5, 0), "out": "float32"}, ValueError, "format: got flat"),
        ({"format": FloatFormat("far", 8, 3, False), "out": "float32"}, ValueError, "format: got far"),
        ({"format": FloatFormat("other", 5, 2, dtype=torch.float16)}, ValueError, "stored in torch.float16"),
    ],
)
def test_options_that_no_engine_can_follow_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(draw(3), **arguments)
    assert same(quantize(draw(3), seed=np.int64(3)), quantize(draw(3), seed=3))


def test_a_layer_refuses_fp64():
    model, x = layers()
    inject(model, "fp8")
    with pytest.raises(UserError, match=r"layer \w+: got an input of torch\.float64, expected float32"):
        model(x.double())


# ---- Derivatives ----


@pytest.mark.parametrize("call", [quantize, lambda x, **_: torch.ops.fp8repro.quantize(x, spell(Rounding(E5M2)), 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_differentiated_straight_through(call, dtype):
    x, error = draw(5, 8).to(dtype).requires_grad_(), draw(5, 8, seed=1)
    y = call(x, out="float32")
    assert same(y.detach(), quantize(x.detach(), out="float32"))
    (gradient,) = torch.autograd.grad(y, x, error)
    assert torch.equal(gradient, error.to(dtype))


def test_codes_have_no_derivative():
    x = draw(5).requires_grad_()
    for call in (quantize, lambda x: rounded(x, spell(Rounding(E5M2)), 0, 0, "float8")):
        with pytest.raises(ValueError, match=r"expected float32 \(straight-through\), or x\.detach"):
            call(x)
        with torch.no_grad():
            assert not call(x).requires_grad
    with pytest.raises(ValueError, match="straight-through"):
        torch.func.jvp(quantize, (draw(5),), (draw(5),))


def test_functional_derivatives_are_straight_through():
    x, tangent = draw(3, 8), draw(3, 8, seed=1)

    def f(t):
        return rounds(t, "float32") * tangent[0]

    assert torch.equal(torch.func.grad(lambda t: f(t).sum())(x), tangent[:1].expand(3, 8))
    values, moved = torch.func.jvp(lambda t: rounds(t, "float32"), (x,), (tangent,))
    assert torch.equal(values, oracle(x))
    assert torch.equal(moved, tangent)
    each = torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(x)
    assert torch.equal(each, tangent[:1].expand(3, 8))


@pytest.mark.parametrize(("rounding", "dim"), list(itertools.product(CHOICES["rounding"], (0, 1))))
def test_every_tensor_of_a_batch_draws_the_bits_that_it_draws_alone(rounding, dim):
    x = draw(4, 6, 5)
    found = torch.func.vmap(lambda t: quantize(t, rounding=rounding, seed=SEED, stream=STREAM), in_dims=dim)(x)
    alone = [quantize(t, rounding=rounding, seed=SEED, stream=STREAM).float() for t in x.unbind(dim)]
    assert torch.equal(found.float(), torch.stack(alone))


def test_writes_are_seen_by_autograd():
    w = draw(5).requires_grad_()
    x = draw(5)
    y = (w * x).sum()
    round_into(x, Rounding(E5M2), values=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        x = draw(5)
        round_into(x, Rounding(E5M2), values=x)
