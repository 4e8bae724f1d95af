"""A training step as two CUDA graphs, forward and backward pass, and the update: two launches instead of thousands.

A replay gives the bits of the eager step with the same number. Whether the update is applied is decided on the device,
and read afterwards. Two graphs, because the host prepares the second while the device runs the first, and because
gradients may be summed over processes in between.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp8repro.engines.updates import Rule
from fp8repro.numerics.rounding import IDENTITY
from fp8repro.numerics.streams import StreamTable
from fp8repro.precision.context import StepContext
from fp8repro.precision.fused_step import (
    Member,
    count_step,
    group_members,
    in_place,
    next_steps,
    rule_of,
    state_names,
    tell_schedulers,
    with_state,
)
from fp8repro.precision.grouped_weights import GroupedWeights
from fp8repro.precision.injection import context_of, sites
from fp8repro.precision.master import MasterWeights

if TYPE_CHECKING:
    from fp8repro.kernels.optimizer.launch import Group

WARM_UPS = 3
# Gives the sum or mean of the loss (FP32, no dimensions) and other figures, from tensors on the device.
LossOf = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def why_not_graphed(model: nn.Module) -> str | None:
    """Why the model's next step cannot be captured or replayed, in one line; None when it can."""
    return why_not_captured(model) if sites(model) else "no layer of the model is converted by a recipe"


