"""ResNet-50's training step in FP8 beside BF16 autocast, eager and compiled: time, peak memory, kernels.

All of them are channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8repro.bench.gpu import Bench
from fp8repro.errors import RunFailure
from fp8repro.precision.context import StepContext
from fp8repro.precision.graphs import GraphedStep, capture
from fp8repro.precision.injection import inject
from fp8repro.precision.master import MasterWeights

LOSS_SCALE = 10_000.0
BF16, COMPILED, FP8, GRAPHED = "BF16 autocast", "BF16 compiled, CUDA graph", "FP8", "FP8, CUDA graph"
# At least so many times as fast as the other, and at most so much of its peak memory.
SPEED_BARS = {(GRAPHED, BF16): 1.5, (GRAPHED, COMPILED): 1.2}
MEMORY_BARS = {(GRAPHED, BF16): 0.6}
PROFILED_STEPS, PROFILED_KERNELS = 5, 40
Step = Callable[[], object]


class Workload:
    """A model and a batch of the measured size, or of a tiny one in a rehearsal, and what a step of them is."""

    def __init__(self, bench: Bench) -> None:
        """The batch; `model` makes a model."""
        self.device, self.small = bench.device, bench.scale != 1
        batch, side = (2, 32) if self.small else (256, 224)
        self.shape = f"batch {batch}, {side}^2"
        images = torch.randn(batch, 3, side, side, device=self.device)
        self.x = images.to(memory_format=torch.channels_last)
        self.target = torch.zeros(batch, dtype=torch.long, device=self.device)

    def model(self) -> nn.Module:
        """ResNet-50, or ResNet-18 in a rehearsal."""
        from torchvision.models import resnet18, resnet50

        model: nn.Module = resnet18(num_classes=8) if self.small else resnet50()
        return model.to(self.device).to(memory_format=torch.channels_last)

    def steps(self) -> dict[str, Callable[[], Step]]:
        """What prepares each kind of step. A CPU has no CUDA graphs."""
        made: dict[str, Callable[[], Step]] = {BF16: self.bf16, COMPILED: self.bf16_compiled, FP8: self.fp8}
        return made | ({GRAPHED: partial(self.fp8, graphed=True)} if self.device.type == "cuda" else {})

    def fp8(self, graphed: bool = False) -> Step:
        """A step of the recipe `fp8`."""
        from fp8repro.settings.recipes import load_recipe

        model, recipe, context, number = self.model(), load_recipe("fp8"), StepContext(seed=1), count()
        inject(model, recipe, context, "triton")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        masters = MasterWeights(model, optimizer, recipe)

        def loss_of(x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return F.cross_entropy(model(x), target), {}

        batch = (self.x, self.target)
        graph = GraphedStep(model, loss_of, batch) if graphed else None

        def step() -> None:
            context.begin(next(number))
            optimizer.zero_grad()
            if graph is None:
                (loss_of(*batch)[0] * LOSS_SCALE).backward()
                masters.step(LOSS_SCALE)
            else:
                graph(batch, LOSS_SCALE)
                graph.step(masters, LOSS_SCALE)

        return step

    def bf16(self, compiler: str | None = None) -> Step:
        """A step of BF16 autocast; `compiler`: the backend of `torch.compile`, None for an eager step."""
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)

        def loss_of(x: Tensor, target: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return F.cross_entropy(model(x), target)

        loss = loss_of if compiler is None else torch.compile(loss_of, backend=compiler, dynamic=False)

        def step() -> None:
            optimizer.zero_grad()
            loss(self.x, self.target).backward()
            optimizer.step()

        return step

    def bf16_compiled(self) -> Step:
        """The compiled step, its update included, as one CUDA graph; on a CPU without compiler and graph."""
        if self.device.type != "cuda":
            return self.bf16("eager")
        return capture(self.bf16("inductor"), self.device)  # type: ignore[arg-type]


def measure_step(bench: Bench) -> None:
    """FP8 beside BF16 autocast.

    Raises:
        RunFailure: a step cannot be made on this device; the others are measured.
    """
    _measure(bench, [BF16, FP8, GRAPHED])


def measure_compiled_step(bench: Bench) -> None:
    """FP8 and BF16 autocast beside compiled BF16 as a CUDA graph.

    Raises:
        RunFailure: see `measure_step`.
    """
    _measure(bench, [COMPILED, BF16, GRAPHED])


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


def _measure(bench: Bench, names: list[str]) -> None:
    """Prepare steps, time them in turns; the first of `names` is what the others are beside."""
    work = Workload(bench)
    available = work.steps()
    prepared: dict[str, Step] = {}
    memory: dict[str, float] = {}
    failed: list[str] = []
    for name in [name for name in names if name in available]:
        try:
            prepared[name], memory[name] = _prepared(work, available[name])
        # Out of memory, or what a compiler cannot do: the others are still worth measuring.
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            print(f"not measured: {failed[-1]}", flush=True)
    _add_rows(bench, work.shape, names[0], bench.in_turns(prepared), memory)
    if failed:
        raise RunFailure(f"training step: not measured: {'; '.join(failed)}")


def _prepared(work: Workload, prepare: Callable[[], Step]) -> tuple[Step, float]:
    """A step that has run twice, and the peak of the memory that it took, in bytes (1 on a CPU)."""
    cuda = work.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # What earlier steps keep is theirs; the batch is everybody's.
    before = torch.cuda.memory_allocated() - work.x.nbytes if cuda else 0
    step = prepare()
    for _ in range(2 if cuda else 1):
        step()
    # The capture counts: a graph's memory is its own from then on, and no longer part of later peaks.
    return step, float(torch.cuda.max_memory_allocated() - before) if cuda else 1.0


def _add_rows(bench: Bench, shape: str, base: str, times: Mapping[str, float], memory: Mapping[str, float]) -> None:
    """Time and peak memory of each, those after `base` relative to it."""
    for name, ms in times.items():
        other = base if name != base and base in times else None
        speed, share = (times[other] / ms, memory[name] / memory[other]) if other else (None, None)
        bar = MEMORY_BARS.get((name, base))
        bench.add(f"ResNet-50 training step {name}", shape, ms, speed, other, SPEED_BARS.get((name, base)))
        size = f"{memory[name] / 2**30:.2f} GiB"
        bench.add(f"ResNet-50 peak memory {name}, {size}", shape, 0.0, share, other, None if bar is None else -bar)
