"""backend=triton beside backend=emulate: each product of the same operands, and whole training steps."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

from fp8repro.engines import quantizer
from fp8repro.engines.products import Conv2dGeometry, EmulateBackend, Operand
from fp8repro.kernels import ops
from fp8repro.kernels.backend import TritonBackend, available
from fp8repro.kernels.matmul import launch as matmul
from fp8repro.kernels.quantize.launch import round_into, round_transpose
from fp8repro.kernels.shared.configs import Target
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.models.transformer import transformer
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E4M3, E5M2, FP16, FP16_169, get_format
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_normalization import FusedBatchNorm2d, FusedLayerNorm
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 1024.0
TOLERANCE = 1e-3 if torch.cuda.is_available() else 2e-6


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def operand(x, fmt=E5M2, scale=None):
    codes = (x if scale is None else x * scale).to(fmt.dtype or torch.float32)
    return Operand(codes, fmt, scale)


def assert_near(given, expected):
    assert given.dtype == torch.float32
    assert_close(given, expected, TOLERANCE, norm=True)


@pytest.mark.parametrize("fmt", [E5M2, E4M3, FP16], ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_linear_and_matmul_products(fmt, scale):
    triton, emulate = TritonBackend(), EmulateBackend()
    x, w, e, bias = draw(3, 7, 40), draw(24, 40), draw(3, 7, 24), draw(24)
    a, b, ab = draw(2, 3, 9, 16), draw(2, 3, 16, 11), draw(2, 3, 9, 11)
    qx, qw, qe, qa, qb, qab = (operand(t, fmt, scale) for t in (x, w, e, a, b, ab))
    with counted_launches() as launches:
        assert_near(triton.linear(qx, qw, bias), emulate.linear(qx, qw, bias))
        assert_near(triton.linear_error(qe, qw), emulate.linear_error(qe, qw))
        assert_near(triton.linear_gradient(qe, qx), emulate.linear_gradient(qe, qx))
        assert_near(triton.matmul(qa, qb), emulate.matmul(qa, qb))
        assert_near(triton.matmul_error_a(qab, qb), emulate.matmul_error_a(qab, qb))
        assert_near(triton.matmul_error_b(qab, qa), emulate.matmul_error_b(qab, qa))
    assert launches["multiply"] == 6


@pytest.mark.parametrize("channels_last", [True, False])
def test_convolution_products_and_layouts(channels_last):
    triton, emulate = TritonBackend(), EmulateBackend()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    geometry = Conv2dGeometry((2, 2), (1, 1))
    x, w = (draw(*s).contiguous(memory_format=layout) for s in ((2, 6, 9, 9), (4, 6, 3, 3)))
    qx, qw = operand(x), operand(w, scale=4.0)
    y = triton.conv2d(qx, qw, None, geometry)
    assert_near(y, emulate.conv2d(qx, qw, None, geometry))
    qe = operand(draw(*y.shape, seed=1).contiguous(memory_format=layout))
    for given, expected, like in (
        (triton.conv2d_error(qe, qw, geometry, x), emulate.conv2d_error(qe, qw, geometry, x), x),
        (triton.conv2d_gradient(qe, qx, geometry, w), emulate.conv2d_gradient(qe, qx, geometry, w), w),
    ):
        assert_near(given, expected)
        assert given.stride() == like.stride()


def test_what_the_kernels_do_not_take_is_emulated():
    triton = TritonBackend()
    x, w = draw(5, 8), draw(4, 8)
    pairs = ((Operand(x), Operand(w)), (operand(x), Operand(w)), (operand(x, FP16_169), operand(w, FP16_169)))
    grouped = Conv2dGeometry(groups=2)
    with counted_launches() as launches:
        for qx, qw in pairs:
            assert_close(triton.linear(qx, qw, None), qx.decoded() @ qw.decoded().t())
        with pytest.warns(UserWarning, match="grouped convolutions are emulated"):
            y = triton.conv2d(operand(draw(1, 4, 5, 5)), operand(draw(6, 2, 3, 3)), None, grouped)
    assert y.shape == (1, 6, 3, 3)
    assert not launches
    assert triton.value_dtype(get_format("e5m2")) is None
    assert triton.value_dtype(get_format("fp16_1_6_9")) == torch.float32


@pytest.mark.skipif(not INTERPRETED, reason="the GPU splits sums where it rounds apart")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", [E5M2, FP16, FP16_169], ids=lambda f: f.name)
def test_rounded_products_have_the_bytes_of_a_pass_of_their_own(rounding, fmt):
    how, bits = Rounding(fmt, rounding), RandomBits(3, 2**63 + 9)
    plain = TritonBackend()
    layout = {"memory_format": torch.channels_last}
    x, w, e, bias = (operand(draw(*s)) for s in ((3, 7, 40), (24, 40), (3, 7, 24), (24,)))
    a, b, ab = operand(draw(2, 9, 16)), operand(draw(2, 16, 11)), operand(draw(2, 9, 11))
    image, kernel, back = (operand(draw(*s).to(**layout)) for s in ((2, 4, 9, 9), (6, 4, 3, 3), (2, 6, 5, 5)))
    strided, grouped = Conv2dGeometry((2, 2), (1, 1)), Conv2dGeometry((2, 2), (1, 1), groups=2)
    halved = operand(draw(6, 2, 3, 3))
    matrices = (
        lambda backend: backend.linear(x, w, bias.decoded()),
        lambda backend: backend.linear_error(e, w),
        lambda backend: backend.linear_gradient(e, x),
        lambda backend: backend.matmul(a, b),
        lambda backend: backend.matmul_error_a(ab, b),
        lambda backend: backend.matmul_error_b(ab, a),
        # Emulated, and rounded all the same.
        lambda backend: backend.linear(Operand(draw(3, 40)), w, None),
    )
    convolutions = (
        lambda backend: backend.conv2d(image, kernel, None, strided),
        lambda backend: backend.conv2d_error(back, kernel, strided, image.codes),
        lambda backend: backend.conv2d_gradient(back, image, strided, kernel.codes),
        # Emulated, and rounded all the same.
        lambda backend: backend.conv2d(image, halved, None, grouped),
        lambda backend: backend.conv2d_error(back, halved, grouped, image.codes),
    )
    for multiply in (*matrices, *convolutions):
        order = "channels_last" if multiply in convolutions else "row_major"
        rounded = plain.rounding(how, bits._replace(order=order))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact, given = multiply(plain), multiply(rounded)
        expected = reference.round_to_format(exact, how, bits._replace(order=order))
        assert not torch.equal(exact, expected)
        assert_close(given, expected)
        assert given.stride() == exact.stride()


@pytest.mark.skipif(not INTERPRETED, reason="the model must be where the fixture's engines are")
@pytest.mark.parametrize("recipe", ["fp8", "fp8_stochastic", "fp8_hybrid"])
def test_products_of_linear_layers_get_the_layout_of_tensor_cores(recipe, triton_quantizer, monkeypatch):
    strides, kept = [], []
    multiply = matmul.matmul

    def spy(a, b, *arguments, **options):
        strides.append((a.stride(-1), b.stride(-2)))
        return multiply(a, b, *arguments, **options)

    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.ReLU(), nn.Linear(40, 16)).to(DEVICE)
    inject(model, replace(load_recipe(recipe), exempt=()), StepContext(seed=1), "triton")
    monkeypatch.setattr(matmul, "matmul", spy)
    # In both orders of the same memory: rows of a matrix, and rows that lie apart.
    with counted_launches() as launched:
        for x in (draw(3, 5, 24), draw(15, 48)[:, :24]):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
                y = model(x.requires_grad_())
            y.square().sum().backward()
    # The summed dimension is contiguous in both operands of every product.
    assert strides == [(1, 1)] * 12
    # Inputs, errors and weights in both layouts.
    assert launched["round_transpose"] == 2 * 6
    # One layout of the input is kept for backward.
    assert [t.numel() for t in kept if t.element_size() == 1] == [15 * 24, 15 * 40] * 2


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_where_it_can_run():
    assert available("cpu") is None
    assert "TRITON_INTERPRET" in available("cuda")


def tiny_resnet():
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    x = draw(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    target = torch.tensor([1, 3], device=DEVICE)
    return model.to(DEVICE, memory_format=torch.channels_last), lambda m: F.cross_entropy(m(x), target)


def tiny_transformer():
    size = {"width": 32, "ffn_width": 48, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    source = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1]], device=DEVICE)
    target = torch.tensor([[2, 6, 5, 4], [2, 9, 1, 1]], device=DEVICE)

    def loss(model):
        logits = model(source, target).flatten(0, 1)
        return F.cross_entropy(logits, target.roll(-1, 1).flatten())

    return transformer(12, **size).to(DEVICE), loss


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.skipif(not INTERPRETED, reason="stands in for the engine that a GPU has anyway")
@pytest.mark.parametrize("build", [tiny_resnet, tiny_transformer])
def test_a_step_can_be_traced_without_data(build, monkeypatch):
    monkeypatch.setattr(quantizer.native, "available", lambda: False)
    monkeypatch.setattr(quantizer, "_torch_round_into", round_into)
    monkeypatch.setattr(quantizer, "_round_both_layouts", ops.transpose_engine)
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    model, loss_of = build()
    inject(model, "fp8_stochastic", StepContext(seed=1), "triton")
    parameters = list(model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), Record(), counted_launches() as launches:
        gradients = torch.autograd.grad(loss_of(model), parameters)
    assert not launches
    assert [g.shape for g in gradients] == [p.shape for p in parameters]
    operators = {name.split(".")[1] for name in names if name.startswith("fp8repro")}
    norms = ("batch_statistics", "batch_norm", "batch_norm_backward")
    kinds = ("conv2d", "conv2d_error", "conv2d_gradient", "max_pool", "max_pool_backward", *norms)
    others = ("round_transpose", "layer_norm", "layer_norm_backward")
    assert operators == {"round_into", "matmul", *(kinds if build is tiny_resnet else others)}
    # Nothing waits for the device.
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in names)


@pytest.fixture
def triton_quantizer(monkeypatch):
    """Every rounding by Triton, compared on the spot with the other engine's bytes; gives the number of roundings."""
    torch_engine = quantizer._torch_round_into
    count = Counter()

    def engine(x, how, bits, values, codes, stats):
        expected_values, expected_codes = (None if t is None else torch.empty_like(t) for t in (values, codes))
        torch_engine(x.cpu().clone(), how, bits, expected_values, expected_codes, None)
        round_into(x, how, bits, values, codes, stats)
        for given, expected in ((values, expected_values), (codes, expected_codes)):
            if given is not None:
                assert_close(given, expected)
        count["roundings"] += 1

    def transposing_engine(x, how, bits, codes, transposed, stats):
        expected = torch.empty_like(codes)
        torch_engine(x.cpu().clone(), how, bits, None, expected, None)
        round_transpose(x, how, bits, stats, (codes, transposed))
        assert_close(codes, expected)
        assert_close(transposed, expected.t())
        count["roundings"] += 1

    monkeypatch.setattr(quantizer, "_torch_round_into", engine)
    monkeypatch.setattr(quantizer, "_round_both_layouts", transposing_engine)
    monkeypatch.setattr(quantizer.native, "available", lambda: False)
    return count


