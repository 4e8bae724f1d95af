"""A run and its state: built from a configuration, loaded from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fp8repro
from fp8repro.errors import UserError
from fp8repro.numerics.reference import BITS_VERSION
from fp8repro.precision.context import StepContext
from fp8repro.precision.grouped_weights import GroupedWeights
from fp8repro.precision.injection import InjectionReport, inject
from fp8repro.precision.loss_scaling import LossScaler, make_scaler
from fp8repro.precision.master import MasterWeights
from fp8repro.precision.telemetry import Telemetry
from fp8repro.settings.schema import RunConfig
from fp8repro.training import checkpoint as checkpoints
from fp8repro.training.distributed import World
from fp8repro.training.optimizer import make_optimizer, settle_rate, with_saved_state
from fp8repro.training.progress import Display
from fp8repro.training.record import RunFolder
from fp8repro.training.replays import Replays
from fp8repro.training.running_statistics import NormalizationStatistics, synchronize_normalization
from fp8repro.training.tasks import make_task
from fp8repro.training.tasks.task import Task
from fp8repro.training.untrusted import Harmful, require_like


def no_results() -> dict[str, Any]:
    """`Run.results` at step 0."""
    return {
        "evaluated": 0,
        "metrics": {},
        "best": {},
        "rollbacks": 0,
        "train_loss": math.nan,
        "nonfinite_evaluations": 0,
        "guessing_evaluations": 0,
        "bits": BITS_VERSION,
    }


@dataclass
class Run:
    """The parts of a run, and its state.

    Attributes:
        config: its learning rate settled.
        weights: rounds the model's weights for eager passes on a GPU; replayed ones round their own.
        step: updates so far, skipped ones counted.
        seconds: spent in the loop, by former processes too.
        results: plain values that a checkpoint keeps: last evaluation, its step, the best one; rollbacks; last logged
            training loss; evaluations that were not finite; evaluations in a row that were no better than guessing;
            version of the bits (`reference.BITS_VERSION`) that the run began with.
    """

    config: RunConfig
    world: World
    task: Task[Any]
    model: nn.Module
    context: StepContext
    report: InjectionReport
    masters: MasterWeights
    scaler: LossScaler
    statistics: NormalizationStatistics
    replays: Replays
    weights: GroupedWeights
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=no_results)

    @property
    def last_step(self) -> int:
        """Where the loop ends."""
        return min(self.total_steps, self.config.trainer.max_steps or self.total_steps)

    @property
    def epoch(self) -> float:
        """Epochs so far."""
        return self.step / self.steps_per_epoch

    @property
    def rate(self) -> float:
        """The learning rate before its schedule."""
        assert self.config.optimizer.lr is not None
        return self.config.optimizer.lr

    def identity(self) -> dict[str, Any]:
        """What a run and the checkpoint that it resumes from must have in common."""
        return {**self.config.to_dict(), "processes": self.world.size, "task": self.task.identity()}

    def state(self) -> dict[str, Any]:
        """A checkpoint's content. Random numbers are functions of (seed, step), so no generator is part of it."""
        return {
            "format": checkpoints.FORMAT,
            "bits": BITS_VERSION,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.masters.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self.task.batches.state_dict(),
            "identity": self.identity(),
            "config": self.config.to_dict(),
            "seconds": self.seconds,
            "results": self.results,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's content.

        Raises:
            UserError: it is the checkpoint of another run.
        """
        checkpoints.require_same_run(state["identity"], self.identity())
        # Checkpoints did not always keep all of them, nor name their bits.
        state = state | {"results": {**no_results(), "bits": checkpoints.bits_of(state), **state["results"]}}
        own = self.state() | {"results": no_results()}
        try:
            for part in ("model", "scaler", "data", "results"):
                require_like(state[part], own[part], part)
            optimizer = with_saved_state(self.masters.optimizer, state["optimizer"])
        except Harmful as error:
            raise UserError(f"checkpoint: it does not fit this run ({error})") from None
        self.step, self.seconds, self.results = state["step"], state["seconds"], state["results"]
        self.model.load_state_dict(state["model"])
        self.masters.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.task.batches.load_state_dict(state["data"])


def build(config: RunConfig, world: World) -> Run:
    """Everything a run needs, at step 0.

    Raises:
        UserError: a setting or data that cannot be used.
    """
    task = make_task(config, world)
    steps_per_epoch = math.ceil(len(task.batches) / config.trainer.micro_steps)
    steps = config.trainer.epochs * steps_per_epoch
    if steps >= 2**31:
        most = 2**31 // steps_per_epoch
        raise UserError(f"trainer.epochs: got {config.trainer.epochs:g}, expected under {most}: fewer than 2^31 steps")
    total_steps = max(1, round(steps))
    config = replace(config, optimizer=settle_rate(config.optimizer, config.trainer.batch_size, total_steps))
    # The same weights for every precision: only the seed decides.
    torch.manual_seed(config.seed)
    model = task.model().to(world.device)
    if config.trainer.sync_batchnorm:
        synchronize_normalization(model, world)
    world.share_model(model)
    context = StepContext(config.seed, world.rank, telemetry=Telemetry(config.trainer.telemetry_every))
    report = inject(model, config.precision, context, config.backend)
    optimizer = make_optimizer(model, config.optimizer)
    # The loop sums the gradients of several processes itself, in FP32.
    masters = MasterWeights(model, optimizer, config.precision, context, narrow=True)
    scaler = make_scaler(config.loss_scaling, total_steps, config.trainer.epochs)
    statistics = NormalizationStatistics(model)
    replays = Replays(config.graphs, config.precision, world, task, model)
    parts = (config, world, task, model, context, report, masters, scaler, statistics, replays, GroupedWeights(model))
    return Run(*parts, steps_per_epoch, total_steps)


def resume(run: Run, record: RunFolder, display: Display) -> None:
    """Load the checkpoint that `resume` asks for, if there is one; every rank the same."""
    wanted = run.config.resume
    if wanted == "never":
        return
    state = _newest(run, record, display) if wanted == "auto" else checkpoints.read_checkpoint(Path(wanted))
    if state:
        run.load(state)
        saved = checkpoints.bits_of(state)
        if run.step and saved != BITS_VERSION:
            display.say(
                f"resume: the checkpoint has random bits of version {saved}, this code has those of version "
                f"{BITS_VERSION}: the run goes on, but to other bits than it would have come to"
            )


def roll_back(run: Run, record: RunFolder, display: Display) -> int | None:
    """Take weights, optimizer and loss scale back to the newest checkpoint from before the steps skipped just now.

    Nothing else goes back. The run continues with the next step: schedule, epochs, batches and random numbers are those
    that it would have had if the steps since the checkpoint had been skipped.

    Returns:
        The checkpoint's step, or None, with nothing changed, when there is none.
    """
    state = _newest(run, record, display, run.step - run.scaler.skipped_in_a_row)
    if state is None:
        return None
    counted = {name: value for name, value in run.scaler.state_dict().items() if name in ("step", "skipped")}
    results = run.results | {"rollbacks": run.results["rollbacks"] + 1}
    kept = {"step": run.step, "seconds": run.seconds, "results": results, "data": run.task.batches.state_dict()}
    run.load(state | kept | {"scaler": state["scaler"] | counted})
    # The first rank may remove the checkpoint that another still reads.
    run.world.wait()
    return int(state["step"])


def _newest(run: Run, record: RunFolder, display: Display, until: int | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint in the run's folder, up to a step; every rank the same."""
    newest = checkpoints.newest_checkpoint(record.checkpoints, display.say, until) if run.world.is_main else None
    (step,) = run.world.sum([newest["step"] + 1 if newest else 0])
    if not step:
        return None
    return newest or checkpoints.read_checkpoint(checkpoints.checkpoint_path(record.checkpoints, int(step) - 1))


def summary(run: Run, status: str) -> dict[str, Any]:
    """What summary.json says of every run; the task adds its figures."""
    config = run.config
    return {
        "status": status,
        "experiment": config.experiment,
        "model": config.model.name,
        "data": config.data.name,
        "precision": config.precision.name,
        "loss_scaling": config.loss_scaling.policy,
        "profile": config.profile,
        "seed": config.seed,
        "steps": run.step,
        "skipped_steps": run.scaler.skipped,
        "skipped_share": run.scaler.skipped / max(run.step, 1),
        "rollbacks": run.results["rollbacks"],
        "epochs": run.epoch,
        "train_seconds": run.seconds,
        "best": run.results["best"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "device": run.world.device.type,
        "backend": run.report.backend,
        "graphs": run.replays.summary(),
        "version": fp8repro.__version__,
        **run.task.batch_report(),
        "bits": BITS_VERSION,
        **({} if run.results["bits"] == BITS_VERSION else {"bits_at_first": run.results["bits"]}),
    }
