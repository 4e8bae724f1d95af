"""The joint vocabulary of source and target, in fairseq's file format and numbering.

It must never give a token another id than its file does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8repro.errors import UserError

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE = " #fairseq:overwrite"
LONGEST_COUNT = 18  # digits


class Vocabulary:
    """Tokens and their ids: 0 `<s>`, 1 `<pad>`, 2 `</s>`, 3 `<unk>`, then the file's tokens in order."""

    def __init__(self, tokens: Sequence[str], counts: Sequence[int]) -> None:
        """Tokens without the four special ones, and how often each occurred."""
        self.tokens = [*SPECIAL, *tokens]
        self.counts = list(counts)
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.tokens)

    @classmethod
    def build(cls, counter: Counter[str], multiple: int = 8) -> Vocabulary:
        """Most frequent token first, padded with `madeupwordNNNN` to a multiple of `multiple` ids (as fairseq)."""
        ordered = sorted(((t, n) for t, n in counter.items() if t not in SPECIAL), key=lambda item: (-item[1], item[0]))
        tokens, counts = [token for token, _ in ordered], [count for _, count in ordered]
        made_up = -(len(SPECIAL) + len(tokens)) % multiple
        return cls(tokens + [f"madeupword{i:04d}" for i in range(made_up)], counts + [0] * made_up)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a `dict.*.txt`: `<token> <count>` a line, split at the last space.

        Raises:
            UserError: the file is missing, no UTF-8, a line has no count, or a token occurs twice.
        """
        try:
            lines = path.read_bytes().decode("utf-8").split("\n")
        except OSError as error:
            raise UserError(f"data.root: cannot read {str(path)!r} ({error.strerror}), expected a dictionary") from None
        except UnicodeDecodeError:
            raise UserError(f"data.root: {str(path)!r} is not UTF-8, expected a dictionary") from None
        tokens: list[str] = []
        counts: list[int] = []
        known: set[str] = set()
        for number, line in enumerate(lines, start=1):
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
        rows = zip(self.tokens[len(SPECIAL) :], self.counts, strict=True)
        path.write_bytes("".join(f"{token} {count}\n" for token, count in rows).encode("utf-8"))

    def encode(self, tokens: Iterable[str]) -> NDArray[np.int64]:
        """Ids with a trailing EOS."""
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
