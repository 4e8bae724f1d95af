"""What `fp8repro bench kernels` checks and measures, and the bars of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.bench.gpu import Bench
from fp8repro.bench.resnet50 import measure_compiled_step, measure_step, profile_step
from fp8repro.bench.translation_kernels import measure_lstm, measure_sublayers
from fp8repro.bench.translation_steps import STEPS
from fp8repro.engines.products import Conv2dGeometry
from fp8repro.engines.updates import Parameter, Rule
from fp8repro.errors import RunFailure
from fp8repro.kernels.conv2d.launch import conv2d, conv2d_error, conv2d_gradient
from fp8repro.kernels.matmul.launch import matmul
from fp8repro.kernels.optimizer.launch import gradient_control, update
from fp8repro.kernels.pool.launch import Window, max_pool, max_pool_backward
from fp8repro.kernels.quantize.grouped import Job, prepare
from fp8repro.kernels.quantize.launch import round_into, round_transpose
from fp8repro.numerics import reference
from fp8repro.numerics.formats import E4M3, E5M2, FP16
from fp8repro.numerics.rounding import RandomBits, Rounding

GEMM = 8192
# (name, rows, outputs, inputs): Transformer-base at 4,096 tokens; GNMT at 128 sentences of 50 words, and one LSTM step.
LAYERS = (
    ("Transformer attention projection", 4096, 512, 512),
    ("Transformer feed-forward in", 4096, 2048, 512),
    ("Transformer feed-forward out", 4096, 512, 2048),
    ("GNMT LSTM input gates", 6400, 4096, 1024),
    ("GNMT LSTM recurrent gates", 128, 4096, 1024),
)


def parity(bench: Bench) -> None:
    """Check the kernels on this device before any number is taken; the tests check far more.

    Raises:
        RunFailure: a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (bench.size(1 << 20),), generator=generator).to(torch.int32)
    x = patterns.view(torch.float32)
    for fmt in (E5M2, E4M3):
        for rounding in ("nearest", "stochastic"):
            codes = torch.empty_like(x, dtype=fmt.dtype, device=bench.device)
            how, bits = Rounding(fmt, rounding), RandomBits(3, 2**63)
            round_into(x.to(bench.device), how, bits, None, codes, None)
            expected = reference.encode(reference.round_to_format(x, how, bits), fmt)
            wrong = int((codes.cpu().view(torch.uint8) != expected).sum())
            if wrong:
                raise RunFailure(f"parity: quantize {fmt.name} {rounding}: {wrong} of {x.numel()} bytes are wrong")
    a, b = (torch.randn(bench.size(1024), bench.size(2048), device=bench.device).to(E5M2.dtype) for _ in "ab")
    exact = a.double() @ b.double().t()
    error = float((matmul(a, b.t()) - exact).norm() / exact.norm())
    shape = f"{a.shape[0]}x{b.shape[0]}x{a.shape[1]}"
    bench.add("error of matmul, promoted", shape, 0.0, error, "FP64 (relative error)", -3e-4)
    if not error <= 3e-4:
        raise RunFailure(f"parity: matmul: got a relative error of {error:.1e} against FP64, expected at most 3e-4")
    print("parity: bytes of the quantizer and the product against FP64 are right", flush=True)


def check_conversions(bench: Bench) -> None:
    """Compare FP32 patterns converted to nearest with the reference: all 2^32, or as many as time allows.

    A GPU's own conversion loses the sign of a NaN.

    Raises:
        RunFailure: a code is wrong.
    """
    formats = [(fmt, overflow) for fmt in (E5M2, E4M3) for overflow in ("inf", "saturate")]
    wrong = dict.fromkeys(formats, 0)
    size = bench.size(1 << 24)
    rounds = (1 << 32) // size
    codes = torch.empty(size, dtype=torch.uint8, device=bench.device)
    done = 0
    while done < (rounds if bench.scale == 1 else 2) and not bench.time_is_up:
        # Evenly spread over all patterns, and in an order in which their low bits differ early.
        low = done * 0x9E3779B1 % rounds
        patterns = torch.arange(size, device=bench.device) * rounds + low - 2**31
        x = patterns.to(torch.int32).view(torch.float32)
        for fmt, overflow in formats:
            how = Rounding(fmt, "nearest", overflow)
            assert fmt.dtype is not None
            round_into(x, how, RandomBits(), None, codes.view(fmt.dtype), None)
            wrong[fmt, overflow] += _wrong_codes(x, codes, how)
        done += 1
    for (fmt, overflow), count_of_wrong in wrong.items():
        name = f"FP32 patterns wrong in {fmt.name}, {overflow}"
        bench.add(name, f"{done * size} of 2^32", 0.0, count_of_wrong, "reference (wrong codes)", -0.0)
    if any(wrong.values()):
        raise RunFailure(f"conversions: {sum(wrong.values())} codes of {done * size} patterns are wrong")


