"""A verdict per claim of the paper, each from a stated test on run records.

Differences of scores are never decided by a single seed; orderings and bytes must hold in every seed there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fp8repro.paper.plan import plan_file, study_cells, study_models
from fp8repro.paper.reported import paper_figures
from fp8repro.results.cells import Cells, comparable
from fp8repro.results.paired import FAILS, HOLDS, TOLERANCE, UNDECIDED, Difference, difference, greater, not_worse
from fp8repro.results.sheet import Column, Sheet
from fp8repro.results.studies import ROLES, conversion

# The paper: half the bytes of FP32 masters. The bound on what is kept for backward is this project's own.
MASTER_SHARE, SAVED_SHARE = 0.5, 0.35
# An L2 loss that differs by less than this share of it is no growth.
L2_SHARE = 0.02
NO_RUNS = "no run of this profile"
APART = "the runs differ in more than precision and loss scaling"


@dataclass(frozen=True)
class Verdict:
    """One tested statement.

    Attributes:
        claim: C1 to C7. statement: what is tested. test: how. verdict: the outcome. evidence: the figures behind it.
    """

    claim: str
    statement: str
    test: str
    verdict: str
    evidence: str


def verdicts(cells: Cells, profile: str) -> list[Verdict]:
    """All statements of a profile's runs."""
    convnet = plan_file()["profiles"][profile]["convnet"]
    return [
        *_accuracy("C1", cells, profile),
        *_accuracy("C2", cells, profile),
        _conversion(cells, profile),
        *_loss_scale(cells, convnet),
        *_enhanced(cells),
        *_rounding(cells),
        *_masters(cells, convnet),
    ]


def overall(claim: str, found: Sequence[Verdict]) -> str:
    """A claim holds when all its statements do, and does not when one does not."""
    said = [verdict.verdict for verdict in found if verdict.claim == claim]
    if FAILS in said:
        return FAILS
    return HOLDS if said and all(verdict == HOLDS for verdict in said) else UNDECIDED


def verdict_sheet(by_profile: Mapping[str, Sequence[Verdict]]) -> Sheet:
    """One row for each claim: the paper's words, the verdict of each profile, and of the paper's own scale."""
    claims = paper_figures()["claims"]
    columns = [Column("claim"), Column("text", "the paper")]
    small = [profile for profile in by_profile if profile != "paper"]
    columns += [Column(profile, f"verdict at the scale of profile={profile}") for profile in small]
    columns.append(Column("paper", "verdict at the paper's scale"))
    rows = []
    for claim, entry in claims.items():
        row = {"claim": claim, "text": entry["text"]}
        row |= {profile: overall(claim, by_profile[profile]) for profile in small}
        # Small data never speaks for ImageNet or WMT16.
        row["paper"] = overall(claim, by_profile.get("paper", []))
        if "paper" not in by_profile:
            row["paper"] = UNDECIDED
        rows.append(row)
    notes = ["A claim holds when every statement below holds, and does not hold when one does not."]
    if "paper" not in by_profile:
        notes.append("The paper's scale is not decided: there is no run with profile=paper.")
    return Sheet("verdicts", "Verdicts", columns, rows, notes)


def statement_sheet(found: Sequence[Verdict]) -> Sheet:
    """The statements behind the verdicts."""
    columns = list(map(Column, ("claim", "statement", "verdict", "evidence", "test")))
    return Sheet("statements", "What was tested, and how", columns, [vars(verdict) for verdict in found])


def _accuracy(claim: str, cells: Cells, profile: str) -> list[Verdict]:
    unit = "points of top-1" if claim == "C1" else "BLEU"
    return [
        _not_worse(claim, cells, f"{model}_fp8", f"{model}_fp32", f"{model}: FP8 is as good as FP32", unit)
        for model in study_models(claim, profile)
    ]


def _not_worse(claim: str, cells: Cells, a: str, b: str, statement: str, unit: str) -> Verdict:
    test = f"one-sided 95 % bound of the mean paired difference over seeds above -{TOLERANCE:g} {unit}"
    return _compared(claim, cells, a, b, "score", statement, test, not_worse)


def _compared(
    claim: str,
    cells: Cells,
    a: str,
    b: str,
    figure: str,
    statement: str,
    test: str,
    decide: Callable[[Difference | None], str],
) -> Verdict:
    """A statement about the difference of two cells in a figure."""
    first, second = cells[a], cells[b]
    if first.empty or second.empty:
        return Verdict(claim, statement, test, UNDECIDED, _absent(cells, (a, b)))
    if first.failures or second.failures:
        return Verdict(claim, statement, test, UNDECIDED, _failed(cells, (a, b)))
    if not comparable(first, second):
        return Verdict(claim, statement, test, UNDECIDED, APART)
    gap = difference(first.figures(figure), second.figures(figure))
    if gap is None:
        return Verdict(claim, statement, test, UNDECIDED, "no common seed with this figure")
    evidence = f"{a} - {b}: {gap.text()}"
    if gap.half_width is None:
        return Verdict(claim, statement, test, UNDECIDED, f"{evidence}; one seed has no standard error")
    low, high = gap.mean - gap.half_width, gap.mean + gap.half_width
    return Verdict(claim, statement, test, decide(gap), f"{evidence}, bounds {low:+.2f} and {high:+.2f}")


