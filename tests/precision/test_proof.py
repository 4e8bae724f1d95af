"""Proof that the recipe is what trains: every operand torch multiplies, every result, gradient and master of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recording import Recorder, in_set
from torch import Tensor, nn
from torchvision.models import resnet18

from fp8repro.numerics.recipe import ROLES, Recipe
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

IDENTITY = Rounding(format="fp32")
CLASSES = 5
IMAGES = 4
SCALE = 1000.0


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(IMAGES, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randint(CLASSES, (IMAGES,), generator=generator)


def build(recipe: Recipe, seed: int = 0, telemetry: bool = False) -> tuple[nn.Module, MasterWeights]:
    torch.manual_seed(seed)
    model = resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last)
    context = StepContext(seed=seed)
    context.telemetry.every = int(telemetry)
    inject(model, recipe, context, backend="emulate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, MasterWeights(model, optimizer, recipe)


def backward(model: nn.Module, step: int = 0, scale: float = SCALE) -> float:
    x, target = batch(step)
    model.fp8_context.begin(step)  # type: ignore[union-attr,operator]
    model.zero_grad()
    loss = F.cross_entropy(model(x), target)
    (loss * scale).backward()
    return float(loss.detach())


def check_training(recipe: Recipe, operands: str, exempt: str, master: str) -> None:
    """Record two training steps; every product, result, gradient and master must lie in its format's set."""
    model, masters = build(recipe)
    injected = {name: m for name, m in model.named_modules() if hasattr(m, "site")}
    names = list(injected)
    outside = {names[0], names[-1]} if exempt != operands else set()
    formats = {name: exempt if name in outside else operands for name in names}
    results: list[tuple[str, Tensor]] = []
    for name, module in injected.items():
        module.register_forward_hook(lambda m, args, out, name=name: results.append((name, out.detach().clone())))
        module.register_full_backward_hook(
            lambda m, grads, outs, name=name: results.extend((name, g.clone()) for g in grads if g is not None)
        )
    for step in range(2):
        results.clear()
        with Recorder() as recorder:
            backward(model, step)
        # Three products a layer; the first convolution has no error product.
        assert len(recorder.products) == 3 * len(names) - 1
        fewer = [p for p in recorder.products if not all(in_set(t, operands) for t in p[1])]
        # The only products outside the FP8 set are the exempt layers', and those lie in the exempt format's.
        assert len(fewer) == (5 if outside else 0)
        assert all(in_set(t, exempt) for p in fewer for t in p[1])
        assert len(results) == 2 * len(names) - 1
        for name, tensor in results:
            assert in_set(tensor, formats[name]), name
        for name, module in injected.items():
            assert in_set(module.weight.grad, formats[name]), name  # type: ignore[arg-type]
        assert masters.step(SCALE)
        for name, parameter in model.named_parameters():
            assert in_set(parameter, master), name


def test_every_operand_result_gradient_and_master_lies_in_its_set() -> None:
    check_training(load_recipe("fp8"), "e5m2", "fp16", "fp16")


@pytest.mark.parametrize("role", ROLES)
def test_the_proof_notices_a_role_that_is_switched_off(role: str) -> None:
    with pytest.raises(AssertionError):
        check_training(replace(load_recipe("fp8"), **{role: IDENTITY}), "e5m2", "fp16", "fp16")


def test_the_proof_notices_exempt_layers_that_are_not_rounded() -> None:
    with pytest.raises(AssertionError):
        check_training(replace(load_recipe("fp8"), exempt_roles=IDENTITY), "e5m2", "fp16", "fp16")


def test_fp16_multiplies_fp16_operands() -> None:
    recipe = replace(load_recipe("fp16"), master=Rounding(format="fp16"))
    check_training(recipe, "fp16", "fp16", "fp16")
    with pytest.raises(AssertionError):
        check_training(recipe, "e5m2", "fp16", "fp16")


def test_bf16_multiplies_bf16_operands() -> None:
    model, _ = build(load_recipe("bf16"))
    x, target = batch()
    with Recorder() as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
    assert len(recorder.products) >= 21
    assert all(t.dtype == torch.bfloat16 for _, operands in recorder.products for t in operands)


