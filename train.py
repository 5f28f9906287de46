"""Train the diffusion model on brain slices.

    python train.py                        the original's settings, as far as your memory goes
    python train.py --recipe recommended   what measured best for the image size
    python train.py --demo                 no data needed: a few minutes on a laptop

A run lives in a folder, such as checkpoint/oasis128/: model.safetensors is what predict.py needs, state/ what the next
`python train.py` continues from, bit for bit, log.csv and loss.png the losses, samples/ pictures, events/ TensorBoard.
"""
import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import common

common.quiet_tensorflow()  # before anything imports it

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from tqdm import tqdm

import distribute
import modules
from common import (OasisError, flags_from_constants, image_grid, integer, make_folder, nearest_multiples, number, replacing,
                    run_script, write_png)
from dataset import load_slices, make_dataset, to_uint8
from modules import GaussianDiffusion, UNet, named_variables, read_model, save_model

PATH = "./dataset/keras_png_slices_data.zip"  # the OASIS slices: the zip, or the folder unpacked from it
NUMBER_OF_SAMPLES = 2000      # training slices, spread evenly over all subjects; 0 takes all
FLIPS = 0.0                   # share of the slices that are shown mirrored, left for right: 0.5 makes the most of few subjects
IMAGE_SIZE = 128              # pixels a side
CKPT_PATH = "./checkpoint"    # the folder that holds the runs, each in a folder of its own
EPOCHS = 30                   # passes over the training slices
BATCH_SIZE = 16               # slices a step, on all devices and machines together
MAX_STEPS = 0                 # steps to train for, instead of EPOCHS; 0 goes by EPOCHS
SAVE_EVERY = 0                # steps between two saves, each with a validation; 0 does it after every epoch
LEARNING_RATE = 1e-4          # of Adam
DECAY_AFTER = 0               # steps after which the learning rate falls with the root of the step; 0 keeps it
LOSS = "l2"                   # l2 as in the paper, or l1
MAX_LOSS_WEIGHT = 20.0        # of x_start's error, which is weighted by 1/(1-ᾱ) up to this: more of it sharpens the last grey levels
TIMESTEPS = 1000              # T, the steps of the forward process
DIM = 64                      # channels of the finest level; cost and memory grow with its square and itself
PATCH_SIZE = 1                # pixels a side folded into channels: 4 at 256 px costs what 1 does at 64 px
PIXEL_WIDTH = 0               # channels of a level of single pixels around the patches, for what they are too coarse for; a multiple of 8, 0 for none
OBJECTIVE = "noise"           # what the network predicts
SCHEDULE = "linear"           # of the noise; shifted adds more of it at larger sizes
TIMES = "uniform"             # how often each t is trained; lognormal keeps to those where the picture is decided
EMA_DECAY = 0.999             # of the averaged weights, which are the ones that generate
ACCUMULATE = 1                # micro-batches that a batch is cut into, for less memory and the same gradient
PRECISION = "auto"            # of the arithmetic; auto takes the fastest that is safe on this machine
DEVICES = "auto"              # auto takes all GPUs, else the CPU; or cpu, a number of GPUs, a list: GPU:0,GPU:2 or CPU:0,CPU:1
WORKER_TIMEOUT = 300.0        # seconds to wait for the other machines of TF_CONFIG or SLURM, at the start and at every moment
INITIAL_MODEL = ""            # a model file to start from, of this size or a smaller one, instead of random weights
SEED = 0                      # of the initial weights, the order of slices, times and noise
RESTART = False               # start over; the run that is there is kept under another name
DEMO = False                  # train on the bundled sample slices, with settings for a laptop
RECIPE = "original"           # defaults of the other flags: the original's, or what measured best

FLAG_TYPES = {
    "NUMBER_OF_SAMPLES": integer(0), "MAX_STEPS": integer(0), "SAVE_EVERY": integer(0), "SEED": integer(-2**63),
    "TIMESTEPS": integer(2, modules.MAX_TIMESTEPS), "IMAGE_SIZE": integer(1, modules.MAX_IMAGE_SIZE), "DIM": integer(16, 4096),
    "BATCH_SIZE": integer(1, 2**16), "PATCH_SIZE": integer(1, 256), "PIXEL_WIDTH": integer(0, 4096), "LOSS": ("l2", "l1"),
    "MAX_LOSS_WEIGHT": number(1), "EMA_DECAY": number(0, 0.999999), "DECAY_AFTER": integer(0), "OBJECTIVE": modules.OBJECTIVES,
    "SCHEDULE": modules.SCHEDULES, "TIMES": modules.TIMES, "FLIPS": number(0, 1), "PRECISION": ("auto", *modules.PRECISIONS),
    "RECIPE": ("original", "recommended"), "DEVICES": distribute.devices,
}
HERE = Path(__file__).resolve().parent
DEMO_SETTINGS = dict(path=str(HERE / "dataset" / "sample_slices.zip"), image_size=64, dim=32, patch_size=2, batch_size=16,
                     number_of_samples=0, max_steps=900, save_every=100, learning_rate=5e-4, recipe="recommended")

