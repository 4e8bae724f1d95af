"""Convolutions of one to three spatial dimensions, transposed ones too, that multiply under a recipe.

One-dimensional ones are images of height one, so that every backend multiplies them. Three dimensions and transposed
convolutions are multiplied in FP32 of rounded operands on every device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fp8repro.engines.products import Backend, Conv2dGeometry, ConvolutionGeometry, EmulateBackend, Operand
from fp8repro.precision.functional import Op, conv2d_op, quantized_product
from fp8repro.precision.site import Site
from fp8repro.precision.stored import StoredWeight


def conv1d_op(geometry: Conv2dGeometry) -> Op:
    """The products of a one-dimensional convolution, in those of images with one row."""
    images = conv2d_op(geometry)
    return Op(
        forward=partial(_row_forward, images),
        grad_a=partial(_row_backward, images.grad_a),
        grad_b=partial(_row_backward, images.grad_b),
        bias_dims=(0, 2),
    )


def _row_forward(images: Op, backend: Backend, x: Operand, w: Operand, bias: Tensor | None) -> Tensor:
    return images.forward(backend, _image(x), _image(w), bias).squeeze(2)


def _row_backward(product: Any, backend: Backend, e: Operand, other: Operand, like: Tensor) -> Tensor:
    result: Tensor = product(backend, _image(e), _image(other), like.unsqueeze(2))
    return result.squeeze(2)


def _image(x: Operand) -> Operand:
    """[B, C, L] -> [B, C, 1, L]; what a backend packed stays with the operand."""
    return replace(x, codes=x.codes.unsqueeze(2), values=None if x.values is None else x.values.unsqueeze(2))


def convolution_op(geometry: ConvolutionGeometry) -> Op:
    """The products of any other convolution, in FP32; its site's backend has to be an `EmulateBackend`."""
    return Op(
        forward=partial(_forward, geometry),
        grad_a=partial(_error, geometry),
        grad_b=partial(_gradient, geometry),
        bias_dims=(0, *range(2, 2 + len(geometry.stride))),
    )


def _forward(g: ConvolutionGeometry, backend: EmulateBackend, x: Operand, w: Operand, bias: Tensor | None) -> Tensor:
    return backend.convolution(x, w, bias, g)


def _error(g: ConvolutionGeometry, backend: EmulateBackend, e: Operand, w: Operand, like: Tensor) -> Tensor:
    return backend.convolution_error(e, w, g, like)


def _gradient(g: ConvolutionGeometry, backend: EmulateBackend, e: Operand, x: Operand, like: Tensor) -> Tensor:
    return backend.convolution_gradient(e, x, g, like)


class FP8Convolution(StoredWeight, nn.modules.conv._ConvNd):
    """What convolutions that multiply under a recipe share (strided, dilated, grouped, any padding mode)."""

    site: Site
    op: Op

    def prepare(self) -> None:
        """Fix the geometry, and the order in which elements are counted, once."""
        self.site.order = "channels_last"
        zeros = (0,) * len(self.stride)
        padding = zeros if self.pads_apart() else tuple(self.padding)
        self.op = self._op(tuple(self.stride), padding, tuple(self.dilation))  # type: ignore[arg-type]

    def _op(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> Op:
        raise NotImplementedError

    def pads_apart(self) -> bool:
        """True where the product's own zero padding cannot serve."""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)

    @_disable_dynamo
    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] (or [C, ...]) -> [B, O, ...], FP32."""
        batched = input.dim() == len(self.stride) + 2
        x = input if batched else input.unsqueeze(0)
        if self.pads_apart():
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        result = quantized_product(x, self.weight, self.bias, self.site, self.op, self.training)
        return result if batched else result.squeeze(0)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        return output.numel() * self.weight[0].numel()


class FP8Conv1d(FP8Convolution, nn.Conv1d):
    """`nn.Conv1d` whose three products follow a recipe."""

    def _op(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> Op:
        return conv1d_op(Conv2dGeometry((1, *stride), (0, *padding), (1, *dilation), self.groups))  # type: ignore[arg-type]


class FP8Conv2d(FP8Convolution, nn.Conv2d):
    """`nn.Conv2d` whose three products follow a recipe."""

    def _op(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> Op:
        return conv2d_op(Conv2dGeometry(stride, padding, dilation, self.groups))  # type: ignore[arg-type]


class FP8Conv3d(FP8Convolution, nn.Conv3d):
    """`nn.Conv3d` whose three products follow a recipe."""

    def prepare(self) -> None:
        """See `FP8Convolution`."""
        self.site.backend = EmulateBackend()
        super().prepare()

    def _op(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> Op:
        return convolution_op(ConvolutionGeometry(stride, padding, dilation, self.groups, False, (0, 0, 0)))


class FP8TransposedConvolution(FP8Convolution):
    """What transposed convolutions share; torch's own work out the size of the result."""

    def prepare(self) -> None:
        """See `FP8Convolution`; the geometry depends on the size that each call asks for."""
        self.site.backend = EmulateBackend()
        self.site.order = "channels_last"

    @_disable_dynamo
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, ...] (or [C, ...]) -> [B, O, ...], FP32; `output_size`: see torch's layer."""
        spatial = len(self.stride)
        options = (self.stride, self.padding, self.kernel_size, spatial, self.dilation)
        output_padding = self._output_padding(input, output_size, *options)  # type: ignore[operator]
        # Transposed convolutions pad with zeros only, by numbers.
        numbers = (tuple(self.stride), tuple(self.padding), tuple(self.dilation))
        op = convolution_op(ConvolutionGeometry(*numbers, self.groups, True, tuple(output_padding)))  # type: ignore[arg-type]
        batched = input.dim() == spatial + 2
        x = input if batched else input.unsqueeze(0)
        result = quantized_product(x, self.weight, self.bias, self.site, op, self.training)
        return result if batched else result.squeeze(0)

    def multiply_adds(self, inputs: tuple[Any, ...], output: Tensor) -> int:
        """Of one forward pass."""
        x: Tensor = inputs[0]
        return x.numel() * self.weight[0].numel()


class FP8ConvTranspose1d(FP8TransposedConvolution, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` whose three products follow a recipe."""


class FP8ConvTranspose2d(FP8TransposedConvolution, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose three products follow a recipe."""


class FP8ConvTranspose3d(FP8TransposedConvolution, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose three products follow a recipe."""


CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FP8Conv1d,
    nn.Conv2d: FP8Conv2d,
    nn.Conv3d: FP8Conv3d,
    nn.ConvTranspose1d: FP8ConvTranspose1d,
    nn.ConvTranspose2d: FP8ConvTranspose2d,
    nn.ConvTranspose3d: FP8ConvTranspose3d,
}
