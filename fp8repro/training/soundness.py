"""Whether a run's figures can be trusted: evaluations with infinities, training that is no better than guessing.

Uses only what a checkpoint keeps, so that a resumed run warns as an uninterrupted one. Never ends a run itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fp8repro.training.run import Run

# In the first half of a run, a loss no better than guessing means little.
EARLY = 0.5


def all_finite(metrics: Mapping[str, float]) -> bool:
    """True if all outputs of an evaluation were finite; only then can it be the best one, or a run's result."""
    return math.isfinite(metrics["loss"]) and not metrics.get("nonfinite")


def what_was_not_finite(run: Run) -> str:
    """The last evaluation, one that is not `all_finite`, in words."""
    metrics = run.results["metrics"]
    count = metrics.get("nonfinite")
    met = f"outputs for {count:g} {run.task.unit} were not finite, which count as misses" if count else "no finite loss"
    return f"the evaluation after step {run.step} met {met} (loss {metrics['loss']:.4g})"


def no_better_than_guessing(run: Run) -> str | None:
    """One line if the last logged loss or evaluation is no better than guessing; None in a run's first half."""
    if run.step <= EARLY * run.last_step:
        return None
    chance = dict(run.task.chance())
    loss, least = run.results["train_loss"], chance.pop("loss")
    found = [f"training loss {loss:.4g} (guessing {least:.4g})"] if loss >= least else []
    metrics = run.results["metrics"]
    for name, most in chance.items():
        if name in metrics and metrics[name] <= most:
            found.append(f"validation {name} {metrics[name]:.4g} (guessing up to {most:.4g})")
    if not found:
        return None
    advice = "a lower optimizer.lr or more steps?"
    return f"no better than guessing after step {run.step} of {run.last_step}: {', '.join(found)}; {advice}"


def warnings(run: Run) -> list[str]:
    """What the summary says beside the figures, a line each."""
    evaluations = run.results["nonfinite_evaluations"]
    lines = [f"evaluations that met numbers that are not finite: {evaluations}"] if evaluations else []
    guessing = no_better_than_guessing(run)
    return [*lines, *([guessing] if guessing else [])]