# A run is continued only with the settings that it was started with; how far it goes and where it computes may change.
FREE_SETTINGS = {"path", "ckpt_path", "epochs", "max_steps", "save_every", "accumulate", "precision", "restart", "demo", "recipe",
                 "devices", "worker_timeout", "initial_model"}
GRADIENT_CLIP = 1.0        # global norm; a rare bad batch must not throw the weights
LOSS_SCALE = 2.0**10       # float16 only: lifts small gradients over its smallest number
MAX_BAD_STEPS = 50         # in a row, before the run is given up
MAX_FAILED_SAVES = 3       # in a row, likewise: a disk may be full for an hour of a night
STATES = 2                 # kept: where the newest is damaged, the one before it is used
VALIDATION_SLICES = 128
SAMPLES = 8                # pictures in samples/, made with SAMPLE_STEPS steps of dpm every SAMPLE_EVERY saves
SAMPLE_STEPS = 20
SAMPLE_EVERY = 5
SECONDS_PER_CALL = 2.0     # of compiled steps between two looks at the clock, the progress bar and Ctrl-C
COLUMNS = ["step", "epoch", "images", "loss", "loss_t1", "loss_t2", "loss_t3", "loss_t4", "validation_loss",
           "gradient_norm", "skipped", "images_per_second", "seconds"]


