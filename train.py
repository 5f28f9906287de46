"""Train the diffusion model on brain slices, or on your own images.

    python train.py                        the settings of the student project, slow from 128 pixels on
    python train.py --recipe recommended   settings for short trainings, with patches from 128 pixels on
    python train.py --path FOLDER          images, or NIfTI or Analyze volumes
    python train.py --demo                 no data needed: 5 to 10 minutes on 2 cores

A run is a folder, such as checkpoint/oasis128/: predict.py needs model.safetensors; the same command continues from
state/; log.csv, loss.png and events/ hold the losses, samples/ images. The bar shows the mean loss since a save.
"""
import contextlib
import functools
import os
import sys
import time
import zlib
from pathlib import Path

from oasis.files import (ROOT, FailSafeStream, OasisError, check_image_size, command_line, first_line,
                         import_tensorflow, run_script)

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
import tensorflow as tf

import modules
from dataset import as_tuple, from_uint8, make_dataset, to_uint8
from modules import GaussianDiffusion, UNet
from oasis import recipes, sources
from oasis.adam import Adam, add_one
from oasis.cluster import make_process
from oasis.conditions import condition_names
from oasis.devices import PRECISIONS, devices, prepare_devices, resolve_precision, use_xla, without_grappler
from oasis.generate import noise_options
from oasis.modelfile import MAX_INTEGER, MAX_TIMESTEPS, find_model
from oasis.noise import normal_noise, split_seed, timesteps_at, uniform_noise
from oasis.parameters import exchange_values, named_variables, start_from_model
from oasis.preparation import Preparation, load_data
from oasis.progress import progress
from oasis.replicas import check_batch_size, in_micro_batches, on_every_replica, over_replicas
from oasis.run import DIVERGED, Follower, Run, run_folder
from oasis.settings import (LOCAL, NETWORK, PRIVATE, RESUMABLE, TRAINER, auto_or, flag, flag_name, integer, make_parser,
                            number, read_settings, user_path, values_with, values_without)
from oasis.signals import StopSignal
from oasis.weights import LOSS_WEIGHTS

# The settings: each constant is the default of its flag, see oasis/settings.py.
PATH: flag(str, RESUMABLE, PRIVATE, LOCAL) = "./dataset/keras_png_slices_data.zip"  # the OASIS slices, a folder or zip
                                                          # of images, an .npy, or NIfTI or Analyze volumes
NUMBER_OF_SAMPLES: flag(integer(0)) = 2000                # training images, spread evenly over all subjects; 0: all
FLIPS: flag(auto_or(number(0, 1))) = 0.0                  # share of the training images that are mirrored; auto: 0.5
                                                          # for OASIS slices (left to right of the head), else 0
IMAGE_SIZE: flag(integer(1, MAX_INTEGER), NETWORK) = 128  # pixels a side
CKPT_PATH: flag(user_path, RESUMABLE, PRIVATE, LOCAL) = "./checkpoint"  # the folder that holds the runs
EPOCHS: flag(integer(), RESUMABLE) = 30                   # passes over the training images, in the last phase
BATCH_SIZE: flag(integer(1, 2**16)) = 16                  # images per step, on all devices and workers together
MAX_STEPS: flag(integer(0), RESUMABLE) = 0                # last step of the last phase; 0: by --epochs
SAVE_EVERY: flag(integer(0), RESUMABLE) = 0               # steps from one save and validation to the next; 0: whole
                                                          # epochs, at least 100 steps
LEARNING_RATE: flag(number(above=True), TRAINER) = 1e-4   # learning rate of Adam
DECAY_AFTER: flag(integer(0), TRAINER) = 0                # steps until the learning rate falls as 1/√step; 0: never
LOSS: flag(modules.LOSSES, TRAINER) = "l2"                # l2: squared error, as in the paper; l1: absolute error
MAX_LOSS_WEIGHT: flag(number(1), TRAINER) = 20.0          # the squared x_start error has the weight min(1/(1-ᾱ), this)
LOSS_WEIGHT: flag(tuple(LOSS_WEIGHTS), TRAINER) = "fixed"  # learned: all noise levels count equally in the gradient
TIMESTEPS: flag(integer(2, MAX_TIMESTEPS)) = 1000         # T, the steps of the forward process
DIM: flag(integer(16, MAX_INTEGER), NETWORK) = 64         # channels at the finest level: 16 or more, a multiple of 8
PATCH_SIZE: flag(integer(1, 256), NETWORK) = 1            # pixels a side of a patch; 4 at 256 px is as fast as 1 at 64
PIXEL_WIDTH: flag(integer(0, MAX_INTEGER), NETWORK) = 0   # channels of a full-resolution level around the patches, for
                                                          # detail that patches lose: a multiple of 8; 0: no such level
