"""The test behind the verdicts: its errors, simulated; its outcomes, power and numbers of seeds against scipy's."""

import numpy as np
import pytest
from scipy import stats

from fp8repro.paper.plan import plan_file
from fp8repro.results.paired import (
    FAILS,
    HOLDS,
    LEVELS,
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
from fp8repro.results.verdicts import Verdict, overall

PLANS = 30_000
# Standard deviation over seeds: of the two recipes of each statement of a claim.
DEVIATIONS = ((0.15, 0.9), (0.4, 0.4), (1.5, 0.3), (0.05, 0.2))


def outcomes(question: Question, truths: tuple[float, ...], looks: tuple[int, ...], plans: int) -> list[str]:
    """What a claim's verdict comes to in each of many plans: a statement for each true difference, by shipped code."""
    statements, seeds = len(truths), looks[-1]
    scores = np.random.default_rng(7).normal(size=(plans, statements, 2, seeds))
    scores = scores * np.array(DEVIATIONS[:statements])[:, :, None]
    scores[:, :, 0] += np.array(truths)[:, None]
    found = []
    for plan in scores.tolist():
        said = []
        for first, second in plan:
            by_seed = gaps(dict(enumerate(first)), dict(enumerate(second)))
            said.append(decide(by_seed, question, looks, statements).verdict)
        found.append(overall("C1", [Verdict("C1", "", "", verdict, "") for verdict in said]))
    return found


def upper_bound(errors: int, plans: int) -> float:
    """The 99 % bound (Clopper and Pearson) of a share."""
    return float(stats.beta.ppf(0.99, errors + 1, plans - errors))


@pytest.mark.parametrize("looks", LEVELS)
@pytest.mark.parametrize("question", [not_worse(1.0), greater(1.0)])
def test_of_false_verdicts_there_are_under_five_and_a_half_percent(question: Question, looks: tuple[int, ...]) -> None:
    truth = question.threshold
    found = outcomes(question, (truth,), looks, PLANS)
    assert upper_bound(found.count(HOLDS), PLANS) < 0.055
    assert upper_bound(found.count(FAILS), PLANS) < 0.055
    # The levels are used up: no look could be more lenient. (Plans without an effect of note end early.)
    assert found.count(HOLDS) / PLANS > (0.037 if question.effect else 0.045)


@pytest.mark.parametrize("looks", LEVELS)
def test_a_claim_of_several_statements_is_refuted_as_seldom(looks: tuple[int, ...]) -> None:
    plans = 20_000
    at_the_margin = outcomes(not_worse(1.0), (-1.0,) * 3, looks, plans)
    assert upper_bound(at_the_margin.count(FAILS), plans) < 0.055
    assert at_the_margin.count(FAILS) / plans > 0.043
    # One of them is as bad as it may be, the other holds: the claim does not.
    one_fails = outcomes(not_worse(1.0), (-1.0, 5.0), looks, plans)
    assert upper_bound(one_fails.count(HOLDS), plans) < 0.055


def test_every_profile_has_a_level_for_its_looks_and_a_margin() -> None:
    for profile in plan_file()["profiles"].values():
        assert tuple(profile["looks"]) in LEVELS
        assert profile["margin"] > 0


def decided(values: list[float], question: Question, statements: int = 1) -> Decision:
    return decide(dict(enumerate(values)), question, (3, 6, 12), statements)


SPREAD = [-0.1, 0.0, 0.1]


@pytest.mark.parametrize(
    ("mean", "spread", "as_good", "larger"),
    [
        # A bound at a level of 0.0198 lies 4.9 standard errors from the mean of 3 seeds.
        (0.5, 1, HOLDS, HOLDS),
        (-0.2, 1, HOLDS, UNDECIDABLE),
        (-0.2, 5, UNDECIDED, UNDECIDED),
        (-2.0, 1, FAILS, FAILS),
        (0.5, 5, HOLDS, UNDECIDED),
        (0.1, 1, HOLDS, UNDECIDABLE),
        (0.0, 0, HOLDS, UNDECIDABLE),
    ],
)
def test_outcomes_of_three_seeds(mean: float, spread: float, as_good: str, larger: str) -> None:
    values = [mean + spread * part for part in SPREAD]
    assert decided(values, not_worse(1.0)).verdict == as_good
    decision = decided(values, greater(1.0))
    assert decision.verdict == larger
    assert decision.excluded == (larger == UNDECIDABLE)


def test_what_one_statement_would_refute_may_be_chance_among_many() -> None:
    values = [-1.33 + part for part in SPREAD]
    assert decided(values, not_worse(1.0)).verdict == FAILS
    assert decided(values, not_worse(1.0), statements=4).verdict == UNDECIDED


def test_no_look_before_its_seeds_and_none_after_the_one_that_decides() -> None:
    assert decided([5.0, 5.1], greater(1.0)).looks == 0
    assert decided([5.0, 5.1], greater(1.0)).verdict == UNDECIDED
    wide = [-3.0, 0.5, 3.0]
    assert (decided([*wide, 5.0, 5.0], greater(1.0)).looks, decided([*wide, 5.0, 5.0], greater(1.0)).gap.seeds) == (
        1,
        3,
    )
    decision = decided([*wide, *[0.4, 0.6] * 5], not_worse(1.0))
    assert (decision.verdict, decision.looks, decision.gap.seeds) == (HOLDS, 3, 12)
    assert decided([-2.5, 0.5, 2.0, 0.0, 1.0, 0.0, *[-40.0] * 6], not_worse(2.0)).looks == 2


def test_power_is_the_share_of_tests_that_hold() -> None:
    decision = decided([-0.8, 0.1, 0.7], not_worse(1.0))
    samples = np.random.default_rng(3).normal(scale=decision.deviation, size=(100_000, 12))
    p = stats.ttest_1samp(samples, -1.0, axis=1, alternative="greater").pvalue
    assert power(decision, not_worse(1.0)) == pytest.approx(float((p < LEVELS[3, 6, 12][0]).mean()), abs=0.01)


def test_seeds_that_it_would_take_reach_the_power_and_no_fewer_do() -> None:
    decision = decided([-0.5, 0.6, 0.8], greater(2.0))
    assert decision.verdict == UNDECIDED
    effect = decision.gap.mean / decision.deviation

    def reached(seeds: int) -> float:
        return float(stats.nct.sf(stats.t.isf(decision.level, seeds - 1), seeds - 1, effect * seeds**0.5))

    seeds = needed(decision, greater(2.0))
    assert seeds is not None
    assert reached(seeds) >= 0.8 > reached(seeds - 1)
    assert needed(decided([-0.5, 0.5, 0.0001], greater(2.0)), greater(2.0)) is None
