"""Several processes that train together. TF_CONFIG or SLURM's srun tells each of them the addresses of all.

oasis/cluster.py imports this file only if there are several processes. Each is a worker. Worker 0 is the chief; only it
writes the run's folder. tf.distribute.MultiWorkerMirroredStrategy averages the gradients.

TensorFlow exchanges the gradients and, at the start, the state. All else is exchanged as JSON over one TCP connection
per worker to the chief: who is there, with which settings and code, when to stop, and why a worker has failed. The
connection uses TensorFlow's own port before TensorFlow binds it, so no extra port is needed, and missing or dead
workers can be reported by name.
"""
import atexit
import contextlib
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

from oasis.files import OasisError
from oasis.replicas import Process

LONGEST_MESSAGE = 2**24  # bytes; a longer message is refused, so a stranger cannot occupy the memory of a worker
HELLO_SECONDS = 5        # in which a new connection must identify itself as a worker; also the timeout of sending
PROBE_SECONDS = 3        # timeout of a connection that tests whether a worker can be reached
ANSWER_SECONDS = 5       # after the timeout: how long the chief waits for the messages of TensorFlow on other workers
VERDICT_SECONDS = 2      # how much longer the others wait than the chief, whose error names the missing worker
START_AGAIN = "Start all workers again with the same commands: they go on from the last save."
# The errors with which TensorFlow reports that another worker of a collective operation is missing or has gone.
COLLECTIVE_ERRORS = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
                     tf.errors.InternalError, tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError)


# ---------------------------------------------------------------------------------------------------------- workers

class WorkerError(OasisError):
    """Another worker has failed, is missing or differs. The message names that worker if it is known."""


