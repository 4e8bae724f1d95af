"""Counts what a translation model's step launches on an H100, kernels of ours and torch's; no GPU takes part.

    env -u TRITON_INTERPRET python tests/kernels/translation_launches.py transformer gnmt

The forward and the backward pass run on the meta device. Prints the numbers as JSON, those of each model: of each
kernel of ours, of each of torch's operators, and how many of the former round weights.
"""

import json
import sys
from collections import Counter

import h100
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fp8repro.models.gnmt import gnmt
from fp8repro.models.transformer import transformer
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.precision.site import Site
from fp8repro.settings.recipes import load_recipe

# The paper's depth; batches of 128 sentences.
MODELS = {"transformer": (transformer, {}, 32), "gnmt": (gnmt, {"layers": 8}, 50)}
VOCABULARY, BATCH = 32_000, 128
# Operators that start nothing on a GPU: they make views, or memory.
FREE = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "set_", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts torch's operators that launch kernels."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).split(".")[1]
        if name not in FREE:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


def launches(name):
    """Launches of one step, by kernel and by operator, and those that round weights."""
    kernels, weights = Counter(), 0
    build, size, length = MODELS[name]
    h100.pretend_an_h100(lambda kernel, *arguments, **options: kernels.update([kernel.fn.__name__]))
    round_weight = Site.weight

    def counted(*arguments):
        nonlocal weights
        before = kernels.total()
        operand = round_weight(*arguments)
        weights += kernels.total() - before
        return operand

    Site.weight = counted
    try:
        with torch.device("meta"):
            model = build(VOCABULARY, **size)
            source, target = (torch.empty(BATCH, length, dtype=torch.long) for _ in range(2))
        inject(model, load_recipe("fp8"), StepContext(seed=1), "triton")
        model.fp8_context.begin(0)
        with Operators() as operators:
            F.cross_entropy(model(source, target).flatten(0, 1), target.flatten()).backward()
    finally:
        Site.weight = round_weight
    return {"kernels": dict(kernels), "operators": dict(operators.found), "weights": weights}


if __name__ == "__main__":
    print(json.dumps({name: launches(name) for name in sys.argv[1:]}))
