"""Settings as fields of frozen dataclasses: type, accepted values, default, help and effect in one declaration.

Plain values go in; an instance or a one-line error comes out. Knows no setting, and must not import torch.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fp8repro.errors import UserError


class Effect(Enum):
    """What a setting changes. Tells who may ignore it: a resume, a comparison of runs, the name of a run's folder."""

    TRAINING = "the training: nobody may ignore it"
    OUTCOME = "when the training ends and how it is scored: a resume may change it"
    CHANCE = "random numbers: a comparison takes runs that differ in it for repetitions"
    RECORD = "what is measured and saved: a resume may change it, a comparison ignores it"
    PLACE = "where and how the run is computed: as RECORD, and no folder is named after it"


@dataclass(frozen=True)
class Bound:
    """Which numbers are accepted: in words, and as a test."""

    expected: str
    fits: Callable[[float], bool]


Positive = Annotated[float, Bound("a number over 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Bound("a number from 0 on", lambda x: 0 <= x < math.inf)]
Share = Annotated[float, Bound("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Finite = Annotated[float, Bound("a finite number", math.isfinite)]
Count = Annotated[int, Bound("a whole number from 1 to 2^31 - 1", lambda x: 0 < x < 2**31)]
CountOrZero = Annotated[int, Bound("a whole number from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31)]


def setting(default: Any, help: str, effect: Effect = Effect.TRAINING) -> Any:
    """A field that is a setting; `MISSING` as default makes it required.

    The field's annotation says what is accepted: a `Literal`, an `Annotated` number with its `Bound`, an `Annotated`
    type with a function (value, name of the setting) -> value that raises UserError, or a list or mapping of such.
    """
    metadata = {"help": help, "effect": effect}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def types_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, evaluated."""
    return get_type_hints(cls, include_extras=True)


def declared_settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Dotted name, type and field of every setting of a dataclass and of the dataclasses in it, in order."""
    for f in fields(cls):
        hint = types_of(cls)[f.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from declared_settings(hint, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hint, f


def build_dataclass(cls: type, values: Mapping[str, Any], name: str, **ready: Any) -> Any:
    """An instance of a frozen dataclass from plain values.

    Args:
        cls: its annotations decide what is accepted.
        values: plain values, nested where the fields are dataclasses themselves.
        name: dotted name of `values` in the configuration, for messages.
        ready: fields built elsewhere.

    Raises:
        UserError: an unknown or a missing setting, or a value that is not accepted.
    """
    known = {f.name: f for f in fields(cls)}
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key}: unknown setting, expected one of {', '.join(known)}")
    arguments = dict(ready)
    for key, f in known.items():
        if key in ready:
            continue
        if key in values:
            arguments[key] = convert(values[key], types_of(cls)[key], f"{prefix}{key}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{prefix}{key}: missing, expected a value")
    return cls(**arguments)


def plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def convert(value: Any, hint: Any, name: str) -> Any:
    """A plain value as a type of `setting` wants it; `name` is the setting's, for messages.

    Raises:
        UserError: it is not accepted.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner, rule = options
        if not isinstance(rule, Bound):
            return rule(value, name)
        number = _number(value, inner, name, rule.expected)
        if not rule.fits(number):
            raise UserError(f"{name}: got {value!r}, expected {rule.expected}")
        return number
    if origin is Literal:
        if isinstance(value, str) and value in options:
            return value
        raise UserError(f"{name}: got {value!r}, expected one of {', '.join(options)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (hint,) = (option for option in options if option is not type(None))
        return convert(value, hint, name)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = options[:1] * len(value) if options[-1] is Ellipsis else options
            if len(inner) == len(value):
                return tuple(convert(v, i, f"{name}[{n}]") for n, (v, i) in enumerate(zip(value, inner, strict=True)))
        count = "" if options[-1] is Ellipsis else f" of {len(options)} values"
        raise UserError(f"{name}: got {value!r}, expected a list{count}")
    # What has an origin and is none of the above is a mapping.
    if origin is not None or is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: got {value!r}, expected a mapping")
        return dict(value) if origin is not None else build_dataclass(hint, value, name)
    if hint in (int, float):
        return _number(value, hint, name)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint):
        return value
    raise UserError(f"{name}: got {value!r}, expected {'true or false' if hint is bool else 'a text'}")


def _number(value: Any, kind: type, name: str, expected: str = "") -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a text.
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, (int, kind)) and not isinstance(value, bool):
        if kind is float and isinstance(value, int) and abs(value) >= 2**1023:
            raise UserError(f"{name}: got a whole number of {value.bit_length()} bits, expected a smaller one")
        return value
    raise UserError(
        f"{name}: got {value!r}, expected {expected or ('a number' if kind is float else 'a whole number')}"
    )
