"""The translation data sets: synthetic, parallel text, WMT16 and fairseq's binarized folders.

Text is prepared once into a fairseq folder in the cache. Nothing here may depend on workers for its result.
"""

from __future__ import annotations

import inspect
import json
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fp8repro.data.translation import (
    corpus,
    fairseq_binary,
    grammar,
    languages,
    lexicon,
    references,
    subwords,
    synthetic,
    text,
    vocabulary,
)
from fp8repro.data.translation.fairseq_binary import TokenSequences, read_binary, write_binary
from fp8repro.data.translation.prepared import cached_folder, content_key
from fp8repro.data.translation.references import read_references, reference_line
from fp8repro.data.translation.subwords import DEFAULT_SCHEME, SEPARATOR, SubwordScheme, find_scheme
from fp8repro.data.translation.vocabulary import EOS, SPECIAL, Vocabulary
from fp8repro.errors import UserError
from fp8repro.fields import Count, build_dataclass

SPLITS = ("train", "valid", "test")
CODES_FILE = "bpe.codes"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Split:
    """Encoded pairs of one split, and the untokenized target lines they are scored against."""

    source: TokenSequences
    target: TokenSequences
    references: list[str]


@dataclass(frozen=True)
class TranslationData:
    """A data set as training sees it.

    Attributes:
        vocabulary: joint for both languages.
        languages: source and target.
        train: has no references. valid, test: have them.
        skipped: training pairs left out, by reason.
        folder: where the files lie, in fairseq's layout.
        scheme: how tokens join to words.
        references_from: "lines", or "ids" where the folder has no text: their unknown words are lost, and written as
            a mark that equals nothing in a translation.
    """

    vocabulary: Vocabulary
    languages: tuple[str, str]
    train: Split
    valid: Split
    test: Split
    skipped: Mapping[str, int]
    folder: Path
    scheme: SubwordScheme
    references_from: str

    def tokens(self, ids: list[int]) -> list[str]:
        """Words of target ids as Moses tokenizes them, subwords joined."""
        words = self.scheme.join(self.vocabulary.decode(ids))
        return (text.tokenize(words, self.languages[1]) if self.scheme.gives_plain_text else words).split()

    def detokenize(self, ids: list[int], side: int = 1) -> str:
        """Ids of the source (side 0) or the target (1) to plain text."""
        return text.detokenize(self.vocabulary.decode(ids), self.languages[side], self.scheme)


@dataclass(frozen=True)
class TextSettings:
    """How text becomes ids.

    Attributes:
        source, target: languages, as Moses and file names call them.
        bpe_merges: joint merges to learn, where `bpe_codes` (a subword-nmt file) is not given.
        tokenized: lines are Moses tokens and subwords already; nothing is normalized, tokenized or segmented.
        subwords: how tokens of `tokenized` lines join to words: auto | bpe | sentencepiece | none; see `find_scheme`.
        separator: what ends a token within a word, of "bpe".
        max_length: longest training sentence in subwords, on either side.
    """

    source: str = "en"
    target: str = "de"
    bpe_merges: int = 4000
    bpe_codes: str | None = None
    tokenized: bool = False
    subwords: str = "auto"
    separator: str = SEPARATOR
    max_length: Count = 100


@dataclass(frozen=True)
class ParallelSettings(TextSettings):
    """Text settings, and the names of the splits in the data's folder (`name.tsv`, or a stem of two files)."""

    train: str = "train"
    valid: str = "valid"
    test: str = "test"


@dataclass(frozen=True)
class SyntheticSettings:
    """Settings of the synthetic corpus; see `synthetic_corpus`."""

    seed: int = 1
    train: int = 20_000
    valid: int = 500
    test: int = 500
    max_words: int = 18
    bpe_merges: int = 1500


@dataclass(frozen=True)
class BinarySettings:
    """Languages of a folder that fairseq-preprocess wrote, and how its tokens join to words (see `find_scheme`)."""

    source: str = "en"
    target: str = "de"
    subwords: str = "auto"
    separator: str = SEPARATOR


Pairs = Iterator[tuple[str, str]]
Rows = Iterator[tuple[list[str], list[str]]]


