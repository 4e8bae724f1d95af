"""How tokens join to words: by BPE's separator, by sentencepiece's word boundaries, or not at all.

Text that was segmented elsewhere must be scored on its words, so a segmentation that is not known is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fp8repro.errors import UserError

SEPARATOR = "@@"
BOUNDARY = "\u2581"
SCHEMES = ("auto", "bpe", "sentencepiece", "none")
# Shares of a text's tokens from which on they are meant as marks. Every sentence of sentencepiece has a boundary.
BOUNDARY_SHARE, SEPARATOR_SHARE = 1e-3, 0.05
NUMBERS = 1000
MADE_UP = re.compile(r"madeupword\d+")
TRAILING_MARK = re.compile(r"\w*[^\W_]((?P<sign>[^\w\s]|_)(?P=sign){1,3})")
# What marks other segmentations: pattern of a token, share of the tokens, name.
FOREIGN = (
    (re.compile(r"\u0120.*"), 0.1, "byte-level BPE (\u0120 before words)"),
    (re.compile(r"##\w+"), 0.01, "WordPiece (## within words)"),
    (re.compile(r".+</w>"), 0.01, "BPE with </w> at the ends of words"),
    (re.compile(r"\uffed.+|.+\uffed"), 0.01, "OpenNMT's joiners (\uffed)"),
)


@dataclass(frozen=True)
class SubwordScheme:
    """How tokens join to words.

    Attributes:
        name: bpe | sentencepiece | none.
        separator: of "bpe", the mark at the end of a token that is continued by the next one.
    """

    name: str
    separator: str = SEPARATOR

    @property
    def gives_plain_text(self) -> bool:
        """True where joined tokens are plain text; otherwise they are Moses tokens."""
        return self.name == "sentencepiece"

    def join(self, tokens: Iterable[str]) -> str:
        """Tokens to words, joined by spaces."""
        if self.name == "sentencepiece":
            return "".join(tokens).replace(BOUNDARY, " ").strip()
        if self.name == "none":
            return " ".join(tokens)
        return (" ".join(tokens) + " ").replace(f"{self.separator} ", "").strip()


DEFAULT_SCHEME = SubwordScheme("bpe")


def find_scheme(name: str, separator: str, counts: Mapping[str, int]) -> SubwordScheme:
    """The scheme of a setting, with "auto" by the tokens of a data set.

    Args:
        name: auto | bpe | sentencepiece | none.
        separator: of "bpe".
        counts: tokens, and how often each occurs.

    Raises:
        UserError: an unknown name, an empty separator, or tokens that look like another segmentation or like two.
    """
    if name not in SCHEMES:
        raise UserError(f"data.options.subwords: got {name!r}, expected one of {', '.join(SCHEMES)}")
    if not separator or separator != separator.strip():
        raise UserError(f"data.options.separator: got {separator!r}, expected what ends a token within a word")
    if name != "auto":
        return SubwordScheme(name, separator)
    # Dictionaries made from a sentencepiece model hold no true counts; so every token counts one more.
    weights = {token: count + 1 for token, count in counts.items() if not MADE_UP.fullmatch(token)}
    total = sum(weights.values()) or 1
    joined = sum(weight for token, weight in weights.items() if token.startswith(BOUNDARY)) / total
    separated = sum(weight for token, weight in weights.items() if token.endswith(separator)) / total
    if joined >= BOUNDARY_SHARE:
        if separated >= BOUNDARY_SHARE:
            _refuse(f"both {BOUNDARY!r} and {separator!r}")
        return SubwordScheme("sentencepiece")
    if not separated:
        _refuse_foreign(weights, total)
    return SubwordScheme("bpe", separator)


def _refuse_foreign(weights: Mapping[str, int], total: int) -> None:
    for pattern, share, name in FOREIGN:
        if sum(weight for token, weight in weights.items() if pattern.fullmatch(token)) >= share * total:
            _refuse(name)
    if len(weights) > NUMBERS and sum(token.isdecimal() for token in weights) > 0.9 * len(weights):
        _refuse("numbers instead of words (fairseq's GPT-2 BPE)")
    marks: Counter[str] = Counter()
    for token, weight in weights.items():
        if found := TRAILING_MARK.fullmatch(token):
            marks[found.group(1)] += weight
    for mark, weight in marks.most_common(1):
        if weight >= SEPARATOR_SHARE * total:
            _refuse(f"tokens that end with {mark!r} (data.options.separator={mark!r}?)")


def _refuse(found: str) -> None:
    raise UserError(
        f"data.options.subwords: got 'auto', but the tokens hold {found}; expected subwords of 'bpe' (tokens within a "
        f"word end with data.options.separator, {SEPARATOR!r}) or 'sentencepiece' ({BOUNDARY!r} before words), "
        "or 'none' where each token is a word"
    )
