"""torchvision's ResNets with normalizations that take the residual sum and the ReLU along, where they can.

A normalization here is called as `bn(x, residual=..., relu=...)`. Knows nothing of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    """torchvision's ResNet, its first normalization fused.

    Attributes:
        run_stages: computes the four stages, of what is given to the first; None where it leaves that to them.
    """

    run_stages: Callable[[Sequence[nn.Module], Tensor], Tensor | None] | None = None

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        result = None if self.run_stages is None else self.run_stages(stages, x)
        if result is None:
            result = x
            for stage in stages:
                result = stage(result)
        return self.fc(torch.flatten(self.avgpool(result), 1))


class ResidualBlock(NamedTuple):
    """The layers of a block: convolutions, each with the normalization behind it; all but the last have a ReLU.

    Attributes:
        convolutions, norms: of the way through the block.
        downsample: those of the way around it, if it has any.
    """

    convolutions: list[nn.Module]
    norms: list[nn.Module]
    downsample: tuple[nn.Module, nn.Module] | None


def residual_blocks(stages: Sequence[nn.Module]) -> list[ResidualBlock]:
    """The blocks of a network's stages in their order; none where a stage has something else."""
    blocks = []
    for stage in stages:
        for block in stage.children() if type(stage) is nn.Sequential else (stage,):
            around = getattr(block, "downsample", None)
            usual = around is None or (type(around) is nn.Sequential and len(around) == 2)
            if type(block) not in (FusedBasicBlock, FusedBottleneck) or not usual:
                return []
            keys = [key for key, _ in block.named_children() if key.startswith("bn")]
            convolutions, norms = ([block.get_submodule(kind + key[2:]) for key in keys] for kind in ("conv", "bn"))
            blocks.append(ResidualBlock(convolutions, norms, None if around is None else (around[0], around[1])))
    return blocks


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
