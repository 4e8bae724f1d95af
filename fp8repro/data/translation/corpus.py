"""Reads parallel text: two line-aligned UTF-8 files, or one file with a tab between source and target.

Lines end at a line feed and nowhere else. Nothing here skips a line; of one, nothing but a byte order mark at its start
(files that were joined have one inside) and a carriage return at its end is left out.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from fp8repro.errors import UserError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def without_mark(text: str) -> str:
    """A text without the byte order mark at its start."""
    return text.removeprefix("\ufeff")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, without their ends and without a byte order mark at their start.

    Raises:
        UserError: the file cannot be read, a line is not UTF-8, or there are carriage returns and no line feed.
    """
    try:
        # A file opened in binary mode ends its lines at b"\n" alone.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.startswith(UTF16_MARKS) or 3 * line.count(0) > len(line):
                    raise UserError(f"data.root: {str(path)!r} line {number} looks like UTF-16, expected UTF-8")
                if number == 1 and not line.endswith(b"\n") and b"\r" in line.rstrip():
                    raise UserError(
                        f"data.root: {str(path)!r} ends its lines with carriage returns alone, expected line feeds"
                    )
                try:
                    yield without_mark(line.removesuffix(b"\n").decode("utf-8"))
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise UserError(
                        f"data.root: {str(path)!r} line {number} holds byte 0x{byte:02x} (column {error.start + 1}), "
                        "expected UTF-8"
                    ) from None
    except OSError as error:
        raise UserError(f"data.root: cannot read {str(path)!r} ({error.strerror}), expected a text file") from None


def corpus_files(root: Path, name: str, languages: tuple[str, str]) -> tuple[Path, ...]:
    """The files of a split: `<name>` itself where it ends in .tsv, else `<name>.<source>` and `<name>.<target>`."""
    if name.endswith(".tsv"):
        return (root / name,)
    return tuple(root / f"{name}.{language}" for language in languages)


def read_pairs(files: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """Pairs of source and target lines of the files that `corpus_files` names; they may end as on Windows.

    Raises:
        UserError: a file cannot be read or is not UTF-8, the two files differ in length, or a line of a
            tab-separated file has not two columns.
    """
    if len(files) == 1:
        for number, line in enumerate(read_lines(files[0]), start=1):
            columns = line.removesuffix("\r").split("\t")
            if len(columns) != 2:
                raise UserError(
                    f"data.root: {str(files[0])!r} line {number} has {len(columns)} columns, expected source and target"
                )
            # Where two files with a byte order mark were pasted, the second column has one too.
            yield columns[0], without_mark(columns[1])
        return
    source, target = files
    for source_line, target_line in zip_longest(read_lines(source), read_lines(target)):
        if source_line is None or target_line is None:
            lengths = [sum(1 for _ in read_lines(path)) for path in files]
            raise UserError(
                f"data.root: {str(source)!r} has {lengths[0]} lines and {str(target)!r} has {lengths[1]}, "
                "expected the same number"
            )
        yield source_line.removesuffix("\r"), target_line.removesuffix("\r")
