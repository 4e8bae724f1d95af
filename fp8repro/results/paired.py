"""The one test behind every verdict: the mean difference over seeds against its standard error.

Runs with the same seed start from the same weights and see the same examples, so they are compared in pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not decided"
CONFIDENCE = 0.95
# What counts as no difference: points of top-1 and BLEU. Part of the stated test, not a result.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Difference:
    """Mean of `a - b` over the seeds that both have; `se` is its standard error, None for a single seed."""

    mean: float
    se: float | None
    seeds: int

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to a one-sided 95 % bound (Student's t)."""
        if self.se is None:
            return None
        from scipy.stats import t

        return float(t.ppf(CONFIDENCE, self.seeds - 1)) * self.se

    def text(self, digits: int = 2) -> str:
        """As people read it."""
        spread = "" if self.se is None else f" ± {self.se:.{digits}f}"
        return f"{self.mean:+.{digits}f}{spread} ({self.seeds} seed{'s' if self.seeds > 1 else ''})"


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """The paired difference of two runs' figures by seed; None without a common seed."""
    gaps = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if not gaps:
        return None
    se = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return Difference(statistics.mean(gaps), se, len(gaps))


def not_worse(gap: Difference | None, tolerance: float = TOLERANCE) -> str:
    """Is the first as good as the second, up to the tolerance?"""
    if gap is None or gap.half_width is None:
        return UNDECIDED
    if gap.mean - gap.half_width > -tolerance:
        return HOLDS
    return FAILS if gap.mean + gap.half_width < -tolerance else UNDECIDED


def greater(gap: Difference | None, relevant: float) -> str:
    """Is the first greater than the second? It is not where a difference of `relevant` can be excluded."""
    if gap is None or gap.half_width is None:
        return UNDECIDED
    if gap.mean - gap.half_width > 0:
        return HOLDS
    return FAILS if gap.mean + gap.half_width < relevant else UNDECIDED
