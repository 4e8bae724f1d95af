"""What the paper reports: paper.yaml, where every figure says how it is known."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def paper_figures() -> dict[str, Any]:
    """paper.yaml: `figures` by model, `claims`, and what the marks and data mean."""
    text = files("fp8repro.paper").joinpath("paper.yaml").read_text(encoding="utf-8")
    figures: dict[str, Any] = yaml.safe_load(text)
    return figures
