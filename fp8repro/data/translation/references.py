"""The lines that translations are scored against: a data set's own, or rebuilt from ids where it has no text.

An unknown word of a reference never equals what a translation holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fp8repro.data.translation import corpus, text
from fp8repro.data.translation.fairseq_binary import TokenSequences
from fp8repro.data.translation.subwords import SubwordScheme
from fp8repro.data.translation.vocabulary import SPECIAL, UNKNOWN, Vocabulary
from fp8repro.errors import UserError


def reference_line(tokens: Iterable[str], language: str, words: Vocabulary, scheme: SubwordScheme) -> str:
    """Tokens of a reference to plain text, with the vocabulary's mark for `<unk>`."""
    mark = words.unknown_mark
    known = (mark if token == SPECIAL[UNKNOWN] else token for token in tokens)
    return text.detokenize(known, language, scheme)


def read_references(
    folder: Path,
    split: str,
    language: str,
    target: TokenSequences,
    words: Vocabulary,
    scheme: SubwordScheme,
    tokenized: bool,
) -> tuple[list[str], str]:
    """Plain target lines of a split, and what they were made from: "lines" of `<split>.<language>`, or "ids".

    Args:
        folder, split, language, target, words: the data set.
        scheme: how its tokens join to words.
        tokenized: the lines may be the tokens of which fairseq-preprocess made the ids.

    Raises:
        UserError: there are more or fewer lines than sentences, or they are no UTF-8.
    """
    plain = folder / f"{split}.{language}"
    if not plain.is_file():
        rebuilt = (
            reference_line(words.decode(target[i].tolist()), language, words, scheme) for i in range(len(target))
        )
        return list(rebuilt), "ids"
    lines = [line.removesuffix("\r") for line in corpus.read_lines(plain)]
    if len(lines) != len(target):
        raise UserError(
            f"data.root: {str(plain)!r} has {len(lines)} lines for {len(target)} sentences, expected the same number"
        )
    if tokenized and _are_tokens(lines, target, words, scheme):
        lines = [reference_line(line.split(), language, words, scheme) for line in lines]
    return lines, "lines"


def _are_tokens(lines: list[str], target: TokenSequences, words: Vocabulary, scheme: SubwordScheme) -> bool:
    """Whether lines are what the ids stand for, with or without their subwords joined."""
    for line, ids in zip(lines, (target[i].tolist() for i in range(len(target))), strict=True):
        tokens = line.split()
        joined = UNKNOWN not in ids and scheme.join(words.decode(ids)).split() == scheme.join(tokens).split()
        if not joined and words.encode(tokens).tolist() != ids:
            return False
    return True
