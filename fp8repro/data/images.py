"""Image data sets: handwritten digits, ImageNet, any folder of images. Augmentation is keyed by (seed, epoch, image).

Nothing here may depend on worker state for randomness.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fp8repro.data.augmentation import Geometry, Normalization, Pixels, channels, plain_geometry, train_geometry
from fp8repro.data.copy_images import copied_images
from fp8repro.data.folders import ImageFiles, stratified_split, train_and_val_files
from fp8repro.data.image_batches import ImageBatch, Sample
from fp8repro.data.keys import derived_seed, seeded_torch
from fp8repro.data.pixels import read_image, shrunk
from fp8repro.errors import UserError
from fp8repro.fields import Bound, Count, Finite, Positive, build_dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_VAL_FRACTION = 0.2


@dataclass(frozen=True)
class ImageData:
    """A data set as training sees it; datasets are indexed by (epoch, index) and give (FP32 [C, H, W], class).

    Batches of a loader may hold pixels in uint8 instead; `normalized` makes of them what the datasets give.

    Attributes:
        train: augmented as configured. val, train_plain: not augmented.
        val_labels: classes of the validation images.
        classes: their names. channels, image_size: of every sample.
        identity: hash of the names of all images and classes. Pixels are not hashed, because all would have to be read:
            a resume does not notice an image that changed under the same name.
        normalization: of pixels in uint8; None where there are none.
    """

    train: Dataset[Sample]
    val: Dataset[Sample]
    train_plain: Dataset[Sample]
    classes: list[str]
    channels: int
    image_size: int
    val_labels: list[int]
    identity: str
    normalization: Normalization | None = None

    def normalized(self, images: Tensor) -> Tensor:
        """Images of a batch in FP32, on their device."""
        if images.dtype != torch.uint8:
            return images
        assert self.normalization is not None
        return self.normalization(images)


@dataclass(frozen=True)
class DigitsSettings:
    """Settings of the digits.

    Attributes:
        shift: training images are moved by up to so many pixels in each direction.
        val_fraction: share of the images that validates; the fewer are left to train, the harder is the task.
    """

    shift: Annotated[int, Bound("0, 1 or 2 pixels", lambda x: 0 <= x <= 2)] = 0
    val_fraction: Annotated[float, Bound("from 0.1 to 0.95", lambda x: 0.1 <= x <= 0.95)] = DIGITS_VAL_FRACTION


@dataclass(frozen=True)
class FolderSettings:
    """Settings of a folder of images.

    Attributes:
        val_fraction: share of a single folder that validates; None where there are train/ and val/.
        augmentation: "imagenet" (random resized crop), "small" (shift by up to an eighth), "none", "auto" by size.
        flip: mirror half of the training images.
        shorter_side: larger images are first resized so that their shorter side has so many pixels, and are cropped
            after that; None: they are cropped as they are.
        mean, std: normalization by channel.
    """

    val_fraction: float | None = None
    augmentation: Literal["auto", "imagenet", "small", "none"] = "auto"
    flip: bool = True
    shorter_side: Count | None = None
    mean: tuple[Finite, Finite, Finite] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD


def load_images(
    name: str,
    root: str | None = None,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int,
    cache: bool = False,
    workers: int = 0,
) -> ImageData:
    """Load an image data set by name.

    Args:
        name: "digits", "imagenet" or "image_folder".
        root: folder of the data; unused by the digits.
        image_size: side in pixels; None: the data set's own.
        options: fields of the data set's settings class above.
        seed: of the run; keys the augmentation.
        cache: decode the images of a folder once, into the user's cache; the samples are the same.
        workers: processes that do.

    Raises:
        UserError: an unknown name or option, a cache that cannot be written, or data that is missing or malformed.
    """
    if name == "digits":
        if image_size not in (None, 8):
            raise UserError(f"data.image_size: got {image_size}, expected 8 for the digits")
        return _load_digits(build_dataclass(DigitsSettings, options or {}, "data.options"), seed)
    if name in ("imagenet", "image_folder"):
        if root is None:
            raise UserError(f"data.root: missing, expected the folder of the {name} data")
        size = image_size or 224
        if size < 4:
            raise UserError(f"data.image_size: got {size}, expected at least 4 pixels")
        settings: FolderSettings = build_dataclass(FolderSettings, options or {}, "data.options")
        if settings.shorter_side is not None and settings.shorter_side < size:
            raise UserError(
                f"data.options.shorter_side: got {settings.shorter_side}, expected at least data.image_size ({size})"
            )
        return _load_folder(settings, Path(root), size, seed, workers if cache else None)
    raise UserError(f"data.name: got {name!r}, expected one of digits, imagenet, image_folder")


class DigitImages(Dataset[Sample]):
    """Scikit-learn's handwritten digits in memory; training images are shifted."""

    def __init__(self, images: Tensor, labels: list[int], shift: int, seed: int) -> None:
        """`images` are [N, 1, 8, 8], normalized; zero is the background's value before normalization."""
        self.images, self.labels, self.shift, self.seed = images, labels, shift, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample (epoch, index)."""
        epoch, index = key
        image = self.images[index]
        if self.shift:
            span = 2 * self.shift + 1
            draw = derived_seed("augment", self.seed, epoch, index) % (span * span)
            image = shifted(image, draw // span - self.shift, draw % span - self.shift)
        return image, self.labels[index]


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """An image [C, H, W] moved by whole pixels; the value of its corner pixel fills the gap."""
    height, width = image.shape[-2:]
    result = image[..., :1, :1].expand_as(image).clone()
    result[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        ..., max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return result


def _load_digits(settings: DigitsSettings, seed: int) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = [int(label) for label in digits.target]
    train, val = stratified_split(labels, settings.val_fraction, "digits")
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    # Of the training split: 16 grey levels, mean and standard deviation in FP64.
    std, mean = torch.std_mean(pixels[train].double())
    pixels = (pixels - mean.float()) / std.float()

    def subset(indices: list[int], shift: int) -> DigitImages:
        return DigitImages(pixels[indices], [labels[i] for i in indices], shift, seed)

    identity = hashlib.sha256(digits.images.tobytes() + bytes(labels)).hexdigest()
    names = [str(name) for name in digits.target_names]
    splits = (subset(train, settings.shift), subset(val, 0), subset(train, 0))
    return ImageData(*splits, names, 1, 8, [labels[i] for i in val], identity)


class PixelSource(Protocol):
    """Where the pixels of a split's images come from."""

    def image(self, index: int) -> Any:
        """A PIL image of `pixels.read_image`, shrunk, or its pixels.

        Raises:
            UserError: names what cannot be read.
        """
        ...