def recommended(image_size):
    """The settings that measured best for an image size: x_start, most of it where the picture is decided, patches that leave the
    network a 64×64 grid, and mirror images, without which the network learns its few subjects by heart."""
    return dict(patch_size=max(image_size // 64, 1), objective="x_start", times="lognormal", flips=0.5)


def parse_flags(arguments=None):
    """The settings: flags over the demo's settings over the recipe's over the constants above."""
    parser = flags_from_constants(__file__, globals(), FLAG_TYPES)
    first = parser.parse_args(arguments)
    if first.demo:
        parser.set_defaults(**DEMO_SETTINGS)
        first = parser.parse_args(arguments)
    if first.recipe == "recommended":
        parser.set_defaults(**{name: value for name, value in recommended(first.image_size).items()
                               if not (first.demo and name in DEMO_SETTINGS)})
    flags = parser.parse_args(arguments)
    if flags.batch_size % flags.accumulate:
        raise OasisError(f"--batch-size {flags.batch_size} cannot be cut into --accumulate {flags.accumulate} equal parts")
    if flags.pixel_width % 8:
        raise OasisError(f"--pixel-width {flags.pixel_width} is not a multiple of 8, the groups that its norms work on")
    return flags


def add_one(counter):
    """counter += 1, an int64 variable, on this replica alone: assign_add would ask the others."""
    tf.raw_ops.AssignAddVariableOp(resource=counter.handle, value=tf.constant(1, tf.int64))


class Adam(tf.Module):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980), one kernel of TensorFlow's a weight: Keras' takes twenty operations.

    With a few hundred weights those twenty are half of the graph, and a third of the time until the first step.
    """
    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7

    def __init__(self, weights, learning_rate, decay_after=0):
        """decay_after: s > 0 divides the learning rate of step k > s by √(k/s) (Karras 2024, arXiv 2312.02696)."""
        super().__init__()
        self.weights, self.learning_rate, self.decay_after = weights, learning_rate, decay_after
        self.means = [tf.Variable(tf.zeros(weight.shape)) for weight in weights]
        self.squares = [tf.Variable(tf.zeros(weight.shape)) for weight in weights]
        self.steps = tf.Variable(0, dtype=tf.int64)

    def apply(self, gradients, factor):
        """One step of the weights against gradients × factor, a scalar."""
        add_one(self.steps)
        steps = tf.cast(self.steps, tf.float32)
        decay = tf.math.rsqrt(tf.maximum(steps / self.decay_after, 1.0)) if self.decay_after else 1.0
        same = dict(lr=self.learning_rate * decay, beta1=tf.constant(self.BETA1), beta2=tf.constant(self.BETA2),
                    epsilon=tf.constant(self.EPSILON), beta1_power=self.BETA1**steps, beta2_power=self.BETA2**steps)
        for weight, mean, square, gradient in zip(self.weights, self.means, self.squares, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle, m=mean.handle, v=square.handle, grad=gradient * factor, **same)


class Trainer:
    """The network, its EMA, the optimizer and the step: everything that training changes, and the step that does.

    Made in the scope of a tf.distribute.Strategy it trains on all of its replicas.
    """

    def __init__(self, flags, precision):
        self.flags = flags
        shape = dict(image_size=flags.image_size, dim=flags.dim, patch_size=flags.patch_size, pixel_width=flags.pixel_width,
                     precision=precision, seed=flags.seed)
        self.network, self.ema = UNet(**shape), UNet(**shape)
        self.weights = [variable for _, variable in named_variables(self.network)]
        self.ema_weights = [variable for _, variable in named_variables(self.ema)]
        self.optimizer = Adam(self.weights, flags.learning_rate, flags.decay_after)
        self.step = tf.Variable(0, dtype=tf.int64)
        self.variables = [*self.weights, *self.ema_weights, *self.optimizer.means, *self.optimizer.squares, self.optimizer.steps, self.step]
        self.diffusion = GaussianDiffusion(flags.timesteps, flags.objective, flags.schedule, flags.image_size)
        self.times_up_to = np.cumsum(self.diffusion.training_times(flags.times))[:-1]  # the share of times 0 … t, without the last
        self.loss_scale = LOSS_SCALE if precision == "float16" else 1.0
        # The averages by themselves: Keras 3 hides the layers in a model's lists from tf.train.Checkpoint, so `ema=self.ema` would
        # lose half of them. Those of the network are in the optimizer's list.
        self.checkpoint = tf.train.Checkpoint(network=self.network, ema=self.ema_weights, optimizer=self.optimizer, step=self.step)
        if tf.distribute.has_strategy():  # replicas meet between gradients and update: XLA compiles what they do alone
            self.accumulated_gradients = tf.function(self.accumulated_gradients, jit_compile=modules.xla_pays(), autograph=False)
            self.update = distribute.on_every_replica(tf.distribute.get_strategy(), self.update)
        elif modules.xla_pays():
            self.update = tf.function(self.update, jit_compile=True, autograph=False)

    @tf.autograph.experimental.do_not_convert
    def update(self, images):
        """One training step on float32 (B, S, S, 1). Its randomness is a function of (seed, step) alone.

        Returns (losses (B,), times (B,), the gradient's norm). A step whose gradient is not finite changes no weights.
        """
        seeds = tf.random.experimental.stateless_split(tf.stack([tf.constant(self.flags.seed, tf.int64), self.step]), 2)
        share = modules.uniform_noise(images.shape[:1], seeds[0])
        t = tf.searchsorted(tf.constant(self.times_up_to, tf.float32), share, side="right")
        noise = modules.normal_noise(images.shape, seeds[1])
        losses, gradients = distribute.over_replicas(self.accumulated_gradients, images, t, noise)
        norm = tf.linalg.global_norm(gradients) / self.loss_scale

        def apply():
            self.optimizer.apply(gradients, GRADIENT_CLIP / tf.maximum(norm, GRADIENT_CLIP) / self.loss_scale)
            step = tf.cast(self.step, tf.float32)
            decay = tf.minimum(self.flags.ema_decay, (1 + step) / (10 + step))
            for average, weight in zip(self.ema_weights, self.weights):  # average += (1 - decay) · (weight - average)
                tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=1 - decay, delta=average - weight)
            return tf.constant(True)

        tf.cond(tf.math.is_finite(norm), apply, lambda: tf.constant(False))
        add_one(self.step)
        return losses, t, norm

    def accumulated_gradients(self, images, t, noise):
        """The losses (B,) and the gradients of their mean, times loss_scale, in `accumulate` micro-batches one after another."""
        parts = self.flags.accumulate

        def part_gradients(images, t, noise):
            with tf.GradientTape() as tape:
                losses = self.diffusion.training_loss(self.network, images, t, noise, self.flags.loss, self.flags.max_loss_weight)
                scaled = tf.reduce_mean(losses) * (self.loss_scale / parts)
            return losses, tape.gradient(scaled, self.weights)

        if parts == 1:
            return part_gradients(images, t, noise)
        # Inlined into the loop, sums of three gradients become temporary variables, by Grappler's memory optimizer, that are not all
        # freed: the next call of `run` would find them in use.
        part_gradients = tf.function(part_gradients, autograph=False, experimental_attributes={"_noinline": True})
        cut = [tf.reshape(x, [parts, x.shape[0] // parts, *x.shape[1:]]) for x in (images, t, noise)]

        def add_part(i, losses, *sums):
            part_losses, gradients = part_gradients(*(x[i] for x in cut))
            return i + 1, losses.write(i, part_losses), *(a + b for a, b in zip(sums, gradients))

        _, losses, *gradients = tf.while_loop(
            lambda i, *_: i < parts, add_part,
            (0, tf.TensorArray(tf.float32, parts), *map(tf.zeros_like, self.weights)), parallel_iterations=1)
        return losses.concat(), gradients

    @tf.function
    def run(self, batches, count, bad_steps):
        """`count` training steps without Python in between, on batches from an iterator.

        Returns sums over the steps: the loss by quarter of t (4,), the images in each quarter (4,), the gradient norm,
        the steps skipped; and the number of skipped steps that the last ones make in a row, `bad_steps` before this call.
        """
        sums = tf.zeros([4]), tf.zeros([4]), 0.0, 0
        loss_sums, counts, norm_sum, skipped = sums
        for _ in tf.range(count):
            losses, t, norm = self.update(next(batches))
            if tf.math.is_finite(norm):
                quarter = tf.one_hot(t * 4 // self.flags.timesteps, 4)
                loss_sums += tf.linalg.matvec(quarter, losses, transpose_a=True)
                counts += tf.reduce_sum(quarter, axis=0)
                norm_sum += norm
                bad_steps = 0
            else:
                skipped += 1
                bad_steps += 1
        return loss_sums, counts, norm_sum, skipped, bad_steps

    @tf.function(autograph=False)
    def losses_of_ema(self, images, t, noise):
        return self.diffusion.training_loss(self.ema, images, t, noise, self.flags.loss, self.flags.max_loss_weight)

    def validation_loss(self, slices):
        """The EMA's mean loss on uint8 (N, S, S, 1): times evenly spread over 0 … T-1 and noise are always the same."""
        batch = min(self.flags.batch_size, len(slices))
        t = (np.arange(len(slices)) * self.flags.timesteps // len(slices)).astype(np.int32)
        losses = []
        for start in range(0, len(slices) - batch + 1, batch):
            rows = slice(start, start + batch)
            images = tf.cast(slices[rows], tf.float32) / 127.5 - 1.0
            noise = modules.normal_noise(images.shape, [0, start])
            losses.append(self.losses_of_ema(images, t[rows], noise))
        return float(np.mean(losses))

    def sample(self, count):
        """`count` pictures from the EMA, uint8 (count, S, S, 1), from the seeds 0 … count-1."""
        shape = (count, self.flags.image_size, self.flags.image_size, 1)
        noise = modules.best_noise("dpm", self.flags.image_size)
        return to_uint8(self.diffusion.sample(self.ema, shape, range(count), "dpm", SAMPLE_STEPS, **noise))


class Totals:
    """What is summed up between two rows of log.csv."""

    def __init__(self):
        self.loss_sums, self.counts = np.zeros(4), np.zeros(4)
        self.norm_sum = self.skipped = self.steps = self.images = self.seconds = 0.0

    def add(self, loss_sums, counts, norm_sum, skipped, steps, images, seconds):
        self.loss_sums += loss_sums
        self.counts += counts
        self.norm_sum += float(norm_sum)
        self.skipped += int(skipped)
        self.steps += steps
        self.images += images
        self.seconds += seconds

    @property
    def loss(self):
        return self.loss_sums.sum() / max(self.counts.sum(), 1)

    @property
    def images_per_second(self):
        return self.images / self.seconds

    def row(self):
        quarters = np.where(self.counts > 0, self.loss_sums, np.nan) / np.maximum(self.counts, 1)  # nan: no t of it was drawn
        return dict(loss=round(self.loss, 6), **{f"loss_t{i + 1}": round(q, 6) for i, q in enumerate(quarters)},
                    gradient_norm=round(self.norm_sum / max(self.steps - self.skipped, 1), 4), skipped=int(self.skipped),
                    images_per_second=round(self.images_per_second, 2), seconds=round(self.seconds, 1))


class FolderTaken(OasisError):
    """Another training is at work in the run's folder: nothing may be written there."""


class Run:
    """A run's folder: its lock, settings, states, log and pictures.

    What training needs to go on is in a state, every tensor of which has a checksum: the weights, the settings that they
    belong to and the rows of the log. All other files are written again from it. So what is lost or damaged there, or
    taken from another run, is noticed, and a run never starts over without being told to.
    """

    def __init__(self, flags):
        self.folder = Path(flags.ckpt_path) / f"{'demo' if flags.demo else 'oasis'}{flags.image_size}"
        self.settings = vars(flags)
        self.rows = []
        self.failed_saves = 0
        self.warned = set()
        self.events = None

    def __enter__(self):
        """Take the folder: nobody else may train in it. With --restart the run that is there is renamed first."""
        self.lock = self.take_lock()
        if self.settings["restart"] and {path.name for path in self.folder.iterdir()} - {"lock"}:
            k = next(k for k in range(1, 10**6) if not self.folder.with_name(f"{self.folder.name}.old-{k}").exists())
            kept = self.folder.rename(self.folder.with_name(f"{self.folder.name}.old-{k}"))
            print(f"the run that was there is kept: {kept.absolute()}")
            self.lock.close()
            self.lock = self.take_lock()
        return self

    def __exit__(self, *_):
        self.lock.close()

    def take_lock(self):
        try:
            lock = open(make_folder(self.folder) / "lock", "w", encoding="utf-8")
        except OSError as error:
            raise OasisError(f"cannot write {self.folder.absolute()}/lock: {error.strerror}. Choose another --ckpt-path.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise FolderTaken(f"{self.folder.absolute()}: another training is at work in this folder. "
                              "Wait for it, or choose another --ckpt-path.") from None
        except OSError as error:  # some network drives have no locks
            self.warn("lock", f"{self.folder.absolute()} cannot be locked ({error.strerror}): train in it once at a time")
        return lock

    def hold_lock(self):
        """Make the folder again, and lock it, where it was removed while training."""
        try:
            if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.folder / "lock")):
                return
        except OSError:
            pass
        lock = self.take_lock()
        self.lock.close()
        self.lock, self.events = lock, None
        self.write_settings()
        tqdm.write(f"warning: {self.folder.absolute()} was removed while training: made again", sys.stderr)

    def warn(self, kind, message):
        """Print a line on stderr, one for each kind of trouble: it would come again at every save."""
        if kind not in self.warned:
            tqdm.write(f"warning: {message}", sys.stderr)
        self.warned.add(kind)

    def write_settings(self):
        with replacing(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")

    def start(self, trainer):
        """Restore the newest state that is whole, if there is one; returns the step where training goes on."""
        folder = make_folder(self.folder / "state")
        states = find_states(folder)
        left = [name for name in ("model.safetensors", "log.csv", "samples") if (self.folder / name).exists()]
        if states:
            record = self.restore(trainer, states)
            self.rows = self.read_log(int(trainer.step.numpy())) if record is None else record["rows"]
        elif left:
            raise OasisError(f"{self.folder.absolute()}: holds {left[0]} but no state to continue from. "
                             "Give --restart to start over (this run is kept), or another --ckpt-path.")
        self.write_settings()
        states = states[-STATES:]  # a kill may have left one that was to be deleted
        sweep(self.folder, states)
        write_list(folder, states)
        self.record = tf.Variable("")
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(root=trainer.checkpoint, record=self.record), str(folder), STATES)
        if states:
            self.mend_model(trainer)
        return int(trainer.step.numpy())

    def changed_settings(self, old):
        """{name: old value} of the settings that a run cannot change and that are others now."""
        return {name: old[name] for name in self.settings if name in old and name not in FREE_SETTINGS and old[name] != self.settings[name]}

    def old_settings(self):
        """What settings.json says, or None."""
        try:
            old = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return old if isinstance(old, dict) else None

    def restore(self, trainer, states):
        """Restore the newest of the states that is whole and was made with these settings; returns its record, see write_state.

        Moves what was restored to the end of the list. Raises OasisError where there is no such state.
        """
        changed = None
        for path in reversed(states):
            try:
                record = read_record(path)
                old = self.old_settings() if record is None else record["settings"]
                if old is None:
                    raise OasisError("of unknown settings: settings.json cannot be read")
                changed = changed or self.changed_settings(old)
                if self.changed_settings(old):
                    raise OasisError("made with other settings")
                checkpoint = trainer.checkpoint if record is not None else old_checkpoint(trainer, path)
                checkpoint.restore(path).assert_existing_objects_matched().expect_partial()
                check_weights(trainer)
            except Exception as error:  # a class of its own for each kind of damage: OpError, IndexError, AssertionError …
                if not self.changed_settings(self.old_settings() or {}):
                    print(f"{Path(path).absolute()} is not used, trying the state before it ({first_line(error)[:200]})")
                continue
            states.remove(path)
            states.append(path)
            return record
        if changed:
            flag = {name: "--" + name.replace("_", "-") for name in changed}
            was = ", ".join(f"{flag[name]} {changed[name]}, not {self.settings[name]}" for name in changed)
            raise OasisError(f"{self.folder.absolute()} was started with {was}. Give "
                             f"{' '.join(f'{flag[name]} {changed[name]}' for name in changed)} to continue it, "
                             "--restart to start over (it is kept), or another --ckpt-path.")
        raise OasisError(f"{self.folder.absolute()}/state: no state there can be read. "
                         "Give --restart to start over (this run is kept), or another --ckpt-path.")

    def mend_model(self, trainer):
        """Write the model again where a kill, damage or a mix-up left one that is older than the state, or another's."""
        file = self.folder / "model.safetensors"
        try:
            settings = read_model(file)[1]
            if not self.changed_settings(settings) and settings.get("step", 0) >= int(trainer.step.numpy()):
                if settings["step"] > int(trainer.step.numpy()):
                    print(f"{file.absolute()} is of step {settings['step']:,}, but the newest state is of step {int(trainer.step.numpy()):,}")
                return
        except OasisError as error:
            print(f"written again from the state: {error}")
        self.write_model(trainer)

    def save(self, trainer, row=None, last=False):
        """The state first, then the model that predict.py reads. row: of the log, if one is complete.

        What cannot be written is warned of and tried again with the next save: the disk may be full for an hour of the
        night. Raises OasisError for the third failure in a row, where this save is the `last`, and where the folder was
        removed and now is another training's.
        """
        if row is not None:
            self.rows.append(row)
        check_weights(trainer)
        errors = []
        for write in (self.hold_lock, lambda: self.write_state(trainer), lambda: self.write_model(trainer)):
            try:
                write()
            except FolderTaken:
                raise
            except (OasisError, OSError, tf.errors.OpError) as error:
                errors.append(first_line(error))
        self.failed_saves = self.failed_saves + 1 if errors else 0
        if errors and (last or self.failed_saves == MAX_FAILED_SAVES):
            raise OasisError(f"step {int(trainer.step.numpy()):,} could not be saved: {errors[0]} What was saved before is whole: "
                             "the same command goes on from there.")
        if errors:
            tqdm.write(f"warning: not saved, training goes on and tries again with the next save: {errors[0]}", sys.stderr)

    def write_state(self, trainer):
        """Write the state: weights, EMA, optimizer, step, and a record of the settings and of the rows of the log."""
        settings = {name: value for name, value in self.settings.items() if name not in FREE_SETTINGS}
        self.record.assign(json.dumps({"settings": settings, "rows": self.rows}))
        try:
            self.manager.save(checkpoint_number=int(trainer.step.numpy()))
        except (tf.errors.OpError, OSError) as error:
            sweep(self.folder, self.manager.checkpoints)
            raise OasisError(f"cannot write {self.folder.absolute()}/state: {first_line(error).split('; ')[-1]}. Free some space.") from error

    def write_model(self, trainer):
        step = int(trainer.step.numpy())
        private = {"path", "ckpt_path", "initial_model", "restart", "devices", "worker_timeout"}  # where things lie is nobody's business
        settings = {name: value for name, value in self.settings.items() if name not in private}
        settings.update(trainer.network.settings, **trainer.diffusion.settings, step=step, images=step * self.settings["batch_size"])
        save_model(self.folder / "model.safetensors", trainer.ema, settings)

    def read_log(self, step):
        """The rows of log.csv up to `step`, for a state without a record; what was logged after it happens again."""
        try:
            with open(self.folder / "log.csv", newline="", encoding="utf-8") as file:
                return [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        except (OSError, KeyError, ValueError, TypeError):
            return []

    def log(self):
        """Write log.csv, loss.png and the TensorBoard events of the last row."""
        self.attempt("log.csv", self.write_log)
        self.attempt("loss.png", self.plot_losses)
        self.attempt("events", self.write_events)

    def attempt(self, name, write):
        """Call write() for a file that training can do without: where it fails, for whatever reason, warn and go on."""
        try:
            write()
        except Exception as error:  # a plot is not worth a night of training
            self.warn(name, f"{self.folder.absolute()}/{name}: not written, training goes on without it ({first_line(error)})")

    def write_log(self):
        with replacing(self.folder / "log.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def event_writer(self, step):
        self.events = self.events or tf.summary.create_file_writer(str(self.folder / "events"))
        return self.events.as_default(step=step)

    def write_events(self):
        row = self.rows[-1]
        with self.event_writer(row["step"]):
            for name in COLUMNS[3:-1]:
                tf.summary.scalar(name, float(row[name]))
        self.events.flush()

    def plot_losses(self):
        figure = Figure(figsize=(8, 4.5), layout="constrained")  # pyplot would keep it where writing fails
        axes = figure.subplots()
        steps = [int(row["step"]) for row in self.rows]
        labels = {"loss": "training", "validation_loss": "validation (EMA weights)"}
        labels.update({f"loss_t{i}": f"training, quarter {i} of t" for i in (1, 2, 3, 4)})
        for name, label in labels.items():
            axes.plot(steps, [float(row[name]) for row in self.rows], label=label, lw=1 if "_t" in name else 2,
                      alpha=0.5 if "_t" in name else 1)
        axes.set(xlabel="step", ylabel=f"loss ({self.settings['loss']}, {self.settings['objective']})", yscale="log")
        axes.legend()
        with replacing(self.folder / "loss.png") as temporary:
            figure.savefig(temporary, dpi=120)

    def picture(self, trainer):
        """Write a few pictures of the EMA as samples/step_NNNNNNN.png and to TensorBoard."""
        self.attempt("samples", lambda: self.write_picture(int(trainer.step.numpy()), trainer.sample(SAMPLES)))

    def write_picture(self, step, images):
        grid = image_grid(images, columns=4)
        write_png(self.folder / "samples" / f"step_{step:07d}.png", grid)
        with self.event_writer(step):
            tf.summary.image("samples", grid[None, :, :, None])


class Follower(Run):
    """What a worker that is not the chief has for a Run: the chief writes, and shares the state that it restored.

    MultiWorkerMirroredStrategy wants all workers to take part in saving: this one does so in a folder that is then removed.
    """

    def __init__(self, flags):
        super().__init__(flags)
        self.scratch = tempfile.mkdtemp(prefix="oasis-worker-")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self, trainer):
        self.manager = tf.train.CheckpointManager(trainer.checkpoint, self.scratch, max_to_keep=1)

    def save(self, trainer, row=None, last=False):
        self.manager.save(checkpoint_number=int(trainer.step.numpy()))


def find_states(folder):
    """The prefixes of the states in a folder, by step, rising: of every file there, even where its other half is missing."""
    names = {re.match(r"ckpt-([0-9]+)\.(?:index|data-)", path.name) for path in folder.iterdir()} - {None}
    return [str(folder / f"ckpt-{step}") for step in sorted({int(name[1]) for name in names})]


def write_list(folder, states):
    """Write the list that CheckpointManager reads, without asking the one there, which can be damaged: it deletes from the front."""
    lines = [f"model_checkpoint_path: {json.dumps(Path(states[-1]).name)}"] if states else []
    for i, path in enumerate(states):
        lines += [f"all_model_checkpoint_paths: {json.dumps(Path(path).name)}", f"all_model_checkpoint_timestamps: {i + 1}"]
    if not lines:
        (folder / "checkpoint").unlink(missing_ok=True)
        return
    with replacing(folder / "checkpoint") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def read_record(path):
    """The record of a state (see Run.write_state), or None for one that was written before there were any."""
    reader = tf.train.load_checkpoint(path)
    name = "record/.ATTRIBUTES/VARIABLE_VALUE"
    return json.loads(reader.get_tensor(name)) if reader.has_tensor(name) else None


def old_checkpoint(trainer, path):
    """What restores a state that was written before there were records; raises OasisError where it lacks averages, see Trainer."""
    names = [name for name, _ in tf.train.list_variables(path) if name.startswith("ema/")]
    if len(names) != len(trainer.ema_weights):
        raise OasisError(f"it holds {len(names)} of {len(trainer.ema_weights)} averaged weights, as older versions wrote it on Keras 3")
    return tf.train.Checkpoint(network=trainer.network, ema=trainer.ema, optimizer=trainer.optimizer, step=trainer.step)


def check_weights(trainer):
    """Raise OasisError where a weight is not a finite number: a state of such weights may not take a good one's place."""
    if not all(np.isfinite(weight.numpy()).all() for weight in (*trainer.weights, *trainer.ema_weights)):
        raise OasisError(f"the weights hold NaN or infinite values at step {int(trainer.step.numpy()):,}, so they are not saved. What "
                         "was saved before is whole: try a lower --learning-rate or --precision float32.")


def sweep(folder, states):
    """Remove what a killed or failed training left half written in a run's folder. states: the prefixes to keep."""
    patterns = [".settings.*.json", ".model.*.safetensors", ".log.*.csv", ".loss.*.png", "samples/.step_*.*.png", "state/.checkpoint.*",
                "state/checkpoint.tmp*", "state/ckpt-*"]
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.parent.name == "state" and str(path).split(".index")[0].split(".data-")[0] in states:
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def first_line(error):
    """What an exception says, without the names of TensorFlow's nodes."""
    return re.sub(r"{{.*?}} ?|\[Op:\w+\]", "", str(error).strip() or type(error).__name__).splitlines()[0].strip()[:1000]


class StopSignal:
    """Inside `with`, SIGINT and SIGTERM are only noted, so that training stops between two calls, not inside one."""

    def __enter__(self):
        self.number = None
        self.before = {caught: signal.signal(caught, self.note) for caught in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for caught, handler in self.before.items():
            signal.signal(caught, handler)

    def note(self, number, _):
        if self.number is None:
            print("\nstopping: saving first …", file=sys.stderr, flush=True)
        self.number = number


def load_data(flags):
    """(training slices, validation slices or None), uint8 (N, S, S, 1)."""
    images = load_slices(flags.path, "train", flags.image_size, flags.number_of_samples or None)
    if len(images) < flags.number_of_samples:
        print(f"{flags.path} holds {len(images)} training slices, not {flags.number_of_samples}: training on all of them")
    try:
        validation = load_slices(flags.path, "validate", flags.image_size, VALIDATION_SLICES)
    except OasisError as error:
        print(f"no validation loss: {error}")
        validation = None
    return images, validation


def train(flags):
    """Train, and return the exit status: 0 when it is done, 128 + the signal's number when one stopped it."""
    modules.check_image_size(flags.image_size, flags.patch_size, levels=4)
    names = distribute.prepare_devices(flags.devices)
    precision = modules.best_precision() if flags.precision == "auto" else flags.precision
    facts = {"": distribute.settings_facts(vars(flags)), "code": distribute.code_digests(), "TensorFlow": tf.__version__,
             "precision": precision, "devices": len(names)}
    with distribute.Workers(names, flags.worker_timeout, facts) as workers:
        check_batch_size(flags, workers.replicas)
        if workers.chief:
            return train_together(flags, precision, workers)
        print(f"worker {workers.index} of {workers.count}: the chief, {workers.addresses[0]}, writes the run and says how it goes")
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            return train_together(flags, precision, workers)


def check_batch_size(flags, replicas):
    """Raise OasisError unless the batch divides into equal parts for all devices, and micro-batches in each."""
    unit = replicas * flags.accumulate
    if flags.batch_size % unit:
        nearest = nearest_multiples(flags.batch_size, unit)
        raise OasisError(f"--batch-size {flags.batch_size} is that of all {replicas} devices together, and has to be a multiple of "
                         f"them × --accumulate {flags.accumulate} = {unit}: take {' or '.join(map(str, nearest))}")


def train_together(flags, precision, workers):
    """train(), by this worker and all others at the same time: what waits for others comes in the same order on all."""
    images, validation = load_data(flags)
    if workers.count > 1:  # a checksum of all slices is for others to compare
        workers.check_facts(slices=f"{len(images)} with checksum {zlib.crc32(images)}")
    patch_size = recommended(flags.image_size)["patch_size"]
    if flags.recipe == "original" and patch_size > flags.patch_size:
        print(f"--recipe recommended folds {patch_size}×{patch_size} pixels into channels: about "
              f"1/{(patch_size // flags.patch_size)**2} of the time and memory of this run")
    with Run(flags) if workers.chief else Follower(flags) as run, StopSignal() as stop:
        with workers.scope():
            trainer = Trainer(flags, precision)
        start = run.start(trainer)
        if start == 0 and flags.initial_model:
            for network in (trainer.network, trainer.ema):
                modules.start_from_model(network, flags.initial_model, flags.objective)
        workers.share(trainer.variables)
        start = int(trainer.step.numpy())
        steps_per_epoch = max(len(images) // flags.batch_size, 1)
        last = flags.max_steps or flags.epochs * steps_per_epoch
        print(f"{len(images):,} slices of {flags.image_size}×{flags.image_size}, {trainer.network.count_params():,} weights, "
              f"{precision} on {workers.description()}, steps {start:,} to {last:,}, {steps_per_epoch:,} an epoch\nrun: {run.folder.absolute()}")
        if start >= last:
            print("nothing left to do: give more --epochs or --max-steps")
            return 0
        loop(flags, run, trainer, images, validation, last, flags.save_every or steps_per_epoch, stop, workers)
        if stop.number is None:
            print(f"done: {run.folder.absolute()}/model.safetensors\nnow: python predict.py --model {run.folder}")
            return 0
        run.save(trainer, last=True)
        if workers.chief:
            print(f"saved at step {int(trainer.step.numpy()):,} in {run.folder.absolute()}: the same command goes on from there", file=sys.stderr)
        return 128 + stop.number


def loop(flags, run, trainer, images, validation, last, save_every, stop, workers):
    """Train up to step `last`, or until a signal; save, validate and log every `save_every` steps."""
    step, count, bad_steps, totals = int(trainer.step.numpy()), 1, 0, Totals()
    batches = iter(make_dataset(images, flags.batch_size, flags.seed, step, flags.flips))
    with tqdm(total=last, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1, disable=not workers.chief) as bar:
        while step < last:
            count = workers.agree(stop, min(count, last - step, save_every - step % save_every))
            if stop.number is not None:
                break
            began = time.perf_counter()
            with workers.collective("train on"):
                *sums, bad_steps = [value.numpy() for value in trainer.run(batches, tf.constant(count), tf.constant(bad_steps))]
            seconds = time.perf_counter() - began
            step += count
            totals.add(*sums, count, count * flags.batch_size, seconds)
            if bad_steps >= MAX_BAD_STEPS:
                raise OasisError(f"the loss or its gradient was not finite in {bad_steps} steps in a row. The last good state "
                                 f"is in {run.folder.absolute()}: try a lower --learning-rate or --precision float32.")
            bar.set_postfix_str(f"loss {totals.loss:.4f}, {totals.images_per_second:.1f} images/s", refresh=False)
            bar.update(count)
            count = max(1, round(count * SECONDS_PER_CALL / seconds))
            if step % save_every == 0 or step == last:
                if not workers.chief:
                    run.save(trainer)
                    continue
                row = dict(totals.row(), step=step, epoch=round(step * flags.batch_size / len(images), 2), images=step * flags.batch_size)
                row["validation_loss"] = trainer.validation_loss(validation) if validation is not None else float("nan")
                run.save(trainer, row, last=step == last)
                run.log()
                if step // save_every % SAMPLE_EVERY == 0 or step == last:
                    run.picture(trainer)
                totals = Totals()


def main(arguments=None):
    flags = parse_flags(arguments)
    if flags.demo:
        print("demo: bundled sample slices, 64×64 pixels; about 5 minutes on 2 cores without a GPU")
    try:
        with contextlib.redirect_stdout(common.Unfailing(sys.stdout)), contextlib.redirect_stderr(common.Unfailing(sys.stderr)):
            return train(flags)
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        raise OasisError(f"out of memory at {flags.image_size} px with batch {flags.batch_size}: try --accumulate "
                         f"{2 * flags.accumulate}, a smaller --batch-size or --recipe recommended "
                         f"({first_line(error)[:120]})") from error


if __name__ == "__main__":
    run_script(main)
