"""The training loop, top to bottom. It never decides numerics: the recipe, the scaler and the master weights do."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fp8repro.data.keys import derived_seed, seed_torch
from fp8repro.errors import RunFailure, UserError
from fp8repro.settings.schema import RunConfig
from fp8repro.training import checkpoint as checkpoints
from fp8repro.training.averaging import load_averaged_weights, save_epoch_weights
from fp8repro.training.diagnosis import diagnose
from fp8repro.training.distributed import join_world
from fp8repro.training.evaluate import measure
from fp8repro.training.memory import counting_saved_bytes, working_weight_bytes
from fp8repro.training.optimizer import l2_loss
from fp8repro.training.progress import Display, NoTracker, Tracker, make_tracker
from fp8repro.training.record import GUESSING, NONFINITE_EVALUATION, RunFolder
from fp8repro.training.run import Run, build, resume, roll_back, summary
from fp8repro.training.schedule import learning_rate
from fp8repro.training.signals import Interrupted, StopRequest, exit_code
from fp8repro.training.soundness import all_finite, no_better_than_guessing, warnings, what_was_not_finite
from fp8repro.training.tasks.task import Poll, autocast


@dataclass
class StepResult:
    """One step: whether it was applied, its rate, the scale it ran under, and sums over this rank's batches."""

    applied: bool
    lr: float
    scale: float
    count: float
    loss: Tensor
    figures: dict[str, Tensor]
    stop: bool
    forward_finite: bool = True


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
    config, trainer, world = run.config, run.config.trainer, run.world
    given, record.config = record.config, config
    display = Display(run.last_step, run.step, visible=world.is_main)
    finished = record.finished_summary()
    resume(run, record, display)
    if run.step > run.last_step:
        had = f"got {run.last_step} with a checkpoint after step {run.step}"
        raise UserError(f"trainer.max_steps: {had}, expected at least {run.step}")
    (already_done,) = world.sum([float(bool(finished) and run.step == run.last_step)])
    if already_done:
        return finished or {}
    record.begin(run.step, run.results["evaluated"])
    table = run.report.table()
    display.say(table if config.precision.converts else table.splitlines()[0])
    if given.optimizer.lr is None:
        display.say(f"optimizer.lr: {run.rate:.3g}, for {run.total_steps} steps of batch {trainer.batch_size}")
    if run.step:
        record.event(run.step, "resume", f"continued from the checkpoint after step {run.step}")
    else:
        record.row("convert", 0, rows=[vars(row) for row in run.report.rows])
        if report := run.task.batch_report():
            record.row("batches", 0, **report)
            display.say(_batches_line(report))
    tracker = _tracker(run, record, display)
    clock = time.monotonic()
    saved_at, saved_step = clock, run.step
    started = clock - run.seconds
    window, window_units = clock, 0.0
    groups = _groups(run)
    poll = partial(stop.poll, world)

    def save() -> None:
        nonlocal saved_at, saved_step
        # If the weights are not finite, the next step will tell every rank so.
        if record.writes and run.masters.finite():
            checkpoints.save_checkpoint(record.checkpoints, run.state(), trainer.keep_checkpoints)
            saved_at, saved_step = time.monotonic(), run.step

    try:
        run.model.train()
        while True:
            at_boundary = run.step == run.last_step or _every(run.step, trainer.eval_every_epochs * run.steps_per_epoch)
            if at_boundary and run.results["evaluated"] != run.step:
                _evaluate(run, record, display, tracker, poll)
                window, window_units = time.monotonic(), 0.0
            run.seconds = time.monotonic() - started
            if run.step == run.last_step:
                break

            measuring_memory = run.step == 0
            run.context.telemetry.begin(run.step)
            with counting_saved_bytes(run.model, measuring_memory) as saved:
                batches = next(groups)
                result = train_step(run, batches, bool(stop.signal))
            run.step += 1
            window_units += result.count

            if measuring_memory:
                record.row(
                    "memory", run.step, saved_for_backward_bytes=saved.total(), master_bytes=run.masters.bytes(),
                    weight_bytes=working_weight_bytes(run.model),
                )  # fmt: skip
            if _every(run.step, trainer.log_every) or run.step == run.last_step:
                now = time.monotonic()
                _log(run, result, window_units / max(now - window, 1e-9), record, display, tracker)
                window, window_units = now, 0.0
            if run.context.telemetry.active:
                _log_telemetry(run, record, tracker)
            if not result.applied:
                _report_skipped(run, result, record, display)
            averaged = trainer.average_checkpoints and _every(run.step, run.steps_per_epoch)
            rolled_back = False
            if not result.applied or averaged or run.step == run.last_step:
                rolled_back = _check_divergence(run, result, batches, record, display)
            if averaged:
                save_epoch_weights(run.model, record, round(run.epoch), trainer.average_checkpoints)

            run.seconds = time.monotonic() - started
            minutes = (time.monotonic() - saved_at) / 60
            due = rolled_back or result.stop or _every(run.step, trainer.checkpoint_every_steps or 0)
            if due or minutes >= (trainer.checkpoint_every_minutes or math.inf):
                save()
            if result.stop:
                raise _stopped(run, stop, display)

        if run.scaler.skipped == run.step:
            raise RunFailure(f"every one of the {run.step} steps was skipped: no gradient was finite")
        if saved_step != run.step:
            save()
        # The other ranks read what the first one wrote.
        world.wait()
        if trainer.average_checkpoints and load_averaged_weights(run.model, record, trainer.average_checkpoints):
            run.results["metrics"] = measure(run.task, run.model, config.precision, world, poll=poll)
        if not all_finite(run.results["metrics"]):
            raise RunFailure(what_was_not_finite(run))
        run.model.eval()
        with torch.no_grad(), autocast(config.precision, world.device):
            figures = run.task.finish(run.model, run.results["metrics"], record.folder, poll)
        final = summary(run, "finished") | {"warnings": warnings(run)} | figures
        record.summary(final)
        return final
    except Interrupted:
        # The weights after the last step are saved before they are averaged or used for a translation.
        if saved_step != run.step:
            save()
        raise _stopped(run, stop, display) from None
    except RunFailure as error:
        record.event(run.step, "failure", str(error))
        record.summary(summary(run, "failed") | {"warnings": warnings(run), "reason": str(error)})
        raise
    finally:
        groups.close()
        tracker.close()
        display.close()


