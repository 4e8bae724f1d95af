"""`fp8repro train SETTINGS` that counts replayed steps, and says in a line of JSON what came of the run.

A run that replays too few steps in a given time is stopped: eager FP8 steps would use up the time of all that follows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from fp8repro.cli.main import main as command_line
from fp8repro.paper.run_folder import SUMMARY, metrics_rows, read_or_empty
from fp8repro.training import run as run_module
from fp8repro.training.replays import Replays

ENOUGH = 50
# For the step in progress and the checkpoint, once a run is asked to stop.
GRACE = 15.0
FIGURES = ("status", "top1", "bleu", "chrf", "perplexity", "decode_seconds", "steps", "skipped_steps", "train_seconds")
FIGURES += ("backend", "graphs", "decode_graphs", "reason")


class Watch:
    """Counts the passes of a run; asks it to stop where too few of them were replays."""

    def __init__(self, within: float | None) -> None:
        """Count from now on; `within`: seconds for `ENOUGH` replays, None for as long as it takes."""
        self.within, self.start = within, time.monotonic()
        self.passes, self.replays, self.why_not = 0, 0, None
        self.seconds: float | None = None
        self.stopped: str | None = None
        self._enough = threading.Event()

    def count(self, replayed: bool, why_not: str | None) -> None:
        """A pass was made."""
        self.passes, self.replays, self.why_not = self.passes + 1, self.replays + replayed, why_not
        if self.replays == ENOUGH:
            self.seconds = round(time.monotonic() - self.start, 1)
            self._enough.set()

    def wait(self, give_up: Any) -> None:
        """Stop the run if the time passes first; call `give_up` where it does not heed."""
        if self._enough.wait(self.within):
            return
        doing = self.why_not or f"in {where_the_main_thread_is()}"
        made = f"{self.passes} passes, {self.replays} of them replayed (expected {ENOUGH})"
        self.stopped = f"stopped after {self.within:g} s: {made}; {doing}"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE)
        give_up()


def where_the_main_thread_is() -> str:
    """Its innermost functions, such as `compile < run < take`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = []
    while frame is not None and len(names) < 8:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return " < ".join(names)


def outcome(folder: Path, watch: Watch) -> dict[str, Any]:
    """What is known of a run, finished or not."""
    summary = read_or_empty(folder / SUMMARY)
    rows = list(metrics_rows(folder))
    rates = {name: [row[name] for row in rows if row.get(name)] for name in ("images_per_second", "tokens_per_second")}
    return {
        **{name: summary.get(name) for name in FIGURES},
        # The first figures count in what is done once.
        **{name: round(median(found[len(found) // 2 :]), 1) if found else None for name, found in rates.items()},
        "passes": watch.passes,
        "replayed": watch.replays,
        f"seconds_to_{ENOUGH}_replays": watch.seconds,
        "stopped": watch.stopped,
    }


def main() -> int:
    """Train; gives the exit code of `fp8repro train`, or 1 for a run that was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("run_dir", type=Path, help="the run's folder")
    parser.add_argument("--replays-within", type=float, metavar="SECONDS", help=f"for {ENOUGH} replayed steps")
    options, settings = parser.parse_known_args()
    watch = Watch(options.replays_within)

    class Counted(Replays):
        """Tells the watch of each pass."""

        def take(self, *batch: Any) -> Any:
            """See `Replays`."""
            found = super().take(*batch)
            watch.count(found is not None, self.why_not)
            return found

    run_module.Replays = Counted  # type: ignore[misc]

    def write() -> None:
        found = outcome(options.run_dir, watch)
        options.result.write_text(json.dumps(found, indent=1) + "\n")
        known = {name: value for name, value in found.items() if value is not None}
        print(watch.stopped or ", ".join(f"{name} {value}" for name, value in known.items()), flush=True)

    def give_up() -> None:
        write()
        os._exit(1)

    if watch.within is not None:
        threading.Thread(target=watch.wait, args=(give_up,), daemon=True).start()
    try:
        code = command_line(["train", *settings, f"run_dir={options.run_dir}"])
    finally:
        write()
    return 1 if watch.stopped else code


if __name__ == "__main__":
    sys.exit(main())
