"""What happens to a run that diverged: it is diagnosed, then rolled back or ended with the reason."""

from __future__ import annotations

from typing import Any

from fp8repro.errors import RunFailure
from fp8repro.training.diagnosis import diagnose
from fp8repro.training.journal import Journal
from fp8repro.training.run import Run, roll_back
from fp8repro.training.train_step import StepResult, accumulate_gradients


def check_divergence(run: Run, result: StepResult, batches: list[Any], journal: Journal) -> bool:
    """Record where a run diverged, and end it or roll it back as `trainer.on_divergence` says.

    A run has diverged when its weights are not finite, or after `trainer.max_skipped_in_a_row` skipped steps in a row.
    Weights and skipped steps, and so the answer, are the same on all ranks.

    Returns:
        True when the run was rolled back.

    Raises:
        RunFailure: it diverged, and may not be rolled back (again), or has no checkpoint from before it.
    """
    trainer, skipped = run.config.trainer, run.scaler.skipped_in_a_row
    if not run.masters.finite():
        where = f"weights were not finite after step {run.step - skipped}"
    elif skipped >= trainer.max_skipped_in_a_row:
        where = f"{skipped} steps in a row were skipped up to step {run.step}"
    else:
        return False
    reason = where + _first_nonfinite(run, result, batches, journal) + _explanation(run, result)
    if trainer.on_divergence == "stop":
        raise RunFailure(reason)
    if run.results["rollbacks"] >= trainer.max_rollbacks:
        raise RunFailure(f"{reason}; trainer.max_rollbacks={trainer.max_rollbacks} are used up")
    step = roll_back(run, journal.record, journal.display)
    if step is None:
        raise RunFailure(f"{reason}; there is no checkpoint from before it to roll back to")
    text = f"{reason}; rolled back to the weights after step {step}, the updates since are lost"
    journal.note(run.step, "rolled_back", text)
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


def _first_nonfinite(run: Run, result: StepResult, batches: list[Any], journal: Journal) -> str:
    """Repeat the step that was skipped last; records and names where it went wrong."""
    step, factor = run.step - 1, result.scale / result.count
    run.statistics.keep()
    found = diagnose(run.model, run.context.telemetry, lambda: accumulate_gradients(run, step, batches, factor))
    run.statistics.restore()
    journal.record.row("diagnosis", run.step, **found)
    first = next((first for first in run.world.gather(found["first"]) if first), None)
    return f" (first at {first['layer']}: {first['role']})" if first else ""
