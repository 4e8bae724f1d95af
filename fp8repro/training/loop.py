"""The training loop, top to bottom. It never decides numerics: the recipe, the scaler and the master weights do."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import torch

from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.schema import RunConfig
from fp8repro.training import checkpoint as checkpoints
from fp8repro.training.averaging import load_averaged_weights, save_epoch_weights
from fp8repro.training.distributed import join_world
from fp8repro.training.divergence import check_divergence
from fp8repro.training.evaluate import measure
from fp8repro.training.journal import Journal, announce
from fp8repro.training.memory import counting_saved_bytes
from fp8repro.training.progress import Display
from fp8repro.training.record import GUESSING, NONFINITE_EVALUATION, RunFolder
from fp8repro.training.run import Run, build, resume, summary
from fp8repro.training.signals import Interrupted, StopRequest, exit_code
from fp8repro.training.soundness import all_finite, no_better_than_guessing, warnings, what_was_not_finite
from fp8repro.training.tasks.task import Poll, autocast
from fp8repro.training.train_step import StepResult, train_step
from fp8repro.training.warm import compile_kernels


def train(config: RunConfig) -> dict[str, Any]:
    """Train, and leave config, environment, metrics, checkpoints and summary in the run's folder.

    Returns:
        The summary.

    Raises:
        UserError: a setting or data that cannot be used, or no memory for a step.
        RunFailure: the run cannot go on; the summary says so.
        SystemExit: a signal asked to stop; a checkpoint is written, the exit code is 128 + its number.
    """
    world = join_world(config.device)
    torch.backends.cudnn.deterministic = True
    # FP32 means FP32; TF32 would round operands that the recipe leaves alone.
    torch.backends.cudnn.allow_tf32 = False
    try:
        with RunFolder(config, writes=world.is_main) as record:
            run = build(config, world)
            with StopRequest() as stop:
                return _train(run, record, stop)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            batch = config.trainer.batch_size
            raise UserError(
                f"trainer.batch_size: got {batch}, no memory on {world.device} for it, expected a smaller one or "
                "more trainer.micro_steps"
            ) from error
        raise


def _train(run: Run, record: RunFolder, stop: StopRequest) -> dict[str, Any]:
    """Resume, train to the last step, score; whatever ends the loop leaves a checkpoint or a reason."""
    rate_settled = record.config.optimizer.lr is None
    record.config = run.config
    display = Display(run.last_step, run.step, visible=run.world.is_main)
    if (finished := _resume(run, record, display)) is not None:
        return finished
    announce(run, record, display, rate_settled)
    compile_kernels(run, display, stop)
    loop = _Loop(run, Journal(run, record, display), stop)
    try:
        loop.train()
        return loop.finish()
    except Interrupted:
        # The weights after the last step are saved before they are averaged or used for a translation.
        loop.save_unless_saved()
        raise loop.stopped() from None
    except RunFailure as error:
        record.event(run.step, "failure", str(error))
        record.summary(summary(run, "failed") | {"warnings": warnings(run), "reason": str(error)})
        raise
    finally:
        loop.batches.close()
        loop.journal.close()


def _resume(run: Run, record: RunFolder, display: Display) -> dict[str, Any] | None:
    """Load the checkpoint, if one is asked for, and begin the record; gives the summary of a run that is done.

    Only the first rank knows it; the others get an empty one.
    """
    finished = record.finished_summary()
    resume(run, record, display)
    if run.step > run.last_step:
        had = f"got {run.last_step} with a checkpoint after step {run.step}"
        raise UserError(f"trainer.max_steps: {had}, expected at least {run.step}")
    (already_done,) = run.world.sum([float(bool(finished) and run.step == run.last_step)])
    if already_done:
        return finished or {}
    record.begin(run.step, run.results["evaluated"])
    return None


class _Loop:
    """The loop of a run, and its clocks: when it was saved last, and since when images or tokens are counted."""

    def __init__(self, run: Run, journal: Journal, stop: StopRequest) -> None:
        self.run, self.journal, self.stop = run, journal, stop
        self.batches = _groups(run)
        now = time.monotonic()
        self.started = now - run.seconds
        self.saved_at, self.saved_step = now, run.step
        self.counted_since, self.counted = now, 0.0
        self.poll = partial(stop.poll, run.world)

    def train(self) -> None:
        """Step after step to the last one; evaluates where epochs end."""
        run, trainer = self.run, self.run.config.trainer
        run.model.train()
        while True:
            at_boundary = run.step == run.last_step or _every(run.step, trainer.eval_every_epochs * run.steps_per_epoch)
            if at_boundary and run.results["evaluated"] != run.step:
                _evaluate(run, self.journal, self.poll)
                self.counted_since, self.counted = time.monotonic(), 0.0
            run.seconds = time.monotonic() - self.started
            if run.step == run.last_step:
                return
            batches = next(self.batches)
            result = self.step(batches)
            self.report(result)
            rolled_back = self.keep_sound(result, batches)
            run.seconds = time.monotonic() - self.started
            if rolled_back or result.stop or self.save_is_due():
                self.save()
            if result.stop:
                raise self.stopped()

    def step(self, batches: list[Any]) -> StepResult:
        """One update; the first one of a run measures memory."""
        run = self.run
        first = run.step == 0
        run.context.telemetry.begin(run.step)
        with counting_saved_bytes(run.model, first) as saved:
            result = train_step(run, batches, bool(self.stop.signal))
        run.step += 1
        self.counted += result.count
        if first:
            self.journal.memory(run, saved)
        return result

    def report(self, result: StepResult) -> None:
        """Record what is due after a step."""
        run = self.run
        if _every(run.step, run.config.trainer.log_every) or run.step == run.last_step:
            now = time.monotonic()
            self.journal.step(run, result, self.counted / max(now - self.counted_since, 1e-9))
            self.counted_since, self.counted = now, 0.0
        if run.context.telemetry.active:
            self.journal.telemetry(run)
        if not result.applied:
            self.journal.skipped(run, result)

    def keep_sound(self, result: StepResult, batches: list[Any]) -> bool:
        """Roll back or end a run that diverged; keep an epoch's weights, if those are averaged. True if rolled back."""
        run, count = self.run, self.run.config.trainer.average_checkpoints
        averaged = count and _every(run.step, run.steps_per_epoch)
        rolled_back = False
        if not result.applied or averaged or run.step == run.last_step:
            rolled_back = check_divergence(run, result, batches, self.journal)
        if averaged:
            save_epoch_weights(run.model, self.journal.record, round(run.epoch), count)
        return rolled_back

    def save_is_due(self) -> bool:
        """Whether enough steps or minutes have passed since the last checkpoint."""
        trainer = self.run.config.trainer
        minutes = (time.monotonic() - self.saved_at) / 60
        every = trainer.checkpoint_every_steps or 0
        return _every(self.run.step, every) or minutes >= (trainer.checkpoint_every_minutes or math.inf)

    def save(self) -> None:
        """Write a checkpoint, on the first rank."""
        run, record = self.run, self.journal.record
        # If the weights are not finite, the next step will tell every rank so.
        if record.writes and run.masters.finite():
            checkpoints.save_checkpoint(record.checkpoints, run.state(), run.config.trainer.keep_checkpoints)
            self.saved_at, self.saved_step = time.monotonic(), run.step

    def save_unless_saved(self) -> None:
        """Write a checkpoint of the present step, if there is none."""
        if self.saved_step != self.run.step:
            self.save()

    def finish(self) -> dict[str, Any]:
        """Score the trained model; gives and writes the summary.

        Raises:
            RunFailure: no step was applied, or the last evaluation was not finite.
        """
        run, world, record = self.run, self.run.world, self.journal.record
        recipe, count = run.config.precision, run.config.trainer.average_checkpoints
        if run.scaler.skipped == run.step:
            raise RunFailure(f"every one of the {run.step} steps was skipped: no gradient was finite")
        self.save_unless_saved()
        # The other ranks read what the first one wrote.
        world.wait()
        if count and load_averaged_weights(run.model, record, count):
            run.results["metrics"] = measure(run.task, run.model, recipe, world, poll=self.poll)
        if not all_finite(run.results["metrics"]):
            raise RunFailure(what_was_not_finite(run))
        run.model.eval()
        with torch.no_grad(), autocast(recipe, world.device):
            figures = run.task.finish(run.model, run.results["metrics"], record.folder, self.poll)
        final = summary(run, "finished") | {"warnings": warnings(run)} | figures
        record.summary(final)
        return final

    def stopped(self) -> SystemExit:
        """What to raise once a signal was granted."""
        self.journal.display.say(
            f"stopped after step {self.run.step} of {self.run.last_step}; resume=auto goes on from there"
        )
        # Another process may have got the signal.
        return SystemExit(exit_code(self.stop.signal or signal.SIGTERM))


