"""Settings that must hold before any test module is imported."""

import os

import torch

# Triton decides at import whether kernels are compiled or interpreted. Without a GPU the tests of a process interpret
# them; compilation ahead of time is tested in processes of its own, on a machine with a GPU everything is compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
