"""Make the `wmt16` data set (English-German) from the archives of statmt.org: plain text, one sentence a line.

Tokenization and BPE happen later, in `fp8repro`. Training pairs are never changed, only left out (see `is_usable`).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from fp8repro.errors import UserError

ARCHIVES = {
    "de-en.tgz": "http://www.statmt.org/europarl/v7/de-en.tgz",
    "training-parallel-commoncrawl.tgz": "http://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",
    "training-parallel-nc-v11.tgz": "http://data.statmt.org/wmt16/translation-task/training-parallel-nc-v11.tgz",
    "dev.tgz": "http://data.statmt.org/wmt16/translation-task/dev.tgz",
    "test.tgz": "http://data.statmt.org/wmt16/translation-task/test.tgz",
}
# Digests that others publish: of the training texts TensorFlow Datasets, of the test sacreBLEU.
CHECKSUMS = {
    "training-parallel-commoncrawl.tgz": ("sha256", "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5"),
    "training-parallel-nc-v11.tgz": ("sha256", "cfe8ab047e05043476e498ee765c98e939c7b7d6d294e856344c84476b619d6a"),
    "test.tgz": ("md5", "3d809cd0c2c86adb2c67034d15c4e446"),
}
# Archive and name of each training text, without its language.
TRAINING = (
    ("de-en.tgz", "europarl-v7.de-en"),
    ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en"),
    ("training-parallel-nc-v11.tgz", "news-commentary-v11.de-en"),
)
# Archive, source and reference of each news test. That of 2014 is the German-English pair of files, read backwards.
NEWS_TESTS = {
    "newstest2013": ("dev.tgz", "newstest2013-src.en.sgm", "newstest2013-ref.de.sgm"),
    "newstest2014": ("dev.tgz", "newstest2014-deen-ref.en.sgm", "newstest2014-deen-src.de.sgm"),
    "newstest2015": ("dev.tgz", "newstest2015-ende-src.en.sgm", "newstest2015-ende-ref.de.sgm"),
    "newstest2016": ("test.tgz", "newstest2016-ende-src.en.sgm", "newstest2016-ende-ref.de.sgm"),
}
# Pairs of each text; an archive without a published digest is checked by these alone.
LINES = {
    "europarl-v7.de-en": 1_920_209,
    "commoncrawl.de-en": 2_399_123,
    "newstest2013": 3000,
    "newstest2014": 3003,
    "newstest2015": 2169,
    "newstest2016": 2999,
}
# Progress is shown this often.
REPORT_EVERY = 500_000


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archives", type=Path, help="folder with the archives: " + ", ".join(ARCHIVES))
    parser.add_argument("out", type=Path, help="folder to write {train,valid,test}.{en,de} to; give it as data.root")
    parser.add_argument("--fetch", action="store_true", help="download missing archives (1.8 GB) first")
    parser.add_argument(
        "--valid", default="newstest2015+newstest2016", help="news tests joined by + (fairseq's recipe: newstest2013)"
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options.archives, options.out, options.valid.split("+"), options.fetch)
    except UserError as error:
        print(f"prepare_wmt16: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(archives: Path, out: Path, valid: list[str], fetch: bool = False) -> dict[str, tuple[int, int]]:
    """Write the six files, each whole or not at all; gives (kept, left out) per split.

    Raises:
        UserError: an archive or a member of one is missing, is not the official one, or two sides differ in length.
    """
    for name in valid:
        if name not in NEWS_TESTS:
            raise UserError(f"--valid: got {name!r}, expected one of {', '.join(NEWS_TESTS)}")
    for name, url in ARCHIVES.items():
        if (archives / name).is_file():
            continue
        if not fetch:
            raise UserError(f"archives: {str(archives / name)!r} is missing, expected the file of {url} (or --fetch)")
        _download(url, archives / name)
    for name in CHECKSUMS:
        check_digest(archives / name)
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    for split, parts in (
        ("train", [training_pairs(archives, *part) for part in TRAINING]),
        ("valid", [news_pairs(archives, name) for name in valid]),
        ("test", [news_pairs(archives, "newstest2014")]),
    ):
        report[split] = _write(out, split, (pair for part in parts for pair in part), filtered=split == "train")
        print(f"{split}: {report[split][0]} pairs, {report[split][1]} left out")
    return report


def check_digest(archive: Path) -> None:
    """Compare an archive with the digest that `CHECKSUMS` holds for it.

    Raises:
        UserError: they differ.
    """
    algorithm, expected = CHECKSUMS[archive.name]
    with archive.open("rb") as file:
        given = hashlib.file_digest(file, algorithm).hexdigest()
    if given != expected:
        raise UserError(
            f"archives: {str(archive)!r} has {algorithm} {given}, expected {expected} "
            f"(damaged, or not the file of {ARCHIVES[archive.name]})"
        )


def is_usable(english: str, german: str) -> bool:
    """False for a pair with an empty side, or a character outside Latin-1 (NVIDIA's GNMT recipe leaves these out)."""
    try:
        (english + german).encode("latin-1")
    except UnicodeEncodeError:
        return False
    return bool(english.strip() and german.strip())


def training_pairs(archives: Path, archive: str, name: str) -> Iterator[tuple[str, str]]:
    """Aligned lines of a training text; lines end at a line feed alone."""
    english, german = (
        _read_member(archives / archive, f"{name}.{language}").removesuffix("\n").split("\n")
        for language in ("en", "de")
    )
    yield from _aligned(english, german, name)


def news_pairs(archives: Path, name: str) -> Iterator[tuple[str, str]]:
    """Segments of a news test."""
    archive, english, german = NEWS_TESTS[name]
    source, target = (sgm_segments(_read_member(archives / archive, member)) for member in (english, german))
    yield from _aligned(source, target, name)


def sgm_segments(text: str) -> list[str]:
    """Texts of the `<seg>` elements, entities resolved."""
    return [html.unescape(segment).strip() for segment in re.findall(r"<seg[^>]*>(.*?)</seg>", text, flags=re.DOTALL)]


def _aligned(english: list[str], german: list[str], name: str) -> Iterator[tuple[str, str]]:
    if len(english) != len(german):
        raise UserError(f"{name}: {len(english)} English and {len(german)} German lines, expected the same number")
    if len(english) != LINES.get(name, len(english)):
        raise UserError(f"{name}: {len(english)} lines, expected {LINES[name]} (not the official text)")
    yield from zip(english, german, strict=True)


def _read_member(archive: Path, name: str) -> str:
    """Text of the member of that base name, wherever it lies in the archive."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).name == name:
                    file = tar.extractfile(member)
                    assert file is not None
                    return _decoded(file.read(), f"{archive.name}, {name}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"archives: cannot read {str(archive)!r} ({error}), expected a whole .tgz file") from None
    raise UserError(f"archives: {archive.name} holds no {name}, expected the archive of {ARCHIVES[archive.name]}")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}: line {line} holds byte 0x{data[error.start]:02x}, expected UTF-8") from None


def _write(out: Path, split: str, pairs: Iterator[tuple[str, str]], filtered: bool) -> tuple[int, int]:
    kept, left_out = 0, 0
    partial = [out / f"{split}.{language}.part" for language in ("en", "de")]
    with partial[0].open("wb") as english_file, partial[1].open("wb") as german_file:
        for english, german in pairs:
            if filtered and not is_usable(english, german):
                left_out += 1
                continue
            english_file.write(english.encode("utf-8") + b"\n")
            german_file.write(german.encode("utf-8") + b"\n")
            kept += 1
            if kept % REPORT_EVERY == 0:
                print(f"{split}: {kept} pairs so far")
    for path in partial:
        path.rename(path.with_suffix(""))
    return kept, left_out


def _download(url: str, path: Path) -> None:
    print(f"fetching {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    try:
        urllib.request.urlretrieve(url, partial)
    except OSError as error:
        raise UserError(f"--fetch: cannot fetch {url} ({error}), expected a network connection") from None
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
