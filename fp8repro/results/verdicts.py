"""A verdict per claim of the paper, each from a stated test on run records.

Differences of scores are decided by `paired.decide` alone; orderings and bytes must hold in every seed there is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fp8repro.numerics.formats import E5M2, FP16
from fp8repro.paper.plan import plan_file, study_cells, study_models
from fp8repro.paper.reported import paper_figures
from fp8repro.results import doses
from fp8repro.results.cells import Cells, comparable
from fp8repro.results.paired import (
    FAILS,
    HOLDS,
    LEVELS,
    MOST_SEEDS,
    UNDECIDABLE,
    UNDECIDED,
    Decision,
    Question,
    decide,
    gaps,
    greater,
    needed,
    not_worse,
    power,
)
from fp8repro.results.sheet import Column, Sheet
from fp8repro.results.studies import ROLES, conversion

# The paper: half the bytes of FP32 masters. The bound on what is kept for backward is this project's own.
MASTER_SHARE, SAVED_SHARE = 0.5, 0.35
# An L2 loss that differs by less than this share of it is no growth.
L2_SHARE = 0.02
# How much smaller FP16's smallest value is than E5M2's: 2^-24 and 2^-16.
OCTAVES = (E5M2.min_exponent - E5M2.mantissa_bits) - (FP16.min_exponent - FP16.mantissa_bits)
NO_RUNS = "no run of this profile"
APART = "the runs differ in more than precision and loss scaling"
NOTES = (
    "Level: what each look may err by, so that all looks together err in under 5 %. Against it: the level at which a "
    "statement does not hold; those of a claim share the 5 %, since one of them refutes it. Power: how often the "
    "test at the last look would find the statement to hold, at the spread that was seen. Seeds that it would take: "
    "for a power of 80 %, should mean and spread stay.",
)


@dataclass(frozen=True)
class Verdict:
    """One tested statement.

    Attributes:
        claim: C1 to C7. statement: what is tested. test: how. verdict: the outcome. evidence: the figures behind it.
        looks: how many were taken, of how many, and at how many seeds. level: one-sided, of each look. power: share of
            plans that would find it to hold. All three are empty where no difference over seeds is tested.
        wants: cells whose further seeds may decide it; empty where it is decided or no seed would.
    """

    claim: str
    statement: str
    test: str
    verdict: str
    evidence: str
    looks: str = ""
    level: str = ""
    power: str = ""
    wants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What the statements of a claim share.

    Attributes:
        name: C1 to C7. cells: of the profile.
        margin: what counts as no difference, in points of top-1 or BLEU. looks: numbers of seeds that are looked at.
        statements: how many of the claim's are tested over seeds.
    """

    name: str
    cells: Cells
    margin: float
    looks: tuple[int, ...]
    statements: int

    def not_worse(self, a: str, b: str, statement: str, unit: str) -> Verdict:
        """A statement that one cell scores as well as another, up to the margin."""
        return self.compared(a, b, "score", statement, not_worse(self.margin), f"-{self.margin:g} {unit}")

    def greater(self, a: str, b: str, figure: str, statement: str, relevant: float, named: str) -> Verdict:
        """A statement that a figure of one cell is greater than another's; `named`: the least difference of note."""
        return self.compared(a, b, figure, statement, greater(relevant), f"0 (of note: {named})")

    def compared(self, a: str, b: str, figure: str, statement: str, question: Question, bound: str) -> Verdict:
        """A statement about the difference of two cells in a figure."""
        test = f"mean paired difference over seeds, one-sided bound (Student's t): above {bound}"
        blank = Verdict(self.name, statement, test, UNDECIDED, "")
        first, second = self.cells[a], self.cells[b]
        if first.empty or second.empty:
            return replace(blank, evidence=_absent(self.cells, (a, b)))
        if first.failures or second.failures:
            return replace(blank, evidence=_failed(self.cells, (a, b)))
        if not comparable(first, second):
            return replace(blank, evidence=APART)
        by_seed = gaps(first.figures(figure), second.figures(figure))
        return self.decided(blank, by_seed, question, f"{a} - {b}", (a, b))

    def decided(
        self, blank: Verdict, by_seed: Mapping[int, float], question: Question, what: str, wants: tuple[str, ...]
    ) -> Verdict:
        """A statement decided by paired differences; `what` they are of, `wants`: the cells that they are from."""
        if not by_seed:
            return replace(blank, evidence="no common seed with this figure")
        decision = decide(by_seed, question, self.looks, self.statements)
        return replace(
            blank,
            verdict=decision.verdict,
            evidence=f"{what}: {_evidence(decision, question)}",
            looks=f"{decision.looks} of {len(decision.planned)} (at {', '.join(map(str, decision.planned))} seeds)",
            level=_levels(decision),
            power=_power(decision, question),
            wants=wants if decision.verdict == UNDECIDED else (),
        )