CONDITION: flag(condition_names, NETWORK) = ""            # more inputs, with commas: slice, the index in the head;
                                                          # neighbour, the slice below; mirror, whether it is mirrored
CONDITION_DROPOUT: flag(number(0, 1)) = 0.1               # share of the images trained without index and neighbour
OBJECTIVE: flag(modules.OBJECTIVES) = "noise"             # the network predicts noise, the clean image x_start, or v
SCHEDULE: flag(tuple(modules.SCHEDULES)) = "linear"       # noise schedule; shifted adds more noise to larger images
TIMES: flag(modules.TIMES, TRAINER) = "uniform"           # timesteps; lognormal: ln σ ~ N(-1.2, 1.2²) to 64 px (EDM)
EMA_DECAY: flag(number(0, 0.999999), TRAINER) = 0.999     # decay of the EMA: min(this, (1 + step)/(10 + step))
ACCUMULATE: flag(integer(), RESUMABLE, TRAINER) = 1       # micro-batches per batch: less memory, the same gradient
PRECISION: flag(("auto", *PRECISIONS), RESUMABLE) = "auto"  # auto takes the fastest safe precision of this machine
DEVICES: flag(devices, RESUMABLE, PRIVATE, LOCAL) = "auto"  # auto takes all GPUs, else the CPU; or cpu, a number of
                                                          # GPUs, or a list: GPU:0,GPU:2 or CPU:0,CPU:1
WORKER_TIMEOUT: flag(number(above=True), RESUMABLE, PRIVATE, LOCAL) = 300.0  # seconds to wait for other workers:
                                                          # more than the chief takes to validate and save
INITIAL_MODEL: flag(user_path, RESUMABLE, PRIVATE, LOCAL) = ""  # start a new run from this model, of this size or
                                                          # smaller, named as in predict.py --model
SEED: flag(integer(-2**63), TRAINER) = 0                  # seed of parameters, order of images, timesteps and noise
RESTART: flag(bool, RESUMABLE, PRIVATE) = False           # start over; the existing run is kept under another name
DEMO: flag(bool, RESUMABLE) = False                       # train on bundled sample slices, with settings for a laptop
RECIPE: flag(tuple(recipes.RECIPES), RESUMABLE) = "original"  # defaults of the other flags, see oasis/recipes.py
FIRST_PHASE: flag(integer(), RESUMABLE, PRIVATE) = 1      # first phase to train; it starts from --initial-model

SETTINGS = {**read_settings(sys.modules[__name__]), **sources.SETTINGS}
GRADIENT_CLIP = 1.0        # global norm: a rare bad batch must not ruin the parameters
LOSS_SCALE = 2.0**10       # float16 only: keeps small gradients above its smallest number
MAX_BAD_STEPS = 50         # in a row, after which the training stops with an error
SAVE_STEPS = 100           # from one save to the next if --save-every is 0, rounded up to whole epochs
VALIDATION_SLICES = 128
VALIDATION_BATCH = 4       # images in a batch of validation_loss: few, so that whoever can train can validate
SAMPLES = 8                # images in samples/, made with SAMPLE_STEPS steps of dpm every SAMPLE_EVERY saves
SAMPLE_STEPS = 20
SAMPLE_EVERY = 5
SECONDS_PER_CALL = 2.0     # of a call of train_steps; the bar and Ctrl-C are handled between calls


def parse_flags(arguments=None, phase=-1):
    """The settings of a phase: given flags, else the demo's defaults, else the recipe's, else the constants above."""
    flags = recipes.parse(make_parser(__doc__, SETTINGS), arguments, phase)
    for name in ("dim", "pixel_width"):
        if getattr(flags, name) % 8:
            raise OasisError(f"{flag_name(name)} {getattr(flags, name)} is not a multiple of 8, the number of "
                             "groups in GroupNorm")
    return flags


