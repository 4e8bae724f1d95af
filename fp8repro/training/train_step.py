"""One update of a run: forward and backward passes of all micro-steps, masters, loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8repro.data.keys import derived_seed, seed_torch
from fp8repro.training.run import Run
from fp8repro.training.schedule import learning_rate
from fp8repro.training.tasks.task import autocast


@dataclass
class StepResult:
    """One step.

    Attributes:
        applied: False where it was skipped, because a gradient was not finite.
        lr, scale: learning rate and loss scale of the step.
        count: images or tokens, over all ranks.
        loss, figures: sums over this rank's batches.
        stop: some rank wants to stop.
        forward_finite: of a skipped step: the forward pass was finite on every rank.
    """

    applied: bool
    lr: float
    scale: float
    count: float
    loss: Tensor
    figures: dict[str, Tensor]
    stop: bool
    forward_finite: bool = True


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
    result.applied = run.replays.step(run.masters, scale, config.trainer.clip_norm)
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
                run.weights.round()
                with autocast(config.precision, device):
                    loss, figures = run.task.loss(run.model, *run.task.inputs(batch))
                (loss * factor).backward()
            else:
                loss, figures = replayed
            total += loss.detach()
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
    return total, sums
