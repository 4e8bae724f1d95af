"""torchvision's ResNets with normalizations that take the residual sum and the ReLU along, where they can.

A normalization here is called as `bn(x, residual=..., relu=...)`. Knows nothing of precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class FusedBasicBlock(BasicBlock):
    """torchvision's block for ResNet-18 and -34, its normalizations fused."""

    def forward(self, x: Tensor) -> Tensor:
        """See `BasicBlock`."""
        out = self.bn1(self.conv1(x), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(out), residual=identity, relu=True)


class FusedBottleneck(Bottleneck):
    """torchvision's block for ResNet-50, its normalizations fused."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Bottleneck`."""
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(out), residual=identity, relu=True)


class FusedResNet(ResNet):
    """torchvision's ResNet, its first normalization fused."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
}


def normalizations(module: nn.Module) -> list[tuple[str, str]]:
    """A block's normalizations, each with the convolution before it, by their names in the block."""
    pairs = [(key, f"conv{key[2:]}") for key, _ in module.named_children() if key.startswith("bn")]
    if getattr(module, "downsample", None) is not None:
        pairs.append(("downsample.1", "downsample.0"))
    return pairs