def why_not_captured(model: nn.Module) -> str | None:
    """Why no pass of a model, converted or not, can be captured now; None when one can."""
    places, context = sites(model), context_of(model)
    if context is not None and context.telemetry.active:
        return "telemetry measures the step"
    for name, site in places.items():
        if site.backend.name != "triton":
            return f"products by backend={site.backend.name} draw random bits on the host"
        scaled = [role for role, spec in site.roles.items() if spec.scaling != "none"]
        if scaled:
            return (
                f"{name}: the scale of role {scaled[0]} (scaling: {site.roles[scaled[0]].scaling}) is read by the host"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return f"{name or 'the model'}: DistributedDataParallel sums gradients inside the backward pass"
        if isinstance(module, nn.SyncBatchNorm):
            return f"{name}: normalization over all processes communicates inside the model"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"{name}: normalization without a momentum reads its count of batches on the host"
    device = next(p.device for p in model.parameters())
    return None if device.type == "cuda" else f"the model is on {device.type}, and CUDA graphs need a GPU"


class _Shared:
    """What the graphed steps of a model share, for one replays after the other.

    Attributes:
        pool: of the memory that captured passes take.
        streams: of the weights.
        weights: rounds them into one memory.
        gradients: where every pass leaves them: those of the first capture.
        update: reads them there.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Nothing is captured."""
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.streams = StreamTable(device, capacity=len(sites(model)))
        self.weights = GroupedWeights(model, self.streams)
        self.gradients: list[Tensor | None] = []
        self.update: GraphedUpdate | None = None
        self.update_failed = False

    def place(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of a pass, where they are to lie."""
        if not self.gradients:
            return found
        placed: list[Tensor | None] = []
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        for own, given in zip(self.gradients, found, strict=True):
            if own is None or given is None:
                placed.append(given)
                continue
            placed.append(own)
            copied[0].append(own)
            copied[1].append(given)
        torch._foreach_copy_(*copied)
        return placed


class GraphedStep:
    """Forward pass, loss and backward pass of a converted model, for inputs of one shape.

    A call does what `(scale * loss).backward()` does, in the bits of the step that `context.begin` named: it adds to
    `.grad`, and updates the statistics of normalizations once. Between calls, `.grad` must be what an optimizer may
    read: set it to None (`zero_grad`, `set_to_none=True`, torch's default), and a call puts the graph's own buffers
    there, which the next one overwrites. A gradient that is there already is added to, in new memory.

    Not part of the graph: whatever else a model does on the host. It must do the same at every step.
    """

    def __init__(
        self, model: nn.Module, loss_of: LossOf, batch: Sequence[Tensor], beside: GraphedStep | None = None
    ) -> None:
        """Warm up and capture; weights, gradients, statistics, random numbers and the run's step stay what they are.

        Args:
            model: in training mode, on a GPU, after `inject`; after `MasterWeights` if there are any.
            loss_of: called with tensors like those of `batch`, on the model's device.
            batch: inputs and targets, for their shapes and dtypes, and as values that the warm-up can compute with.
            beside: a step of the same model for other shapes; both share memory for passes, rounded weights, gradients
                and the update, and one's gradients are lost when the other replays. Capture the largest first: the
                others find room in its memory.

        Raises:
            ValueError: the step cannot be graphed (`why_not_graphed`), or not beside the other.
        """
        reason = why_not_graphed(model)
        if reason is not None:
            raise ValueError(f"model: got one whose step cannot be graphed ({reason})")
        self.model, self.loss_of = model, loss_of
        context = context_of(model)
        assert context is not None  # It has converted layers.
        self.context: StepContext = context
        self._sites = list(sites(model).values())
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._state = [*model.parameters(), *model.buffers()]
        device = self._parameters[0].device
        self.streams = StreamTable(device)
        self._inputs = [torch.empty_like(t, device=device).copy_(t) for t in batch]
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._results: tuple[Tensor, dict[str, Tensor]] | None = None
        self._gradients: list[Tensor | None] = []
        self._addresses = [t.data_ptr() for t in self._state]
        if beside is not None and (beside.model is not model or beside._addresses != self._addresses):
            raise ValueError("beside: got a step of another model, or of this one in other memory, expected this one's")
        self._shared: _Shared = _Shared(model, device) if beside is None else beside._shared
        # Capturing runs the model: what it changes is put back.
        gradients = [p.grad if p.grad is None or beside is None else p.grad.clone() for p in self._parameters]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._replay = capture(self._pass, device, self._shared.pool)
            if beside is None:
                self._shared.gradients = self._gradients
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._forget_weights()
            # Calls count from zero again: a step that was begun may still be taken, by a replay or without one.
            context.begin(context.step, context.micro_step)
        self._used = -1

    def fits(self, batch: Sequence[Tensor]) -> bool:
        """True where a call can take the batch, nothing measures the step, and the model is as it was captured."""
        alike = len(batch) == len(self._inputs) and all(
            given.shape == own.shape and given.dtype == own.dtype
            for given, own in zip(batch, self._inputs, strict=True)
        )
        alike = alike and self.model.training and not self.context.telemetry.active
        # A parameter in other memory would be read and updated where it was.
        return alike and self._addresses == [t.data_ptr() for t in self._state]

    def __call__(self, batch: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (not scaled) and figures of a batch on any device; gradients of `scale` times the loss are in `.grad`.

        Raises:
            ValueError: the batch has other shapes or dtypes, or the model is not as it was (see `fits`).
            RuntimeError: no step was begun since the last call; it would draw the same random bits again.
        """
        if not self.fits(batch):
            given = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in batch)
            taken = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in self._inputs)
            raise ValueError(
                f"batch: got {given}, expected {taken}; the model in training mode and its old memory; no telemetry"
            )
        if self.context.generation == self._used:
            raise RuntimeError("context.begin: got no call since the last step, expected one before each")
        for own, tensor in zip(self._inputs, batch, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._scale.fill_(scale)
        for streams in (self._shared.streams, self.streams):
            streams.refresh(self.context.stream_number)
        # Copied, because they may be this graph's buffers, or another's that shares its memory.
        earlier = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        self._replay()
        self._used = self.context.generation
        for parameter, gradient, before in zip(self._parameters, self._gradients, earlier, strict=True):
            if before is not None and gradient is not None:
                # In place and in this order, as autograd adds.
                gradient = before.add_(gradient)
            parameter.grad = before if gradient is None else gradient
        assert self._results is not None
        loss, figures = self._results
        return loss.clone(), {name: value.clone() for name, value in figures.items()}

    def step(self, masters: MasterWeights, scale: float = 1.0, clip_norm: float | None = None) -> bool:
        """`masters.step`, by a graph of its own where the gradients are those of the last call alone.

        They may have been changed in their memory since, summed over processes for example.
        """
        return masters.step(scale, clip_norm, self._update_of(masters))

    def _update_of(self, masters: MasterWeights) -> GraphedUpdate | None:
        own, shared = all(p.grad is g for p, g in zip(self._parameters, self._gradients, strict=True)), self._shared
        moving = masters.capturable() if own and not shared.update_failed else None
        if moving is None:
            return None
        if shared.update is None or not shared.update.fits(moving):
            # An optimizer that loaded a checkpoint has other tensors.
            shared.update = None
            try:
                shared.update = GraphedUpdate(masters, moving)
            # Out of memory, or a driver that cannot capture it: the step is made without a graph.
            except RuntimeError:
                shared.update_failed = True
        return shared.update

    def _pass(self) -> None:
        """What a replay repeats on the device alone."""
        # Its rounded weights are the graph's: it makes them itself, and nobody else may take them.
        self._forget_weights()
        for parameter in self._parameters:
            parameter.grad = None
        self.context.begin(self.context.step, self.context.micro_step)
        with self.context.streams_in_memory(self.streams), self.context.fixed_weights():
            # Here, and not by the update: whatever wrote to a weight between replays is seen.
            self._shared.weights.round()
            # New aliases: codes of an input that were offered with it in an earlier pass are no part of this one.
            loss, figures = self.loss_of(*(t.detach() for t in self._inputs))
            (loss * self._scale).backward()
        self._results = loss.detach(), {name: value.detach() for name, value in figures.items()}
        self._gradients = self._shared.place([p.grad for p in self._parameters])
        self._forget_weights()

    def _forget_weights(self) -> None:
        for site in self._sites:
            site.forget_weight()


class GraphedUpdate:
    """An update of master weights (`MasterWeights.step`) from gradients that stay in their memory, as a CUDA graph.

    Loss scale, clipping, the optimizer's numbers and the streams lie in device memory, written before each replay.
    """

    def __init__(self, masters: MasterWeights, moving: Mapping[str, nn.Parameter]) -> None:
        """Capture; nothing changes.

        Args:
            masters: whose step it is.
            moving: what `MasterWeights.capturable` gave, by name.

        Raises:
            ValueError: a tensor's device, dtype or layout is not what the kernels take.
        """
        from fp8repro.kernels.optimizer import launch as kernels

        self._kernels = kernels
        self._optimizer, self._context, self._master = masters.optimizer, masters.context, masters.spec
        groups = group_members(self._optimizer, moving, masters.orders)
        self._members = [member for _, members in groups for member in members]
        self._gradients = [member.parameter.grad for member in self._members]
        # Of gradients that lie otherwise than their masters.
        self._copies = [
            (member.made.grad, gradient)
            for member, gradient in zip(self._members, self._gradients, strict=True)
            if gradient is not None and in_place(member.parameter) is None
        ]
        self._check = kernels.prepare_check([member.made.grad for member in self._members])
        device = self._check.table.device
        self.streams = StreamTable(device, capacity=len(self._members))
        # Members that share a rule and a count of steps, by the number of their group, with their launches.
        self._parts: list[tuple[int, list[Member], Rule, list[tuple[Group, Tensor]]]] = []
        for number, (group, members) in enumerate(groups):
            rule = rule_of(self._optimizer, group)
            for part in with_state(self._optimizer, group, members).values():
                names = {id(member.made): member.name for member in part}
                launches = map(kernels.prepare, kernels.groups_of([member.made for member in part], rule, IDENTITY))
                placed = [
                    (launch, self.streams.span([(names[id(p)], 0, "master", "master") for p in launch.members]))
                    for launch in launches
                ]
                self._parts.append((number, part, rule, placed))
        sizes = [kernels.TERMS, *[kernels.NUMBERS] * len(self._parts)]
        # No gradient is finite at a scale that is no number: warm-up and capture skip the update.
        self._memory = torch.full((sum(sizes),), math.nan, dtype=torch.float64, device=device)
        self._terms, *self._numbers = self._memory.split(sizes)
        # It allocates nothing, so it needs no pool.
        self._replay = capture(self._launch, device, None)

    def fits(self, moving: Mapping[str, nn.Parameter]) -> bool:
        """See `master.UpdateGraph`."""
        if len(moving) != len(self._members) or any(moving.get(m.name) is not m.parameter for m in self._members):
            return False
        if any(m.parameter.grad is not own for m, own in zip(self._members, self._gradients, strict=True)):
            return False
        groups = self._optimizer.param_groups
        for number, part, rule, _ in self._parts:
            now = rule_of(self._optimizer, groups[number])
            if (now.name, now.nesterov, now.momentum != 0) != (rule.name, rule.nesterov, rule.momentum != 0):
                return False
            names = state_names(self._optimizer, groups[number])
            for member in part:
                state, tensors = self._optimizer.state[member.parameter], member.made.state
                if len(names) != len(tensors) or any(
                    state.get(name) is not own for name, own in zip(names, tensors, strict=True)
                ):
                    return False
                # A parameter in other memory would be read and updated where it was.
                if member.parameter.data_ptr() != member.made.master.data_ptr():
                    return False
        return self._steps() is not None

    def __call__(self, scale: float, clip_norm: float | None) -> float | None:
        """See `fused_step`; launches all before it waits for the device."""
        steps = self._steps()
        assert steps is not None  # It fits.
        numbers = self._kernels.terms_of(scale, clip_norm)
        for (number, *_), step in zip(self._parts, steps, strict=True):
            rule = rule_of(self._optimizer, self._optimizer.param_groups[number])
            numbers += self._kernels.numbers_of(rule, step)
        values = torch.tensor(numbers, dtype=torch.float64)
        self._memory.copy_(values.pin_memory() if self._memory.is_cuda else values, non_blocking=True)
        if self._master.is_stochastic:
            updates = self._context.updates
            self.streams.refresh(lambda name, _, *role: self._context.stream_number(name, updates, *role))
        self._replay()
        bad, _, norm = self._check.control.tolist()
        if bad:
            return None
        for _, part, *_ in self._parts:
            count_step(self._optimizer, part)
        tell_schedulers(self._optimizer)
        return float(norm)

    def _steps(self) -> list[int] | None:
        """The number of the update that each part is about to get; None where its members differ."""
        steps = [next_steps(self._optimizer, part) for _, part, *_ in self._parts]
        return [each[0] for each in steps] if all(len(set(each)) == 1 for each in steps) else None

    def _launch(self) -> None:
        """What a replay repeats on the device alone."""
        for copy, gradient in self._copies:
            copy.copy_(gradient)
        self._check.run(self._terms)
        what = (self._master, IDENTITY, self._context.seed)
        for (*_, rule, placed), numbers in zip(self._parts, self._numbers, strict=True):
            for group, streams in placed:
                group.update(rule, numbers, self._terms, self._check.control, (streams, None), *what)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: memory of a pool is only shared within a stream."""
    return torch.cuda.Stream(device)


def capture(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Run something a few times and capture it; gives what replays it on the current stream."""
    side = _side_stream(device)
    # What is left of earlier steps would tie the accumulation of gradients to the stream that they ran on.
    gc.collect()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        # On a stream of their own, so that autograd accumulates gradients there and not on the default stream.
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does is held against the capture: data loaders pin memory in others.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            run()
    return graph.replay
