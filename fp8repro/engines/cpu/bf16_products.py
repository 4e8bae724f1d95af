"""FP8 products on CPUs with BF16 instructions: exact operands, FP32 accumulation and results.

Other operands (16 bit, FP32) take the FP32 products of the base class. Nothing here may round unless it is told how.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.cpu import build
from fp8repro.engines.cpu.native import format_address
from fp8repro.engines.guards import address, plain
from fp8repro.engines.products import Conv2dGeometry, EmulateBackend, Operand
from fp8repro.engines.quantizer import round_into
from fp8repro.numerics.formats import FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding

# What products.cpp needs: BF16 dot products, and byte permutations to decode.
INSTRUCTIONS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16"})
# Matrix tiles; the operating system may still refuse them.
TILE_INSTRUCTIONS = frozenset({"amx_tile", "amx_bf16"})
_PANEL_COLUMNS = 64
_BLOCK_PAIRS = 16
_MOST_TAPS = 1024
# Multiplications under which a second thread costs more than it saves.
_GRAIN = 1 << 17


def available() -> bool:
    """True when this CPU multiplies BF16 faster than FP32 and the engine is compiled; the first call compiles it."""
    found = library()
    # Intel's cores take twice an FP32 multiply-add's time for the dot product (measured on Emerald Rapids: 40 and 82
    # billion multiplications a second), so only their tiles gain; AMD's take the same time for twice the terms.
    return found is not None and (found.tiles or _cpu()["vendor_id"] != ["GenuineIntel"])


@functools.cache
def library() -> Any:
    """The compiled products, or None; `tiles` says whether they run in matrix tiles."""
    if INSTRUCTIONS - set(_cpu()["flags"]):
        return None
    found = build.load("products")
    if found is not None:
        pointer, int32, uint64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64
        found.fp8repro_use_blocks.argtypes = [int32]
        found.fp8repro_pack_right.argtypes = [pointer] * 4 + [int32]
        found.fp8repro_gemm.argtypes = [pointer] * 9 + [uint64, uint64, int32, int32]
        found.fp8repro_pack_weight.argtypes = [pointer, pointer, pointer, int32, pointer, int32]
        found.fp8repro_convolve.argtypes = [pointer] * 7 + [uint64, uint64, int32]
        found.fp8repro_convolution_gradient.argtypes = [pointer] * 6 + [int32]
        _use_tiles(found, True)
    return found


def use_tiles(wanted: bool) -> None:
    """Multiply in matrix tiles (AMX) from now on where CPU and system grant them, or no longer; they are the default.

    Weights that were packed before must not be multiplied after.
    """
    _use_tiles(library(), wanted)


def _use_tiles(found: Any, wanted: bool) -> None:
    exist = not TILE_INSTRUCTIONS - set(_cpu()["flags"])
    found.tiles = bool(found.fp8repro_use_blocks(int(wanted and exist)))


@functools.cache
def _cpu() -> dict[str, list[str]]:
    """Vendor and instruction sets, as Linux reports them."""
    fields: dict[str, list[str]] = {"vendor_id": [], "flags": []}
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return fields
    return fields | {name.strip(): words.split() for name, _, words in (line.partition(":") for line in lines)}


class Bf16Backend(EmulateBackend):
    """Products of FP8 bytes through BF16 dot products; see `products.Backend`."""

    def __init__(
        self, how: Rounding | None = None, bits: RandomBits = RandomBits(), total: Tensor | None = None
    ) -> None:
        """As the CPU has it now (see `use_tiles`); `how`, `bits`: see `rounding`; `total`: see `adding`."""
        self.how, self.bits, self.total = how, bits, total
        # Tiles add in another order than dot products, so records tell them apart.
        self.name = "emulate-amx" if library().tiles else "emulate-bf16"

    def rounding(self, how: Rounding, bits: RandomBits, codes: bool = False) -> Bf16Backend | None:
        """Products round a block while the cache has it, gradients of convolutions in a pass behind; to values only."""
        return None if codes else Bf16Backend(how, bits)

    def adding(self, total: Tensor) -> Bf16Backend:
        """The same, and rounded results are added to a contiguous FP32 tensor, which then is the result."""
        return Bf16Backend(self.how, self.bits, total)

    def value_dtype(self, fmt: FloatFormat) -> torch.dtype | None:
        """None for 8-bit formats: their bytes are all that is needed."""
        return None if fmt.is_fp8 else super().value_dtype(fmt)

    def linear(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(x, weight) and _pair(x.codes, weight.codes.t()) and _adds(bias, weight.codes)):
            return self._rounded(super().linear(x, weight, bias))
        result = self._gemm(x, x.codes.flatten(0, -2), weight, weight.codes.t(), bias, keep=True)
        return result.view(*x.codes.shape[:-1], result.shape[-1])

    def linear_error(self, error: Operand, weight: Operand) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, weight) and _pair(error.codes, weight.codes)):
            return self._rounded(super().linear_error(error, weight))
        result = self._gemm(error, error.codes.flatten(0, -2), weight, weight.codes, keep=True)
        return result.view(*error.codes.shape[:-1], result.shape[-1])

    def linear_gradient(self, error: Operand, x: Operand) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, x) and _rows(error.codes) == _rows(x.codes)):
            return self._rounded(super().linear_gradient(error, x))
        return self._gemm(error, error.codes.flatten(0, -2).t(), x, x.codes.flatten(0, -2))

    def matmul(self, a: Operand, b: Operand) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(a, b) and _pair(a.codes, b.codes, True)):
            return self._rounded(super().matmul(a, b))
        return self._gemm(a, a.codes, b, b.codes)

    def matmul_error_a(self, error: Operand, b: Operand) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, b) and _pair(error.codes, b.codes.transpose(-1, -2), True)):
            return self._rounded(super().matmul_error_a(error, b))
        return self._gemm(error, error.codes, b, b.codes.transpose(-1, -2))

    def matmul_error_b(self, error: Operand, a: Operand) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, a) and _pair(a.codes.transpose(-1, -2), error.codes, True)):
            return self._rounded(super().matmul_error_b(error, a))
        return self._gemm(a, a.codes.transpose(-1, -2), error, error.codes)

    def conv2d(self, x: Operand, weight: Operand, bias: Tensor | None, geometry: Conv2dGeometry) -> Tensor:
        """See `Backend`."""
        fits = _multiplies(x, weight) and _convolves(x.codes, weight, geometry, forward=True)
        if not (fits and _adds(bias, weight.codes)):
            return self._rounded(super().conv2d(x, weight, bias, geometry))
        convolution = _forward(geometry, tuple(x.codes.shape), tuple(weight.codes.shape))
        result = _channels_last_empty(convolution.shape)
        return self._convolve(convolution, x, weight, bias, result)

    def conv2d_error(self, error: Operand, weight: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, weight) and _convolves(error.codes, weight, geometry, forward=False)):
            return self._rounded(super().conv2d_error(error, weight, geometry, like))
        convolution = _backward(geometry, tuple(error.codes.shape), tuple(weight.codes.shape), tuple(like.shape))
        result = _empty(like)
        if not convolution.complete:
            result.zero_()
        return _like(self._convolve(convolution, error, weight, None, result), like)

    def conv2d_gradient(self, error: Operand, x: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `Backend`."""
        if not (_multiplies(error, x) and error.codes.dim() == x.codes.dim() == 4):
            return self._rounded(super().conv2d_gradient(error, x, geometry, like))
        source, target = _channels_last(x.codes), _channels_last(error.codes)
        shapes = (source.shape[0], geometry.groups, *source.shape[2:], source.shape[1], *target.shape[2:])
        steps = (*geometry.stride, *geometry.padding, *geometry.dilation)
        sizes = (*shapes, target.shape[1], *like.shape[2:], *steps)
        result = _empty(like)
        library().fp8repro_convolution_gradient(
            _longs(sizes),
            address(source),
            _decoder(source.dtype),
            address(target),
            _decoder(target.dtype),
            address(result),
            torch.get_num_threads(),
        )
        return self._rounded(_like(_unscaled(result, error, x), like))

    def _rounded(self, result: Tensor) -> Tensor:
        """A result that no kernel has rounded, rounded in place."""
        if self.how is None:
            return result
        round_into(result, self.how, self.bits, values=result)
        return result if self.total is None else self.total.add_(result)

    def _gemm(
        self,
        a: Operand,
        a_codes: Tensor,
        b: Operand,
        b_codes: Tensor,
        bias: Tensor | None = None,
        keep: bool = False,
    ) -> Tensor:
        """The product of two batches of matrices, given as views of the operands' codes; `keep`: b comes again."""
        columns = b_codes.shape[-1]
        scaled = a.scale is not None or b.scale is not None
        # A scale is divided out, and a bias added, before a result is rounded.
        how = None if scaled else self.how
        total = None if how is None else self.total
        shape = (*a_codes.shape[:-1], columns)
        result = torch.empty(shape, dtype=torch.float32, device="cpu") if total is None else total
        a_codes, b_codes = _walkable(a_codes), _walkable(b_codes)
        sizes = _gemm_sizes(tuple(a_codes.shape), a_codes.stride(), tuple(b_codes.shape), b_codes.stride())
        threads = torch.get_num_threads() if result.numel() * a_codes.shape[-1] > _GRAIN else 1
        panels = _panels(sizes, b, b_codes, threads) if keep else None
        library().fp8repro_gemm(
            sizes,
            address(a_codes),
            _decoder(a_codes.dtype),
            None if panels is not None else address(b_codes),
            _decoder(b_codes.dtype),
            None if panels is None else address(panels),
            None if bias is None or scaled else address(bias),
            address(result),
            *_rounding(how, self.bits),
            total is not None,
            threads,
        )
        return self._rounded(_unscaled(result, a, b, bias)) if scaled else result

    def _convolve(
        self, convolution: _Convolution, source: Operand, weight: Operand, bias: Tensor | None, result: Tensor
    ) -> Tensor:
        """The convolution, into `result`, which is channels_last."""
        codes = _channels_last(source.codes)
        threads = torch.get_num_threads()
        scaled = source.scale is not None or weight.scale is not None
        how = None if scaled or self.total is not None else self.how
        panels = _convolution_panels(convolution, weight, threads)
        library().fp8repro_convolve(
            convolution.sizes,
            address(codes),
            _decoder(codes.dtype),
            address(panels),
            None if bias is None or scaled else address(bias),
            address(result),
            *_rounding(how, self.bits),
            threads,
        )
        if scaled:
            _unscaled(result, source, weight, None if bias is None else bias.view(-1, 1, 1))
        return result if how is not None else self._rounded(result)


