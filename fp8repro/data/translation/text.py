"""From raw text to subword units and back: Moses normalization and tokenization, joint BPE, detokenization.

BPE codes are subword-nmt's files, interchangeable with its command line. No corpus is read here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

from fp8repro.errors import UserError

SEPARATOR = "@@"
CODES_VERSIONS = ((0, 1), (0, 2))


@cache
def _moses(language: str):  # type: ignore[no-untyped-def]
    from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

    return MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language), MosesDetokenizer(lang=language)


def tokenize(line: str, language: str) -> str:
    """Normalize punctuation and tokenize as Moses does (XML escapes included); tokens are joined by spaces."""
    normalizer, tokenizer, _ = _moses(language)
    return tokenizer.tokenize(normalizer.normalize(line), return_str=True)


def tokenize_lines(lines: Iterable[str], language: str, workers: int = 0) -> Iterator[str]:
    """Tokenize in order; with `workers` over 1, in so many processes."""
    function = partial(tokenize, language=language)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(function, lines, chunksize=2000)
    else:
        yield from map(function, lines)


def detokenize(tokens: Iterable[str], language: str) -> str:
    """Join subword units, then undo the tokenization and its escapes."""
    words = join_subwords(tokens).split()
    return _moses(language)[2].detokenize(words)


def join_subwords(tokens: Iterable[str]) -> str:
    """Subword units to words, joined by spaces (tokenized text)."""
    return (" ".join(tokens) + " ").replace(f"{SEPARATOR} ", "").strip()


def learn_bpe(lines: Iterable[str], merges: int, path: Path) -> None:
    """Learn joint BPE from tokenized lines of both languages into a codes file.

    Raises:
        UserError: `merges` is negative.
    """
    from subword_nmt.learn_bpe import learn_bpe as learn

    if merges < 0:
        raise UserError(f"data.options.bpe_merges: got {merges}, expected 0 or more")
    codes = io.StringIO()
    # learn_bpe takes an empty maximum when it has merged everything there is: a small corpus is no mistake.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):
        learn(lines, codes, merges)
    path.write_bytes(codes.getvalue().encode("utf-8"))


class Subwords:
    """BPE segmentation by a codes file."""

    def __init__(self, path: Path) -> None:
        """Read the codes.

        Raises:
            UserError: the file is missing or no codes file.
        """
        from subword_nmt.apply_bpe import BPE

        try:
            text = path.read_bytes().decode("utf-8")
            with contextlib.redirect_stderr(io.StringIO()):
                self._bpe = BPE(io.StringIO(text), separator=SEPARATOR)
            if self._bpe.version not in CODES_VERSIONS:
                raise ValueError(f"version {self._bpe.version}")
        except OSError as error:
            raise UserError(f"data.options.bpe_codes: cannot read {str(path)!r} ({error.strerror})") from None
        except (UnicodeDecodeError, SystemExit, ValueError, IndexError):
            raise UserError(f"data.options.bpe_codes: {str(path)!r} is no codes file of subword-nmt") from None

    def segment(self, line: str) -> list[str]:
        """A tokenized line to subword units."""
        return self._bpe.process_line(line.strip()).split()
