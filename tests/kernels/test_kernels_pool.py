"""Max pooling by kernels: the bits of torch's CPU kernel, in values and in gradients, with a byte an output kept."""

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fp8repro.engines.guards import spell
from fp8repro.kernels.pool.launch import Window, max_pool, max_pool_backward
from fp8repro.kernels.pool.max_pool import max_pool as max_pool_operator
from fp8repro.kernels.pool.max_pool import max_pool_backward as max_pool_backward_operator
from fp8repro.kernels.pool.max_pool import pool_largest
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E5M2, FP16
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_normalization import use_kernels
from fp8repro.precision.injection import inject
from fp8repro.precision.pooling import ByteMaxPool2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEM = Window((3, 3), (2, 2), (1, 1))
# Overlapping, apart, touching, with gaps, larger than the image's rest, uneven.
WINDOWS = [
    STEM,
    Window((3, 3), (1, 1), (1, 1)),
    Window((2, 2), (2, 2), (0, 0)),
    Window((1, 1), (3, 2), (0, 0)),
    Window((5, 2), (3, 1), (2, 1)),
    Window((2, 7), (2, 4), (1, 3)),
]
SHAPES = [(2, 3, 8, 9), (1, 70, 7, 7), (3, 64, 5, 16)]


def draw(*shape, seed=0, values=None):
    """Normal values, or some of a few, so that many are equal."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if values is None:
        x = torch.randn(shape, generator=generator)
    else:
        x = torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
    return x.contiguous(memory_format=torch.channels_last).to(DEVICE)


def bits(t):
    return t.cpu().contiguous().view(torch.int32)


def torchs(x, window, error):
    """Result and gradient of torch's CPU kernel."""
    x = x.detach().cpu().requires_grad_()
    y = F.max_pool2d(x, *window)
    y.backward(error.cpu())
    return y.detach(), x.grad


ZEROS, INFINITIES = [0.0, -0.0], [float("-inf"), float("inf"), float("-inf"), 1.0]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", [None, ZEROS, [float("-inf")], INFINITIES, SPECIAL], ids=str)
def test_values_and_gradients_are_torchs_bits(shape, window, values):
    x = draw(*shape, values=values)
    y, taps, codes = max_pool(x, window)
    error = draw(*y.shape, seed=1)
    expected, gradient = torchs(x, window, error)
    assert codes is None
    assert torch.equal(bits(y), bits(expected))
    given = max_pool_backward(error, taps, x.shape, window)
    # Sums of overlapping windows, too: the order is that of torch's CPU kernel.
    assert torch.equal(bits(given), bits(gradient))
    for t in (y, taps, given):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_narrow_inputs_are_compared_in_fp32(dtype):
    x = draw(2, 16, 9, 7).to(dtype)
    x[0, 3] = float("nan")
    y, taps, _ = max_pool(x, STEM)
    error = draw(*y.shape, seed=1).to(torch.bfloat16)
    expected, gradient = torchs(x.float(), STEM, error.float())
    assert_close(y, expected.to(DEVICE))
    assert torch.equal(bits(max_pool_backward(error, taps, x.shape, STEM)), bits(gradient))


def test_codes_are_those_of_the_rounded_result():
    x = draw(2, 16, 9, 7) * 1e4
    how = Rounding(E5M2)
    y, _, codes = max_pool(x, STEM, how)
    assert_close(codes, reference.round_to_format(y.cpu(), how))
    with pytest.raises(ValueError, match=r"^how: got .*, expected a rounding without random bits"):
        max_pool(x, STEM, Rounding(E5M2, "stochastic"))


@pytest.mark.parametrize(
    ("shape", "window", "expected"),
    [
        ((2, 3, 8), STEM, "^x: got .* expected floating-point"),
        ((2, 3, 1, 1), Window((3, 3), (2, 2), (0, 0)), "^x: got 1 x 1 pixels, expected at least one window"),
        ((2, 3, 8, 8), Window((3, 3), (2, 2), (2, 1)), "^window: .* expected padding of at most half"),
        ((2, 3, 8, 8), Window((3, 3), (0, 2), (1, 1)), "^window: .* strides over 0"),
        ((1, 1, 20, 20), Window((16, 16), (1, 1), (0, 0)), "^window: .* expected at most 255 values"),
    ],
)
def test_what_does_not_fit_is_refused(shape, window, expected):
    with pytest.raises(ValueError, match=expected):
        max_pool(torch.zeros(shape, device=DEVICE), window)


