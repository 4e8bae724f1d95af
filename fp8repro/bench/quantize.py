"""`fp8repro bench quantize`: the quantizer beside a plain copy, torch's own conversion and QPyTorch where installed.

Writes results/cpu/quantize.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fp8repro.bench.cpu import DEFAULT_OUT, ForeignLoad, Row, interleaved_medians, relaunch_pinned, report, rows
from fp8repro.engines.cpu.malloc import keep_freed_memory
from fp8repro.engines.quantizer import quantize, round_into
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding

PUBLIC = "quantize(x)"
# Largest time relative to `copy_`, by number of values.
BARS = {
    10**6: {"nearest": 1.0, "stochastic": 1.3, PUBLIC: 1.3, f"{PUBLIC}, stochastic": 1.8},
    16 * 10**6: {"nearest": 1.0, "stochastic": 1.0, PUBLIC: 1.0, f"{PUBLIC}, stochastic": 1.3},
}
# A hundredth of QPyTorch's time, as a ratio to it.
PEER_BAR = 0.01


Work = Callable[[], object]


def work(x: Tensor) -> dict[str, Work]:
    """What is measured on FP32 values `x`; outputs are allocated beforehand, but those of `quantize` and of torch."""
    copy, values = torch.empty_like(x), torch.empty_like(x)
    codes = torch.empty_like(x, dtype=E5M2.dtype)
    stats = torch.zeros(4, dtype=torch.float64)

    def ours(rounding: str, values: Tensor | None, codes: Tensor | None, stats: Tensor | None = None) -> Work:
        how = Rounding(E5M2, rounding)
        return lambda: round_into(x, how, RandomBits(1, 2), values=values, codes=codes, stats=stats)

    found: dict[str, Work] = {"copy_": lambda: copy.copy_(x)}
    for rounding in ("nearest", "stochastic"):
        found[rounding] = ours(rounding, values, None)
        found[f"{rounding}, FP8 out"] = ours(rounding, None, codes)
        found[f"{rounding}, with statistics"] = ours(rounding, values, None, stats)
    # As people call it: checked, and with a result of its own.
    found[PUBLIC] = lambda: quantize(x)
    found[f"{PUBLIC}, stochastic"] = lambda: quantize(x, rounding="stochastic", seed=1, stream=2)
    found["x.to(float8_e5m2).float()"] = lambda: x.to(E5M2.dtype).float()
    return found


def peer_rows(x: Tensor, repeats: int) -> list[Row]:
    """Ours relative to QPyTorch; nothing where it is not installed.

    QPyTorch's call leaves caches cold and our second thread asleep, which costs the call after it as much again. So
    ours stands twice: right after QPyTorch, and called again.
    """
    if find_spec("qtorch") is None:
        return []
    from qtorch.quant import float_quantize

    measured = []
    values = torch.empty_like(x)
    for rounding in ("nearest", "stochastic"):

        def ours(how: Rounding = Rounding(E5M2, rounding)) -> None:
            round_into(x, how, RandomBits(1, 2), values=values)

        def theirs(rounding: str = rounding) -> object:
            return float_quantize(x, exp=5, man=2, rounding=rounding)

        medians = interleaved_medians({"QPyTorch": theirs, "ours": ours, "ours, again": ours}, repeats)
        bars = {"ours": PEER_BAR, "ours, again": PEER_BAR} if rounding == "stochastic" else {}
        measured += rows(f"{x.numel():,} values, {rounding}", medians, "QPyTorch", bars)
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code."""
    parser = argparse.ArgumentParser(prog="fp8repro bench quantize", description=__doc__)
    parser.add_argument("--repeats", type=int, default=200, help="measured calls of each at 10^6 values")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    options = parser.parse_args(arguments)
    code = relaunch_pinned("fp8repro.bench.quantize", list(arguments or []))
    if code is not None:
        return code
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    measured: list[Row] = []
    with ForeignLoad() as foreign:
        for count, bars in BARS.items():
            x = torch.randn(count, generator=torch.Generator().manual_seed(0))
            repeats = max(5, options.repeats * 10**6 // count)
            medians = interleaved_medians(work(x), repeats)
            measured += rows(f"{count:,} FP32 values to E5M2", medians, "copy_", bars)
        measured += peer_rows(torch.randn(10**6), max(5, options.repeats // 20))
    report("Quantizing FP32 to E5M2", measured, foreign.cores, "quantize", options.out)
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
