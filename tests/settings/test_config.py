"""Configuration at the door: plain values in, frozen dataclasses out, one line for every mistake."""

import copy
import math
import re
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Annotated, get_args, get_origin

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hypothesis import given
from hypothesis import strategies as st

from fp8repro.engines.select import select_backend
from fp8repro.errors import UserError
from fp8repro.fields import Bound, declared_settings
from fp8repro.numerics.rounding import Rounding
from fp8repro.settings.lengths import Length, Moment
from fp8repro.settings.overrides import UNNAMED, jobs
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import NO_EFFECT, FilePath, RunConfig, run_config
from fp8repro.training.checkpoint import FREE_SETTINGS

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
    config = run_config(values(trainer__epochs=0.5, optimizer__betas=[0.8, 0.95], schedule__milestones=[0.3, 0.5]))
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.schedule.milestones == (0.3, 0.5)
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
        ({"data__workers": -1}, "data.workers: got -1, expected a whole number from 0 to 1024"),
        ({"data__workers": 99999}, "data.workers: got 99999, expected a whole number from 0 to 1024"),
        ({"decode": {"alpha": 400}}, "decode.alpha: got 400, expected a number from -10 to 10"),
        ({"decode": {"max_length_a": 1e308}}, "decode.max_length_a: got 1e+308, expected a number from 0 to 1000"),
        ({"decode": {"coverage": 1e308}}, "decode.coverage: got 1e+308, expected a number from 0 to 1000"),
        # `run_dir=$OUT` where nothing set OUT; the run would lie in the present folder.
        ({"run_dir": ""}, "run_dir: got an empty text, expected a path"),
        ({"data__root": ""}, "data.root: got an empty text, expected a path"),
        ({"resume": ""}, "resume: got an empty text, expected a path"),
        ({"model": {"task": "image"}}, "model.name: missing, expected a value"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        run_config(values(**settings))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_home_folder_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = run_config(values(run_dir="~/runs/a", data__root="~/images"))
    assert (config.run_dir, config.data.root) == ("/home/somebody/runs/a", "/home/somebody/images")
    assert run_config(values(run_dir=None)).run_dir is None


def numbers(hint):
    """The types of numbers in a setting's type, lengths left out: they bound themselves. Paths are texts."""
    if hint in (int, float) or get_origin(hint) is Annotated:
        return [] if hint in (Length, Moment, FilePath) else [hint]
    return [number for part in get_args(hint) for number in numbers(part)]


BOUNDED = {name: numbers(hint) for name, hint, _ in declared_settings(RunConfig) if numbers(hint)}
BETWEEN = {"optimizer.betas": lambda x: [x, 0.5], "loss_scaling.floors": lambda x: [[0.5, x]]}
LEGAL = {"decode.alpha": (-1, -0.5)}


@pytest.mark.parametrize("setting", BOUNDED)
@pytest.mark.parametrize("number", [-1, -0.5, math.nan, math.inf, -math.inf, "x", 10**400], ids=lambda x: str(x)[:5])
def test_no_number_out_of_range_passes(setting, number):
    given = BETWEEN.get(setting, lambda x: x)(number)
    changed = values(**{setting.replace(".", "__"): given})
    if number in LEGAL.get(setting, ()):
        assert reduce(getattr, setting.split("."), run_config(changed)) == number
        return
    with pytest.raises(UserError, match=rf"^{re.escape(setting)}[^\n]*: got [^\n]*, expected [^\n]*$"):
        run_config(changed)


def test_every_setting_that_is_a_number_has_a_bound():
    assert len(BOUNDED) > 35
    for name, hints in BOUNDED.items():
        assert all(isinstance(get_args(hint)[-1], Bound) for hint in hints), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule__milestones": [30, 60]},
            r"schedule.milestones\[0\]: got 30 without a unit, .*epochs: 30",
        ),
        ({"schedule__milestones": [0.5, 1.0]}, r"schedule.milestones\[1\]: got 1 without a unit"),
        ({"schedule__milestones": [0.6, 0.3]}, r"schedule.milestones: got \[0.6, 0.3\], expected .* ascending"),
        ({"schedule__milestones": [0.6, {"epochs": 5}]}, "schedule.milestones: .* ascending"),
        ({"schedule__milestones": [{"steps": 5}, {"steps": 5}]}, "schedule.milestones: .* ascending"),
        ({"schedule__decay_start": 1}, "schedule.decay_start: got 1 without a unit"),
        ({"schedule__warmup_form": "exponential", "schedule__warmup": 0.1}, "schedule.warmup_start: got 0.0 with"),
        ({"optimizer__nesterov": True, "optimizer__momentum": 0.0}, "optimizer.momentum: got 0.0 with nesterov=true"),
        ({"optimizer__betas": [0.9, 1.0]}, r"optimizer.betas\[1\]: got 1.0, expected a number from 0 to under 1"),
        ({"optimizer__betas": [0.9]}, r"optimizer.betas: got \[0.9\], expected a list of 2 values"),
        ({"optimizer__eps": 0}, "optimizer.eps: got 0, expected a number over 0"),
        ({"schedule__gamma": -0.1}, "schedule.gamma: got -0.1, expected a number from 0 to 1"),
        ({"loss_scaling__window": 0}, "loss_scaling.window: got 0, expected a length over 0"),
        ({"loss_scaling__scale": 1e39}, r"loss_scaling.scale: got 1e\+39, expected a number from 2\^-126 to 2\^126"),
        ({"precision": {"master": {"format": "e5m2"}}}, "precision.master.format: got 'e5m2', expected one of fp16, "),
        ({"precision": {"master": {"format": "e4m3"}}}, "precision.master.format: got 'e4m3'"),
        (
            {"precision": {"master": {"format": "fp16", "scaling": "tensor"}}},
            "precision.master.scaling: got 'tensor', expected none",
        ),
        ({"precision": {"autocast": "bf16"}}, "precision.autocast: got 'bf16' with roles that are rounded"),
        ({"precision": {"error": {"overflow": -math.inf}}}, "precision.error.overflow: got -inf, expected one of inf"),
        ({"precision": {"round_outputs": 1}}, "precision.round_outputs: got 1, expected true or false"),
    ],
)
def test_what_means_nothing_is_refused(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run_config(values(**settings))


@pytest.mark.parametrize(
    "milestones", [[0.3, 0.6], [{"epochs": 3}, {"epochs": 6}], [{"steps": 5}, {"epochs": 0.1}], []]
)
def test_milestones_in_any_unit_are_taken(milestones):
    config = run_config(values(schedule__milestones=milestones))
    assert list(config.schedule.milestones) == milestones
    assert run_config(config.to_dict()) == config


def test_who_may_ignore_a_setting():
    assert UNNAMED < NO_EFFECT
    assert {"trainer.log_every", "experiment", "seed"} <= NO_EFFECT - UNNAMED
    # A resume keeps the seed, and may change when the run ends and how it is scored.
    assert NO_EFFECT - {"seed"} | {"trainer.max_steps", "decode.beam"} <= FREE_SETTINGS
    assert not {"seed", "optimizer.lr", "precision", "trainer.average_checkpoints", "model.size"} & FREE_SETTINGS


def test_the_scale_that_the_recipe_has_for_a_policy_holds_however_the_policy_is_chosen():
    recipe = {"default_loss_scaling": {"image": {"policy": "constant", "scale": 10_000}}}
    for scaling, scale in (({"policy": "auto"}, 10_000), ({"policy": "constant"}, 10_000), ({"policy": "none"}, 1.0)):
        assert run_config(values(precision=recipe) | {"loss_scaling": scaling}).loss_scaling.scale == scale
    chosen = {"policy": "constant", "scale": 7.0}
    assert run_config(values(precision=recipe) | {"loss_scaling": chosen}).loss_scaling.scale == 7.0


def test_an_infinity_is_a_text_where_overflow_is_meant():
    # Hydra reads inf as a number.
    assert run_config(values(precision={"error": {"overflow": math.inf}})).precision.error.overflow == "inf"


def test_the_library_refuses_the_same_recipes():
    fp8 = load_recipe("fp8")
    # A name alone is a pattern for each of its characters.
    refused = [{"master": Rounding("e5m2")}, {"autocast": "bf16"}, {"accumulate": "fp32"}, {"error": "e5m2"}]
    for wrong in (*refused, {"exempt": "fc*"}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"^{name}"):
            replace(fp8, **wrong)
    with pytest.raises(UserError, match=r"^rounding: got 'up', expected one of nearest"):
        Rounding(rounding="up")
    with pytest.raises(UserError, match=r"^precision.accumulate: got 'fp16_mma' .* expected promoted"):
        select_backend("emulate", torch.device("cpu"), "fp16_mma")


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


def test_what_other_libraries_keep_in_hydras_store_is_no_schema_of_ours():
    # So does fairseq when it is imported.
    store = ConfigStore.instance()
    before = copy.deepcopy(store.repo)
    try:
        store.store(name="config", node={"task": "translation"})
        store.store(group="optimizer", name="adam", node={"adam_betas": "(0.9, 0.98)"})
        assert load_recipe("fp8").weight == Rounding()
        assert jobs(["model=transformer", "optimizer=adam"], sweep=False)[0].values["optimizer"]["name"] == "adam"
        assert "adam.yaml" in store.repo["optimizer"]
    finally:
        store.repo = before


def test_a_suggestion_stands_once():
    with pytest.raises(UserError, match=r"^precison: unknown setting, expected one of precision, precision\.name"):
        jobs(["precison=fp8"], sweep=False)
