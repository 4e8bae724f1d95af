"""Compiles every kernel for a GPU that need not be present, and reports registers, spills and shared memory.

`python -m fp8repro.kernels.aot 90` prints the table for sm_90. Launches nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8repro.kernels.attention import device as sublayers
from fp8repro.kernels.attention import launch as sublayer
from fp8repro.kernels.attention import launch_sums as sums
from fp8repro.kernels.conv2d import device as convolutions
from fp8repro.kernels.conv2d import device_tma as tma_convolutions
from fp8repro.kernels.lstm import device as recurrences
from fp8repro.kernels.lstm import launch as recurrence
from fp8repro.kernels.matmul import device as products
from fp8repro.kernels.matmul.launch import promoted_by_steps
from fp8repro.kernels.norm import device as normalizations
from fp8repro.kernels.norm import launch as norms
from fp8repro.kernels.optimizer import device as updates
from fp8repro.kernels.optimizer import launch as update
from fp8repro.kernels.quantize import device as rounding
from fp8repro.kernels.quantize import launch as quantize
from fp8repro.kernels.shared import codec, configs
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.kernels.shared.tiles import FP16_MMA, UNPROMOTED
from fp8repro.numerics.formats import E4M3, E5M2, FP16, FloatFormat
from fp8repro.numerics.rounding import IDENTITY, Rounding
from fp8repro.tabular import markdown


@dataclass
class Case:
    """One kernel with the types of its arguments and the values of its compile-time ones.

    Of an argument that is a tuple the type is a tuple of types. One element has the name "argument.field" (or
    "argument.0"), among constants and among those that are aligned, where "argument" stands for all of them.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    minimum: int = 80  # least compute capability
    group: str = "quantize"
    aligned: tuple[str, ...] = field(default=())  # integer arguments that are multiples of 16
    values: int = 0  # how many a program of a quantizer rounds


WORDS = dict.fromkeys(codec.RANDOM_WORDS, "i32")
STREAM_IN_MEMORY = {"stream0": "*i32", "stream1": "*i32"}


def _quantize_cases(capability: tuple[int, int]) -> Iterator[Case]:
    flat = {"x_ptr": "*fp32", "codes_ptr": "*u8", "count": "i32", **WORDS}
    nothing = ("values_ptr", "codes_ptr", "stats_ptr")

    def options(format: FloatFormat, mode: str) -> dict[str, Any]:
        return {"ENCODING": codec.encoding(Rounding(format, mode), capability)}

    def flat_case(
        name: str, format: FloatFormat, mode: str, types: dict[str, str] = flat, whole: bool = True, **more: Any
    ) -> Case:
        block = quantize.FLAT_BLOCK if whole else quantize.FLAT_BLOCK // 2
        absent = {argument: None for argument in nothing if argument not in types}
        constants = {**absent, **options(format, mode), "BLOCK": block}
        aligned = ("count",) if whole else ()
        return Case(name, rounding.round_flat, types, constants, aligned=aligned, values=block)

    for format in (E5M2, E4M3):
        for mode in ("nearest", "stochastic"):
            yield flat_case(f"quantize {format.name} {mode}", format, mode)
    yield flat_case("quantize e5m2 stochastic, odd count", E5M2, "stochastic", whole=False)
    in_memory = {**flat, **STREAM_IN_MEMORY}
    yield flat_case("quantize e5m2 stochastic, stream in memory", E5M2, "stochastic", in_memory)
    yield flat_case("quantize e5m2, stream in memory, odd count", E5M2, "stochastic", in_memory, whole=False)
    counted = {**flat, "x_ptr": "*i16", "values_ptr": "*i16", "stats_ptr": "*fp64"}
    yield flat_case("quantize bf16 e5m2 stochastic, values, statistics", E5M2, "stochastic", counted)
    values = {"values_ptr": "*fp32", **{k: v for k, v in flat.items() if k != "codes_ptr"}}
    yield flat_case("quantize e5m2 stochastic, values", E5M2, "stochastic", values)
    yield flat_case("quantize fp16 stochastic", FP16, "stochastic", {**flat, "codes_ptr": "*i16"})
    integers = dict.fromkeys(("columns", "rows", "outer_stride", "row_stride"), "i32")
    columns = {"x_ptr": "*fp32", "codes_ptr": "*u8", **integers, **WORDS}
    absent = {"values_ptr": None, "stats_ptr": None}
    constants = {**absent, **options(E5M2, "stochastic"), "GROUPS": 4, "BLOCK": 128}
    aligned = ("columns", "outer_stride", "row_stride")
    name, values_of = "quantize columns e5m2 stochastic", 4 * quantize.PER_CALL * 128
    yield Case(name, rounding.round_columns, columns, constants, aligned=aligned, values=values_of)
    types = {"x_ptr": "*fp32", "codes_ptr": "*u8", "transposed_ptr": "*i32", "rows": "i32", "columns": "i32"}
    types = {**types, "x_stride": "i32", **WORDS}
    rows, width = quantize.TILE_ROWS, quantize.TILE_COLUMNS
    tile = {"stats_ptr": None, "WHOLE_GROUPS": True, "PACKED": 4, "ROWS": rows, "COLUMNS": width}
    aligned = ("rows", "columns", "x_stride")
    for mode in ("nearest", "stochastic"):
        name, constants = f"quantize + transpose e5m2 {mode}", {**options(E5M2, mode), **tile}
        yield Case(name, rounding.round_transpose, types, constants, aligned=aligned, values=rows * width)