class Workers(Process):
    """This process and the workers that train with it; use it in `with`.

    names: the devices of this process. addresses, index: see find_cluster. timeout: seconds to wait for other workers.
    facts: {name: value that JSON can hold}. They must be the same on all workers, see check_facts.
    """

    def __init__(self, names, addresses, index, timeout, facts):
        if names[0] == "CPU:0" and len(names) > 1:
            raise OasisError("without a GPU, each worker uses one CPU device: give --devices cpu.")
        self.names, self.addresses, self.index, self.timeout, self.facts = names, addresses, index, timeout, facts
        self.count, self.chief = len(addresses), index == 0
        self.strategy, self.connections, self.status = None, {}, 0

    def __enter__(self):
        try:
            self.rendezvous()
            self.check_facts()
            with self.collective("start TensorFlow's servers"):
                self.strategy = start_servers(self.addresses, self.index)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, _):
        """Wait until all workers have finished, or send the others the error that ends this one.

        They read the error when they next receive a message.
        """
        try:
            if error is None:
                self.exchange("done")
        except WorkerError as missing:
            error = missing
            raise
        finally:
            if error is not None:
                self.report_error(error)
                self.status = 130 if kind is KeyboardInterrupt else 2
            atexit.register(leave, self.status)
            for connection in self.connections.values():
                connection.close()

    def report_error(self, error):
        where = "" if isinstance(error, WorkerError) else f"{self.name_of(self.index)}: "
        reason = str(error) if isinstance(error, OasisError) else f"{type(error).__name__}: {error}"
        for index in self.connections:
            self.send_to(index, {"error": where + " ".join(reason.split())[:1000]})

    def name_of(self, index):
        return f"worker {index} ({self.addresses[index]})"

    def description(self):
        """The devices in words, for a message."""
        return f"{super().description()} of {self.count} workers each"

    def rendezvous(self):
        """As the chief, wait until all workers have connected; as another worker, connect to the chief.

        Raises OasisError if a worker is missing after self.timeout seconds, if two have the same index, or if the port
        of this worker is taken.
        """
        deadline = time.monotonic() + self.timeout
        with listen(self.addresses[self.index]) as server:  # open until all are there, so that nobody takes the port
            if self.chief:
                self.wait_for_workers(server, deadline)
            else:
                self.connections[0] = connect(self.addresses[0], deadline, self.timeout)
                self.send_to(0, {"worker": self.index})
            self.exchange("all are there")

    def wait_for_workers(self, server, deadline):
        while missing := set(range(1, self.count)) - set(self.connections):
            try:
                server.settimeout(seconds_until(deadline))
                connection, _ = server.accept()
            except socket.timeout:
                absent = ", ".join(map(self.name_of, sorted(missing)))
                raise WorkerError(f"{absent} did not come within {self.timeout:g} seconds (--worker-timeout). Start "
                                  "the same command there, and see that the port can be reached.") from None
            try:
                index = receive(connection, time.monotonic() + HELLO_SECONDS)["worker"]
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # it is not a worker: some programs try all ports
                continue
            if index not in missing:
                connection.close()
                raise WorkerError(f"two processes say that they are worker {index}: "
                                  "give each its own index in TF_CONFIG.")
            self.connections[index] = connection

    def exchange(self, value, deadline=None):
        """The values of all workers, in the order of their indices.

        value: anything that JSON can hold. Raises WorkerError if another worker has failed or does not answer in time.
        deadline: the time.monotonic() until which the chief waits, by default `timeout` seconds from now. The others
        wait VERDICT_SECONDS longer.
        """
        deadline = deadline or time.monotonic() + self.timeout
        if not self.chief:
            self.send_to(0, {"value": value})
            return self.receive_from(0, deadline + VERDICT_SECONDS)
        values = [value, *(self.receive_from(i, deadline) for i in range(1, self.count))]
        for i in range(1, self.count):
            self.send_to(i, {"value": values})
        return values

    def send_to(self, index, message):
        with contextlib.suppress(OSError):  # if the receiver is gone, its last message can still be read
            send(self.connections[index], message)

    def receive_from(self, index, deadline):
        name = self.name_of(index)
        try:
            message = receive(self.connections[index], deadline)
        except socket.timeout:
            raise WorkerError(f"{name} did not answer within {self.timeout:g} seconds (--worker-timeout): it hangs, "
                              f"its network does, or it waits for another one. {START_AGAIN}") from None
        except (OSError, ValueError):
            raise WorkerError(f"{name} is gone: look at its messages. {START_AGAIN}") from None
        if "error" in message:
            raise WorkerError(message["error"])
        return message["value"]

    def check_facts(self, **facts):
        """Raise OasisError on all workers if one has other facts than the chief. The message names worker and fact.

        facts: by default those of __init__. A dict in them is compared entry by entry.
        """
        facts = facts or self.facts
        flat = {f"{name} {part}".strip(): one for name, value in facts.items()
                for part, one in (value.items() if isinstance(value, dict) else [("", value)])}
        first, *others = self.exchange(flat)
        for index, other in enumerate(others, 1):
            for name in sorted(set(first) | set(other)):
                if first.get(name) != other.get(name):
                    raise WorkerError(f"{self.name_of(index)} has {name} {other.get(name)}, worker 0 has "
                                      f"{first.get(name)}. Start all workers with the same flags, code and data.")

    @contextlib.contextmanager
    def collective(self, doing):
        """A context for calls in which TensorFlow waits for the other workers.

        An error of TensorFlow that another worker causes becomes the WorkerError of diagnose(). After `timeout` seconds
        the process prints this error and ends with status 2.
        """
        began = time.monotonic()
        timer = threading.Timer(self.timeout, self.on_timeout, [doing, began])
        timer.daemon = True
        timer.start()
        try:
            yield
        except COLLECTIVE_ERRORS as error:
            timer.cancel()
            raise self.diagnose(doing, began, f"{type(error).__name__}: {error.message}") from error
        finally:
            timer.cancel()

    def on_timeout(self, doing, began):
        error = self.diagnose(doing, began)
        self.report_error(error)
        new_line = "\n" if self.chief else ""  # after the chief's progress bar
        print(f"{new_line}{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        leave(2)  # an exception would not end the main thread, which waits inside TensorFlow

    def diagnose(self, doing, began, cause=""):
        """The WorkerError for a collective operation that failed or exceeded the timeout.

        The error names the workers that are unreachable or silent. If all answer, it has the message of TensorFlow on
        each worker, or says that the operation took too long.

        doing: the operation, such as "share the state". began: time.monotonic() at its start. cause: the
        message of TensorFlow's error, or "". TensorFlow names a worker only if the chief misses its heartbeat.
        """
        if missed := self.unreachable():
            return WorkerError(f"could not {doing}: {self.name_of(self.index)} cannot reach "
                               f"{', '.join(map(self.name_of, missed))}. {START_AGAIN}")
        if silent := re.search(r"/task:(\d+): [^\n]*heartbeat", cause):
            return WorkerError(f"could not {doing}: {self.name_of(int(silent[1]))} ended or hangs: its heartbeat is "
                               f"missing. {START_AGAIN}")
        try:
            causes = self.exchange(" ".join(cause.split())[-300:], began + self.timeout + ANSWER_SECONDS)
        except WorkerError as error:
            return error
        reasons = [f"{self.name_of(index)}: {cause}" for index, cause in enumerate(causes) if cause]
        slow = f"all workers answer, but it took longer than {self.timeout:g} seconds (--worker-timeout)"
        return WorkerError(f"could not {doing}: {', '.join(reasons) or slow}. {START_AGAIN}")

    def unreachable(self):
        """The indices of the other workers whose hosts do not answer. A host that refuses a connection answers."""
        with ThreadPoolExecutor(self.count) as pool:
            reached = list(pool.map(is_reachable, self.addresses))
        return [index for index in range(self.count) if not reached[index] and index != self.index]

    def agree(self, stop, count):
        """Return the smallest `count` of all workers, and set stop.number on all to a signal that one of them caught.

        count: the steps that this worker would take next. stop: a StopSignal, whose number is None without a signal.
        """
        numbers, counts = zip(*self.exchange([stop.number, count]))
        stop.number = next((number for number in numbers if number is not None), None)
        self.status = 128 + stop.number if stop.number is not None else 0
        return min(counts)

    def broadcast(self, variables):
        """Set the variables of every worker to the chief's values, bit for bit."""
        with self.collective("share the state"):
            for variable in variables:
                value = variable.numpy()
                # Integers are summed, because with floats -0.0 + 0.0 would be 0.0.
                words = np.frombuffer(value.tobytes() + bytes(-value.nbytes % 8), np.int64)
                words = tf.constant(words if self.chief else np.zeros_like(words))
                shared = self.strategy.reduce("sum", words, axis=None).numpy().tobytes()
                variable.assign(np.frombuffer(shared[:value.nbytes], value.dtype).reshape(value.shape))


def start_servers(addresses, index):
    """A MultiWorkerMirroredStrategy of the workers at these addresses. Call it before any other use of TensorFlow."""
    cluster = tf.train.ClusterSpec({"worker": addresses})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, task_type="worker", task_id=index, rpc_layer="grpc")
    return tf.distribute.MultiWorkerMirroredStrategy(resolver)


