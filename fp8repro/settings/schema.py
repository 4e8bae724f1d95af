"""Every setting of a training run, declared once: a dataclass field with its type, default, help and effect.

From these come the defaults of Hydra's configuration, conversion and error messages, `--cfg job`, `train --help`, and
which settings a resume or a comparison ignores. Inside of a run there is no DictConfig. Nothing here may decide
numerics (see numerics/recipe.py) or import torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fp8repro.errors import UserError
from fp8repro.fields import (
    Bound,
    Count,
    CountOrZero,
    Effect,
    NotNegative,
    Positive,
    Share,
    build_dataclass,
    convert,
    declared_settings,
    plain,
    setting,
)
from fp8repro.settings.lengths import Length, Moment, in_steps, require_ascending

if TYPE_CHECKING:
    from fp8repro.numerics.recipe import Recipe
else:
    # Recipes read their own values; their module imports torch, for which help and misspelt settings must not wait.
    Recipe = Any

UnderOne = Annotated[float, Bound("a number from 0 to under 1", lambda x: 0 <= x < 1)]
OverOne = Annotated[float, Bound("a number over 1", lambda x: 1 < x < math.inf)]
Seed = Annotated[int, Bound("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)]
# A length to a larger power, or times a larger number, leaves the range of numbers.
Exponent = Annotated[float, Bound("a number from -10 to 10", lambda x: -10 <= x <= 10)]
Factor = Annotated[float, Bound("a number from 0 to 1000", lambda x: 0 <= x <= 1000)]
# More would only fill the memory.
Workers = Annotated[int, Bound("a whole number from 0 to 1024", lambda x: 0 <= x <= 1024)]
# Loss and gradients are FP32: a scale and its inverse must be normal numbers there.
Scale = Annotated[float, Bound("a number from 2^-126 to 2^126", lambda x: 2.0**-126 <= x <= 2.0**126)]

# Data sets of image files, which `data.cache` decodes once.
IMAGE_FILES = ("image_folder", "imagenet")


def _path(value: Any, setting: str) -> str:
    """A path; shells leave a ~ behind `setting=` alone, and make nothing of a variable that is not set."""
    text: str = convert(value, str, setting)
    if not text:
        raise UserError(f"{setting}: got an empty text, expected a path")
    return os.path.expanduser(text)


FilePath = Annotated[str, _path]

OUTCOME, CHANCE, RECORD, PLACE = Effect.OUTCOME, Effect.CHANCE, Effect.RECORD, Effect.PLACE


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = setting(MISSING, "architecture")
    task: Literal["image", "translation"] = setting("image", "what it learns")
    stem: Literal["auto", "imagenet", "small"] = setting(
        "auto",
        "first layers of a ResNet; 7x7, stride 2 and pooling, or 3x3 and stride 1, which auto takes up to 64 pixels",
    )
    size: Mapping[str, Any] = setting({}, "of translation models: dimensions that replace the model's own")


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and how its samples become batches."""

    name: str = setting(MISSING, "data set")
    root: FilePath | None = setting(None, "folder of the data", PLACE)
    image_size: Count | None = setting(None, "side of the images in pixels; null: the data set's own")
    workers: Workers = setting(0, "processes that load images or tokenize text", PLACE)
    cache: bool = setting(
        False, "image folders: decode every image once, into $FP8REPRO_CACHE; the batches are the same", PLACE
    )
    options: Mapping[str, Any] = setting({}, "the data set's own settings")


