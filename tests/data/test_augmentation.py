"""What an image goes through before a network: torchvision's transforms to the bit, one by one and in batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from fp8repro.data.augmentation import Geometry, Normalization
from fp8repro.data.image_batches import load_batches
from fp8repro.data.images import load_images
from fp8repro.data.keys import derived_seed

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 1.5)
GENERATOR = np.random.default_rng(1)


def write_images(root, sizes, deep=()):
    """Random images of some heights and widths in the train/ and val/ folders of one class; some of 16 bits."""
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for number, size in enumerate(sizes):
            pixels = GENERATOR.integers(0, 256, (*size, 3), dtype=np.uint8)
            if number in deep:
                pixels = GENERATOR.integers(0, 65536, size).astype(np.uint16)
            Image.fromarray(pixels).save(root / split / "a" / f"{number}.png")


def expected(path, steps, seed):
    """A sample as torchvision makes it."""
    image = Image.open(path)
    torch.manual_seed(seed)
    if image.mode == "RGB":
        return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    grey = Image.fromarray((np.asarray(image) / 65535).astype(np.float32))
    values = T.Compose([*steps, T.ToTensor()])(grey)
    return T.Normalize(MEAN, STD)(values.expand(3, -1, -1))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("augmentation", "size", "steps"),
    [
        ("imagenet", 72, [T.RandomResizedCrop(72)]),
        ("small", 32, [T.Resize(32), T.CenterCrop(32), T.RandomCrop(32, padding=4)]),
        ("small", 5, [T.Resize(5), T.CenterCrop(5), T.RandomCrop(5, padding=1)]),
        ("none", 32, None),
    ],
)
@pytest.mark.parametrize("deep", [(), (1, 4)])
def test_samples_and_batches_are_torchvisions(tmp_path, augmentation, size, steps, flip, deep):
    sizes = [(size, size), (size, size), (size + 9, size), (3, 4), (size, 2 * size), (size, size)]
    write_images(tmp_path, sizes, deep)
    options = {"augmentation": augmentation, "flip": flip, "mean": MEAN, "std": STD}
    data = load_images("image_folder", str(tmp_path), size, options, seed=3)
    plain = [T.Resize(size if size <= 64 else round(size * 256 / 224)), T.CenterCrop(size)]
    augmented = plain if steps is None else [*steps, *([T.RandomHorizontalFlip()] if flip else [])]
    for split, transforms in (("train", augmented), ("val", plain), ("train_plain", plain)):
        dataset = getattr(data, split)
        keys = [(epoch, index) for epoch in range(6) for index in range(len(sizes))]
        want = torch.stack(
            [
                expected(dataset.files.paths[index], transforms, derived_seed("augment", 3, epoch, index))
                for epoch, index in keys
            ]
        )
        assert torch.equal(torch.stack([dataset[key][0] for key in keys]), want)
        # Batches with an image of 16 bits, and without.
        for batch, part in zip(load_batches(dataset, [keys, keys[2:4]]), (want, want[2:4]), strict=True):
            assert batch.images.dtype == (torch.float32 if deep and len(part) > 2 else torch.uint8)
            assert torch.equal(data.normalized(batch.images), part)


def test_a_shift_reaches_every_place_of_the_border():
    pixels = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    steps = [T.RandomCrop(3, padding=1), T.RandomHorizontalFlip()]
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        found = Geometry(3, steps, 1, True)(pixels)
        torch.manual_seed(seed)
        assert np.array_equal(found, np.asarray(T.Compose(steps)(Image.fromarray(pixels))))
        seen.add(found.tobytes())
    assert len(seen) == 3 * 3 * 2


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_normalization_is_torchvisions_in_every_order(order):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 6, 1).contiguous(memory_format=order)
    found = Normalization(MEAN, STD)(pixels)
    assert torch.equal(found, torch.stack([T.Normalize(MEAN, STD)(image.float().div(255)) for image in pixels]))
    assert found.is_contiguous(memory_format=torch.channels_last)
    values = pixels.float() / 256
    before = values.clone()
    assert torch.equal(Normalization(MEAN, STD)(values), T.Normalize(MEAN, STD)(values))
    assert torch.equal(values, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_normalization_gives_the_same_bits_on_a_gpu():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 6, 1).contiguous(memory_format=torch.channels_last)
    normalization = Normalization(MEAN, STD)
    for images in (pixels, pixels.float() / 256):
        assert torch.equal(normalization(images.cuda()).cpu(), normalization(images))
