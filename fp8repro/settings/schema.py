"""Configuration at the door: a composed Hydra config becomes frozen dataclasses, once; inside there is no DictConfig.

Every setting of a training run is a field below. Nothing here may decide numerics: see recipe.py.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from fp8repro.errors import UserError
from fp8repro.numerics.recipe import Recipe, recipe_from_mapping, recipe_to_mapping
from fp8repro.settings.lengths import Length, in_steps, read_length, require_ascending, require_unit

TASKS = ("image", "translation")


@dataclass(frozen=True)
class ModelConfig:
    """Which network. `size` holds the family's own dimensions (empty for the ResNets)."""

    name: str
    task: str = "image"
    stem: str = "auto"  # image: auto | imagenet (7x7, stride 2, pooling) | small (3x3, stride 1)
    size: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and how its samples become batches. `options` holds the data set's own settings."""

    name: str
    root: str | None = None
    image_size: int | None = None
    workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossScalingConfig:
    """Loss-scaling policy (paper, section 3.1). Windows and the moments of floors: see `fp8repro.settings.lengths`."""

    policy: str = "none"  # none | constant | dynamic | enhanced
    scale: float = 1.0  # constant: the scale; dynamic, enhanced: the initial one
    factor: float = 2.0
    window: Length = 2000  # good steps before the scale grows
    min_window: int = 1  # steps that a window given as a fraction has at least
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    floors: tuple[tuple[Length, float], ...] = ()  # enhanced: (when, floor)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer; `decay_norm_and_bias=False` leaves weight decay off one-dimensional parameters."""

    name: str = "sgd"  # sgd | adam | adamw
    lr: float | None = 0.1  # None: sgd's by batch size and length of the run, see `settle_rate`
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run; its lengths and moments: see `fp8repro.settings.lengths`."""

    name: str = "cosine"  # constant | cosine | step | inverse_sqrt | gnmt
    warmup: Length = 0.0
    warmup_start: float = 0.0  # multiplier of lr at step 0
    warmup_form: str = "linear"  # linear | exponential
    milestones: tuple[Length, ...] = ()  # step: when lr *= gamma; from 1 on with a unit
    gamma: float = 0.1
    decay_start: Length = 0.666  # gnmt: when the halvings begin; from 1 on with a unit
    decay_count: int = 4  # gnmt: number of halvings


@dataclass(frozen=True)
class TrainerConfig:
    """The loop: length, batches, measurement, checkpoints."""

    epochs: float = 10
    max_steps: int | None = None  # stop early, schedules unchanged
    batch_size: int = 64  # images, or target tokens (padding counted), over all ranks and micro-steps
    micro_steps: int = 1  # accumulate this many batches into one update
    eval_batch_size: int = 256
    label_smoothing: float = 0.0
    smoothing_form: str = "all"  # share of every class, or of all "others" but the target (fairseq)
    clip_norm: float | None = None
    channels_last: bool = True
    sync_batchnorm: bool = False  # normalization statistics over all processes
    log_every: int = 10
    eval_every_epochs: int = 1  # 0: only after the last step
    eval_train: bool = False  # evaluate on the training split too
    telemetry_every: int = 0
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = 10
    keep_checkpoints: int = 2
    average_checkpoints: int = 0  # translation: average the weights of the last N epochs for the final score
    max_skipped_in_a_row: int = 50
    on_divergence: str = "stop"  # stop | rollback, to the last checkpoint from before it
    max_rollbacks: int = 3


@dataclass(frozen=True)
class DecodeConfig:
    """Beam search.

    Attributes:
        beam: hypotheses kept per sentence; 1 is greedy search.
        length_penalty: "fairseq" (length^alpha) or "wu" (((5 + length) / 6)^alpha, GNMT).
        alpha: exponent of the length penalty.
        coverage: weight of GNMT's coverage penalty sum(log(min(attention mass, 1))); needs a model with attention.
        max_length_a, max_length_b: a translation has at most a * source length + b tokens, EOS counted.
    """

    beam: int = 4
    length_penalty: str = "fairseq"
    alpha: float = 0.6
    coverage: float = 0.0
    max_length_a: float = 1.5
    max_length_b: int = 10


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
    logger: str = "tensorboard"  # tensorboard | wandb | none
    profile: str = "embedded"
    experiment: str | None = None  # the cell of the paper's tables that the run stands for
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    backend: str = "auto"  # auto | emulate | triton
    graphs: str = "auto"  # auto | off
    run_dir: str | None = None
    resume: str = "never"  # never | auto | path of a checkpoint
    overwrite: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a run's config.yaml."""
        return _plain({**asdict(self), "precision": recipe_to_mapping(self.precision)})


