"""The command line: verbs, their options, one-line errors and exit codes; nothing else.

No torch is imported before a verb needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fp8repro.cli.output import outlived
from fp8repro.errors import RunFailure, UserError

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
# Options that only print.
ANSWERS = {"-h", "--help", "--cfg", "--cfg=job", "--dry-run"}
DEFAULT_RUNS = "runs"


@dataclass(frozen=True)
class Verb:
    """A verb: what it does in a few words, and the function that does it and gives the exit code."""

    summary: str
    run: Callable[[list[str]], int]


class _Parser(argparse.ArgumentParser):
    """Argparse with our own help and one-line errors."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"fp8repro {verb}", add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true", help="this text")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code.

    0; 1: a run failed, or the answer cannot be printed; 2: a mistake in the command line or the data; 128 + the number
    of a signal (130 for Ctrl-C).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # These verbs write folders; the others only print.
    makes_files = given[:1] in (["train"], ["reproduce"], ["report"]) and not ANSWERS & set(given)
    with outlived("; it goes on without" if makes_files else "") as output:
        code = _exit_code(given)
        output.flush()
    # A closed pipe (head, less) is no error.
    unanswered = output.lost is not None and not isinstance(output.lost, BrokenPipeError) and not makes_files
    return FAILURE if code == 0 and unanswered else code


