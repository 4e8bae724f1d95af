"""Where an FP8 step's time goes on a CPU: `python scripts/step_profile.py transformer [--backend auto] [--out FILE]`.

Prints, as Markdown, the roundings of a step by kind, with what they would take at the quantizer's own best speed, the
products if not FP32 ones (with the roundings of results that they make on the way), and what the step's Python takes:
the same layers on two tokens or pixels, where there is nothing to compute.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp8repro.bench import step as bench
from fp8repro.bench.cpu import PINNING, interleaved_medians
from fp8repro.engines.cpu import bf16_products as bf16
from fp8repro.engines.cpu import native
from fp8repro.engines.cpu.malloc import keep_freed_memory
from fp8repro.engines.select import select_backend
from fp8repro.numerics.formats import E5M2
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.tabular import markdown
from fp8repro.training.environment import describe_environment

STEPS = 8
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"encoder_layers": 4, "decoder_layers": 4, "width": 16, "ffn_width": 16, "heads": 4},
    "gnmt": {"layers": 4, "width": 16},
}


def best_speeds() -> dict[str, float]:
    """Nanoseconds a value of the quantizer by rounding: 10^6 FP32 values in cache to FP32 values, in place."""
    x = torch.randn(10**6)

    def call(rounding: str) -> Callable[[], object]:
        return lambda: native.round_into(x, Rounding(E5M2, rounding), RandomBits(1, 2), x, None, None)

    medians = interleaved_medians({rounding: call(rounding) for rounding in ("nearest", "stochastic")}, 200)
    # Once rounded, the values stay as they are: what a rounding takes does not depend on them.
    return medians


def roundings(step: Callable[[], object]) -> dict[tuple[str, str, str], list[float]]:
    """(format, rounding, outputs) -> calls, values and seconds of one step."""
    kinds: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    real = native.round_unchecked

    def timed(x: Any, how: Rounding, bits: RandomBits, values: Any, codes: Any, *rest: Any, add: bool = False) -> None:
        start = time.perf_counter()
        real(x, how, bits, values, codes, *rest, add=add)
        seconds = time.perf_counter() - start
        outputs = [] if values is None else ["in place" if values is x else "added" if add else "values"]
        entry = kinds[how.format.name, how.rounding, " and ".join(outputs + ([] if codes is None else ["codes"]))]
        for index, amount in enumerate((1, x.numel(), seconds)):
            entry[index] += amount / STEPS

    native.round_unchecked = timed
    try:
        for _ in range(STEPS):
            step()
    finally:
        native.round_unchecked = real
    return kinds


PRODUCTS = ("gemm", "pack_right", "convolve", "pack_weight", "convolution_gradient")


def products(step: Callable[[], object]) -> dict[str, list[float]]:
    """Function of products.cpp -> calls and seconds of one step; empty where products are FP32 ones."""
    engine, spent = bf16.library(), {name: [0.0, 0.0] for name in PRODUCTS}
    if engine is None:
        return {}
    real = {name: getattr(engine, f"fp8repro_{name}") for name in PRODUCTS}

    def timed(name: str) -> Callable[..., object]:
        def call(*arguments: Any) -> None:
            start = time.perf_counter()
            real[name](*arguments)
            spent[name][0] += 1 / STEPS
            spent[name][1] += (time.perf_counter() - start) / STEPS

        return call

    try:
        for name in PRODUCTS:
            setattr(engine, f"fp8repro_{name}", timed(name))
        for _ in range(STEPS):
            step()
    finally:
        for name, function in real.items():
            setattr(engine, f"fp8repro_{name}", function)
    return {name: entry for name, entry in spent.items() if entry[0]}


def python_ms(model: str, backend: str) -> dict[str, float]:
    """Milliseconds of a step with nothing to compute."""
    sizes, batches, vocabulary = bench.SIZES[model], bench.BATCHES[model], bench.VOCABULARY
    bench.SIZES[model], bench.BATCHES[model], bench.VOCABULARY = SMALL[model], (1, 2), 16
    try:
        work = {name: bench.training_step(model, name, backend) for name in ("fp32", "fp8")}
        return interleaved_medians(work, 20)
    finally:
        bench.SIZES[model], bench.BATCHES[model], bench.VOCABULARY = sizes, batches, vocabulary


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=tuple(bench.BARS))
    parser.add_argument("--backend", choices=("emulate", "auto"), default="emulate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file that receives the table, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model, backend = options.model, options.backend
    name = select_backend(backend, torch.device("cpu"), "promoted")[0].name
    work = {"fp32": bench.training_step(model, "fp32"), "fp8": bench.training_step(model, "fp8", backend)}
    medians = interleaved_medians(work, 10)
    kinds, speeds = roundings(work["fp8"]), best_speeds()
    lines = [
        f"# Where the time of {model}'s FP8 step goes, products by {name}",
        "",
        f"FP32 step {medians['fp32']:.0f} ms, FP8 step {medians['fp8']:.0f} ms, {options.threads} threads, "
        f"{describe_environment()['cpu']}, torch {torch.__version__}. "
        f"`scripts/step_profile.py {model} --backend {backend}`.",
        "",
    ]
    cells: list[tuple[str, ...]] = []
    totals = [0.0, 0.0, 0.0, 0.0]
    for (fmt, rounding, outputs), (calls, values, seconds) in sorted(kinds.items(), key=lambda item: -item[1][2]):
        best = values * speeds[rounding] / 1e6
        row = (calls, values / 1e6, seconds * 1e3, best)
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        cells.append((fmt, rounding, outputs, f"{calls:.0f}", *(f"{figure:.1f}" for figure in row[1:])))
    cells.append(("all", "", "", f"{totals[0]:.0f}", *(f"{total:.1f}" for total in totals[1:])))
    header = ("format", "rounding", "outputs", "calls", "10^6 values", "ms", "ms at the quantizer's best speed")
    lines.append(markdown(header, cells))
    if multiplied := products(work["fp8"]):
        cells = [(name, f"{calls:.0f}", f"{seconds * 1e3:.1f}") for name, (calls, seconds) in multiplied.items()]
        cells.append(("all", "", f"{sum(seconds for _, seconds in multiplied.values()) * 1e3:.1f}"))
        lines += ["", markdown(("products", "calls", "ms"), cells)]
    if model in SMALL:
        python = python_ms(model, backend)
        lines += ["", f"With nothing to compute, FP32 takes {python['fp32']:.1f} ms, FP8 {python['fp8']:.1f} ms."]
    page = "\n".join(lines) + "\n"
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in PINNING.items()):
        # The runtime of the threads reads its settings when it is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PINNING})
    main()