def verdicts(cells: Cells, profile: str) -> list[Verdict]:
    """All statements of a profile's runs."""
    convnet = plan_file()["profiles"][profile]["convnet"]

    def claim(name: str, statements: int) -> Claim:
        return Claim(name, cells, *_standard(profile), statements)

    return [
        *_accuracy(claim("C1", len(study_models("C1", profile))), profile),
        *_accuracy(claim("C2", len(study_models("C2", profile))), profile),
        _conversion(cells, profile),
        _underflow(cells, convnet),
        *(_doses(claim("C4", 5)) if study_cells(doses.STUDY, profile) else _loss_scales(claim("C4", 1), convnet)),
        *_enhanced(claim("C5", 1)),
        *_rounding(claim("C6", 4)),
        *_masters(claim("C7", 1), convnet),
    ]


def open_cells(found: Sequence[Verdict], among: Collection[str]) -> set[str]:
    """Those of some cells whose further seeds may decide a statement about them alone."""
    return {name for verdict in found if set(verdict.wants) <= set(among) for name in verdict.wants}


def overall(claim: str, found: Sequence[Verdict]) -> str:
    """A claim holds when all its statements do, and does not when one does not."""
    said = [verdict.verdict for verdict in found if verdict.claim == claim]
    if FAILS in said:
        return FAILS
    if not said or UNDECIDED in said:
        return UNDECIDED
    return UNDECIDABLE if UNDECIDABLE in said else HOLDS


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
    notes = [
        "A claim holds when every statement below holds, and does not hold when one does not. Not decided: more seeds "
        "may decide it; cannot be decided here: all planned seeds are there, or no number of them would do.",
        *(_held_to(profile) for profile in by_profile),
    ]
    if "paper" not in by_profile:
        notes.append("The paper's scale is not decided: there is no run with profile=paper.")
    return Sheet("verdicts", "Verdicts", columns, rows, notes)


def statement_sheet(found: Sequence[Verdict]) -> Sheet:
    """The statements behind the verdicts."""
    columns = list(map(Column, ("claim", "statement", "verdict", "evidence", "looks", "level", "power", "test")))
    return Sheet("statements", "What was tested, and how", columns, [vars(verdict) for verdict in found], NOTES)


def _standard(profile: str) -> tuple[float, tuple[int, ...]]:
    """Margin and looks of a profile."""
    values = plan_file()["profiles"][profile]
    return float(values["margin"]), tuple(values["looks"])


def _held_to(profile: str) -> str:
    margin, looks = _standard(profile)
    return (
        f"profile={profile}: no difference is one within {margin:.1f} points of top-1 or BLEU; looks after "
        f"{', '.join(map(str, looks))} seeds, each at a one-sided level of {LEVELS[looks][0]:g}."
    )


def _evidence(decision: Decision, question: Question) -> str:
    gap, text = decision.gap, decision.gap.text()
    if not decision.looks:
        return f"{text}; the first look is at {decision.planned[0]} seeds"
    low, high = gap.mean - gap.distance(decision.level), gap.mean + gap.distance(decision.level)
    text += f", bounds {low:+.2f} and {high:+.2f}"
    if decision.excluded:
        text += "; a difference of note is excluded"
    if decision.verdict in (UNDECIDED, UNDECIDABLE):
        seeds = needed(decision, question)
        text += f"; as it stands, it would take {f'about {seeds}' if seeds else f'over {MOST_SEEDS:,}'} seeds"
    return text


def _levels(decision: Decision) -> str:
    if decision.level == decision.against:
        return f"{decision.level:g}"
    return f"{decision.level:g}; against it {decision.against:g}"


def _power(decision: Decision, question: Question) -> str:
    if not decision.looks:
        return ""
    return f"{100 * power(decision, question):.0f} % at {decision.planned[-1]} seeds for a true {question.planned:.3g}"


def _accuracy(claim: Claim, profile: str) -> list[Verdict]:
    unit = "points of top-1" if claim.name == "C1" else "BLEU"
    return [
        claim.not_worse(f"{model}_fp8", f"{model}_fp32", f"{model}: FP8 is as good as FP32", unit)
        for model in study_models(claim.name, profile)
    ]


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


def _underflow(cells: Cells, convnet: str) -> Verdict:
    names = ["fp8_scale_1", "fp8_scale_1000", "fp8_scale_4000", f"{convnet}_fp8"]
    verdict, seeds = _ordered(cells, names, "underflow_error")
    shares = [cells[name].figures("underflow_error") for name in names]
    means = [f"{100 * sum(share.values()) / len(share):.3g} %" if share else "-" for share in shares]
    return Verdict(
        "C4",
        "a larger loss scale keeps more errors out of underflow",
        "share of underflowing errors falls strictly from scale 1 to 1,000, 4,000 and 10,000, in every seed",
        verdict,
        f"{', '.join(means)} ({len(seeds)} seeds)" if seeds else _absent(cells, names),
    )


def _loss_scales(claim: Claim, convnet: str) -> list[Verdict]:
    """Where the paper's own scales are told apart: its data, or data like it."""
    statement, named = "scale 10,000 is more accurate than 1,000", f"{claim.margin:g} points of top-1"
    return [claim.greater(f"{convnet}_fp8", "fp8_scale_1000", "score", statement, claim.margin, named)]


