"""What is printed may have nowhere to go (a closed stream, a full disk, a pipe without a reader); a run outlives it.

It must never raise where something is printed: what became of the output is said once, and decided at the end.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Output(io.TextIOBase):
    """A stream that drops all output after the first failed write.

    Attributes:
        lost: the error of that write, or None.
    """

    def __init__(self, stream: TextIO, tell: Callable[[OSError], None]) -> None:
        """Write to `stream`; call `tell` when that fails."""
        self.stream, self._tell = stream, tell
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """As for any stream, without errors."""
        if self.lost is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self.lose(error)
        return len(text)

    def flush(self) -> None:
        """As for any stream, without errors."""
        if self.lost is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.lose(error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.lost is None and self.stream.isatty()

    def fileno(self) -> int:
        """The stream's."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self.stream.encoding

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self.stream, name)

    def lose(self, error: OSError) -> None:
        """Drop all further output."""
        self.lost = error
        # Else Python's own flush at exit would fail too, and change the exit code.
        with suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        self._tell(error)


@contextmanager
def outlived(and_then: str) -> Iterator[Output]:
    """Inside, standard output and standard error are `Output`s; gives the first.

    Args:
        and_then: added to the line on standard error that reports the loss of standard output; if empty, a closed pipe
            is not reported.
    """

    def tell(error: OSError) -> None:
        if and_then or not isinstance(error, BrokenPipeError):
            said = f"fp8repro: standard output cannot be written ({error.strerror})"
            print(said + and_then, file=sys.stderr)

    kept = sys.stdout, sys.stderr
    if sys.stdin is None:
        _occupy(0)
    out, err = _opened(sys.stdout, 1, tell), _opened(sys.stderr, 2, lambda _: None)
    sys.stdout, sys.stderr = out, err
    try:
        if kept[0] is None:
            out.lose(OSError(errno.EBADF, "it is closed"))
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = kept


def _opened(stream: TextIO | None, descriptor: int, tell: Callable[[OSError], None]) -> Output:
    if stream is None:
        _occupy(descriptor)
        return Output(open(descriptor, "w", closefd=False), tell)
    if isinstance(stream, io.TextIOWrapper):
        # Characters that the terminal's encoding lacks are escaped.
        stream.reconfigure(errors="backslashreplace")
    return Output(stream, tell)


def _occupy(descriptor: int) -> None:
    """Open /dev/null in place of a closed stream, or the next opened file would get its descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
