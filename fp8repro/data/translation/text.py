"""From raw text to subword units and back: Moses normalization and tokenization, joint BPE, detokenization.

BPE codes are subword-nmt's files, interchangeable with its command line. No corpus is read here.
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

from fp8repro.data.translation.corpus import without_mark
from fp8repro.data.translation.languages import HANGUL, is_known, moses_language
from fp8repro.data.translation.subwords import DEFAULT_SCHEME, SEPARATOR, SubwordScheme
from fp8repro.errors import UserError

BYTE_LEVEL_SPACE = "\u0120"
VERSION_ALONE = re.compile(r"#version: [\d.]+\n")
CODES_VERSIONS = ((0, 1), (0, 2))
# Soft hyphen, space of no width, non-joiner and joiner.
NO_WIDTH = "\u00ad\u200b\u200c\u200d"
UNSPACED = ("zh", "yue", "ja")
# They put no space beside their punctuation; Moses leaves one there.
WIDE = "[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
SPACE_BESIDE_WIDE = re.compile(f" (?={WIDE})|(?<={WIDE}) ")


@cache
def _moses(language: str):  # type: ignore[no-untyped-def]
    from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

    return MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language), MosesDetokenizer(lang=language)


def _language_of_line(code: str, line: str) -> str:
    """The language by whose rules Moses takes a line; Korean, which has spaces, where nothing else is known of it.

    Without its name Moses cuts Korean into characters, and joins them without spaces.
    """
    language = moses_language(code)
    return "ko" if not is_known(language) and HANGUL.search(line) else language


def tokenize(line: str, language: str) -> str:
    """Normalize punctuation and tokenize as Moses does (XML escapes included); tokens are joined by spaces."""
    normalizer, tokenizer, _ = _moses(_language_of_line(language, line))
    return tokenizer.tokenize(normalizer.normalize(line), return_str=True)


def is_cut(line: str) -> bool:
    """Whether Moses cut words of a tokenized line at marks that it takes for punctuation: `mo ̈ gen`.

    It knows the vowel signs of many scripts; it does not know accents of decomposed text, the tone marks of Thai or
    Burmese, soft hyphens and joiners of no width.
    """
    return not line.isascii() and _marks_alone().search(line) is not None


@cache
def _marks_alone() -> re.Pattern[str]:
    signs = (chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
    # Those that choose how an emoji looks do no harm.
    marks = "".join(sign for sign in signs if not ("\ufe00" <= sign <= "\ufe0f" or "\u20d0" <= sign <= "\u20ff"))
    return re.compile(f" [{marks}{NO_WIDTH}]")


def tokenize_lines(lines: Iterable[str], language: str, workers: int = 0) -> Iterator[str]:
    """Tokenize in order, with `workers` processes if that is over 1."""
    function = partial(tokenize, language=language)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(function, lines, chunksize=2000)
    else:
        yield from map(function, lines)


def detokenize(tokens: Iterable[str], language: str, scheme: SubwordScheme = DEFAULT_SCHEME) -> str:
    """Join subword units to words, then undo the tokenization and its escapes; joined sentencepiece is plain text."""
    text = scheme.join(tokens)
    if scheme.gives_plain_text:
        return text
    language = _language_of_line(language, text)
    line: str = _moses(language)[2].detokenize(text.split())
    return SPACE_BESIDE_WIDE.sub("", line) if language in UNSPACED else line


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
            text = without_mark(path.read_bytes().decode("utf-8")).rstrip() + "\n"
            # subword-nmt takes the end of a file without merges for a damaged line.
            merges = 0 if VERSION_ALONE.fullmatch(text) else -1
            with contextlib.redirect_stderr(io.StringIO()):
                self._bpe = BPE(io.StringIO(text), merges, SEPARATOR)
            if self._bpe.version not in CODES_VERSIONS:
                raise ValueError(f"version {self._bpe.version}")
        except OSError as error:
            raise UserError(f"data.options.bpe_codes: cannot read {str(path)!r} ({error.strerror})") from None
        except (UnicodeDecodeError, SystemExit, ValueError, IndexError):
            raise UserError(f"data.options.bpe_codes: {str(path)!r} is no codes file of subword-nmt") from None
        units = ["".join(pair) for pair in self._bpe.bpe_codes]
        if any(unit.startswith(BYTE_LEVEL_SPACE) for unit in units) and not any(u.endswith("</w>") for u in units):
            raise UserError(
                f"data.options.bpe_codes: {str(path)!r} is byte-level BPE (GPT-2's), expected codes of subword-nmt"
            )

    def segment(self, line: str) -> list[str]:
        """A tokenized line to subword units."""
        return self._bpe.process_line(line.strip()).split()
