"""Several devices and several machines: which there are, the strategy over them, and what the processes agree on.

One device: no strategy at all. Several GPUs: tf.distribute.MirroredStrategy. Several processes, each told of the others by
TF_CONFIG or by SLURM's srun: tf.distribute.MultiWorkerMirroredStrategy. Such a process is a worker; worker 0 is the chief,
which alone writes files.

TensorFlow adds up gradients. All else that workers say to one another goes as JSON over a connection that each keeps to the
chief: who is there, with which settings and code, when to stop, and why one has failed. It is made on the port that TensorFlow
is to use, before it does, so that no other port has to be open, a worker that is missing is named, and a dead one is noticed.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf

from common import OasisError

HERE = Path(__file__).resolve().parent
LONGEST_MESSAGE = 2**24  # bytes; what else connects to a port must not make us wait for a gigabyte
HELLO_SECONDS = 5        # for a connection to say that it is a worker
LOCAL_SETTINGS = {"path", "ckpt_path", "worker_timeout"}  # a worker may have its own
# How TensorFlow words it that the other end of a sum is missing, or has gone.
COLLECTIVE_ERRORS = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.InternalError,
                     tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError)


# ---------------------------------------------------------------------------------------------------------- devices

def devices(text):
    """An argparse type: auto, cpu, a number of GPUs, or a list such as GPU:0,GPU:2 or CPU:0,CPU:1."""
    listed = re.fullmatch(r"(GPU|CPU):\d+(,\1:\d+)*", text.upper())
    if text.lower() in ("auto", "cpu") or re.fullmatch(r"[1-9]\d*", text):
        return text.lower()
    if not listed or len(set(text.upper().split(","))) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, a number of GPUs, or a list such as GPU:0,GPU:2")
    return text.upper()


def prepare_devices(choice="auto"):
    """Show TensorFlow only the devices of that --devices; returns their names, such as ["GPU:0", "GPU:1"].

    Call it before anything else uses a device. GPU memory is taken as it is needed, not all at once. Raises OasisError for
    GPUs that are not there.
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
        raise OasisError(f"--devices {choice}: CPU devices are made to order and counted from CPU:0")
    if kind == "GPU" and not set(numbers) <= set(range(len(gpus))):
        raise OasisError(f"--devices {choice}: TensorFlow sees {len(gpus)} GPU{'s' if len(gpus) != 1 else ''} here")
    chosen = [gpus[number] for number in numbers] if kind == "GPU" else []
    if chosen != gpus:
        tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    if kind == "CPU" and len(numbers) > 1:
        cpu, = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * len(numbers))
    return [f"{kind}:{i}" for i in range(len(numbers))] or ["CPU:0"]


class Spread:
    """A GaussianDiffusion that samples on several devices at once: a loop on each, in a thread, for a part of the pictures.

    Picture k depends on its seed alone, so nothing needs to be said between devices. networks: one on each device.
    """

    def __init__(self, diffusion, networks, names):
        self.diffusion, self.networks, self.names = diffusion, networks, names
        self.settings, self.image_size, self.sampler_table = diffusion.settings, diffusion.image_size, diffusion.sampler_table

    def sample(self, _, shape, seeds, *arguments, frames=0, on_step=None, **options):
        """As GaussianDiffusion.sample; the batch need not divide by the number of devices."""
        part = -(-len(seeds) // len(self.names))
        padded = [*seeds, *seeds[-1:] * (part * len(self.names) - len(seeds))]

        def on_device(i):
            with tf.device(self.names[i]):
                result = self.diffusion.sample(self.networks[i], (part, *shape[1:]), padded[i * part:(i + 1) * part], *arguments,
                                               frames=frames, on_step=on_step, **options)
            return result if frames else (result, None)

        with ThreadPoolExecutor(len(self.names)) as pool:
            images, films = zip(*pool.map(on_device, range(len(self.names))))
        images = np.concatenate(images)[:len(seeds)]
        return (images, np.concatenate(films, axis=1)[:, :len(seeds)]) if frames else images


def load_on_devices(load, names):
    """load(), which returns (network, diffusion, settings), once on each of the devices; several make a Spread of it."""
    if len(names) == 1:
        return load()
    loaded = []
    for name in names:
        with tf.device(name):
            loaded.append(load())
    network, diffusion, settings = loaded[0]
    return network, Spread(diffusion, [other[0] for other in loaded], names), settings


# --------------------------------------------------------------------------------------------------------- replicas

def over_replicas(gradients_of, *batch):
    """gradients_of(*batch): the losses (B,) and the gradients of their mean. Each replica works on B / n rows of its own.

    Called in a replica, with the whole batch. It returns the same on all: whatever the number of replicas, what it would on
    one, but for the order of sums.
    """
    replica = tf.distribute.get_replica_context()
    count = replica.num_replicas_in_sync
    if count == 1:
        return gradients_of(*batch)
    index, rows = replica.replica_id_in_sync_group, batch[0].shape[0] // count
    losses, gradients = gradients_of(*(tf.reshape(x, [count, rows, *x.shape[1:]])[index] for x in batch))
    whole = tf.reshape(tf.where(tf.range(count)[:, None] == index, losses * count, 0.0), [count * rows])  # 0 in the rows of others
    *gradients, losses = replica.all_reduce(tf.distribute.ReduceOp.MEAN, [*gradients, whole])
    return losses, gradients


def on_every_replica(strategy, step):
    """A function of a whole batch that runs step(batch) on every replica, and returns what it returns on the first here.

    step must return the same on all, and be marked do_not_convert. For use inside a tf.function.
    """
    @tf.autograph.experimental.do_not_convert
    def run(batch):
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], strategy.run(step, args=(batch,)))
    return run