def load_translation(
    name: str, root: str | None, options: Mapping[str, Any] | None = None, workers: int = 0
) -> TranslationData:
    """Load a translation data set by name, preparing it into the cache at first use.

    Args:
        name: "synthetic_translation", "parallel_text", "wmt16" or "fairseq_binary".
        root: folder of the data; unused by the synthetic corpus.
        options: fields of the data set's settings class above.
        workers: processes that tokenize; the result does not depend on it.

    Raises:
        UserError: an unknown name or option, or data that is missing or malformed.
    """
    if name not in LOADERS:
        raise UserError(f"data.name: got {name!r}, expected one of {', '.join(LOADERS)}")
    settings_class, defaults, load = LOADERS[name]
    settings = build_dataclass(settings_class, {**defaults, **(options or {})}, "data.options")
    if name == "synthetic_translation":
        return load(settings, workers)
    if root is None or not Path(root).is_dir():
        raise UserError(f"data.root: got {root!r}, expected the folder of the {name} data")
    return load(settings, Path(root), workers)


def _load_synthetic(settings: SyntheticSettings, workers: int) -> TranslationData:
    def build(folder: Path) -> None:
        pairs = synthetic.synthetic_corpus(
            settings.seed, settings.train, settings.valid, settings.test, settings.max_words
        )
        _prepare(folder, {split: partial(iter, pairs[split]) for split in SPLITS}, text_settings, workers)

    text_settings = TextSettings(bpe_merges=settings.bpe_merges)
    key = _key(settings, [Path(inspect.getfile(part)) for part in (grammar, lexicon, synthetic)])
    return _open(cached_folder("synthetic_translation", key, build), text_settings)


def _load_text(settings: ParallelSettings, root: Path, workers: int) -> TranslationData:
    _check_text_settings(settings)
    pair = _languages(settings)
    names = {"train": settings.train, "valid": settings.valid, "test": settings.test}
    files = {split: corpus.corpus_files(root, names[split], pair) for split in SPLITS}
    inputs = [path for split in SPLITS for path in files[split]]
    inputs += [Path(settings.bpe_codes)] if settings.bpe_codes else []
    for path in inputs:
        if not path.is_file():
            raise UserError(f"data.root: {str(path)!r} is missing, expected a text file")
    for split in SPLITS:
        if next(corpus.read_pairs(files[split]), None) is None:
            raise UserError(f"data.root: {str(files[split][0])!r} has no line, expected at least one")

    def build(folder: Path) -> None:
        splits = {split: partial(corpus.read_pairs, files[split]) for split in SPLITS}
        _prepare(folder, splits, settings, workers)

    return _open(cached_folder("parallel_text", _key(settings, inputs), build), settings)


def _load_binary(settings: BinarySettings, root: Path, workers: int) -> TranslationData:
    return _open(root, settings)


def _languages(settings: TextSettings | BinarySettings) -> tuple[str, str]:
    """Source and target; files are named by them.

    Raises:
        UserError: they are the same, or no names of files.
    """
    for side in ("source", "target"):
        code = getattr(settings, side)
        if not code or "/" in code or code != code.strip():
            raise UserError(f"data.options.{side}: got {code!r}, expected a language as in the names of the files")
    if settings.source == settings.target:
        raise UserError(f"data.options.target: got {settings.target!r}, expected another language than the source's")
    return settings.source, settings.target


def _check_text_settings(settings: TextSettings) -> None:
    """Raise UserError for a setting that has no effect: tokenized text is not segmented here, other text is."""
    if settings.tokenized:
        if settings.bpe_codes:
            raise UserError(
                f"data.options.bpe_codes: got {settings.bpe_codes!r}, expected none with data.options.tokenized=true "
                "(lines are subwords already)"
            )
    elif settings.subwords not in ("auto", "bpe") or settings.separator != SEPARATOR:
        name = "subwords" if settings.subwords not in ("auto", "bpe") else "separator"
        raise UserError(
            f"data.options.{name}: got {getattr(settings, name)!r}, expected it with data.options.tokenized=true alone "
            "(other text is segmented here)"
        )


def _scheme(settings: TextSettings | BinarySettings, words: Vocabulary) -> SubwordScheme:
    if isinstance(settings, TextSettings) and not settings.tokenized:
        return DEFAULT_SCHEME
    counts = dict(zip(words.tokens[len(SPECIAL) :], words.counts, strict=True))
    return find_scheme(settings.subwords, settings.separator, counts)


LOADERS: dict[str, tuple[type[Any], dict[str, Any], Callable[..., TranslationData]]] = {
    "synthetic_translation": (SyntheticSettings, {}, _load_synthetic),
    "parallel_text": (ParallelSettings, {}, _load_text),
    # NVIDIA's GNMT recipe: 32,000 joint merges, sentences of at most 50 subwords.
    "wmt16": (ParallelSettings, {"bpe_merges": 32_000, "max_length": 50}, _load_text),
    "fairseq_binary": (BinarySettings, {}, _load_binary),
}


