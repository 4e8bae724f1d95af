"""Verdicts: the test against scipy's own, and each outcome from records whose figures are chosen here."""

import json
import re
from pathlib import Path

import pytest
from scipy import stats
from study_records import STEPS, lengthen, write_run

from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.paired import FAILS, HOLDS, UNDECIDABLE, UNDECIDED, difference
from fp8repro.results.verdicts import Verdict, overall, verdict_sheet, verdicts


def found(root: Path, claim: str) -> list[Verdict]:
    cells, _, _ = read_cells([root])
    return [verdict for verdict in verdicts(cells["embedded"], "embedded") if verdict.claim == claim]


def test_the_difference_and_its_bound_are_those_of_a_paired_t_test() -> None:
    a, b = {0: 97.0, 1: 98.5, 2: 96.0, 3: 97.5}, {0: 96.0, 1: 98.0, 2: 96.5, 3: 95.0, 9: 10.0}
    gap = difference(a, b)
    oracle = stats.ttest_rel([a[s] for s in range(4)], [b[s] for s in range(4)])
    assert gap is not None
    assert gap.half_width is not None
    assert gap.se is not None
    assert gap.mean / gap.se == pytest.approx(oracle.statistic)
    assert gap.mean - gap.half_width == pytest.approx(oracle.confidence_interval(0.90).low)
    assert gap.seeds == 4


def test_nothing_recorded_is_nothing_decided() -> None:
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert {verdict.verdict for verdict in verdicts(Cells(), "embedded")} == {UNDECIDED}


def accuracy(root: Path, fp32: list[float], fp8: list[float]) -> Verdict:
    for name, scores in (("resnet18_fp32", fp32), ("resnet18_fp8", fp8)):
        for seed, score in enumerate(scores):
            write_run(root, name, seed, score=score)
    return found(root, "C1")[0]


@pytest.mark.parametrize(
    ("fp32", "fp8", "outcome"),
    [
        ([98.0, 98.2, 98.4], [97.9, 98.2, 98.2], HOLDS),
        ([98.0, 98.2, 98.4], [95.0, 95.1, 95.5], FAILS),
        ([98.0, 98.2, 98.4], [95.0, 99.0, 98.0], UNDECIDED),
        ([98.0, 98.2], [98.0, 98.2], UNDECIDED),
    ],
)
def test_accuracy(tmp_path: Path, fp32: list[float], fp8: list[float], outcome: str) -> None:
    verdict = accuracy(tmp_path, fp32, fp8)
    assert verdict.verdict == outcome
    assert ("the first look is at 3 seeds" in verdict.evidence) == (len(fp32) < 3)
    assert verdict.wants == (("resnet18_fp8", "resnet18_fp32") if outcome == UNDECIDED else ())


def test_a_verdict_says_its_looks_its_level_and_its_power(tmp_path: Path) -> None:
    verdict = accuracy(tmp_path, [98.0, 98.2, 98.4], [95.0, 99.0, 98.0])
    assert verdict.looks == "1 of 3 (at 3, 6, 12 seeds)"
    # Three models, each of which alone refutes the claim.
    assert verdict.level == "0.0198; against it 0.006"
    # Differences -3.0, 0.8 and -0.4.
    deviation = 1.93
    power = stats.nct.sf(stats.t.isf(0.0198, 11), 11, 1 / deviation * 12**0.5)
    assert verdict.power == f"{100 * power:.0f} % at 12 seeds for a true 0"
    assert re.search(r"bounds -\d\.\d\d and \+\d\.\d\d; as it stands, it would take over 1,000 seeds", verdict.evidence)


def test_the_look_that_decided_stands_whatever_came_after(tmp_path: Path) -> None:
    first = accuracy(tmp_path / "3", [98.0, 98.2, 98.4], [98.0, 98.2, 98.5])
    later = accuracy(tmp_path / "6", [98.0, 98.2, 98.4, 98, 98, 98], [98.0, 98.2, 98.5, 80, 80, 80])
    assert first.verdict == HOLDS
    assert later == first


def test_after_the_last_look_it_cannot_be_decided(tmp_path: Path) -> None:
    verdict = accuracy(tmp_path, [98.0] * 12, [99.5, 95.5] * 6)
    assert (verdict.verdict, verdict.wants) == (UNDECIDABLE, ())
    assert verdict.looks.startswith("3 of 3")


def test_margins_are_those_of_the_profile(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0, 98.2, 98.4], [97.4, 97.6, 97.81])
    cells, _, _ = read_cells([tmp_path])
    of_embedded, of_paper = (verdicts(cells["embedded"], profile)[0] for profile in ("embedded", "paper"))
    assert (of_embedded.statement, of_embedded.verdict) == ("resnet18: FP8 is as good as FP32", HOLDS)
    assert (of_paper.statement, of_paper.verdict) == ("resnet18: FP8 is as good as FP32", FAILS)
    assert "above -1 points of top-1" in of_embedded.test
    assert "above -0.5 points of top-1" in of_paper.test
    notes = " ".join(verdict_sheet({"embedded": [], "paper": []}).notes)
    assert (
        "profile=embedded: no difference is one within 1.0 points of top-1 or BLEU; looks after 3, 6, 12 seeds" in notes
    )
    assert (
        "profile=paper: no difference is one within 0.5 points of top-1 or BLEU; looks after 3, 6, 12, 24 se" in notes
    )


