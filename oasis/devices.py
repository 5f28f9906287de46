"""The devices of this process: their selection, their precision, and the division of a batch over them."""
import argparse
import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from oasis.files import OasisError, nearest_multiples

PRECISIONS = ("float32", "bfloat16", "float16")


def use_xla():
    """Return whether to compile whole steps with XLA: only on a GPU. On the CPUs measured, XLA halves the speed."""
    return bool(tf.config.get_visible_devices("GPU"))


@contextlib.contextmanager
def without_grappler(strategy=None):
    """A context that switches off Grappler, TensorFlow's graph optimizer, if the training runs on a single CPU.

    Grappler takes 5 of the 13 seconds of the first training step. The later steps are as fast without Grappler, because
    oasis/fused.py leaves nothing to fuse. strategy: a tf.distribute.Strategy or None. With a strategy, Grappler stays
    on, because the all-reduce fails without it.
    """
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": strategy is None and not use_xla()})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def resolve_precision(precision):
    """The precision of convolutions and matrix products: `precision` itself, or the fastest here if it is "auto".

    With "auto", a GPU uses bfloat16 from compute capability 8 on (Ampere), and float16 with 7.x (Volta, Turing),
    because it has fast units for these types. A CPU uses bfloat16 if its instruction set has it. All others use
    float32.
    """
    if precision != "auto":
        return precision
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details
        capability = min(details(gpu).get("compute_capability", (0, 0)) for gpu in gpus)
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(file.read().split()) else "float32"
    except OSError:
        return "float32"


# ----------------------------------------------------------------------------------------------------------- selection

def devices(text):
    """Check the value of --devices and return it: "auto" and "cpu" in lower case, a list of devices in upper case.

    It is "auto", "cpu", a number of GPUs, or a list such as "GPU:0,GPU:2". Raises argparse.ArgumentTypeError for
    another text.
    """
    listed = re.fullmatch(r"(GPU|CPU):\d+(,\1:\d+)*", text.upper())
    if text.lower() in ("auto", "cpu") or re.fullmatch(r"[1-9]\d*", text):
        return text.lower()
    if not listed or len(set(text.upper().split(","))) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, a number of GPUs, or a list such as GPU:0,GPU:2")
    return text.upper()


def prepare_devices(choice="auto"):
    """Make only the chosen devices visible to TensorFlow and return their names, such as ["GPU:0", "GPU:1"].

    choice: see devices(). Call prepare_devices before anything else uses a device. GPU memory is allocated as it is
    needed. Raises OasisError for GPUs that do not exist.
    """
    gpus = tf.config.list_physical_devices("GPU")
    kind, numbers = "GPU", list(range(len(gpus)))
    if choice == "cpu":
        kind, numbers = "CPU", [0]
    elif choice.isdigit():
        numbers = list(range(int(choice)))
    elif choice != "auto":
        kind, numbers = choice[:3], [int(number) for number in re.findall(r"\d+", choice)]
    if kind == "CPU" and sorted(numbers) != list(range(len(numbers))):
        raise OasisError(f"--devices {choice}: CPU devices are logical devices. Number them from CPU:0 "
                         "without gaps, such as CPU:0,CPU:1.")
    if kind == "GPU" and not set(numbers) <= set(range(len(gpus))):
        advice = "Choose among these, numbered from 0, or --devices cpu." if gpus else "Give --devices cpu."
        raise OasisError(f"--devices {choice}: TensorFlow sees {len(gpus)} GPU{'s' if len(gpus) != 1 else ''} here. "
                         f"{advice}")
    chosen = [gpus[number] for number in numbers] if kind == "GPU" else []
    if chosen != gpus:
        tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    if kind == "CPU" and len(numbers) > 1:
        cpu, = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * len(numbers))
    return [f"{kind}:{i}" for i in range(len(numbers))] or ["CPU:0"]


# ------------------------------------------------------------------------------------------------------------ sampling

def load_on_devices(load, names):
    """Return ({device name: network}, diffusion, settings), where load() returns (network, diffusion, settings).

    All networks have the parameters of the first: a running training may replace the model file between two calls.
    """
    loaded = {}
    for name in names:
        with tf.device(name if len(names) > 1 else None):
            loaded[name] = load()
    first, diffusion, settings = loaded[names[0]]
    networks = {name: network for name, (network, _, _) in loaded.items()}
    for name in names[1:]:
        for variable, value in zip(networks[name].variables, first.variables):
            variable.assign(value)
    return networks, diffusion, settings


def gather_rows(cond, rows):
    """Return the rows with these indices, int (N,), of a condition: a tensor (B, …) or a dict of tensors; or None."""
    return None if cond is None else tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), cond)


