"""Products that a module computes by functions (`F.linear`, `@`, `torch.einsum`, attention), under a recipe.

Which modules do is found out in a model's first forward pass (bypass.py). From then on a mode is active while such a
module runs, and gives each product to a small module of its own (function_products.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from fp8repro.engines.guards import INPUT_DTYPES
from fp8repro.engines.products import ConvolutionGeometry
from fp8repro.errors import UserError
from fp8repro.precision.einsum import as_matrices, contraction
from fp8repro.precision.function_products import (
    ConvolutionProduct,
    FP8Attention,
    WeightProduct,
    matmul,
    matmul_product,
)
from fp8repro.precision.functional import LINEAR, quantized_product
from fp8repro.precision.layers import FP8Linear
from fp8repro.precision.module_modes import ModuleMode
from fp8repro.precision.places import FUNCTION_PRODUCTS, Places
from fp8repro.precision.recurrent import Cell, gru_cell, lstm_cell, relu_cell, tanh_cell
from fp8repro.precision.reruns import parts

# Their children are what they iterate over: nothing may be added.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SPECTRAL_NORM = SpectralNorm.compute_weight.__globals__


class Products(nn.ModuleDict):
    """The products by functions of a module, its child."""

    def __init__(self, name: str) -> None:
        """`name` is the child's in the model."""
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A module that calls all of its children calls this one, too.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model: got a module that calls all of its children, {self.name} among them, "
            f"expected inject(..., leave=[{self.name + '.*'!r}])"
        )


