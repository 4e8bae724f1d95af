"""Counts what a training step of a model takes on an H100, as a run replays it; no GPU takes part.

    env -u TRITON_INTERPRET python tests/kernels/step_counts.py resnet18|resnet50|transformer|gnmt fp8 [--no-codes]
    env -u TRITON_INTERPRET python tests/kernels/step_counts.py page > results/gpu/step.md

The step runs on the meta device. Prints as JSON: the kernels that Triton compiles for it ("variants"), launches and
bytes of Triton's kernels and of torch's operators in each part of the step, and, of a ResNet, the bytes of activations
that are saved for the backward pass, in the recipe and in BF16. `--no-codes`: with FP32 tensors between a ResNet's
layers. The page has tables of all.
"""

import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8repro.kernels.listing import Gpu, HostReadsZeros, pretend
from fp8repro.models.gnmt import gnmt
from fp8repro.models.resnet import make_resnet
from fp8repro.models.transformer import transformer
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights
from fp8repro.settings.recipes import load_recipe
from fp8repro.tabular import markdown
from fp8repro.training import warm_steps

# Convolutions and matrix products, whose operands FP8 halves anyway.
PRODUCTS = {"implicit_gemm", "implicit_gemm_tma", "multiply", "wgrad", "wgrad_tma"}
BATCH, SIDE, CLASSES = 256, 224, 1000
# The paper's depth, and the length of sentences.
TRANSLATION = {"transformer": (transformer, {}, 32), "gnmt": (gnmt, {"layers": 8}, 50)}
VOCABULARY, SENTENCES = 32_000, 128
# Operators that start nothing on a device.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}


def size(t):
    """Bytes of a tensor."""
    return t.numel() * t.element_size()


class Operators(TorchDispatchMode):
    """Counts torch's operators that launch a kernel or a copy, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in FREE:
            self.launches[name] += 1
            tensors = [t for t in tree_leaves((arguments, options, result)) if isinstance(t, torch.Tensor)]
            self.bytes[name] += sum(map(size, tensors))
        return result


def made(name):
    """A model, its inputs and labels, without data."""
    with torch.device("meta"):
        if name in TRANSLATION:
            build, depth, length = TRANSLATION[name]
            source, target = (torch.empty(SENTENCES, length, dtype=torch.long) for _ in range(2))
            return build(VOCABULARY, **depth), (source, target), target.flatten()
        model = make_resnet(name, CLASSES, image_size=SIDE).to(memory_format=torch.channels_last)
        images = torch.empty(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
        return model, (images,), torch.empty(BATCH, dtype=torch.long)


def loss_of(model, *batch):
    """The loss of inputs and labels."""
    *inputs, labels = batch
    output = model(*inputs).float()
    return F.cross_entropy(output.flatten(0, -2) if output.dim() > 2 else output, labels)


def saved(model, *batch):
    """Bytes that a forward pass saves for the backward pass, without weights and images."""
    storages = {}

    def note(t):
        storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = loss_of(model, *batch)
    for t in (*model.parameters(), *model.buffers(), *batch):
        storages.pop(t.untyped_storage()._cdata, None)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def counts(name, recipe, codes=True):
    """What a step takes."""
    launched, moved, parts, variants = Counter(), Counter(), {}, []

    def note(kernel, arguments):
        launched[kernel] += 1
        tensors = (getattr(a, "base", a) for a in arguments)
        moved[kernel] += sum(size(t) for t in tensors if isinstance(t, torch.Tensor))

    @contextmanager
    def part(name):
        launched.clear()
        moved.clear()
        with Operators() as torchs:
            yield
        parts[name] = {
            "triton": dict(launched),
            "torch": dict(torchs.launches),
            "bytes": {**moved, **torchs.bytes},
        }

    pretend(Gpu((9, 0), 132), lambda kernel: variants.append(kernel.name), note)
    warm_steps.pretend_to_capture()
    model, inputs, labels = made(name)
    batch = (*inputs, labels)
    precision, context = load_recipe(recipe), StepContext(seed=1)
    inject(model, precision, context, "triton")
    if not codes:
        model.run_stages = None
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    masters = MasterWeights(model, optimizer, precision)
    with HostReadsZeros():
        step = GraphedStep(model, lambda *given: (loss_of(model, *given), {}), batch)
        for number in (1, 2):
            # The first one makes tables and the optimizer's state.
            context.begin(number)
            optimizer.zero_grad()
            with part("forward and backward"):
                step(batch, 1e4)
            with part("update"):
                step.step(masters, 1e4)
        compiled = Counter(variants)
        context.begin(3)
        result = {"variants": compiled, "parts": parts, "saved": saved(model, *batch)}
    everything = Counter()
    for each in parts.values():
        everything.update(each["bytes"])
    result["moved"] = {kernel: size for kernel, size in everything.items() if kernel not in PRODUCTS}
    if name not in TRANSLATION:
        model, (images,), labels = made(name)
        result["saved in BF16"] = saved(model.to(torch.bfloat16), images.to(torch.bfloat16), labels)
    return result


def page():
    """Tables of all models, each counted in a process of its own: Triton gives a kernel once."""
    cases = [*(((name,), name) for name in ("resnet18", "resnet50", *TRANSLATION))]
    cases.insert(2, (("resnet50", "--no-codes"), "resnet50, FP32 tensors between layers"))
    rows, kernels = [], {}
    for (name, *options), label in cases:
        command = [sys.executable, __file__, name, "fp8", *options]
        step = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        launches = [sum(sum(part[kind].values()) for part in step["parts"].values()) for kind in ("triton", "torch")]
        outside = sum(step["moved"].values())
        saved = step["saved"] / 2**30, step.get("saved in BF16", 0) / 2**30
        both = f"{saved[0]:.2f} / {saved[1]:.2f}" if saved[1] else f"{saved[0]:.2f}"
        rows.append((label, *map(str, launches), f"{outside / 1e9:.1f}", both, str(sum(step["variants"].values()))))
        if name == "resnet50":
            kernels[label] = Counter(step["moved"])
    head = (
        "step",
        "Triton's launches",
        "torch's",
        "GB beside products",
        "GiB saved, FP8 / BF16",
        "compiled kernels",
    )
    named = sorted({k for moved in kernels.values() for k, size in moved.items() if size >= 1e8})
    table = [(k, *(f"{moved[k] / 1e9:.1f}" for moved in kernels.values())) for k in named]
    print(
        "# What a training step takes, counted without a GPU\n\n"
        f"Planned for an H100, {version()}, recipe fp8. ResNets: batch {BATCH}, {SIDE} x {SIDE}; Transformer and GNMT "
        f"(8 layers): {SENTENCES} sentences of 32 and 50 tokens. Forward, backward and update as a run replays them. "
        "Bytes are those of the tensors that a kernel or an operator is given, read or written once each.\n\n"
        f"{markdown(head, rows)}\n\n## GB a kernel, ResNet-50\n\n{markdown(('kernel', *kernels), table)}\n"
    )


def version():
    """Of what plans."""
    return f"Triton {triton.__version__}, torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    if sys.argv[1] == "page":
        page()
    else:
        print(json.dumps(counts(*sys.argv[1:3], codes="--no-codes" not in sys.argv)))
