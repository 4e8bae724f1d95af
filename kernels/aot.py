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
import time
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8repro.kernels.aot_cases import Case
from fp8repro.kernels.aot_translation import lstm_cases, sublayer_cases
from fp8repro.kernels.conv2d import device as convolutions
from fp8repro.kernels.conv2d import device_tma as tma_convolutions
from fp8repro.kernels.conv2d import launch as convolution_launch
from fp8repro.kernels.matmul import device as products
from fp8repro.kernels.matmul.launch import promoted_by_steps
from fp8repro.kernels.norm import device as normalizations
from fp8repro.kernels.norm import launch as norms
from fp8repro.kernels.optimizer import device as updates
from fp8repro.kernels.optimizer import launch as update
from fp8repro.kernels.pool import device as pooling
from fp8repro.kernels.pool import launch as pool
from fp8repro.kernels.quantize import device as rounding
from fp8repro.kernels.quantize import device_grouped as group_rounding
from fp8repro.kernels.quantize import grouped
from fp8repro.kernels.quantize import launch as quantize
from fp8repro.kernels.shared import codec, configs
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.kernels.shared.tiles import FP16_MMA, UNPROMOTED
from fp8repro.numerics.formats import E4M3, E5M2, FP16, FloatFormat
from fp8repro.numerics.rounding import IDENTITY, Rounding
from fp8repro.tabular import markdown

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


