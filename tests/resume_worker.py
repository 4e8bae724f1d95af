"""The run of test_resume.py; as a process of its own it gets a signal before a step or in an evaluation."""

import os
import signal
import sys
from dataclasses import replace

from training_tools import tiny_config, use_tiny_network

import fp8repro.training.loop as loop
from fp8repro.settings.schema import DataConfig, LossScalingConfig


def resumable_config(run_dir, images):
    """FP8 with stochastic rounding, a loss scale that makes the first steps overflow, augmentation, two workers."""
    config = tiny_config(
        run_dir,
        "fp8_stochastic",
        LossScalingConfig("dynamic", scale=2.0**22, window=4),
        DataConfig("image_folder", str(images), 16, workers=2, options={"augmentation": "small"}),
        epochs=4,
        batch_size=12,
        micro_steps=2,
        eval_batch_size=8,
        checkpoint_every_steps=4,
    )
    return replace(config, resume="auto")


def main(run_dir, images, name, at, place):
    """Place "step": the signal comes before the step `at`; "evaluation": amid the evaluation after so many steps."""
    use_tiny_network()
    own_step, own_measure = loop.train_step, loop.measure
    steps = 0

    def send():
        # As a terminal or a cluster does it: the workers that load data get the signal too.
        os.killpg(os.getpgrp(), getattr(signal, name))

    def step(run, batches, stop):
        nonlocal steps
        steps = run.step + 1
        if run.step == int(at) and place == "step":
            send()
        return own_step(run, batches, stop)

    def measure(task, model, recipe, world, split, poll):
        polls = 0

        def counted():
            nonlocal polls
            polls += 1
            if (steps, place, polls) == (int(at), "evaluation", 2):
                send()
            poll()

        return own_measure(task, model, recipe, world, split, counted)

    loop.train_step, loop.measure = step, measure
    loop.train(resumable_config(run_dir, images))


if __name__ == "__main__":
    main(*sys.argv[1:])