@dataclass(frozen=True)
class LossScalingConfig:
    """Loss-scaling policy (paper, section 3.1)."""

    policy: Literal["none", "constant", "dynamic", "enhanced"] = setting("none", "how the scale changes")
    scale: Scale = setting(1.0, "constant: the scale; dynamic, enhanced: the first one")
    factor: OverOne = setting(2.0, "by which the scale grows and falls")
    window: Length = setting(2000, "steps without overflow before the scale grows")
    min_window: Count = setting(1, "steps that a window given as a fraction has at least; each growth may skip one")
    min_scale: Scale = setting(1.0, "lower limit of the scale")
    max_scale: Scale = setting(2.0**24, "upper limit of the scale")
    floors: tuple[tuple[Length, Scale], ...] = setting((), "enhanced: lower limits that rise, as [when, limit]")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = setting("sgd", "which optimizer")
    lr: Positive | None = setting(0.1, "learning rate; null: of sgd, by batch size and length of the run")
    momentum: NotNegative = setting(0.9, "sgd: momentum")
    nesterov: bool = setting(False, "sgd: Nesterov's momentum")
    weight_decay: NotNegative = setting(1e-4, "weight decay")
    decay_norm_and_bias: bool = setting(True, "false: no weight decay on one-dimensional parameters")
    betas: tuple[UnderOne, UnderOne] = setting((0.9, 0.999), "adam, adamw: decay rates of the moments")
    eps: Positive = setting(1e-8, "adam, adamw: added to the root of the second moment")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run."""

    name: Literal["constant", "cosine", "step", "inverse_sqrt", "gnmt"] = setting("cosine", "shape of the schedule")
    warmup: Length = setting(0.0, "length of the warm-up: {fraction: 0.1}, {steps: 4000} or {epochs: 2}")
    warmup_start: Share = setting(0.0, "learning rate at step 0, as a share of optimizer.lr")
    warmup_form: Literal["linear", "exponential"] = setting("linear", "how the warm-up rises")
    milestones: tuple[Moment, ...] = setting((), "step: when the learning rate is multiplied by gamma")
    gamma: Share = setting(0.1, "step: see milestones")
    decay_start: Moment = setting(0.666, "gnmt: when the halvings begin")
    decay_count: Count = setting(4, "gnmt: number of halvings")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop: length, batches, measurement, checkpoints."""

    epochs: Positive = setting(10, "passes over the training data")
    max_steps: Count | None = setting(None, "stop early; schedules stay those of the whole run", OUTCOME)
    batch_size: Count = setting(64, "images, or target tokens with padding, over all processes and micro-steps")
    micro_steps: Count = setting(1, "batches whose gradients are summed for one update")
    eval_batch_size: Count = setting(256, "images or tokens, for each process", RECORD)
    label_smoothing: Share = setting(0.0, "probability that is spread over the classes")
    smoothing_form: Literal["all", "others"] = setting(
        "all", "classes that share it; others: all but the target (fairseq)"
    )
    clip_norm: Positive | None = setting(None, "largest norm of the gradient")
    channels_last: bool = setting(True, "memory format of images")
    sync_batchnorm: bool = setting(False, "batch statistics over all processes")
    log_every: Count = setting(10, "steps between logged figures", RECORD)
    eval_every_epochs: CountOrZero = setting(1, "epochs between evaluations; 0: only after the last step", RECORD)
    eval_train: bool = setting(False, "evaluate on the training data too", RECORD)
    telemetry_every: CountOrZero = setting(0, "steps between counts of underflow and overflow; 0: never", RECORD)
    checkpoint_every_steps: Count | None = setting(None, "steps between checkpoints", RECORD)
    checkpoint_every_minutes: Positive | None = setting(10, "minutes between checkpoints", RECORD)
    keep_checkpoints: Count = setting(2, "checkpoints that stay", RECORD)
    average_checkpoints: CountOrZero = setting(0, "translation: score the mean of the weights of the last N epochs")
    max_skipped_in_a_row: Count = setting(
        50, "so many skipped steps in a row are a divergence; so are weights that are not finite", OUTCOME
    )
    on_divergence: Literal["stop", "rollback"] = setting(
        "stop",
        "rollback: weights, optimizer and loss scale of the last checkpoint before it; the run goes on with the next "
        "batch, the updates in between are lost",
        RECORD,
    )
    max_rollbacks: Count = setting(3, "the next divergence after so many rollbacks stops the run", RECORD)


