"""From `group=choice setting=value ...` to the plain values of each run: choices, checks and sweeps over Hydra.

Every mistake becomes a UserError that names the nearest valid choice.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp8repro.errors import UserError
from fp8repro.fields import Effect, declared_settings
from fp8repro.settings.choices import PROFILES, compose_group, groups, nearest, nearest_first, our_configs
from fp8repro.settings.lengths import Length, Moment
from fp8repro.settings.run_name import run_name
from fp8repro.settings.schema import RunConfig, settings_with

# Mappings whose settings depend on the model, data set or policy: a setting in them need not exist before.
OPEN_MAPPINGS = ("model.size.", "data.options.", "loss_scaling.")
PATHS = ("run_dir", "resume", "data.root")
# Settings that do not change what a run computes; a run's folder is named after them only where a sweep varies them.
UNNAMED = settings_with(Effect.PLACE)
LENGTHS = frozenset(name for name, hint, _ in declared_settings(RunConfig) if hint in (Length, Moment))
# Groups that may be replaced in a saved run's configuration, to evaluate its weights.
EXCHANGEABLE = ("precision", "data", "loss_scaling")
# Groups that are null in conf/config.yaml.
UNCHOSEN = ("data", "training", "profile", "optimizer", "schedule", "experiment")


@dataclass(frozen=True)
class Job:
    """One run of a command line.

    Attributes:
        overrides: what was asked for.
        choices: of every group, None where nothing was chosen.
        values: plain values for `schema.run_config`.
        swept: settings in which the runs of the command line differ.
    """

    overrides: tuple[str, ...]
    choices: Mapping[str, str | None]
    values: Mapping[str, Any]
    swept: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """A folder name that says what runs: model, data, precision or experiment, every further override, seed."""
        named = ["model", "data", "experiment" if self.choices["experiment"] else "precision"]
        parts = [str(self.choices[group]) for group in named]
        for override in sorted(self.overrides):
            key = override.lstrip("+~").partition("=")[0]
            if key not in (*named, "seed") and (key in self.swept or key not in UNNAMED):
                parts.append(override.lstrip("+"))
        return run_name(parts, self.values["seed"])


def jobs(overrides: Sequence[str], sweep: bool) -> list[Job]:
    """The runs of a command line: one, or with `sweep` one for each combination of the lists of values.

    Raises:
        UserError: an unknown group, choice or setting, a value that is not a value, or a list without `sweep`.
    """
    parsed = _parse(overrides)
    lists = [override for override in parsed if override.is_sweep_override()]
    if lists and not sweep:
        key, value = lists[0].input_line.split("=", 1) if lists[0].input_line else ("", "")
        raise UserError(f"{key}: got {value}, expected one value (-m runs a list of values one after the other)")
    swept = frozenset(override.key_or_group for override in lists)
    return [_job(line, swept) for line in itertools.product(*(_expand(override) for override in parsed))]


def changed(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The plain values of an earlier run with some settings changed: precision, data, loss scaling or single values.

    Raises:
        UserError: a setting that the run does not have, or a group that cannot be exchanged afterwards.
    """
    known, result = groups(), copy.deepcopy(dict(values))
    for override in _parse(overrides):
        key = override.key_or_group
        if override.is_sweep_override() or override.is_delete():
            raise UserError(f"{override.input_line}: expected setting=value")
        if key in EXCHANGEABLE:
            _check_choice(key, override.value(), known[key])
            result[key] = compose_group(key, str(override.value()))
            continue
        keys = _keys(result)
        if key not in keys and not key.startswith(OPEN_MAPPINGS):
            raise UserError(f"{key}: unknown setting, expected one of {nearest(key, [*EXCHANGEABLE, *keys], result)}")
        *folders, name = key.split(".")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = override.value()
    return result


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text!r}: expected group=choice or setting=value")
        key, _, value = text.partition("=")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            if key not in PATHS:
                raise UserError(f"{text!r}: {_first_line(error)}") from error
            # Names of folders need no quotes.
            quoted = value.replace("\\", "\\\\").replace("'", "\\'")
            parsed.append(parser.parse_override(f"{key}='{quoted}'"))
    return parsed


