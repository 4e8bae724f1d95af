"""Ctrl-C, SIGTERM and SIGUSR1 ask the loop to stop; it does so after the current step or evaluation batch."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fp8repro.training.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """An evaluation or a translation was interrupted, on every rank at the same batch."""


class StopRequest:
    """While entered, the first signal is remembered in `signal`; a second one interrupts at once.

    Attributes:
        signal: number of the signal that came first, 0 before.
    """

    def __init__(self) -> None:
        """Nothing is installed yet."""
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self, world: World) -> None:
        """Ask during an evaluation; every rank calls it at the same batch.

        Raises:
            Interrupted: one of them got a signal.
        """
        (stops,) = world.sum([float(bool(self.signal))])
        if stops:
            raise Interrupted

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + number
