"""Progress for people: a bar on a terminal, plain lines elsewhere; curves in TensorBoard or Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fp8repro.errors import UserError

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Progress of one run; with `visible=False` it shows nothing."""

    def __init__(self, steps: int, start: int, visible: bool = True) -> None:
        """`steps` of the whole run, `start` of them done; a display without steps is for `counting` alone."""
        self.steps, self.visible = steps, visible
        self._bar: Any = None
        self._last_line = -SECONDS_BETWEEN_LINES
        if visible and sys.stdout.isatty():
            self._bar = _make_bar()
            self._task = self._bar.add_task("training", total=steps, completed=start, figures="", visible=steps > 0)
            self._bar.start()

    def show(self, step: int, figures: Mapping[str, Any]) -> None:
        """The state after `step` updates."""
        text = "  ".join(f"{name} {_figure(value)}" for name, value in figures.items() if value is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif self._line_is_due():
            print(f"step {step}/{self.steps}  {text}", flush=True)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar, or lines, of its own inside: call what it gives with how many are done, of how many."""
        task = None if self._bar is None else self._bar.add_task(what, total=None, figures=what)

        def show(done: int, total: int) -> None:
            if self._bar is not None:
                self._bar.update(task, completed=done, total=total)
            elif self._line_is_due():
                print(f"{what} {done}/{total}", flush=True)

        try:
            yield show
        finally:
            if self._bar is not None:
                self._bar.remove_task(task)

    def _line_is_due(self) -> bool:
        """Whether a line may be printed, which then counts as printed."""
        if not self.visible or time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = time.monotonic()
        return True

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.visible:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Tracker(Protocol):
    """Where curves go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class NoTracker:
    """No curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def close(self) -> None:
        """See `Tracker`."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Curves continue from `step`; later points of a former process are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed run continues it."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Start, or go on with, the run whose id lies in the folder.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise UserError("logger: got wandb, which is not installed, expected pip install wandb") from None
        id_file = folder / "wandb-id"
        identity = id_file.read_text() if id_file.exists() else wandb.util.generate_id()
        id_file.write_text(identity)
        self._run = wandb.init(
            project="fp8repro", name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(config)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def make_tracker(name: str, folder: Path, config: Mapping[str, Any], step: int, say: Any) -> Tracker:
    """The tracker of a setting.

    Args:
        name: "tensorboard", "wandb" or "none".
        folder: of the run.
        config: plain values of the run.
        step: where the run begins.
        say: prints a line when TensorBoard is not installed.
    """
    if name == "wandb":
        return WeightsAndBiases(folder, config)
    if name == "tensorboard":
        try:
            return TensorBoard(folder / "tensorboard", step)
        except ImportError:
            say("TensorBoard is not installed: no curves are written (logger=none says so too)")
    return NoTracker()
