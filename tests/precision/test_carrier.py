"""Codes between the layers of a ResNet: the bytes are those of FP32 tensors, and nobody is kept from looking."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from fp8repro.engines.products import EmulateBackend
from fp8repro.errors import UserError
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.models.resnet import make_resnet
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.carrier import carried
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import context_of, inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="neither a GPU nor Triton's interpreter")


def converted(model: nn.Module, recipe: str = "fp8") -> nn.Module:
    inject(model.to(DEVICE, memory_format=torch.channels_last), load_recipe(recipe), StepContext(seed=3), "triton")
    return model


def small(block: type[BasicBlock | Bottleneck] = BasicBlock) -> ResNet:
    """Three narrow stages, the second with a block after its downsampling one, and an empty one."""
    torch.manual_seed(0)
    model = ResNet(block, [1, 1, 1, 1])
    model.conv1, model.maxpool = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Identity()  # type: ignore[assignment]
    model.bn1, model.inplanes = nn.BatchNorm2d(8), 8
    model.layer1 = model._make_layer(block, 8, 1)
    model.layer2 = model._make_layer(block, 16, 2, stride=2)
    model.layer3 = model._make_layer(block, 12, 1, stride=2)
    model.layer4, model.fc = nn.Sequential(), nn.Linear(12 * block.expansion, 10)
    return model


def images(count: int = 2, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator).to(DEVICE, memory_format=torch.channels_last)


def steps(model: nn.Module, x: Tensor, count: int) -> dict[str, bytes]:
    """Every gradient, statistic and master of some steps, as bytes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    context = context_of(model)
    assert context is not None
    masters = MasterWeights(model, optimizer, load_recipe("fp8"), context)
    labels, found = torch.arange(len(x), device=DEVICE), {}
    for step in range(count):
        context.begin(step)
        (nn.functional.cross_entropy(model(x), labels) * 1000).backward()
        found |= {f"{step}/{name}/gradient": as_bytes(p.grad) for name, p in model.named_parameters()}
        masters.step(1000.0)
        optimizer.zero_grad()
        found |= {f"{step}/{name}": as_bytes(t) for name, t in model.state_dict().items()}
    return found


def as_bytes(t: Tensor | None) -> bytes:
    assert t is not None
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def with_and_without(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of a model, with codes between the layers and with FP32 tensors."""
    pair = copy.deepcopy(model), copy.deepcopy(model)
    pair[1].run_stages = None  # type: ignore[assignment]
    return pair


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_bytes_are_those_of_fp32_tensors(block: type[BasicBlock | Bottleneck]) -> None:
    model = converted(small(block))
    given, expected = (steps(m, images(), 1) for m in with_and_without(model))
    assert len(expected) > 100
    assert [name for name in expected if given[name] != expected[name]] == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_bytes_of_whole_networks_are_those_of_fp32_tensors(name: str) -> None:
    torch.manual_seed(0)
    pair = with_and_without(converted(make_resnet(name, 10, image_size=32)))
    given, expected = (steps(m, images(side=32), 3) for m in pair)
    assert [key for key in expected if given[key] != expected[key]] == []


def used(model: nn.Module) -> bool:
    """Whether codes travel in a step; its kernel that adds is launched for nothing else."""
    with counted_launches() as launches:
        model(images()).sum().backward()
    return launches["add"] > 0


def refused(model: nn.Module) -> bool:
    """Whether the stages get FP32 tensors."""
    x = torch.zeros(2, 8, 8, 8, device=DEVICE)
    return carried([model.layer1, model.layer2, model.layer3, model.layer4], x) is None  # type: ignore[list-item]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model after its first pass, which is watched through hooks that look at functions only."""
    model = converted(small())
    assert used(model)
    return model


def test_nobody_who_looks_sees_codes(trained: nn.Module) -> None:
    seen: list[torch.dtype] = []
    handles = [
        trained.layer2[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype)),
        trained.layer1[0].conv2.register_full_backward_hook(lambda module, given, taken: seen.append(given[0].dtype)),
    ]
    assert not used(trained)
    assert seen == [torch.float32] * 2
    for handle in handles:
        assert refused(trained)
        handle.remove()
    assert not refused(trained)
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None):
        assert refused(trained)
    assert used(trained)


def test_steps_that_are_measured_round_by_themselves(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    context = context_of(model)
    assert context is not None
    context.telemetry.active = True
    assert refused(model)


def test_what_is_not_as_it_was_converted_takes_fp32(trained: nn.Module) -> None:
    for change in (
        lambda model: model.layer3.append(nn.Identity()),
        lambda model: nn.utils.parametrize.register_parametrization(model.layer1[0].conv1, "weight", nn.Identity()),
        lambda model: model.layer1[0].bn1.eval(),
        lambda model: model.layer2[0].downsample[0].eval(),
        lambda model: setattr(model.layer1[0].conv1.site, "backend", EmulateBackend()),
        lambda model: setattr(model.layer1[0].conv1.site, "round_input_errors", False),
        lambda model: setattr(model.layer1[0].bn2, "consumers", Rounding(E5M2, overflow="saturate")),
    ):
        model = copy.deepcopy(trained)
        change(model)
        assert refused(model)


@pytest.mark.parametrize("recipe", ["fp8_stochastic", "fp8_hybrid"])
def test_recipes_that_codes_cannot_carry(recipe: str) -> None:
    assert refused(converted(small(), recipe))


def test_evaluation_and_frozen_stems(trained: nn.Module) -> None:
    model = pickle.loads(pickle.dumps(trained))
    with torch.no_grad(), counted_launches() as launches:
        model(images())
    assert launches["combine_statistics"] == 0
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    with counted_launches() as launches:
        model(images()).sum().backward()
    # Nobody asks for the gradient of the first block's input.
    assert launches["add"] == 0
    assert model.layer1[0].conv1.weight.grad.abs().max() > 0


def test_contiguous_images(trained: nn.Module) -> None:
    gradients = []
    for model in with_and_without(trained):
        model.to(memory_format=torch.contiguous_format)
        model(images().contiguous()).square().sum().backward()
        gradients.append({name: as_bytes(p.grad) for name, p in model.named_parameters()})
    assert gradients[0] == gradients[1]


def test_a_layer_refuses_codes_whose_gradient_it_would_not_round_to_them() -> None:
    model = converted(small(), "fp8_hybrid")
    x = torch.zeros(1, 8, 4, 4, device=DEVICE).to(torch.float8_e4m3fn).requires_grad_()
    with pytest.raises(UserError, match=r"layer layer1.0.conv1: got an input of torch.float8_e4m3fn that requires a"):
        model.layer1[0].conv1(x)


def test_a_layer_gives_codes_as_the_gradient_of_codes(trained: nn.Module) -> None:
    layer, context = trained.layer1[0].conv1, trained.fp8_context
    values = images(2).repeat(1, 3, 1, 1)[:, :8].to(torch.float8_e5m2)
    gradients = []
    for x in (values.clone().requires_grad_(), values.float().requires_grad_()):
        context.begin(5)
        layer(x).square().sum().backward()
        assert x.grad.dtype == x.dtype
        gradients.append(x.grad.float())
    assert torch.equal(*gradients)
    # Autograd cannot add what two layers would give.
    x = values.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"not implemented for 'Float8_e5m2'"):
        (layer(x).sum() + layer(x).sum()).backward()
