"""Learning rates in closed form: a step in, a rate out. Keeps no state, so nothing has to be saved or resumed."""

from __future__ import annotations

import math

from fp8repro.config import ScheduleConfig


def run_steps(value: float, total_steps: int) -> float:
    """A time of the run in steps: whole numbers are steps, numbers up to 1.0 with a point fractions of the run."""
    return value if isinstance(value, int) or value > 1 else value * total_steps


def learning_rate(config: ScheduleConfig, lr: float, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Args:
        config: the schedule.
        lr: the rate after the warm-up.
        step: updates before this one.
        total_steps: updates of the whole run.
    """
    warmup = run_steps(config.warmup, total_steps)
    if step < warmup:
        if config.warmup_form == "exponential":
            # GNMT: grows by the same factor each step, from warmup_start to 1.
            return lr * config.warmup_start ** (1 - step / warmup)
        return lr * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    return lr * _FORMS[config.name](config, step, warmup, total_steps)


def _constant(config: ScheduleConfig, step: int, warmup: float, total_steps: int) -> float:
    return 1.0


def _cosine(config: ScheduleConfig, step: int, warmup: float, total_steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def _step(config: ScheduleConfig, step: int, warmup: float, total_steps: int) -> float:
    return config.gamma ** sum(step >= round(run_steps(when, total_steps)) for when in config.milestones)


def _inverse_sqrt(config: ScheduleConfig, step: int, warmup: float, total_steps: int) -> float:
    """fairseq: sqrt(warm-up) / sqrt(step)."""
    return math.sqrt(max(warmup, 1) / max(step, 1))


def _gnmt(config: ScheduleConfig, step: int, warmup: float, total_steps: int) -> float:
    """Constant until `decay_start`, then `decay_count` halvings at equal intervals, the first one at once."""
    start = int(run_steps(config.decay_start, total_steps))
    interval = max((total_steps - start) // config.decay_count, 1)
    return 1.0 if step < start else 0.5 ** min((step - start) // interval + 1, config.decay_count)


_FORMS = {"constant": _constant, "cosine": _cosine, "step": _step, "inverse_sqrt": _inverse_sqrt, "gnmt": _gnmt}