def _grouped_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Weights as a step rounds them: FP16 masters, addresses and streams in device memory."""
    types = {"table": "*i64", "seed0": "i32", "seed1": "i32"}
    for mode in ("nearest", "stochastic"):
        constants = {"X_TYPE": tl.float16, "ENCODING": codec.encoding(Rounding(E5M2, mode), capability)}
        constants["ALIGNED"] = True
        flat = {**constants, "CODE_TYPE": tl.uint8, "WHOLE": True, "BLOCK": grouped.BLOCK}
        for permuted in (False, True)[: 1 + (mode == "stochastic")]:
            name, options = f"quantize grouped e5m2 {mode}", {**flat, "PERMUTED": permuted}
            name += ", permuted" if permuted else ""
            chunks = {**types, "chunks": "*i64"}
            yield Case(name, group_rounding.round_group, chunks, options, values=grouped.BLOCK)
        rows, width = grouped.TILE
        tile = {**constants, "WHOLE_GROUPS": True, "PACKED": 4, "TILE_ROWS": rows, "TILE_COLUMNS": width}
        name, kernel = f"quantize grouped + transpose e5m2 {mode}", group_rounding.round_group_transposed
        yield Case(name, kernel, {**types, "tiles": "*i64"}, tile, values=rows * width)


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
    for name, split in (
        ("conv2d weight gradient, summed", plain),
        ("conv2d weight gradient, summed -> values", rounded),
    ):
        types = {"partial_ptr": "*fp32", "result_ptr": "*fp32", "count": "i32", "splits": "i32", **WORDS}
        constants = {**split, "BLOCK": convolution_launch.SUMMED}
        yield Case(name, convolutions.sum_splits, types, constants, group="norm", aligned=("count",))
    if generation in configs.TMA_TILES:
        yield from _tma_cases(generation, promoted, plain, configs.TMA_TILES, "")
        to_codes = configs.rounding_tiles(stochastic=True, codes=True)
        yield from _tma_cases(generation, promoted, rounded, to_codes, " -> codes stochastic")


def _tma_cases(
    generation: str,
    promoted: int,
    rounding: dict[str, Any],
    tiles: dict[str, tuple[configs.Tile, ...]],
    stored: str,
) -> Iterator[Case]:
    """Products whose operands TMA loads, in every tile; results are FP32, or `stored` as codes."""
    result = "*u8" if stored else "*fp32"
    results = {"c_ptr": result, "y_ptr": result, "partial_ptr": "*fp32", **(STREAM_IN_MEMORY if stored else {})}

    def case(
        name: str, kernel: Any, blocks: dict[str, list[int]], tile: configs.Tile, constants: dict[str, Any]
    ) -> Case:
        types = _integers(kernel, constants)
        types |= {argument: f"tensordesc<fp8e5{block}>" for argument, block in blocks.items()}
        types |= {name: kind for name, kind in results.items() if name in kernel.arg_names}
        types |= {"inverse_scale": "fp32"}
        aligned = ("channels", "outputs", "M", "N", "K")
        return Case(name, kernel, types, constants, tile.warps, tile.stages, 90, "product", aligned)

    nothing = {"bias_ptr": None}
    for tile in tiles[generation]:
        m, n, k = tile.m, tile.n, tile.k
        constants = {**nothing, **rounding, "ACCUMULATE": promoted, "SPLITS": 1, "BM": m, "BN": n, "BK": k, "HALVES": 1}
        constants |= {"GROUP": 8, "EVEN_K": True, "TMA": True, "WHOLE_GROUPS": True}
        blocks = {"a_ptr": [1, m, k], "b_ptr": [1, n, k]}
        yield case(f"matmul e5m2 x e5m2, TMA, {m} x {n}{stored}", products.multiply, blocks, tile, constants)
    gather = tma_convolutions.implicit_gemm_tma
    for tile in configs.TMA_CONVOLUTION_TILES[generation]:
        m, n, k = tile.m, tile.n, tile.k
        boxes = {"IMAGES": m // 16, "ROWS": 4, "COLUMNS": 4}
        code = promoted_by_steps(promoted)
        constants = {
            **nothing,
            **rounding,
            **boxes,
            "ACCUMULATE": code,
            "STEP": 1,
            "BN": n,
            "BK": k,
            "WHOLE_GROUPS": True,
        }
        blocks = {"x_desc": [m // 16, 4, 1, 4, k], "weight_desc": [n, 1, k]}
        name = f"conv2d forward and error, TMA, {m} x {n}"
        yield case(f"{name}{stored}", gather, blocks, tile, constants)
        yield case(f"{name}, stride 2{stored}", gather, blocks, tile, constants | {"STEP": 2})
    if stored:
        return
    tile = configs.Tile(128, 64, 64, 4, 3)
    boxes = {"IMAGES": 4, "ROWS": 4, "COLUMNS": 4}
    constants = {**boxes, "ACCUMULATE": FP16_MMA.value, "STEP": 1, "BM": tile.m, "BN": tile.n}
    blocks = {"error_desc": [4, 4, 4, tile.m], "x_desc": [4, 4, 1, 4, tile.n]}
    gradient = tma_convolutions.wgrad_tma
    yield case("conv2d weight gradient, TMA, fp16_mma", gradient, blocks, tile, constants)


def _update_cases(capability: tuple[int, int]) -> Iterator[Case]:
    table = {"table": "*i64", "chunks": "*i64", "terms_ptr": "*fp64"}
    types = {**table, "control_ptr": "*fp64", "numbers_ptr": "*fp64", "seed0": "i32", "seed1": "i32"}
    types |= {"master_streams": "*i64"}
    constants: dict[str, Any] = {"weight_streams": None, "NESTEROV": False, "HAS_MOMENTUM": True}
    constants |= {
        "MASTER_TYPE": tl.float16,
        "MASTER_ENCODING": codec.encoding(Rounding(FP16, "stochastic"), capability),
    }
    constants |= {"WEIGHT_ENCODING": codec.encoding(Rounding(E5M2), capability)}
    constants |= {"HAS_UPDATED": True, "ALIGNED": True, "BLOCK": update.BLOCK}
    for rule, name in enumerate(("sgd", "adam", "adamw")):
        for permuted in (False, True):
            specific = {"RULE": rule, "PERMUTED": permuted}
            layout = " permuted" if permuted else ""
            yield Case(f"update {name}{layout}", updates.update, types, constants | specific, group="update")
    constants |= {"WEIGHT_ENCODING": None, "HAS_UPDATED": False, "RULE": 0, "PERMUTED": False}
    for name, kind in (("FP16", tl.float16), ("FP32", tl.float32)):
        # As a run launches it.
        yield Case(
            f"update sgd, {name} alone", updates.update, types, constants | {"MASTER_TYPE": kind}, group="update"
        )
    constants = {"ALIGNED": True, "BLOCK": update.BLOCK}
    types = {**table, "partial_ptr": "*fp64"}
    yield Case("gradient norms", updates.gradient_norms, types, constants, group="update")
    types = {"partial_ptr": "*fp64", "count": "i32", "terms_ptr": "*fp64", "control_ptr": "*fp64"}
    constants = {"BLOCK": update.SUMS}
    yield Case("gradient control", updates.gradient_control, types, constants, update.SUM_WARPS, group="update")


def _norm_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """As a recipe launches them.

    FP32 in and out, with rounded results beside, or "codes": 8-bit tensors between layers, errors rounded to random
    bits; "residual": with the FP32 sum of a block.
    """
    rounded, stochastic, plain = (
        codec.encoding(how, capability) for how in (Rounding(E5M2), Rounding(E5M2, "stochastic"), IDENTITY)
    )

    def norm(name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4) -> Case:
        """All other pointers are of FP32."""
        special = dict.fromkeys(("codes_ptr", "flags_ptr", "kept_ptr"), "*u8") | {"batches_ptr": "*i64"} | pointers
        types = {}
        for argument in kernel.arg_names:
            if argument.islower() and argument not in constants:
                scalar = "fp32" if argument in ("eps", "momentum", "inverse_rows") else "i32"
                types[argument] = special.get(argument, "*fp32" if argument.endswith("_ptr") else scalar)
        values = 0 if kernel in (statistics, sums) else constants.get("ROWS", 0) * constants.get("BLOCK", 0)
        aligned = ("rows", "channels", "width")
        return Case(name, kernel, types, constants, warps, group="norm", aligned=aligned, values=values)

    apply, gradient = normalizations.batch_apply, normalizations.batch_gradient_apply
    # These have a loop, of which a program makes any number of turns.
    statistics, sums = normalizations.channel_statistics, normalizations.batch_gradient_sums
    part = {"ROWS": norms.SUMMED_ROWS, "BLOCK": norms.TILE_CHANNELS, "WHOLE": True}
    tile = {"ROWS": norms.TILE // norms.TILE_CHANNELS, "BLOCK": norms.TILE_CHANNELS, "WHOLE": True}
    x = {"x_ptr": "*fp8e5"}
    yield norm("batch norm statistics", statistics, {}, part)
    sizes = {"CHUNKS": norms.COMBINE_CHUNKS, "BLOCK": norms.COMBINE_BLOCK}
    for name, kernel in (
        ("batch norm statistics combined", normalizations.combine_statistics),
        ("batch norm gradient sums combined", normalizations.combine_gradient_sums),
    ):
        yield norm(name, kernel, {}, sizes, norms.COMBINE_WARPS)
    options: dict[str, Any] = {"ENCODING": rounded, "RELU": True, **tile}
    codes = {"KEPT": None, "kept_ptr": None}
    yield norm("batch norm apply", apply, {}, options | {"KEPT": rounded})
    yield norm("batch norm apply, codes", apply, x, options | codes | {"y_ptr": None, "residual_ptr": None})
    yield norm("batch norm apply, codes, residual", apply, x, options | codes)
    more = {"more_ptr": None}
    yield norm("batch norm gradient sums", sums, x, part | more)
    yield norm("batch norm gradient sums, codes", sums, x | {"grad_ptr": "*fp8e5"}, part | more)
    yield norm("batch norm gradient sums, codes, residual", sums, x | {"more_ptr": "*fp8e5"}, part)
    options = {"ENCODING": plain, "WHOLE_GROUPS": True, **tile}
    yield norm("batch norm gradient", gradient, x, options | more)
    options |= {"ENCODING": stochastic}
    x |= {"grad_x_ptr": "*u8", **STREAM_IN_MEMORY}
    absent = more | {"grad_residual_ptr": None}
    yield norm("batch norm gradient, codes", gradient, x | {"grad_ptr": "*fp8e5"}, options | absent)
    yield norm("batch norm gradient, codes, residual", gradient, x | {"more_ptr": "*fp8e5"}, options)
    yield norm("layer norm", normalizations.layer_forward, {}, {"ENCODING": rounded, "ROWS": 2, "BLOCK": 1024})
    yield norm("layer norm gradient", normalizations.layer_backward, {}, {"ROWS": 2, "BLOCK": 1024})


def _pool_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """The pooling of a ResNet's stem, whose result is rounded too."""
    options = pool.Window((3, 3), (2, 2), (1, 1)).options()
    shared = {**options, "ROWS": pool.ELEMENTS // pool.CHANNELS, "BLOCK": pool.CHANNELS, "WIDE": False}

    def case(name: str, kernel: Any, pointers: dict[str, str], **constants: Any) -> Case:
        types = pointers | dict.fromkeys((*pooling.SIZES, "channels"), "i32")
        return Case(name, kernel, types, shared | constants, 4, 3, 80, "pool", ("channels",), pool.ELEMENTS)

    outputs = {"y_ptr": "*fp32", "taps_ptr": "*u8", "codes_ptr": "*u8"}
    encoding = codec.encoding(Rounding(E5M2), capability)
    yield case("max pool", pooling.max_pool, {"x_ptr": "*fp32", **outputs}, ENCODING=encoding)
    pointers = {"grad_ptr": "*fp32", "taps_ptr": "*u8", "grad_x_ptr": "*fp32"}
    yield case("max pool gradient", pooling.max_pool_gradient, pointers)


def cases(capability: int) -> Iterator[Case]:
    """Every kernel, in the configurations that training launches."""
    version = (capability // 10, capability % 10)
    yield from _quantize_cases(version)
    yield from _grouped_cases(version)
    yield from _product_cases(version)
    yield from _update_cases(version)
    yield from _norm_cases(version)
    yield from lstm_cases(version)
    yield from sublayer_cases(version)
    yield from _pool_cases(version)


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
        Row of name, capability, registers, spilled bytes, shared bytes, counts of the instructions that matter, and
        seconds of compilation (next to none for what Triton's cache has).

    Raises:
        ValueError: the compute capability is under what the case needs.
    """
    if capability < case.minimum:
        raise ValueError(f"{case.name}: got sm_{capability}, expected sm_{case.minimum} or later")
    source = ASTSource(case.kernel, *_arguments(case))
    options = {"num_warps": case.warps, "num_stages": case.stages}
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - start
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
        "seconds": seconds,
        "values_a_thread": case.values // (32 * case.warps),
        "satfinite": len(re.findall(r"cvt[.\w]*satfinite", ptx)),
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[.\w:]*", ptx))),
        "fp32_adds": len(re.findall(r"\badd(?:\.rn)?\.f32(?:x2)?", ptx)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown. Instructions a value are those of element-wise kernels, with what is executed once."""
    head = ("kernel", "sm", "registers", "spilled bytes", "shared bytes", "instructions a value", "seconds")
    keys = ("name", "capability", "registers", "spilled", "shared")
    lines = []
    for row in rows:
        values = row["values_a_thread"]
        a_value = f"{row['instructions'] / values:.1f}" if values else ""
        lines.append((*(str(row[key]) for key in keys), a_value, f"{row['seconds']:.1f}", ", ".join(row["products"])))
    return markdown((*head, "tensor-core instructions"), lines)


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
    # What the cache has would tell no time.
    triton.knobs.compilation.always_compile = not arguments.json
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