@dataclass(frozen=True)
class DecodeConfig:
    """Beam search of translation models."""

    beam: Count = setting(4, "hypotheses a sentence; 1: greedy search", OUTCOME)
    length_penalty: Literal["fairseq", "wu"] = setting(
        "fairseq", "a score is divided by length^alpha, or by ((5 + length) / 6)^alpha", OUTCOME
    )
    alpha: Exponent = setting(0.6, "exponent of the length penalty", OUTCOME)
    coverage: Factor = setting(0.0, "weight of GNMT's coverage penalty sum(log(min(attention, 1)))", OUTCOME)
    max_length_a: Factor = setting(1.5, "a translation has at most a * source length + b tokens with EOS", OUTCOME)
    max_length_b: Count = setting(10, "see max_length_a", OUTCOME)


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig
    data: DataConfig
    precision: Recipe
    loss_scaling: LossScalingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    trainer: TrainerConfig = TrainerConfig()
    decode: DecodeConfig = DecodeConfig()
    logger: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard", "where curves go, beside metrics.jsonl", PLACE
    )
    profile: str = setting("embedded", "size of data and models", PLACE)
    experiment: str | None = setting(None, "cell of the paper's tables that the run stands for", RECORD)
    seed: Seed = setting(0, "of weights, order of the data, augmentation, dropout and rounding", CHANCE)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where it runs", PLACE)
    backend: Literal["auto", "emulate", "triton"] = setting(
        "auto", "emulate multiplies FP8 values in FP32, triton uses the GPU's FP8 tensor cores", PLACE
    )
    graphs: Literal["auto", "off"] = setting(
        "auto", "auto replays steps as CUDA graphs where possible; same bits", PLACE
    )
    warm: Literal["auto", "off"] = setting(
        "auto", "auto compiles a run's kernels in parallel processes before its first step, on a GPU", PLACE
    )
    run_dir: FilePath | None = setting(None, "folder of the run; null: runs/<what runs>", PLACE)
    resume: FilePath = setting(
        "never", "never, auto (from the last checkpoint in run_dir), or path of a checkpoint", PLACE
    )
    overwrite: bool = setting(False, "delete what is in run_dir first", PLACE)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a run's config.yaml."""
        from fp8repro.numerics.recipe import recipe_to_mapping

        values: dict[str, Any] = plain({**asdict(self), "precision": recipe_to_mapping(self.precision)})
        return values


def settings_with(*effects: Effect) -> frozenset[str]:
    """Dotted names of the settings that have one of some effects."""
    return frozenset(name for name, _, f in declared_settings(RunConfig) if f.metadata.get("effect") in effects)


# Settings that leave a run's result as it is, as long as it rolled nothing back.
NO_EFFECT = settings_with(CHANCE, RECORD, PLACE)
# Settings that saved runs do not always have, with what they were before.
LATER_SETTINGS = {"precision.recurrent_gradients": "step", "loss_scaling.min_window": 1}


def defaults() -> dict[str, Any]:
    """Plain values of the sections and settings that no configuration group chooses."""
    own = {name: f.default for name, f in RunConfig.__dataclass_fields__.items() if f.default is not MISSING}
    return {
        name: plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value for name, value in own.items()
    }


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build the configuration of a run from the plain values of a composed config.

    Raises:
        UserError: an unknown setting, or a value that is not accepted.
    """
    from fp8repro.numerics.recipe import recipe_from_mapping

    values = _mapping(values, "configuration")
    precision = _mapping(values.pop("precision", None), "precision")
    # A saved run's config.yaml has the policy resolved already and carries no default.
    defaults = _mapping(precision.pop("default_loss_scaling", None), "precision.default_loss_scaling")
    recipe = recipe_from_mapping(precision)
    scaling = _mapping(values.pop("loss_scaling", None), "loss_scaling")
    task = str(_mapping(values.get("model"), "model").get("task", "image"))
    default = _mapping(defaults.get(task), f"precision.default_loss_scaling.{task}")
    if scaling.get("policy") == "auto":
        scaling["policy"] = default.get("policy", "none")
    # Single settings hold over the recipe's, which are those of the same policy however it was chosen.
    policy = default.get("policy")
    if isinstance(policy, str) and scaling.get("policy") == policy:
        scaling = default | scaling
    values["loss_scaling"] = scaling
    config: RunConfig = build_dataclass(RunConfig, values, "", precision=recipe)
    _check_together(config)
    return config


def _mapping(value: Any, setting: str) -> dict[str, Any]:
    """A group of settings, empty where it is absent."""
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{setting}: got {value!r}, expected a mapping")
    return dict(value or {})


def _check_together(config: RunConfig) -> None:
    """Raise UserError for settings that are accepted one by one and mean nothing together."""
    schedule, optimizer = config.schedule, config.optimizer
    require_ascending(schedule.milestones, config.trainer.epochs, "schedule.milestones")
    if in_steps(config.loss_scaling.window, 2**31, config.trainer.epochs) == 0:
        raise UserError(f"loss_scaling.window: got {plain(config.loss_scaling.window)!r}, expected a length over 0")
    if config.data.cache and config.data.name not in IMAGE_FILES:
        raise UserError(
            f"data.cache: got true with data {config.data.name!r}, which is no image files, expected one of "
            f"{', '.join(IMAGE_FILES)}, or false"
        )
    if schedule.warmup_form == "exponential" and schedule.warmup_start == 0 and schedule.warmup != 0:
        raise UserError(
            f"schedule.warmup_start: got {schedule.warmup_start!r} with warmup_form=exponential, expected over 0"
        )
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        raise UserError(f"optimizer.momentum: got {optimizer.momentum!r} with nesterov=true, expected a number over 0")
