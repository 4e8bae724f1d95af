"""What became of a run, from its records and checkpoints, in lines for people. Read-only; trusts no byte of them."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8repro.errors import UserError
from fp8repro.numerics.formats import FORMATS
from fp8repro.paper.run_folder import CHECKPOINTS, LOCK, METRICS, SUMMARY, Unreadable, metrics_rows, read_file
from fp8repro.precision.noise import NoiseRow, draw, expected_snr, layers_to_exempt, table, worst_first
from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint

WORST = 3
TABLE = 12
# Signal to noise over this many dB is that of 16 bits.
FINE = 40.0
ADVICE = {
    "forward": "lower optimizer.lr, or give schedule.warmup= or trainer.clip_norm=",
    "fixed": "lower loss_scaling.scale, or take loss_scaling=dynamic or enhanced",
    "moving": "lower optimizer.lr, or give trainer.clip_norm=; a floor that is too high shows as overflow of errors",
    "rollback": "resume=auto trainer.on_divergence=rollback goes back to before it and leaves out the batches since",
    "resume": "the same command with resume=auto goes on from the newest whole checkpoint",
}


def explain(folder: Path, figure: Path | None = None) -> tuple[list[str], bool]:
    """How a run stands, and why.

    Args:
        folder: the run's.
        figure: where to draw the signal to noise of each layer and role in the last measured step.

    Returns:
        Lines to print; and False if it failed or a checkpoint is damaged.

    Raises:
        UserError: the folder holds no run, or there is nothing to draw.
    """
    if not any((folder / name).exists() for name in (METRICS, SUMMARY, CHECKPOINTS)):
        raise UserError(f"run: {str(folder)!r} holds no run, expected a folder with {METRICS}")
    history = _History(folder)
    summary = history.summary
    failed = summary.get("status") == "failed"
    lines = [("run", f"{folder}" + (f" ({_names(summary)})" if summary else ""))]
    lines += [("state", _state(folder, summary, history))]
    lines += history.lines()
    checkpoints, damaged = _checkpoints(folder / CHECKPOINTS)
    lines += [("checkpoints", checkpoints)]
    lines += [("advice", text) for text in _advice(summary, history)]
    noise = history.noise()
    if figure is not None:
        if not noise:
            raise UserError(f"figure: got a run without telemetry ({folder}), expected trainer.telemetry_every=")
        _draw(noise, figure)
        lines += [("figure", str(figure))]
    text = [f"{name:<12} {text}" for name, text in lines]
    return text + (["", table(noise, TABLE)] if noise else []), not (failed or damaged)


def _draw(noise: list[NoiseRow], figure: Path) -> None:
    try:
        draw(noise, figure)
    except (OSError, ValueError) as error:
        raise UserError(f"figure: cannot write {str(figure)!r} ({error})") from None


class _History:
    """The last row of each kind in metrics.jsonl, and a count of events."""

    def __init__(self, folder: Path) -> None:
        try:
            self.summary = read_file(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
        except Unreadable as error:
            raise UserError(f"{folder}: {error}") from None
        self.last: dict[str, dict[str, Any]] = {}
        self.events: Counter[str] = Counter()
        self.first: dict[str, dict[str, Any]] = {}
        self.step = 0
        for row in metrics_rows(folder):
            kind, what = _text(row.get("kind")), _text(row.get("what"))
            self.last[kind] = row
            self.step = max(self.step, _number(row.get("step")))
            if kind == "event":
                self.events[what] += 1
                self.first.setdefault(what, row)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Steps, loss, events, the first tensor that went wrong, and the last telemetry."""
        train = self.last.get("train", {})
        skipped = _number(self.summary.get("skipped_steps", train.get("skipped_steps")))
        share = f" ({skipped / self.step:.1%})" if self.step else ""
        yield "steps", f"{self.step}, {skipped} skipped{share}"
        if train:
            figures = {name: train.get(name) for name in ("loss", "loss_scale", "grad_norm", "lr")}
            shown = ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())
            yield "last figures", f"step {_number(train.get('step'))}: {shown}"
        for what, count in self.events.items():
            row = self.first[what]
            yield "event", f"{what}, {count} times, first at step {_number(row.get('step'))}: {_text(row.get('text'))}"
        diagnosis = self.last.get("diagnosis", {})
        if diagnosis:
            first = diagnosis.get("first")
            if isinstance(first, Mapping):
                where = f"layer {_text(first.get('layer'))}, role {_text(first.get('role'))}"
            else:
                where = "not found when the step was repeated"
            yield "non-finite", f"step {_number(diagnosis.get('step'))}: first at {where}"
        yield from self._noise()
        telemetry = diagnosis or self.last.get("telemetry", {})
        rows = telemetry.get("rows")
        if isinstance(rows, list):
            for share_of in ("underflow", "overflow"):
                if worst := _worst(rows, share_of):
                    yield share_of, f"step {_number(telemetry.get('step'))}, largest: {worst}"

    def noise(self) -> list[NoiseRow]:
        """What each rounding of the last measured step cost, as far as the record tells."""
        rows = self.last.get("telemetry", {}).get("rows")
        found = [noise_row(row) for row in rows] if isinstance(rows, list) else []
        return [row for row in found if row is not None]

    def _noise(self) -> Iterator[tuple[str, str]]:
        rows = self.noise()
        if not rows:
            return
        worst = [f"{row.layer} {row.role} {row.snr:.1f} dB" for row in worst_first(rows)[:WORST]]
        yield "noise", f"step {_number(self.last['telemetry'].get('step'))}, least signal: {', '.join(worst)}"
        # An exempt layer has 16 bits already.
        coarse = [row for row in rows if row.snr < FINE]
        yield "exempt first", ", ".join(layers_to_exempt(coarse)[:WORST]) or "none"


