"""The dose-response study: needed scales by hand, each outcome, and the figure."""

import csv
import io
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from study_records import write_run

from fp8repro.numerics.formats import FP16
from fp8repro.paper.plan import plan_file
from fp8repro.results import doses
from fp8repro.results.cells import Cells, read_cells
from fp8repro.results.figures import dose_response, figures
from fp8repro.results.lost import errors, lost_share
from fp8repro.results.paired import FAILS, HOLDS, UNDECIDABLE, UNDECIDED
from fp8repro.results.verdicts import OCTAVES, Verdict, verdicts

SCALES = plan_file()["studies"]["doses"]["scales"]
# Where a curve falls, as a power of two.
EXPECTED = {"dose_nearest": -6.0, "dose_subnormal": -6.0, "dose_stochastic": -9.0, "dose_fp16": -14.0}


def write_doses(root: Path, falls: dict[str, float] = EXPECTED, seeds: int = 3) -> Path:
    """Runs whose accuracy falls from 98 % in a straight line, 5 points an octave, under the named power."""
    write_run(root, "dose_reference")
    for curve, fall in falls.items():
        for power in SCALES[curve]:
            for seed in range(seeds):
                # Each seed's curve lies a little aside.
                lost = max(0.0, 5 * (fall + 0.1 * seed - power + 1))
                write_run(root, f"{curve}@2^{power}", seed, score=98.0 - min(lost, 80.0))
    return root


def read(root: Path) -> Cells:
    cells, _, _ = read_cells([root])
    return cells["embedded"]


def statements(cells: Cells) -> dict[str, Verdict]:
    return {verdict.statement: verdict for verdict in verdicts(cells, "embedded") if verdict.claim == "C4"}


LARGER = "E5M2 to nearest needs a larger loss scale than FP16"
NOT_LESS, NOT_MORE = "by eight octaves, not less", "by eight octaves, not more"
SUBNORMAL = "its subnormal range alone makes it need as much"
STOCHASTIC = "stochastic rounding needs less"


def test_the_needed_scale_is_where_the_curve_falls_five_points() -> None:
    # The plateau is 98; 93 lies between 96 at 2^0 and 88 at 2^-2.
    assert doses.needed_power({10: 98.0, 4: 98.0, 0: 96.0, -2: 88.0, -6: 95.0}) == pytest.approx(-0.75)
    assert doses.needed_power({10: 98.0, 4: 97.0, 0: 96.0}) is None
    assert doses.needed_power({4: 98.0, 0: 98.0, -3: 10.0}) == pytest.approx(-3 + 3 * 83 / 88)
    # A point within the fall is no part of the plateau, though it is within the drop: else the scale were 0.17 less.
    assert doses.needed_power({10: 98.0, 4: 98.0, 0: 94.0, -2: 82.0}) == pytest.approx(-2 + 2 * 11 / 12)


def test_the_statements_hold_where_the_curves_lie_as_expected(tmp_path: Path) -> None:
    cells = read(write_doses(tmp_path))
    fp16, nearest = (doses.needs(cells, curve) for curve in ("dose_fp16", "dose_nearest"))
    assert fp16[0] == -14
    assert {seed: power + 8 for seed, power in fp16.items()} == pytest.approx(nearest)
    found = statements(cells)
    assert OCTAVES == 8
    assert {text: found[text].verdict for text in (LARGER, NOT_LESS, NOT_MORE, SUBNORMAL, STOCHASTIC)} == dict.fromkeys(
        (LARGER, NOT_LESS, NOT_MORE, SUBNORMAL, STOCHASTIC), HOLDS
    )
    assert "dose_nearest - dose_fp16: +8.00" in found[LARGER].evidence
    assert re.search(r"dose_nearest - dose_fp16 -8: [+-]0\.00 ", found[NOT_LESS].evidence)


@pytest.mark.parametrize(
    ("change", "refuted"),
    [
        ({"dose_fp16": -8.0}, {NOT_LESS}),
        ({"dose_fp16": -16.0}, {NOT_MORE}),
        (dict(zip(EXPECTED, (-8.0, -8.0, -9.5, -5.0), strict=True)), {LARGER, NOT_LESS}),
        ({"dose_subnormal": -8.0}, {SUBNORMAL}),
        ({"dose_stochastic": -3.0}, {STOCHASTIC}),
    ],
)
def test_each_statement_can_be_refuted(tmp_path: Path, change: dict[str, float], refuted: set[str]) -> None:
    found = statements(read(write_doses(tmp_path, EXPECTED | change)))
    assert {text for text, verdict in found.items() if verdict.verdict == FAILS} == refuted