def _wrong_codes(x: Tensor, codes: Tensor, how: Rounding) -> int:
    """How many codes are not the reference's, but for the sign of a NaN."""

    def different(x: Tensor, codes: Tensor) -> Tensor:
        expected = reference.encode(reference.round_to_format(x, how), how.format)
        return (codes != expected) & ~(x.isnan() & (codes & 0x7F == 0x7F))

    suspects = different(x, codes)
    if not bool(suspects.any()):
        return 0
    # The reference is exact on a CPU; a GPU's powers of two need not be.
    return int(different(x[suspects].cpu(), codes[suspects].cpu()).sum())


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a millisecond (read and written) that a plain copy of 64M FP32 values reaches."""
    x = torch.empty(bench.size(1 << 26), device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / bench.milliseconds(lambda: y.copy_(x))


def measure_ceilings(bench: Bench) -> None:
    """The two ceilings: copy bandwidth and the BF16 product."""
    n = bench.size(1 << 26)
    rate = copy_bandwidth(bench)
    bench.add(f"copy FP32, {rate / 1e9:.2f} TB/s", str(n), 8 * n / rate, None, None, None)
    side = bench.size(GEMM)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in "ab")
    ms = bench.milliseconds(lambda: a @ b)
    bench.add(f"torch.matmul BF16, {2 * side**3 / ms / 1e9:.0f} TFLOP/s", f"{side}^3", ms, None, None, None)


def measure_quantize(bench: Bench) -> None:
    """Quantizer and quantizer with transpose, relative to copy bandwidth."""
    rate = copy_bandwidth(bench)
    n = bench.size(1 << 26)
    x = torch.randn(n, device=bench.device)
    codes = torch.empty_like(x, dtype=E5M2.dtype)
    for rounding, bar in (("nearest", 0.85), ("stochastic", 0.80)):
        ms = bench.milliseconds(partial(round_into, x, Rounding(E5M2, rounding), RandomBits(1, 2), None, codes, None))
        bench.add(f"quantize FP32 -> E5M2 {rounding}", str(n), ms, 5 * n / ms / rate, "copy bandwidth", bar)
    side = bench.size(GEMM)
    matrix = torch.randn(side, side, device=bench.device)
    for rounding in ("nearest", "stochastic"):
        ms = bench.milliseconds(partial(round_transpose, matrix, Rounding(E5M2, rounding)))
        ratio = 6 * side * side / ms / rate
        bench.add(f"quantize + transpose {rounding}", f"{side}^2", ms, ratio, "copy bandwidth", 0.75)


def measure_matmul(bench: Bench) -> None:
    """Products beside BF16 and beside torch's E4M3 product, which is the nearest that torch has."""
    shapes: list[tuple[str, int, int, int, float | None]] = [
        ("matmul", bench.size(GEMM), bench.size(GEMM), bench.size(GEMM), 1.5)
    ]
    shapes += [(name, bench.size(m), bench.size(n), bench.size(k), None) for name, m, n, k in LAYERS]
    for name, m, n, k, bar in shapes:
        x, w = torch.randn(m, k, device=bench.device), torch.randn(n, k, device=bench.device)
        a, b = x.to(E5M2.dtype), w.to(E5M2.dtype)
        ms = bench.milliseconds(partial(matmul, a, b.t()), replayed=True)
        other = bench.milliseconds(partial(torch.matmul, x.to(torch.bfloat16), w.to(torch.bfloat16).t()), replayed=True)
        bench.add(f"{name} E5M2", f"{m}x{n}x{k}", ms, other / ms, "torch.matmul BF16", bar)
        if bench.device.type == "cuda":
            one = torch.ones((), device=bench.device)
            operands = (x.to(E4M3.dtype), w.to(E4M3.dtype).t(), one, one)
            # Sums as exact and results as wide as ours.
            options: dict[str, Any] = {"out_dtype": torch.float32, "use_fast_accum": False}
            other = bench.milliseconds(partial(torch._scaled_mm, *operands, **options), replayed=True)
            bench.add(f"{name} E5M2", f"{m}x{n}x{k}", ms, other / ms, "torch._scaled_mm E4M3 -> FP32", 0.9)
    for form, layouts in (("NN", (False, False)), ("TN", (True, False))):
        side = bench.size(GEMM)
        a, b = (torch.randn(side, side, device=bench.device).to(E5M2.dtype) for _ in "ab")
        a = a.t() if layouts[0] else a
        ms = bench.milliseconds(partial(matmul, a, b), replayed=True)
        bench.add(f"matmul E5M2 {form}, {2 * side**3 / ms / 1e9:.0f} TFLOP/s", f"{side}^3", ms, None, None, None)


