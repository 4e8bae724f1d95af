"""What `aot` compiles of the kernels between the products of translation models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8repro.kernels.aot_cases import Case
from fp8repro.kernels.attention import device as sublayers
from fp8repro.kernels.attention import launch as sublayer
from fp8repro.kernels.attention import launch_sums as sums
from fp8repro.kernels.lstm import device as recurrences
from fp8repro.kernels.lstm import launch as recurrence
from fp8repro.kernels.shared import codec, configs
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import IDENTITY, Rounding


def lstm_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """As the paper's recipe launches them: gates kept in E5M2, errors and gradients rounded stochastically."""
    nearest = codec.encoding(Rounding(E5M2), capability)
    stochastic = codec.encoding(Rounding(E5M2, "stochastic"), capability)
    bytes_of = ("codes_ptr", "transposed_ptr", "kept_inputs_ptr", "kept_product_ptr")
    tile: dict[str, Any] = {"WHOLE_GROUPS": True, "ROWS": recurrence.CELL_ROWS, "BLOCK": recurrence.CELL_COLUMNS}

    def lstm(name: str, kernel: Any, fp8: tuple[str, ...] = (), **constants: Any) -> Case:
        types = {}
        for argument in kernel.arg_names:
            if argument.islower() and argument not in constants:
                pointer = "*fp8e5" if argument in fp8 else "*u8" if argument in bytes_of else "*fp32"
                pointer = "*i32" if argument == "streams_ptr" else pointer
                types[argument] = pointer if argument.endswith("_ptr") else "i32"
        aligned = ("width", "rows", "pitch", "grad_pitch", "M", "N", "error_pitch", "x_pitch")
        types |= {name: "i32" for name in ("M", "N") if name in kernel.arg_names}
        warps, stages = recurrence.GRADIENT_TILE.warps, recurrence.GRADIENT_TILE.stages
        return Case(name, kernel, types, constants, warps, stages, group="lstm", aligned=aligned)

    kept: dict[str, Any] = {"KEPT_INPUTS": nearest, "KEPT_PRODUCT": nearest}
    yield lstm("lstm cell", recurrences.cell_forward, ENCODING=nearest, **kept, **tile)
    yield lstm("lstm cell, random bits", recurrences.cell_forward, ENCODING=stochastic, **kept, **tile)
    codes: dict[str, Any] = {"RECURRENT": stochastic, "ENCODING": stochastic}
    yield lstm("lstm cell gradient", recurrences.cell_backward, ("inputs_ptr", "product_ptr"), **codes, **tile)
    sizes = recurrence.GRADIENT_TILE
    blocks: dict[str, Any] = {"BM": sizes.m, "BN": sizes.n, "BK": sizes.k, "WHOLE_GROUPS": True}
    promoted = configs.accumulation("promoted", capability)
    operands = ("error_ptr", "x_ptr")
    yield lstm(
        "lstm weight gradient",
        recurrences.summed_gradient,
        operands,
        ENCODING=stochastic,
        ACCUMULATE=promoted,
        **blocks,
    )


def sublayer_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """As the paper's recipe launches them in the base Transformer."""
    nearest = codec.encoding(Rounding(E5M2), capability)
    stochastic = codec.encoding(Rounding(E5M2, "stochastic"), capability)
    plain = codec.encoding(IDENTITY, capability)
    bytes_of = ("codes_ptr", "turned_ptr", "kept_ptr", "codes", "turned")
    floats = ("eps", "scale")

    def case(
        name: str,
        kernel: Any,
        fp8: tuple[str, ...] = (),
        warps: int = 4,
        changes: dict[str, str] | None = None,
        **constants: Any,
    ) -> Case:
        types: dict[str, Any] = {}
        for argument in (a for a in kernel.arg_names if a not in constants):
            if argument.endswith("_ptr"):
                types[argument] = "*fp8e5" if argument in fp8 else "*u8" if argument in bytes_of else "*fp32"
            elif argument in ("xs", "codes", "turned"):
                types[argument] = ("*u8" if argument in bytes_of else "*fp32",) * constants["COUNT"]
            elif argument.startswith("layout"):
                types[argument] = ("i32",) * 14
            else:
                types[argument] = "fp32" if argument in floats else "i32"
        aligned = ("columns", "rows", "width", "M", "N", "summed", "count", "pitch", "turned_pitch")
        layouts = ("layout0", "layout1", "layout2")
        types |= changes or {}
        return Case(name, kernel, types, constants, warps, group="sublayer", aligned=(*aligned, *layouts))

    tile: dict[str, Any] = {"ROWS": sublayer.TILE_ROWS, "BLOCK": sublayer.TILE_COLUMNS, "GROUPS": True}
    three: dict[str, Any] = {"COUNT": 3, "RELU": False, "mask_ptr": None, "X_GROUPS": True, **tile}
    yield case("heads rounded", sublayers.reround, FIRST=plain, ENCODING=nearest, **three)
    yield case("heads rounded twice", sublayers.reround, FIRST=stochastic, ENCODING=stochastic, **three)
    one: dict[str, Any] = {"COUNT": 1, "RELU": False, "layout1": 0, "layout2": 0, "X_GROUPS": True, **tile}
    both: dict[str, Any] = {"FIRST": stochastic, "ENCODING": stochastic}
    yield case("hidden error rounded twice", sublayers.reround, ("mask_ptr",), **both, **one)
    for columns in (64, 1024):
        rows: dict[str, Any] = {"ROWS": min(sublayer.TILE_ROWS, 4096 // columns), "BLOCK": columns}
        name = f"softmax of {columns}"
        yield case(name, sublayers.softmax_forward, ENCODING=nearest, KEPT=nearest, **rows)
        yield case(f"{name} gradient", sublayers.softmax_backward, ("scores_ptr",), **both, **rows, GROUPS=True)
    sizes: dict[str, Any] = {"BM": sums.GRADIENT_ROWS, "BN": sums.GRADIENT_COLUMNS, "BK": sums.GRADIENT_STEP}
    options: dict[str, Any] = {"ENCODING": stochastic, "WHOLE_GROUPS": True, **sizes}
    yield case("weight gradients finished", sublayers.finish_gradients, ("turned_ptr",), **options)
    name = "weight gradients finished, streams in memory"
    in_memory = dict.fromkeys(sublayers.THREE_STREAMS, "*i32")
    yield case(name, sublayers.finish_gradients, ("turned_ptr",), changes=in_memory, **options)
    yield case("input errors added", sublayers.sum_rounded, ENCODING=stochastic, BLOCK=sums.FLAT_BLOCK)
    forward, backward = sublayers.residual_norm_forward, sublayers.residual_norm_backward
    for width in (512, 1024):
        rows = {"BLOCK": width, "DROPOUT": True, "WHOLE_GROUPS": True}
        height, less = sublayer.ROW_ELEMENTS // width, sublayer.ROW_GRADIENTS // width
        yield case(f"residual norm of {width}", forward, (), 8, ENCODING=nearest, ROWS=height, **rows)
        yield case(f"residual norm of {width} gradient", backward, (), 8, ENCODING=stochastic, ROWS=less, **rows)
