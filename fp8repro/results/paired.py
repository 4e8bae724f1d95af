"""The one test behind every verdict: the mean difference over seeds against a bound, at stated numbers of seeds.

Runs with the same seed start from the same weights and see the same examples, so they are compared in pairs. Seeds are
added until a statement is decided, and each look at them may decide: the level of a look is so much under 5 % that all
looks together stay under it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

HOLDS, FAILS = "holds", "does not hold"
# More seeds may decide; and none that are planned will.
UNDECIDED, UNDECIDABLE = "not decided", "cannot be decided here"
# One-sided level of each look, by the numbers of seeds that are looked at, for one statement and for each of two to
# five: all looks together err in 4.9 %, 2.5 %, 1.6 %, 1.2 % and 1 %.
LEVELS = {
    (3, 6, 12): (0.0198, 0.0093, 0.0060, 0.0044, 0.0035),
    (3, 6, 12, 24): (0.0153, 0.0071, 0.0046, 0.0034, 0.0027),
}
# Of the bound on a difference that stands alone, not in a verdict.
CONFIDENCE = 0.95
# "The number of seeds it would take" decides so often.
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """Mean of `a - b` over the seeds that both have; `se` is its standard error, None for a single seed."""

    mean: float
    se: float | None
    seeds: int

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to a one-sided 95 % bound (Student's t)."""
        return None if self.se is None else self.distance(1 - CONFIDENCE)

    def distance(self, level: float) -> float:
        """Distance from the mean to a one-sided bound (Student's t) at a level; needs two seeds."""
        assert self.se is not None
        return _quantile(level, self.seeds - 1) * self.se

    def text(self, digits: int = 2) -> str:
        """As people read it."""
        spread = "" if self.se is None else f" ± {self.se:.{digits}f}"
        return f"{self.mean:+.{digits}f}{spread} ({self.seeds} seed{'s' if self.seeds > 1 else ''})"


@dataclass(frozen=True)
class Question:
    """What is asked of a mean difference.

    Attributes:
        threshold: it holds above, and does not hold below.
        planned: the true difference at which the test's power is stated.
        effect: `planned` is the least effect of note: where it is excluded, more seeds are not worth their time.
    """

    threshold: float
    planned: float
    effect: bool = False


@dataclass(frozen=True)
class Decision:
    """The outcome for one question.

    Attributes:
        verdict: HOLDS, FAILS, UNDECIDED (fewer seeds than the last look has) or UNDECIDABLE.
        gap: the difference at the look that decided, else at the last one there was.
        looks: how many were taken. planned: numbers of seeds at all looks.
        level, against: one-sided level of a look for HOLDS and for FAILS.
        excluded: the least effect of note is excluded.
    """

    verdict: str
    gap: Difference
    looks: int
    planned: tuple[int, ...]
    level: float
    against: float
    excluded: bool = False

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences; needs two seeds."""
        assert self.gap.se is not None
        return self.gap.se * math.sqrt(self.gap.seeds)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """The paired difference of two runs' figures by seed; None without a common seed."""
    return mean_of(list(gaps(a, b).values()))


def gaps(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """`a - b` of each seed that both have, in the order of seeds, those that are not finite left out."""
    found = {seed: a[seed] - b[seed] for seed in sorted(set(a) & set(b))}
    return {seed: gap for seed, gap in found.items() if math.isfinite(gap)}


def mean_of(values: list[float]) -> Difference | None:
    """Mean and standard error of paired differences."""
    if not values:
        return None
    mean, seeds = math.fsum(values) / len(values), len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Difference(mean, math.sqrt(squares / (seeds - 1) / seeds) if seeds > 1 else None, seeds)


def not_worse(margin: float) -> Question:
    """Is the first as good as the second, up to the margin?"""
    return Question(-margin, 0.0)


def greater(relevant: float) -> Question:
    """Is the first greater than the second? A difference of `relevant` is the least of note."""
    return Question(0.0, relevant, effect=True)


def decide(by_seed: Mapping[int, float], question: Question, looks: tuple[int, ...], statements: int = 1) -> Decision:
    """Look at the differences after each planned number of seeds; the first look that decides stands.

    Args:
        by_seed: paired differences, in the order of seeds (`gaps`); at least one.
        question: what is asked of them.
        looks: numbers of seeds, a key of `LEVELS`.
        statements: how many of a claim are tested, up to five. One that does not hold refutes the claim, so they share
            the 5 % for that (Bonferroni); the claim holds only where all of them do, which needs no correction.

    Raises:
        ValueError: no differences.
    """
    values = list(by_seed.values())
    level, against = LEVELS[looks][0], LEVELS[looks][statements - 1]
    gap = mean_of(values)
    if gap is None:
        raise ValueError("no differences to decide by")
    found = Decision(UNDECIDED, gap, 0, looks, level, against)
    for number, seeds in enumerate((seeds for seeds in looks if seeds <= len(values)), 1):
        found = _look(values[:seeds], replace(found, looks=number), question)
        if found.verdict != UNDECIDED:
            break
    return found


def power(decision: Decision, question: Question) -> float:
    """Share of plans that would find it to hold at the last look if the planned difference were true."""
    return _power(decision.planned[-1], decision.deviation, question.planned - question.threshold, decision.level)


def needed(decision: Decision, question: Question) -> int | None:
    """Seeds that decide with a power of `POWER` if mean and deviation stay; None over `MOST_SEEDS`."""
    distance = decision.gap.mean - question.threshold
    level = decision.level if distance > 0 else decision.against

    def enough(seeds: int) -> bool:
        return _power(seeds, decision.deviation, abs(distance), level) >= POWER

    # Power grows with seeds.
    found = bisect_left(range(2, MOST_SEEDS + 1), True, key=enough) + 2
    return found if found <= MOST_SEEDS else None


def _look(values: list[float], before: Decision, question: Question) -> Decision:
    gap = mean_of(values)
    assert gap is not None
    if gap.mean - gap.distance(before.level) > question.threshold:
        return replace(before, gap=gap, verdict=HOLDS)
    if gap.mean + gap.distance(before.against) < question.threshold:
        return replace(before, gap=gap, verdict=FAILS)
    excluded = question.effect and gap.mean + gap.distance(before.level) < question.planned
    last = before.looks == len(before.planned)
    return replace(before, gap=gap, verdict=UNDECIDABLE if excluded or last else UNDECIDED, excluded=excluded)


def _power(seeds: int, deviation: float, distance: float, level: float) -> float:
    """Share of plans whose one-sided bound clears a threshold that lies so far from the true mean."""
    from scipy.stats import nct

    if distance == 0:
        return level
    # So far out, and without any deviation, there is no distribution to ask.
    if distance * math.sqrt(seeds) > 100 * deviation:
        return 1.0
    return float(nct.sf(_quantile(level, seeds - 1), seeds - 1, distance * math.sqrt(seeds) / deviation))


@lru_cache(1024)
def _quantile(level: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.isf(level, freedom))
