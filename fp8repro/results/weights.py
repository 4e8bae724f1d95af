"""Two trained models on the same examples: what is said of these weights, not of the recipe that trained them.

McNemar's exact test on images, sacreBLEU's paired bootstrap on translations. A recipe is judged over seeds alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8repro.paper.examples import examples_recorded, read_correct, read_translations
from fp8repro.paper.plan import study_models
from fp8repro.results.cells import CellRuns, Cells, Run, comparable
from fp8repro.results.sheet import Column, Sheet

RESAMPLES = 1000
# The tokenizers that runs are scored with.
TOKENIZERS = ("13a", "zh", "ja-mecab", "ko-mecab", "char", "none")
# A record of examples whose score differs by more from that of its run is another run's.
LEAST_DIFFERENCE = 1e-6
APART = "the records of the two are of different examples, do not add up to their scores, or are damaged"
SAME_SEED, OTHER_SEED = "FP8 against FP32", "FP32 against FP32 of another seed"


@dataclass(frozen=True)
class Compared:
    """Two models on the same examples.

    Attributes:
        examples: how many. first, second: their scores. p: of no difference.
        differ: as text: images that one of them alone has right, or the difference in BLEU.
        signature: how BLEU was resampled.
    """

    examples: int
    first: float
    second: float
    differ: str
    p: float
    signature: str = ""


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Compared:
    """McNemar's exact test, two-sided, of two models' hits [N] on the same images."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    differ = f"{only_first} + {only_second}"
    return Compared(len(first), 100 * float(first.mean()), 100 * float(second.mean()), differ, p)


def paired_bootstrap(
    first: Sequence[str], second: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> Compared:
    """sacreBLEU's paired bootstrap test of two models' translations of the same lines.

    Args:
        first, second, references: lines. tokenize: sacreBLEU's name of a tokenizer.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest, Result

    metric = BLEU(tokenize=tokenize, force=True)
    systems: list[tuple[str, Sequence[str]]] = [("first", list(first)), ("second", list(second))]
    test = PairedTest(systems, {"BLEU": metric}, [list(references)], "bs", RESAMPLES)
    signatures, scores = test()
    baseline, other = (result for result in scores["BLEU"] if isinstance(result, Result))
    difference = f"{other.score - baseline.score:+.2f}"
    signature = str(signatures["BLEU"])
    return Compared(len(references), baseline.score, other.score, difference, float(other.p_value or 0.0), signature)


def compare_weights(first: Run, second: Run) -> Compared | None:
    """Two runs on the examples of both; None where their records do not say, or are of other examples."""
    ours, theirs = _correct(first), _correct(second)
    if ours is not None and theirs is not None and ours[0] == theirs[0] and len(ours[1]) == len(theirs[1]):
        return mcnemar(ours[1], theirs[1])
    translated, other = (read_translations(run.record.folder) for run in (first, second))
    if translated is None or other is None or translated[1] != other[1]:
        return None
    signature = str(first.record.summary.get("bleu_signature"))
    tokenize = dict(part.split(":", 1) for part in signature.split("|") if ":" in part).get("tok", "13a")
    # The name comes from elsewhere, and some of sacreBLEU's tokenizers are downloaded.
    if tokenize not in TOKENIZERS:
        return None
    try:
        found = paired_bootstrap(translated[0], other[0], other[1], tokenize)
    # The tokenizer's package is missing, or the lines are such that nothing can be scored.
    except (ImportError, RuntimeError, AssertionError, ValueError):
        return None
    scores = (first.record.score, second.record.score)
    return found if all(map(_same, scores, (found.first, found.second))) else None


def weights_sheet(cells: Cells, profile: str) -> Sheet:
    """For each model of C1 and C2: FP8 against FP32 of the same seed, and FP32 against FP32 of the next."""
    rows, signatures, missing = [], [], []
    for model in [*study_models("C1", profile), *study_models("C2", profile)]:
        fp32, fp8 = cells[f"{model}_fp32"], cells[f"{model}_fp8"]
        same = [(fp32.runs[seed], fp8.runs[seed]) for seed in sorted(set(fp32.runs) & set(fp8.runs))]
        for kind, pairs in ((SAME_SEED, same if comparable(fp32, fp8) else []), (OTHER_SEED, _neighbours(fp32))):
            found = []
            for pair in pairs:
                compared = compare_weights(*pair)
                if compared is not None:
                    found.append(compared)
                elif all(examples_recorded(run.record.folder) for run in pair):
                    missing.append(f"Left out: {model}, {kind}, seed {pair[0].record.seed}: {APART}.")
            rows.append({"model": model, "pair": kind, **_row(found)})
            signatures += [compared.signature for compared in found if compared.signature]
    columns = [
        Column("model"), Column("pair", "weights"), Column("examples", digits=0), Column("first", "score"),
        Column("second", "score of the other"), Column("differ", "right in one alone; difference in BLEU"),
        Column("p", "p of no difference"),
    ]  # fmt: skip
    notes = [
        "A figure for each pair of runs. It speaks for these weights on these examples, not for the recipe: FP32 runs "
        "with different seeds differ, too. Images: McNemar's exact test; translations: sacreBLEU's paired bootstrap.",
        *(f"Bootstrap signature: {signature}" for signature in dict.fromkeys(signatures)),
        *missing,
    ]
    return Sheet("weights", "The same examples, one by one: these weights, not this recipe", columns, rows, notes)


def _correct(run: Run) -> tuple[str, NDArray[np.bool_]] | None:
    """Order and correctness of a run's images; None where they do not add up to its score."""
    found = read_correct(run.record.folder)
    return found if found and _same(run.record.score, 100 * float(found[1].mean())) else None


def _same(score: float, counted: float) -> bool:
    return abs(score - counted) < LEAST_DIFFERENCE


def _neighbours(cell: CellRuns) -> Iterable[tuple[Run, Run]]:
    return pairwise(cell.in_order)


def _row(found: Sequence[Compared]) -> dict[str, Any]:
    if not found:
        return {}
    return {
        "examples": found[0].examples,
        "first": " / ".join(f"{compared.first:.2f}" for compared in found),
        "second": " / ".join(f"{compared.second:.2f}" for compared in found),
        "differ": " / ".join(compared.differ for compared in found),
        "p": " / ".join(f"{compared.p:.2g}" for compared in found),
    }