def test_a_curve_without_all_of_its_points_decides_nothing(tmp_path: Path) -> None:
    cells = read(write_doses(tmp_path))
    del cells["dose_fp16@2^-17"]
    found = statements(cells)
    assert (found[LARGER].verdict, found[LARGER].evidence) == (UNDECIDED, "not run: dose_fp16@2^-17")
    assert found[STOCHASTIC].verdict == HOLDS
    write_run(tmp_path, "dose_nearest@2^-2", 3, status="failed", reason="it broke off")
    found = statements(read(tmp_path))
    assert found[STOCHASTIC].evidence == "dose_nearest@2^-2: failed, seed 3: it broke off"


def test_too_few_seeds_decide_nothing_and_all_planned_ones_may_not_either(tmp_path: Path) -> None:
    found = statements(read(write_doses(tmp_path / "few", seeds=2)))
    for text in (LARGER, NOT_LESS, NOT_MORE, SUBNORMAL, STOCHASTIC):
        assert found[text].verdict == UNDECIDED
        assert found[text].evidence.endswith("the first look is at 3 seeds")
        assert found[text].wants
    # FP16's falls are all over the place; the others go on to hold.
    root = write_doses(tmp_path / "all", seeds=12)
    for seed in range(12):
        for power in SCALES["dose_fp16"]:
            folder = root / "embedded" / f"dose_fp16@2^{power}-seed{seed}"
            summary = json.loads((folder / "summary.json").read_text())
            lost = max(0.0, 5 * (-14 + 0.1 * seed + 2.4 * (-1) ** seed - power + 1))
            (folder / "summary.json").write_text(json.dumps(summary | {"top1": 98.0 - min(lost, 80.0)}))
    found = statements(read(root))
    assert {text: found[text].verdict for text in (LARGER, NOT_LESS, SUBNORMAL)} == {
        LARGER: HOLDS, NOT_LESS: UNDECIDABLE, SUBNORMAL: HOLDS,
    }  # fmt: skip
    assert re.search(r"it would take about \d+ seeds", found[NOT_LESS].evidence)
    assert found[NOT_LESS].looks.startswith("3 of 3")
    assert found[NOT_LESS].power


def test_a_curve_that_does_not_fall_is_not_left_out(tmp_path: Path) -> None:
    write_doses(tmp_path)
    for power in SCALES["dose_stochastic"]:
        folder = tmp_path / "embedded" / f"dose_stochastic@2^{power}-seed1"
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"top1": 97.0}))
    found = statements(read(tmp_path))
    assert found[STOCHASTIC].verdict == UNDECIDABLE
    assert found[STOCHASTIC].evidence == "no fall of 5 points at any scale: dose_stochastic, seed 1"
    assert found[LARGER].verdict == HOLDS


def test_figure_and_table_show_the_scales_and_what_they_lose(tmp_path: Path) -> None:
    cells = read(write_doses(tmp_path))
    figure = dose_response(cells, "embedded")
    points = list(csv.DictReader(io.StringIO(figure.csv())))
    label = doses.CURVES["dose_fp16"]
    (point,) = (p for p in points if p["panel"] == "by loss scale" and p["series"] == label and p["x"] == "-14.0")
    # 5 points lost, less half a point a seed.
    assert (float(point["y"]), float(point["spread"])) == pytest.approx((92.5, 0.5))
    assert "(3 a point)" in figure.caption
    # One seed has no deviation: no bar in the figure, nothing in the table.
    single = dose_response(read(write_doses(tmp_path / "single", seeds=1)), "embedded")
    assert {p["spread"] for p in csv.DictReader(io.StringIO(single.csv()))} == {""}
    lost = doses.shares(cells, "dose_fp16")
    # Of exponents alone, what E5M2 loses at a scale FP16 loses eight octaves lower.
    assert {power + 8: share for power, share in lost.items()} == doses.shares(cells, "dose_nearest")
    assert 0 == min(lost.values()) < 0.5 < max(lost.values())
    by_share = {p["x"] for p in points if p["panel"] == "by what is left of the errors" and p["series"] == label}
    # Of the last point nothing is left, which no logarithm shows.
    assert by_share == {str(100 * (1 - share)) for share in lost.values() if share < 1}
    sheet = doses.dose_sheet(cells)
    assert len(sheet.rows) == sum(map(len, SCALES.values()))
    needed = doses.needs(cells, "dose_fp16").values()
    run = cells["dose_reference"].first
    assert run is not None
    share = lost_share(errors(run), 2 ** mean(needed), FP16)
    assert share is not None
    assert f"FP16, to nearest: {mean(needed):+.1f} ± {stdev(needed):.1f} ({100 * share:.1f} %)" in sheet.notes[1]
    # Of other profiles the study is no part.
    assert dose_response(cells, "midscale").empty
    assert "doses" not in {figure.name for figure in figures(cells, "midscale")}