class FunctionProducts(ModuleMode):
    """Gives the products by functions of one module to the recipe, while the module runs.

    Attributes:
        counts: how many products of each kind there were; for each of the module's passes that run, the innermost last.
        functions: all products that a module may compute.
    """

    functions: frozenset[Callable[..., Any]]

    def __init__(self, module: nn.Module, name: str, places: Places, model: nn.Module) -> None:
        """`name` is the module's in the model; `model` is where weights of other layers are looked for."""
        super().__init__()
        self.module, self.name, self.places = module, name, places
        modules = dict(model.named_modules())
        self.layers = {n: m for n, m in modules.items() if isinstance(m, FP8Linear)}
        left = [m for n, m in modules.items() if places.leaves(n)]
        self.left = [p for m in left for p in m.parameters(recurse=False)]
        self.counts: list[Counter[str]] = []
        # What computes a weight (spectral norm) is no layer.
        helper = type(module).__module__.startswith("torch.nn.utils.") and not is_parametrized(module)
        self.all_left = helper or isinstance(module, _CONTAINERS)
        # Told of every product in the first pass: the name of its place, multiply-adds, and its weight.
        self.tell: Callable[[str, int, Tensor | None], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy tells nobody."""
        return {**self.__dict__, "counts": [], "_frames": [], "tell": None}

    def install(self) -> None:
        """Be active in every forward pass of the module from now on."""
        self.tell = None
        self.module.register_forward_pre_hook(self.enter)
        self.module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a forward pass."""
        self.begin()
        self.counts.append(Counter())

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After it; a hook before ours may have ended the pass."""
        if self.counts:
            self.end()

    def end(self) -> None:
        """Leave the mode."""
        del self.counts[len(self._frames) - 1 :]
        super().end()

    # A compiler that goes on behind a break in here takes other tensors for the results.
    @_disable_dynamo
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Hand a product over; everything else is what it is."""
        kwargs = kwargs or {}
        return self.hand_over(func, args, kwargs) if func in PRODUCTS else func(*args, **kwargs)

    def resume(self, counts: Counter[str], frame: FrameType) -> None:
        """See `reruns.Owner`."""
        self._frames.append(frame)
        self.counts.append(counts)

    def end_part(self) -> None:
        """See `reruns.Owner`."""
        self._frames.pop()
        self.counts.pop()

    def hand_over(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product, under the recipe or by torch."""
        path = self.path()
        if path is None:
            return func(*args, **kwargs)
        try:
            result = self.take(func, args, kwargs, path)
        finally:
            # It holds this very frame: a circle would keep the tensors of all callers.
            path.clear()
        if result is NotImplemented:
            # A module further out must not take it for its own.
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        return result

    def take(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: Sequence[FrameType]
    ) -> Any:
        """The product under the recipe, or NotImplemented where it is left to torch.

        Args:
            func, args, kwargs: the call.
            path: the callers within the module, the innermost first.

        Raises:
            UserError: it would need the gradient of a part of a weight that is stored in 16 bit.
        """
        around = parts(path, self)
        # A hook that computes a weight runs in whoever calls the layer, and is no part of it.
        if around is None or any(frame.f_globals is _SPECTRAL_NORM for frame in path):
            return NotImplemented
        result = self._multiply(func, args, kwargs)
        for part in around:
            part.taken |= result is not NotImplemented
        return result

    def _multiply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        convert = CONVERSIONS.get(func)
        if convert is None or self.all_left or self.places.leaves(self.name) or kwargs.get("out") is not None:
            return NotImplemented
        operands = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        operands += [t for arg in args if isinstance(arg, (list, tuple)) for t in arg if isinstance(t, Tensor)]
        if not all(t.dtype in (*INPUT_DTYPES, torch.bool) and t.layout == torch.strided for t in operands):
            return NotImplemented
        if any(t is p or t._base is p for t in operands for p in self.left):
            return NotImplemented
        return convert(self, *args, **kwargs)

    def product(self, what: str, make: Callable[[Any], nn.Module]) -> Any:
        """The module of the next product of a kind in this forward pass; NotImplemented where it is to be left."""
        index = self.counts[-1][what]
        self.counts[-1][what] += 1
        key = f"{what}_{index}"
        child = f"{self.name}.{FUNCTION_PRODUCTS}" if self.name else FUNCTION_PRODUCTS
        name = f"{child}.{key}"
        if self.places.leaves(name):
            return NotImplemented
        if FUNCTION_PRODUCTS not in self.module._modules:
            self.module.add_module(FUNCTION_PRODUCTS, Products(child))
        products = self.module._modules[FUNCTION_PRODUCTS]
        assert isinstance(products, nn.ModuleDict)
        if key not in products:
            products[key] = make(self.places.site(name, self.places.exempts(name))).train(self.module.training)
        return partial(self._run, name, products[key])

    def _run(self, name: str, product: Any, *inputs: Any, **options: Any) -> Any:
        result = product(*inputs, **options)
        if self.tell is not None and isinstance(product, FP8Attention):
            query, key, *_ = inputs
            self.tell(f"{name}.scores", query.numel() * key.shape[-2], None)
            self.tell(f"{name}.context", result.numel() * key.shape[-2], None)
        elif self.tell is not None:
            weight = inputs[1] if isinstance(product, (WeightProduct, ConvolutionProduct)) else None
            self.tell(name, product.multiply_adds(inputs, result), weight)
        return result

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """`F.linear`, at the place of the layer that the weight belongs to or at one of its own."""
        for name, layer in self.layers.items():
            if layer._parameters.get("weight") is not weight:
                continue
            if self.tell is not None:
                self.tell(name, x.numel() * len(weight), None)
            rows = x if x.dim() > 1 else x.unsqueeze(0)
            result = quantized_product(rows, weight, bias, layer.site, LINEAR, layer.training)
            return result if x.dim() > 1 else result.squeeze(0)
        product = self.product("linear", WeightProduct)
        return product if product is NotImplemented else product(x, _whole(weight), bias)


def _whole(weight: Tensor) -> Tensor:
    """The weight, where its gradient can be honoured."""
    if weight.dtype != torch.float32 and weight._base is not None and weight.requires_grad:
        raise UserError(
            f"model: a function multiplies by a part of a weight {tuple(weight._base.shape)} that is stored in 16 bit, "
            "expected inject(..., leave=[its layer]) or MasterWeights(..., narrow=False)"
        )
    return weight


def _is_weight(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter)


def _transposed(weight: Tensor) -> Tensor:
    """The transposed matrix: the parameter itself where the matrix is its transposed view."""
    base = weight._base
    if not isinstance(base, nn.Parameter) or base.dim() != 2:
        return weight.t()
    place = (base.shape[::-1], base.stride()[::-1], base.storage_offset())
    return base if (weight.shape, weight.stride(), weight.storage_offset()) == place else weight.t()


def _matmul(by: FunctionProducts, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Any:
    # A single term each is no sum: an outer product, positions times frequencies for one.
    if not a.dim() or not b.dim() or a.shape[-1] == 1:
        return NotImplemented
    if b.dim() == 2 and _is_weight(b):
        return by.linear(a, _transposed(b), bias)
    if a.dim() == 2 and _is_weight(a) and bias is None:
        if b.dim() == 1:
            return by.linear(b, a)
        result = by.linear(b.transpose(-1, -2), a)
        return result if result is NotImplemented else result.transpose(-1, -2)
    if not by.places.recipe.attention_products or bias is not None:
        return NotImplemented
    product = by.product("matmul", matmul_product)
    return product if product is NotImplemented else matmul(product, a, b)


def _reversed_matmul(by: FunctionProducts, b: Tensor, a: Tensor) -> Any:
    return _matmul(by, a, b)


def _addmm(by: FunctionProducts, input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if input.dim() == 1 and beta == alpha == 1 and b.dim() == 2 and _is_weight(b):
        return _matmul(by, a, b, input)
    result = _matmul(by, a, b)
    if result is NotImplemented:
        return result
    result = result if alpha == 1 else alpha * result
    return result if beta == 0 else result + (input if beta == 1 else beta * input)


def _einsum(by: FunctionProducts, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    a, b = operands
    how = contraction(equation, a, b)
    if how is None:
        return NotImplemented
    left, right, result_of = as_matrices(how, a, b)
    if not how.batch and _is_weight(b):
        result = by.linear(left, right.squeeze(0))
    elif not how.batch and _is_weight(a):
        result = by.linear(right, left.squeeze(0))
        result = result if result is NotImplemented else result.transpose(-1, -2)
    else:
        result = _matmul(by, left, right.transpose(-1, -2))
    return result if result is NotImplemented else result_of(result)


def _linear(by: FunctionProducts, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return by.linear(input, weight, bias) if weight.dim() == 2 else NotImplemented


def _attention(by: FunctionProducts, *args: Any, **kwargs: Any) -> Any:
    if not by.places.recipe.attention_products:
        return NotImplemented
    product = by.product("attention", FP8Attention)
    return product if product is NotImplemented else product(*args, **kwargs)


def _each(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def _convolution(
    by: FunctionProducts,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if padding == "same":
        gaps = _each(dilation, weight.dim() - 2)
        total = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
        input = F.pad(input, [part for t in reversed(total) for part in (t // 2, t - t // 2)])
    margins = 0 if isinstance(padding, str) else padding
    return _any_convolution(by, input, weight, bias, (stride, margins, dilation), groups)


def _transposed_convolution(
    by: FunctionProducts,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    return _any_convolution(by, input, weight, bias, (stride, padding, dilation), groups, output_padding)


def _any_convolution(
    by: FunctionProducts,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: tuple[Any, Any, Any],
    groups: int,
    output_padding: Any = None,
) -> Any:
    """By stride, padding and dilation; one with an `output_padding` is transposed."""
    product = by.product("convolution", ConvolutionProduct)
    if product is NotImplemented:
        return product
    spatial = weight.dim() - 2
    added = _each(output_padding or 0, spatial)
    stride, padding, dilation = (_each(value, spatial) for value in numbers)
    geometry = ConvolutionGeometry(stride, padding, dilation, groups, output_padding is not None, added)
    return product(input, _whole(weight), bias, geometry)


def _recurrent_cell(cell: Cell) -> Callable[..., Any]:
    def convert(
        by: FunctionProducts,
        x: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        gates = by.linear(x, w_ih, b_ih), by.linear(state[0], w_hh, b_hh)
        if any(part is NotImplemented for part in gates):
            return NotImplemented
        after = cell(*gates, state)
        return after[0] if isinstance(hx, Tensor) else after

    return convert


CONVERSIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot), _matmul),
    Tensor.__rmatmul__: _reversed_matmul,
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addmv), _addmm),
    **dict.fromkeys((Tensor.addmm, Tensor.baddbmm, Tensor.addmv), _addmm),
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
    torch.lstm_cell: _recurrent_cell(lstm_cell),
    torch.gru_cell: _recurrent_cell(gru_cell),
    torch.rnn_tanh_cell: _recurrent_cell(tanh_cell),
    torch.rnn_relu_cell: _recurrent_cell(relu_cell),
}
# What multiplies, whether it can be converted or not.
PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    (
        *CONVERSIONS,
        *(F.bilinear, F.multi_head_attention_forward, torch.tensordot, torch.inner, torch.chain_matmul),
        *(torch.addbmm, Tensor.addbmm, Tensor.inner, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
        *(torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention),
    )
)
FunctionProducts.functions = PRODUCTS


def multiply_adds(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Of a product that was left to torch, as far as its arguments tell."""
    given = [*args, *kwargs.values()]
    tensors = [t for arg in given for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)]
    if not tensors or not isinstance(output, (Tensor, tuple)):
        return 0
    if func is torch.einsum and isinstance(args[0], str):
        sizes: dict[str, int] = {}
        for labels, t in zip(
            args[0].split("->")[0].replace("...", "").replace(" ", "").split(","), tensors, strict=False
        ):
            sizes |= dict(zip(reversed(labels), reversed(t.shape), strict=False))
        return math.prod(sizes.values())
    if func in (F.conv1d, F.conv2d, F.conv3d) and isinstance(output, Tensor):
        return output.numel() * tensors[1][0].numel()
    if func in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
        return tensors[0].numel() * tensors[1][0].numel()
    if func is F.scaled_dot_product_attention and isinstance(output, Tensor):
        return (tensors[0].numel() + output.numel()) * tensors[1].shape[-2]
    if isinstance(output, tuple) or func in (F.bilinear, torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell):
        # Recurrences and fused attention: each weight once a row.
        rows = tensors[0].numel() // max(tensors[0].shape[-1], 1)
        return rows * sum(t.numel() for t in tensors if _is_weight(t) and t.dim() > 1)
    inner = tensors[-1 if func in (F.linear, Tensor.__rmatmul__) else -2]
    inner = tensors[0] if func is F.linear else inner
    return output.numel() * (inner.shape[-1] if inner.dim() else 1)
