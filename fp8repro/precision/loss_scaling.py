"""Loss-scaling policies as pure state machines (paper, section 3.1): numbers in, numbers out, never a tensor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from fp8repro.errors import UserError
from fp8repro.fields import build_dataclass, plain
from fp8repro.settings.lengths import Length, in_steps, is_fraction
from fp8repro.settings.schema import LossScalingConfig


class LossScaler(Protocol):
    """What a training loop asks of a policy.

    Attributes:
        scale: what the mean loss is multiplied by in the next step.
        floor: the least value that a back-off leaves.
        skipped: steps skipped so far.
        skipped_in_a_row: of those, the ones since the last step that was applied.
    """

    scale: float
    floor: float
    skipped: int
    skipped_in_a_row: int

    @property
    def at_floor(self) -> bool:
        """True when a back-off cannot lower the scale."""
        ...

    def update(self, found_nonfinite: bool) -> bool:
        """Account for one step; True when it is to be applied, False when it is skipped."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


class ConstantScale:
    """One scale for the whole run (paper: 10,000 for the convolutional networks)."""

    def __init__(self, scale: float) -> None:
        """`scale` is over 0."""
        self.scale = self.floor = scale
        self.skipped = self.skipped_in_a_row = 0

    @property
    def at_floor(self) -> bool:
        """Always."""
        return True

    def update(self, found_nonfinite: bool) -> bool:
        """See `LossScaler`."""
        self.skipped += found_nonfinite
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if found_nonfinite else 0
        return not found_nonfinite

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.scale, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        # States of before had none.
        self.scale = state.get("scale", self.scale)


class DynamicScale(ConstantScale):
    """Back-off: divided by `factor` on a non-finite gradient, multiplied by it after `window` good steps in a row.

    With `floors`, a rising schedule of (step, floor), it is the paper's enhanced loss scaling: the scale never falls
    under the floor in force, and rises to it at once when the floor does. Skipped steps count as steps.
    """

    def __init__(
        self,
        scale: float,
        factor: float,
        window: int,
        min_scale: float,
        max_scale: float,
        floors: tuple[tuple[int, float], ...] = (),
    ) -> None:
        """Floors are sorted by step."""
        super().__init__(scale)
        self.factor, self.window, self.max_scale = factor, window, max_scale
        self.floors = ((0, min_scale), *floors)
        self.step = self.good_steps = 0
        self._raise_floor()

    def _raise_floor(self) -> None:
        self.floor = max(floor for when, floor in self.floors if when <= self.step)
        self.scale = max(self.scale, self.floor)

    @property
    def at_floor(self) -> bool:
        """True when a back-off cannot lower the scale."""
        return self.scale <= self.floor

    def update(self, found_nonfinite: bool) -> bool:
        """See `LossScaler`."""
        super().update(found_nonfinite)
        if found_nonfinite:
            self.scale, self.good_steps = self.scale / self.factor, 0
        else:
            self.good_steps += 1
            if self.good_steps == self.window:
                self.scale, self.good_steps = min(self.scale * self.factor, self.max_scale), 0
        self.step += 1
        self._raise_floor()
        return not found_nonfinite

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return super().state_dict() | {"step": self.step, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if state["step"] < 0:
            raise UserError(f"scaler.step: got {state['step']}, expected a number of steps")
        super().load_state_dict(state)
        self.step, self.good_steps = state["step"], state["good_steps"]
        self._raise_floor()


def make_scaler(config: LossScalingConfig, total_steps: int, epochs: float | None = None) -> LossScaler:
    """The policy of a configuration, for a run of `total_steps` steps.

    `epochs` are those of the run; they may be left out where no length is in epochs.

    Raises:
        UserError: a setting that is not accepted, or bounds that contradict each other.
    """
    # A caller's own dataclass was not read from settings, which checks them.
    config = build_dataclass(LossScalingConfig, plain(asdict(config)), "loss_scaling")
    if config.policy == "none":
        return ConstantScale(1.0)
    if config.policy == "constant":
        return ConstantScale(config.scale)
    if config.factor <= 1:
        raise UserError(f"loss_scaling.factor: got {config.factor}, expected a number over 1")
    if not config.min_scale <= config.scale <= config.max_scale:
        bounds = f"min_scale={config.min_scale} and max_scale={config.max_scale}"
        raise UserError(f"loss_scaling.scale: got {config.scale}, expected a number between {bounds}")
    if config.floors and config.policy != "enhanced":
        raise UserError(f"loss_scaling.floors: got {config.floors} with policy {config.policy}, expected enhanced")
    if config.policy == "enhanced" and not config.floors:
        raise UserError("loss_scaling.floors: got none, expected (when, floor) pairs for the enhanced policy")
    floors = tuple(sorted((_steps(when, total_steps, epochs), floor) for when, floor in config.floors))
    highest = max((floor for _, floor in floors), default=0.0)
    if highest > config.max_scale:
        raise UserError(f"loss_scaling.floors: got {highest}, expected at most max_scale={config.max_scale}")
    # At the edge of overflow a scale that grows after each window loses about one step in `window + 1`.
    least = config.min_window if is_fraction(config.window) else 1
    window = max(least, _steps(config.window, total_steps, epochs))
    return DynamicScale(config.scale, config.factor, window, config.min_scale, config.max_scale, floors)


def _steps(length: Length, total_steps: int, epochs: float | None) -> int:
    return round(in_steps(length, total_steps, epochs))
