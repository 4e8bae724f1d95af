"""Tables from run records: means and gaps computed by hand, the paper's figures beside them, and broken records."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8repro.cli import main as cli
from fp8repro.results.comparison import comparison, paper_figures, render
from fp8repro.results.records import read_metrics, read_records
from fp8repro.settings.overrides import jobs
from fp8repro.settings.schema import run_config

SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CONFIGS: dict[tuple[str, ...], dict[str, Any]] = {}


def record(folder: Path, *overrides: str, seed: int = 0, **summary: Any) -> Path:
    """Write a run's folder as training leaves it."""
    if overrides not in CONFIGS:
        (job,) = jobs(overrides, sweep=False)
        CONFIGS[overrides] = run_config(job.values).to_dict()
    config = {**CONFIGS[overrides], "seed": seed}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("")
    values = {
        "status": "finished",
        "model": config["model"]["name"],
        "data": config["data"]["name"],
        "precision": config["precision"]["name"],
        "loss_scaling": config["loss_scaling"]["policy"],
        "profile": config["profile"],
        "seed": seed,
        "backend": "emulate",
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, top1 in enumerate((97.0, 98.0, 99.0)):
        record(tmp_path / f"fp32-{seed}", "precision=fp32", seed=seed, top1=top1, backend="none")
    for seed, top1 in enumerate((97.0, 98.0)):
        record(tmp_path / f"fp8-{seed}", "precision=fp8", seed=seed, top1=top1)
    return tmp_path


def rows_of(root: Path) -> list[Any]:
    records, problems = read_records([root])
    assert not problems
    return comparison(records)


def test_means_spreads_and_gaps_are_those_computed_by_hand(runs: Path) -> None:
    fp32, fp8 = rows_of(runs)
    assert (fp32.precision, fp32.seeds, fp32.seed_list, fp32.mean, fp32.sd) == ("fp32", 3, [0, 1, 2], 98.0, 1.0)
    assert (fp32.gap, fp32.gap_se, fp32.loss_scaling) == (None, None, "none")
    assert (fp8.precision, fp8.seeds, fp8.mean, fp8.loss_scaling) == ("fp8", 2, 97.5, "constant 10,000")
    assert fp8.sd == pytest.approx(0.5**0.5)
    assert fp8.gap == pytest.approx(-0.5)
    # Variances 1 over 3 seeds and 0.5 over 2: sqrt(1/3 + 1/4).
    assert fp8.gap_se == pytest.approx((7 / 12) ** 0.5)
    assert (fp8.paper_fp32, fp8.paper_fp8, fp8.paper_gap) == (69.23, 69.71, 0.48)


def test_a_run_on_digits_never_looks_like_imagenet(runs: Path) -> None:
    record(runs / "imagenet", "precision=fp8", "data=imagenet", top1=69.0)
    rows = rows_of(runs)
    assert [(row.data, row.profile, row.mean) for row in rows] == [
        ("imagenet", "paper", 69.0),
        ("digits", "embedded", 98.0),
        ("digits", "embedded", 97.5),
    ]
    # The FP32 runs on the digits are no baseline for ImageNet.
    assert rows[0].gap is None
    text = render(rows, "text")
    assert "Profiles other than paper ran on other data" in text
    assert "ImageNet-1K validation" in text


def test_a_single_seed_has_no_spread_and_one_seed_done_twice_is_one_seed(tmp_path: Path) -> None:
    record(tmp_path / "a", "precision=fp8", top1=90.0)
    record(tmp_path / "b", "precision=fp8", top1=90.0)
    (row,) = rows_of(tmp_path)
    assert (row.seeds, row.sd, row.gap_se) == (1, None, None)


@pytest.mark.parametrize(
    "setting", ["trainer.epochs=3", "optimizer.lr=0.3", "data.options.shift=1", "model.stem=imagenet", "decode.beam=1"]
)
def test_runs_that_were_trained_or_scored_differently_are_not_averaged(runs: Path, setting: str) -> None:
    record(runs / "other", "precision=fp8", setting, seed=5, top1=50.0)
    fp32, *fp8 = rows_of(runs)
    assert fp32.seeds == 3
    found = {row.settings: row for row in fp8}
    assert found[setting].mean == 50.0
    assert found[setting].gap is None
    (usual,) = (row for name, row in found.items() if name != setting)
    assert (usual.mean, usual.gap) == (97.5, -0.5)
    assert setting.split("=")[0] in usual.settings


def test_settings_that_change_no_result_do_not_split_a_row(runs: Path) -> None:
    record(runs / "other", "precision=fp8", "trainer.log_every=1", "data.workers=2", "logger=none", seed=2, top1=99.0)
    assert [row.seeds for row in rows_of(runs)] == [3, 3]


def test_a_run_that_was_rolled_back_is_a_row_of_its_own_and_one_that_could_have_been_is_not(runs: Path) -> None:
    for seed, rollbacks in ((2, 0), (3, 1)):
        record(
            runs / f"{seed}",
            "precision=fp8",
            "trainer.on_divergence=rollback",
            seed=seed,
            top1=90.0,
            rollbacks=rollbacks,
        )
    found = {row.seed_list[0]: row for row in rows_of(runs)[1:]}
    assert [row.seed_list for row in found.values()] == [[0, 1, 2], [3]]
    assert found[3].settings == "trainer.on_divergence=rollback"


def test_a_changed_recipe_is_a_row_of_its_own_against_the_same_baseline(runs: Path) -> None:
    record(runs / "scale", "precision=fp8", "loss_scaling=constant", "loss_scaling.scale=1000", top1=96.0)
    record(runs / "exempt", "precision=fp8", "precision.exempt=[]", top1=95.0)
    rows = rows_of(runs)[1:]
    assert {(row.loss_scaling, row.mean, row.gap) for row in rows} == {
        ("constant 1,000", 96.0, -2.0),
        ("constant 10,000", 97.5, -0.5),
        ("constant 10,000", 95.0, -3.0),
    }
    assert "precision.exempt=[]" in {row.settings for row in rows}


def test_a_shortened_run_says_so(tmp_path: Path) -> None:
    record(tmp_path / "a", "precision=fp8", "trainer.max_steps=2", top1=10.0)
    (row,) = rows_of(tmp_path)
    assert row.settings == "trainer.max_steps=2"
    assert "trainer.max_steps=2" in render([row], "text")


def test_translation_has_a_table_with_its_signature(tmp_path: Path) -> None:
    scores = {"bleu_signature": SIGNATURE, "chrf": 60.0}
    record(tmp_path / "a", "model=gnmt", "precision=fp32", bleu=85.0, **scores)
    record(tmp_path / "b", "model=gnmt", "precision=fp8", bleu=84.5, **scores)
    record(tmp_path / "c", "precision=fp8", top1=98.0)
    image, fp32, fp8 = rows_of(tmp_path)
    assert (image.metric, fp32.metric, fp8.metric) == ("top1", "bleu", "bleu")
    assert (fp8.gap, fp8.paper_gap, fp8.chrf, fp8.signature) == (-0.5, 0.3, 60.0, SIGNATURE)
    assert fp8.loss_scaling == "enhanced"
    text = render([image, fp32, fp8], "text")
    assert text.index("Top-1 accuracy") < text.index("BLEU (sacreBLEU")
    assert text.count(SIGNATURE) == 1


def test_each_format_holds_the_same_rows(runs: Path) -> None:
    rows = rows_of(runs)
    from_json = json.loads(render(rows, "json"))
    from_csv = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["mean"] for row in from_json] == [98.0, 97.5]
    assert [float(row["mean"]) for row in from_csv] == [98.0, 97.5]
    assert {"model", "data", "precision", "seeds", "mean", "sd", "paper_fp32", "paper_fp8", "gap", "paper_gap"} <= set(
        from_json[0]
    )
    assert list(from_json[0]) == list(from_csv[0])
    table = [line for line in render(rows, "md").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "97.50 ± 0.71" in table[3]
    assert "-0.50 ± 0.76" in table[3]
    assert "+0.48" in table[3]
    aligned = render(rows, "text").splitlines()[2:6]
    assert [line.index("digits") for line in aligned[2:]] == [aligned[0].index("data")] * 2


def test_the_command_prints_and_writes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tables" / "new"
    assert cli.main(["compare", str(runs), "--format", "json", "--out", str(out)]) == 0
    assert capsys.readouterr().out == (out / "comparison.json").read_text()
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.csv", "comparison.json"}
    assert cli.main(["compare", str(runs), "--out", str(runs / "fp8-0" / "summary.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no finished runs\n"


BROKEN = {
    "empty": ("summary.json", ""),
    "truncated": ("summary.json", '{"model": "resnet18", "da'),
    "no mapping": ("summary.json", "[1, 2]"),
    "not text": ("summary.json", b"\xff\xfe\x00{"),
    "deep": ("summary.json", "[" * 100_000),
    "huge": ("summary.json", " " * 2_000_000),
    "foreign": ("summary.json", '{"accuracy": 0.9}'),
    "no score": ("summary.json", '{"top1": null}'),
    "nan": ("summary.json", '{"top1": NaN}'),
    "beyond": ("summary.json", '{"top1": 1e9}'),
    "text score": ("summary.json", '{"top1": "98"}'),
    "true score": ("summary.json", '{"top1": true}'),
    "seed": ("summary.json", '{"seed": "0"}'),
    "failed": ("summary.json", '{"status": "failed"}'),
    "odd status": ("summary.json", '{"status": ["\\n"]}'),
    "config": ("config.yaml", "a: [1, 2"),
    "config list": ("config.yaml", "- 1"),
    "config tag": ("config.yaml", "a: !!python/object/apply:os.system ['true']"),
    "config date": ("config.yaml", "a: 9999-99-99"),
    "config loop": ("config.yaml", "a: &x {b: *x}"),
    "config list loop": ("config.yaml", "a: &x [*x]"),
    "config bomb": (
        "config.yaml",
        "a0: &a0 {x: 1, y: 2}\n" + "\n".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 40)),
    ),
    "config merge bomb": (
        "config.yaml",
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)),
    ),
    "config list bomb": (
        "config.yaml",
        "a0: &a0 [1, 2]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_is_a_line_and_the_others_count(
    runs: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content = BROKEN[kind]
    folder = record(runs / "broken", "precision=fp8", seed=9, top1=1.0)
    if isinstance(content, str) and content.startswith('{"') and content.endswith("}") and kind != "foreign":
        content = json.dumps({**json.loads((folder / name).read_text()), **json.loads(content)})
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert cli.main(["compare", str(runs), "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert [row["seeds"] for row in json.loads(captured.out)] == [3, 2]
    assert captured.err.startswith(f"left out: {folder}: ")
    assert captured.err.count("\n") == 1


def test_an_unfinished_run_is_named_and_a_run_is_not_searched_for_runs(runs: Path) -> None:
    (runs / "fp8-0" / "summary.json").unlink()
    record(runs / "fp8-1" / "checkpoints" / "copy", "precision=fp8", seed=7, top1=1.0)
    records, problems = read_records([runs])
    assert len(records) == 4
    (problem,) = problems
    assert "fp8-0: unfinished" in problem


def test_a_record_without_its_config_still_counts(runs: Path) -> None:
    folder = record(runs / "old", "precision=fp8", seed=3, top1=97.0)
    (folder / "config.yaml").unlink()
    assert sum(row.seeds for row in rows_of(runs)) == 6


def test_the_same_folder_given_twice_counts_once(runs: Path) -> None:
    records, _ = read_records([runs, runs / "fp8-0"])
    assert len(records) == 5


def test_metrics_leave_out_lines_that_a_crash_cut_short(runs: Path) -> None:
    lines = ['{"kind": "eval", "top1": 1}', '{"kind": "train"}', "3", '{"kind": "eval", "top1": 2}', '{"kind": "ev']
    (runs / "fp8-0" / "metrics.jsonl").write_text("\n".join(lines))
    assert [row["top1"] for row in read_metrics(runs / "fp8-0", "eval")] == [1, 2]


def test_the_papers_figures_are_the_ones_of_its_tables() -> None:
    paper = paper_figures()
    figures = {name: (row["fp32"], row["fp8"]) for name, row in paper["figures"].items()}
    assert figures == {
        "resnet18": (69.23, 69.71),
        "resnet34": (72.96, 72.95),
        "resnet50": (75.47, 75.70),
        "gnmt": (24.3, 24.6),
        "transformer": (23.6, 23.0),
    }
    for row in (*paper["figures"].values(), *paper["claims"].values()):
        assert row["mark"] in paper["marks"]
    assert paper["not_recovered"]


@pytest.mark.parametrize("other", [{"bits": 2}, {"bits": 2, "bits_at_first": 1}])
def test_two_versions_of_the_bits_are_not_mixed(runs: Path, other: dict[str, int], capsys: Any) -> None:
    newer = record(runs / "newer", "precision=fp8", seed=5, top1=98.0, **other)
    version = "1, then 2" if "bits_at_first" in other else str(other["bits"])
    old = runs / "fp32-0"
    line = (
        f"fp8repro: runs: got {old} with random bits of version 1 and {newer} with those of version {version}, "
        "expected one version: what differs may be chance\n"
    )
    for command in ([str(runs)], [str(old), str(newer)]):  # a table; two runs side by side
        assert cli.main(["compare", *command]) == 2
        assert capsys.readouterr().err == line
    # Versions that no record names are 1, and those that agree stand beside each other.
    for folder in runs.iterdir():
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"bits_at_first": 1} | other))
    assert cli.main(["compare", str(runs)]) == 0


def test_a_version_that_is_no_number_is_a_broken_record(tmp_path: Path) -> None:
    record(tmp_path / "run", "precision=fp8", top1=98.0, bits="two")
    records, problems = read_records([tmp_path])
    assert not records
    assert problems == [f"{tmp_path / 'run'}: summary.json: bits: got 'two', expected a version's number"]