# ---------------------------------------------------------------------------------------------------------- cluster

def find_cluster(environment=os.environ):
    """(addresses "host:port" of all workers, the index of this one), or ([], 0) where there is only this process.

    TF_CONFIG tells, or else the variables of SLURM's srun with more than one task. Raises OasisError where they make no sense.
    """
    if environment.get("TF_CONFIG"):
        addresses, index = read_tf_config(environment["TF_CONFIG"])
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        addresses, index = read_slurm(environment)
    else:
        return [], 0
    return (addresses, index) if len(addresses) > 1 else ([], 0)


def read_tf_config(text):
    example = '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        if cluster and (set(cluster) - {"chief", "worker"} or task["type"] not in cluster):
            raise ValueError("there are only workers here, and a chief")
        index = len(chiefs) * (task.get("type") == "worker") + int(task.get("index", 0))
        addresses = [*chiefs, *workers]
        if addresses and (not 0 <= index < len(addresses) or not all(re.fullmatch(r".+:\d+", address) for address in addresses)):
            raise ValueError("its index or an address is out of order")
        if len(set(addresses)) < len(addresses):
            raise ValueError("it names an address twice")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OasisError(f"TF_CONFIG cannot be used ({type(error).__name__}: {error}). It should look like {example}") from error
    return addresses, index


def read_slurm(environment):
    """The same from SLURM's variables, through TensorFlow's SlurmClusterResolver."""
    # Two jobs on a node must not want one port; below 32768 the system hands out none by itself.
    first_port = 10000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000
    try:
        # It would count GPUs with nvidia-smi and divide them among tasks; SLURM has done that, and there may be none.
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=first_port, gpus_per_node=10**4, gpus_per_task=1, auto_set_gpu=False)
        addresses = resolver.cluster_spec().as_dict()["worker"]
        # The resolver sorts hosts as text, n10 before n2, and takes SLURM's rank for the place among them.
        index = addresses.index(f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}")
    except (RuntimeError, ValueError, KeyError) as error:
        raise OasisError(f"SLURM's variables do not describe this step ({type(error).__name__}: {error}). "
                         "Start it with srun, or set TF_CONFIG.") from error
    return addresses, index


# ---------------------------------------------------------------------------------------------------------- workers

class PeerError(OasisError):
    """What another worker reported, or that it is not there: the message names it."""