def _expand(override: Override) -> list[str]:
    assert override.input_line is not None
    if not override.is_sweep_override():
        return [override.input_line]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: expected a list of values such as seed=0,1,2 or range(0,3)")
    key = override.input_line.split("=", 1)[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _job(overrides: Sequence[str], swept: frozenset[str]) -> Job:
    known = groups()
    chosen, settings = [], []
    for override in _parse(overrides):
        key = override.key_or_group
        if key in known:
            if override.value() is None and not override.is_delete() and key in UNCHOSEN:
                continue
            _check_choice(key, override.value(), known[key])
            chosen.append(f"{key}={override.value()}")
        else:
            settings.append(override)
    first = _compose(chosen)
    choices = dict(first.hydra.runtime.choices)
    derived = _derived_choices(choices, first, known)
    choices |= derived
    chosen += [f"{group}={choice}" for group, choice in derived.items()]
    lines = [line for override in settings for line in _as_hydra_takes_it(override)]
    try:
        config = _compose(chosen + lines)
    except UserError:
        _check_keys(settings, _compose(chosen), known)
        raise
    values = _plain(config)
    values.pop("profile_data")
    _settle_lengths(values, choices, {override.key_or_group for override in settings})
    return Job(tuple(overrides), {group: choices.get(group) for group in known}, values, swept)


def _check_choice(group: str, given: Any, known: Mapping[str, str]) -> None:
    if not isinstance(given, str) or given not in known:
        raise UserError(f"{group}: got {given!r}, expected one of {nearest_first(str(given), known)}")


def _derived_choices(
    choices: Mapping[str, str | None], first: DictConfig, known: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Profile, data and training where they follow from the other choices (see conf/config.yaml)."""
    task, data, profile = first.model.task, choices["data"], choices["profile"]
    fitting = {name: _profile_data(name)[task] for name in PROFILES}
    derived = {}
    if data is None:
        data = derived["data"] = fitting[profile or "embedded"][0]
    all_data = {entry for names in fitting.values() for entry in names}
    if data not in all_data:
        raise UserError(
            f"data: got {data!r} with model={choices['model']}, expected one of {', '.join(sorted(all_data))}"
        )
    if profile is None:
        derived["profile"] = next((name for name in PROFILES if fitting[name][0] == data), "midscale")
    elif data not in fitting[profile]:
        raise UserError(f"data: got {data!r} with profile={profile}, expected one of {', '.join(fitting[profile])}")
    if choices["training"] is None:
        # fairseq's model trains as ours does.
        family = re.sub(r"\d+$", "", first.model.name).removeprefix("fairseq_")
        derived["training"] = f"{data}_{family}"
        if derived["training"] not in known["training"]:
            raise UserError(
                f"training: there is none for model={choices['model']} data={data}, expected training= and one of "
                f"{', '.join(known['training'])}"
            )
    return derived


def _profile_data(name: str) -> dict[str, list[str]]:
    text = files("fp8repro.conf").joinpath("profile", f"{name}.yaml").read_text(encoding="utf-8")
    data: dict[str, list[str]] = yaml.safe_load(text)["profile_data"]
    return data


def _as_hydra_takes_it(override: Override) -> list[str]:
    line, key = override.input_line, override.key_or_group
    assert line is not None
    # Settings that conf/ leaves to their declared default are not in the composed configuration.
    may_be_new = key.startswith(OPEN_MAPPINGS) or key in _names()
    if not may_be_new or line.startswith(("+", "~")):
        return [line]
    # A length replaces a length; Hydra merges mappings.
    return [*([f"++{key}=null"] if key in LENGTHS else []), f"++{line}"]


def _settle_lengths(values: Mapping[str, Any], choices: Mapping[str, str | None], given: Collection[str]) -> None:
    """Where Hydra merged the lengths of two files to {fraction: 0.1, steps: 4000}, the later one holds: the group's."""
    for key in LENGTHS - set(given):
        group, name = key.split(".")
        length = values[group].get(name)
        if isinstance(length, Mapping) and len(length) > 1 and (choice := choices[group]):
            values[group][name] = compose_group(group, choice)[name]


@cache
def _names() -> frozenset[str]:
    """Dotted names of the settings that every run has, without those of its model or data set."""
    from fp8repro.numerics.recipe import Recipe

    return frozenset(name for name, _, _ in (*declared_settings(RunConfig), *declared_settings(Recipe, "precision.")))


def _check_keys(settings: Iterable[Override], config: DictConfig, known: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting that the configuration does not have."""
    values = _plain(config)
    values.pop("profile_data")
    keys, sections = dict.fromkeys([*_keys(values), *sorted(_names())]), dict.fromkeys([*known, *values])
    for override in settings:
        key = override.key_or_group
        if key not in keys and not override.is_add() and not override.is_force_add():
            raise UserError(f"{key}: unknown setting, expected one of {nearest(key, [*known, *keys], sections)}")


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of single settings; sections and lists count as one only where they hold none."""
    keys = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            keys += _keys(value, f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _compose(overrides: list[str]) -> DictConfig:
    try:
        with our_configs():
            return compose("config", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # Hydra's own mistakes about an override (`~=0`) are plain ValueErrors.
        raise UserError(_first_line(error)) from error


def _plain(config: DictConfig) -> dict[str, Any]:
    copy = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        values = OmegaConf.to_container(copy, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