@pytest.mark.skipif(not INTERPRETED, reason="stands in for the engine that a GPU has anyway")
@pytest.mark.parametrize("recipe", ["fp8", "fp8_stochastic"])
def test_a_compiled_model_draws_the_same_bits_at_every_step(recipe, monkeypatch):
    monkeypatch.setattr(quantizer.native, "available", lambda: False)
    monkeypatch.setattr(quantizer, "_torch_round_into", round_into)
    monkeypatch.setattr(quantizer, "_round_both_layouts", ops.transpose_engine)

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
        inject(model, replace(load_recipe(recipe), exempt=()), StepContext(seed=1), "triton")
        return model

    plain, compiled = build(), build()
    by_model = {plain: plain, compiled: torch.compile(compiled, backend="aot_eager")}
    for step in range(3):
        results = []
        for model, call in by_model.items():
            model.zero_grad()
            model.fp8_context.begin(step)
            y = call(draw(5, 16))
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        for expected, given in zip(*results, strict=True):
            assert_close(given, expected)


# Roundings that need no pass of their own. By batch normalization: the six inputs that it keeps; to nearest also those
# of conv2 of both blocks, and of convolution and downsampling behind the first block; by the pooling, that of the first
# block. By layer normalization, to nearest: inputs of the first feed-forward layers, and of the decoder's attention to
# the encoder. By the layer before: keys and values beside queries in self-attention, twice.
SPARED = {
    (tiny_resnet, "fp8"): 6 + 4 + 1,
    (tiny_resnet, "fp8_stochastic"): 6,
    (tiny_transformer, "fp8"): 5 + 4,
    (tiny_transformer, "fp8_stochastic"): 0,
}


