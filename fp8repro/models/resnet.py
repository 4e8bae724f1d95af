"""ResNet-18/34/50 as torchvision defines them, with a choice of input stem. Knows nothing of precision."""

from __future__ import annotations

from torch import nn

from fp8repro.errors import UserError

RESNETS = ("resnet18", "resnet34", "resnet50")
STEMS = ("auto", "imagenet", "small")
DEEP = ("resnet34", "resnet50")
# Up to this size "auto" keeps the resolution: the ImageNet stem divides it by four before the first block.
LARGEST_SMALL_IMAGE = 64


def make_resnet(name: str, classes: int, channels: int = 3, image_size: int = 224, stem: str = "auto") -> nn.Module:
    """A ResNet with torchvision's names and initialization; the deep ones start with identity blocks on small images.

    Args:
        name: "resnet18", "resnet34" or "resnet50".
        classes: width of the last layer.
        channels: of the input.
        image_size: in pixels; decides the stem where it is "auto".
        stem: "imagenet" (7x7, stride 2, then max-pooling), "small" (3x3, stride 1, no pooling) or "auto".

    Raises:
        UserError: an unknown name or stem.
    """
    # Imported here: the command line's help must not wait for torchvision.
    from torchvision.models import get_model

    if name not in RESNETS:
        raise UserError(f"model.name: got {name!r}, expected one of {', '.join(RESNETS)}")
    if stem not in STEMS:
        raise UserError(f"model.stem: got {stem!r}, expected one of {', '.join(STEMS)}")
    if stem == "auto":
        stem = "small" if image_size <= LARGEST_SMALL_IMAGE else "imagenet"
    # A deep network on a few pixels starts with gradients of up to 50 at its first convolution, which the paper's loss
    # scale of 10,000 lifts over FP16's range in every step. Blocks that start as the identity (Goyal et al. 2017, the
    # scale of each last normalization zero) keep them in range.
    tame = stem == "small" and name in DEEP
    model: nn.Module = get_model(name, weights=None, num_classes=classes, zero_init_residual=tame)
    if stem == "small":
        model.maxpool = nn.Identity()
        model.conv1 = _first_convolution(channels, size=3, stride=1)
    elif channels != 3:
        model.conv1 = _first_convolution(channels, size=7, stride=2)
    return model


def _first_convolution(channels: int, size: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, 64, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
