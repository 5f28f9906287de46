"""Train in FOLDER/whole without interruption, and in FOLDER/killed with KILLS kills at random moments.

Prints counts as JSON.

    python killed_training.py KILLS SEED FOLDER TRAIN_FLAG…

Every training is a fork of this process, which has imported TensorFlow and done nothing with it. Its steps only add 1
to all variables, since files are what is tested. Half of the kills come from outside, at a random time; the other half
from inside, when the training touches a file for the k-th time. Meanwhile the model file is read whenever it changes:
it must be whole and never go back. A training must continue at most 3 steps, one save interval, before the
last step of the previous training.
"""
import collections
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np
import tensorflow as tf

import oasis.run
import train
from helpers import OneConvolution
from oasis.files import write_png
from oasis.modelfile import read_model
from oasis.run import Run

SAVE_INTERVAL = 3
shared = mmap.mmap(-1, 16)  # with the forks: the step that training has reached, and the step at which it started
counts = collections.Counter()
seen = {}  # {model file: its version that was read last}


def note(reached, start):
    shared[:] = struct.pack("qq", reached, start)


def noted():
    """(the step that training has reached, the step at which it started); -1 if it has not started yet."""
    return struct.unpack("qq", shared)


def patch_training():
    """Make train.py fast, and make it note where it is."""
    train.UNet, train.SAMPLE_EVERY, train.SECONDS_PER_CALL, train.SAVE_STEPS = OneConvolution, 2, 0.02, 1
    train.Trainer.validation_loss = lambda trainer, *_: 1.0
    train.Trainer.sample = lambda trainer, shape, cond=None: np.full(shape, int(trainer.step) % 256, np.uint8)
    oasis.run.plot_losses = lambda path, *_: write_png(path, np.zeros((2, 2), np.uint8))
    start = Run.start

    def train_steps(trainer, batches, count, bad_steps):
        for variable in trainer.variables:
            variable.assign_add(tf.cast(tf.fill(variable.shape, count), variable.dtype))
        note(int(trainer.step), noted()[1])
        return tf.ones(4), tf.ones(4), tf.constant(1.0), tf.constant(0), bad_steps

    def noted_start(run, trainer):
        start(run, trainer)
        note(int(trainer.step), int(trainer.step))
    train.Trainer.train_steps, Run.start = train_steps, noted_start


def kill_at_touch(folder, number):
    """Kill this process when it touches a file in the folder for the number-th time; never if number is None."""
    touches = 0

    def touch(event, details):
        nonlocal touches
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(details[0]):
            touches += 1
            if touches == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(touch)


def fork_training(folder, flags, touch):
    """The process id of a new training, killed at that touch of a file. Its stderr goes to FOLDER/stderr."""
    note(-1, -1)
    pid = os.fork()
    if pid:
        return pid
    try:
        kill_at_touch(folder, touch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(train.main([*flags, "--ckpt-path", str(folder)]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def read_step(model, known):
    """The step of the model file, which must not be before `known`. The file is read only if it has changed."""
    stat = model.stat() if model.exists() else None
    version = stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if version == seen.get(model):
        return known
    seen[model] = version
    step = read_model(model)[1]["step"]
    assert step >= known, f"the model went back from step {known} to {step}"
    counts["reads"] += 1
    return step


def watch(pid, wait, model, known):
    """(exit status, the step of the model file) of a training at its end. It is killed `wait` seconds after its first
    steps; never if wait is None."""
    trained_since = None
    while True:
        time.sleep(0.0005)  # leave the training some of the processor
        reached, start = noted()
        if reached > start >= 0:
            trained_since = trained_since or time.monotonic()
        if wait is not None and trained_since and time.monotonic() - trained_since > wait:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, os.WNOHANG)
        known = read_step(model, known)
        if ended:
            return status, known


def check_progress(reached_before):
    """The step that has been reached by now. A training may have lost at most one save interval."""
    reached, start = noted()
    if start < 0:
        return reached_before
    assert start >= reached_before - SAVE_INTERVAL, f"was at step {reached_before}, but went on from {start}"
    counts["restarts that lost steps"] += reached_before > start
    return reached


def train_with_kills(kills, folder, flags):
    folder.mkdir()
    known = reached = 0
    for attempt in range(10 * kills + 10):
        dying = counts["kills"] < kills
        touch = random.randrange(1, 120) if dying and attempt % 2 else None
        wait = random.uniform(0.0, 0.4) if dying and not attempt % 2 else None
        pid = fork_training(folder, flags, touch)
        status, known = watch(pid, wait, folder / "oasis16" / "model.safetensors", known)
        reached = check_progress(reached)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            counts["kills"] += 1
            continue
        assert os.WEXITSTATUS(status) == 0, (folder / "stderr").read_text(encoding="utf-8")[-3000:]
        assert not dying, f"done after {counts['kills']} kills: train longer"
        (folder / "stderr").unlink()
        return
    raise AssertionError("never done")


kill_count, seed, parent = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
random.seed(seed)
patch_training()
train_with_kills(0, parent / "whole", sys.argv[4:])
train_with_kills(kill_count, parent / "killed", sys.argv[4:])
print(json.dumps(counts))