def parse_phases(arguments=None):
    """The settings of each phase of the recipe. A phase starts from the model of the phase before it."""
    last = parse_flags(arguments)
    phases = [*(parse_flags(arguments, i) for i in range(len(recipes.RECIPES[last.recipe]) - 1)), last]
    phases = phases[last.first_phase - 1:]
    for i, (before, after) in enumerate(zip(phases, phases[1:]), last.first_phase):
        before.ckpt_path = str(Path(last.ckpt_path) / f"{last.recipe}-phase{i}")
        after.initial_model = str(run_folder(before) / "model.safetensors")
    return phases


# -------------------------------------------------------------------------------------------------------------- step

class Trainer:
    """The network, its EMA, the optimizer and the training step.

    network: a UNet. diffusion: a GaussianDiffusion. loss_scale: multiplies the loss while gradients are computed.
    prepare: a Preparation. The other arguments are the settings at the top of this file. If the network and the Trainer
    were created in the scope of a tf.distribute.Strategy, training runs on all replicas of the strategy.
    """

    def __init__(self, network, diffusion, *, seed=SEED, learning_rate=LEARNING_RATE, decay_after=DECAY_AFTER,
                 ema_decay=EMA_DECAY, loss=LOSS, max_loss_weight=MAX_LOSS_WEIGHT, loss_weight=LOSS_WEIGHT, times=TIMES,
                 accumulate=ACCUMULATE, loss_scale=1.0, prepare=None):
        self.network, self.diffusion = network, diffusion
        self.parameters = [variable for _, variable in named_variables(network)]
        self.ema_parameters = [tf.Variable(parameter) for parameter in self.parameters]
        self.optimizer = Adam(self.parameters, learning_rate, decay_after)
        self.step = tf.Variable(0, dtype=tf.int64)
        self.t_distribution = diffusion.timestep_distribution(times)
        self.loss_weights = LOSS_WEIGHTS[loss_weight](self.t_distribution)
        self.variables = [*self.parameters, *self.ema_parameters, *self.optimizer.means, *self.optimizer.squares,
                          self.optimizer.steps, self.step, *self.loss_weights.variables]
        self.seed, self.ema_decay, self.accumulate, self.loss_scale = seed, ema_decay, accumulate, loss_scale
        self.prepare = prepare or (lambda images, *cond, **_: (images, *cond))
        self.training_loss = functools.partial(diffusion.training_loss, network, loss=loss, max_weight=max_loss_weight)
        self.loss_fn = tf.function(self.training_loss, autograph=False)
        # Keras 3 does not track layers in Python lists, so network= lacks parameters; optimizer= saves all of them.
        self.checkpoint = tf.train.Checkpoint(network=self.network, ema=self.ema_parameters, optimizer=self.optimizer,
                                              step=self.step, loss_weights=self.loss_weights)
        if tf.distribute.has_strategy():  # XLA compiles the part without communication: the gradients
            self.gradients = tf.function(self.gradients, jit_compile=use_xla(), autograph=False)
            self.update = on_every_replica(tf.distribute.get_strategy(), self.update)
        elif use_xla():
            self.update = tf.function(self.update, jit_compile=True, autograph=False)

    @tf.autograph.experimental.do_not_convert
    def update(self, batch):
        """Train one step: algorithm 1 of DDPM.

        batch: an element of make_dataset, which is images, float32 (B, S, S, C), or a tuple of the images and further
        arguments of self.prepare. t and noise are a function of (seed, step) alone. Returns (losses (B,), t (B,), the
        gradient's norm). A step whose gradient is not finite changes no parameter.
        """
        seeds = split_seed(tf.stack([tf.constant(self.seed, tf.int64), self.step]), 2)
        images, *cond = self.prepare(*as_tuple(batch), seed=seeds[1])
        t = timesteps_at(uniform_noise(images.shape[:1], seeds[0]), self.t_distribution)
        noise = normal_noise(images.shape, seeds[1])
        losses, gradients = over_replicas(self.gradients, self.loss_weights(t), images, t, noise, *cond)
        norm = tf.linalg.global_norm(gradients) / self.loss_scale

        def apply():
            self.loss_weights.update(losses, t)
            self.optimizer.apply(gradients, GRADIENT_CLIP / tf.maximum(norm, GRADIENT_CLIP) / self.loss_scale)
            step = tf.cast(self.step, tf.float32)
            rate = 1 - tf.minimum(self.ema_decay, (1 + step) / (10 + step))
            for ema, parameter in zip(self.ema_parameters, self.parameters):  # ema += rate · (parameter - ema)
                tf.raw_ops.ResourceApplyGradientDescent(var=ema.handle, alpha=rate, delta=ema - parameter)
            return tf.constant(True)

        tf.cond(tf.math.is_finite(norm), apply, lambda: tf.constant(False))
        add_one(self.step)
        return losses, t, norm

    def gradients(self, *batch):
        """The losses (B,), and the gradients of their weighted mean, times loss_scale.

        batch: the weights (B,), the images, t, noise and perhaps cond. Without cond, its embeddings get zeros.
        """
        def gradients_of(weights, images, t, noise, cond=None):
            with tf.GradientTape() as tape:
                losses = self.training_loss(images, t, noise, cond=cond)
                scaled = tf.reduce_mean(weights * losses) * (self.loss_scale / self.accumulate)
            return losses, tape.gradient(scaled, self.parameters, unconnected_gradients="zero")

        if self.accumulate == 1:
            return gradients_of(*batch)
        return in_micro_batches(gradients_of, self.accumulate, self.parameters, *batch)

    @tf.function
    def train_steps(self, batches, count, bad_steps):
        """Run `count` training steps in one call of the graph, on batches from an iterator.

        Returns (the summed losses in each quarter of t (4,), the images in each quarter (4,), the summed gradient norm,
        the skipped steps, bad_steps). bad_steps: how many steps in a row have been skipped.
        """
        loss_sums, counts, norm_sum, skipped = tf.zeros([4]), tf.zeros([4]), 0.0, 0
        for _ in tf.range(count):
            losses, t, norm = self.update(next(batches))
            if tf.math.is_finite(norm):
                quarter = tf.one_hot(t * 4 // self.diffusion.timesteps, 4)
                loss_sums += tf.linalg.matvec(quarter, losses, transpose_a=True)
                counts += tf.reduce_sum(quarter, axis=0)
                norm_sum += norm
                bad_steps = 0
            else:
                skipped += 1
                bad_steps += 1
        return loss_sums, counts, norm_sum, skipped, bad_steps

    @contextlib.contextmanager
    def using_ema(self):
        """A context in which the network's parameters have the values of the EMA."""
        exchanged = []
        try:
            for pair in zip(self.parameters, self.ema_parameters):  # one pair at a time takes no memory
                exchange_values(*pair)
                exchanged.append(pair)
            yield
        finally:
            for pair in exchanged:
                exchange_values(*pair)

    def validation_loss(self, data):
        """The training loss with the EMA of the parameters, averaged over data: validation images, as in Data.

        The timesteps and the noise are always the same. The timesteps have the distribution of those in training.
        """
        count = len(as_tuple(data)[0])
        t = timesteps_at(((np.arange(count) + 0.5) / count).astype(np.float32), self.t_distribution).numpy()
        t = np.random.default_rng(0).permutation(t)  # otherwise the first subjects would get only low noise levels
        losses = []
        with self.using_ema():
            for start in range(0, count, VALIDATION_BATCH):
                rows = np.minimum(np.arange(start, start + VALIDATION_BATCH), count - 1)  # repeats the last image
                images, *cond = (part[rows] for part in as_tuple(data))
                images, *cond = self.prepare(from_uint8(images), *cond, seed=[1, start], training=False)
                noise = normal_noise(images.shape, [0, start])
                losses.append(self.loss_fn(images, t[rows], noise, cond=cond[0] if cond else None)[:count - start])
        return float(np.mean(np.concatenate(losses)))

    def sample(self, shape, cond=None):
        """Images of the EMA, uint8 `shape` (B, S, S, C), with the seeds 0 … B-1 and, if given, a condition."""
        with self.using_ema():
            steps = min(SAMPLE_STEPS, self.diffusion.timesteps)
            images = self.diffusion.sample(self.network, shape, range(shape[0]), "dpm", steps, cond=cond,
                                           **noise_options("dpm"))
        return to_uint8(images)


# -------------------------------------------------------------------------------------------------------------- loop

def loop(trainer, data, validation, run, process, stop, *, batch_size, last, save_every):
    """Train up to step `last`; validate, save and log there and every `save_every` steps. A signal ends the loop.

    data, validation: as in Data. Raises OasisError after MAX_BAD_STEPS skipped steps in a row.
    """
    step, count, bad_steps, bar = int(trainer.step.numpy()), 1, 0, None
    batches = iter(make_dataset(data, batch_size, trainer.seed, step))
    print("compiling the training step …")
    with contextlib.ExitStack() as stack:
        while step < last:
            count = process.agree(stop, min(count, last - step, save_every - step % save_every))
            if stop.number is not None:
                break
            began = time.perf_counter()
            with process.collective("train on"):
                results = trainer.train_steps(batches, tf.constant(count), tf.constant(bad_steps))
            *sums, bad_steps = [value.numpy() for value in results]
            seconds = time.perf_counter() - began
            step += count
            run.stats.add(*sums, count, *((count * batch_size, seconds) if bar is not None else (0, 0.0)))
            if bad_steps >= MAX_BAD_STEPS:
                raise OasisError(f"{run.folder.absolute()}: the loss or its gradient was not finite in {bad_steps} "
                                 f"steps in a row. {DIVERGED}")
            if bar is None:  # not earlier: the first call compiles, and its time is not that of a step
                bar = stack.enter_context(progress(total=last, initial=step, unit="step", smoothing=0.1,
                                                   postfix=str(run.stats), disable=not process.chief))
            else:
                bar.set_postfix_str(str(run.stats), refresh=False)
                bar.update(count)
            count = max(1, round(count * SECONDS_PER_CALL / seconds))
            if step % save_every == 0 or step == last:
                bar.set_description("validating and saving", refresh=sys.stderr.isatty())
                images, epoch = step * batch_size, round(step * batch_size / len(as_tuple(data)[0]), 2)
                row = dict(run.stats.take_row(), step=step, epoch=epoch, images=images, validation_loss=(
                    trainer.validation_loss(validation) if process.chief and validation is not None else float("nan")))
                run.save(trainer, row, last=step == last)
                run.log()
                if step // save_every % SAMPLE_EVERY == 0 or step == last:
                    run.write_samples(trainer, SAMPLES)
                bar.set_description(refresh=False)


# -------------------------------------------------------------------------------------------------------------- main

def make_trainer(flags, precision, mirror_axis):
    """Create the network and its Trainer with the settings in flags. mirror_axis: see oasis.preparation.Preparation."""
    network = UNet(**values_with(NETWORK, SETTINGS, flags), precision=precision, seed=flags.seed)
    diffusion = GaussianDiffusion(flags.timesteps, flags.objective, flags.schedule, flags.image_size)
    return Trainer(network, diffusion, **values_with(TRAINER, SETTINGS, flags),
                   loss_scale=LOSS_SCALE if precision == "float16" else 1.0,
                   prepare=Preparation(flags.condition, flags.condition_dropout, diffusion, flags.flips, mirror_axis))


def make_run(flags, chief=True, checksum=None, **more):
    """The Run of the flags, or, in a process that is not the chief, a Follower, which writes no files.

    checksum: of the training images, see Run. more: {name: value} that the model file gets beside the settings.
    """
    folder = run_folder(flags)
    settings, metadata = values_without(RESUMABLE, SETTINGS, flags), values_without(PRIVATE, SETTINGS, flags)
    return Run(folder, settings, {**metadata, **more}, flags.restart, checksum) if chief else Follower(folder)


def train(phases):
    """Train these results of parse_phases(). Returns the exit status: 0, or 128 + the number of a signal."""
    last = phases[-1]
    names = prepare_devices(last.devices)
    precision = resolve_precision(last.precision)
    with contextlib.ExitStack() as stack:
        settings = {flag_name(name): value for name, value in values_without(LOCAL, SETTINGS, last).items()}
        process = stack.enter_context(make_process(names, last.worker_timeout, settings, precision))
        stack.enter_context(without_grappler(process.strategy))
        if not process.chief:
            print(f"worker {process.index} of {process.count}: the chief, {process.addresses[0]}, writes the run")
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        for flags in phases:
            check_image_size(flags.image_size, flags.patch_size, len(modules.DIM_MULTS))
            check_batch_size(flags.batch_size, flags.accumulate, process.replicas)
        if process.chief and last.restart and phases[0].initial_model:  # before its run gets another name
            phases[0].initial_model = str(find_model(phases[0].initial_model, last.ckpt_path)[1])
        for flags in phases[1:] if process.chief else []:  # before the first phase trains for hours
            with make_run(flags) as run:
                kept = run.rename_existing() if last.restart else run.check_settings()
                if kept and phases[0].initial_model == os.path.abspath(run.folder / "model.safetensors"):
                    phases[0].initial_model = str(kept / "model.safetensors")
        for i, flags in enumerate(phases, last.first_phase):
            if len(recipes.RECIPES[last.recipe]) > 1:
                print(f"phase {i} of {len(recipes.RECIPES[last.recipe])}")
            try:
                if status := train_phase(flags, last.ckpt_path, precision, process):
                    return status
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                advice = recipes.advice_for_memory(flags, process.replicas)
                raise OasisError(f"out of memory at {flags.image_size} px with batch {flags.batch_size}: try {advice} "
                                 f"({first_line(error)[:120]})") from error
    return 0


def train_phase(flags, models, precision, process):
    """Train one phase of a recipe; return the exit status. models: the folder of the runs for --initial-model."""
    data = load_data(flags, VALIDATION_SLICES)
    arrays = as_tuple(data.training)
    count, checksum = len(arrays[0]), [zlib.crc32(array) for array in arrays]
    process.check_facts(images=f"{count} with checksum {checksum}")
    with make_run(flags, process.chief, checksum, **data.metadata) as run, StopSignal() as stop:
        if run.is_new:
            recipes.advise(flags)
        print("building the network …")
        with process.scope():
            trainer = make_trainer(flags, precision, data.mirror_axis)
        if flags.initial_model and run.is_new:  # before run.start() renames an existing run, which may hold the model
            _, file = find_model(flags.initial_model, models)
            run.initial_images = start_from_model(trainer.network, file, trainer.diffusion, trainer.ema_parameters)
        elif flags.initial_model:
            print(f"the run exists: its state is used, not the model {flags.initial_model}")
        run.start(trainer)
        process.broadcast(trainer.variables)
        start = int(trainer.step.numpy())
        steps_per_epoch = max(count // flags.batch_size, 1)
        last = flags.max_steps or max(flags.epochs * count // flags.batch_size, 1)
        print(f"{data.metadata['data']}, {flags.image_size}×{flags.image_size}, {trainer.network.count_params():,} "
              f"parameters, {precision} on {process.description()}, steps {start:,} to {max(start, last):,}, "
              f"{steps_per_epoch:,} an epoch\nrun: {run.folder.absolute()}")
        if start < last:
            loop(trainer, data.training, data.validation, run, process, stop, batch_size=flags.batch_size,
                 last=last, save_every=flags.save_every or steps_per_epoch * -(-SAVE_STEPS // steps_per_epoch))
        if (reached := int(trainer.step.numpy())) < last:
            if reached:
                run.save(trainer, last=True)
            if process.chief:
                print(f"saved at step {reached:,} in {run.folder.absolute()}: the same command, without --restart, "
                      "continues from there" if reached else "stopped before the first step", file=sys.stderr)
            return 128 + stop.number
        if start < last:
            print(f"done: {run.folder.absolute() / 'model.safetensors'}\n"
                  f"now: {command_line('python', ROOT / 'predict.py', '--model', run.folder)}")
        else:
            print(f"nothing left to do: step {last:,} is the last (--max-steps, --epochs), the run is at {start:,}")
        process.agree(stop, 0)  # a signal during the last save ends all workers, if another phase is to follow
        return 128 + stop.number if stop.number is not None else 0


def main(arguments=None):
    phases = parse_phases(arguments)
    if phases[-1].demo and phases[-1].max_steps == recipes.DEMO["max_steps"]:
        print("demo: 5 to 10 minutes on 2 cores without a GPU")
    with contextlib.redirect_stdout(FailSafeStream(sys.stdout)), contextlib.redirect_stderr(FailSafeStream(sys.stderr)):
        return train(phases)


if __name__ == "__main__":
    run_script(main)
