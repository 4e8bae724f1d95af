"""An optimizer's step over master weights as the engines do it: what they are handed, and what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fp8repro.numerics.rounding import Rounding


@dataclass(frozen=True)
class Rule:
    """An optimizer's arithmetic, as torch's `SGD`, `Adam` or `AdamW` define it; `momentum` is Adam's first beta."""

    name: str = "sgd"  # sgd | adam | adamw
    lr: float = 0.1
    momentum: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass(slots=True)
class Parameter:
    """One parameter of an update; all tensors share the master's shape and dense layout.

    Attributes:
        master: FP16, or FP32 holding values of the master's format; contiguous or channels_last.
        grad: FP32 gradient of the scaled loss.
        state: FP32: momentum (SGD) or first and second moment (Adam); empty for SGD without momentum.
        master_stream: 64-bit stream of the master's random bits.
        weight: FP8 tensor that receives the next step's weight, or None.
        weight_stream: 64-bit stream of the weight's random bits.
        updated: FP32 tensor that receives the result before it is rounded, or None.
        order: how the elements of master and weight are counted for their random bits.
    """

    master: Tensor
    grad: Tensor
    state: tuple[Tensor, ...] = ()
    master_stream: int = 0
    weight: Tensor | None = None
    weight_stream: int = 0
    updated: Tensor | None = None
    order: str = "row_major"


class Engine(Protocol):
    """What does the work: `fp8repro.kernels.optimizer.launch` on a GPU, `fp8repro.engines.cpu.update` on a CPU."""

    def gradient_control(
        self, parameters: Sequence[Parameter], scale: float = 1.0, clip_norm: float | None = None
    ) -> Tensor:
        """Check and measure the gradients of all parameters, whatever their optimizer groups.

        Returns:
            FP64 [3]: 0 if all values are finite, clipping factor, norm of the unscaled gradient.
        """

    def update(
        self,
        parameters: Sequence[Parameter],
        rule: Rule,
        step: int,
        master: Rounding,
        weight: Rounding,
        control: Tensor,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Apply one optimizer step to parameters that share a rule; nothing changes on a non-finite gradient.

        Args:
            parameters: what to update, in place.
            rule: the optimizer's arithmetic.
            step: 1 for the first update that is applied, and so on.
            master: how the FP32 result is rounded to the master.
            weight: how the master is rounded to `Parameter.weight`, where there is one.
            control: what `gradient_control` gave.
            scale: the loss scale.
            seed: key of the random bits.

        Raises:
            ValueError: a tensor's device, dtype or layout does not fit.
        """