def test_a_claim_needs_all_its_models(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0, 98.2, 98.4], [98.0, 98.2, 98.4])
    assert overall("C1", found(tmp_path, "C1")) == UNDECIDED
    for seed in range(3):
        write_run(tmp_path, "resnet34_fp32", seed, score=98.0)
        write_run(tmp_path, "resnet34_fp8", seed, score=90.0)
    assert overall("C1", found(tmp_path, "C1")) == FAILS


def test_a_failed_run_is_not_passed_over(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0, 98.2, 98.4], [98.0, 98.2])
    write_run(tmp_path, "resnet18_fp8", 2, status="failed", reason="every step was skipped")
    (verdict, *_) = found(tmp_path, "C1")
    assert (verdict.verdict, verdict.evidence) == (UNDECIDED, "resnet18_fp8: failed, seed 2: every step was skipped")


def test_runs_that_were_trained_differently_are_not_compared(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0, 98.2, 98.4], [98.0, 98.2, 98.4])
    for folder in (tmp_path / "embedded").glob("resnet18_fp8-*"):
        lengthen(folder)
    (verdict, *_) = found(tmp_path, "C1")
    assert verdict.verdict == UNDECIDED
    assert "differ in more than precision" in verdict.evidence


def test_underflow_must_fall_with_the_scale_in_every_seed(tmp_path: Path) -> None:
    for seed in range(2):
        for name in ("fp8_scale_1", "fp8_scale_1000", "fp8_scale_4000", "resnet18_fp8"):
            write_run(tmp_path, name, seed)
    assert found(tmp_path, "C4")[0].verdict == HOLDS
    # The second seed's run at 4,000 takes the first figures of scale 1.
    worse = tmp_path / "embedded" / "fp8_scale_4000-seed1" / "metrics.jsonl"
    worse.write_text((tmp_path / "embedded" / "fp8_scale_1-seed1" / "metrics.jsonl").read_text())
    assert found(tmp_path, "C4")[0].verdict == FAILS


# Window of 1 % of 160 steps: the scale doubles every other good step. 60 skips bring it from 2^24 to under 32,768.
COLLAPSE = tuple(range(100, 120))


def test_the_floor_is_judged_only_where_every_seed_met_it(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "gnmt_fp8", seed, skips=COLLAPSE)
        write_run(tmp_path, "gnmt_fp8_dynamic", seed, skips=COLLAPSE)
    keeps_up, as_good = found(tmp_path, "C5")
    assert (keeps_up.verdict, as_good.verdict) == (HOLDS, HOLDS)
    write_run(tmp_path, "gnmt_fp8", 3)
    write_run(tmp_path, "gnmt_fp8_dynamic", 3, skips=COLLAPSE)
    assert [verdict.verdict for verdict in found(tmp_path, "C5")] == [UNDECIDABLE, UNDECIDABLE]
    assert ", 0 (one figure a seed)" in found(tmp_path, "C5")[0].evidence


def test_the_loss_scale_is_followed_to_the_recorded_values_or_not_at_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "gnmt_fp8", skips=COLLAPSE)
    cells, _, _ = read_cells([tmp_path])
    replay = cells["embedded"]["gnmt_fp8"].runs[0].loss_scale
    assert replay is not None
    assert len(replay.scale) == STEPS
    # From 2^24 four halvings reach the floor of 2^20; each one after them meets it.
    assert replay.skipped == list(COLLAPSE)
    assert replay.met_floor == list(COLLAPSE)[4:]
    assert replay.scale[COLLAPSE[-1]] == 2**20
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"loss_scale": [^,]+', '"loss_scale": 3.0', text, count=1))
    cells, _, _ = read_cells([tmp_path])
    assert cells["embedded"]["gnmt_fp8"].runs[0].loss_scale is None


def test_rounding_is_judged_with_both_masters(tmp_path: Path) -> None:
    for seed in range(3):
        for name in ("fp8_nearest", "fp8_stochastic", "fp8_nearest_fp32_master", "fp8_stochastic_fp32_master"):
            write_run(tmp_path, name, seed)
    by_statement = {verdict.statement: verdict.verdict for verdict in found(tmp_path, "C6")}
    assert by_statement == {
        "FP16 masters: nearest has the larger validation error": HOLDS,
        "FP16 masters: nearest ends with the larger L2 loss": HOLDS,
        "FP32 masters: nearest has the larger validation error": HOLDS,
        "FP32 masters: nearest ends with the larger L2 loss": HOLDS,
    }
    assert all(f"({3} seeds)" in verdict.evidence for verdict in found(tmp_path, "C6"))


