"""Configuration at the door: plain values in, frozen dataclasses out, one line for every mistake."""

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8repro.config import FRACTIONS, NOT_NEGATIVE, POSITIVE, RunConfig, run_config
from fp8repro.errors import UserError

BASE = {"model": {"name": "resnet18"}, "data": {"name": "digits"}, "loss_scaling": {"policy": "none"}}


def values(**settings):
    """The base configuration with dotted settings changed."""
    changed = {group: dict(given) for group, given in BASE.items()}
    for name, value in settings.items():
        target, *path = name.split("__")
        if path:
            changed.setdefault(target, {})[path[0]] = value
        else:
            changed[target] = value
    return changed


def test_round_trip():
    config = run_config(values(trainer__epochs=0.5, optimizer__betas=[0.8, 0.95], schedule__milestones=[30, 0.5]))
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.schedule.milestones == (30, 0.5)
    assert run_config(config.to_dict()) == config


def test_yaml_numbers_written_as_text():
    assert run_config(values(optimizer__lr="1e-4")).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__epoch": 3}, "trainer.epoch: unknown setting, expected one of epochs, "),
        ({"trainer__epochs": "many"}, "trainer.epochs: got 'many', expected a number"),
        ({"trainer__batch_size": 1.5}, "trainer.batch_size: got 1.5, expected a whole number"),
        ({"trainer__channels_last": 1}, "trainer.channels_last: got 1, expected true or false"),
        ({"seed": True}, "seed: got True, expected a whole number"),
        ({"logger": "paper"}, "logger: got 'paper', expected one of tensorboard, wandb, none"),
        ({"optimizer__betas": 0.9}, "optimizer.betas: got 0.9, expected a list"),
        ({"trainer__label_smoothing": 1.5}, "trainer.label_smoothing: got 1.5, expected a number from 0 to 1"),
        ({"data__workers": -1}, "data.workers: got -1, expected a number from 0 on"),
        ({"model": {"task": "image"}}, "model.name: missing, expected a value"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        run_config(values(**settings))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(
    st.sampled_from([*POSITIVE, *NOT_NEGATIVE, *FRACTIONS]),
    st.sampled_from([-1, -0.5, math.nan, math.inf, -math.inf]),
)
def test_no_number_out_of_range_passes(setting, number):
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        run_config(values(**{setting.replace(".", "__"): number}))


# A generator of any text builds tables of Unicode first, which takes seconds.
texts = st.sampled_from(["", "name", "policy", "auto", "options", "e5m2", "ä\n", "1e-4", "../x", "weight", "format"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*RunConfig.__dataclass_fields__, "nonsense"])


@given(st.dictionaries(names, plain, max_size=4))
def test_any_plain_values_give_a_config_or_a_user_error(changed):
    # Any other exception fails the test.
    with suppress(UserError):
        assert isinstance(run_config(BASE | changed), RunConfig)
