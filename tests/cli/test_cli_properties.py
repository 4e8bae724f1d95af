"""Whatever is asked on the command line: a run, an answer or one line. Never a traceback."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from fuzzing import changed
from hypothesis import HealthCheck, given, settings
from training_tools import tiny_config, use_tiny_network

from fp8repro.cli import main as cli
from fp8repro.errors import RunFailure, UserError
from fp8repro.precision.loss_scaling import make_scaler
from fp8repro.settings.choices import groups
from fp8repro.settings.overrides import _keys, jobs
from fp8repro.settings.schema import RunConfig, run_config
from fp8repro.training import train
from fp8repro.training.tasks.translation import MODELS

EXAMPLES = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(EXAMPLES, max_examples=1000)

GROUPS = groups()
VALUES = dict(jobs([], sweep=False)[0].values)
KEYS = [key for key in _keys(VALUES) if not key.startswith("profile_data")]
# Characters that mean something to Hydra, YAML, a shell or a file system.
odd_text = st.text(st.sampled_from("ab0 .,:;=+~-_/\\'\"[]{}()$#@*?!\t\u00e9\u4e2d\U0001f600\x00\x1b"), max_size=12)
numbers = st.integers(-3, 3) | st.sampled_from([10**30, -(2**63)]) | st.floats()
value = st.one_of(
    numbers.map(str),
    st.sampled_from(
        ["null", "true", "false", "nan", "inf", "-inf", "", "[]", "{}", "[1,2]", "{a:1}", "${seed}", "..", "1,2"]
    ),
    st.sampled_from(["${oc.env:HOME}", "${missing}", "???", "range(3)", "choice(1,2)", "interval(0,1)", "int(x)"]),
    odd_text,
)
choice = st.sampled_from(sorted(GROUPS)).flatmap(
    lambda group: st.tuples(st.just(group), st.sampled_from(sorted(GROUPS[group])) | value).map("=".join)
)
setting = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS) | odd_text, value).map(
    lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
)
override = choice | setting | setting | odd_text


def outcome(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code and what was printed; a traceback comes out as the exception that it is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def check(arguments: list[str]) -> None:
    code, out, err = outcome(arguments)
    assert code in (0, 2)
    if code == 2:
        assert err.startswith("fp8repro: ")
        assert err.count("\n") == 1
        assert out == ""
    assert "Traceback" not in err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FP8REPRO_DEBUG", raising=False)


command_lines = st.tuples(
    st.just(["train", "--cfg", "job"]), st.sampled_from([[], ["-m"]]), st.lists(override, max_size=4)
)


@EXAMPLES
@given(command_lines)
def test_any_overrides_make_settings_or_one_line(parts: tuple[list[str], list[str], list[str]]) -> None:
    check([argument for part in parts for argument in part])
    assert not list(Path().iterdir()), "nothing is written"


@pytest.mark.long
@LONG
@given(command_lines)
def test_a_thousand_overrides_make_settings_or_one_line(parts: tuple[list[str], list[str], list[str]]) -> None:
    check([argument for part in parts for argument in part])


@EXAMPLES
@given(
    st.sampled_from(["compare", "doctor", "evaluate", "reproduce --dry-run"]),
    st.lists(override, min_size=1, max_size=2),
)
def test_any_arguments_of_the_other_verbs(verb: str, arguments: list[str]) -> None:
    # What is not there cannot be looked at; what comes out is one line or a table of nothing.
    code, _, err = outcome([*verb.split(), *arguments])
    assert code in (0, 1, 2)
    assert "Traceback" not in err


@settings(EXAMPLES, max_examples=400)
@given(changed(VALUES))
def test_any_configuration_is_read_or_refused(values: Any) -> None:
    try:
        config = run_config(values)
    except UserError:
        return
    assert isinstance(config, RunConfig)
    # A config.yaml says the same again.
    assert run_config(config.to_dict()).to_dict() == config.to_dict()


def written(value: Any) -> str:
    """A value of `--cfg job` as it stands on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("base", [["model=resnet18"], ["model=gnmt", "precision=fp8_hybrid"]])
def test_every_setting_that_is_printed_can_be_set_as_it_is_printed(base: list[str]) -> None:
    def configuration(*further: str) -> dict[str, Any]:
        return run_config(jobs([*base, *further], sweep=False)[0].values).to_dict()

    printed = configuration()
    settings_of = {}
    for key in _keys(printed):
        place: Any = printed
        for part in key.split("."):
            place = place[part]
        settings_of[key] = written(place)
    assert len(settings_of) > 80
    assert configuration(*(f"{key}={value}" for key, value in settings_of.items())) == printed
    # Alone they mean the same.
    for key in ("precision.error.subnormal_rounding", "precision.master.overflow", "loss_scaling.policy"):
        assert configuration(f"{key}={settings_of[key]}") == printed, key


