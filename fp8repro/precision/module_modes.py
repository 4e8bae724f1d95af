"""Function modes that hooks hold active while a module runs, and what becomes of them after an interrupt.

torch calls hooks after an error (`always_call`), but not after `KeyboardInterrupt` and its like. A mode that stays
behind must not touch what its thread computes from then on.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fp8repro.precision.reruns import callers


class ModuleMode(TorchFunctionMode):
    """A mode that a forward pre-hook enters and a forward hook leaves."""

    def __init__(self) -> None:
        """Not active yet."""
        super().__init__()
        # Which call the hooks of the running forward passes, the innermost last; None for a compiled one.
        self._frames: list[FrameType | None] = []

    def begin(self, depth: int = 1) -> None:
        """Enter the mode; `depth` is how many callers lie between this and the one that calls the hook."""
        frame = None
        if not torch.compiler.is_compiling():
            leave_interrupted()
            frame = sys._getframe(1 + depth)
        self._frames.append(frame)
        self.__enter__()

    def end(self) -> None:
        """Leave it."""
        self._frames.pop()
        self.__exit__(None, None, None)

    def interrupted(self) -> bool:
        """Whether the forward pass that entered the mode is no longer there."""
        return self.path() is None

    def path(self) -> list[FrameType] | None:
        """The callers in the forward pass that entered the mode, the innermost first; None where it is no longer there.

        In a compiled pass there are none.
        """
        if torch.compiler.is_compiling() or not self._frames or self._frames[-1] is None:
            return []
        return callers(self._frames[-1])


def leave_interrupted() -> None:
    """Leave the modes that interrupts left behind, as far as nobody else's lies on top of them."""
    while isinstance(mode := _get_current_function_mode(), ModuleMode) and mode.interrupted():
        mode.end()
