"""What a run tells: rows of its record, lines on the display, points of its curves. Changes nothing of the training."""

from __future__ import annotations

import math
from typing import Any

from fp8repro.training.memory import SavedBytes, working_weight_bytes
from fp8repro.training.optimizer import l2_loss
from fp8repro.training.progress import Display, NoTracker, Tracker, make_tracker
from fp8repro.training.record import RunFolder
from fp8repro.training.run import Run
from fp8repro.training.train_step import StepResult


class Journal:
    """The places where a run's figures go, on every rank; ranks other than the first write and show nothing."""

    def __init__(self, run: Run, record: RunFolder, display: Display) -> None:
        """Open the curves; the record has begun."""
        self.record, self.display = record, display
        self.tracker: Tracker = NoTracker()
        if record.writes:
            config = run.config
            self.tracker = make_tracker(config.logger, record.folder, config.to_dict(), run.step, display.say)

    def close(self) -> None:
        """Write what is pending; leave the terminal as it was."""
        self.tracker.close()
        self.display.close()

    def note(self, step: int, what: str, text: str) -> None:
        """Something that happened."""
        self.record.event(step, what, text)
        self.display.say(text)

    def warn(self, step: int, what: str, text: str) -> None:
        """Something that a reader of the figures must know."""
        self.record.event(step, what, text)
        self.display.say(f"warning: {text}")

    def memory(self, run: Run, saved: SavedBytes) -> None:
        """Bytes that the first step kept."""
        sizes = {"master_bytes": run.masters.bytes(), "weight_bytes": working_weight_bytes(run.model)}
        self.record.row("memory", run.step, saved_for_backward_bytes=saved.total(), **sizes)

    def step(self, run: Run, result: StepResult, rate: float) -> None:
        """The figures of a step, as means over all ranks; `rate` is images or tokens a second."""
        names = list(result.figures)
        sums = run.world.sum([float(result.loss), *(float(result.figures[name]) for name in names)])
        loss, *means = (value / result.count for value in sums)
        run.results["train_loss"] = loss
        figures = run.task.figures(dict(zip(names, means, strict=True)))
        values = {
            "loss": loss,
            **figures,
            "lr": result.lr,
            "loss_scale": result.scale,
            "skipped_steps": run.scaler.skipped,
            "grad_norm": run.masters.grad_norm,
            "l2": l2_loss(run.model),
            f"{run.task.unit}_per_second": rate,
        }
        self.record.row("train", run.step, epoch=run.epoch, **values)
        self.tracker.log(run.step, {f"train/{name}": float(value) for name, value in values.items()})
        shown = {name: values[name] for name in ("loss", *figures)}
        shown |= {"scale": result.scale, f"{run.task.unit}/s": round(rate)}
        self.display.show(run.step, shown)

    def telemetry(self, run: Run) -> None:
        """Underflow, overflow and absmax of the step."""
        telemetry = run.context.telemetry
        self.record.row("telemetry", run.step, rows=telemetry.rows())
        shares = {role: telemetry.share(role) for role in ("weight", "activation", "error", "gradient")}
        known = {f"underflow/{role}": share for role, share in shares.items() if not math.isnan(share)}
        self.tracker.log(run.step, known)

    def skipped(self, run: Run, result: StepResult) -> None:
        """Why the step was not applied."""
        if result.forward_finite:
            text = f"a gradient was not finite at loss scale {result.scale:g}"
            self.record.event(run.step, "skipped", text)
            return
        text = (
            "the forward pass was not finite: no loss scale cures it; normalization statistics were left as they were"
        )
        self.record.event(run.step, "nonfinite_forward", text)
        self.display.say(f"step {run.step}: {text}")

    def evaluation(self, run: Run, split: str, metrics: dict[str, float]) -> None:
        """The figures of a split, and the seconds that training took up to here."""
        self.record.row("eval", run.step, epoch=run.epoch, split=split, seconds=run.seconds, **metrics)
        self.tracker.log(run.step, {f"{split}/{name}": value for name, value in metrics.items()})
        self.display.say(f"epoch {run.epoch:.4g}  {split}  " + "  ".join(f"{n} {v:.4g}" for n, v in metrics.items()))


def announce(run: Run, record: RunFolder, display: Display, rate_settled: bool) -> None:
    """What a run begins with: its layers, its learning rate if a rule gave it, its batches or where it resumes."""
    table = run.report.table()
    display.say(table if run.config.precision.converts else table.splitlines()[0])
    if rate_settled:
        batch = run.config.trainer.batch_size
        display.say(f"optimizer.lr: {run.rate:.3g}, for {run.total_steps} steps of batch {batch}")
    if run.step:
        record.event(run.step, "resume", f"continued from the checkpoint after step {run.step}")
        return
    record.row("convert", 0, rows=[vars(row) for row in run.report.rows])
    if report := run.task.batch_report():
        record.row("batches", 0, **report)
        display.say(_batches_line(report))


def _batches_line(report: dict[str, Any]) -> str:
    padding = ", ".join(f"{100 * share:.1f} % of {side} tokens" for side, share in report["padding_share"].items())
    return f"{report['batches_per_epoch']} batches an epoch in {report['batch_shapes']} shapes; padding: {padding}"
