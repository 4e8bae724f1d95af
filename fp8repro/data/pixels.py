"""Pixels of image files as values from 0 to 1, whatever a file counts them in. Must never clip: what has no such
meaning is refused.

Everything else is as torchvision's loader has it: alpha is dropped (a transparent pixel shows the colour stored under
it), CMYK is converted without a colour profile, palettes, 1-bit images and 16-bit colours become 8-bit RGB, an EXIF
rotation is left alone, and of an animation or a file of pages the first one counts.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fp8repro.errors import UserError

# Recognized by contents, not by name. For other kinds PIL may start external programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Photographs have a few pixels a byte. A file that claims many more would unpack to gigabytes.
FREE_PIXELS, PIXELS_PER_BYTE = 16_000_000, 100
# So would a longer strip, scaled to the size of a network's input.
LONGEST_STRIP = 200
# Single-channel kinds of PIL that its conversion to RGB would clip at 255.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
BITS_TAG, PHOTOMETRIC_TAG, WHITE_IS_ZERO = 258, 262, 0


def shrunk(image: Any, shorter_side: int | None) -> Any:
    """A PIL image, resized so that its shorter side has so many pixels if it has more; None: as it is."""
    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    from torchvision.transforms.functional import resize

    return resize(image, shorter_side)


def pixel_count(path: str, shorter_side: int | None = None) -> int:
    """How many pixels a shrunk image has, from the head of the file alone; 0 where that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            short, long = sorted(image.size)
    # As in `read_image`, which names the file.
    except Exception:
        return 0
    side = min(short, shorter_side or short)
    return side * (long * side // short)


def read_image(path: str) -> Any:
    """An image file as a PIL image: RGB, or for grey images of more than 8 bits FP32 from 0 to 1 (mode "F").

    White is the largest number of a whole-numbered image's bits (65,535), and 1 of a floating-point image.

    Raises:
        UserError: names the file that cannot be read, or whose numbers have no agreed white: 32-bit or signed whole
            numbers, floating-point values outside of 0 to 1.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * os.path.getsize(path)):
                raise ValueError(f"{image.width} x {image.height} pixels are too many for the size of the file")
            if max(image.size) > LONGEST_STRIP * min(image.size):
                raise ValueError(
                    f"{image.width} x {image.height} pixels, one side over {LONGEST_STRIP} times the other"
                )
            if image.mode in DEEP:
                return Image.fromarray(_deep_grey(image))
            # Dropped like any alpha channel; PIL would warn about it.
            image.load()
            image.info.pop("transparency", None)
            return image.convert("RGB")
    # PIL's decoders raise all kinds of exceptions; each means that this file cannot be used.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.root: image {path!r} cannot be read ({reason})") from None


def _deep_grey(image: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A grey image of over 8 bits as [H, W] from 0 to 1."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        white = 1.0
        # A NaN is not within bounds either.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating-point values from {low:g} to {high:g}, expected 0 to 1")
    elif image.mode == "I" and image.format == "TIFF":
        raise ValueError("32-bit or signed whole numbers, which have no agreed white, expected 8 or 16 bits")
    else:
        white = 2.0 ** tags.get(BITS_TAG, (16,))[0] - 1
    values /= white
    return (1 - values if tags.get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO else values).astype(np.float32)