def test_a_length_takes_a_unit_on_the_command_line() -> None:
    lengths = ["schedule.name=step", "schedule.warmup={steps: 5}", "schedule.milestones=[{epochs: 3}, {epochs: 6}]"]
    lengths += ["loss_scaling=enhanced", "loss_scaling.window={steps: 7}", "loss_scaling.floors=[[{epochs: 1}, 8192]]"]
    config = run_config(jobs(lengths, sweep=False)[0].values)
    assert (config.schedule.warmup, config.schedule.milestones) == (5, ({"epochs": 3}, {"epochs": 6}))
    assert (config.loss_scaling.window, config.loss_scaling.floors) == (7, (({"epochs": 1}, 8192),))
    scaler = make_scaler(config.loss_scaling, 120, config.trainer.epochs)
    assert (scaler.window, scaler.floors[1:]) == (7, ((10, 8192),))


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("gnmt", "dropout=1.0", "model.size.dropout: got 1.0, expected a number from 0 to under 1"),
        ("gnmt", "dropout=nan", "model.size.dropout: got nan"),
        ("gnmt", "layers=0", "model.size.layers: got 0, expected at least 2"),
        ("gnmt", "width=-4", "model.size.width: got -4"),
        ("gnmt", "init_range=nan", "model.size.init_range: got nan, expected a number over 0"),
        ("transformer", "dropout=-0.1", "model.size.dropout: got -0.1"),
        ("transformer", "attention_dropout=1", "model.size.attention_dropout: got 1"),
        ("transformer", "heads=5", "model.size.width: got 128, expected a multiple of 2 * heads = 10"),
        ("transformer", "encoder_layers=0", "model.size.encoder_layers: got 0"),
        ("transformer", "layers=2", "model.size.layers: unknown setting"),
    ],
)
def test_a_size_that_makes_no_model_is_one_line(model: str, size: str, message: str) -> None:
    config = run_config(jobs([f"model={model}", f"model.size.{size}"], sweep=False)[0].values)
    with pytest.raises(UserError) as caught:
        MODELS[model](100, 1, 2, **config.model.size)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


small = st.integers(-2, 5)
real = st.one_of(small, st.floats(0, 2), st.sampled_from([1e-30, 1e30, float("nan"), float("inf")]))
TRAINED = {
    "trainer.epochs": real,
    "trainer.batch_size": st.integers(-1, 2000),
    "trainer.micro_steps": small,
    "trainer.eval_batch_size": small,
    "trainer.label_smoothing": real,
    "trainer.clip_norm": real,
    "trainer.log_every": small,
    "trainer.telemetry_every": small,
    "trainer.keep_checkpoints": small,
    "trainer.checkpoint_every_steps": small,
    "trainer.max_skipped_in_a_row": small,
    "trainer.on_divergence": st.sampled_from(["stop", "rollback"]),
    "trainer.max_rollbacks": small,
    "optimizer.lr": real,
    "optimizer.momentum": real,
    "optimizer.nesterov": st.booleans(),
    "optimizer.name": st.sampled_from(["sgd", "adam", "adamw"]),
    "optimizer.betas": st.lists(real, max_size=3),
    "optimizer.eps": real,
    "schedule.name": st.sampled_from(["constant", "cosine", "step", "inverse_sqrt", "gnmt"]),
    "schedule.warmup": real,
    "schedule.milestones": st.lists(real, max_size=3),
    "schedule.gamma": real,
    "schedule.decay_start": real,
    "schedule.decay_count": small,
    "loss_scaling.policy": st.sampled_from(["none", "constant", "dynamic", "enhanced"]),
    "loss_scaling.scale": real,
    "loss_scaling.factor": real,
    "loss_scaling.window": real,
    "loss_scaling.min_scale": real,
    "loss_scaling.max_scale": real,
    "loss_scaling.floors": st.lists(st.lists(real, max_size=3), max_size=2),
    "seed": st.integers() | st.just(2**64),
    "data.image_size": st.none() | small,
    "data.workers": st.just(0) | st.just(-1),
    "precision.error.format": st.sampled_from(["e5m2", "e4m3", "fp16", "fp32"]),
    "precision.master.rounding": st.sampled_from(["nearest", "stochastic", "toward_zero"]),
    "precision.exempt": st.lists(st.sampled_from(["0", "10", "nothing", "[", ""]), max_size=2),
}


@EXAMPLES
@given(
    st.dictionaries(st.sampled_from(sorted(TRAINED)), st.none(), min_size=1, max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: TRAINED[name] for name in chosen})
    )
)
def test_any_settings_train_or_fail_with_one_line(chosen: dict[str, Any]) -> None:
    values = tiny_config("run", "fp8", max_steps=2, epochs=1).to_dict() | {"overwrite": True}
    for name, given_value in chosen.items():
        *path, last = name.split(".")
        place = values
        for part in path:
            place = place[part]
        place[last] = given_value
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        use_tiny_network(patch)
        try:
            summary = train(run_config(values))
        except (UserError, RunFailure):
            return
    assert summary["status"] == "finished"
    assert summary["steps"] >= 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
