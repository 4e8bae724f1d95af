"""Lets a step on the meta device launch as on an H100, for scripts that count what is launched."""

import sys
from types import SimpleNamespace

import torch
import triton

from fp8repro.engines import quantizer
from fp8repro.kernels import backend, ops
from fp8repro.kernels.norm import operators  # noqa: F401 (imported before the names below are replaced)
from fp8repro.kernels.quantize.launch import round_into
from fp8repro.precision import carrier


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
