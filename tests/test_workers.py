"""oasis/cluster.py, oasis/workers.py: the cluster in the environment, messages of workers, and two that train together.

The messages are tested with threads, training with processes.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import types

import pytest
import tensorflow as tf

import train
from helpers import ROOT, WORKER, kernel_has_moved, same_state, same_training
from oasis import workers
from oasis.cluster import find_cluster, make_process
from oasis.files import OasisError
from oasis.replicas import Process
from oasis.workers import Workers


def free_addresses(count=2):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    return addresses


def tf_config(addresses, index):
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


# --------------------------------------------------------------------------------------------------------- cluster

@pytest.mark.parametrize("environment", [
    {}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, {"TF_CONFIG": tf_config(["a:1"], 0)}, {"SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_NTASKS": "4"}])
def test_without_others_there_is_no_cluster(environment, monkeypatch):
    for name in "TF_CONFIG", "SLURM_STEP_NUM_TASKS":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_cluster() == ([], 0)


def test_a_chief_in_tf_config_comes_before_the_workers(monkeypatch):
    config = {"cluster": {"worker": ["b:2", "c:3"], "chief": ["a:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert find_cluster() == (["a:1", "b:2", "c:3"], 2)
    config["task"] = {"type": "chief", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert find_cluster() == (["a:1", "b:2", "c:3"], 0)


@pytest.mark.parametrize("text", [
    "{", "[]", '{"cluster": {"worker": ["a:1", "b:2"]}}', tf_config(["a:1", "b:2"], 2), tf_config(["a:1", "b:2"], -1),
    tf_config(["a", "b:2"], 0), tf_config(["a:1", "a:1"], 0), tf_config(["a:1", "b:99999"], 0),
    '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "ps", "index": 0}}'])
def test_a_tf_config_that_makes_no_sense_is_refused(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(OasisError, match="TF_CONFIG cannot be used") as error:
        find_cluster()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("node, local, index", [("n2", "0", 4), ("n2", "1", 5), ("n10", "1", 3), ("n1", "0", 0)])
def test_slurm_gives_the_cluster_whatever_the_order_of_ranks(monkeypatch, node, local, index):
    for name, value in {"STEP_NUM_TASKS": "6", "STEP_NODELIST": "n[1-2,10]", "STEP_TASKS_PER_NODE": "2(x3)",
                        "PROCID": "0", "JOB_ID": "40017", "LOCALID": local}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", node)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    expected = [f"{host}:{port}" for host in ("n1", "n10", "n2") for port in (10017, 10018)]
    assert find_cluster() == (expected, index)
    monkeypatch.setenv("SLURMD_NODENAME", "elsewhere")
    with pytest.raises(OasisError, match="SLURM"):
        find_cluster()


def test_train_makes_a_worker_only_where_there_are_others(monkeypatch):
    """Its facts must be equal on all workers: settings, code, precision and devices."""
    class Made(Exception):
        pass

    def make_and_stop(*arguments):
        raise Made(make_process(*arguments))
    monkeypatch.setattr(train, "make_process", make_and_stop)
    phases = train.parse_phases(["--path", "here", "--dim", "32", "--worker-timeout", "7", "--precision", "bfloat16"])
    addresses = free_addresses(3)
    for text, kind in (("", Process), (tf_config(addresses[:1], 0), Process), (tf_config(addresses, 2), Workers)):
        monkeypatch.setenv("TF_CONFIG", text)
        with pytest.raises(Made) as made:
            train.train(phases)
        process, = made.value.args
        assert type(process) is kind
    assert (process.addresses, process.index, process.timeout, process.chief) == (addresses, 2, 7, False)
    assert process.replicas == process.count == 3
    settings = process.facts[""]
    assert settings["--dim"] == 32 and not {"--path", "--ckpt-path", "--worker-timeout"} & set(settings)
    assert {"train.py", "modules.py", "oasis/fused.py", "oasis/workers.py"} <= set(process.facts["code"])
    assert (process.facts["precision"], process.facts["devices"]) == ("bfloat16", 1)


def test_a_worker_has_one_cpu_device():
    with pytest.raises(OasisError, match="--devices cpu"):
        Workers(["CPU:0", "CPU:1"], ["a:1", "b:2"], 0, 1, {})


# ------------------------------------------------------------------------------------- what workers tell one another

@pytest.fixture
def together(monkeypatch):
    """together(works, timeout, facts, addresses): a list of the result or the exception of each work(workers).

    works[i] runs in a thread of this process as worker i, without TensorFlow's servers. None is a worker that never
    starts. facts(index): the facts of a worker.
    """
    no_timer = types.SimpleNamespace(start=lambda: None, cancel=lambda: None)
    monkeypatch.setattr(workers, "start_servers", lambda *_: None)
    monkeypatch.setattr(workers.threading, "Timer", lambda *_: no_timer)
    monkeypatch.setattr(workers.atexit, "register", lambda *_: None)

    def run(works, timeout=20, facts=lambda index: {}, addresses=None):
        addresses = addresses or free_addresses(len(works))
        results = [None] * len(works)

        def one(index):
            try:
                with Workers(["CPU:0"], addresses, index, timeout, facts(index)) as process:
                    results[index] = works[index](process)
            except Exception as error:
                results[index] = error
        threads = [threading.Thread(target=one, args=(i,), daemon=True) for i, work in enumerate(works) if work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results
    return run


def test_a_chief_that_resets_the_connection_is_named(together, monkeypatch):
    addresses, connect, connected = free_addresses(2), workers.connect, threading.Event()

    def reset(server):
        connection, _ = server.accept()
        connected.wait()  # a reset before connect() has returned would only make it connect again
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a reset
        connection.close()
    with workers.listen(addresses[0]) as server:
        chief = threading.Thread(target=reset, args=[server])
        chief.start()

        def connect_and_wait(*arguments):
            connection = connect(*arguments)
            connected.set()
            chief.join()
            return connection
        monkeypatch.setattr(workers, "connect", connect_and_wait)
        _, error = together([None, lambda process: None], addresses=addresses)
    assert str(error).startswith(f"worker 0 ({addresses[0]}) is gone: look at its messages.")


def test_every_worker_hears_what_each_one_says(together):
    assert together([lambda process: process.exchange(process.index * 10)] * 3) == [[0, 10, 20]] * 3


def test_the_smallest_count_and_any_signal_hold_for_all(together):
    def work(process):
        stop = types.SimpleNamespace(number=15 if process.index == 2 else None)
        count = process.agree(types.SimpleNamespace(number=None), 7 - process.index)
        return count, process.agree(stop, 1), stop.number
    assert together([work] * 3) == [(5, 1, 15)] * 3


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_worker_that_never_comes_is_named_in_time(together, absent):
    addresses = free_addresses(3)
    works = [None if index == absent else lambda process: "came" for index in range(3)]
    errors = [error for error in together(works, timeout=1, addresses=addresses) if error is not None]
    assert len(errors) == 2 and all(isinstance(error, OasisError) for error in errors)
    assert any(f"worker {absent} ({addresses[absent]})" in str(error)
               and "within 1 seconds (--worker-timeout" in str(error) for error in errors)


def test_other_settings_code_or_data_are_named_everywhere(together):
    works = [lambda process: process.check_facts(slices=process.index // 2)] * 3
    facts = {"": {"--dim": 64, "--loss": "l2"}, "code": {"train.py": "ab"}}
    for error in together(works, facts=lambda index: facts):
        assert "worker 2 (" in str(error) and "slices 1, worker 0 has 0" in str(error)
    for other, words in (({**facts, "": {"--dim": 32, "--loss": "l2"}}, "--dim 32, worker 0 has 64"),
                         ({**facts, "code": {"train.py": "cd"}}, "code train.py cd, worker 0 has ab"),
                         ({**facts, "code": {}}, "code train.py None, worker 0 has ab")):
        errors = together(works, facts=lambda index: other if index == 1 else facts)
        assert all(isinstance(error, OasisError) for error in errors)
        assert all("worker 1 (" in str(error) and words in str(error) for error in errors)


def test_what_one_worker_fails_with_is_what_all_report(together):
    def work(process):
        if process.index == 1:
            raise OasisError("no space left")
        return process.exchange("fine")
    addresses = free_addresses(3)
    of_worker_1 = f"worker 1 ({addresses[1]}): no space left"
    errors = together([work] * 3, addresses=addresses)
    assert list(map(str, errors)) == [of_worker_1, "no space left", of_worker_1]


def test_a_worker_that_does_not_answer_is_named_in_time(together):
    silence = threading.Event()

    def chief(process):
        try:
            return process.exchange("fine")
        finally:
            silence.set()
    error, _ = together([chief, lambda process: silence.wait(30)], timeout=1)
    assert "worker 1 (" in str(error) and "did not answer within 1 seconds" in str(error)


@pytest.mark.parametrize("lost, said, words", [
    ([], "disk on fire\nand a graph", "worker 1 ({1}): InternalError: disk on fire and a graph"),
    ([2], "disk on fire", "worker 0 ({0}) cannot reach worker 2 ({2}). Start all"),
    ([], "a graph\nError reported from /job:worker/task:2: Task /job:worker/replica:0/task:2 heartbeat timeout.",
     "worker 2 ({2}) ended or hangs: its heartbeat is missing. Start all"),
    ([], "Error reported from /job:worker/task:2: The following tasks are unhealthy (stopped sending heartbeats):",
     "worker 2 ({2}) ended or hangs: its heartbeat is missing. Start all")])
def test_tensorflow_errors_and_unreachable_workers_are_reported_by_all(together, monkeypatch, lost, said, words):
    def work(process):
        with process.collective("train on"):
            if process.index == 1:
                raise tf.errors.InternalError(None, None, said)
            raise tf.errors.UnavailableError(None, None, "")
    addresses = free_addresses(3)
    monkeypatch.setattr(workers, "is_reachable", lambda address: addresses.index(address) not in lost)
    errors = together([work] * 3, addresses=addresses)
    assert all(isinstance(error, OasisError) and "worker" in str(error) for error in errors)
    assert words.format(*addresses) in str(errors[0])


def test_a_port_in_use_is_refused_at_once(together):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        addresses = ["127.0.0.1:1", f"127.0.0.1:{port}"]
        _, error = together([None, lambda process: "came"], addresses=addresses)
    assert f"port {port}" in str(error) and "Address already in use" in str(error)


def test_what_is_not_a_worker_is_not_counted_as_one(together):
    addresses, answers = free_addresses(2), []

    def stranger_then_worker():
        connection = workers.connect(addresses[0], time.monotonic() + 20, 20)
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # the stranger is refused before worker 1 connects
        answers.extend(together([None, lambda process: process.exchange(1)], addresses=addresses))

    thread = threading.Thread(target=stranger_then_worker)
    thread.start()
    assert together([lambda process: process.exchange(0), None], addresses=addresses)[0] == [0, 1]
    thread.join(60)
    assert answers[1] == [0, 1]


def test_strangers_do_not_keep_the_chief_waiting(together):
    address, over = free_addresses(1)[0], threading.Event()

    def knock_again_and_again():
        while not over.is_set():
            with contextlib.suppress(OSError):
                workers.open_connection(address, 1).close()

    thread = threading.Thread(target=knock_again_and_again, daemon=True)
    thread.start()
    error, _ = together([lambda process: "all came", None], timeout=1, addresses=[address, "127.0.0.1:1"])
    over.set()
    thread.join(60)
    assert "worker 1 (127.0.0.1:1) did not come within 1 seconds" in str(error)


def test_two_processes_with_one_index_are_refused(together):
    addresses, twins = free_addresses(3), []

    def twin():
        twins.append(workers.connect(addresses[0], time.monotonic() + 20, 20))
        workers.send(twins[0], {"worker": 1})

    works = [lambda process: "all came", lambda process: "came", None]
    thread = threading.Thread(target=twin)
    thread.start()
    error, other, _ = together(works, addresses=addresses)
    thread.join(60)
    twins[0].close()
    assert "two processes say that they are worker 1" in str(error) and isinstance(other, OasisError)


# ---------------------------------------------------------------------------------------------------- two processes

def start_worker(flags, addresses, index, network="tiny", **environment):
    environment = {**os.environ, "NETWORK": network, "TF_CONFIG": tf_config(addresses, index), **environment}
    return subprocess.Popen([*WORKER, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def train_in_two_processes(flags, folder, network="tiny", **environment):
    """Return [(status, stderr)] of both workers. environment: of worker 1, which must leave no file behind."""
    addresses, temporary = free_addresses(), folder / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    flags = [*flags, "--worker-timeout", "100", "--ckpt-path"]
    processes = [start_worker([*flags, str(folder)], addresses, 0, network),
                 start_worker([*flags, str(folder / "of-worker-1")], addresses, 1, network, TMPDIR=str(temporary),
                              **environment)]
    results = [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=240)]]
    assert not (folder / "of-worker-1").exists()
    assert results[1][0] == -signal.SIGKILL or not list(temporary.glob("oasis-worker-*"))
    shutil.rmtree(temporary)
    return results


def as_in_one_process(flags, tmp_path, network):
    """Train in one process and in two. Return (flags, the folder of the run in two processes)."""
    flags = [*flags, "--max-steps", "20", "--save-every", "10", "--learning-rate", "0.003"]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main([*flags, "--ckpt-path", str(one)])
    assert [status for status, _ in train_in_two_processes(flags, two, network)] == [0, 0]
    same_training(one / "oasis16", two / "oasis16")
    assert {path.name for path in (two / "oasis16").iterdir()} == {path.name for path in (one / "oasis16").iterdir()}
    return flags, two


def test_two_processes_train_the_parameters_of_one(tiny, tmp_path, capsys):
    """One process also continues a run that two processes have saved."""
    flags, two = as_in_one_process(tiny, tmp_path, "tiny")
    kernel_has_moved(two / "oasis16")
    train.main([*flags, "--ckpt-path", str(two), "--max-steps", "21"])
    assert "steps 20 to 21" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_a_unet_like_one(unet, tmp_path):
    as_in_one_process(unet, tmp_path, "unet")


@pytest.mark.slow
def test_after_a_kill_all_go_on_from_the_last_save(tiny, tmp_path):
    """If one worker is killed, the others end. Started again, they reach the state of an uninterrupted training."""
    flags = [*tiny, "--max-steps", "20", "--save-every", "10"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [status for status, _ in train_in_two_processes(flags, whole)] == [0, 0]
    (status, message), (other, _) = train_in_two_processes(flags, parts, SIGNAL_AT="13:9")
    assert (status, other) == (2, -signal.SIGKILL)
    line = message.splitlines()[-1]
    assert line.startswith("worker.py: error: ") and "worker 1 (127.0.0.1:" in line and "Traceback" not in message
    assert "is gone" in line or "ended or hangs" in line  # whichever is noticed first
    assert [path.name for path in (parts / "oasis16" / "state").glob("*.index")] == ["ckpt-10.index"]
    assert [status for status, _ in train_in_two_processes(flags, parts)] == [0, 0]
    same_state(whole / "oasis16", parts / "oasis16")


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_after_the_same_step(tiny, tmp_path):
    results = train_in_two_processes([*tiny, "--max-steps", "20"], tmp_path, SIGNAL_AT=f"15:{signal.SIGTERM:d}")
    assert [status for status, _ in results] == [143, 143] and "saved at step 16 " in results[0][1]
    assert "saved at step" not in results[1][1]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_other_in_time(tiny):
    flags, addresses = [*tiny, "--max-steps", "20", "--worker-timeout", "15"], free_addresses()
    chief = start_worker(flags, addresses, 0)
    hanging = start_worker(flags, addresses, 1, SIGNAL_AT=f"5:{signal.SIGSTOP:d}")
    try:
        _, message = chief.communicate(timeout=200)
    finally:
        hanging.kill()
        hanging.communicate()
    assert chief.returncode == 2 and re.search(r"worker 1 \(.*(hangs|did not answer)", message.splitlines()[-1])