def _failed(cells: Cells, names: Sequence[str]) -> str:
    """Which cells' runs failed, and why."""
    return "; ".join(
        f"{name}: failed, seed {seed}: {why}" for name in names for seed, why in sorted(cells[name].failures.items())
    )


def _absent(cells: Cells, names: Sequence[str]) -> str:
    """Why there is nothing to judge: cells that were not run, and runs that failed."""
    parts = [f"{name}: not run" for name in names if cells[name].empty]
    failed = _failed(cells, [name for name in names if not cells[name].runs])
    return "; ".join([*parts, *([failed] if failed else [])]) or "no common seed with this figure"


def _conversion(cells: Cells, profile: str) -> Verdict:
    statement = "weights, activations, errors and gradients of every product are E5M2, but for the exempt layers"
    test = "each FP8 run's record: converted layers list E5M2 in all four roles, telemetry counted operands in each"
    rows: list[str] = []
    wrong: list[str] = []
    absent: list[str] = []
    failed: list[str] = []
    uncounted: list[str] = []
    for study in ("C1", "C2"):
        for name in study_cells(study, profile):
            if not name.endswith("_fp8"):
                continue
            run = cells[name].first
            if run is None:
                (failed if cells[name].failures else absent).append(name)
                continue
            row = conversion(run)
            rows.append(f"{row['model']} {row['converted']}")
            details = [str(r.get("detail")) for r in run.converted if r.get("status") == "converted"]
            complete = details and all(f"{role} e5m2" in detail for detail in details for role in ROLES)
            if complete and not run.rows("telemetry"):
                uncounted.append(str(row["model"]))
            elif not complete or row["roles"] != ", ".join(ROLES):
                wrong.append(str(row["model"]))
    if not rows:
        return Verdict("C3", statement, test, UNDECIDED, _failed(cells, failed) or NO_RUNS)
    evidence = f"layers converted: {', '.join(rows)}" + (f"; not so: {', '.join(wrong)}" if wrong else "")
    evidence += f"; without telemetry: {', '.join(uncounted)}" if uncounted else ""
    evidence += f"; not run: {', '.join(absent)}" if absent else ""
    evidence += f"; {_failed(cells, failed)}" if failed else ""
    verdict = FAILS if wrong else UNDECIDED if absent or failed or uncounted else HOLDS
    return Verdict("C3", statement, test, verdict, evidence)


def _ordered(cells: Cells, names: Sequence[str], figure: str) -> tuple[str, list[int]]:
    """Does a figure fall strictly from cell to cell, in every seed that all cells have?"""
    figures = [cells[name].figures(figure) for name in names]
    seeds = sorted(set.intersection(*map(set, figures)))
    if not seeds:
        return UNDECIDED, []
    falls = [all(a[seed] > b[seed] for a, b in pairwise(figures)) for seed in seeds]
    return (HOLDS if all(falls) else FAILS), seeds


def _loss_scale(cells: Cells, convnet: str) -> list[Verdict]:
    names = ["fp8_scale_1", "fp8_scale_1000", "fp8_scale_4000", f"{convnet}_fp8"]
    verdict, seeds = _ordered(cells, names, "underflow_error")
    shares = [cells[name].figures("underflow_error") for name in names]
    means = [f"{100 * sum(share.values()) / len(share):.3g} %" if share else "-" for share in shares]
    falling = Verdict(
        "C4",
        "a larger loss scale keeps more errors out of underflow",
        "share of underflowing errors falls strictly from scale 1 to 1,000, 4,000 and 10,000, in every seed",
        verdict,
        f"{', '.join(means)} ({len(seeds)} seeds)" if seeds else _absent(cells, names),
    )
    test = (
        "paired difference of top-1 over seeds: one-sided 95 % bound above 0 (holds); "
        f"an advantage of {TOLERANCE:g} point excluded (does not hold)"
    )
    return [
        falling,
        _compared(
            "C4", cells, f"{convnet}_fp8", "fp8_scale_1000", "score",
            "scale 10,000 is more accurate than 1,000", test, lambda gap: greater(gap, TOLERANCE),
        ),
    ]  # fmt: skip