def _doses(claim: Claim) -> list[Verdict]:
    """The loss scales that roundings of errors and gradients need, in octaves against each other."""
    near, below, random, fp16 = doses.NEAREST, doses.SUBNORMAL, doses.STOCHASTIC, doses.IN_FP16
    octave, up_to = greater(1.0), not_worse(1.0)
    return [
        _octaves(claim, "E5M2 to nearest needs a larger loss scale than FP16", near, fp16, 0, octave),
        _octaves(claim, "by eight octaves, not less", near, fp16, OCTAVES, up_to),
        _octaves(claim, "by eight octaves, not more", fp16, near, -OCTAVES, up_to),
        _octaves(claim, "its subnormal range alone makes it need as much", below, near, 0, up_to),
        _octaves(claim, "stochastic rounding needs less", near, random, 0, octave),
    ]


def _octaves(claim: Claim, statement: str, a: str, b: str, offset: float, question: Question) -> Verdict:
    """A statement about how many octaves more one curve needs than another, less an offset."""
    less = f" {-offset:+g}" if offset else ""
    bound = "0 (of note: 1 octave)" if question.effect else f"{question.threshold:g} octave"
    test = (
        f"octaves of loss scale that {a} needs more than {b}{less}, paired by seed, one-sided bound (Student's t): "
        f"above {bound}; needed: where top-1 falls {doses.DROP:g} points under the mean of the two largest scales"
    )
    blank = Verdict("C4", statement, test, UNDECIDED, "")
    cells = (*doses.names(a), *doses.names(b))
    if any(claim.cells[name].failures for name in cells):
        return replace(blank, evidence=_failed(claim.cells, cells))
    absent = [name for name in cells if claim.cells[name].empty]
    if absent:
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        return replace(blank, evidence=f"not run: {absent[0]}{others}")
    if not all(comparable(claim.cells[cells[0]], claim.cells[name]) for name in cells):
        return replace(blank, evidence=APART)
    flat = [f"{curve}, seed {seed}" for curve in (a, b) for seed in doses.never_fall(claim.cells, curve)]
    if flat:
        # No further seed brings a fall to a curve; to leave these out would choose among them.
        evidence = f"no fall of {doses.DROP:g} points at any scale: {'; '.join(flat)}"
        return replace(blank, verdict=UNDECIDABLE, evidence=evidence)
    by_seed = gaps(doses.needs(claim.cells, a), doses.needs(claim.cells, b))
    return claim.decided(
        blank, {seed: gap - offset for seed, gap in by_seed.items()}, question, f"{a} - {b}{less}", cells
    )


def _enhanced(claim: Claim) -> list[Verdict]:
    statement = "a rising floor keeps the loss scale up where plain back-off lets it fall"
    test = "in every seed, the scale without a floor goes under the floor that the enhanced policy has at that step"
    enhanced, dynamic = claim.cells["gnmt_fp8"], claim.cells["gnmt_fp8_dynamic"]
    seeds = sorted(set(enhanced.runs) & set(dynamic.runs))
    scores = claim.not_worse(
        "gnmt_fp8", "gnmt_fp8_dynamic", "the enhanced policy is as good as dynamic scaling", "BLEU"
    )
    if not seeds:
        evidence = _absent(claim.cells, ("gnmt_fp8", "gnmt_fp8_dynamic"))
        return [Verdict("C5", statement, test, UNDECIDED, evidence)]
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
            Verdict("C5", text, check, UNDECIDABLE, evidence)
            for text, check in ((statement, test), (scores.statement, scores.test))
        ]
    verdict = HOLDS if all(below) else FAILS
    evidence += f"; seeds whose scale fell below the floor without one: {sum(below)} of {len(seeds)}"
    return [Verdict("C5", statement, test, verdict, evidence), scores]


def _rounding(claim: Claim) -> list[Verdict]:
    found = []
    for masters, suffix in (("FP16", ""), ("FP32", "_fp32_master")):
        nearest, stochastic = f"fp8_nearest{suffix}", f"fp8_stochastic{suffix}"
        reference = claim.cells[stochastic].figures("l2")
        relevant = L2_SHARE * sum(reference.values()) / len(reference) if reference else 0.0
        errors = f"{masters} masters: nearest has the larger validation error"
        l2 = f"{masters} masters: nearest ends with the larger L2 loss"
        found += [
            claim.greater(nearest, stochastic, "val_error", errors, claim.margin, f"{claim.margin:g} points"),
            claim.greater(nearest, stochastic, "l2", l2, relevant, f"{100 * L2_SHARE:g} % of it"),
        ]
    return found


def _masters(claim: Claim, convnet: str) -> list[Verdict]:
    fp8, fp32 = f"{convnet}_fp8", f"{convnet}_fp32"
    kept = f"what is kept for backward takes at most {SAVED_SHARE:g} of FP32's bytes"
    return [
        _share(claim.cells, fp8, fp32, "master_bytes", MASTER_SHARE, "FP16 masters take half the bytes of FP32 ones"),
        _share(claim.cells, fp8, fp32, "saved_for_backward_bytes", SAVED_SHARE, kept),
        claim.not_worse(fp8, "fp8_fp32_master", "FP16 masters are as accurate as FP32 ones", "points of top-1"),
    ]


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