def _key(settings: Any, inputs: list[Path]) -> str:
    """Hash of everything that the prepared files depend on: settings, inputs, this code, versions of the tokenizers."""
    parts = (corpus, fairseq_binary, languages, references, subwords, text, vocabulary, _key)
    code = [Path(inspect.getfile(part)) for part in parts]
    plain = {name: value for name, value in vars(settings).items() if name != "bpe_codes"}
    versions = {package: version(package) for package in ("sacremoses", "subword-nmt")}
    return content_key({"settings": plain, "versions": versions}, [*inputs, *code])


def _prepare(folder: Path, splits: Mapping[str, Callable[[], Pairs]], settings: TextSettings, workers: int) -> None:
    """Fill a folder with dictionaries, codes, binarized splits, references and the report of what was skipped."""
    pair = (settings.source, settings.target)
    for split in SPLITS:
        _write_tokenized(folder, split, splits[split](), settings, workers)
    segment = _segmentation(folder, settings)
    skipped = {"empty": 0, "too_long": 0}
    counter: Counter[str] = Counter()
    for split in SPLITS:
        rows: Rows = ((segment(s), segment(t)) for s, t in corpus.read_pairs(_files(folder, split, "tok", pair)))
        if split == "train":
            rows = _usable(rows, settings.max_length, skipped)
        with _Writers(_files(folder, split, "bpe", pair)) as write:
            for source, target in rows:
                write(" ".join(source), " ".join(target))
                if split == "train":
                    counter.update(source)
                    counter.update(target)
    if not counter:
        raise UserError(f"data.root: all training pairs are empty or over max_length={settings.max_length} subwords")
    words = Vocabulary.build(counter)
    for side, language in enumerate(pair):
        words.save(folder / f"dict.{language}.txt")
        for split in SPLITS:
            lines = corpus.read_lines(_files(folder, split, "bpe", pair)[side])
            encoded = (words.encode(line.split()) for line in lines)
            write_binary(folder / f"{split}.{'-'.join(pair)}.{language}", encoded, len(words))
    if settings.tokenized:
        _write_references(folder, settings, words)
    for split in SPLITS:
        for path in _files(folder, split, "tok", pair) + _files(folder, split, "bpe", pair):
            path.unlink()
    (folder / REPORT_FILE).write_text(json.dumps(skipped) + "\n", encoding="utf-8")


def _write_references(folder: Path, settings: TextSettings, words: Vocabulary) -> None:
    """The plain text of the tokenized valid and test targets, with the words that the dictionary lacks."""
    scheme = _scheme(settings, words)
    for split in SPLITS[1:]:
        path = _files(folder, split, "tok", (settings.source, settings.target))[1]
        lines = (reference_line(line.split(), settings.target, words, scheme) for line in corpus.read_lines(path))
        (folder / f"{split}.{settings.target}").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def _files(folder: Path, split: str, stage: str, pair: tuple[str, str]) -> tuple[Path, ...]:
    return corpus.corpus_files(folder, f"{split}.{stage}", pair)