def _enhanced(cells: Cells) -> list[Verdict]:
    statement = "a rising floor keeps the loss scale up where plain back-off lets it fall"
    test = "in every seed, the scale without a floor goes under the floor that the enhanced policy has at that step"
    enhanced, dynamic = cells["gnmt_fp8"], cells["gnmt_fp8_dynamic"]
    seeds = sorted(set(enhanced.runs) & set(dynamic.runs))
    scores = "the enhanced policy is as good as dynamic scaling"
    score_test = f"one-sided 95 % bound of the mean paired difference over seeds above -{TOLERANCE:g} BLEU"
    if not seeds:
        return [Verdict("C5", statement, test, UNDECIDED, _absent(cells, ("gnmt_fp8", "gnmt_fp8_dynamic")))]
    met, below = [], []
    for seed in seeds:
        with_floor, without = enhanced.runs[seed].loss_scale, dynamic.runs[seed].loss_scale
        if with_floor is None or without is None or len(with_floor.scale) != len(without.scale):
            return [Verdict("C5", statement, test, UNDECIDED, f"seed {seed}: the loss scale cannot be followed")]
        met.append(len(with_floor.met_floor))
        below.append(any(scale < floor for scale, floor in zip(without.scale, with_floor.floors, strict=True)))
    evidence = f"back-offs that met the floor: {', '.join(map(str, met))} (one figure a seed)"
    if not all(met):
        # The floor did nothing, so nothing can be said of it.
        return [
            Verdict("C5", text, check, UNDECIDED, evidence) for text, check in ((statement, test), (scores, score_test))
        ]
    verdict = HOLDS if all(below) else FAILS
    evidence += f"; seeds whose scale fell below the floor without one: {sum(below)} of {len(seeds)}"
    return [
        Verdict("C5", statement, test, verdict, evidence),
        _compared("C5", cells, "gnmt_fp8", "gnmt_fp8_dynamic", "score", scores, score_test, not_worse),
    ]


def _rounding(cells: Cells) -> list[Verdict]:
    found = []
    for masters, suffix in (("FP16", ""), ("FP32", "_fp32_master")):
        nearest, stochastic = f"fp8_nearest{suffix}", f"fp8_stochastic{suffix}"
        reference = cells[stochastic].figures("l2")
        relevant = L2_SHARE * sum(reference.values()) / len(reference) if reference else 0.0
        bound = "paired difference over seeds: one-sided 95 % bound above 0 (holds); "
        found += [
            _compared(
                "C6", cells, nearest, stochastic, "val_error",
                f"{masters} masters: nearest has the larger validation error",
                f"{bound}{TOLERANCE:g} point or more excluded (does not hold)", lambda gap: greater(gap, TOLERANCE),
            ),
            _compared(
                "C6", cells, nearest, stochastic, "l2", f"{masters} masters: nearest ends with the larger L2 loss",
                f"{bound}{100 * L2_SHARE:g} % of it or more excluded (does not hold)",
                lambda gap, relevant=relevant: greater(gap, relevant),  # type: ignore[misc]
            ),
        ]  # fmt: skip
    return found


def _masters(cells: Cells, convnet: str) -> list[Verdict]:
    fp8, fp32 = f"{convnet}_fp8", f"{convnet}_fp32"
    return [
        _share(cells, fp8, fp32, "master_bytes", MASTER_SHARE, "FP16 masters take half the bytes of FP32 ones"),
        _share(
            cells, fp8, fp32, "saved_for_backward_bytes", SAVED_SHARE,
            f"what is kept for backward takes at most {SAVED_SHARE:g} of FP32's bytes",
        ),
        _not_worse(
            "C7", cells, fp8, "fp8_fp32_master", "FP16 masters are as accurate as FP32 ones", "points of top-1"
        ),
    ]  # fmt: skip


def _share(cells: Cells, a: str, b: str, figure: str, limit: float, statement: str) -> Verdict:
    # Parameters that stay in FP32 (normalization, biases) are part of the bytes.
    slack = 0.01 if figure == "master_bytes" else 0.0
    test = f"bytes counted in the first step, at most {limit:g}" + (f" + {slack:g}" if slack else "") + " of FP32's"
    ours, theirs = cells[a].figures(figure), cells[b].figures(figure)
    shares = [ours[seed] / theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    if not shares:
        return Verdict("C7", statement, test, UNDECIDED, _absent(cells, (a, b)))
    if not comparable(cells[a], cells[b]):
        return Verdict("C7", statement, test, UNDECIDED, APART)
    evidence = f"{max(shares):.3f} ({len(shares)} seed{'s' if len(shares) > 1 else ''})"
    return Verdict("C7", statement, test, HOLDS if max(shares) <= limit + slack else FAILS, evidence)
