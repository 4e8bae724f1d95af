"""`fp8repro bench step`: one whole training step (forward, backward, update) of each recipe beside FP32.

Translation models translate a batch, too, and our Transformer's FP32 step stands beside fairseq's where that is
installed. Writes results/cpu/step_<model>.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.bench.cpu import DEFAULT_OUT, ForeignLoad, interleaved_medians, relaunch_pinned, report, rows
from fp8repro.engines.cpu.malloc import keep_freed_memory
from fp8repro.models.fairseq_model import fairseq_transformer
from fp8repro.models.gnmt import gnmt
from fp8repro.models.resnet import make_resnet
from fp8repro.models.transformer import transformer
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks.decode import beam_search

# Largest time of an FP8 step relative to FP32: with BF16 instructions, and with FP32 products.
BARS = {"resnet18": (0.80, 1.05), "transformer": (0.75, 1.08), "gnmt": (0.80, 1.10)}
VOCABULARY = 2048
PAD, EOS = 1, 2
# Sentences and their tokens.
BATCHES = {"transformer": (16, 64), "gnmt": (32, 24)}
SIZES: dict[str, dict[str, Any]] = {
    "transformer": {"encoder_layers": 4, "decoder_layers": 4, "width": 256, "ffn_width": 1024, "heads": 4},
    "gnmt": {"layers": 4, "width": 512},
}
MAKERS: dict[str, Callable[..., nn.Module]] = {
    "transformer": transformer,
    "gnmt": gnmt,
    "fairseq_transformer": fairseq_transformer,
}
FAIRSEQ = "fairseq's fp32"
SHAPES = {
    "resnet18": "32x32, batch 32, channels_last",
    "transformer": "width 256, 4+4 layers, 64 tokens, batch 16",
    "gnmt": "width 512, 4 layers, 24 tokens, batch 32",
}


def _batch(model: str) -> tuple[Tensor, ...]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    if model == "resnet18":
        x = torch.randn(32, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(10, (32,), generator=generator)
    source, target = (torch.randint(3, VOCABULARY, BATCHES[model], generator=generator) for _ in range(2))
    return source, target, target.roll(-1, 1)


def _model(model: str, maker: str = "") -> nn.Module:
    torch.manual_seed(0)
    if model == "resnet18":
        return make_resnet("resnet18", 10, image_size=32).to(memory_format=torch.channels_last)
    return MAKERS[maker or model](VOCABULARY, PAD, EOS, **SIZES[model])


def target_tokens(model: str) -> int | None:
    """Target tokens of the batch; None for images."""
    if model not in BATCHES:
        return None
    sentences, length = BATCHES[model]
    return sentences * length


def training_step(
    model: str, precision: str, backend: str = "auto", maker: str = "", fused: bool | None = None
) -> Callable[[], object]:
    """A function that trains a fresh model for one step on one fixed batch.

    Args:
        model: a key of `BARS`.
        precision: the recipe.
        backend: see `inject`.
        maker: another model of the same size.
        fused: torch's choice of the optimizer's implementation.
    """
    recipe = load_recipe(precision)
    network = _model(model, maker)
    inject(network, recipe, backend=backend)
    if model == "resnet18":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=fused
        )
    else:
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=fused)
    masters = MasterWeights(network, optimizer, recipe)
    *inputs, target = _batch(model)
    scale = 1.0 if precision in ("fp32", "bf16") else 1024.0
    steps = 0

    def step() -> None:
        nonlocal steps
        context: Any = network.fp8_context
        context.begin(steps)
        steps += 1
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast == "bf16"):
            logits = network(*inputs)
        loss = F.cross_entropy(logits.float().flatten(0, -2), target.flatten())
        (loss * scale).backward()
        masters.step(scale)

    return step


def decoding(model: str, precision: str) -> Callable[[], object]:
    """A function that translates the batch by beam search of 4, every sentence to the batch's length."""
    network: Any = _model(model)
    inject(network, load_recipe(precision))
    network.eval()
    # Untrained weights end no sentence by themselves, so all of them go to the limit.
    config = DecodeConfig(beam=4, alpha=1.0, max_length_a=0.0, max_length_b=BATCHES[model][1])
    source = _batch(model)[0]
    return lambda: beam_search(network, source, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code."""
    parser = argparse.ArgumentParser(prog="fp8repro bench step", description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet18", help=f"one of {', '.join(BARS)} (also model=NAME)")
    parser.add_argument("--precisions", default="fp8", help="recipes beside fp32, separated by commas")
    parser.add_argument("--repeats", type=int, default=15, help="measured steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    options = parser.parse_args(arguments)
    model = options.model.removeprefix("model=")
    if model not in BARS:
        parser.error(f"model: got {model!r}, expected one of {', '.join(BARS)}")
    code = relaunch_pinned("fp8repro.bench.step", list(arguments or []))
    if code is not None:
        return code
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    work = {"fp32": training_step(model, "fp32")}
    # Masters are always updated in one pass; how much of the difference that is, this row tells.
    work["fp32, optimizer fused"] = training_step(model, "fp32", fused=True)
    for precision in options.precisions.split(","):
        work[precision] = training_step(model, precision)
        work[f"{precision}, backend=emulate"] = training_step(model, precision, "emulate")
    fast, slow = BARS[model]
    bars = {"fp8": fast, "fp8, backend=emulate": slow}
    if model == "transformer" and find_spec("fairseq"):
        work[FAIRSEQ] = training_step(model, "fp32", maker="fairseq_transformer")
    with ForeignLoad() as foreign:
        medians = interleaved_medians(work, options.repeats)
        theirs = {name: medians.pop(name) for name in (FAIRSEQ,) if name in medians}
        measured = rows(f"{model}, {SHAPES[model]}", medians, "fp32", bars, target_tokens(model))
        if theirs:
            both = {"fp32": medians["fp32"], **theirs}
            measured += rows("the same, against fairseq", both, FAIRSEQ, {"fp32": 1.0}, target_tokens(model))
        if model in BATCHES:
            decode = {precision: decoding(model, precision) for precision in ("fp32", "fp8")}
            medians = interleaved_medians(decode, max(1, options.repeats // 3))
            measured += rows(f"{model}, beam 4, same batch", medians, "fp32", None, target_tokens(model))
    report(f"Training step of {model}", measured, foreign.cores, f"step_{model}", options.out)
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
