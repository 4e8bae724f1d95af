"""Translation scores from lines of text: sacreBLEU (detokenized), tokenized BLEU, chrF. Reads no model and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8repro.errors import UserError

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU


@dataclass(frozen=True)
class Score:
    """A corpus score.

    Attributes:
        value: 0 to 100.
        signature: what sacrebleu needs to give the same number again.
        brevity_penalty, precisions: of BLEU; 1 and empty for chrF.
    """

    value: float
    signature: str
    brevity_penalty: float = 1.0
    precisions: tuple[float, ...] = ()


def sacrebleu_score(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> Score:
    """BLEU of detokenized lines with sacreBLEU's own choice of tokenization for the target language.

    That is 13a (the paper's measure for WMT16, section 4) but for Chinese, Japanese and Korean, which it would not cut
    into words. Where the packages for the latter two are missing, their characters are compared; the signature tells.

    Args:
        hypotheses, references: lines.
        language: "zh", "ja", "ko", or any other; see `scoring_language`.
    """
    from sacrebleu.metrics import BLEU

    try:
        metric = BLEU(trg_lang=language, force=True)
    except (ImportError, RuntimeError, AssertionError):
        # MeCab or its dictionary is missing or another one.
        metric = BLEU(tokenize="char", force=True)
    return _bleu(hypotheses, references, metric)


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """BLEU of lines whose tokens are separated by spaces already; comparable to no published sacreBLEU."""
    from sacrebleu.metrics import BLEU

    return _bleu(hypotheses, references, BLEU(tokenize="none", force=True))


def chrf_score(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2 of detokenized lines."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    result = metric.corpus_score(*_checked(hypotheses, references))
    return Score(float(result.score), str(metric.get_signature()))


def _bleu(hypotheses: Sequence[str], references: Sequence[str], metric: BLEU) -> Score:
    result = metric.corpus_score(*_checked(hypotheses, references))
    return Score(float(result.score), str(metric.get_signature()), float(result.bp), tuple(result.precisions))


def _checked(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    if not references or len(hypotheses) != len(references):
        raise UserError(f"references: got {len(references)} for {len(hypotheses)} translations, expected one for each")
    return list(hypotheses), [list(references)]
