"""Help texts. Choices are read from conf/, settings from their declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field
from typing import Any, Literal, get_args, get_origin

import yaml

from fp8repro.fields import declared_settings, plain
from fp8repro.settings.choices import groups
from fp8repro.settings.schema import RunConfig

GROUPS = ("model", "data", "precision", "loss_scaling", "profile", "optimizer", "schedule", "training", "logger")

TRAIN = """\
usage: fp8repro train [group=choice ...] [setting=value ...] [-m] [--cfg job]

  fp8repro train model=resnet50 precision=fp8
  fp8repro train -m precision=fp32,fp8 seed=0,1,2
  fp8repro train model=resnet50 data=imagenet data.root=/data/imagenet
  fp8repro train experiment=resnet50_fp8 profile=paper data.root=/data/imagenet

options
  -m, --multirun  run every combination of the lists of values (seed=0,1,2), one after the other
  --cfg job       print what the settings come to, and train nothing
  -h, --help      this text

settings, and what they are where no group sets them (--cfg job prints what they come to)
"""

PRECISION = """\
  precision.ROLE.format=e5m2|e4m3|fp16|...   (ROLE: weight, activation, error, gradient, master)
  precision.ROLE.rounding=nearest|stochastic|toward_zero
"""

WARM = """\
usage: fp8repro warm [group=choice ...] [setting=value ...] [capability=90] [processors=132]

  fp8repro warm model=resnet50 precision=fp8
  fp8repro warm model=transformer precision=fp8 capability=90

Compiles the Triton kernels that fp8repro train would compile with the same settings, one process a core, into Triton's
cache (TRITON_CACHE_DIR). What is there stays. No GPU takes part, but the data has to be there: it decides the shapes.
Kernels of the beam search are compiled when they are first launched.

options
  capability=N  compute capability to compile for, 90 for sm_90 (default: this machine's GPU)
  processors=N  its multiprocessors, by which tiles are chosen (default: this GPU's; known for 89, 90, 100 and 120)
  -h, --help    this text"""

EVALUATE = """\
usage: fp8repro evaluate WEIGHTS [group=choice ...] [setting=value ...] [--split val|train|test]

  fp8repro evaluate runs/resnet18-digits-fp8-seed0
  fp8repro evaluate runs/resnet18-digits-fp32-seed0 precision=fp8
  fp8repro evaluate runs/gnmt-synthetic_translation-fp8-seed0 --split test decode.beam=1
  fp8repro evaluate resnet50-0676ba61.pth model=resnet50 data=imagenet data.root=/data/imagenet precision=fp8

WEIGHTS is a run's folder (its newest checkpoint), a checkpoint, or a state dict with torchvision's names. A checkpoint
has its run's settings; precision=, data=, loss_scaling= and single values may be changed. Other weights need model=.
--split (default val) is the data to evaluate on; test is for translation models alone, and is translated."""

REPRODUCE = """\
usage: fp8repro reproduce [profile=embedded|midscale|paper] [setting=value ...] [options]

  fp8repro reproduce --seeds 1
  fp8repro reproduce --only C4,C6 --dry-run
  fp8repro reproduce profile=midscale --images data/cifar10 data.image_size=32 --only resnet18
  fp8repro reproduce profile=paper --images /data/imagenet --text /data/wmt16 --processes 8

Runs the cells of the paper's tables and studies that are not done yet, each in its own process; after an interruption,
the same command continues. Settings apply to every cell. fp8repro report makes the page.

options
  --only NAMES      studies (C1, C2, C4 to C7, doses, recipes), cells or models, separated by commas
  --seeds N         how many seeds, or which: 0,1,2 (5, is 5 alone); auto (default): 3, then 6 and 12 where a verdict
                    is still open
  --images FOLDER   data of the convolutional networks (midscale, paper)
  --text FOLDER     data of the translation models (midscale, paper)
  --runs FOLDER     where records are kept (default runs)
  --jobs N          runs at a time (default: one for each GPU, or for each core up to 4); they share the cores
  --processes N     processes of each run, through torchrun (one for each GPU)
  --retry           run again what failed
  --dry-run         list the runs and their state, run nothing
  -h, --help        this text"""

REPORT = """\
usage: fp8repro report [FOLDER ...] [--out FOLDER]

Reads the records of all finished runs under the folders (default: runs) and writes report.html, which needs no network,
tables/ (Markdown, CSV, JSON) and figures/ (PNG, each with its data).

options
  --out FOLDER  where to write (default results)
  -h, --help    this text"""

COMPARE = """\
usage: fp8repro compare [FOLDER ...] [--format text|md|csv|json] [--out FOLDER]
       fp8repro compare RUN RUN

Reads the records of all finished runs under the folders (default: runs) and prints the mean and standard deviation over
seeds, the gap to FP32, and the paper's figures beside them. With the folders of two runs: the settings in which they
differ, their curves, and a verdict over all seeds that lie beside them.

options
  --format      text (default), md, csv or json
  --out FOLDER  write comparison.md, comparison.csv and comparison.json there too
  -h, --help    this text"""


def overview(verbs: Mapping[str, str]) -> str:
    """Help of the program."""
    lines = ["usage: fp8repro VERB ...", ""]
    lines += ["Mixed Precision Training With 8-bit Floating Point (arXiv 1905.12334), reproduced.", "", "verbs"]
    lines += [f"  {name:<10} {summary}" for name, summary in verbs.items()]
    lines += ["", "fp8repro VERB --help says more. FP8REPRO_DEBUG=1 shows the traceback of an error.", ""]
    return "\n".join([*lines, *_choices(("model", "data", "precision", "loss_scaling"))])


def train_help() -> str:
    """Help of `fp8repro train`."""
    settings = [_setting(name, hint, f) for name, hint, f in declared_settings(RunConfig) if f.metadata]
    return "\n".join([TRAIN + "\n".join(settings), PRECISION, *_choices((*GROUPS, "experiment"))])


def _setting(name: str, hint: Any, f: Field[Any]) -> str:
    value = f.default if f.default_factory is MISSING else f.default_factory()
    default = "" if value is MISSING else yaml.safe_dump(plain(value), default_flow_style=True).partition("\n")[0]
    accepted = f"{' | '.join(get_args(hint))}: " if get_origin(hint) is Literal else ""
    head = f"  {name}={default}"
    return textwrap.fill(
        accepted + f.metadata["help"],
        118,
        initial_indent=f"{head:<41} ",
        subsequent_indent=42 * " ",
        break_on_hyphens=False,
    )


def bench_help(benches: Mapping[str, str]) -> str:
    """Help of `fp8repro bench`."""
    lines = [f"  {name:<10} {summary}" for name, summary in benches.items()]
    return "\n".join(["usage: fp8repro bench NAME ...", "", *lines, "", "fp8repro bench NAME --help says more."])


def _choices(chosen: tuple[str, ...]) -> list[str]:
    known, lines = groups(), []
    for group in chosen:
        lines.append(f"{group}=")
        width = max(map(len, known[group]))
        lines += [f"  {name:<{width}}  {headline}" for name, headline in known[group].items()]
        lines.append("")
    return lines[:-1]