class Workers:
    """This process and the others that train with it, if there are any; use it in `with`.

    names: the devices of this process. timeout: seconds to wait for other workers. facts: {name: value, that JSON can hold},
    which must be the same on all workers, see check_facts.

    strategy is the tf.distribute.Strategy, None for one device; index is 0 on the chief.
    """

    def __init__(self, names, timeout, facts):
        self.names, self.timeout, self.facts = names, timeout, facts
        self.addresses, self.index = find_cluster()
        self.count = max(len(self.addresses), 1)
        self.replicas = self.count * len(names)
        self.strategy, self.peers = None, {}

    @property
    def chief(self):
        return self.index == 0

    def __enter__(self):
        if self.count > 1:
            if self.names[0] == "CPU:0" and len(self.names) > 1:
                raise OasisError("TF_CONFIG and several CPU devices: a worker has one. Take --devices cpu.")
            try:
                self.meet()
                self.check_facts()
                with self.patience("start TensorFlow's servers"):
                    self.strategy = start_servers(self.addresses, self.index)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        elif len(self.names) > 1:
            self.strategy = tf.distribute.MirroredStrategy(self.names)
        return self

    def __exit__(self, kind, error, _):
        """Leave together; or tell the others why this worker cannot go on, which they hear when they next listen."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.exchange("done")
                return
            where = "" if isinstance(error, PeerError) else f"worker {self.index} ({self.addresses[self.index]}): "
            reason = str(error) if isinstance(error, OasisError) else f"{kind.__name__}: {error}"
            for peer in self.peers.values():
                with contextlib.suppress(OSError):
                    send(peer, {"error": where + " ".join(reason.split())[:1000]})
            # TensorFlow's threads may wait for the others for ever when Python ends; the message is out by then.
            guard = threading.Timer(10, os._exit, [2])
            guard.daemon = True
            guard.start()
        finally:
            for peer in self.peers.values():
                peer.close()

    def description(self):
        """The devices, for a person to read."""
        here = self.names[0].rstrip(":0") if len(self.names) == 1 else f"{len(self.names)} {self.names[0][:3]}s"
        here = f"{here} (TensorFlow sees no GPU)" if here == "CPU" and not tf.config.list_physical_devices("GPU") else here
        return f"the {here}" if self.count == 1 else f"the {here} of {self.count} workers each"

    def scope(self):
        """Variables that are made inside are on every device."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def meet(self):
        """Connect to the chief, or be it and wait for all; raises OasisError after `timeout` seconds, or if a port is taken."""
        deadline = time.monotonic() + self.timeout
        with listen(self.addresses[self.index]) as server:  # held until all are there: nobody else gets the port
            if self.chief:
                self.wait_for_workers(server, deadline)
            else:
                self.peers[0] = connect(self.addresses[0], deadline, self.timeout)
                send(self.peers[0], {"worker": self.index})
            self.exchange("all are there")

    def wait_for_workers(self, server, deadline):
        while missing := set(range(1, self.count)) - set(self.peers):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
            except socket.timeout:
                absent = ", ".join(f"worker {i} ({self.addresses[i]})" for i in sorted(missing))
                raise PeerError(f"{absent} did not come within {self.timeout:g} seconds (--worker-timeout). Start the same command "
                                "there, and see that the port can be reached.") from None
            try:
                peer.settimeout(HELLO_SECONDS)
                index = receive(peer)["worker"]
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()  # something else that knocks at ports
                continue
            if index not in missing:
                peer.close()
                raise PeerError(f"two processes say that they are worker {index}: give each its own index in TF_CONFIG.")
            self.peers[index] = peer

    def exchange(self, value):
        """What every worker gave to this call, by index. Raises OasisError, on all, where one has failed or does not answer."""
        if self.count == 1:
            return [value]
        if not self.chief:
            self.say(0, {"value": value})
            return self.hear(0)
        values = [value, *(self.hear(i) for i in range(1, self.count))]
        for i in range(1, self.count):
            self.say(i, {"value": values})
        return values

    def say(self, index, message):
        with contextlib.suppress(OSError):  # what it had to say itself can still be heard
            send(self.peers[index], message)

    def hear(self, index):
        name = f"worker {index} ({self.addresses[index]})"
        try:
            self.peers[index].settimeout(self.timeout)
            message = receive(self.peers[index])
        except socket.timeout:
            raise PeerError(f"{name} did not answer within {self.timeout:g} seconds (--worker-timeout): it hangs, or it waits for "
                            "another one.") from None
        except (OSError, ValueError):
            raise PeerError(f"{name} is gone: look at what it printed. Start all workers again with the same commands: "
                            "they go on from the last save.") from None
        if "error" in message:
            raise PeerError(message["error"])
        return message["value"]

    def check_facts(self, **facts):
        """Raise OasisError, on all workers, naming the one that differs from the chief and in what.

        facts: those of __init__ if none are given. A dict in them is compared entry by entry.
        """
        facts = facts or self.facts
        flat = {f"{name} {part}".strip(): one for name, value in facts.items()
                for part, one in (value.items() if isinstance(value, dict) else [("", value)])}
        first, *others = self.exchange(flat)
        for index, other in enumerate(others, 1):
            for name in sorted(set(first) | set(other)):
                if first.get(name) != other.get(name):
                    raise PeerError(f"worker {index} ({self.addresses[index]}) has {name} {other.get(name)}, worker 0 has "
                                    f"{first.get(name)}. Start all workers with the same flags, code and data.")

    @contextlib.contextmanager
    def patience(self, doing):
        """End the process with one line where the block, which waits for other workers inside TensorFlow, takes too long."""
        if self.count == 1:
            yield
            return
        new_line = "\n" if self.chief else ""  # after its progress bar
        watchdog = threading.Timer(self.timeout, end_process, [
            f"{new_line}{Path(sys.argv[0]).name}: error: could not {doing} within {self.timeout:g} seconds (--worker-timeout): "
            "another worker hangs, or the network does. "
            "Start all workers again with the same commands: they go on from the last save."])
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    @contextlib.contextmanager
    def collective(self, doing):
        """For a block in which TensorFlow waits for other workers: an OasisError that names the one that has gone, if one has."""
        with self.patience(doing):
            try:
                yield
            except COLLECTIVE_ERRORS as error:
                if self.count == 1:
                    raise
                self.exchange("failed")
                raise OasisError(f"could not {doing}: {str(error.message).splitlines()[-1][:300]}") from error

    def agree(self, stop, count):
        """The smallest count of all workers; a signal that one has caught is noted in stop.number on all of them."""
        if self.count == 1:
            return count
        numbers, counts = zip(*self.exchange([stop.number, count]))
        stop.number = next((number for number in numbers if number is not None), None)
        return min(counts)

    def share(self, variables):
        """Give every worker the chief's values, bit for bit."""
        if self.count == 1:
            return
        with self.collective("share the state"):
            for variable in variables:
                value = variable.numpy()
                words = np.frombuffer(value.tobytes() + bytes(-value.nbytes % 8), np.int64)  # -0.0 + 0.0 would be 0.0
                shared = self.strategy.reduce("sum", tf.constant(words if self.chief else np.zeros_like(words)), axis=None)
                variable.assign(np.frombuffer(shared.numpy().tobytes()[:value.nbytes], value.dtype).reshape(value.shape))


