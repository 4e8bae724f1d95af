"""What share of a model follows the recipe, counted in its first pass; torch's own counter is the oracle."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, mobilenet_v3_small
from torchvision.models.swin_transformer import SwinTransformer

from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.models.gnmt import gnmt
from fp8repro.models.transformer import transformer
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

FP8 = load_recipe("fp8")


def counted(model: nn.Module, *inputs: Any) -> float:
    """Multiply-adds of a forward pass, by torch's own counter."""
    # On CPUs torch's fused attention has no formula in its counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() / 2


def vit() -> nn.Module:
    return VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=4)


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv1d(2, 4, 3, stride=2), nn.ConvTranspose1d(4, 2, 3, stride=2), nn.Unflatten(1, (1, 2))),
            *(nn.Conv2d(1, 4, (1, 3)), nn.ConvTranspose2d(4, 2, 3, groups=2), nn.Unflatten(1, (1, 2))),
            *(nn.Conv3d(1, 2, (1, 2, 3)), nn.ConvTranspose3d(2, 3, 2, stride=2)),
        )


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (vit, (torch.randn(1, 3, 16, 16),)),
        (swin, (torch.randn(1, 3, 16, 16),)),
        (mobilenet_v3_small, (torch.randn(1, 3, 32, 32),)),
        (Convolutions, (torch.randn(2, 2, 9),)),
        (lambda: transformer(9, encoder_layers=1, decoder_layers=2, width=8, ffn_width=8, heads=2), ()),
    ],
)
def test_multiply_adds_are_those_that_torch_counts(make: Any, inputs: tuple[Tensor, ...]) -> None:
    inputs = inputs or (torch.tensor([[4, 5, 2]]), torch.tensor([[2, 6, 7, 8]]))
    right = counted(make(), *inputs)
    model = make()
    report = inject(model, FP8)
    assert "not counted yet" in report.table()
    with torch.no_grad():
        model.eval()(*inputs)
    assert sum(report.multiply_adds.values()) == right
    assert sum(report.share(status) for status in ("converted", "exempt", "left")) == pytest.approx(1)
    assert report.share("left") == 0
    assert report.never_ran() == []


@pytest.mark.parametrize("make", [gnmt, transformer])
def test_fused_nodes_tell_of_the_layers_that_they_do_not_call(make: Any) -> None:
    if not INTERPRETED:
        pytest.skip("a CPU takes Triton's kernels in its interpreter only")
    torch.manual_seed(0)
    width = {"width": 16} if make is gnmt else {"width": 16, "ffn_width": 16, "heads": 2}
    found = []
    for backend in ("emulate", "triton"):
        model = make(9, **width)
        report = inject(model, FP8, backend=backend)
        model(torch.tensor([[4, 5, 2]]), torch.tensor([[2, 6, 7, 8]]))
        assert report.never_ran() == []
        found.append(report.multiply_adds)
    assert found[0] == found[1]


def test_recurrent_layers_count_all_of_their_products() -> None:
    model = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2)
    report = inject(model, replace(FP8, exempt=()))
    model(torch.randn(7, 4, 3))
    steps = 7 * 4
    weights = sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    assert sum(report.multiply_adds.values()) == steps * weights
    assert report.parameter_share() == 1
    assert report.never_ran() == []


def test_our_translation_models_follow_the_recipe_in_every_product() -> None:
    model = gnmt(9, layers=2, width=8)
    report = inject(model, FP8)
    model(torch.tensor([[4, 5, 2]]), torch.tensor([[2, 6]]))
    assert report.share("left") == 0
    assert report.never_ran() == []


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.left = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.bilinear = nn.Bilinear(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(self.used(x))
        return self.bilinear(x, x)


def test_the_report_names_what_never_ran_and_what_no_recipe_rounds() -> None:
    model = Partly()
    report = inject(model, replace(FP8, exempt=()), leave=["left"])
    model(torch.randn(3, 8))
    assert report.never_ran() == ["unused"]
    assert report.without_owner() == ["left: linear", "bilinear: bilinear"]
    assert report.share("converted") == pytest.approx(64 / (64 + 32 + 32))
    assert report.parameter_share() == pytest.approx(144 / (144 + 36 + 34))
    table = report.table()
    assert "multiply-adds of the first pass: 50.0% converted, 0.0% exempt, 50.0% left" in table
    assert "left to torch: left: linear, bilinear: bilinear" in table
    assert "never ran: unused" in table


def test_a_model_of_which_nothing_is_converted_is_warned_of() -> None:
    model = nn.Sequential(nn.Bilinear(4, 4, 2))
    with pytest.warns(UserWarning, match="the model has no layer to convert"):
        inject(model, FP8)
    usual = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(usual, FP8)
        usual(torch.randn(2, 4))
        inject(nn.Sequential(nn.Bilinear(4, 4, 2)), "fp32")