def test_taps_of_another_result_are_refused():
    y, taps, _ = max_pool(draw(2, 3, 8, 8), STEM)
    with pytest.raises(ValueError, match=r"^taps: got .*, expected torch\.uint8 of shape \(2, 3, 5, 5\)"):
        max_pool_backward(y, taps, (2, 3, 9, 9), STEM)
    with pytest.raises(ValueError, match=r"^grad: got "):
        max_pool_backward(y[:, :2], taps, (2, 3, 8, 8), STEM)


def pooling(consumers=Rounding(E5M2), **options):
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1, **options))
    use_kernels(model, consumers, StepContext())
    return model[0]


def test_the_module_keeps_a_byte_an_output_and_offers_codes():
    module, x = pooling(), draw(2, 64, 8, 8).requires_grad_()
    assert type(module) is ByteMaxPool2d
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        y = module(x)
    assert sizes == [y.numel()]
    offer = module.context.offers.find(y, Rounding(E5M2))
    assert_close(offer.codes, reference.round_to_format(y.detach().cpu(), Rounding(E5M2)))
    y.backward(torch.ones_like(y))
    assert torch.equal(bits(x.grad), bits(torchs(x, STEM, torch.ones_like(y))[1]))


def test_a_resnets_step_is_the_same_bytes_with_torchs_pooling():
    steps = []
    for pooling in (ByteMaxPool2d, nn.MaxPool2d):
        torch.manual_seed(0)
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).to(DEVICE, memory_format=torch.channels_last)
        inject(model, "fp8", StepContext(seed=3), "triton")
        assert type(model.maxpool) is ByteMaxPool2d
        model.maxpool.__class__ = pooling
        model.fp8_context.begin(0)
        loss = F.cross_entropy(model(draw(2, 3, 32, 32)), torch.tensor([1, 3], device=DEVICE))
        (1000 * loss).backward()
        steps.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, torchs_own in zip(*steps, strict=True):
        assert torch.equal(ours, torchs_own)


def test_what_the_kernels_do_not_take_is_torchs():
    for options in ({"dilation": 2}, {"ceil_mode": True}, {"return_indices": True}):
        assert type(pooling(**options)) is nn.MaxPool2d
    module, x = pooling(), draw(2, 8, 8, 8)
    # Evaluation, other layouts and dtypes.
    for given in (x, x.contiguous().requires_grad_(), x.half().requires_grad_()):
        y = module(given)
        assert torch.equal(y, F.max_pool2d(given, *STEM))
        assert module.context.offers.find(y, Rounding(E5M2)) is None
    assert module.context.offers.find(pooling(Rounding(E5M2, "stochastic"))(x.requires_grad_()), Rounding(E5M2)) is None


@pytest.mark.parametrize("op", ["max_pool", "max_pool_backward"])
def test_operators_hold_what_torch_asks_of_them(op):
    x = draw(2, 3, 8, 9)
    y, taps, _ = max_pool(x, STEM)
    window = [list(pair) for pair in STEM]
    # In 16 bit: the checker itself cannot compute with FP8 tensors.
    operator, arguments = {
        "max_pool": (max_pool_operator, (x.requires_grad_(), *window, spell(Rounding(FP16)))),
        "max_pool_backward": (max_pool_backward_operator, (y, taps, list(x.shape), *window)),
    }[op]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, arguments, test_utils=utilities)


def test_operators_equal_the_plain_functions():
    x, results = draw(2, 8, 8, 9), []
    for pool in (pool_largest, max_pool_operator):
        leaf = x.detach().requires_grad_()
        y, taps, codes = pool(leaf, *[list(pair) for pair in STEM], spell(Rounding(E5M2)))
        y.backward(torch.full_like(y, 0.3))
        results.append([y, taps, codes.view(torch.uint8), leaf.grad])
    for plain, traced in zip(*results, strict=True):
        assert torch.equal(plain, traced)