def measure_error(bench: Bench) -> None:
    """Frobenius error of the product at K = 16,384 against FP64, by promotion interval and in the FP16 form."""
    side, k = bench.size(512), bench.size(16384)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(side, k, generator=generator).to(E5M2.dtype).to(bench.device) for _ in "ab")
    exact = a.double() @ b.double().t()
    for form in ("promoted_32", "promoted_64", "promoted", "unpromoted", "fp16_mma"):
        error = float((matmul(a, b.t(), accumulate=form, splits=1) - exact).norm() / exact.norm())
        bar = -2e-4 if form == "promoted" else None
        bench.add(f"error of matmul, {form}", f"{side}x{side}x{k}", 0.0, error, "FP64 (relative error)", bar)


def resnet50_convolutions(batch: int, side: int) -> list[tuple[tuple[int, ...], nn.Conv2d]]:
    """Input shape and module of every convolution of ResNet-50 but the first, which the paper leaves in 16 bit."""
    from torchvision.models import resnet50

    found: list[tuple[tuple[int, ...], nn.Conv2d]] = []
    with torch.device("meta"):
        model = resnet50().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, args, y: found.append((tuple(args[0].shape), m)))
        model(torch.empty(batch, 3, side, side))
    return found[1:]


def measure_convolutions(bench: Bench) -> None:
    """Forward, error and gradient of ResNet-50's convolutions, summed, beside cuDNN in BF16 channels_last."""
    batch, side = (256, 224) if bench.scale == 1 else (1, 32)
    layers = resnet50_convolutions(batch, side)
    layers = layers if bench.scale == 1 else layers[:4]
    times: dict[Any, tuple[list[float], list[float]]] = {}
    for shape, module in layers:
        key = (shape, module.out_channels, module.kernel_size, module.stride)
        if key not in times:
            times[key] = _convolution_times(bench, shape, module)
    shape_text = f"batch {batch}, {side}^2"
    against = "cuDNN BF16 channels_last"
    total = [0.0, 0.0]
    for part, name in enumerate(("forward", "error", "gradient")):
        ours, theirs = (
            sum(times[(shape, m.out_channels, m.kernel_size, m.stride)][who][part] for shape, m in layers)
            for who in (0, 1)
        )
        total = [total[0] + ours, total[1] + theirs]
        bench.add(f"ResNet-50 convolutions, {name}", shape_text, ours, theirs / ours, against, None)
    name = "ResNet-50 convolutions, forward + error + gradient"
    bench.add(name, shape_text, total[0], total[1] / total[0], against, 1.2)


def _convolution_times(bench: Bench, shape: tuple[int, ...], module: nn.Conv2d) -> tuple[list[float], list[float]]:
    """Milliseconds of forward, error and gradient: ours, and cuDNN's."""

    def make(*size: int) -> Tensor:
        return torch.randn(size, device=bench.device).to(memory_format=torch.channels_last)

    stride, padding = module.stride, module.padding
    assert isinstance(padding, tuple)
    geometry = Conv2dGeometry((stride[0], stride[1]), (padding[0], padding[1]))
    x, w = make(*shape), make(*module.weight.shape)
    error = make(*_output(shape, module))
    x8, w8, e8 = (t.to(E5M2.dtype) for t in (x, w, error))
    ours = [
        lambda: conv2d(x8, w8, None, geometry),
        lambda: conv2d_error(e8, w8, tuple(x.shape), geometry),
        lambda: conv2d_gradient(e8, x8, tuple(w.shape), geometry),
    ]
    x16, w16, e16 = (t.to(torch.bfloat16) for t in (x, w, error))
    back = torch.ops.aten.convolution_backward

    def backward(wanted: list[bool]) -> Callable[[], object]:
        return lambda: back(e16, x16, w16, None, stride, padding, (1, 1), False, (0, 0), 1, wanted)

    theirs = [
        lambda: F.conv2d(x16, w16, None, stride, padding),
        backward([True, False, False]),
        backward([False, True, False]),
    ]
    measure = partial(bench.milliseconds, replayed=True, rep=40)
    return list(map(measure, ours)), list(map(measure, theirs))


def _output(shape: tuple[int, ...], module: nn.Conv2d) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(module(torch.empty(shape)).shape)


