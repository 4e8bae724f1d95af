"""Layers of the package transformers; imported only where a model has one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from transformers.pytorch_utils import Conv1D

from fp8repro.precision.functional import LINEAR, quantized_product
from fp8repro.precision.site import Site


class FP8Conv1D(Conv1D):  # type: ignore[misc]
    """transformers' `Conv1D`, a linear layer with a transposed weight [in, out], whose products follow a recipe.

    Random bits count the elements of the matrix that is multiplied, [out, in].
    """

    site: Site

    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], FP32."""
        return quantized_product(x, self.weight.t(), self.bias, self.site, LINEAR, self.training)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        return output.numel() * int(self.weight.shape[0])
