"""The joint vocabulary of source and target, in fairseq's file format and numbering.

It must never give a token another id than its file does, nor a word of a text one of the ids with a meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import count as count_from
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8repro.data.translation.corpus import without_mark
from fp8repro.errors import UserError

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE = " #fairseq:overwrite"
LONGEST_COUNT = 18  # digits
# What an unknown word of a reference is written as: not "<unk>", which a translation may hold and which 13a cuts up.
UNKNOWN_MARKS = ("\u2047", "\ufffd", "\ue000")


class Vocabulary:
    """Tokens and their ids: 0 `<s>`, 1 `<pad>`, 2 `</s>`, 3 `<unk>`, then the file's tokens in order."""

    def __init__(self, tokens: Sequence[str], counts: Sequence[int]) -> None:
        """Tokens without the four special ones, and how often each occurred."""
        self.tokens = [*SPECIAL, *tokens]
        self.counts = list(counts)
        # A "</s>" within a text is a word like any other: it has the id that the file gives it, or none.
        self.ids = {token: i for i, token in enumerate(tokens, start=len(SPECIAL))}

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.tokens)

    @classmethod
    def build(cls, counter: Counter[str], multiple: int = 8) -> Vocabulary:
        """Most frequent token first, padded with `madeupwordNNNN` to a multiple of `multiple` ids (as fairseq).

        `<unk>` gets no id of its own: in tokenized text it stands for an unknown word.
        """
        words = ((t, n) for t, n in counter.items() if t != SPECIAL[UNKNOWN])
        ordered = sorted(words, key=lambda item: (-item[1], item[0]))
        tokens, counts = [token for token, _ in ordered], [count for _, count in ordered]
        free = (name for i in count_from() if (name := f"madeupword{i:04d}") not in counter)
        made_up = list(islice(free, -(len(SPECIAL) + len(tokens)) % multiple))
        return cls(tokens + made_up, counts + [0] * len(made_up))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a `dict.*.txt`: `<token> <count>` a line, split at the last space; lines may end as on Windows.

        A token that occurs again, as a special one does whose name is a word of the text, needs fairseq's mark behind
        its count, and has the last of its ids.

        Raises:
            UserError: the file is missing, no UTF-8, a line has no count, or a token occurs again without the mark.
        """
        try:
            content = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"data.root: cannot read {str(path)!r} ({error.strerror}), expected a dictionary") from None
        except UnicodeDecodeError:
            raise UserError(f"data.root: {str(path)!r} is not UTF-8, expected a dictionary") from None
        # A byte order mark before a space is a token that a text holds.
        lines = (content if content[1:2] == " " else without_mark(content)).split("\n")
        tokens: list[str] = []
        counts: list[int] = []
        known = set(SPECIAL)
        for number, line in enumerate((line.removesuffix("\r") for line in lines), start=1):
            if not line:
                continue
            overwrite = line.endswith(OVERWRITE)
            token, _, count = line.removesuffix(OVERWRITE).rpartition(" ")
            if not token or not count.isdecimal() or len(count) > LONGEST_COUNT:
                raise UserError(f"data.root: {str(path)!r} line {number} is {line[:60]!r}, expected '<token> <count>'")
            if token in known and not overwrite:
                raise UserError(f"data.root: {str(path)!r} line {number} repeats {token!r}, expected each token once")
            known.add(token)
            tokens.append(token)
            counts.append(int(count))
        return cls(tokens, counts)

    def save(self, path: Path) -> None:
        """Write the format that `load` reads; the special tokens are not in it."""
        known, rows = set(SPECIAL), []
        for token, count in zip(self.tokens[len(SPECIAL) :], self.counts, strict=True):
            rows.append(f"{token} {count}{OVERWRITE if token in known else ''}\n")
            known.add(token)
        path.write_bytes("".join(rows).encode("utf-8"))

    def encode(self, tokens: Iterable[str]) -> NDArray[np.int64]:
        """Ids with a trailing EOS; a token that is not in the file, `</s>` too, is unknown."""
        return np.array([self.ids.get(token, UNKNOWN) for token in tokens] + [EOS], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Tokens up to the first EOS, padding and BOS left out."""
        tokens = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, BOS):
                tokens.append(self.tokens[i])
        return tokens

    @cached_property
    def unknown_mark(self) -> str:
        """What an unknown word of a reference is written as: a character that no token, so no translation, holds."""
        return next((mark for mark in UNKNOWN_MARKS if not any(mark in t for t in self.tokens)), UNKNOWN_MARKS[-1])
