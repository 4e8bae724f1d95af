"""fairseq's binary files, against bytes that fairseq 0.12's own builders wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fp8repro.data.translation.datasets import load_translation
from fp8repro.data.translation.fairseq_binary import read_binary, write_binary
from fp8repro.data.translation.vocabulary import Vocabulary
from fp8repro.errors import UserError

SEQUENCES = [[4, 5, 2], [2], [1000, 7, 4, 2], [65000, 2]]
# (idx, bin) of SEQUENCES by fairseq's make_builder(..., impl, vocab_size): mmap at 65001 and 70000 ids, cached.
WRITTEN_BY_FAIRSEQ = {
    "mmap_u2": (
        "4d4d494449445800000100000000000000080400000000000000030000000100000004000000020000000000000000000000"
        "060000000000000008000000000000001000000000000000",
        "0400050002000200e803070004000200e8fd0200",
    ),
    "mmap_u4": (
        "4d4d4944494458000001000000000000000904000000000000000300000001000000040000000200000000000000000000000c"
        "0000000000000010000000000000002000000000000000",
        "04000000050000000200000002000000e8030000070000000400000002000000e8fd000002000000",
    ),
    "legacy": (
        "544e544944580000010000000000000004000000000000000400000000000000040000000000000004000000000000000000"
        "000000000000010000000000000002000000000000000300000000000000040000000000000000000000000000000300000000"
        "000000040000000000000008000000000000000a000000000000000300000000000000010000000000000004000000000000"
        "000200000000000000",
        "05000000060000000300000003000000e9030000080000000500000003000000e9fd000003000000",
    ),
}


def store(folder: Path, layout: str) -> Path:
    index, data = (bytes.fromhex(text) for text in WRITTEN_BY_FAIRSEQ[layout])
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(data)
    return folder / "x"


@pytest.mark.parametrize("layout", list(WRITTEN_BY_FAIRSEQ))
def test_files_written_by_fairseq_are_read(tmp_path: Path, layout: str) -> None:
    found = read_binary(store(tmp_path, layout))
    assert [found[i].tolist() for i in range(len(found))] == SEQUENCES
    assert found.sizes.tolist() == [3, 1, 4, 2]
    assert isinstance(found.tokens, np.memmap)


@pytest.mark.parametrize(("layout", "vocab_size"), [("mmap_u2", 65499), ("mmap_u4", 65500), ("mmap_u4", 70000)])
def test_files_are_written_as_fairseq_does(tmp_path: Path, layout: str, vocab_size: int) -> None:
    write_binary(tmp_path / "x", (np.array(s) for s in SEQUENCES), vocab_size)
    index, data = WRITTEN_BY_FAIRSEQ[layout]
    assert (tmp_path / "x.idx").read_bytes().hex() == index
    assert (tmp_path / "x.bin").read_bytes().hex() == data


def test_an_empty_split(tmp_path: Path) -> None:
    assert write_binary(tmp_path / "x", [], 100) == 0
    assert len(read_binary(tmp_path / "x")) == 0


@pytest.mark.parametrize("layout", list(WRITTEN_BY_FAIRSEQ))
def test_every_truncation_is_named(tmp_path: Path, layout: str) -> None:
    prefix = store(tmp_path, layout)
    index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    whole = index.read_bytes()
    for length in range(0, len(whole), 7):
        index.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is truncated|starts with"):
            read_binary(prefix)
    index.write_bytes(whole)
    tokens = data.read_bytes()
    data.write_bytes(tokens[:-1])
    with pytest.raises(UserError, match=rf"x\.bin' is truncated: {len(tokens) - 1} bytes, expected {len(tokens)}"):
        read_binary(prefix)
    data.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_binary(prefix)


@pytest.mark.parametrize("position", [26, 42])
def test_numbers_beyond_64_bits_are_named(tmp_path: Path, position: int) -> None:
    # A size or an offset of 0x7f7f...: their sum wraps around.
    prefix = store(tmp_path, "mmap_u4")
    changed = bytearray(prefix.with_suffix(".idx").read_bytes())
    changed[position : position + 4] = b"\x7c\x7f\x7f\x7f"
    changed[-8:] = b"\x7c" + b"\x7f" * 7
    prefix.with_suffix(".idx").write_bytes(changed)
    with pytest.raises(UserError, match="is truncated"):
        read_binary(prefix)


def test_foreign_contents_are_named(tmp_path: Path) -> None:
    prefix = store(tmp_path, "mmap_u2")
    whole = bytearray(prefix.with_suffix(".idx").read_bytes())
    for position, value, message in ((0, 0x58, "starts with"), (9, 2, "version 2"), (17, 7, "dtype code 7")):
        changed = bytearray(whole)
        changed[position] = value
        prefix.with_suffix(".idx").write_bytes(changed)
        with pytest.raises(UserError, match=message):
            read_binary(prefix)


def make_folder(folder: Path, tokens: int = 4) -> None:
    for language in ("en", "de"):
        (folder / f"dict.{language}.txt").write_text("".join(f"w{i} {9 - i}\n" for i in range(tokens)))
        for split in ("train", "valid", "test"):
            write_binary(folder / f"{split}.en-de.{language}", [np.array([4, 7, 2]), np.array([5, 2])], 8)


def test_a_fairseq_folder_is_a_data_set(tmp_path: Path) -> None:
    make_folder(tmp_path)
    data = load_translation("fairseq_binary", str(tmp_path))
    assert len(data.vocabulary) == 8
    assert data.train.source[0].tolist() == [4, 7, 2]
    assert data.test.references == ["w0 w3", "w1"]
    assert data.detokenize([4, 5, 2, 6]) == "w0 w1"


def test_a_fairseq_folder_that_does_not_fit_together(tmp_path: Path) -> None:
    make_folder(tmp_path, tokens=3)
    with pytest.raises(UserError, match="holds id 7, expected 0 to 6"):
        load_translation("fairseq_binary", str(tmp_path))
    for wrong in ([], [4]):
        make_folder(tmp_path)
        write_binary(tmp_path / "test.en-de.de", [np.array([4, 2]), np.array(wrong)], 8)
        with pytest.raises(UserError, match=r"test in .* holds a sentence without </s> at its end"):
            load_translation("fairseq_binary", str(tmp_path))
    make_folder(tmp_path)
    write_binary(tmp_path / "train.en-de.en", [np.array([-1, 2])] * 2, 2**40)
    with pytest.raises(UserError, match=r"train in .* holds id -1"):
        load_translation("fairseq_binary", str(tmp_path))
    make_folder(tmp_path)
    (tmp_path / "dict.de.txt").write_text("w0 1\nw2 1\nw1 1\nw3 1\n")
    with pytest.raises(UserError, match="joined-dictionary"):
        load_translation("fairseq_binary", str(tmp_path))
    make_folder(tmp_path)
    write_binary(tmp_path / "valid.en-de.de", [np.array([2])], 8)
    with pytest.raises(UserError, match=r"valid .* has 2 sources and 1 targets"):
        load_translation("fairseq_binary", str(tmp_path))
    (tmp_path / "dict.de.txt").unlink()
    with pytest.raises(UserError, match=r"dict\.de\.txt"):
        load_translation("fairseq_binary", str(tmp_path))


def test_dictionary_format(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_text("a b 12\nmadeupword0000 0\nx 3 #fairseq:overwrite\n", encoding="utf-8")
    vocabulary = Vocabulary.load(path)
    assert vocabulary.tokens == ["<s>", "<pad>", "</s>", "<unk>", "a b", "madeupword0000", "x"]
    assert vocabulary.encode(["x", "nothing", "a b"]).tolist() == [6, 3, 4, 2]
    assert vocabulary.decode([0, 6, 1, 4, 2, 5]) == ["x", "a b"]
    for content, message in (("word\n", "line 1"), ("a 1\nb x\n", "line 2"), ("a 1\na 2\n", "line 2 repeats")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            Vocabulary.load(path)
    path.write_bytes(b"\xff 1\n")
    with pytest.raises(UserError, match="UTF-8"):
        Vocabulary.load(path)