@dataclass(frozen=True)
class Files:
    """A `PixelSource`: image files, decoded at each use."""

    paths: Sequence[str]
    shorter_side: int | None

    def image(self, index: int) -> Any:
        """See `PixelSource`."""
        return shrunk(read_image(self.paths[index]), self.shorter_side)


class FileImages(Dataset[Sample]):
    """A split of a folder of images."""

    def __init__(
        self, files: ImageFiles, source: PixelSource, geometry: Geometry, normalization: Normalization, seed: int
    ) -> None:
        """`source` gives the pixels of `files`; `seed` keys what `geometry` draws."""
        self.files, self.source, self.seed = files, source, seed
        self.geometry, self.normalization = geometry, normalization

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample (epoch, index).

        Raises:
            UserError: names the image that cannot be read.
        """
        return self.normalization(channels(self._pixels(*key))), self.files.labels[key[1]]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> ImageBatch | UserError:
        """The batch of some samples, as torch's loader asks for it: in uint8 where all images have 8 bits.

        An error is returned as a value; see `image_batches.fetched`.
        """
        try:
            images = [self._pixels(*key) for key in keys]
        except UserError as error:
            return error
        labels = torch.tensor([self.files.labels[index] for _, index in keys], dtype=torch.int64)
        if all(image.dtype == np.uint8 for image in images):
            return ImageBatch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels)
        return ImageBatch(torch.stack([self.normalization(channels(image)) for image in images]), labels)

    def _pixels(self, epoch: int, index: int) -> Pixels:
        pixels = self.source.image(index)
        with seeded_torch(derived_seed("augment", self.seed, epoch, index)):
            return self.geometry(pixels)


def _load_folder(settings: FolderSettings, root: Path, size: int, seed: int, copying: int | None) -> ImageData:
    """`copying`: processes that copy the decoded images to the cache; None: there is no copy."""
    train, val = train_and_val_files(root, settings.val_fraction)
    digest = hashlib.sha256(os.fsencode("\0".join(train.classes)))
    for files in (train, val):
        names = (f"{label}/{Path(path).name}" for path, label in zip(files.paths, files.labels, strict=True))
        digest.update(os.fsencode("\0".join(names)))
    side = settings.shorter_side
    sources: Sequence[PixelSource] = [Files(files.paths, side) for files in (train, val)]
    if copying is not None:
        sources = copied_images(root, [train.paths, val.paths], side, copying)
    augmented, plain = train_geometry(settings.augmentation, settings.flip, size), plain_geometry(size)
    normalization = Normalization(settings.mean, settings.std)

    def dataset(files: ImageFiles, source: PixelSource, geometry: Geometry) -> FileImages:
        return FileImages(files, source, geometry, normalization, seed)

    return ImageData(
        dataset(train, sources[0], augmented),
        dataset(val, sources[1], plain),
        dataset(train, sources[0], plain),
        train.classes,
        3,
        size,
        val.labels,
        digest.hexdigest(),
        normalization,
    )
