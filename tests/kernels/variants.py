"""Counts the kernels that a training step of a ResNet has Triton compile for an H100; no GPU takes part.

    env -u TRITON_INTERPRET python tests/kernels/variants.py resnet18 fp8 resnet50 fp8

The step runs on the meta device, and Triton's own key says which launches share a compiled kernel. Prints the numbers
as JSON, those of each kernel and recipe.
"""

import json
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fp8repro.engines import quantizer
from fp8repro.kernels import backend, ops
from fp8repro.kernels.norm import operators  # noqa: F401 (imported before the names below are replaced)
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.models.resnet import make_resnet
from fp8repro.precision import carrier
from fp8repro.precision.context import StepContext
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe

BATCH, SIDE, CLASSES = 256, 224, 1000


def pretend_an_h100(record):
    """Send meta tensors to the kernels as if they lay on an H100, and each launch to `record`."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    triton.runtime.JITFunction.run = record
    replaced = {"check_device": lambda *_: None, "untraced": lambda *_: True, "plain": lambda *_: True}
    replaced["address"] = lambda tensor: 0
    for name, module in list(sys.modules.items()):
        for attribute in replaced.keys() & vars(module).keys() if name.startswith("fp8repro.") else ():
            setattr(module, attribute, replaced[attribute])
    backend.available = lambda device: None
    carrier.plain = lambda *_: True
    quantizer._torch_round_into, quantizer._round_both_layouts = round_into, ops.transpose_engine


def variants(name, recipe):
    """Compiled kernels of one step, by name."""
    keys, binders = {}, {}
    target = make_backend(GPUTarget("cuda", 90, 32))

    def record(kernel, *arguments, grid, warmup, **options):
        bind = binders.get(kernel) or create_function_from_signature(kernel.signature, kernel.params, target)
        binders[kernel] = bind
        _, specialization, rest = bind(*arguments, **options)
        keys.setdefault(kernel.fn.__name__, set()).add((str(specialization), str(rest)))

    pretend_an_h100(record)
    with torch.device("meta"):
        model = make_resnet(name, CLASSES, image_size=SIDE).to(memory_format=torch.channels_last)
        images = torch.empty(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
        labels = torch.empty(BATCH, dtype=torch.long)
    inject(model, load_recipe(recipe), StepContext(seed=1), "triton")
    model.fp8_context.begin(0)
    F.cross_entropy(model(images), labels).backward()
    return {kernel: len(found) for kernel, found in keys.items()}


if __name__ == "__main__":
    cases = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    print(json.dumps({f"{name} {recipe}": variants(name, recipe) for name, recipe in cases}))
