"""From the pixels of an image to a network's input: crops and flips of pixels, then normalization of whole batches.

Pixels are arrays, uint8 [H, W, 3] or, of grey images of more than 8 bits, FP32 [H, W] from 0 to 1. Every byte that
comes out is that of torchvision's transforms on PIL images.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[Any]
# Images of up to 64 pixels are shifted, not cropped at random sizes, and are not cropped in evaluation.
LARGEST_SHIFTED_IMAGE = 64


class Geometry:
    """Resizes and crops pixels to squares, by torchvision; draws from torch's global generator."""

    def __init__(self, size: int, steps: list[Any], margin: int | None, flip: bool = False) -> None:
        """Squares of `size`.

        Args:
            size: side in pixels.
            steps: torchvision's transforms of a PIL image.
            margin: pixels of black border that a random crop sees, where that and a flip are all that the steps do to
                an image that is a square of `size` already; 0: they do not even crop; None: they do something else.
            flip: the steps end with a flip.
        """
        from torchvision import transforms as T

        self.size, self.steps, self.margin, self.flip = size, T.Compose(steps), margin, flip

    def __call__(self, image: Any) -> Pixels:
        """The square, [size, size, 3] or [size, size], of a PIL image or of pixels."""
        from PIL import Image

        given = isinstance(image, np.ndarray)
        if self.margin is not None:
            square = (self.size, self.size)
            if image.shape == (*square, 3) if given else (image.size == square and image.mode == "RGB"):
                return self._shifted(np.asarray(image), self.margin)
        return np.asarray(self.steps(Image.fromarray(image) if given else image))

    def _shifted(self, pixels: Pixels, margin: int) -> Pixels:
        """What the steps come to, without images of PIL: these cost more than decoding."""
        if margin:
            # Torchvision's draws: the crop's first row and column within the border, then the flip.
            down, right = (margin - int(torch.randint(0, 2 * margin + 1, (1,))) for _ in range(2))
            height, width = self.size - abs(down), self.size - abs(right)
            moved = np.zeros_like(pixels)
            moved[max(down, 0) :, max(right, 0) :][:height, :width] = pixels[max(-down, 0) :, max(-right, 0) :][
                :height, :width
            ]
            pixels = moved
        return pixels[:, ::-1] if self.flip and float(torch.rand(1)) < 0.5 else pixels


def train_geometry(kind: Literal["auto", "imagenet", "small", "none"], flip: bool, size: int) -> Geometry:
    """The augmentation of a training image; see `images.FolderSettings`. "imagenet" is torchvision's reference."""
    from torchvision import transforms as T

    if kind == "auto":
        kind = "small" if size <= LARGEST_SHIFTED_IMAGE else "imagenet"
    if kind == "none":
        return plain_geometry(size)
    mirror = [T.RandomHorizontalFlip()] if flip else []
    if kind == "imagenet":
        return Geometry(size, [T.RandomResizedCrop(size), *mirror], None)
    margin = max(1, size // 8)
    steps = [T.Resize(size), T.CenterCrop(size), T.RandomCrop(size, padding=margin), *mirror]
    return Geometry(size, steps, margin, flip)


def plain_geometry(size: int) -> Geometry:
    """Resize and center crop, over 64 pixels with ImageNet's 256 to 224 margin; smaller images are enlarged."""
    from torchvision import transforms as T

    resized = size if size <= LARGEST_SHIFTED_IMAGE else round(size * 256 / 224)
    return Geometry(size, [T.Resize(resized), T.CenterCrop(size)], 0 if resized == size else None)


def channels(pixels: Pixels) -> Tensor:
    """Pixels as a tensor [3, H, W] of their dtype; grey in all channels alike."""
    if pixels.ndim == 2:
        return torch.from_numpy(np.array(pixels)).expand(3, -1, -1)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


class Normalization:
    """(x - mean) / std by channel, of x from 0 to 1."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """One number a channel."""
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        self._rows: dict[tuple[torch.device, int], list[Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Images [..., C, H, W], uint8 or FP32 from 0 to 1, as FP32 in channels-last order; the same on every device.

        Constants come to a device at the first call there, which must not be within the capture of a CUDA graph.
        """
        width = images.shape[-1]
        constants = self._rows.get((images.device, width))
        if constants is None:
            # Whole rows: an inner loop of three channels takes three times as long.
            numbers = [torch.tensor(255.0), self._mean.repeat(width), self._std.repeat(width)]
            constants = self._rows[images.device, width] = [number.to(images.device) for number in numbers]
        white, mean, std = constants
        pixels = images.movedim(-3, -1)
        rows = pixels.flatten(-2)
        # By a tensor: a GPU would multiply by the inverse of a number.
        values = torch.div(rows, white) if images.dtype == torch.uint8 else rows.clone()
        return values.sub_(mean).div_(std).view(pixels.shape).movedim(-1, -3)