def test_bytes_are_judged_against_fp32(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0], [98.0])
    masters, saved, _ = found(tmp_path, "C7")
    assert (masters.verdict, masters.evidence, saved.verdict, saved.evidence) == (
        HOLDS,
        "0.500 (1 seed)",
        HOLDS,
        "0.250 (1 seed)",
    )
    path = tmp_path / "embedded" / "resnet18_fp8-seed0" / "metrics.jsonl"
    path.write_text(path.read_text().replace(str(2**24), str(2**25)))
    assert found(tmp_path, "C7")[1].verdict == FAILS


def test_a_layer_that_is_not_e5m2_in_a_role_is_noticed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "resnet18_fp8")
    assert found(tmp_path, "C3")[0].verdict == UNDECIDED
    for model in ("resnet34", "resnet50", "gnmt", "transformer"):
        write_run(tmp_path, f"{model}_fp8")
    assert found(tmp_path, "C3")[0].verdict == HOLDS
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("gradient e5m2", "gradient fp16", 1))
    assert found(tmp_path, "C3")[0].verdict == FAILS
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        if row["kind"] == "telemetry":
            row["rows"] = [entry for entry in row["rows"] if entry["role"] != "error"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(tmp_path, "C3")[0].verdict == FAILS
    # Nothing was counted, so nothing was found wrong.
    rows = [row for row in rows if row["kind"] != "telemetry"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (verdict,) = found(tmp_path, "C3")
    assert (verdict.verdict, "without telemetry: resnet18" in verdict.evidence) == (UNDECIDED, True)


def test_small_data_never_speaks_for_the_papers_scale(tmp_path: Path) -> None:
    accuracy(tmp_path, [98.0, 98.2, 98.4], [98.0, 98.2, 98.4])
    cells, _, _ = read_cells([tmp_path])
    sheet = verdict_sheet({"embedded": verdicts(cells["embedded"], "embedded")})
    assert {row["paper"] for row in sheet.rows} == {UNDECIDED}
    assert [row["claim"] for row in sheet.rows] == ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]


def saved_bytes(folder: Path, factor: float) -> None:
    """Scale what a run recorded of its memory."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "memory":
            row["master_bytes"] *= factor
            row["saved_for_backward_bytes"] *= factor
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_bytes_are_paired_by_seed_and_not_by_place(tmp_path: Path) -> None:
    for name, seeds in (("resnet18_fp32", (0, 1, 2)), ("resnet18_fp8", (1, 2, 3))):
        for seed in seeds:
            write_run(tmp_path, name, seed)
            # A seed of twice the size, in both: paired by place, it would be held against one of half its size.
            saved_bytes(tmp_path / "embedded" / f"{name}-seed{seed}", 2.0 if seed == 2 else 1.0)
    masters, saved, _ = found(tmp_path, "C7")
    assert (masters.verdict, masters.evidence) == (HOLDS, "0.500 (2 seeds)")
    assert (saved.verdict, saved.evidence) == (HOLDS, "0.250 (2 seeds)")


def test_bytes_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "resnet18_fp32", 0)
    write_run(tmp_path, "resnet18_fp8", 1)
    masters, _, _ = found(tmp_path, "C7")
    assert (masters.verdict, masters.evidence) == (UNDECIDED, "no common seed with this figure")


def test_a_cell_whose_runs_all_failed_is_called_failed(tmp_path: Path) -> None:
    why = "every step was skipped"
    write_run(tmp_path, "resnet18_fp8", 0, status="failed", reason=why)
    write_run(tmp_path, "gnmt_fp8", 0, status="failed", reason=why)
    write_run(tmp_path, "fp8_scale_1", 0)
    said = f"resnet18_fp8: failed, seed 0: {why}"
    (first, *_) = found(tmp_path, "C1")
    assert first.evidence == f"resnet18_fp32: not run; {said}"
    (bytes_kept, *_) = found(tmp_path, "C7")
    assert bytes_kept.evidence == f"resnet18_fp32: not run; {said}"
    (falling, *_) = found(tmp_path, "C4")
    assert falling.evidence == f"fp8_scale_1000: not run; fp8_scale_4000: not run; {said}"
    (floor, *_) = found(tmp_path, "C5")
    assert floor.evidence == f"gnmt_fp8_dynamic: not run; gnmt_fp8: failed, seed 0: {why}"
    (converted,) = found(tmp_path, "C3")
    assert said in converted.evidence
    assert converted.verdict == UNDECIDED


def test_a_figure_that_was_not_finite_at_the_end_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path, "fp8_nearest", 0)
    path = tmp_path / "embedded" / "fp8_nearest-seed0" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in reversed(rows) if row["kind"] == "train")["l2"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells, _, _ = read_cells([tmp_path])
    assert cells["embedded"]["fp8_nearest"].figures("l2") == {}


def test_a_seed_that_ran_twice_counts_once_and_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "resnet18_fp32", 0, score=98.0)
    write_run(tmp_path / "b", "resnet18_fp32", 0, score=50.0)
    cells, _, _ = read_cells([tmp_path])
    cell = cells["embedded"]["resnet18_fp32"]
    assert cell.figures("score") == {0: 98.0}
    assert cell.left_out == ["resnet18_fp32: seed 0 again in resnet18_fp32-seed0"]