def test_the_toolkits_errors_vanish_where_ours_are_kept_in_expectation() -> None:
    # In units of the smallest subnormal, 2^-16; normal from 4 on, in steps of 1 up to 8.
    units, count = (0.25, 0.5, 1.5, 4.5), 4096
    errors = torch.tensor(units).repeat_interleave(count)[:, None] * 2.0**-16
    received = {}
    for name in ("fp8", "fp8_toolkit"):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        nn.init.ones_(model[0].weight)
        inject(model, replace(load_recipe(name), exempt=()), StepContext(seed=1), backend="emulate")
        x = torch.zeros_like(errors, requires_grad=True)
        model(x).backward(errors)
        assert x.grad is not None
        received[name] = [part * 2.0**16 for part in x.grad[:, 0].split(count)]
    for part, value in zip(received["fp8"], units, strict=True):
        share = value % 1
        assert set(part.tolist()) == {value - share, value - share + 1}
        assert float(part.mean()) == pytest.approx(value, abs=4 * (share * (1 - share) / count) ** 0.5)
    below, half, tie, normal = received["fp8_toolkit"]
    assert not below.any()
    assert not half.any()
    assert (tie == 2).all()
    assert float(normal.mean()) == pytest.approx(4.5, abs=4 * (0.25 / count) ** 0.5)


def test_hybrid_multiplies_e4m3_forward_and_e5m2_backward() -> None:
    from fp8repro.engines import products

    model, _ = build(load_recipe("fp8_hybrid"))
    seen: dict[tuple[str, str], set[str]] = {}

    def observer(layer: str, product: str, operands: tuple[products.Operand, ...]) -> None:
        for position, operand in enumerate(operands):
            seen.setdefault((product, str(position)), set()).add(operand.fmt.name)
            if operand.fmt.name == "e4m3":
                codes = operand.codes.to(torch.float32)
                # The scale brings the largest magnitude into the top binade of the format.
                assert 224 <= float(codes.abs().max()) <= 448
                torch.testing.assert_close(operand.decoded(), codes / operand.scale, rtol=0, atol=0)

    with model.fp8_context.observe(observer):
        backward(model)
    assert seen["forward", "0"] == seen["forward", "1"] == {"e4m3", "fp16"}
    assert seen["error", "0"] == seen["gradient", "0"] == {"e5m2", "fp16"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_with_identity_quantizers_the_run_equals_fp32_to_the_bit(channels_last: bool) -> None:
    identity = Recipe(**dict.fromkeys(ROLES, IDENTITY), exempt_roles=Rounding(format="fp16"), exempt=())

    def run(converted: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = resnet18(num_classes=CLASSES)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        # Conversion is forced: a recipe that rounds nothing would leave the layers alone.
        masters = MasterWeights(model, optimizer, identity)
        if converted:
            force_conversion(model, identity)
        for step in range(2):
            x, target = batch(step)
            model.zero_grad()
            F.cross_entropy(model(x if channels_last else x.contiguous()), target).backward()
            assert masters.step()
        return [p.detach() for p in model.parameters()]

    for converted, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(converted, plain)


def force_conversion(model: nn.Module, identity: Recipe) -> None:
    inject(model, replace(identity, weight=Rounding()), backend="emulate")
    for module in model.modules():
        if hasattr(module, "site"):
            module.site.roles = dict.fromkeys(ROLES[:4], IDENTITY)


def snr(measured: Tensor, exact: Tensor) -> float:
    noise = (measured.double() - exact).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise))


def test_each_product_is_within_one_decibel_of_its_signal_to_noise_floor() -> None:
    recipe = replace(load_recipe("fp8"), round_outputs=False, round_input_errors=False, exempt=(), gradient=IDENTITY)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(512, 384, bias=False))
    layer[0].weight.data.normal_()
    weight = layer[0].weight.detach().double()
    inject(layer, recipe)
    x = torch.randn(256, 512, requires_grad=True)
    error = torch.randn(256, 384)
    y = layer(x)
    y.backward(error)
    exact = (x.detach().double() @ weight.t(), error.double() @ weight, error.double().t() @ x.detach().double())
    # Two tensors rounded to nearest: 22.5 dB; one of them stochastic: 20.8 dB.
    for measured, true, floor in zip(
        (y.detach(), x.grad, layer[0].weight.grad), exact, (22.5, 20.8, 20.8), strict=True
    ):
        assert abs(snr(measured, true) - floor) < 1.0  # type: ignore[arg-type]