def _integers(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """32-bit integers, and tuples of them, for all arguments of a product's kernel that are no constants."""
    positions = convolutions.Positions(*["i32"] * len(convolutions.Positions._fields))
    groups = {"positions": positions, "a_strides": ("i32",) * 3, "b_strides": ("i32",) * 3}
    return {name: groups.get(name, "i32") for name in kernel.arg_names if name not in constants}


def _product_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Products as `configs.choose` picks their tiles; the small one rounds its results.

    "values": results rounded to E5M2 in FP32 tensors, as a recipe's layers give them.
    """
    generation = configs.generation(capability)
    table = configs.TILES[generation]
    large, little = (t for t in table if t.halves == 1)
    promoted = configs.accumulation("promoted", capability)
    plain = {"ENCODING": codec.encoding(IDENTITY, capability)}
    rounded = {"ENCODING": codec.encoding(Rounding(E5M2, "stochastic"), capability)}
    pointers = {"a_ptr": "*fp8e5", "b_ptr": "*fp8e5", "c_ptr": "*fp32", "inverse_scale": "fp32"}
    aligned = ("M", "N", "K", "chunk", "a_strides", "b_strides")

    def product(name: str, tile: configs.Tile, accumulate: int, layout: str, **changes: str) -> Case:
        types = {**pointers, **changes}
        options = rounded if "values" in name else plain
        constants: dict[str, Any] = {
            **options,
            "ACCUMULATE": accumulate,
            "SPLITS": 1,
            "GROUP": 8,
            "EVEN_K": True,
            "TMA": False,
            "WHOLE_GROUPS": True,
        }
        constants |= {"bias_ptr": None, "BM": tile.m, "BN": tile.n, "BK": tile.k, "HALVES": tile.halves}
        # "N": row-major; "T": transposed.
        constants |= {"a_strides.2" if layout[0] == "N" else "a_strides.1": 1}
        constants |= {"b_strides.2" if layout[1] == "N" else "b_strides.1": 1}
        kernel, minimum = products.multiply, 89 if "e4m3" in name else 80
        types = _integers(kernel, constants) | types
        return Case(name, kernel, types, constants, tile.warps, tile.stages, minimum, "product", aligned)

    if table[0].halves == 2:
        for layout in ("NT", "NN", "TN"):
            yield product(f"matmul e5m2 x e5m2 {layout} two halves", table[0], promoted, layout)
    yield product("matmul e5m2 x e5m2 NT", large, promoted, "NT")
    yield product("matmul e5m2 x e5m2 NT small", little, promoted, "NT")
    yield product("matmul e5m2 x e5m2 NN", large, promoted, "NN")
    yield product("matmul e5m2 x e5m2 TN", large, promoted, "TN")
    yield product("matmul e4m3 x e5m2 NT", large, promoted, "NT", a_ptr="*fp8e4nv")
    yield product("matmul e4m3 x e4m3 NT", large, promoted, "NT", a_ptr="*fp8e4nv", b_ptr="*fp8e4nv")
    yield product("matmul e5m2 x e5m2 NT -> values stochastic", little, promoted, "NT")
    yield product("matmul e5m2 x e5m2 NT -> values, stream in memory", little, promoted, "NT", **STREAM_IN_MEMORY)
    yield product("matmul e5m2 x e5m2 NT fp16_mma", large, FP16_MMA.value, "NT")
    yield product("matmul e5m2 x e5m2 NT unpromoted", large, UNPROMOTED.value, "NT")

    def convolution(name: str, kernel: Any, tile: configs.Tile, pointers: dict[str, str]) -> Case:
        constants: dict[str, Any] = {"ACCUMULATE": promoted, "BM": tile.m, "BN": tile.n, "BK": tile.k}
        if kernel is convolutions.implicit_gemm:
            options = rounded if "values" in name else plain
            constants |= {**options, "GROUP": 8, "WHOLE_GROUPS": True, "bias_ptr": None}
        else:
            constants["SPLITS"] = 8
        types = {**_integers(kernel, constants), **pointers, "inverse_scale": "fp32"}
        aligned = ("channels", "outputs", "weight_row")
        return Case(name, kernel, types, constants, tile.warps, tile.stages, 80, "product", aligned)

    gathered = {"x_ptr": "*fp8e5", "weight_ptr": "*fp8e5"}
    for label, tile in (("", large), (" small", little), (" -> values", little)):
        name = f"conv2d forward and error{label}"
        yield convolution(name, convolutions.implicit_gemm, tile, {**gathered, "y_ptr": "*fp32"})
    summed = {"error_ptr": "*fp8e5", "x_ptr": "*fp8e5", "partial_ptr": "*fp32"}
    for label, tile in (("", large), (" small", little)):
        yield convolution(f"conv2d weight gradient{label}", convolutions.wgrad, tile, summed)
    if generation in configs.TMA_TILES:
        yield from _tma_cases(generation, promoted, plain)


def _tma_cases(generation: str, promoted: int, plain: dict[str, Any]) -> Iterator[Case]:
    """Products whose operands TMA loads, in every tile; results are FP32."""

    def case(
        name: str, kernel: Any, blocks: dict[str, list[int]], result: str, tile: configs.Tile, constants: dict[str, Any]
    ) -> Case:
        types = _integers(kernel, constants)
        types |= {argument: f"tensordesc<fp8e5{block}>" for argument, block in blocks.items()}
        types |= {result: "*fp32", "inverse_scale": "fp32"}
        aligned = ("channels", "outputs", "M", "N", "K")
        return Case(name, kernel, types, constants, tile.warps, tile.stages, 90, "product", aligned)

    nothing = {"bias_ptr": None}
    for tile in configs.TMA_TILES[generation]:
        m, n, k = tile.m, tile.n, tile.k
        constants = {**nothing, **plain, "ACCUMULATE": promoted, "SPLITS": 1, "BM": m, "BN": n, "BK": k, "HALVES": 1}
        constants |= {"GROUP": 8, "EVEN_K": True, "TMA": True, "WHOLE_GROUPS": True}
        blocks = {"a_ptr": [1, m, k], "b_ptr": [1, n, k]}
        yield case(f"matmul e5m2 x e5m2, TMA, {m} x {n}", products.multiply, blocks, "c_ptr", tile, constants)
    gather = tma_convolutions.implicit_gemm_tma
    for tile in configs.TMA_CONVOLUTION_TILES[generation]:
        m, n, k = tile.m, tile.n, tile.k
        boxes = {"IMAGES": m // 16, "ROWS": 4, "COLUMNS": 4}
        code = promoted_by_steps(promoted)
        constants = {**nothing, **plain, **boxes, "ACCUMULATE": code, "STEP": 1, "BN": n, "BK": k, "WHOLE_GROUPS": True}
        blocks = {"x_desc": [m // 16, 4, 1, 4, k], "weight_desc": [n, 1, k]}
        name = f"conv2d forward and error, TMA, {m} x {n}"
        yield case(name, gather, blocks, "y_ptr", tile, constants)
        yield case(f"{name}, stride 2", gather, blocks, "y_ptr", tile, constants | {"STEP": 2})
    tile = configs.Tile(128, 64, 64, 4, 3)
    boxes = {"IMAGES": 4, "ROWS": 4, "COLUMNS": 4}
    constants = {**boxes, "ACCUMULATE": FP16_MMA.value, "STEP": 1, "BM": tile.m, "BN": tile.n}
    blocks = {"error_desc": [4, 4, 4, tile.m], "x_desc": [4, 4, 1, 4, tile.n]}
    gradient = tma_convolutions.wgrad_tma
    yield case("conv2d weight gradient, TMA, fp16_mma", gradient, blocks, "partial_ptr", tile, constants)


def _update_cases(capability: tuple[int, int]) -> Iterator[Case]:
    pointers = {"table": "*i64", "chunks": "*i64", "control_ptr": "*fp64"}
    numbers = updates.Numbers(*["fp32"] * len(updates.Numbers._fields))
    types = {**pointers, "inverse_scale": "fp32", "numbers": numbers, "seed0": "i32", "seed1": "i32"}
    constants: dict[str, Any] = {"NESTEROV": False, "HAS_MOMENTUM": True, "FIRST": False, "MASTER_TYPE": tl.float16}
    constants |= {"MASTER_ENCODING": codec.encoding(Rounding(FP16, "stochastic"), capability)}
    constants |= {"WEIGHT_ENCODING": codec.encoding(Rounding(E5M2), capability)}
    constants |= {"HAS_UPDATED": True, "ALIGNED": True, "BLOCK": update.BLOCK}
    for rule, name in enumerate(("sgd", "adam", "adamw")):
        for permuted in (False, True):
            specific = {"RULE": rule, "PERMUTED": permuted}
            layout = " permuted" if permuted else ""
            yield Case(f"update {name}{layout}", updates.update, types, constants | specific, group="update")
    types = {"table": "*i64", "chunks": "*i64", "partial_ptr": "*fp64", "inverse_scale": "fp32"}
    constants = {"ALIGNED": True, "BLOCK": update.BLOCK}
    yield Case("gradient norms", updates.gradient_norms, types, constants, group="update")


def _norm_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """As a recipe launches them: FP32 in and out, rounded results beside; backward reads the kept FP8 input."""
    rounded = codec.encoding(Rounding(E5M2), capability)
    codes = ("codes_ptr", "flags_ptr", "kept_ptr")

    def norm(name: str, kernel: Any, fp8: tuple[str, ...] = (), warps: int = 4, **constants: Any) -> Case:
        types = {}
        for argument in kernel.arg_names:
            if argument.islower() and argument not in constants:
                pointer = "*fp8e5" if argument in fp8 else "*u8" if argument in codes else "*fp32"
                pointer = "*i64" if argument == "batches_ptr" else pointer
                scalar = "fp32" if argument in ("eps", "momentum", "inverse_rows") else "i32"
                types[argument] = pointer if argument.endswith("_ptr") else scalar
        return Case(name, kernel, types, constants, warps, group="norm", aligned=("channels", "count", "width"))

    apply, block = normalizations.batch_apply, norms.FLAT_BLOCK
    x = ("x_ptr",)
    yield norm("batch norm statistics", normalizations.channel_statistics, ROWS=32, BLOCK=64)
    kernels = (normalizations.combine_statistics, normalizations.combine_gradient_sums)
    for name, kernel in zip(("statistics", "gradient sums"), kernels, strict=True):
        sizes = {"CHUNKS": norms.COMBINE_CHUNKS, "BLOCK": norms.COMBINE_BLOCK}
        yield norm(f"batch norm {name} combined", kernel, (), norms.COMBINE_WARPS, **sizes)
    yield norm("batch norm apply", apply, ENCODING=rounded, KEPT=rounded, RELU=True, BLOCK=block, WIDE=False)
    yield norm("batch norm gradient sums", normalizations.batch_gradient_sums, x, WHOLE_BYTES=True, ROWS=32, BLOCK=64)
    yield norm("batch norm gradient", normalizations.batch_gradient_apply, x, BLOCK=block, WIDE=False)
    yield norm("layer norm", normalizations.layer_forward, ENCODING=rounded, ROWS=2, BLOCK=1024)
    yield norm("layer norm gradient", normalizations.layer_backward, ROWS=2, BLOCK=1024)


def _lstm_cases(capability: tuple[int, int]) -> Iterator[Case]:
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


def _sublayer_cases(capability: tuple[int, int]) -> Iterator[Case]:
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


def cases(capability: int) -> Iterator[Case]:
    """Every kernel, in the configurations that training launches."""
    version = (capability // 10, capability % 10)
    yield from _quantize_cases(version)
    yield from _product_cases(version)
    yield from _update_cases(version)
    yield from _norm_cases(version)
    yield from _lstm_cases(version)
    yield from _sublayer_cases(version)


def _arguments(case: Case) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignments as the compiler wants them: by position, and position in a tuple."""
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {name: value for name, value in case.constants.items() if "." not in name}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def add(path: tuple[int, ...], name: str, kind: str) -> str:
        if len(path) > 1 and name in case.constants:
            constants[path] = case.constants[name]
            return "constexpr"
        if kind.startswith("*") or name in case.aligned or name.split(".")[0] in case.aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for position, name in enumerate(case.kernel.arg_names):
        kind = case.types.get(name, "constexpr")
        if isinstance(kind, str):
            types[name] = add((position,), name, kind)
            continue
        fields = getattr(kind, "_fields", range(len(kind)))
        kinds = [add((position, i), f"{name}.{field}", kind[i]) for i, field in enumerate(fields)]
        types[name] = type(kind)(*kinds) if hasattr(kind, "_fields") else tuple(kinds)
    return types, constants, attributes


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Compile one case.

    Returns:
        Row of name, capability, registers, spilled bytes, shared bytes, and counts of the instructions that matter.

    Raises:
        ValueError: the compute capability is under what the case needs.
    """
    if capability < case.minimum:
        raise ValueError(f"{case.name}: got sm_{capability}, expected sm_{case.minimum} or later")
    source = ASTSource(case.kernel, *_arguments(case))
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, code = (
            subprocess.run([tool, option, cubin.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    # No kernel has arrays in local memory, so the stack frame is spills.
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    return {
        "name": case.name,
        "group": case.group,
        "capability": capability,
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        # Padding at the end is never executed.
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)", code, re.MULTILINE)) - 1,
        "values_a_thread": case.values // (32 * case.warps),
        "satfinite": len(re.findall(r"cvt[.\w]*satfinite", ptx)),
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[.\w:]*", ptx))),
        "fp32_adds": len(re.findall(r"\badd(?:\.rn)?\.f32(?:x2)?", ptx)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("kernel", "sm", "registers", "spilled bytes", "shared bytes", "tensor-core instructions")
    keys = ("name", "capability", "registers", "spilled", "shared")
    return markdown(head, ((*(str(row[key]) for key in keys), ", ".join(row["products"])) for row in rows))


def main() -> int:
    """Entry point of `python -m fp8repro.kernels.aot`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", type=int, nargs="+", help="80, 89, 90, 100, ...")
    parser.add_argument("--only", nargs="*", default=[""], help="compile the cases whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args()
    if INTERPRETED:
        print("TRITON_INTERPRET: is set, expected unset to compile", file=sys.stderr)
        return 2
    rows = [
        compile_case(case, capability)
        for capability in arguments.capabilities
        for case in cases(capability)
        if any(part in case.name for part in arguments.only) and capability >= case.minimum
    ]
    print(json.dumps(rows) if arguments.json else f"Compiled by Triton {triton.__version__}.\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
