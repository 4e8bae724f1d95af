"""What a recipe costs each layer: measured against torch's own casts, estimated from exponents, told by the doctor."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fp8repro import sensitivity
from fp8repro.engines.quantizer import quantize
from fp8repro.errors import UserError
from fp8repro.numerics.formats import E4M3, E5M2, FP16, FloatFormat
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.noise import decibels, expected_snr, layers_to_exempt
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.recipes import load_recipe

FP8 = replace(load_recipe("fp8"), exempt=())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        # Far into E5M2's subnormals, and made up for by the layer behind.
        model[2].weight.mul_(2.0**-13)  # type: ignore[union-attr, operator]
        model[2].bias.zero_()  # type: ignore[union-attr, operator]
        model[4].weight.mul_(2.0**13)  # type: ignore[union-attr, operator]
    return model


X, Y = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4


def snr(exact: Tensor, rounded: Tensor) -> float:
    return decibels(float(exact.double().square().sum()), float((rounded - exact).double().square().sum()))


def test_the_layer_that_suffers_is_the_first_to_exempt_and_exempting_it_helps() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, (X, Y), FP8, scale=1024.0)
    assert found.layers_to_exempt()[0] == "2"
    rows = {(row.layer, row.role, row.operand): row for row in found.rows}
    for name in ("0", "2", "4"):
        weight = before[f"{name}.weight"]
        cast = weight.to(torch.float8_e5m2).float()
        assert rows[name, "weight", "weight"].snr == pytest.approx(snr(weight, cast))
        zeros = ((cast == 0) & (weight != 0)).float().mean()
        assert rows[name, "weight", "weight"].underflow == pytest.approx(float(zeros))
    assert rows["0", "activation", "input"].snr == pytest.approx(snr(X, X.to(torch.float8_e5m2).float()))
    # What honest code meets away from subnormals: 25.5 dB to nearest, 22.5 dB stochastic.
    assert 25 < rows["0", "activation", "input"].snr < 28
    assert 22 < rows["0", "gradient", "weight_gradient"].snr < 25
    better = sensitivity(model, (X, Y), replace(FP8, exempt=("2",)), scale=1024.0)
    assert better.gradients["4.weight"] > found.gradients["4.weight"] + 3
    assert "2" not in better.layers_to_exempt()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "fp8_context")
    assert found.table(1).splitlines()[2].startswith("2 ")


def test_a_larger_scale_of_the_loss_saves_errors_from_underflow() -> None:
    shares = []
    for scale in (2.0**-10, 2.0**10):
        rows = sensitivity(network(), (X, Y), FP8, scale=scale).rows
        shares.append([row.underflow for row in rows if row.role == "error" and row.operand == "output_error"])
    # The weights of the last layer lift the errors behind it.
    assert shares[0][-1] > 0.4
    assert max(shares[1]) < 0.1


def test_losses_of_ones_own_and_of_models_that_return_theirs() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return type("Output", (), {"loss": F.cross_entropy(self.inner(x), labels)})()

    right = sensitivity(network(), (X, Y), FP8).gradients
    by_mapping = sensitivity(Own(), {"x": X, "labels": Y}, FP8).gradients
    by_loss = sensitivity(Own(), X, FP8, loss=lambda model, x: model(x, Y).loss).gradients
    assert by_mapping == by_loss
    assert len(right) == len(by_loss) == 6
    with pytest.raises(UserError, match=r"loss: got .*, expected a finite scalar"):
        sensitivity(network(), X, FP8, loss=lambda model, x: model(x))
    with pytest.raises(UserError, match="batch: got Tensor, expected"):
        sensitivity(network(), X, FP8)


@pytest.mark.parametrize("format", [E5M2, E4M3, FP16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**-16])
def test_exponents_tell_the_noise_within_a_decibel(format: FloatFormat, rounding: str, scale: float) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * scale
    telemetry = Telemetry(active=True, roundings={"layer": {"error": Rounding(format, rounding)}})
    telemetry.buffer("layer.part", "error", "output_error", x.device)
    telemetry.count_exponents("layer.part", "error", "output_error", x)
    (row,) = telemetry.rows()
    assert (row["format"], row["rounding"]) == (format.name, rounding)
    measured = snr(x, quantize(x, format, rounding, out="float32"))
    assert expected_snr(*row["exponents"], format, rounding) == pytest.approx(measured, abs=1.0)


def test_what_overflows_is_not_part_of_the_noise_and_nothing_has_none() -> None:
    assert expected_snr(15, [1, 5], E5M2, "nearest") == expected_snr(15, [1], E5M2, "nearest")
    assert math.isnan(expected_snr(0, [], E5M2, "nearest"))
    assert layers_to_exempt([]) == []


def test_the_figure_shows_layers_and_roles(tmp_path: Path) -> None:
    found = sensitivity(network(), (X, Y), FP8)
    found.draw(tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20)}  # type: ignore[union-attr]
    # Three layers in four roles, and the colour bar.
    assert len(colours) > 12
