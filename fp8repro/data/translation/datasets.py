"""The translation data sets: synthetic, parallel text, WMT16, fairseq's binarized folders; all end as the last.

Text is prepared once into a fairseq folder in the cache. Nothing here may depend on workers for its result.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fp8repro.config import build_dataclass
from fp8repro.data.translation import corpus, fairseq_binary, grammar, lexicon, synthetic, text, vocabulary
from fp8repro.data.translation.cache import cached_folder, content_key
from fp8repro.data.translation.fairseq_binary import TokenSequences, read_binary, write_binary
from fp8repro.data.translation.vocabulary import EOS, SPECIAL, Vocabulary
from fp8repro.errors import UserError

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
    """

    vocabulary: Vocabulary
    languages: tuple[str, str]
    train: Split
    valid: Split
    test: Split
    skipped: Mapping[str, int]
    folder: Path

    def tokens(self, ids: list[int]) -> list[str]:
        """Words as Moses tokenizes them, subwords joined."""
        return text.join_subwords(self.vocabulary.decode(ids)).split()

    def detokenize(self, ids: list[int]) -> str:
        """Target ids to plain text."""
        return text.detokenize(self.vocabulary.decode(ids), self.languages[1])


@dataclass(frozen=True)
class TextSettings:
    """How text becomes ids.

    Attributes:
        source, target: languages, as Moses and file names call them.
        bpe_merges: joint merges to learn, where `bpe_codes` (a subword-nmt file) is not given.
        tokenized: lines are Moses tokens and subwords already; nothing is normalized, tokenized or segmented.
        max_length: longest training sentence in subwords, on either side.
    """

    source: str = "en"
    target: str = "de"
    bpe_merges: int = 4000
    bpe_codes: str | None = None
    tokenized: bool = False
    max_length: int = 100


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
    """Languages of a folder that fairseq-preprocess wrote."""

    source: str = "en"
    target: str = "de"


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
    return _open(cached_folder("synthetic_translation", key, build), ("en", "de"))


def _load_text(settings: ParallelSettings, root: Path, workers: int) -> TranslationData:
    languages = (settings.source, settings.target)
    names = {"train": settings.train, "valid": settings.valid, "test": settings.test}
    files = {split: corpus.corpus_files(root, names[split], languages) for split in SPLITS}
    inputs = [path for split in SPLITS for path in files[split]]
    inputs += [Path(settings.bpe_codes)] if settings.bpe_codes else []
    for path in inputs:
        if not path.is_file():
            raise UserError(f"data.root: {str(path)!r} is missing, expected a text file")

    def build(folder: Path) -> None:
        splits = {split: partial(corpus.read_pairs, files[split]) for split in SPLITS}
        _prepare(folder, splits, settings, workers)

    return _open(cached_folder("parallel_text", _key(settings, inputs), build), languages)


def _load_binary(settings: BinarySettings, root: Path, workers: int) -> TranslationData:
    return _open(root, (settings.source, settings.target))


LOADERS: dict[str, tuple[type[Any], dict[str, Any], Callable[..., TranslationData]]] = {
    "synthetic_translation": (SyntheticSettings, {}, _load_synthetic),
    "parallel_text": (ParallelSettings, {}, _load_text),
    # NVIDIA's GNMT recipe: 32,000 joint merges, sentences of at most 50 subwords.
    "wmt16": (ParallelSettings, {"bpe_merges": 32_000, "max_length": 50}, _load_text),
    "fairseq_binary": (BinarySettings, {}, _load_binary),
}


def _key(settings: Any, inputs: list[Path]) -> str:
    """Hash of all that decides the prepared files: settings, inputs' contents, this code, the tokenizers' versions."""
    code = [Path(inspect.getfile(part)) for part in (corpus, fairseq_binary, text, vocabulary, _key)]
    plain = {name: value for name, value in vars(settings).items() if name != "bpe_codes"}
    versions = {package: version(package) for package in ("sacremoses", "subword-nmt")}
    return content_key({"settings": plain, "versions": versions}, [*inputs, *code])