def _evaluate(run: Run, journal: Journal, poll: Poll) -> None:
    splits = ("val", "train") if run.config.trainer.eval_train else ("val",)
    # Nothing is recorded before all is measured: what is interrupted is measured again as a whole.
    found = {split: measure(run.task, run.model, run.config.precision, run.world, split, poll) for split in splits}
    for split, metrics in found.items():
        journal.evaluation(run, split, metrics)
    metrics, best = found["val"], run.results["best"]
    if all_finite(metrics) and (not best or run.task.score(metrics) > run.task.score(best["metrics"])):
        best = {"step": run.step, "metrics": metrics}
    run.results |= {"evaluated": run.step, "metrics": metrics, "best": best}
    if not all_finite(metrics):
        run.results["nonfinite_evaluations"] += 1
        journal.warn(run.step, NONFINITE_EVALUATION, what_was_not_finite(run))
    guessing = no_better_than_guessing(run)
    if guessing and not run.results["guessing_evaluations"]:
        journal.warn(run.step, GUESSING, guessing)
    run.results["guessing_evaluations"] = run.results["guessing_evaluations"] + 1 if guessing else 0


def _groups(run: Run) -> Generator[list[Any], None, None]:
    """The batches of one update after the other, epoch after epoch."""
    while True:
        with closing(iter(run.task.batches)) as batches:  # type: ignore[type-var]
            while group := list(islice(batches, run.config.trainer.micro_steps)):
                yield group


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step > 0 and step % interval == 0
