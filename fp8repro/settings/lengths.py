"""Lengths and moments of a run (a warm-up, a milestone, a window): {fraction: 0.12}, {steps: 8000}, {epochs: 30}.

A bare number under 1 is a fraction of the run; a whole number from 1 on counts steps, where that cannot be mistaken.
Nothing here may know what a length is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from fp8repro.errors import UserError
from fp8repro.fields import plain

UNITS = ("fraction", "steps", "epochs")
EXPECTED = "a fraction of the run under 1, a whole number of steps, or {fraction: 0.5}, {steps: 100} or {epochs: 3}"


def read_length(value: Any, setting: str) -> float | Mapping[str, float]:
    """A length from a plain value, in its shortest form: 0.12, 8000, {epochs: 30}. Records hold that form.

    Raises:
        UserError: no length.
    """
    return _shortest(_read(value, setting), bare_steps=True)


def read_moment(value: Any, setting: str) -> float | Mapping[str, float]:
    """As `read_length`, but numbers from 1 on need a unit: steps, epochs and the whole run are equally likely.

    Raises:
        UserError: no length, or the unit is missing.
    """
    length = _read(value, setting)
    if not isinstance(length, Mapping) and length >= 1:
        given = f"{{epochs: {length:g}}}, {{steps: {length:g}}}"
        raise UserError(
            f"{setting}: got {length:g} without a unit, expected a fraction of the run under 1, or {given} or "
            "{fraction: 1}"
        )
    return _shortest(length, bare_steps=False)


Length = Annotated[float | Mapping[str, float], read_length]
Moment = Annotated[float | Mapping[str, float], read_moment]


def _read(value: Any, setting: str) -> float | Mapping[str, float]:
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a text.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{setting}: got {value!r}, expected {EXPECTED}") from None
    if isinstance(value, Mapping):
        if len(value) != 1 or next(iter(value)) not in UNITS:
            raise UserError(f"{setting}: got {dict(value)!r}, expected one of {', '.join(UNITS)} in it")
        ((unit, number),) = value.items()
        if not _finite(number) or number < 0:
            raise UserError(f"{setting}.{unit}: got {number!r}, expected a number from 0 on")
        if unit == "fraction" and number > 1:
            raise UserError(f"{setting}.fraction: got {number!r}, expected a number from 0 to 1")
        if unit == "steps" and number != int(number):
            raise UserError(f"{setting}.steps: got {number!r}, expected a whole number")
        return {unit: int(number) if unit == "steps" else number}
    if not _finite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise UserError(f"{setting}: got {value!r}, expected {EXPECTED}")
    return int(value) if value >= 1 else value


def _shortest(length: float | Mapping[str, float], bare_steps: bool) -> float | Mapping[str, float]:
    unit, number = _parts(length)
    bare = number < 1 if unit == "fraction" else unit == "steps" and number >= 1 and bare_steps
    return number if bare else length


def in_steps(length: Length, total_steps: int, epochs: float | None = None) -> float:
    """A length in steps, not rounded where it is a fraction of the run.

    Args:
        length: what `read_length` gives.
        total_steps: of the whole run.
        epochs: of the whole run; None where a caller counts none.

    Raises:
        UserError: a length in epochs, which are not counted.
    """
    unit, number = _parts(length)
    if unit == "fraction":
        return number * total_steps
    if unit == "steps":
        return number
    if epochs is None:
        raise UserError(f"length: got {number:g} epochs, expected a fraction or steps where no epochs are counted")
    return round(number / epochs * total_steps)


def is_fraction(length: Length) -> bool:
    """Whether a length follows the run's."""
    return _parts(length)[0] == "fraction"


def require_ascending(lengths: Sequence[Length], epochs: float, setting: str) -> None:
    """Refuse moments out of order; steps and fractions of a run of unknown length are not compared.

    Raises:
        UserError: one is not after the one before it.
    """
    for before, after in pairwise(_comparable(length, epochs) for length in lengths):
        if before[0] == after[0] and not before[1] < after[1]:
            raise UserError(f"{setting}: got {plain(lengths)}, expected moments in ascending order")


def with_units(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a saved run with its lengths in today's form.

    Before lengths had units, in a schedule 1.0 was the whole run and 1 a step, and milestones over 1 were steps;
    windows and the moments of floors were rounded.
    """
    values = dict(config)
    schedule, scaling = values.get("schedule"), values.get("loss_scaling")
    if isinstance(schedule, Mapping):
        schedule = values["schedule"] = dict(schedule)
        for name in ("warmup", "decay_start"):
            if name in schedule:
                schedule[name] = _of_schedule(schedule[name], bare_steps=name == "warmup")
        if isinstance(schedule.get("milestones"), list | tuple):
            schedule["milestones"] = [_of_schedule(when, bare_steps=False) for when in schedule["milestones"]]
    if isinstance(scaling, Mapping):
        scaling = values["loss_scaling"] = dict(scaling)
        if "window" in scaling:
            scaling["window"] = _of_scaling(scaling["window"])
        if isinstance(scaling.get("floors"), list | tuple):
            scaling["floors"] = [
                [_of_scaling(pair[0]), *pair[1:]] if isinstance(pair, list | tuple) and pair else pair
                for pair in scaling["floors"]
            ]
    return values


def _of_schedule(value: Any, bare_steps: bool) -> Any:
    if isinstance(value, Mapping):
        return _shortest_or_as_it_is(value, bare_steps)
    if not _finite(value) or value < 1:
        return value
    if isinstance(value, float) and value == 1:
        return {"fraction": 1.0}
    return value if bare_steps else {"steps": value}


def _of_scaling(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _shortest_or_as_it_is(value, bare_steps=True)
    return round(value) if _finite(value) and value >= 1 else value


def _shortest_or_as_it_is(value: Mapping[Any, Any], bare_steps: bool) -> Any:
    """Saved values are not trusted: what is no length is refused later, where its setting can be named."""
    try:
        return _shortest(_read(value, ""), bare_steps)
    except UserError:
        return value


def _parts(length: Length) -> tuple[str, float]:
    if isinstance(length, Mapping):
        ((unit, number),) = length.items()
        return unit, number
    return ("fraction", length) if length < 1 else ("steps", length)


def _comparable(length: Length, epochs: float) -> tuple[str, float]:
    unit, number = _parts(length)
    return ("fraction", number / epochs) if unit == "epochs" else (unit, number)


def _finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 2**1023