def one_step(build, recipe, backend, target=None):
    """Loss, gradients and masters after one step, planned for a target, and the operands' codes of each product."""
    torch.manual_seed(0)
    model, loss_of = build()
    recipe = load_recipe(recipe)
    # With other seeds a sum's last bit falls on the other side of a rounding, which batch statistics carry everywhere.
    inject(model, recipe, StepContext(seed=0), backend)
    if target is not None:
        for module in model.modules():
            if hasattr(module, "site"):
                module.site.backend = TritonBackend(recipe.accumulate, target=target)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.01), recipe)
    seen = []
    with model.fp8_context.observe(lambda name, kind, operands: seen.append((name, kind, operands))):
        model.fp8_context.begin(0)
        loss = loss_of(model)
        (loss * SCALE).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return float(loss.detach()), gradients, model, masters, seen


@pytest.mark.skipif(not INTERPRETED, reason="compares with CPU engines")
@pytest.mark.parametrize("recipe", ["fp8", "fp8_stochastic"])
@pytest.mark.parametrize("build", [tiny_resnet, tiny_transformer])
def test_one_training_step(build, recipe, triton_quantizer):
    expected_loss, expected, *_ = one_step(build, recipe, "emulate")
    emulated = triton_quantizer["roundings"]
    with counted_launches() as launched:
        loss, gradients, model, masters, seen = one_step(build, recipe, "triton")

    assert abs(loss - expected_loss) <= 1e-3 * expected_loss
    # Another order of summation flips a rounding here and there, and a flip in E5M2 is a quarter of the value.
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 0.1, norm=True)

    # Every normalization is one kernel a pass (batch normalization: two for the statistics, then the pass).
    norms = Counter(type(module) for module in model.modules())
    assert launched["max_pool"] == launched["max_pool_gradient"] == (build is tiny_resnet)
    for kernel, count in (
        ("channel_statistics", norms[FusedBatchNorm2d]),
        ("combine_statistics", norms[FusedBatchNorm2d]),
        ("batch_apply", norms[FusedBatchNorm2d]),
        ("batch_gradient_sums", norms[FusedBatchNorm2d]),
        ("combine_gradient_sums", norms[FusedBatchNorm2d]),
        ("batch_gradient_apply", norms[FusedBatchNorm2d]),
        ("layer_forward", norms[FusedLayerNorm]),
        ("layer_backward", norms[FusedLayerNorm]),
    ):
        assert launched[kernel] == count
    assert norms[FusedBatchNorm2d if build is tiny_resnet else FusedLayerNorm] == (6 if build is tiny_resnet else 5)

    kinds = Counter(type(model.get_submodule(name)).__name__ + " " + kind for name, kind, _ in seen)
    # Every result is rounded by its product.
    spared = SPARED[build, recipe] + len(seen)
    assert triton_quantizer["roundings"] == 2 * emulated - spared
    matrix = sum(count for kind, count in kinds.items() if "Conv2d" not in kind)
    assert launched["multiply"] == matrix > 0
    assert launched["wgrad"] == launched["sum_splits"] == kinds["FP8Conv2d gradient"]
    # A strided convolution's error takes a launch for each remainder of the position.
    assert launched["implicit_gemm"] >= kinds["FP8Conv2d forward"] + kinds["FP8Conv2d error"]
    assert any("Conv2d" in kind for kind in kinds) == (build is tiny_resnet)
    assert (launched["round_transpose"] > 0) == (build is tiny_transformer)
    # Every product of the step went to a kernel: products of operands in FP8, exempt layers in FP16.
    formats = {operand.codes.dtype for _, _, operands in seen for operand in operands}
    assert formats == {torch.float8_e5m2, torch.float16}
    # The update too: one launch or two for each dtype of master.
    with counted_launches() as launched:
        assert masters.step(SCALE)
    assert 0 < launched["update"] <= 4


@pytest.mark.skipif(not INTERPRETED, reason="plans for a GPU that is not there")
@pytest.mark.parametrize("recipe", ["fp8", "fp8_stochastic"])
@pytest.mark.parametrize("build", [tiny_resnet, tiny_transformer])
def test_one_training_step_as_an_h100_takes_it(build, recipe):
    expected_loss, expected, *_ = one_step(build, recipe, "emulate")
    with counted_launches() as launched:
        loss, gradients, *_ = one_step(build, recipe, "triton", Target((9, 0), 132, tma=True))
    assert abs(loss - expected_loss) <= 1e-3 * expected_loss
    for name, gradient in gradients.items():
        # See above: a flipped rounding is a quarter of a value.
        assert_close(gradient, expected[name], 0.1, norm=True)
    if build is tiny_resnet:
        # Three channels of the image are no 16 bytes.
        assert (launched["implicit_gemm"], launched["wgrad"]) == (1, 1)
        assert launched["implicit_gemm_tma"] > 0
        assert launched["wgrad_tma"] > 0
    else:
        # Bytes are transposed in front of products that want K contiguous.
        assert launched["transpose"] > 0
