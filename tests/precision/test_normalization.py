"""Fused normalization: bits as torch's layers one by one, bytes kept for backward, packed masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

from fp8repro.errors import UserError
from fp8repro.numerics.formats import get_format
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_normalization import FusedBatchNorm2d, pack_bits, unpack_bits, use_kernels
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_masks_survive_packing(shape: list[int], channels_last: bool, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    packed = pack_bits(x > 0)
    assert packed.numel() == -(-x.numel() // 8)
    mask = unpack_bits(packed, x)
    assert torch.equal(mask, x > 0)
    assert mask.stride() == x.stride()


def fused_and_plain(fmt: str) -> tuple[FusedBatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    fused, plain = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    for norm in (fused, plain):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 6))
            norm.bias.copy_(torch.linspace(0.5, -0.5, 6))
    fused.__class__ = FusedBatchNorm2d
    fused.input_format = get_format(fmt)
    return fused, plain  # type: ignore[return-value]


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_normalization_addition_and_relu_to_the_bit(fmt: str, relu: bool, with_residual: bool) -> None:
    fused, plain = fused_and_plain(fmt)
    dtype = get_format(fmt).dtype
    x = torch.randn(4, 6, 5, 3).to(dtype).float().to(memory_format=torch.channels_last)
    residual = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last)
    error = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last)
    results: list[list[Tensor]] = []
    for norm in (fused, plain):
        inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        if isinstance(norm, FusedBatchNorm2d):
            y = norm(inputs[0], inputs[1] if with_residual else None, relu)
        else:
            y = norm(inputs[0])
            y = y + inputs[1] if with_residual else y
            y = torch.relu(y) if relu else y
        wanted = [*(inputs if with_residual else inputs[:1]), norm.weight, norm.bias]
        buffers = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, error), *buffers])  # type: ignore[list-item]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_evaluation_equals_torchs_layers() -> None:
    fused, plain = fused_and_plain("e5m2")
    x, residual = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    expected = torch.relu(plain.eval()(x) + residual)
    assert torch.equal(fused.eval()(x, residual, relu=True), expected)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_fused_blocks_compute_what_torchvisions_do(block: type[nn.Module]) -> None:
    def build() -> nn.Module:
        wide = 8 * block.expansion  # type: ignore[operator]
        downsample = nn.Sequential(nn.Conv2d(8, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        return nn.Sequential(block(8, 8, 2, downsample), block(wide, 8))

    torch.manual_seed(0)
    model, plain = build(), build()
    plain.load_state_dict(model.state_dict())
    # The same rounding in both, but only one of them fused.
    recipe = replace(load_recipe("fp8"), exempt=())
    inject(model, recipe)
    inject(plain, replace(recipe, fuse_normalization=False))
    assert any(isinstance(module, FusedBatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, FusedBatchNorm2d) for module in plain.modules())
    x = torch.randn(4, 8, 6, 6)
    gradients = []
    for network in (model, plain):
        y = network(x)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(network.parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_of_other_normalizations_is_left_alone() -> None:
    model = resnet18(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    inject(model, "fp8")
    assert not any(isinstance(module, FusedBatchNorm2d) for module in model.modules())
    model(torch.randn(1, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("by_kernels", [False, True])
def test_one_value_a_channel_is_refused_as_torch_refuses_it(by_kernels: bool) -> None:
    model = resnet18()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))
    inject(model, "fp8", backend="emulate")
    norm = model.layer4[0].bn1
    if by_kernels:
        use_kernels(norm, Rounding(), StepContext())
    before = norm.running_var.clone()
    with pytest.raises(UserError, match=r"got size \(1, 512, 1, 1\), expected more than one value a channel"):
        norm(torch.randn(1, 512, 1, 1), relu=True)
    assert torch.equal(norm.running_var, before)