def start_servers(addresses, index):
    """MultiWorkerMirroredStrategy over the workers at these addresses. It has to come before anything else of TensorFlow."""
    cluster = tf.train.ClusterSpec({"worker": addresses})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, task_type="worker", task_id=index, rpc_layer="grpc")
    return tf.distribute.MultiWorkerMirroredStrategy(resolver)


def end_process(message):
    print(message, file=sys.stderr, flush=True)
    os._exit(2)  # the main thread waits inside TensorFlow and hears nothing


def code_digests():
    """{file: digest} of the code in this folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(HERE.glob("*.py"))}


def settings_facts(settings):
    """{flag: value} of the settings that must be the same on all workers."""
    return {"--" + name.replace("_", "-"): value for name, value in settings.items() if name not in LOCAL_SETTINGS}


# ---------------------------------------------------------------------------------------------------------- sockets

def listen(address):
    port = int(address.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        raise OasisError(f"port {port}, which TF_CONFIG or SLURM gives to this worker, cannot be used: {os.strerror(error.errno)}. "
                         "End what uses it, or name another port.") from error


def connect(address, deadline, timeout):
    """A connection to the chief, which may not be there yet."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=max(deadline - time.monotonic(), 0.01))
        except OSError as error:
            if time.monotonic() > deadline - 0.2:
                raise PeerError(f"the chief, worker 0 ({address}), did not come within {timeout:g} seconds (--worker-timeout; "
                                f"{error}). Start the same command there, and see that the port can be reached.") from error
        time.sleep(0.2)


def send(connection, message):
    message = json.dumps(message).encode()
    connection.sendall(struct.pack("!I", len(message)) + message)


def receive(connection):
    """The next message; raises OSError (TimeoutError, ConnectionError) or ValueError."""
    length, = struct.unpack("!I", receive_bytes(connection, 4))
    if length > LONGEST_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(receive_bytes(connection, length))


def receive_bytes(connection, count):
    chunks = b""
    while len(chunks) < count:
        chunk = connection.recv(count - len(chunks))
        if not chunk:
            raise ConnectionError("closed")
        chunks += chunk
    return chunks