def leave(status):
    """Exit with this status, without joining TensorFlow's threads: they may wait for other workers for ever."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


# ---------------------------------------------------------------------------------------------------------- sockets

def listen(address):
    port = int(address.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        raise OasisError(f"port {port}, which TF_CONFIG or SLURM gives to this worker, cannot be used: "
                         f"{os.strerror(error.errno)}. End the program that uses it, or name another port.") from error


def seconds_until(deadline):
    """Seconds until `deadline`, a time.monotonic(), as a socket's timeout. Raises socket.timeout if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise socket.timeout("timed out")
    return seconds


def open_connection(address, seconds):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)


def connect(address, deadline, timeout):
    """Connect to the chief. Tries again until the deadline, a time.monotonic(), because the chief may start later.

    Returns a socket. Raises WorkerError after the deadline. timeout: --worker-timeout, for the message.
    """
    while True:
        try:
            return open_connection(address, max(deadline - time.monotonic(), 0.01))
        except OSError as error:
            if time.monotonic() > deadline - 0.2:
                raise WorkerError(f"the chief, worker 0 ({address}), did not come within {timeout:g} seconds "
                                  f"(--worker-timeout; {error}). Start the same command there, and see that the port "
                                  "can be reached.") from error
        time.sleep(0.2)


def is_reachable(address):
    """Whether the host at this address answers, if only to refuse a connection."""
    try:
        open_connection(address, PROBE_SECONDS).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return True


def send(connection, message):
    message = json.dumps(message).encode()
    connection.settimeout(HELLO_SECONDS)
    connection.sendall(struct.pack("!I", len(message)) + message)


def receive(connection, deadline):
    """The next message; raises OSError (TimeoutError, ConnectionError) or ValueError."""
    length, = struct.unpack("!I", receive_bytes(connection, 4, deadline))
    if length > LONGEST_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(receive_bytes(connection, length, deadline))


def receive_bytes(connection, count, deadline):
    chunks = b""
    while len(chunks) < count:
        connection.settimeout(seconds_until(deadline))
        chunk = connection.recv(count - len(chunks))
        if not chunk:
            raise ConnectionError("closed")
        chunks += chunk
    return chunks