def _exit_code(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except UserError as error:
        return _say(error, USAGE_ERROR)
    except RunFailure as error:
        return _say(error, FAILURE)
    except KeyboardInterrupt:
        print("fp8repro: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from fp8repro.cli.help import overview

        print(overview({name: verb.summary for name, verb in VERBS.items()}))
        return 0
    if arguments[0] == "--version":
        import fp8repro

        print(f"fp8repro {fp8repro.__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        from fp8repro.settings.choices import nearest_first

        raise UserError(f"verb: got {name!r}, expected one of {nearest_first(name, VERBS)}")
    return VERBS[name].run(rest)


def _code_of(stop: KeyboardInterrupt | SystemExit) -> int:
    return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else INTERRUPTED


def _say(error: Exception, code: int) -> int:
    if os.environ.get("FP8REPRO_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"fp8repro: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def train(arguments: list[str]) -> int:
    """`fp8repro train`: one run, or a sweep one run after the other."""
    parser = _Parser("train")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=("job",))
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import train_help

        print(train_help())
        return 0
    from fp8repro.settings.overrides import jobs
    from fp8repro.settings.schema import run_config

    planned = jobs(options.settings, options.multirun)
    # All of a sweep is checked before any of it runs.
    configs = [
        run_config({**job.values, "run_dir": _run_dir(job.values, job.name, options.multirun)}) for job in planned
    ]
    if options.cfg:
        print(
            "---\n".join(_yaml(config.to_dict(), job.choices) for config, job in zip(configs, planned, strict=True)),
            end="",
        )
        return 0
    from fp8repro.engines.cpu.malloc import keep_freed_memory
    from fp8repro.training.loop import train as train_run

    keep_freed_memory()
    failures = 0
    for number, config in enumerate(configs, 1):
        if len(configs) > 1:
            _print_main(f"[{number}/{len(configs)}] {config.run_dir}")
        try:
            summary = train_run(config)
        except (KeyboardInterrupt, SystemExit) as stop:
            again = arguments if any("resume=" in part for part in arguments) else [*arguments, "resume=auto"]
            print(f"fp8repro: interrupted; to go on: fp8repro train {shlex.join(again)}", file=sys.stderr)
            return _code_of(stop)
        except RunFailure as error:
            if len(configs) == 1:
                raise
            failures += 1
            _say(error, FAILURE)
            continue
        # Of a run that was finished before, only the first process knows the summary.
        if summary:
            _print_main(_outcome(summary, str(config.run_dir)))
    if failures:
        raise RunFailure(f"{failures} of {len(configs)} runs failed")
    return 0


def warm(arguments: list[str]) -> int:
    """`fp8repro warm`: the kernels of a run, compiled before it."""
    parser = _Parser("warm")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import WARM

        print(WARM)
        return 0
    own = dict(part.split("=", 1) for part in options.settings if part.startswith(("capability=", "processors=")))
    from fp8repro.settings.overrides import jobs
    from fp8repro.settings.schema import run_config

    (job,) = jobs([part for part in options.settings if part.split("=")[0] not in own], sweep=False)
    config = run_config(job.values)
    numbers = [_whole_number(name, own.get(name)) for name in ("capability", "processors")]
    from fp8repro.training.warm import warm_config

    print(warm_config(config, *numbers))
    return 0


def _whole_number(name: str, text: str | None) -> int | None:
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise UserError(f"{name}: got {text!r}, expected a whole number over 0")
    return None if text is None else int(text)


def evaluate(arguments: list[str]) -> int:
    """`fp8repro evaluate`: saved weights on the validation data, in any precision."""
    parser = _Parser("evaluate")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--split", default="val")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import EVALUATE

        print(EVALUATE)
        return 0
    # Run folders have settings in their names.
    if not options.settings or ("=" in options.settings[0] and not Path(options.settings[0]).exists()):
        raise UserError("evaluate: the weights are missing, expected a run's folder, a checkpoint or a .pth file first")
    weights, *settings = options.settings
    from fp8repro.settings.overrides import changed, jobs
    from fp8repro.settings.schema import run_config
    from fp8repro.training.checkpoint import list_checkpoints
    from fp8repro.training.evaluate import checkpoint_config
    from fp8repro.training.evaluate import evaluate as measure_weights

    path = Path(weights)
    if path.is_dir():
        saved = list_checkpoints(path / "checkpoints")
        if not saved:
            raise UserError(f"evaluate: {weights!r} holds no checkpoints, expected a run's folder")
        path = saved[-1]
    if any(setting.startswith(("model=", "experiment=")) for setting in settings):
        (job,) = jobs(settings, sweep=False)
        config = run_config(job.values)
    else:
        # A checkpoint knows its own model and data.
        config = run_config(changed(checkpoint_config(path).to_dict(), settings))
    figures = measure_weights(path, config, options.split)
    print(f"{config.model.name} on {config.data.name} ({options.split}), {config.precision.name}: {path}")
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    return 0


def compare(arguments: list[str]) -> int:
    """`fp8repro compare`: the tables of finished runs beside the paper's."""
    from fp8repro.results import comparison

    parser = _Parser("compare")
    parser.add_argument("runs", nargs="*", default=[DEFAULT_RUNS])
    parser.add_argument("--format", choices=comparison.FORMATS, default="text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import COMPARE

        print(COMPARE)
        return 0
    from fp8repro.results import two_runs

    if len(options.runs) == 2 and all(map(two_runs.is_run, options.runs)):
        print(two_runs.compare_two(*options.runs), end="")
        return 0
    from fp8repro.results.records import read_records

    records, problems = read_records(options.runs)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    rows = comparison.comparison(records)
    print(comparison.render(rows, options.format), end="")
    if options.out:
        comparison.write(rows, options.out)
    return 0


def bench(arguments: list[str]) -> int:
    """`fp8repro bench`: measurements of speed, each a module of fp8repro.bench with a `main`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        from fp8repro.cli.help import bench_help

        print(bench_help(BENCHES))
        return 0
    name, *rest = arguments
    if name not in BENCHES:
        from fp8repro.settings.choices import nearest_first

        raise UserError(f"bench: got {name!r}, expected one of {nearest_first(name, BENCHES)}")
    code: int = import_module(f"fp8repro.bench.{name}").main(rest)
    return code


def reproduce(arguments: list[str]) -> int:
    """`fp8repro reproduce`: the cells of the paper's tables that are not done yet."""
    parser = _Parser("reproduce")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", default="auto")
    parser.add_argument("--images")
    parser.add_argument("--text")
    parser.add_argument("--runs", type=Path, default=Path(DEFAULT_RUNS))
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--retry", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import REPRODUCE

        print(REPRODUCE)
        return 0
    from fp8repro.reproduce.command import Options, reproduce

    chosen = {name: value for name, value in vars(options).items() if name not in ("help", "jobs")}
    try:
        reproduce(Options(workers=options.jobs, **chosen))
    except (KeyboardInterrupt, SystemExit) as stop:
        again = shlex.join(["fp8repro", "reproduce", *arguments])
        print(f"fp8repro: interrupted; the same command continues: {again}", file=sys.stderr)
        return _code_of(stop)
    return 0


def doctor(arguments: list[str]) -> int:
    """`fp8repro doctor`: can training run here; what became of a run."""
    from fp8repro.cli import doctor as looks

    parser = _Parser("doctor")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        print(looks.USAGE)
        return 0
    return looks.doctor(options.settings)


def report(arguments: list[str]) -> int:
    """`fp8repro report`: tables, verdicts and figures of finished runs, as one page and as files."""
    parser = _Parser("report")
    parser.add_argument("runs", nargs="*", default=[DEFAULT_RUNS])
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from fp8repro.cli.help import REPORT

        print(REPORT)
        return 0
    from fp8repro.results.report import write_report

    for problem in write_report(options.runs, options.out):
        print(f"left out: {problem}", file=sys.stderr)
    print(options.out / "report.html")
    return 0


def _run_dir(values: Mapping[str, Any], name: str, sweep: bool) -> str:
    """A sweep puts every run in a folder of its own."""
    given = values["run_dir"]
    # No path at all is refused with the other settings.
    if given is not None and (given == "" or not sweep):
        return str(given)
    return str(Path(str(given or DEFAULT_RUNS)) / name)


def _yaml(values: Mapping[str, Any], choices: Mapping[str, str | None]) -> str:
    import yaml

    chosen = " ".join(f"{group}={choice}" for group, choice in choices.items() if choice is not None)
    return f"# {chosen}\n" + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _outcome(summary: Mapping[str, Any], folder: str) -> str:
    if summary.get("bleu") is not None:
        scores = f"BLEU {summary['bleu']:.2f}  chrF {summary['chrf']:.1f}"
    else:
        scores = f"top-1 {summary['top1']:.2f} %  top-5 {summary['top5']:.2f} %"
    lines = {
        "run": f"{summary['model']} on {summary['data']} ({summary['profile']}), seed {summary['seed']}",
        "precision": f"{summary['precision']}, loss scaling {summary['loss_scaling']}",
        "result": scores,
        "steps": f"{summary['steps']}, {summary['skipped_steps']} skipped, {summary['train_seconds']:.0f} s",
        "folder": folder,
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _print_main(text: str) -> None:
    """Under torchrun, only the first process speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


VERBS = {
    "train": Verb("train a model, or a sweep of models", train),
    "warm": Verb("compile a run's GPU kernels before it", warm),
    "evaluate": Verb("measure saved weights, in any precision", evaluate),
    "reproduce": Verb("run every cell of the paper's tables", reproduce),
    "report": Verb("the page: tables, verdicts and figures of finished runs", report),
    "compare": Verb("tables of finished runs beside the paper's figures", compare),
    "doctor": Verb("what is missing to train here; why a run failed", doctor),
    "bench": Verb("measure speed on this machine", bench),
}
BENCHES = {
    "data": "images from files to batches, decoded at each use and once, on this CPU",
    "kernels": "the Triton kernels on this GPU: results first, then speed",
    "quantize": "the CPU quantizer beside a copy, torch and QPyTorch",
    "step": "a training step of each recipe beside FP32 on this CPU",
}