def noise_row(row: Any) -> NoiseRow | None:
    """What a row of telemetry says of a rounding; None where it says nothing of it."""
    if not isinstance(row, Mapping) or row.get("format") not in FORMATS:
        return None
    exponents, nonzero = row.get("exponents"), _number(row.get("nonzero"))
    if not (isinstance(exponents, list) and len(exponents) == 2 and isinstance(exponents[1], list) and nonzero):
        return None
    lowest, counts = exponents
    whole = isinstance(lowest, int) and -126 <= lowest <= 127 and 0 < len(counts) <= 127 - lowest + 1
    if not whole or not all(isinstance(count, int) and 0 <= count < 2**63 for count in counts):
        return None
    snr = expected_snr(lowest, counts, FORMATS[row["format"]], str(row.get("rounding")))
    layer, role, operand = (_text(row.get(name)) for name in ("layer", "role", "operand"))
    underflow, overflow = (min(_number(row.get(name)) / nonzero, 1.0) for name in ("underflow", "overflow"))
    return NoiseRow(layer, role, operand, snr, underflow, overflow)


def _state(folder: Path, summary: Mapping[str, Any], history: _History) -> str:
    status = summary.get("status")
    if _locked(folder / LOCK):
        return "running now"
    if status == "failed":
        return f"failed: {_text(summary.get('reason')) or 'no reason is recorded'}"
    if status == "finished":
        scores = [f"{name} {_figure(summary[name])}" for name in ("top1", "bleu") if summary.get(name) is not None]
        return " ".join(["finished", *scores])
    return f"stopped or killed; the last that was recorded is step {history.step}"


def _advice(summary: Mapping[str, Any], history: _History) -> Iterator[str]:
    if summary.get("status") == "failed":
        if "nonfinite_forward" in history.events:
            yield ADVICE["forward"]
        elif "skipped" in history.events:
            yield ADVICE["fixed" if summary.get("loss_scaling") in ("none", "constant") else "moving"]
        if "diagnosis" in history.last and not summary.get("rollbacks"):
            yield ADVICE["rollback"]
    if summary.get("status") != "finished":
        yield ADVICE["resume"]


def _checkpoints(folder: Path) -> tuple[str, bool]:
    """A line about a run's checkpoints, and whether one is damaged."""
    whole: list[str] = []
    damaged: list[str] = [f"{path.name} (set aside)" for path in sorted(folder.glob("*.damaged"))]
    for path in list_checkpoints(folder):
        try:
            whole.append(f"step {_number(read_checkpoint(path)['step'])}")
        except UserError as error:
            damaged.append(_text(str(error).removeprefix("checkpoint: ")))
    lines = [f"whole: {', '.join(whole) or 'none'}"]
    return "; ".join([*lines, *(["damaged: " + ", ".join(damaged)] if damaged else [])]), bool(damaged)


def _locked(path: Path) -> bool:
    """True while a run is in the folder."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _names(summary: Mapping[str, Any]) -> str:
    return ", ".join(_text(summary.get(key)) for key in ("model", "data", "precision")) + (
        f", seed {_text(summary.get('seed'))}"
    )


def _worst(rows: list[Any], what: str) -> str:
    """The tensors of which the largest share was lost."""
    shares = []
    for row in rows:
        if isinstance(row, Mapping) and _number(row.get("nonzero")) > 0 and _number(row.get(what)) > 0:
            share = _number(row[what]) / _number(row["nonzero"])
            shares.append((share, f"{_text(row.get('layer'))} {_text(row.get('role'))} {share:.2%}"))
    return ", ".join(text for _, text in sorted(shares, reverse=True)[:WORST])


def _number(value: Any) -> int:
    """A count of a record, 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else 0


def _figure(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.5g}" if isinstance(value, (int, float)) else _text(value)


def _text(value: Any) -> str:
    """A record's text in one line that leaves the terminal alone."""
    text = " ".join(str(value if value is not None else "").split())
    return "".join(c if c.isprintable() else "?" for c in text[:300])
