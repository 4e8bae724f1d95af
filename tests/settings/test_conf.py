"""conf/ and fp8repro/settings/schema.py fit together: every setting, every default, every choice."""

import itertools
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from fp8repro.fields import convert, declared_settings
from fp8repro.paper.reported import paper_figures
from fp8repro.precision.loss_scaling import make_scaler
from fp8repro.settings.choices import groups
from fp8repro.settings.lengths import UNITS, read_length
from fp8repro.settings.overrides import PROFILES, jobs
from fp8repro.settings.schema import DataConfig, ModelConfig, RunConfig, defaults, run_config
from fp8repro.training.schedule import learning_rate

CONF = Path(__file__).parents[2] / "conf"
GROUPS = groups()
MODELS = GROUPS["model"]


def composed(*overrides: str) -> RunConfig:
    (job,) = jobs(overrides, sweep=False)
    return run_config(job.values)


def primary() -> dict:
    return yaml.safe_load((CONF / "config.yaml").read_text())


def test_the_primary_config_holds_groups_alone() -> None:
    # Values and defaults of single settings are declared in schema.py.
    assert list(primary()) == ["defaults"]


def test_every_setting_has_a_help_and_a_default_that_is_accepted() -> None:
    for name, hint, f in declared_settings(RunConfig):
        if name != "precision":
            assert 5 < len(f.metadata["help"]) < 200, name
            if f.default is not MISSING:
                assert convert(f.default, hint, name) == f.default


def test_every_top_level_setting_is_a_group_or_has_a_default() -> None:
    assert {f.name for f in fields(RunConfig)} <= set(defaults()) | set(GROUPS)


@pytest.mark.parametrize(("group", "settings"), [("model", ModelConfig), ("data", DataConfig)])
def test_models_and_data_write_out_every_setting(group: str, settings: type) -> None:
    optional = {"size", "stem"}
    for path in (CONF / group).glob("*.yaml"):
        written = set(yaml.safe_load(path.read_text()))
        assert {f.name for f in fields(settings)} - optional <= written, path


def test_every_file_begins_with_one_line_that_fits_the_help() -> None:
    for group, choices in GROUPS.items():
        for name, headline in choices.items():
            assert 5 < len(headline) <= 120, (group, name)
            assert not headline.endswith("."), (group, name)


ONE_BY_ONE = [
    (group, choice) for group in GROUPS if group not in ("data", "training", "profile") for choice in GROUPS[group]
]


@pytest.mark.parametrize(("group", "choice"), ONE_BY_ONE)
def test_every_choice_makes_a_run(group: str, choice: str) -> None:
    config = composed(f"{group}={choice}")
    assert config.profile == "embedded"
    if group == "model":
        assert choice.startswith(config.model.name)
    if group in ("precision", "optimizer", "schedule"):
        assert getattr(config, group).name == choice
    if group == "loss_scaling":
        assert config.loss_scaling.policy == {"auto": "constant"}.get(choice, choice)
    if group == "experiment":
        assert config.experiment == choice


@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50", "gnmt", "transformer"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_every_cell_of_the_papers_tables_is_an_experiment(model: str, precision: str) -> None:
    config = composed(f"experiment={model}_{precision}", "profile=paper", "data.root=/data")
    assert (config.model.name, config.precision.name, config.profile) == (model, precision, "paper")
    head = (CONF / "experiment" / f"{model}_{precision}.yaml").read_text()
    figure = paper_figures()["figures"][model][precision]
    assert f"{figure:.2f} % top-1" in head or f"{figure:.1f} BLEU" in head
    assert f"experiment={model}_{precision}" in head


@pytest.mark.parametrize(("model", "profile"), list(itertools.product(MODELS, PROFILES)))
def test_every_model_has_data_and_a_training_recipe_in_every_profile(model: str, profile: str) -> None:
    config = composed(f"model={model}", f"profile={profile}")
    assert config.profile == profile
    names = {
        ("image", "embedded"): "digits",
        ("image", "midscale"): "image_folder",
        ("image", "paper"): "imagenet",
        ("translation", "embedded"): "synthetic_translation",
        ("translation", "midscale"): "parallel_text",
        ("translation", "paper"): "wmt16",
    }
    assert config.data.name == names[config.model.task, profile]


@pytest.mark.parametrize(
    ("data", "profile", "model"),
    [
        ("digits", "embedded", "resnet18"),
        ("imagenet", "paper", "resnet18"),
        ("image_folder", "midscale", "resnet18"),
        ("synthetic_translation", "embedded", "gnmt"),
        ("parallel_text", "midscale", "gnmt"),
        ("fairseq_binary", "midscale", "gnmt"),
        ("wmt16", "paper", "gnmt"),
    ],
)
def test_the_profile_follows_from_the_data(data: str, profile: str, model: str) -> None:
    assert composed(f"model={model}", f"data={data}").profile == profile


@pytest.mark.parametrize("training", GROUPS["training"])
def test_every_training_recipe_sets_each_part_of_training(training: str) -> None:
    written = yaml.safe_load((CONF / "training" / f"{training}.yaml").read_text())
    assert {"optimizer", "schedule", "trainer"} <= set(written)
    assert {"name", "lr"} <= set(written["optimizer"])
    assert {"epochs", "batch_size"} <= set(written["trainer"])
    assert "name" in written["schedule"]