def train_step(run: Run, batches: list[Any], stop: bool) -> StepResult:
    """One update from the batches of all micro-steps: forward, backward, update of masters and of the loss scale.

    Args:
        run: its masters, scaler and normalization statistics change.
        batches: one for each micro-step.
        stop: this rank wants to stop after the step.
    """
    config, world, step = run.config, run.world, run.step
    count, stops = world.sum([sum(run.task.count(batch) for batch in batches), float(stop)])
    scale = run.scaler.scale
    lr = learning_rate(config.schedule, run.rate, step, run.total_steps, config.trainer.epochs)
    for group in run.masters.optimizer.param_groups:
        group["lr"] = lr
    run.masters.optimizer.zero_grad(set_to_none=True)
    run.statistics.keep()
    loss, figures = accumulate_gradients(run, step, batches, scale / count)
    result = StepResult(False, lr, scale, count, loss, figures, stops > 0)
    world.sum_tensors(p.grad for p in run.model.parameters() if p.grad is not None)
    world.average_tensors(run.statistics.tensors)
    result.applied = run.masters.step(scale, config.trainer.clip_norm)
    run.scaler.update(not result.applied)
    if not result.applied:
        finite = bool(result.loss.isfinite()) and run.statistics.finite()
        (nonfinite,) = world.sum([float(not finite)])
        result.forward_finite = not nonfinite
        if nonfinite:
            run.statistics.restore()
    return result