def measure_pooling(bench: Bench) -> None:
    """Max pooling of ResNet-50's stem, beside copy bandwidth and torch's in FP32."""
    batch, side = (256, 112) if bench.scale == 1 else (1, 8)
    rate, window = copy_bandwidth(bench), Window((3, 3), (2, 2), (1, 1))
    x = torch.randn(batch, 64, side, side, device=bench.device).to(memory_format=torch.channels_last)
    y, taps, _ = max_pool(x, window, Rounding(E5M2))
    # Values and taps are written and read; the result is rounded too.
    size = {"forward": 4 * x.numel() + 6 * y.numel(), "gradient": 5 * y.numel() + 4 * x.numel()}
    leaf = x.detach().requires_grad_()
    pooled = F.max_pool2d(leaf, *window)
    both: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (lambda: max_pool(x, window, Rounding(E5M2)), lambda: F.max_pool2d(leaf, *window)),
        "gradient": (
            lambda: max_pool_backward(y, taps, x.shape, window),
            lambda: torch.autograd.grad(pooled, leaf, y, retain_graph=True),
        ),
    }
    for name, (ours, torchs) in both.items():
        ms, shape = bench.milliseconds(ours), f"{batch}x64x{side}^2"
        bench.add(f"max pooling, {name}", shape, ms, size[name] / ms / rate, "copy bandwidth", None)
        bench.add(f"max pooling, {name}", shape, ms, bench.milliseconds(torchs) / ms, "torch FP32", None)


def measure_update(bench: Bench) -> None:
    """The fused SGD step (norm and finite check included) beside copy bandwidth and torch's fused SGD."""
    rate = copy_bandwidth(bench)
    for millions in (25, 200):
        n = bench.size(millions * 1_000_000)
        weight = torch.randn(n, device=bench.device)
        grad, momentum = torch.randn_like(weight), torch.zeros_like(weight)
        parameter = Parameter(weight.half(), grad, (momentum,), 1, torch.empty_like(weight, dtype=E5M2.dtype))
        rule, master = Rule("sgd", 1e-3, 0.9, weight_decay=1e-4), Rounding(FP16, "stochastic")

        def step(p: Parameter = parameter, rule: Rule = rule, master: Rounding = master) -> None:
            update([p], rule, 2, master, Rounding(), gradient_control([p], 1024.0), 1024.0)

        ms = bench.milliseconds(step)
        # Gradient twice (check, update), master and momentum read and written, weight written.
        ratio = n * (4 + 4 + 4 + 8 + 1) / ms / rate
        bench.add("update SGD", f"{millions}M", ms, ratio, "copy bandwidth", 0.8)
        leaf = nn.Parameter(weight)
        leaf.grad = grad
        fused = torch.optim.SGD([leaf], 1e-3, 0.9, weight_decay=1e-4, fused=True)
        fused.step()
        other = bench.milliseconds(fused.step)
        bench.add("update SGD", f"{millions}M", ms, other / ms, "torch.optim.SGD(fused=True), FP32", 1.0)


def measure_translation(bench: Bench) -> None:
    """What lies between the products of translation models."""
    rate = copy_bandwidth(bench)
    measure_lstm(bench, rate)
    measure_sublayers(bench, rate)


def measure_weights(bench: Bench) -> None:
    """The weights of ResNet-50's convolutions rounded in one launch, as a step begins, beside copy bandwidth."""
    from torchvision.models import resnet50

    rate = copy_bandwidth(bench)
    with torch.device("meta"):
        modules = [module for module in resnet50().modules() if isinstance(module, nn.Conv2d)]
    made = [torch.randn(bench.size(m.weight.numel()), device=bench.device).half() for m in modules]
    jobs = [Job(x, Rounding(), torch.empty_like(x, dtype=E5M2.dtype)) for x in made]
    launches = prepare(jobs, 0)

    def step() -> None:
        for launch in launches:
            launch.run()

    ms = bench.milliseconds(step)
    values = sum(x.numel() for x in made)
    bench.add(
        "weights of a ResNet-50, grouped", f"{values / 1e6:.0f}M", ms, 3 * values / ms / rate, "copy bandwidth", 0.6
    )


# In the order in which they matter, should time run out.
MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": measure_ceilings,
    "quantize": measure_quantize,
    "matmul": measure_matmul,
    "error": measure_error,
    "update": measure_update,
    "pooling": measure_pooling,
    "weights": measure_weights,
    "convolutions": measure_convolutions,
    "translation": measure_translation,
    "training step": measure_step,
    "compiled training step": measure_compiled_step,
}
# Those that are measured only where they are asked for by name.
ON_REQUEST: dict[str, Callable[[Bench], None]] = {
    "parity": parity,
    "conversions": check_conversions,
    "profile": profile_step,
    **STEPS,
}
