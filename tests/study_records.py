"""Run folders of the whole plan as training leaves them, with figures that are chosen here and known by hand."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fp8repro.fields import build_dataclass
from fp8repro.paper.plan import experiment_of, make_plan
from fp8repro.precision.loss_scaling import make_scaler
from fp8repro.settings.schema import LossScalingConfig

EPOCHS, STEPS = 8, 160
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
LAYERS = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
# Underflow share of errors.
UNDERFLOW = {"fp8_scale_1": 0.6, "fp8_scale_1000": 0.012, "fp8_scale_4000": 0.004}
SCORES = {"fp8_scale_1": 91.0, "fp8_scale_1000": 97.0, "fp8_nearest": 95.0, "fp8_nearest_fp32_master": 97.9}
L2 = {"fp8_nearest": 130.0, "fp8_nearest_fp32_master": 100.1}
DETAIL = ", ".join(f"{role} e5m2/nearest" for role in ("weight", "activation", "error", "gradient"))


@cache
def planned(profile: str = "embedded") -> dict[str, tuple[Any, dict[str, Any]]]:
    """Cell and resolved configuration by name."""
    roots = {} if profile == "embedded" else dict.fromkeys(("image", "translation"), "/data")
    _, cells = make_plan([f"profile={profile}"], roots=roots)
    return {cell.name: (cell, cell.config) for cell in cells}


def write_plan(root: Path, seeds: int = 3, names: tuple[str, ...] | None = None) -> Path:
    """Every cell of the embedded plan (or the named ones) with that many seeds."""
    for name in names or tuple(planned()):
        for seed in range(seeds):
            write_run(root, name, seed)
    return root


def write_run(
    root: Path, name: str, seed: int = 0, skips: tuple[int, ...] = (), profile: str = "embedded", **summary: Any
) -> Path:
    """One run; `skips` are the steps at which a gradient was not finite."""
    cell, config = planned(profile)[name]
    folder = root / profile / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    config = {**config, "seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(
        json.dumps({"commit": "0123456789abcdef", "cpu": "Test CPU", "gpus": [], "packages": {"torch": "2.14.1"}})
    )
    score = summary.pop("score", SCORES.get(name, 98.0) + 0.1 * seed)
    values = {
        "status": "finished", "experiment": experiment_of(name), "model": config["model"]["name"],
        "data": config["data"]["name"],
        "precision": config["precision"]["name"], "loss_scaling": config["loss_scaling"]["policy"],
        "profile": profile, "seed": seed, "steps": STEPS, "skipped_steps": len(skips), "epochs": float(EPOCHS),
        "train_seconds": 30.0, "device": "cpu", "backend": "none" if "fp32" in name[-5:] else "emulate",
        "version": "0.1.0",
    }  # fmt: skip
    if cell.task == "translation":
        values |= {"bleu": score - 10, "chrf": 90.0, "bleu_signature": SIGNATURE}
    else:
        values |= {"top1": score, "top5": 100.0}
    (folder / "summary.json").write_text(json.dumps({**values, **summary}))
    rows = metrics(name, config, score, skips)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lengthen(folder: Path) -> None:
    """Let the run's configuration say one epoch more than the plan does."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["epochs"] += 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def metrics(name: str, config: dict[str, Any], score: float, skips: tuple[int, ...]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    scaler = make_scaler(build_dataclass(LossScalingConfig, config["loss_scaling"], ""), STEPS)
    rounded = config["precision"]["name"] != "fp32"
    image = config["model"]["task"] == "image"
    rows: list[dict[str, Any]] = []
    if rounded:
        layers = [{"name": n, "kind": "Conv2d", "status": "converted", "detail": DETAIL} for n in LAYERS]
        layers += [{"name": "conv1", "kind": "Conv2d", "status": "exempt", "detail": "weight fp16/nearest"}]
        layers += [{"name": "bn1", "kind": "BatchNorm2d", "status": "left", "detail": "normalization stays in FP32"}]
        rows.append({"kind": "convert", "step": 0, "rows": layers})
    halves = config["precision"]["master"]["format"] == "fp16"
    rows.append(
        {
            "kind": "memory",
            "step": 1,
            "master_bytes": 2**23 if halves else 2**24,
            "weight_bytes": 2**22 if rounded else 2**24,
            "saved_for_backward_bytes": 2**24 if rounded else 2**26,
        }
    )
    for step in range(1, STEPS + 1):
        scale = scaler.scale
        scaler.update(step in skips)
        done = step / STEPS
        if step in skips:
            rows.append({"kind": "event", "step": step, "what": "skipped", "text": "a gradient was not finite"})
        if step % 5 == 0:
            l2 = 60 + (L2.get(name, 100.0) - 60) * done
            epoch = EPOCHS * done
            rows.append(
                {"kind": "train", "step": step, "epoch": epoch, "loss": 2.3 / step, "loss_scale": scale, "l2": l2}
            )
        if rounded and step % 10 == 0:
            rows.append({"kind": "telemetry", "step": step, "rows": telemetry(UNDERFLOW.get(name, 0.0017), done)})
        if step % (STEPS // EPOCHS) == 0:
            reached = score - 60 * math.exp(-6 * done) + 60 * math.exp(-6)
            for split, better in (("val", 0.0), ("train", 1.0)) if image else (("val", 0.0),):
                figures = (
                    {"top1": min(100.0, reached + better), "top5": 100.0} if image else {"perplexity": 1 + 30 / step}
                )
                # A second a step; twice as many where operands are rounded.
                figures["seconds"] = float(step * (2 if rounded else 1))
                rows.append({"kind": "eval", "step": step, "epoch": EPOCHS * done, "split": split, **figures})
    return rows


def telemetry(share: float, done: float) -> list[dict[str, Any]]:
    """Rows of one measured step: shares of underflow that grow with depth, bell-shaped exponents."""
    rows = []
    for depth, layer in enumerate(LAYERS):
        for role, operand, centre in (
            ("weight", "weight", -5), ("activation", "input", -1), ("error", "output_error", -10 - depth),
            ("gradient", "weight_gradient", -6),
        ):  # fmt: skip
            lost = round(100_000 * share * (0.5 + 0.5 * done) * (1 + depth) / 4) if role == "error" else 0
            counts = [round(20_000 * math.exp(-(((e - centre) / 3) ** 2))) for e in range(centre - 9, centre + 9)]
            rows.append(
                {
                    "layer": layer,
                    "role": role,
                    "operand": operand,
                    "nonzero": 100_000,
                    "underflow": lost,
                    "overflow": 0,
                    "underflow_share": lost / 100_000,
                    "absmax": 2.0**centre,
                    "exponents": [centre - 9, counts],
                }
            )
    return rows