def sample_on_devices(diffusion, networks, shape, seeds, *arguments, frames=0, cond=None, **options):
    """The result of diffusion.sample. Each device generates a part of the images, in a thread of its own.

    networks: {device name: denoise_fn}. Image k depends on its seed and its row of cond alone, so the devices exchange
    nothing. The number of images need not be a multiple of the number of devices.
    """
    if len(networks) == 1:
        return diffusion.sample(*networks.values(), shape, seeds, *arguments, frames=frames, cond=cond, **options)
    part = -(-len(seeds) // len(networks))
    rows = np.minimum(np.arange(part * len(networks)), len(seeds) - 1)  # copies of the last row fill the last part

    def on_device(mine, name, denoise_fn):
        with tf.device(name):
            result = diffusion.sample(denoise_fn, (part, *shape[1:]), [seeds[row] for row in mine], *arguments,
                                      frames=frames, cond=gather_rows(cond, mine), **options)
        return result if frames else (result, None)

    with ThreadPoolExecutor(len(networks)) as pool:
        images, trajectories = zip(*pool.map(on_device, np.split(rows, len(networks)), networks, networks.values()))
    images = np.concatenate(images)[:len(seeds)]
    return (images, np.concatenate(trajectories, axis=1)[:, :len(seeds)]) if frames else images


# ------------------------------------------------------------------------------------------------------------ training

class Process:
    """A training in this process alone, on one device or mirrored on several.

    names: the devices. `strategy` is a tf.distribute.Strategy, or None for one device. train.py reaches the other
    processes through the methods. Here there are none; oasis.workers.Workers is the counterpart for several processes.
    """
    count, index, chief = 1, 0, True

    def __init__(self, names):
        self.names = names
        self.strategy = tf.distribute.MirroredStrategy(names) if len(names) > 1 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def replicas(self):
        """The number of devices, in all processes, that each compute a part of every batch."""
        return self.count * len(self.names)

    def scope(self):
        """A context in which variables are created on every device."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def description(self):
        """The name of the devices for a message to the user, such as "the GPU" or "the 2 CPUs"."""
        if len(self.names) > 1:
            return f"the {len(self.names)} {self.names[0][:3]}s"
        name = self.names[0].removesuffix(":0")
        no_gpu = name == "CPU" and not tf.config.list_physical_devices("GPU")
        return f"the {name} (TensorFlow sees no GPU)" if no_gpu else f"the {name}"

    def check_facts(self, **facts):
        """Compare facts with the other processes. Here there are none."""

    def agree(self, stop, count):
        """The smallest count of all processes: here that of this one. See Workers.agree."""
        return count

    def broadcast(self, variables):
        """Copy the chief's values to the other processes. Here there are none; see Workers.broadcast."""

    def collective(self, doing):
        """A context for calls that wait for other workers. Here there are none; see Workers.collective."""
        return contextlib.nullcontext()


def check_batch_size(batch_size, accumulate, replicas):
    """Raise OasisError unless the batch divides into equal parts for all devices, and those into micro-batches."""
    unit = replicas * accumulate
    if batch_size % unit:
        nearest = " or ".join(map(str, nearest_multiples(batch_size, unit)))
        raise OasisError(f"--batch-size {batch_size} is divided among {replicas} devices × --accumulate {accumulate} "
                         f"micro-batches: it must be a multiple of {unit}: take {nearest}")


def over_replicas(gradients_of, *batch):
    """Return (losses (B,), gradients) of a batch, computed by all n replicas together.

    batch: tensors with B rows, a multiple of n, or dicts of them; the first is a tensor. gradients_of(*rows) returns
    the losses of these rows and the gradients of a mean over them. Every replica calls over_replicas with the whole
    batch and computes B / n rows of its own; the gradients are averaged. The result is the same on all replicas, and
    equals that of one device up to the order of summation.
    """
    replica = tf.distribute.get_replica_context()
    count = replica.num_replicas_in_sync
    if count == 1:
        return gradients_of(*batch)
    index, rows = replica.replica_id_in_sync_group, batch[0].shape[0] // count
    mine = tf.nest.map_structure(lambda x: tf.reshape(x, [count, rows, *x.shape[1:]])[index], batch)
    losses, gradients = gradients_of(*mine)
    own = tf.range(count)[:, None] == index
    all_losses = tf.reshape(tf.where(own, losses * count, 0.0), [count * rows])  # for an all-gather by a mean
    *gradients, losses = replica.all_reduce(tf.distribute.ReduceOp.MEAN, [*gradients, all_losses])
    return losses, gradients


def on_every_replica(strategy, step):
    """A function of a whole batch that runs step(batch) on every replica and returns the result of one of them.

    step must return the same on all replicas and be marked do_not_convert. Call the function inside a tf.function.
    """
    @tf.autograph.experimental.do_not_convert
    def run(batch):
        results = strategy.run(step, args=(batch,))
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], results)
    return run


def in_micro_batches(gradients_of, parts, variables, *batch):
    """Compute the losses (B,) and the gradients of a batch in equal micro-batches, to save memory. Return both.

    parts: the number of micro-batches, computed one after another. gradients_of(*micro_batch) returns the losses of a
    micro-batch and the gradients, with respect to the variables, of their mean divided by `parts`. The gradients of all
    micro-batches are added up.
    """
    if not tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer"):
        # Without _noinline, Grappler's memory optimizer turns sums of three gradients into temporary variables. Some of
        # these are never freed, and the next call finds them in use. Without Grappler, _noinline is wrong: with oneDNN
        # such a function returns float32 gradients in another order.
        gradients_of = tf.function(gradients_of, autograph=False, experimental_attributes={"_noinline": True})
    cut = tf.nest.map_structure(lambda x: tf.reshape(x, [parts, x.shape[0] // parts, *x.shape[1:]]), batch)

    def add_part(i, losses, *sums):
        part_losses, gradients = gradients_of(*tf.nest.map_structure(lambda x: x[i], cut))
        return i + 1, losses.write(i, part_losses), *(a + b for a, b in zip(sums, gradients))

    start = (0, tf.TensorArray(tf.float32, parts), *map(tf.zeros_like, variables))
    _, losses, *gradients = tf.while_loop(lambda i, *_: i < parts, add_part, start, parallel_iterations=1)
    return losses.concat(), gradients
