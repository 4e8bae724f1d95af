"""The processes of test_training_distributed.py, started by torchrun: one run or several, one after the other."""

import atexit
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_tools import tiny_config, tiny_network

import fp8repro.training.loop as loop
from fp8repro.settings.schema import DataConfig, LossScalingConfig
from fp8repro.training.tasks import classification, translation


def without_dropout(*arguments):
    """Dropout draws other bits on every rank; without it, two processes must equal one."""
    model = tiny_network(*arguments)
    model[6].p = 0.0
    return model


def synchronized_config(run_dir):
    """FP32 with normalization over all processes; 1,438 images in batches that do not divide evenly."""
    return tiny_config(run_dir, batch_size=250, epochs=2, micro_steps=2, sync_batchnorm=True, eval_batch_size=100)


def fp8_config(run_dir):
    """Stochastic rounding everywhere, and a loss scale that makes the first steps overflow."""
    scaling = LossScalingConfig("dynamic", scale=2.0**22, window=4)
    config = tiny_config(run_dir, "fp8_stochastic", scaling, batch_size=120, epochs=1, checkpoint_every_steps=4)
    return replace(config, resume="auto")


def rolling_config(run_dir):
    """Rolled back when three steps in a row are skipped."""
    config = fp8_config(run_dir)
    return replace(config, trainer=replace(config.trainer, on_divergence="rollback", max_skipped_in_a_row=3))


# Images of a batch in evaluations of the run that is stopped.
STOPPED = 179


def stopped_config(run_dir):
    """180 validation images on one rank and 179 on the other: two batches and one."""
    return replace(tiny_config(run_dir, batch_size=480, epochs=1, eval_batch_size=STOPPED), resume="auto")


def graphed_config(run_dir, graphs):
    """Products by kernels; 14 images in batches of 4 and 5; the first steps overflow."""
    scaling = LossScalingConfig("dynamic", scale=2.0**22, factor=2.0**6, window=4)
    data = DataConfig("image_folder", str(Path(run_dir).with_name("images")), 8)
    config = tiny_config(run_dir, "fp8_stochastic", scaling, data, batch_size=6, epochs=2, max_steps=4)
    return replace(config, backend="triton", graphs=graphs)


def no_thread_of_the_group_is_left():
    """Such a thread aborts one process in some, while the interpreter ends under it."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if any("gloo" in name for name in names):
        sys.stderr.write(f"threads at exit: {names}\n")
        sys.stderr.flush()
        os._exit(3)


def main(run_dir, what):
    # Registered first, so that it runs last.
    atexit.register(no_thread_of_the_group_is_left)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    classification.make_resnet = without_dropout
    own_step, scales, hooks = loop.train_step, [], []

    def step(run, batches, stop):
        if what == "dying" and rank == 1 and attempt == 0 and run.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        if run.config.trainer.on_divergence == "rollback" and rank == 1:
            # What this rank's last layer gives is not finite in some steps, nor when they are repeated.
            if run.step == 8:
                hooks.append(run.model[10].register_forward_hook(lambda module, inputs, output: output * math.inf))
            if run.step == 11:
                hooks.pop().remove()
        result = own_step(run, batches, stop)
        scales.append((run.scaler.scale, result.applied))
        if run.step + 1 == run.last_step:
            state = {
                "model": run.model.state_dict(),
                "scales": scales,
                "updates": [graph._shared.update is not None for graph in run.replays._graphs.values()],
                "bits": run.context.stream("x", 0, "y", "error"),
            }
            torch.save(state, Path(run.config.run_dir) / f"rank{rank}.pt")
        return result

    own_measure = loop.measure

    def measure(task, model, recipe, world, split, poll):
        polls = 0

        def counted():
            nonlocal polls
            polls += 1
            # One rank gets the signal, after the last batch of its own.
            if what == "both" and task.eval_batch_size == STOPPED and codes == [] and (rank, polls) == (1, 2):
                os.kill(os.getpid(), signal.SIGUSR1)
            poll()

        return own_measure(task, model, recipe, world, split, counted)

    codes = []
    loop.train_step, loop.measure = step, measure
    if what == "graphed":
        from replaying import Small, stand_in_for_a_gpu, translation_config

        stand_in_for_a_gpu(setattr)
        translation.MODELS["transformer"] = Small
        text = Path(run_dir).with_name("text")
        for graphs in ("auto", "off"):
            scales.clear()
            loop.train(graphed_config(f"{run_dir}-{graphs}", graphs))
            scales.clear()
            sentences = translation_config(text, f"{run_dir}-sentences-{graphs}", batch_size=64, max_steps=5)
            loop.train(replace(sentences, graphs=graphs))
        return
    loop.train(fp8_config(run_dir))
    if what == "both":
        loop.train(synchronized_config(run_dir + "-synchronized"))
        loop.train(rolling_config(run_dir + "-rolling"))
        try:
            loop.train(stopped_config(run_dir + "-stopped"))
        except SystemExit as error:
            codes.append(error.code)
        codes.append(loop.train(stopped_config(run_dir + "-stopped"))["status"])
        (Path(run_dir + "-stopped") / f"codes{rank}").write_text(" ".join(map(str, codes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