def test_translation_sizes_follow_the_data_unless_the_model_fixes_them() -> None:
    assert composed("model=transformer").model.size["width"] < 512
    assert composed("model=transformer", "data=wmt16").model.size["width"] == 512
    assert composed("model=transformer_base").model.size["width"] == 512
    assert composed("model=gnmt", "data=wmt16").model.size["layers"] == 8
    assert composed("model=gnmt_4layer", "data=wmt16").model.size["layers"] == 4
    assert composed("model=gnmt", "model.size.layers=3").model.size == {
        **composed("model=gnmt").model.size,
        "layers": 3,
    }


def test_imagenet_runs_on_torchvisions_reference_recipe() -> None:
    # torchvision: batch 256, 90 epochs, SGD lr 0.1, momentum 0.9, weight decay 1e-4, a tenth each 30 epochs.
    config = composed("experiment=resnet50_fp8", "profile=paper", "data.root=/data")
    assert (config.trainer.epochs, config.trainer.batch_size, config.trainer.label_smoothing) == (90, 256, 0)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert config.optimizer.weight_decay == 1e-4
    assert [when * 90 for when in config.schedule.milestones] == [30, 60]
    assert config.schedule.gamma == 0.1


def test_the_papers_loss_scaling_is_the_default_of_fp8() -> None:
    images, text = composed("precision=fp8").loss_scaling, composed("model=gnmt", "precision=fp8").loss_scaling
    assert (images.policy, images.scale) == ("constant", 10_000)
    assert (text.policy, text.floors) == ("enhanced", ((0.12, 8192), (0.44, 32768)))
    assert composed("precision=fp32").loss_scaling.policy == "none"
    assert composed("precision=fp8", "loss_scaling.scale=1000").loss_scaling.scale == 1000


def test_a_later_choice_wins_over_the_training_recipe_and_a_value_over_all() -> None:
    recipe = composed().optimizer
    chosen = composed("optimizer=adam").optimizer
    assert (recipe.name, chosen.name, chosen.lr) == ("sgd", "adam", 1e-3)
    assert composed("optimizer=adam", "optimizer.lr=5e-4").optimizer.lr == 5e-4


def test_every_shipped_length_says_its_unit() -> None:
    found = []
    for path in CONF.rglob("*.yaml"):
        sections = [yaml.safe_load(path.read_text())]
        for section in sections:
            sections += [value for value in section.values() if isinstance(value, dict)]
            found += [section[name] for name in ("warmup", "decay_start", "window") if name in section]
            found += section.get("milestones", []) + [when for when, _ in section.get("floors", [])]
    assert len(found) > 25
    for length in found:
        ((unit, number),) = length.items()
        assert unit in UNITS
        assert read_length(length, "") == (length if unit == "epochs" else number)


def test_a_length_replaces_a_length_and_is_not_merged_with_it() -> None:
    gnmt = composed("model=gnmt").schedule
    assert (gnmt.warmup, gnmt.warmup_form) == (0.1, "exponential")
    assert composed("model=gnmt", "schedule=inverse_sqrt").schedule.warmup == 4000
    assert composed("model=gnmt", "schedule=cosine").schedule.warmup == 0
    assert composed("model=gnmt", "data=wmt16", "schedule=constant").schedule.warmup == 0
    for written, warmup in (("{steps: 5}", 5), ("{epochs: 2}", {"epochs": 2}), ("0.2", 0.2), ("7", 7)):
        assert composed("model=gnmt", "schedule=gnmt", f"schedule.warmup={written}").schedule.warmup == warmup
    assert composed("loss_scaling=dynamic", "loss_scaling.window={steps: 9}").loss_scaling.window == 9


def test_a_saved_config_makes_the_same_run() -> None:
    for overrides in (["precision=fp8"], ["model=gnmt", "precision=fp8_hybrid"]):
        config = composed(*overrides)
        assert run_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def rates(config: RunConfig, total: int, at: list[float]) -> list[float]:
    """Learning rates at some shares of a run."""
    steps = [round(share * total) for share in at]
    return [learning_rate(config.schedule, config.optimizer.lr, s, total, config.trainer.epochs) for s in steps]


def test_shipped_schedules_are_those_of_their_publications() -> None:
    at = [0.0, 0.05, 0.1, 0.33, 0.34, 0.55, 0.66, 0.67, 0.99]
    imagenet = composed("experiment=resnet50_fp8", "profile=paper", "data.root=/data")
    assert rates(imagenet, 450_450, at) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001])
    # A tenth of warm-up, then half a cosine: 0.05 * (1 + cos(pi * (0.55 - 0.1) / 0.9)) / 2 is half of it.
    digits = composed("experiment=resnet18_fp8")
    assert rates(digits, 1000, [0.0, 0.05, 0.1, 0.55]) == pytest.approx([0.0, 0.025, 0.05, 0.025])
    # sqrt(4000 / step) after 4,000 steps.
    transformer = composed("experiment=transformer_fp8", "profile=paper", "data.root=/data")
    assert rates(transformer, 100_000, [0.0, 0.02, 0.04, 0.16, 0.64]) == pytest.approx(
        [1e-7, 3.5005e-4, 7e-4, 3.5e-4, 1.75e-4], rel=1e-4
    )
    # 200 steps from a hundredth; four halvings from 66.6 % on, each 8.35 % of the run.
    gnmt = composed("experiment=gnmt_fp8", "profile=paper", "data.root=/data")
    assert rates(gnmt, 10_000, [0.0, 0.01, 0.02, 0.66, 0.667, 0.76, 0.85, 0.93, 0.99]) == pytest.approx(
        [2e-5, 2e-4, 2e-3, 2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4]
    )
    scaler = make_scaler(gnmt.loss_scaling, 20_000, gnmt.trainer.epochs)
    assert (scaler.window, scaler.floors) == (200, ((0, 1.0), (2400, 8192), (8800, 32768)))
