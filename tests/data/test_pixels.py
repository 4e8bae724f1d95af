"""Image files of every kind: torchvision's pixels where its loader keeps their meaning, the file's own numbers else."""

import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader

from fp8repro.data.images import load_images
from fp8repro.data.pixels import read_image
from fp8repro.errors import UserError

GENERATOR = np.random.default_rng(0)
RGBA = GENERATOR.integers(0, 256, (9, 7, 4), dtype=np.uint8)
DEEP = np.concatenate(
    [GENERATOR.integers(0, 65536, (9, 7)), np.arange(254, 261)[None], [[0, 1, 2, 65533, 65534, 65535, 9]]]
)


def rgba() -> Image.Image:
    return Image.fromarray(RGBA)


def palette(**options) -> Image.Image:
    image = rgba().convert("RGB").quantize(20)
    image.info |= options
    return image


def rotated() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn off
    return {"exif": exif}


KINDS = {
    "rgb.png": lambda path: rgba().convert("RGB").save(path),
    "alpha.png": lambda path: rgba().save(path),
    "alpha.webp": lambda path: rgba().save(path, lossless=True, exact=True),
    "grey and alpha.png": lambda path: rgba().convert("LA").save(path),
    "grey.tif": lambda path: rgba().convert("L").save(path),
    "one bit.png": lambda path: rgba().convert("1").save(path),
    "one bit.tiff": lambda path: rgba().convert("1").save(path),
    "palette.png": lambda path: palette().save(path),
    "one transparent colour.png": lambda path: palette(transparency=3).save(path),
    "many transparent colours.png": lambda path: palette(transparency=bytes(range(20))).save(path),
    "cmyk.jpg": lambda path: rgba().convert("RGB").convert("CMYK").save(path),
    "rotated.jpg": lambda path: rgba().convert("RGB").save(path, **rotated()),
    "animated.webp": lambda path: rgba().save(path, save_all=True, append_images=[rgba().rotate(180)], lossless=True),
    "pages.tif": lambda path: rgba().save(path, save_all=True, append_images=[rgba().rotate(180)]),
}


@pytest.mark.parametrize("name", KINDS)
def test_pixels_of_8_bits_are_torchvisions_and_nothing_is_said(tmp_path, name):
    path = str(tmp_path / name)
    KINDS[name](path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = default_loader(path)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def tiff(bits: int, photometric: int, width: int, data: bytes) -> bytes:
    """A little-endian TIFF of one row of unsigned whole numbers."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 1)]
    entries += [(279, len(data))]
    fields = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + data


def deep(path: str) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "F"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big endian.tif", "a.pgm"])
def test_grey_of_16_bits_goes_from_0_to_1_and_keeps_its_bits(tmp_path, name):
    path = str(tmp_path / name)
    values = DEEP.astype(">u2" if name == "big endian.tif" else np.uint16)
    Image.fromarray(values).save(path)
    assert np.array_equal(deep(path), (DEEP / 65535).astype(np.float32))


def test_white_of_a_tiff_is_what_its_bits_and_its_polarity_say(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(12, 1, 2, bytes([0xFF, 0xF0, 0x03])))
    assert deep(str(path)).tolist() == [[1.0, np.float32(3 / 4095)]]
    path.write_bytes(tiff(16, 0, 2, struct.pack("<HH", 0, 13107)))
    assert deep(str(path)).tolist() == [[1.0, np.float32(0.8)]]


def test_floating_point_values_are_taken_as_they_are(tmp_path):
    path = str(tmp_path / "a.tif")
    values = np.float32([[0, 1e-6, 0.25], [0.5, 0.999, 1]])
    Image.fromarray(values).save(path)
    assert np.array_equal(deep(path), values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([[0, 1.5]]), "floating-point values from 0 to 1.5, expected 0 to 1"),
        (np.float32([[-0.25, 1]]), "floating-point values from -0.25 to 1, expected 0 to 1"),
        (np.float32([[0, np.nan]]), "floating-point values from nan to nan, expected 0 to 1"),
        (np.int32([[0, 65535]]), "32-bit or signed whole numbers, which have no agreed white, expected 8 or 16 bits"),
        (np.zeros((1, 201), np.uint8), "201 x 1 pixels, one side over 200 times the other"),
    ],
)
def test_numbers_without_a_meaning_are_refused_by_name(tmp_path, values, reason):
    path = str(tmp_path / "a.tif")
    Image.fromarray(values).save(path)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value) == f"data.root: image {path!r} cannot be read ({reason})"


@pytest.mark.parametrize("augmentation", ["none", "small", "imagenet"])
def test_samples_of_16_bits_are_those_of_8_bits_and_finer(tmp_path, augmentation):
    low = GENERATOR.integers(0, 256, (20, 24), dtype=np.uint8)
    datasets = []
    for name, values in (("8", low), ("16", low.astype(np.uint16) * 257)):
        for split in ("train", "val"):
            (tmp_path / name / split / "a").mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / name / split / "a" / "0.png")
        options = {"augmentation": augmentation, "mean": [0.0, 0.1, 0.2], "std": [1.0, 0.5, 0.25]}
        datasets.append(load_images("image_folder", str(tmp_path / name), 16, options=options, seed=1))
    for part in ("train", "val"):
        eight, sixteen = (getattr(data, part)[2, 0][0] for data in datasets)
        assert sixteen.shape == (3, 16, 16)
        # Resizing rounds pixels of 8 bits, twice.
        assert ((eight - sixteen).abs() * torch.tensor([1.0, 0.5, 0.25])[:, None, None]).max() < 1.5 / 255
        assert torch.allclose(sixteen[0], 0.25 * sixteen[2] + 0.2, atol=1e-6)
        assert sixteen[0].std() > 0.05


@pytest.mark.parametrize("augmentation", ["small", "imagenet", "none"])
@pytest.mark.parametrize("crop", [32, 96])
def test_images_of_any_size_fill_the_crop(tmp_path, crop, augmentation):
    sizes = [(1, 1), (3, 5), (150, 8), (31, 33), (300, 200)]
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number, (height, width) in enumerate(sizes):
            pixels = np.full((height, width, 3), (255, 0, 51), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "a" / f"{number}.png")
    options = {"augmentation": augmentation, "mean": [0.0] * 3, "std": [1.0] * 3}
    data = load_images("image_folder", str(tmp_path), crop, options=options, seed=0)
    for index in range(len(sizes)):
        plain, augmented = data.val[0, index][0], data.train[0, index][0]
        # Enlarged, never padded.
        assert torch.equal(plain, torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, crop, crop))
        assert augmented.shape == plain.shape