CHOICES: dict[str, tuple[str, ...]] = {
    "model.task": TASKS,
    "model.stem": ("auto", "imagenet", "small"),
    "loss_scaling.policy": ("none", "constant", "dynamic", "enhanced"),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "schedule.name": ("constant", "cosine", "step", "inverse_sqrt", "gnmt"),
    "schedule.warmup_form": ("linear", "exponential"),
    "trainer.smoothing_form": ("all", "others"),
    "trainer.on_divergence": ("stop", "rollback"),
    "decode.length_penalty": ("fairseq", "wu"),
    "logger": ("tensorboard", "wandb", "none"),
    "device": ("auto", "cpu", "cuda"),
    "backend": ("auto", "emulate", "triton"),
    "graphs": ("auto", "off"),
}


@dataclass(frozen=True)
class Bound:
    """What numbers a setting accepts: in words, and as a test."""

    expected: str
    fits: Callable[[float], bool]


POSITIVE = Bound("a number over 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("a number from 0 on", lambda x: 0 <= x < math.inf)
SHARE = Bound("a number from 0 to 1", lambda x: 0 <= x <= 1)
UNDER_ONE = Bound("a number from 0 to under 1", lambda x: 0 <= x < 1)
FINITE = Bound("a finite number", math.isfinite)
# Loss and gradients are FP32: a scale and its inverse must be normal numbers there.
SCALE = Bound("a number from 2^-126 to 2^126", lambda x: 2.0**-126 <= x <= 2.0**126)
COUNT = Bound("a whole number from 1 to 2^31 - 1", lambda x: 0 < x < 2**31)
COUNT_OR_ZERO = Bound("a whole number from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31)
# Every setting that is a number or a list of them, but for lengths (lengths.py), which bound themselves.
BOUNDS: dict[str, Bound] = {
    "seed": Bound("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
    "data.image_size": COUNT,
    "data.workers": COUNT_OR_ZERO,
    "decode.alpha": FINITE,
    "decode.beam": COUNT,
    "decode.coverage": NOT_NEGATIVE,
    "decode.max_length_a": NOT_NEGATIVE,
    "decode.max_length_b": COUNT,
    "loss_scaling.factor": Bound("a number over 1", lambda x: 1 < x < math.inf),
    "loss_scaling.floors": SCALE,
    "loss_scaling.max_scale": SCALE,
    "loss_scaling.min_scale": SCALE,
    "loss_scaling.min_window": COUNT,
    "loss_scaling.scale": SCALE,
    "optimizer.betas": UNDER_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.momentum": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "schedule.decay_count": COUNT,
    "schedule.gamma": SHARE,
    "schedule.warmup_start": SHARE,
    "trainer.average_checkpoints": COUNT_OR_ZERO,
    "trainer.batch_size": COUNT,
    "trainer.checkpoint_every_minutes": POSITIVE,
    "trainer.checkpoint_every_steps": COUNT,
    "trainer.clip_norm": POSITIVE,
    "trainer.epochs": POSITIVE,
    "trainer.eval_batch_size": COUNT,
    "trainer.eval_every_epochs": COUNT_OR_ZERO,
    "trainer.keep_checkpoints": COUNT,
    "trainer.label_smoothing": SHARE,
    "trainer.log_every": COUNT,
    "trainer.max_rollbacks": COUNT,
    "trainer.max_skipped_in_a_row": COUNT,
    "trainer.max_steps": COUNT,
    "trainer.micro_steps": COUNT,
    "trainer.telemetry_every": COUNT_OR_ZERO,
}


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build the configuration of a run from the plain values of a composed config.

    Raises:
        UserError: an unknown setting, a wrong type, or a value that is not accepted.
    """
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
    for setting, accepted in CHOICES.items():
        given = _lookup(config, setting)
        if given not in accepted:
            raise UserError(f"{setting}: got {given!r}, expected one of {', '.join(accepted)}")
    for setting, bound in BOUNDS.items():
        for given in _numbers(setting, _lookup(config, setting)):
            if not bound.fits(given):
                raise UserError(f"{setting}: got {given!r}, expected {bound.expected}")
    _check_together(config)
    return config


def _numbers(setting: str, value: Any) -> Sequence[float]:
    """The numbers of a setting: none where it is absent; of floors, what they are and not when they begin."""
    if setting == "loss_scaling.floors":
        return [floor for _, floor in value]
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _check_together(config: RunConfig) -> None:
    """Raise UserError for settings that are sound one by one and mean nothing together."""
    schedule, optimizer = config.schedule, config.optimizer
    for number, when in enumerate(schedule.milestones):
        require_unit(when, f"schedule.milestones[{number}]")
    require_unit(schedule.decay_start, "schedule.decay_start")
    require_ascending(schedule.milestones, config.trainer.epochs, "schedule.milestones")
    if in_steps(config.loss_scaling.window, 2**31, config.trainer.epochs) == 0:
        raise UserError(f"loss_scaling.window: got {_plain(config.loss_scaling.window)!r}, expected a length over 0")
    if schedule.warmup_form == "exponential" and schedule.warmup_start == 0 and schedule.warmup != 0:
        raise UserError(
            f"schedule.warmup_start: got {schedule.warmup_start!r} with warmup_form=exponential, expected over 0"
        )
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        raise UserError(f"optimizer.momentum: got {optimizer.momentum!r} with nesterov=true, expected a number over 0")


def compose_group(group: str, name: str) -> dict[str, Any]:
    """The plain values of `conf/<group>/<name>.yaml`, its own defaults list followed.

    Raises:
        UserError: the group has no such file.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf

    try:
        with initialize_config_module("fp8repro.conf", version_base="1.3"):
            config = compose(config_name=f"{group}/{name}")
    except MissingConfigException:
        raise UserError(f"{group}: got {name!r}, expected one of {', '.join(group_options(group))}") from None
    values = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def group_options(group: str) -> list[str]:
    """Names of the files of a configuration group, sorted."""
    from importlib.resources import files

    folder = files("fp8repro.conf").joinpath(group)
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def setting_names(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """The dotted names of the settings that every run has, in order, without those of its model or data set."""
    names = []
    for name, hint in get_type_hints(cls).items():
        inner = hasattr(hint, "__dataclass_fields__")
        names += setting_names(hint, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def _mapping(value: Any, setting: str) -> dict[str, Any]:
    """A group of settings, empty where it is absent."""
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{setting}: got {value!r}, expected a mapping")
    return dict(value or {})


def _lookup(config: RunConfig, setting: str) -> Any:
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def build_dataclass(cls: type, values: Mapping[str, Any], setting: str, **ready: Any) -> Any:
    """An instance of a frozen dataclass of settings from plain values.

    Args:
        cls: a dataclass; its annotations decide what is accepted.
        values: plain values, nested where the fields are dataclasses themselves.
        setting: dotted name of `values` in the configuration, for messages.
        ready: fields built elsewhere.

    Raises:
        UserError: an unknown or a missing setting, or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    prefix = f"{setting}." if setting else ""
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key}: unknown setting, expected one of {', '.join(known)}")
    arguments = dict(ready)
    for f in fields(cls):
        if f.name in ready:
            continue
        if f.name in values:
            arguments[f.name] = _convert(values[f.name], hints[f.name], f"{prefix}{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{prefix}{f.name}: missing, expected a value")
    return cls(**arguments)


def _convert(value: Any, hint: Any, setting: str) -> Any:
    if hint == Length:
        return read_length(value, setting)
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (hint,) = (option for option in options if option is not type(None))
        return _convert(value, hint, setting)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = options[:1] * len(value) if options[-1] is Ellipsis else options
            if len(inner) == len(value):
                return tuple(
                    _convert(v, i, f"{setting}[{n}]") for n, (v, i) in enumerate(zip(value, inner, strict=True))
                )
        count = "" if options[-1] is Ellipsis else f" of {len(options)} values"
        raise UserError(f"{setting}: got {value!r}, expected a list{count}")
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{setting}: got {value!r}, expected a mapping")
        return dict(value)
    if hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, Mapping):
            raise UserError(f"{setting}: got {value!r}, expected a mapping")
        return build_dataclass(hint, value, setting)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= 2**1023:
            raise UserError(f"{setting}: got a whole number of {value.bit_length()} bits, expected a smaller one")
        return float(value) if isinstance(value, float) else value
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{setting}: got {value!r}, expected {names[hint]}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
