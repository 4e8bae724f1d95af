"""Models of torchvision, torch, timm and transformers: all products but the exempt layers' follow the recipe."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8repro.precision.injection import inject
from fp8repro.precision.sensitivity import sensitivity
from fp8repro.settings.recipes import load_recipe

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "other_models.py"))
# In the first steps of these, noise is too large a part to hold them to FP32's loss (docs/models.md).
NOISY = ("ResNet", "MobileNet", "R3D", "Wav2Vec2")


def family(name: str) -> list[Any]:
    if name in ("timm", "transformers"):
        pytest.importorskip(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(SCRIPT[f"{name}_models"]())


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "torch"])
def test_every_product_but_the_exempt_layers_is_in_fp8(name: str) -> None:
    found = family(name)
    assert len(found) >= 4
    for title, make, batch, loss in found:
        model = make().float()
        report = inject(model, load_recipe("fp8"))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert loss(model, batch).isfinite(), title
        assert report.without_owner() == [], title
        assert report.share("left") == 0, title
        assert report.share("converted") / (1 - report.share("exempt")) >= 0.95, title
        assert len(report.names("exempt")) <= 2, title


# Trains twenty models twice.
@pytest.mark.long
@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "torch"])
def test_one_batch_is_learned_as_in_fp32(name: str) -> None:
    for title, make, batch, loss in family(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = SCRIPT["measured"](title, make, batch, loss)
        assert result.steps_in_fp8, title
        if not any(word in title for word in NOISY):
            assert result.drop >= 0.9, title
        assert result.median_snr > (22 if "ConvNeXt" not in title else 12), title
        snr = result.gradient_snr
        if "ConvNeXt" in title:
            # Its blocks start with a scale of 1e-6, which the loss scale has to make up for.
            found = sensitivity(SCRIPT["prepared"](make, 0), batch, "fp8", loss=loss, scale=2.0**18)
            snr = min(row.snr for row in found.rows if row.role == "gradient")
        assert snr > 19.5, title
