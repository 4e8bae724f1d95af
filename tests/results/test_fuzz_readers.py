"""Damaged bytes in front of every reader: an answer or one line, never a crash, a flood or a stray file."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import READERS
from PIL import Image

from fp8repro.data.pixels import read_image
from fp8repro.data.translation.fairseq_binary import read_binary, write_binary
from fp8repro.errors import UserError
from fp8repro.training.checkpoint import read_tensors

HERE = Path(__file__).parents[1]
DEFAULT_INPUTS, LONG_INPUTS = 20, 1000


def fuzz(count: int, *readers: str) -> list[dict[str, Any]]:
    """Figures of a process of its own, which ends at the first input that a reader does not bear."""
    command = [sys.executable, str(HERE / "fuzzing.py"), str(count), *readers]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_reader_bears_damaged_bytes() -> None:
    figures = fuzz(DEFAULT_INPUTS)
    assert [row["reader"] for row in figures] == list(READERS)
    for row in figures:
        assert row["inputs"] >= DEFAULT_INPUTS
        assert row["refused"] > 0
        assert row["accepted"] + row["refused"] == row["inputs"]
        assert row["largest_growth_mb"] < 200


@pytest.mark.long
@pytest.mark.parametrize("reader", list(READERS))
def test_every_reader_bears_a_thousand(reader: str) -> None:
    (row,) = fuzz(LONG_INPUTS, reader)
    assert row["inputs"] >= LONG_INPUTS


def test_an_archive_that_unfolds_is_refused_before_it_does(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(10_000_000)}, tmp_path / "whole.pt")
    bomb = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, bomb:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    # Torch itself would unpack it.
    assert torch.load(tmp_path / "bomb.pt", weights_only=True)["weight"].shape == (10_000_000,)
    with pytest.raises(UserError, match=r"bomb\.pt cannot be read \(it unpacks to more than its own size\)"):
        read_tensors(tmp_path / "bomb.pt")


def holding_itself() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["inner"] = inner
    return inner


def unfolding() -> dict[str, Any]:
    value: dict[str, Any] = {"x": 1}
    for _ in range(40):
        value = {"x": value, "y": value}
    return value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (holding_itself(), "over 1000000 values"),
        (unfolding(), "over 1000000 values"),
        ({"x": torch.zeros(1).expand(10**9)}, "a tensor without memory of its own"),
        ({"x": torch.zeros(3, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"x": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": {1, 2}}, "its pickle names __builtin__.set"),
        ({"x": bytearray(9)}, "its pickle names __builtin__.bytearray"),
    ],
)
def test_contents_without_end_or_form_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=reason):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_what_torch_saves_is_read(tmp_path: Path, dtype: torch.dtype, new_format: bool) -> None:
    content = {"a": torch.arange(6).to(dtype).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(2)), "n": [1, "x"]}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    found = read_tensors(tmp_path / "x.pt")
    assert torch.equal(found["a"], content["a"])
    assert torch.equal(found["b"], content["b"])
    assert found["n"] == [1, "x"]


def test_fp8_tensors_are_read(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3).to(torch.float8_e5m2)}, tmp_path / "x.pt")
    assert read_tensors(tmp_path / "x.pt")["x"].dtype == torch.float8_e5m2


def test_a_tar_archive_is_not_unpacked(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(UserError, match=r"x\.pth cannot be read"):
        read_tensors(tmp_path / "x.pth")


def test_an_image_is_read_by_its_contents_and_no_program_is_started(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (9, 7), (1, 2, 3)).save(path, "PNG")
    assert read_image(str(path)).getpixel((0, 0)) == (1, 2, 3)
    # PIL gives PostScript to ghostscript, whatever the file is called.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="cannot identify image file"):
        read_image(str(path))


def test_an_image_may_be_large_but_not_out_of_proportion(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("1", (6000, 4000)).save(path)
    with pytest.raises(UserError, match="6000 x 4000 pixels are too many for the size of the file"):
        read_image(str(path))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4200, 4000), dtype=np.uint8)).save(
        path, compress_level=0
    )
    assert read_image(str(path)).size == (4000, 4200)


def test_sequences_that_overlap_are_refused(tmp_path: Path) -> None:
    write_binary(tmp_path / "x", [np.array([4, 5, 6, 2])] * 3, 8)
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[-8:] = struct.pack("<q", 0)
    (tmp_path / "x.idx").write_bytes(index)
    assert len(read_binary(tmp_path / "x")) == 3
    # Two of them over the whole file: more tokens than there are.
    at = len(index) - 3 * 12
    index[at : at + 8] = struct.pack("<ii", 12, 12)
    index[-24:-8] = struct.pack("<qq", 0, 0)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(UserError, match="holds sequences that overlap"):
        read_binary(tmp_path / "x")


def test_a_file_may_end_inside_a_token_that_no_sequence_needs(tmp_path: Path) -> None:
    write_binary(tmp_path / "x", [np.array([4, 5, 2])], 8)
    with (tmp_path / "x.bin").open("ab") as file:
        file.write(b"\x07")
    assert read_binary(tmp_path / "x")[0].tolist() == [4, 5, 2]
