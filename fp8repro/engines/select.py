"""Which backend multiplies, for a setting and a device. It must never change what a recipe means."""

from __future__ import annotations

import torch

from fp8repro.engines.cpu.bf16_products import Bf16Backend
from fp8repro.engines.cpu.bf16_products import available as bf16_available
from fp8repro.engines.products import Backend, EmulateBackend
from fp8repro.errors import UserError

BACKENDS = ("auto", "emulate", "triton")


def select_backend(backend: str, device: torch.device, accumulate: str) -> tuple[Backend, str]:
    """Choose what multiplies.

    Args:
        backend: "emulate" for exact values multiplied in FP32, "triton" for FP8 tensor cores, "auto" for the fastest
            exact one that the device has: on a CPU that multiplies BF16 it does so, and accumulates in FP32.
        device: where the model is.
        accumulate: how real FP8 products accumulate (see `Recipe`).

    Returns:
        The backend, and why "auto" did not take FP8 tensor cores (or "").

    Raises:
        UserError: an unknown name, Triton where it cannot run, or an accumulation that the backend has not.
    """
    chosen, why = _select(backend, device, accumulate)
    if accumulate != "promoted" and chosen.name != "triton":
        raise UserError(
            f"precision.accumulate: got {accumulate!r} where {chosen.name} multiplies, which adds in FP32, "
            "expected promoted"
        )
    return chosen, why


def _select(backend: str, device: torch.device, accumulate: str) -> tuple[Backend, str]:
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "emulate":
        return EmulateBackend(), ""
    if backend == "auto" and device.type == "cpu":
        return (Bf16Backend() if bf16_available() else EmulateBackend()), ""
    try:
        from fp8repro.kernels.backend import TritonBackend, available
    except ImportError:
        missing: str | None = "Triton is not installed"
    else:
        missing = available(device)
        if missing is None:
            return TritonBackend(accumulate), ""
    if backend == "triton":
        raise UserError(f"backend: got 'triton', but {missing}; expected auto or emulate here")
    return EmulateBackend(), missing or ""
