"""Which type of layer becomes which under a recipe; layers of one's own are added here."""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fp8repro.errors import UserError
from fp8repro.models.parts import MatMul, RepeatedLinear
from fp8repro.precision.convolutions import CONVOLUTIONS
from fp8repro.precision.function_products import FP8MatMul
from fp8repro.precision.layers import FP8Linear, FP8RepeatedLinear
from fp8repro.precision.multihead_attention import FP8MultiheadAttention
from fp8repro.precision.recurrent import FP8GRU, FP8LSTM, FP8RNN

_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FP8Linear,
    # What `nn.MultiheadAttention` calls its output's projection; it differs from Linear in name only.
    NonDynamicallyQuantizableLinear: FP8Linear,
    RepeatedLinear: FP8RepeatedLinear,
    **CONVOLUTIONS,
    MatMul: FP8MatMul,
    nn.LSTM: FP8LSTM,
    nn.GRU: FP8GRU,
    nn.RNN: FP8RNN,
    nn.MultiheadAttention: FP8MultiheadAttention,
}
# Of packages that need not be there: (their module, its class) -> (our module, its class).
_FOREIGN = {("transformers.pytorch_utils", "Conv1D"): ("fp8repro.precision.transformers_layers", "FP8Conv1D")}


def register_layer(kind: type[nn.Module], converted: type[nn.Module]) -> None:
    """Let `inject` convert layers of a type of one's own.

    Args:
        kind: the type; subclasses of it are not converted.
        converted: a subclass of `kind`. `inject` gives its instances the attribute `site` (`Site`), the layer's place
            in the recipe, and then calls their `prepare()` where there is one. Its forward pass multiplies by
            `quantized_product(x, weight, bias, self.site, LINEAR, self.training)` of `fp8repro.precision.functional`,
            or by modules that `prepare` makes: `WeightProduct`, `ConvolutionProduct` and `FP8Attention` of
            `fp8repro.precision.function_products`, each with `self.site.part(name)`. With a method
            `multiply_adds(inputs, output)` the report counts its products.

    Raises:
        UserError: the second is no subclass of the first, or the first is converted already.
    """
    if not (isinstance(converted, type) and isinstance(kind, type) and issubclass(converted, kind)):
        raise UserError(f"register_layer: got {converted!r}, expected a subclass of {kind!r}")
    if converted_type(kind) is not None:
        raise UserError(f"register_layer: got {kind.__name__}, which is converted to {converted_type(kind)} already")
    _CONVERTED[kind] = converted


def converted_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    """What a layer of exactly that type becomes; None where nothing is known for it."""
    known = _CONVERTED.get(kind)
    place = _FOREIGN.get((kind.__module__, kind.__name__))
    if known is None and place is not None and kind.__module__ in sys.modules:
        known = getattr(import_module(place[0]), place[1])
    return known
