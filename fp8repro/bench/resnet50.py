"""ResNet-50's training step in FP8 beside BF16 autocast, eager and compiled: time, peak memory, kernels.

All of them are channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.bench import steps
from fp8repro.bench.gpu import Bench
from fp8repro.bench.steps import BF16, COMPILED, FP8, GRAPHED

PROFILED_STEPS, PROFILED_KERNELS = 5, 40


class Workload(steps.Workload):
    """ResNet-50 and a batch of 256 images; ResNet-18 in a rehearsal."""

    title = "ResNet-50"

    def __init__(self, bench: Bench) -> None:
        """See `steps.Workload`."""
        super().__init__(bench)
        self.speed_bars = {(GRAPHED, BF16): 1.5, (GRAPHED, COMPILED): 1.2}
        self.memory_bars = {(GRAPHED, BF16): 0.6}
        batch, side = (2, 32) if self.small else (256, 224)
        self.shape = f"batch {batch}, {side}^2"
        images = torch.randn(batch, 3, side, side, device=self.device).to(memory_format=torch.channels_last)
        self.batch = images, torch.zeros(batch, dtype=torch.long, device=self.device)

    def model(self) -> nn.Module:
        """See `steps.Workload`."""
        from torchvision.models import resnet18, resnet50

        model: nn.Module = resnet18(num_classes=8) if self.small else resnet50()
        return model.to(self.device).to(memory_format=torch.channels_last)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """See `steps.Workload`."""
        images, target = batch
        return F.cross_entropy(model(images), target)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """See `steps.Workload`."""
        return torch.optim.SGD(model.parameters(), 0.1, 0.9)


def measure_step(bench: Bench) -> None:
    """FP8 beside BF16 autocast.

    Raises:
        RunFailure: a step cannot be made on this device; the others are measured.
    """
    steps.measure(bench, Workload(bench), [BF16, FP8, GRAPHED], [BF16])


def measure_compiled_step(bench: Bench) -> None:
    """FP8 and BF16 autocast beside compiled BF16 as a CUDA graph.

    Raises:
        RunFailure: see `measure_step`.
    """
    steps.measure(bench, Workload(bench), [COMPILED, BF16, GRAPHED], [COMPILED])


def profile_step(bench: Bench) -> None:
    """The kernels of an FP8 step by their time, each a row: milliseconds of a step, and the share of it."""
    work = Workload(bench)
    cuda = bench.device.type == "cuda"
    step = work.steps()[GRAPHED if cuda else FP8]()
    repeats = PROFILED_STEPS if cuda else 1
    for _ in range(2 if cuda else 0):
        step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if cuda else [activity.CPU]) as profiler:
        for _ in range(repeats):
            step()
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    kernels = [
        (event.key, event.count / repeats, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3)
        for event in profiler.key_averages()
        if event.device_type == kind
    ]
    total = sum(ms for _, _, ms in kernels) / repeats
    bench.add("FP8 step, all kernels", work.shape, total, None, None, None)
    for name, calls, ms in sorted(kernels, key=lambda kernel: -kernel[2])[:PROFILED_KERNELS]:
        bench.add(name[:60], f"{calls:g} calls", ms / repeats, ms / repeats / total, "all kernels", None)
