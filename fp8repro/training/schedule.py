"""Learning rates in closed form, as functions of the step. There is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from fp8repro.settings.lengths import Length, in_steps
from fp8repro.settings.schema import ScheduleConfig

Steps = Callable[[Length], float]


def learning_rate(config: ScheduleConfig, lr: float, step: int, total_steps: int, epochs: float | None = None) -> float:
    """Learning rate of one update.

    Args:
        config: the schedule.
        lr: the rate after the warm-up.
        step: updates before this one.
        total_steps: updates of the whole run.
        epochs: of the whole run; None where no length is in epochs.
    """

    def steps(length: Length) -> float:
        return in_steps(length, total_steps, epochs)

    warmup = steps(config.warmup)
    if step < warmup:
        if config.warmup_form == "exponential":
            # GNMT: grows by the same factor each step, from warmup_start to 1.
            return lr * config.warmup_start ** (1 - step / warmup)
        return lr * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    return lr * _FORMS[config.name](config, step, warmup, total_steps, steps)


def _constant(config: ScheduleConfig, step: int, warmup: float, total_steps: int, steps: Steps) -> float:
    return 1.0


def _cosine(config: ScheduleConfig, step: int, warmup: float, total_steps: int, steps: Steps) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def _step(config: ScheduleConfig, step: int, warmup: float, total_steps: int, steps: Steps) -> float:
    return config.gamma ** sum(step >= round(steps(when)) for when in config.milestones)


def _inverse_sqrt(config: ScheduleConfig, step: int, warmup: float, total_steps: int, steps: Steps) -> float:
    """fairseq: sqrt(warm-up) / sqrt(step)."""
    return math.sqrt(max(warmup, 1) / max(step, 1))


def _gnmt(config: ScheduleConfig, step: int, warmup: float, total_steps: int, steps: Steps) -> float:
    """Constant until `decay_start`, then `decay_count` halvings at equal intervals, the first one at once."""
    start = int(steps(config.decay_start))
    interval = max((total_steps - start) // config.decay_count, 1)
    return 1.0 if step < start else 0.5 ** min((step - start) // interval + 1, config.decay_count)


_FORMS = {"constant": _constant, "cosine": _cosine, "step": _step, "inverse_sqrt": _inverse_sqrt, "gnmt": _gnmt}