def _rounding(how: Rounding | None, bits: RandomBits) -> tuple[int | None, int, int]:
    """What a kernel is told of how to round: the format's address, seed and stream."""
    if how is None:
        return None, 0, 0
    assert isinstance(bits.stream, int)
    return format_address(how), bits.seed, bits.stream


def _multiplies(a: Operand, b: Operand) -> bool:
    """Whether the engine can read both; torch's FP32 products take the rest, and what is traced."""
    return plain(a.codes, b.codes) and _holds_bytes(a) and _holds_bytes(b)


def _holds_bytes(o: Operand) -> bool:
    codes = o.codes
    return o.fmt.is_fp8 and codes.dtype == o.fmt.dtype and codes.is_cpu and codes.numel() > 0


def _pair(a: Tensor, b: Tensor, batched: bool = False) -> bool:
    """Whether shapes fit for a product; torch finds the words where they do not."""
    fits = a.dim() > 1 and b.dim() > 1 and a.shape[-1] == b.shape[-2]
    return fits and a.shape[:-2] == b.shape[:-2] if batched else fits


def _rows(codes: Tensor) -> int:
    return codes.numel() // codes.shape[-1]


def _adds(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether the engine reads the bias: a number for each output, one behind the other."""
    if bias is None:
        return True
    fits = bias.dtype == torch.float32 and bias.shape == weight.shape[:1] and bias.is_contiguous()
    return fits and bias.is_cpu and plain(bias)


def _unscaled(result: Tensor, a: Operand, b: Operand, bias: Tensor | None = None) -> Tensor:
    """Divide out the operands' scales, powers of two, then add the bias."""
    scale = (a.scale or 1.0) * (b.scale or 1.0)
    if scale != 1.0:
        result.div_(scale)
    return result if bias is None else result.add_(bias)


def _longs(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@functools.cache
def _decoder(dtype: torch.dtype) -> Any:
    """BF16 bits of the 128 magnitudes of an FP8 format."""
    bits = torch.arange(128, dtype=torch.uint8, device="cpu").view(dtype).to(torch.bfloat16).view(torch.int16)
    return (ctypes.c_int16 * 128)(*bits.tolist())


# ---- Matrix products ----


def _panels(sizes: Any, b: Operand, codes: Tensor, threads: int) -> Tensor:
    """The right operand as the kernel reads it; kept with the operand."""
    panels = b.packed.get(codes.stride())
    if panels is None:
        # Whole blocks, which matrix tiles take.
        pairs = -(-codes.shape[0] // (2 * _BLOCK_PAIRS)) * _BLOCK_PAIRS
        groups = -(-codes.shape[1] // _PANEL_COLUMNS)
        panels = torch.empty(pairs * groups * _PANEL_COLUMNS, dtype=torch.int32, device="cpu")
        library().fp8repro_pack_right(sizes, address(codes), _decoder(codes.dtype), address(panels), threads)
        b.packed[codes.stride()] = panels
    return panels


def _walkable(codes: Tensor) -> Tensor:
    """The same matrices with rows or columns contiguous, and at most two batch dimensions."""
    if codes.dim() > 4:
        codes = codes.flatten(0, -3)
    return codes if _orientation(tuple(codes.shape), codes.stride()) else codes.contiguous()


def _orientation(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Distances between rows and columns, one of them 1; None where neither is."""
    if strides[-1] == 1 or shape[-1] == 1:
        return strides[-2], 1
    return (1, strides[-1]) if strides[-2] == 1 or shape[-2] == 1 else None


@functools.lru_cache(maxsize=4096)
def _gemm_sizes(a: tuple[int, ...], a_strides: tuple[int, ...], b: tuple[int, ...], b_strides: tuple[int, ...]) -> Any:
    """Mirrors `Gemm` in products.cpp."""
    lead = (1,) * (4 - len(a)) + a[:-2]
    batch = [(0,) * (4 - len(s)) + s[:-2] for s in (a_strides, b_strides)]
    a_steps, b_steps = _orientation(a, a_strides), _orientation(b, b_strides)
    assert a_steps is not None
    assert b_steps is not None
    return _longs((*lead, a[-2], b[-1], a[-1], *batch[0], *a_steps, *batch[1], *b_steps))


# ---- Convolutions ----


class _Convolution:
    """Arguments of `fp8repro_convolve`, which mirror `Convolution` in products.cpp, and what they mean here.

    Attributes:
        shape: of the result.
        complete: every pixel of the result has terms.
        backward: the terms run over the weight's outputs.
    """

    def __init__(self, sizes: tuple[int, ...], phases: list[tuple[int, ...]], backward: bool) -> None:
        self.sizes = _longs((*sizes, len(phases), *(value for phase in phases for value in phase)))
        images, groups, _, _, source_channels, height, width, channels, taps = sizes
        self.shape = (images, channels, height, width)
        self.complete = all(phase[8] > 0 for phase in phases)
        self.backward = backward
        panels = groups * -(-(channels // groups) // _PANEL_COLUMNS)
        self.packed_size = panels * taps * (source_channels // groups // 2) * _PANEL_COLUMNS


def _convolves(codes: Tensor, weight: Operand, geometry: Conv2dGeometry, forward: bool) -> bool:
    """Whether shapes fit, channels come in pairs, and the kernel has a size that the engine expects."""
    if codes.dim() != 4 or weight.codes.dim() != 4:
        return False
    outputs, inputs, *kernel = weight.codes.shape
    terms = inputs * geometry.groups if forward else outputs
    if forward:
        reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(geometry.dilation, kernel, geometry.padding, strict=True)]
        fits = all(size >= least for size, least in zip(codes.shape[2:], reach, strict=True))
    else:
        fits = True
    fits = fits and codes.shape[1] == terms and outputs % geometry.groups == 0
    return fits and terms // geometry.groups % 2 == 0 and kernel[0] * kernel[1] <= _MOST_TAPS


def _convolution_panels(convolution: _Convolution, weight: Operand, threads: int) -> Tensor:
    """The weight as the kernel reads it; kept with the operand."""
    key = ("convolution", convolution.backward)
    panels = weight.packed.get(key)
    if panels is None:
        panels = torch.empty(convolution.packed_size, dtype=torch.int32, device="cpu")
        codes = _channels_last(weight.codes)
        library().fp8repro_pack_weight(
            convolution.sizes,
            address(codes),
            _decoder(codes.dtype),
            int(convolution.backward),
            address(panels),
            threads,
        )
        weight.packed[key] = panels
    return panels


@functools.lru_cache(maxsize=4096)
def _forward(geometry: Conv2dGeometry, x: tuple[int, ...], weight: tuple[int, ...]) -> _Convolution:
    """One phase: output pixel i takes source pixel i * stride + tap * dilation - padding."""
    g = geometry
    kernel = weight[2:]
    out = [(x[2 + k] + 2 * g.padding[k] - g.dilation[k] * (kernel[k] - 1) - 1) // g.stride[k] + 1 for k in range(2)]
    taps = [
        (r * g.dilation[0] - g.padding[0], s * g.dilation[1] - g.padding[1], r * kernel[1] + s)
        for r in range(kernel[0])
        for s in range(kernel[1])
    ]
    phase = (0, 0, 1, 1, *out, *g.stride, len(taps), *(value for tap in taps for value in tap))
    return _Convolution((x[0], g.groups, *x[2:], x[1], *out, weight[0], len(taps)), [phase], backward=False)


@functools.lru_cache(maxsize=4096)
def _backward(
    geometry: Conv2dGeometry, error: tuple[int, ...], weight: tuple[int, ...], x: tuple[int, ...]
) -> _Convolution:
    """One phase per residue of the stride: input pixel stride * i + start takes error pixel i + shift, per tap."""
    g = geometry
    kernel = weight[2:]

    def shifts(k: int, start: int) -> list[tuple[int, int]]:
        """(shift, kernel index) of the taps that reach the pixels of this residue."""
        moved = ((start + g.padding[k] - r * g.dilation[k], r) for r in range(kernel[k]))
        return [(distance // g.stride[k], r) for distance, r in moved if distance % g.stride[k] == 0]

    phases = []
    for y in range(min(g.stride[0], x[2])):
        for z in range(min(g.stride[1], x[3])):
            count = (-(-(x[2] - y) // g.stride[0]), -(-(x[3] - z) // g.stride[1]))
            taps = [(dy, dx, r * kernel[1] + s) for dy, r in shifts(0, y) for dx, s in shifts(1, z)]
            flat = (value for tap in taps for value in tap)
            phases.append((y, z, *g.stride, *count, 1, 1, len(taps), *flat))
    sizes = (x[0], g.groups, *error[2:], error[1], *x[2:], x[1], kernel[0] * kernel[1])
    return _Convolution(sizes, phases, backward=True)


def _channels_last(codes: Tensor) -> Tensor:
    return codes.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor) -> Tensor:
    """An FP32 tensor of that shape in channels_last, with the strides of `like` where it is that already."""
    if like.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(like, dtype=torch.float32)
    return _channels_last_empty(like.shape)


def _channels_last_empty(shape: tuple[int, ...]) -> Tensor:
    # By name: what torch makes by default is the caller's to change.
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _like(result: Tensor, like: Tensor) -> Tensor:
    """`result`, dense in channels_last, in the layout of `like`."""
    return result if like.is_contiguous(memory_format=torch.channels_last) else result.contiguous()