def test_rounded_results_add_one_rounding_to_the_products_noise() -> None:
    recipe = replace(load_recipe("fp8"), exempt=())
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(512, 384, bias=False))
    layer[0].weight.data.normal_()
    weight = layer[0].weight.detach().double()
    inject(layer, recipe)
    x = torch.randn(256, 512, requires_grad=True)
    error = torch.randn(256, 384)
    layer(x).backward(error)
    exact = (error.double() @ weight, error.double().t() @ x.detach().double())
    # 20.8 dB of the product and 22.5 dB of a stochastic rounding of its result: 18.6 dB.
    for measured, true in zip((x.grad, layer[0].weight.grad), exact, strict=True):
        assert abs(snr(measured, true) - 18.6) < 1.0  # type: ignore[arg-type]


def saved_bytes(run: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes of distinct storages that the forward pass keeps for the backward pass, parameters left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    assert result.requires_grad
    return sum(seen.values())


def test_layers_keep_bytes_for_backward_and_no_fp32_copies() -> None:
    def measure(recipe: str) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 4))
        if recipe != "fp32":
            inject(model, replace(load_recipe(recipe), exempt=()))
        x = torch.randn(16, 8, 8, 8)
        return saved_bytes(lambda: model(x).sum(), {p.untyped_storage().data_ptr() for p in model.parameters()})

    activations = 16 * 8 * 8 * 8 * 2 + 16 * 16 * 36
    assert measure("fp32") >= 4 * activations
    # One byte a value. Weights are not counted in either: there they are the parameters, here the step's FP8 copies.
    assert measure("fp8") == activations


def test_resnet18_keeps_at_most_35_percent_of_fp32s_bytes_for_backward() -> None:
    def measure(recipe: str) -> int:
        model = small_resnet18().to(memory_format=torch.channels_last)
        inject(model, recipe)
        x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
        return saved_bytes(lambda: model(x).sum(), {p.untyped_storage().data_ptr() for p in model.parameters()})

    assert measure("fp8") <= 0.35 * measure("fp32")


def small_resnet18() -> nn.Module:
    """ResNet-18 with the stem for small images."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def test_underflow_share_of_errors_by_loss_scale() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (
        torch.tensor(digits.images, dtype=torch.float32).div(16).sub(0.3).div(0.37)[:, None].repeat_interleave(3, 1)
    )
    targets = torch.tensor(digits.target)
    model = small_resnet18().to(memory_format=torch.channels_last)
    recipe = load_recipe("fp8")
    context = StepContext()
    # One backend, because the order of its sums decides how a run goes on.
    inject(model, recipe, context, backend="emulate")
    masters = MasterWeights(
        model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4), recipe
    )
    generator = torch.Generator().manual_seed(0)

    def errors(step: int, scale: float) -> None:
        chosen = torch.randperm(len(images), generator=generator)[:64]
        context.begin(step)
        model.zero_grad()
        (F.cross_entropy(model(images[chosen]), targets[chosen]) * scale).backward()

    # The errors shrink with the loss, so the shares rise over a run: taken over the fourth to sixth epoch.
    scales = (1.0, 1_000.0, 10_000.0)
    counted: dict[float, list[float]] = {scale: [] for scale in scales}
    for step in range(132):
        context.telemetry.every = 0
        context.telemetry.begin(step)
        errors(step, 10_000.0)
        masters.step(10_000.0)
        if step >= 87 and step % 11 == 10:
            context.telemetry.every = 1
            for scale in scales:
                context.telemetry.begin(step)
                for part in range(4):
                    errors(1000 + 4 * step + part, scale)
                counted[scale].append(context.telemetry.share("error", "output_error"))
    shares = {scale: sum(values) / len(values) for scale, values in counted.items()}
    for scale, expected in ((1.0, 0.69), (1_000.0, 0.012), (10_000.0, 0.0017)):
        assert expected / 2 <= shares[scale] <= expected * 2, shares
