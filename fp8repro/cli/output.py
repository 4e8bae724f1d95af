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
    """A stream that drops what it is given from the first failure on.

    Attributes:
        lost: why, or None.
    """

    def __init__(self, stream: TextIO, tell: Callable[[OSError], None]) -> None:
        """`stream` is where everything goes as long as it can; `tell` is called when it no longer can."""
        self.stream, self._tell = stream, tell
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """As of any stream, but for errors."""
        if self.lost is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self.lose(error)
        return len(text)

    def flush(self) -> None:
        """As of any stream, but for errors."""
        if self.lost is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.lose(error)

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self.lost is None and self.stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self.stream.encoding

    def __getattr__(self, name: str) -> Any:
        """Whatever else somebody asks of a stream."""
        return getattr(self.stream, name)

    def lose(self, error: OSError) -> None:
        """Drop everything from now on."""
        self.lost = error
        # Python flushes once more at its end, and the same error there would become the exit code.
        with suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        self._tell(error)


@contextmanager
def outlived(and_then: str) -> Iterator[Output]:
    """While entered, standard output and standard error are `Output`s; gives the first.

    Args:
        and_then: what follows after the loss of standard output, for the line on standard error that says so; where it
            is empty, a reader of a pipe who goes away had enough, and nothing is said.
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
        # A name or a sign that the terminal's encoding lacks is shown as an escape.
        stream.reconfigure(errors="backslashreplace")
    return Output(stream, tell)


def _occupy(descriptor: int) -> None:
    """Give a stream that was closed nothing to write to: the next file to be opened would get its number."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
