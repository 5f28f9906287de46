"""Workers on hosts with addresses of their own, and every fault that a network between them can have.

The hosts are network namespaces on one switch. Their traffic reaches nothing else. `pytest -m slow tests/test_hosts.py
-s` prints what each worker said, and after how many seconds.
"""
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import train
from helpers import PROGRAMS, ROOT, WORKER, kernel_has_moved, same_state, same_training
from test_workers import tf_config

TIMEOUT = 20   # --worker-timeout in seconds
MARGIN = 10    # seconds after the timeout in which every process has ended
STRANGER = "import socket; server = socket.create_server(('', 12345)); print('ready', flush=True); input()"


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Hosts:
    """`count` hosts, 10.77.0.1 and following, and the processes on them. Leave the context and nothing is left."""

    def __init__(self, count):
        own = uuid.uuid4().hex[:8]
        self.names = [f"oasis-{own}-{name}" for name in (*range(count), "switch")]
        self.addresses = [f"10.77.0.{i + 1}:12345" for i in range(count)]
        self.switch, self.processes = self.names[-1], []

    def __enter__(self):
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for i, name in enumerate(self.names[:-1]):
                ip("-n", self.switch, "link", "add", f"port{i}", "type", "veth", "peer", "eth0", "netns", name)
                self.connect(i)
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '').strip() or error}")
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):  # it was never made
                ip("netns", "del", name)

    def connect(self, i):
        ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
        ip("-n", self.names[i], "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
        ip("-n", self.names[i], "link", "set", "eth0", "up")
        ip("-n", self.names[i], "link", "set", "lo", "up")

    def run(self, host, command, **environment):
        """A process on a host: its name in self.names, or its number."""
        name = self.names[host] if isinstance(host, int) else host
        process = subprocess.Popen(["ip", "netns", "exec", name, *command], cwd=ROOT, env={**os.environ, **environment},
                                   text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def unplug(self, i):
        """The link of a host goes down at the switch."""
        ip("-n", self.switch, "link", "set", f"port{i}", "down")

    def drop(self, source, target):
        """What host `source` sends to host `target` goes to a device that does not exist."""
        ip("-n", self.names[source], "neigh", "replace", f"10.77.0.{target + 1}", "lladdr", "02:00:00:00:00:99",
           "dev", "eth0", "nud", "permanent")

    def slow_wire(self, i):
        """Replace the link of a host by one that becomes slow when its process reads "SECONDS SHARE"."""
        ip("-n", self.switch, "link", "del", f"port{i}")
        wire = self.run(self.switch, [sys.executable, str(PROGRAMS / "slow_wire.py"), f"port{i}", "wire"])
        if wait_for(wire, "ready"):
            ip("-n", self.switch, "link", "set", "wire", "netns", self.names[i], "name", "eth0")
            self.connect(i)
            tell(wire, "0 0")
            return wire
        pytest.skip(f"no network devices of a program here: {wire.stderr.read().strip().splitlines()[-1]}")


def wait_for(process, word):
    """Whether the process prints a line with the word on stdout before it closes it."""
    return any(word in line for line in process.stdout)


def tell(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


@pytest.fixture
def make_hosts():
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(Hosts(count))


def start_workers(hosts, flags, folder, command=WORKER, timeout=TIMEOUT, **halts):
    """Start a worker on each host; the run is in `folder`. halts: worker1=13 halts worker 1 in step 13."""
    flags = [*flags, "--worker-timeout", str(timeout), "--ckpt-path"]
    return [hosts.run(i, [*command, *flags, str(folder / f"of-{i}")], NETWORK="tiny",
                      TF_CONFIG=tf_config(hosts.addresses, i), HALT_AT=str(halts.get(f"worker{i}", -1)))
            for i in range(len(hosts.addresses))]


def results_of(processes, timeout=300):
    """Return [(status, stderr, seconds until its end)] of processes, which all run until they end."""
    began = time.monotonic()

    def result(process):
        _, err = process.communicate(timeout=timeout)
        return process.returncode, err, time.monotonic() - began
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(result, processes))


def train_on(hosts, flags, folder):
    """Train on all hosts and return the run's folder."""
    results = results_of(start_workers(hosts, flags, folder, timeout=100))
    assert [status for status, *_ in results] == [0] * len(results), results
    return folder / "of-0" / "oasis16"


@pytest.fixture
def flags(tiny):
    return [*tiny, "--batch-size", "12", "--max-steps", "20", "--save-every", "10", "--learning-rate", "0.003"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_the_parameters_of_one_process(flags, make_hosts, tmp_path, count):
    folder = train_on(make_hosts(count), flags, tmp_path / "several")
    train.main([*flags, "--ckpt-path", str(tmp_path / "one")])
    same_training(tmp_path / "one" / "oasis16", folder)
    kernel_has_moved(folder)


# ---------------------------------------------------------------------------------------------------------- faults

# {fault: (what happens to the hosts and the processes on them, the workers that each worker may name)}. A worker that
# names nobody is killed.
FAULTS = {
    "link of worker 2 down": (lambda hosts, _: hosts.unplug(2), ("2", "2", "0")),
    "link of the chief down": (lambda hosts, _: hosts.unplug(0), ("1", "0", "0")),
    "nothing from the chief to worker 2": (lambda hosts, _: hosts.drop(0, 2), ("2", "2", "0")),
    "nothing from worker 2 to the chief": (lambda hosts, _: hosts.drop(2, 0), ("2", "2", "0")),
    "nothing from worker 1 to worker 2": (lambda hosts, _: hosts.drop(1, 2), ("2", "2", "1")),
    "worker 2 hangs": (lambda _, processes: processes[2].send_signal(signal.SIGSTOP), ("2", "2", "02")),
    "the chief hangs": (lambda _, processes: processes[0].send_signal(signal.SIGSTOP), ("12", "0", "0")),
    "the chief is killed": (lambda _, processes: processes[0].kill(), ("", "0", "0")),
    "worker 2 is killed": (lambda _, processes: processes[2].kill(), ("2", "2", "")),
}
HANGING = {"worker 2 hangs": 2, "the chief hangs": 0}


@pytest.fixture
def whole(flags, make_hosts, tmp_path_factory):
    """The folder of a run of three workers that nothing has disturbed; the tests share it."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    return folder / "of-0" / "oasis16" if folder.exists() else train_on(make_hosts(3), flags, folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_all_in_time_and_the_same_commands_go_on(flags, make_hosts, whole, tmp_path, fault):
    happen, named = FAULTS[fault]
    hosts = make_hosts(3)
    processes = start_workers(hosts, flags, tmp_path, worker1=13)
    assert wait_for(processes[1], "halted in step 13"), results_of(processes)
    happen(hosts, processes)
    tell(processes[1], "go on")
    results = results_with(processes, HANGING.get(fault))
    print(f"\n{fault}:", *(f"worker {i}: status {status} after {seconds:.1f} s: {message.strip().splitlines()[-1:]}"
                           for i, (status, message, seconds) in enumerate(results)), sep="\n  ")
    bad = [i for i, result in enumerate(results) if not ended_well(*result, hosts.addresses, named[i])]
    assert not bad
    assert (tmp_path / "of-0" / "oasis16" / "state" / "ckpt-10.index").exists()
    same_state(whole, train_on(make_hosts(3), flags, tmp_path))


def results_with(processes, hanging):
    """The results of all processes, where one hangs until the others have ended, or none."""
    results = results_of([process for i, process in enumerate(processes) if i != hanging], TIMEOUT + 60)
    if hanging is not None:
        processes[hanging].send_signal(signal.SIGCONT)
        results[hanging:hanging] = results_of([processes[hanging]], TIMEOUT + 60)
    return results


def ended_well(status, message, seconds, addresses, named):
    """Whether a worker has ended in time with one line that names another."""
    if not named:
        return status == -signal.SIGKILL
    lines = [line for line in message.splitlines() if line.strip() and "%|" not in line]  # the bar's lines have a %|
    names = [f"worker {i} ({addresses[int(i)]})" for i in named]
    return (status == 2 and seconds < TIMEOUT + MARGIN and len(lines) == 1
            and lines[0].startswith("worker.py: error: ") and any(name in lines[0] for name in names))


@pytest.mark.slow
def test_a_slow_wire_that_loses_frames_changes_nothing(flags, make_hosts, whole, tmp_path):
    """From step 13 on, every frame to and from worker 2 takes 200 ms, and 5 % of them are lost."""
    hosts = make_hosts(3)
    wire = hosts.slow_wire(2)
    processes = start_workers(hosts, flags, tmp_path, timeout=100, worker1=13)
    assert wait_for(processes[1], "halted in step 13"), results_of(processes)
    tell(wire, "0.2 0.05")
    tell(processes[1], "go on")
    results = results_of(processes)
    print(f"\nslow wire: steps 13 to 20 took {max(seconds for *_, seconds in results):.1f} s")
    assert [status for status, *_ in results] == [0, 0, 0], results
    same_state(whole, tmp_path / "of-0" / "oasis16")


def test_a_stranger_on_the_chiefs_port_is_named_in_time(flags, make_hosts, tmp_path):
    """It accepts connections and says nothing."""
    hosts = make_hosts(2)
    stranger = hosts.run(0, [sys.executable, "-c", STRANGER])
    assert wait_for(stranger, "ready"), stranger.stderr.read()
    results = results_of(start_workers(hosts, flags, tmp_path, timeout=2), 60)
    assert [status for status, *_ in results] == [2, 2], results
    assert "port 12345" in results[0][1] and "cannot be used" in results[0][1]
    assert results[1][1].startswith("worker.py: error: worker 0 (10.77.0.1:12345) did not answer within 2 seconds")


@pytest.mark.slow
def test_sigterm_to_one_worker_saves_and_ends_all(make_hosts, tmp_path):
    """As SLURM sends it before a preemption; 64 pixels, dim 64, in under 20 s if no other program uses the cores."""
    hosts = make_hosts(2)
    flags = ["--demo", "--image-size", "64", "--dim", "64", "--patch-size", "1", "--batch-size", "4", "--max-steps",
             "100000", "--save-every", "100000"]
    chief, worker = start_workers(hosts, flags, tmp_path, [sys.executable, "train.py"], timeout=300)
    third_step = re.compile(r"\b([3-9]|\d\d)/100000 .*images/s")
    assert any(map(third_step.search, chief.stderr)), results_of([chief, worker])
    worker.terminate()
    results = results_of([chief, worker])
    print("\nSIGTERM to worker 1:", [f"status {status} after {seconds:.1f} s" for status, _, seconds in results])
    assert [status for status, *_ in results] == [128 + signal.SIGTERM] * 2, results
    assert max(seconds for *_, seconds in results) < 20
    assert "saved at step" in results[0][1] and list(tmp_path.glob("of-0/demo64/state/ckpt-*.index"))
