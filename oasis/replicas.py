"""A training on several devices: the division of a batch over them and into micro-batches."""
import contextlib

import tensorflow as tf

from oasis.files import OasisError, nearest_multiples


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

    batch: tensors with B rows, n divides B, or dicts of them; the first is a tensor. gradients_of(*rows) returns
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