class _Writers:
    """Two line-aligned UTF-8 files, written a pair at a time."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._files = [path.open("wb") for path in paths]

    def __enter__(self) -> Callable[[str, str], None]:
        return self._write

    def _write(self, source: str, target: str) -> None:
        for file, line in zip(self._files, (source, target), strict=True):
            file.write(line.encode("utf-8") + b"\n")

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def _write_tokenized(folder: Path, split: str, pairs: Pairs, settings: TextSettings, workers: int) -> None:
    """Tokenized lines of both sides; of the valid and test targets the plain lines too, to score against."""
    pair = (settings.source, settings.target)
    raw, tokenized = _files(folder, split, "raw", pair), _files(folder, split, "tok", pair)
    with _Writers(raw) as write:
        for source, target in pairs:
            write(source, target)
    for raw_path, path, language in zip(raw, tokenized, pair, strict=True):
        if settings.tokenized:
            raw_path.rename(path)
            continue
        cut: list[str] = []
        with path.open("wb") as file:
            for line in text.tokenize_lines(corpus.read_lines(raw_path), language, workers):
                file.write(line.encode("utf-8") + b"\n")
                if text.is_cut(line):
                    cut.append(line)
        if cut:
            print(
                f"data.root: Moses cuts words at combining or invisible marks in {len(cut)} lines of "
                f"{split}.{language} ({cut[0][:60]!r}); expected composed text (NFC) without soft hyphens, or "
                "data.options.tokenized=true with subwords for scripts that it does not know",
                file=sys.stderr,
            )
        if split != "train" and language == settings.target:
            raw_path.rename(folder / f"{split}.{language}")
        else:
            raw_path.unlink()


def _segmentation(folder: Path, settings: TextSettings) -> Callable[[str], list[str]]:
    """Tokenized line to subwords; learns the codes from the training lines where none are given."""
    if settings.tokenized:
        return str.split
    codes = folder / CODES_FILE
    if settings.bpe_codes:
        given = Path(settings.bpe_codes)
        segmenter = text.Subwords(given)
        codes.write_bytes(given.read_bytes().removeprefix(BOM_UTF8))
        return segmenter.segment
    paths = _files(folder, "train", "tok", (settings.source, settings.target))
    text.learn_bpe((line for path in paths for line in corpus.read_lines(path)), settings.bpe_merges, codes)
    return text.Subwords(codes).segment


def _usable(rows: Rows, longest: int, skipped: dict[str, int]) -> Rows:
    """Leave out pairs with an empty or too long side, and count them in `skipped`."""
    for source, target in rows:
        if not source or not target:
            skipped["empty"] += 1
        elif max(len(source), len(target)) > longest:
            skipped["too_long"] += 1
        else:
            yield source, target


def _open(folder: Path, settings: TextSettings | BinarySettings) -> TranslationData:
    """Open a folder in fairseq's layout.

    Raises:
        UserError: files are missing or malformed, a split is empty, sides differ in number, dictionaries are not
            joint, an id lies outside the dictionary, or it is not known how tokens join to words.
    """
    pair = _languages(settings)
    dictionaries = [Vocabulary.load(folder / f"dict.{language}.txt") for language in pair]
    if dictionaries[0].tokens != dictionaries[1].tokens:
        raise UserError(
            f"data.root: dict.{pair[0]}.txt and dict.{pair[1]}.txt in {str(folder)!r} differ, "
            "expected fairseq-preprocess --joined-dictionary"
        )
    words = dictionaries[0]
    scheme = _scheme(settings, words)
    report = _read_report(folder / REPORT_FILE)
    splits, origin = {}, "lines"
    for split in SPLITS:
        stem = folder / f"{split}.{'-'.join(pair)}"
        source, target = (read_binary(Path(f"{stem}.{language}")) for language in pair)
        if len(source) != len(target):
            raise UserError(
                f"data.root: {split} in {str(folder)!r} has {len(source)} sources and {len(target)} targets, "
                "expected the same number"
            )
        if not len(source):
            raise UserError(f"data.root: {split} in {str(folder)!r} is empty, expected at least one pair")
        for side in (source, target):
            _check_ids(side, len(words), f"{split} in {str(folder)!r}")
        lines: list[str] = []
        if split != "train":
            lines, origin = read_references(folder, split, pair[1], target, words, scheme, tokenized=report is None)
        splits[split] = Split(source, target, lines)
    return TranslationData(
        words, pair, **splits, skipped=report or {}, folder=folder, scheme=scheme, references_from=origin
    )


def _read_report(path: Path) -> dict[str, int] | None:
    """Pairs that were left out, by reason; None of a folder that was not prepared here."""
    if not path.is_file():
        return None
    try:
        skipped = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        skipped = None
    if not isinstance(skipped, dict) or not all(type(count) is int for count in skipped.values()):
        raise UserError(f"data.root: {str(path)!r} is no report of left-out pairs, expected counts by reason")
    return skipped


def _check_ids(sequences: TokenSequences, vocab_size: int, name: str) -> None:
    if not len(sequences):
        return
    for extreme in (sequences.tokens.min(), sequences.tokens.max()):
        if not 0 <= int(extreme) - sequences.shift < vocab_size:
            raise UserError(
                f"data.root: {name} holds id {int(extreme) - sequences.shift}, expected 0 to {vocab_size - 1} "
                "(the dictionary is another data set's)"
            )
    last = sequences.tokens[sequences.starts + sequences.sizes - 1] if sequences.sizes.min() > 0 else np.zeros(1)
    if np.any(last != EOS + sequences.shift):
        raise UserError(f"data.root: {name} holds a sentence without {SPECIAL[EOS]} at its end, expected fairseq data")