def accumulate_gradients(run: Run, step: int, batches: list[Any], factor: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward passes of one step on this rank.

    Args:
        run: its model's gradients are added to.
        step: names the random bits.
        batches: one for each micro-step.
        factor: the loss scale, divided by what is counted in all micro-steps of all ranks: the scaled loss is a mean
            over the global batch, so that a scale means the same everywhere.

    Returns:
        Sums of the loss and of the task's other figures.
    """
    config, device = run.config, run.world.device
    total, sums = torch.zeros((), device=device), dict[str, Tensor]()
    with run.context.fixed_weights():
        for micro_step, batch in enumerate(batches):
            run.context.begin(step, micro_step)
            # Dropout draws from the global generator: it must draw the same after a resume.
            seed_torch(derived_seed("forward", config.seed, step, micro_step, run.world.rank), device)
            replayed = run.replays.take(batch, factor)
            if replayed is None:
                with autocast(config.precision, device):
                    loss, figures = run.task.loss(run.model, batch)
                (loss * factor).backward()
            else:
                loss, figures = replayed
            total += loss.detach()
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
    return total, sums


def _groups(run: Run) -> Generator[list[Any], None, None]:
    """The batches of one update after the other, epoch after epoch."""
    while True:
        with closing(iter(run.task.batches)) as batches:  # type: ignore[type-var]
            while group := list(islice(batches, run.config.trainer.micro_steps)):
                yield group


def _batches_line(report: dict[str, Any]) -> str:
    padding = ", ".join(f"{100 * share:.1f} % of {side} tokens" for side, share in report["padding_share"].items())
    return f"{report['batches_per_epoch']} batches an epoch in {report['batch_shapes']} shapes; padding: {padding}"


def _stopped(run: Run, stop: StopRequest, display: Display) -> SystemExit:
    """What to raise once a signal was granted."""
    display.say(f"stopped after step {run.step} of {run.last_step}; resume=auto goes on from there")
    # Another process may have got the signal.
    return SystemExit(exit_code(stop.signal or signal.SIGTERM))


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step > 0 and step % interval == 0


def _evaluate(run: Run, record: RunFolder, display: Display, tracker: Tracker, poll: Poll) -> None:
    splits = ("val", "train") if run.config.trainer.eval_train else ("val",)
    # Nothing is recorded before all is measured: what is interrupted is measured again as a whole.
    found = {split: measure(run.task, run.model, run.config.precision, run.world, split, poll) for split in splits}
    for split, metrics in found.items():
        record.row("eval", run.step, epoch=run.epoch, split=split, **metrics)
        tracker.log(run.step, {f"{split}/{name}": value for name, value in metrics.items()})
        display.say(f"epoch {run.epoch:.4g}  {split}  " + "  ".join(f"{n} {v:.4g}" for n, v in metrics.items()))
    metrics, best = found["val"], run.results["best"]
    if all_finite(metrics) and (not best or run.task.score(metrics) > run.task.score(best["metrics"])):
        best = {"step": run.step, "metrics": metrics}
    run.results |= {"evaluated": run.step, "metrics": metrics, "best": best}
    if not all_finite(metrics):
        run.results["nonfinite_evaluations"] += 1
        _warn(run, record, display, NONFINITE_EVALUATION, what_was_not_finite(run))
    guessing = no_better_than_guessing(run)
    if guessing and not run.results["guessing_evaluations"]:
        _warn(run, record, display, GUESSING, guessing)
    run.results["guessing_evaluations"] = run.results["guessing_evaluations"] + 1 if guessing else 0


def _warn(run: Run, record: RunFolder, display: Display, what: str, text: str) -> None:
    record.event(run.step, what, text)
    display.say(f"warning: {text}")


def _log(run: Run, result: StepResult, rate: float, record: RunFolder, display: Display, tracker: Tracker) -> None:
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
    record.row("train", run.step, epoch=run.epoch, **values)
    tracker.log(run.step, {f"train/{name}": float(value) for name, value in values.items()})
    shown = {name: values[name] for name in ("loss", *figures)}
    shown |= {"scale": result.scale, f"{run.task.unit}/s": round(rate)}
    display.show(run.step, shown)


def _log_telemetry(run: Run, record: RunFolder, tracker: Tracker) -> None:
    telemetry = run.context.telemetry
    record.row("telemetry", run.step, rows=telemetry.rows())
    shares = {role: telemetry.share(role) for role in ("weight", "activation", "error", "gradient")}
    tracker.log(run.step, {f"underflow/{role}": share for role, share in shares.items() if not math.isnan(share)})


def _report_skipped(run: Run, result: StepResult, record: RunFolder, display: Display) -> None:
    if result.forward_finite:
        record.event(run.step, "skipped", f"a gradient was not finite at loss scale {result.scale:g}")
        return
    text = "the forward pass was not finite: no loss scale cures it; normalization statistics were left as they were"
    record.event(run.step, "nonfinite_forward", text)
    display.say(f"step {run.step}: {text}")


def _check_divergence(run: Run, result: StepResult, batches: list[Any], record: RunFolder, display: Display) -> bool:
    """Dump what a run that diverged met, and end it or roll it back as `trainer.on_divergence` says.

    Weights that are not finite are a divergence, and `trainer.max_skipped_in_a_row` skipped steps in a row. All ranks
    see the same: weights and skipped steps are the same on each.

    Returns:
        True when the run was rolled back.

    Raises:
        RunFailure: it diverged and is not to be rolled back, or not once more, or there is no checkpoint to go back to.
    """
    trainer, skipped = run.config.trainer, run.scaler.skipped_in_a_row
    if not run.masters.finite():
        where = f"weights were not finite after step {run.step - skipped}"
    elif skipped >= trainer.max_skipped_in_a_row:
        where = f"{skipped} steps in a row were skipped up to step {run.step}"
    else:
        return False
    reason = where + _first_nonfinite(run, result, batches, record) + _explanation(run, result)
    if trainer.on_divergence == "stop":
        raise RunFailure(reason)
    if run.results["rollbacks"] >= trainer.max_rollbacks:
        raise RunFailure(f"{reason}; trainer.max_rollbacks={trainer.max_rollbacks} are used up")
    step = roll_back(run, record, display)
    if step is None:
        raise RunFailure(f"{reason}; there is no checkpoint from before it to roll back to")
    text = f"{reason}; rolled back to the weights after step {step}, the updates since are lost"
    record.event(run.step, "rolled_back", text)
    display.say(text)
    return True


def _explanation(run: Run, result: StepResult) -> str:
    """Why a run cannot go on as it is."""
    scaler = run.scaler
    if result.applied or not result.forward_finite:
        return ": the forward pass is not finite, no loss scale cures it (learning rate too high?)"
    state = f"collapsed to its floor {scaler.floor:g}" if scaler.at_floor else f"fell to {scaler.scale:g}"
    if run.config.loss_scaling.policy in ("none", "constant"):
        state = f"is fixed at {scaler.scale:g}"
    return f": gradients are not finite, and the loss scale {state}"


def _first_nonfinite(run: Run, result: StepResult, batches: list[Any], record: RunFolder) -> str:
    """Repeat the step that was skipped last; records and names where it went wrong."""
    step, factor = run.step - 1, result.scale / result.count
    run.statistics.keep()
    found = diagnose(run.model, run.context.telemetry, lambda: accumulate_gradients(run, step, batches, factor))
    run.statistics.restore()
    record.row("diagnosis", run.step, **found)
    first = next((first for first in run.world.gather(found["first"]) if first), None)
    return f" (first at {first['layer']}: {first['role']})" if first else ""


def _tracker(run: Run, record: RunFolder, display: Display) -> Tracker:
    if not record.writes:
        return NoTracker()
    return make_tracker(run.config.logger, record.folder, run.config.to_dict(), run.step, display.say)