def _prepare(folder: Path, splits: Mapping[str, Callable[[], Pairs]], settings: TextSettings, workers: int) -> None:
    """Fill a folder with dictionaries, codes, binarized splits, references and the report of what was skipped."""
    languages = (settings.source, settings.target)
    for split in SPLITS:
        _write_tokenized(folder, split, splits[split](), settings, workers)
    segment = _segmentation(folder, settings)
    skipped = {"empty": 0, "too_long": 0}
    counter: Counter[str] = Counter()
    for split in SPLITS:
        rows: Rows = ((segment(s), segment(t)) for s, t in corpus.read_pairs(_files(folder, split, "tok", languages)))
        if split == "train":
            rows = _usable(rows, settings.max_length, skipped)
        with _Writers(_files(folder, split, "bpe", languages)) as write:
            for source, target in rows:
                write(" ".join(source), " ".join(target))
                if split == "train":
                    counter.update(source)
                    counter.update(target)
    if not counter:
        raise UserError(f"data.root: all training pairs are empty or over max_length={settings.max_length} subwords")
    words = Vocabulary.build(counter)
    for side, language in enumerate(languages):
        words.save(folder / f"dict.{language}.txt")
        for split in SPLITS:
            lines = corpus.read_lines(_files(folder, split, "bpe", languages)[side])
            encoded = (words.encode(line.split()) for line in lines)
            write_binary(folder / f"{split}.{'-'.join(languages)}.{language}", encoded, len(words))
    for split in SPLITS:
        for path in _files(folder, split, "tok", languages) + _files(folder, split, "bpe", languages):
            path.unlink()
    (folder / REPORT_FILE).write_text(json.dumps(skipped) + "\n", encoding="utf-8")


def _files(folder: Path, split: str, stage: str, languages: tuple[str, str]) -> tuple[Path, ...]:
    return corpus.corpus_files(folder, f"{split}.{stage}", languages)


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
    languages = (settings.source, settings.target)
    raw, tokenized = _files(folder, split, "raw", languages), _files(folder, split, "tok", languages)
    with _Writers(raw) as write:
        for source, target in pairs:
            write(source, target)
    for raw_path, path, language in zip(raw, tokenized, languages, strict=True):
        if settings.tokenized:
            raw_path.rename(path)
            continue
        with path.open("wb") as file:
            for line in text.tokenize_lines(corpus.read_lines(raw_path), language, workers):
                file.write(line.encode("utf-8") + b"\n")
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
        codes.write_bytes(Path(settings.bpe_codes).read_bytes())
    else:
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


def _open(folder: Path, languages: tuple[str, str]) -> TranslationData:
    """Open a folder in fairseq's layout.

    Raises:
        UserError: files are missing or malformed, sides differ in number, dictionaries are not joint,
            or an id lies outside the dictionary.
    """
    dictionaries = [Vocabulary.load(folder / f"dict.{language}.txt") for language in languages]
    if dictionaries[0].tokens != dictionaries[1].tokens:
        raise UserError(
            f"data.root: dict.{languages[0]}.txt and dict.{languages[1]}.txt in {str(folder)!r} differ, "
            "expected fairseq-preprocess --joined-dictionary"
        )
    words = dictionaries[0]
    splits = {}
    for split in SPLITS:
        stem = folder / f"{split}.{'-'.join(languages)}"
        source, target = (read_binary(Path(f"{stem}.{language}")) for language in languages)
        if len(source) != len(target):
            raise UserError(
                f"data.root: {split} in {str(folder)!r} has {len(source)} sources and {len(target)} targets, "
                "expected the same number"
            )
        for side in (source, target):
            _check_ids(side, len(words), f"{split} in {str(folder)!r}")
        splits[split] = Split(source, target, _references(folder, split, languages[1], target, words))
    return TranslationData(words, languages, **splits, skipped=_read_report(folder / REPORT_FILE), folder=folder)


def _read_report(path: Path) -> dict[str, int]:
    """Pairs that were left out, by reason; a folder that was not prepared here has no report."""
    if not path.is_file():
        return {}
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


def _references(folder: Path, split: str, language: str, target: TokenSequences, words: Vocabulary) -> list[str]:
    """Plain target lines where the folder has them, else detokenized from the ids."""
    if split == "train":
        return []
    plain = folder / f"{split}.{language}"
    if plain.is_file():
        return list(corpus.read_lines(plain))
    return [text.detokenize(words.decode(target[i].tolist()), language) for i in range(len(target))]
