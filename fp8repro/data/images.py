"""Image data sets: handwritten digits, ImageNet, any folder of images. Augmentation is keyed by (seed, epoch, image).

Nothing here may depend on worker state for randomness.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fp8repro.data.folders import ImageFiles, stratified_split, train_and_val_files
from fp8repro.data.image_batches import Sample
from fp8repro.data.keys import derived_seed, seeded_torch
from fp8repro.data.pixels import read_image
from fp8repro.errors import UserError
from fp8repro.fields import Bound, build_dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_VAL_FRACTION = 0.2
# Images of up to 64 pixels are shifted, not cropped at random sizes, and are not cropped in evaluation.
LARGEST_SHIFTED_IMAGE = 64
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImageData:
    """A data set as training sees it; datasets are indexed by (epoch, index) and give (FP32 [C, H, W], class).

    Attributes:
        train: augmented as configured. val, train_plain: not augmented.
        val_labels: classes of the validation images.
        classes: their names. channels, image_size: of every sample.
        identity: hash of the names of all images and classes. Pixels are not hashed, because all would have to be read:
            a resume does not notice an image that changed under the same name.
    """

    train: Dataset[Sample]
    val: Dataset[Sample]
    train_plain: Dataset[Sample]
    classes: list[str]
    channels: int
    image_size: int
    val_labels: list[int]
    identity: str


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
        mean, std: normalization by channel.
    """

    val_fraction: float | None = None
    augmentation: Literal["auto", "imagenet", "small", "none"] = "auto"
    flip: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def load_images(
    name: str,
    root: str | None = None,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int,
) -> ImageData:
    """Load an image data set by name.

    Args:
        name: "digits", "imagenet" or "image_folder".
        root: folder of the data; unused by the digits.
        image_size: side in pixels; None: the data set's own.
        options: fields of the data set's settings class above.
        seed: of the run; keys the augmentation.

    Raises:
        UserError: an unknown name or option, or data that is missing or malformed.
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
        return _load_folder(build_dataclass(FolderSettings, options or {}, "data.options"), Path(root), size, seed)
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


class FileImages(Dataset[Sample | UserError]):
    """Images read from files."""

    def __init__(self, files: ImageFiles, transform: Transform, seed: int) -> None:
        """`transform` takes a PIL image of `read_image` and may draw from torch's global generator."""
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample | UserError:
        """The sample (epoch, index), or the error that names its file."""
        epoch, index = key
        path = self.files.paths[index]
        try:
            image = read_image(path)
        except UserError as error:
            return error
        with seeded_torch(derived_seed("augment", self.seed, epoch, index)):
            return self.transform(image), self.files.labels[index]


def _load_folder(settings: FolderSettings, root: Path, size: int, seed: int) -> ImageData:
    train, val = train_and_val_files(root, settings.val_fraction)
    augmented, plain = _train_transform(settings, size), _plain_transform(settings, size)
    digest = hashlib.sha256(os.fsencode("\0".join(train.classes)))
    for files in (train, val):
        names = (f"{label}/{Path(path).name}" for path, label in zip(files.paths, files.labels, strict=True))
        digest.update(os.fsencode("\0".join(names)))
    # The dataset's errors are values; the loader turns them into exceptions.
    datasets: list[Any] = [FileImages(*parts, seed) for parts in ((train, augmented), (val, plain), (train, plain))]
    classes, identity = train.classes, digest.hexdigest()
    return ImageData(datasets[0], datasets[1], datasets[2], classes, 3, size, val.labels, identity)


def rgb_tensor(image: Any) -> Tensor:
    """A PIL image of `read_image` as FP32 [3, H, W] from 0 to 1; grey in all channels alike."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image).expand(3, -1, -1)  # type: ignore[no-any-return]


def _train_transform(settings: FolderSettings, size: int) -> Transform:
    """The augmentation of a PIL image; "imagenet" is torchvision's reference."""
    from torchvision import transforms as T

    kind = settings.augmentation
    if kind == "auto":
        kind = "small" if size <= LARGEST_SHIFTED_IMAGE else "imagenet"
    if kind == "none":
        return _plain_transform(settings, size)
    geometry: list[Any] = [T.RandomResizedCrop(size)]
    if kind == "small":
        geometry = [T.Resize(size), T.CenterCrop(size), T.RandomCrop(size, padding=max(1, size // 8))]
    flip = [T.RandomHorizontalFlip()] if settings.flip else []
    return T.Compose([*geometry, *flip, rgb_tensor, T.Normalize(settings.mean, settings.std)])  # type: ignore[no-any-return]


def _plain_transform(settings: FolderSettings, size: int) -> Transform:
    """Resize and center crop, over 64 pixels with ImageNet's 256 to 224 margin; smaller images are enlarged."""
    from torchvision import transforms as T

    resized = size if size <= LARGEST_SHIFTED_IMAGE else round(size * 256 / 224)
    steps = [T.Resize(resized), T.CenterCrop(size), rgb_tensor, T.Normalize(settings.mean, settings.std)]
    return T.Compose(steps)  # type: ignore[no-any-return]
