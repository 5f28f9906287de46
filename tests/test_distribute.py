"""distribute.py: one device, two mirrored devices and two processes train the same weights; what workers tell one another.

TensorFlow's devices are settled when it starts, so whatever needs two of them runs in a process of its own. What is said
between workers is tested on threads.
"""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import distribute
import modules
import predict
import train
from common import OasisError
from test_train import ROOT, OneConvolution, same_state, state_of, tiny, unet  # noqa: F401

# A worker: train.py with a small network. Worker 0 wants one step a call, worker 1 as many as fit into two seconds. In
# the step that SIGNAL_AT names it sends itself a signal.
WORKER = [sys.executable, "-c", f"""
import functools, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_train, train
train.UNet = functools.partial(train.UNet, dim_mults=(1,)) if os.environ["NETWORK"] == "unet" else test_train.OneConvolution
train.SAMPLE_STEPS = 2
if '"index": 0' in os.environ.get("TF_CONFIG", ""):
    train.SECONDS_PER_CALL = 1e-9
step, number = map(int, os.environ.get("SIGNAL_AT", "-1:0").split(":"))
run = train.Trainer.run

def run_or_signal(self, *arguments):
    if int(self.step.numpy()) == step:
        os.kill(os.getpid(), number)
    return run(self, *arguments)

train.Trainer.run = run_or_signal
train.run_script(train.main)
"""]


def free_addresses(count=2):
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in with_ports]
    for server in with_ports:
        server.close()
    return addresses


def tf_config(addresses, index):
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


def train_in_two_processes(flags, folder, network="tiny", **environment):
    """[(status, stderr)] of both workers. Worker 1 has a --ckpt-path and a TMPDIR of its own, where it leaves nothing."""
    addresses, processes = free_addresses(), []
    (folder / "temporary").mkdir(parents=True, exist_ok=True)
    for index, own in enumerate([{}, dict(environment, TMPDIR=str(folder / "temporary"))]):
        path = folder if index == 0 else folder / "of-worker-1"
        processes.append(subprocess.Popen(
            [*WORKER, *flags, "--ckpt-path", str(path), "--worker-timeout", "100"], text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "NETWORK": network, "TF_CONFIG": tf_config(addresses, index), **own}))
    results = [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=240)]]
    assert not (folder / "of-worker-1").exists()
    assert results[1][0] == -signal.SIGKILL or not list((folder / "temporary").glob("oasis-worker-*"))
    shutil.rmtree(folder / "temporary")
    return results


def close(a, b):
    """Whether two states' tensors differ by less than 1e-4 of the largest number of each; means are sums that may cancel."""
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys() and len(a) > 8
    weights = [name for name in a if name.startswith(("network/", "ema/"))]
    assert len(weights) >= 8
    return all(np.abs(a[name] - b[name]).max() < 1e-4 * np.abs(a[name]).max() for name in weights)


def as_one_device(flags, tmp_path, network):
    one, mirrored, two = (tmp_path / name for name in ("one", "mirrored", "two"))
    flags = [*flags, "--max-steps", "20", "--save-every", "10", "--learning-rate", "0.003"]
    train.main([*flags, "--ckpt-path", str(one)])
    result = subprocess.run([*WORKER, *flags, "--ckpt-path", str(mirrored), "--devices", "CPU:0,CPU:1", "--accumulate", "2"], text=True,
                            capture_output=True, env={**os.environ, "NETWORK": network}, cwd=ROOT, timeout=240)
    assert result.returncode == 0 and "on the 2 CPUs" in result.stdout, result.stderr
    assert [status for status, _ in train_in_two_processes(flags, two, network)] == [0, 0]
    for folder in (mirrored, two):
        assert close(one / "oasis16", folder / "oasis16"), folder
        logs = [np.genfromtxt(path / "oasis16" / "log.csv", delimiter=",", names=True) for path in (one, folder)]
        for name in ("loss", "loss_t1", "loss_t4", "validation_loss", "gradient_norm"):
            np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-3, err_msg=name)
    start = OneConvolution(16, 16, 1, 0, "", 0).convolution.kernel.numpy()
    moved = np.abs(state_of(one / "oasis16")[KERNEL] - start).max() if network == "tiny" else 1
    assert moved > 1e-2
    assert {path.name for path in (two / "oasis16").iterdir()} == {path.name for path in (one / "oasis16").iterdir()}
    return flags, mirrored, two


KERNEL = "network/convolution/_kernel/.ATTRIBUTES/VARIABLE_VALUE" if int(tf.__version__.split(".")[1]) > 15 else \
    "network/convolution/kernel/.ATTRIBUTES/VARIABLE_VALUE"


def test_one_device_two_devices_and_two_processes_train_the_same_weights(tiny, tmp_path, capsys):
    flags, mirrored, two = as_one_device(tiny, tmp_path, "tiny")
    train.main([*flags, "--ckpt-path", str(mirrored), "--max-steps", "21"])  # and one device goes on from what two saved
    assert "steps 20 to 21" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_all_go_on_from_the_last_save_to_the_same_end(tiny, tmp_path):
    flags = [*tiny, "--max-steps", "20", "--save-every", "10"]
    two, parts = tmp_path / "two", tmp_path / "parts"
    assert [status for status, _ in train_in_two_processes(flags, two)] == [0, 0]
    (status, message), (other, _) = train_in_two_processes(flags, parts, SIGNAL_AT="13:9")
    assert (status, other) == (2, -signal.SIGKILL)
    assert message.splitlines()[-1].startswith("-c: error: worker 1 (127.0.0.1:") and "is gone" in message and "Traceback" not in message
    assert [path.name for path in (parts / "oasis16" / "state").glob("*.index")] == ["ckpt-10.index"]
    assert [status for status, _ in train_in_two_processes(flags, parts)] == [0, 0]
    same_state(two / "oasis16", parts / "oasis16")


@pytest.mark.slow
def test_a_unet_trains_the_same_weights_on_one_device_two_devices_and_two_processes(unet, tmp_path):
    as_one_device(unet, tmp_path, "unet")


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_after_the_same_step(tiny, tmp_path):
    results = train_in_two_processes([*tiny, "--max-steps", "20"], tmp_path, SIGNAL_AT=f"15:{signal.SIGTERM:d}")
    assert [status for status, _ in results] == [143, 143] and "saved at step 16 " in results[0][1]
    assert "saved at step" not in results[1][1]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_other_in_time(tiny, tmp_path):
    flags = [*tiny, "--max-steps", "20"]
    addresses, processes = free_addresses(), []
    for index, own in enumerate([{}, {"SIGNAL_AT": f"5:{signal.SIGSTOP:d}"}]):
        processes.append(subprocess.Popen([*WORKER, *flags, "--worker-timeout", "15"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                          cwd=ROOT, env={**os.environ, "NETWORK": "tiny", "TF_CONFIG": tf_config(addresses, index), **own}))
    _, message = processes[0].communicate(timeout=200)
    assert processes[0].returncode == 2 and "within 15 seconds (--worker-timeout)" in message.splitlines()[-1]
    processes[1].kill()
    processes[1].communicate()


@pytest.mark.slow
def test_two_devices_skip_a_bad_step_together_and_make_the_pictures_of_one(tiny, tmp_path):
    network = modules.UNet(16, dim=16, dim_mults=(1,))
    for name, variable in modules.named_variables(network):
        if name.startswith("last_conv"):
            variable.assign(tf.random.stateless_normal(variable.shape, [3, 4]))
    model = tmp_path / "model.safetensors"
    modules.save_model(model, network, {**network.settings, **modules.GaussianDiffusion(50, "x_start").settings})
    arguments = ["--model", str(model), "--precision", "float32", "--sampler", "dpm", "--steps", "4", "--number-of-images", "5", "--samples"]
    predict.main([*arguments, str(tmp_path / "one.npy")])
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import distribute, numpy as np, predict, tensorflow as tf, test_train, train
predict.main({arguments!r} + [{str(tmp_path / "two.npy")!r}, "--devices", "CPU:0,CPU:1", "--batch-size", "3"])
train.UNet = test_train.OneConvolution
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    trainer = test_train.trainer_of({tiny!r})
bad = test_train.a_batch().numpy()
bad[6, 5, 5] = np.nan                                               # of the second device
for batch, skips in ((test_train.a_batch().numpy(), 0), (bad, 1)):
    before = [[copy.numpy() for copy in variable.values] for variable in values_of(trainer)] if skips else None
    loss_sums, counts, _, skipped, _ = trainer.run(iter(tf.data.Dataset.from_tensors(batch)), tf.constant(1), tf.constant(0))
    assert int(skipped) == skips and sum(counts.numpy()) == 8 * (1 - skips)
for old, variable in zip(before, values_of(trainer)):
    for was, copy in zip(old, variable.values):
        np.testing.assert_array_equal(was, copy.numpy())            # and both copies moved together before:
        np.testing.assert_array_equal(old[0], copy.numpy())
print("well")
""".replace("values_of(trainer)", "[getattr(v, 'value', v) if not hasattr(v, 'values') else v for v in trainer.variables[:-1]]")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.stdout.endswith("well\n"), result.stderr
    one, two = np.load(tmp_path / "one.npy").astype(int), np.load(tmp_path / "two.npy").astype(int)
    assert one.shape == two.shape == (5, 16, 16, 1) and np.abs(one[4] - one[3]).max() > 20
    assert np.abs(one - two).max() <= 1


# ------------------------------------------------------------------------------------------------------ what is chosen

@pytest.mark.parametrize("text, value", [("AUTO", "auto"), ("cpu", "cpu"), ("4", "4"), ("gpu:0,gpu:2", "GPU:0,GPU:2"), ("CPU:0", "CPU:0")])
def test_devices_are_named_in_four_ways(text, value):
    assert train.parse_flags(["--devices", text]).devices == predict_flags(text) == value


def predict_flags(text):
    return predict.flags_from_constants(predict.__file__, vars(predict), predict.FLAG_TYPES).parse_args(["--devices", text]).devices


@pytest.mark.parametrize("text", ["0", "-1", "gpu", "GPU:0,CPU:1", "GPU:0,GPU:0", "GPU:", "GPU:0;GPU:1", ""])
def test_other_names_of_devices_are_refused(text):
    with pytest.raises(OasisError, match="--devices"):
        train.parse_flags(["--devices", text])


@pytest.fixture
def machine(monkeypatch):
    """A tf.config of four GPUs that notes what it is told."""
    told = {}
    gpus = [f"gpu {i}" for i in range(4)]
    config = types.SimpleNamespace(
        list_physical_devices=lambda kind: {"GPU": gpus, "CPU": ["cpu"]}[kind], LogicalDeviceConfiguration=lambda: "logical",
        set_visible_devices=lambda devices, kind: told.update({kind: devices}),
        set_logical_device_configuration=lambda cpu, devices: told.update({cpu: devices}),
        experimental=types.SimpleNamespace(set_memory_growth=lambda gpu, _: told.setdefault("grow", []).append(gpu)))
    monkeypatch.setattr(distribute, "tf", types.SimpleNamespace(config=config))
    return told


@pytest.mark.parametrize("choice, names, told", [
    ("auto", ["GPU:0", "GPU:1", "GPU:2", "GPU:3"], {"grow": ["gpu 0", "gpu 1", "gpu 2", "gpu 3"]}),
    ("2", ["GPU:0", "GPU:1"], {"GPU": ["gpu 0", "gpu 1"], "grow": ["gpu 0", "gpu 1"]}),
    ("GPU:3,GPU:1", ["GPU:0", "GPU:1"], {"GPU": ["gpu 3", "gpu 1"], "grow": ["gpu 3", "gpu 1"]}),
    ("cpu", ["CPU:0"], {"GPU": []}),
    ("CPU:0,CPU:1", ["CPU:0", "CPU:1"], {"GPU": [], "cpu": ["logical", "logical"]})])
def test_only_the_chosen_devices_are_shown_to_tensorflow(machine, choice, names, told):
    assert distribute.prepare_devices(choice) == names
    assert machine == told


@pytest.mark.parametrize("choice", ["5", "GPU:4", "CPU:1"])
def test_devices_that_are_not_there_are_refused(machine, choice):
    with pytest.raises(OasisError, match=f"--devices {choice}"):
        distribute.prepare_devices(choice)


@pytest.mark.parametrize("replicas, accumulate, take", [(3, 1, "15 or 18"), (4, 3, "12 or 24"), (32, 1, "32")])
def test_a_batch_that_devices_cannot_share_is_refused(replicas, accumulate, take):
    train.check_batch_size(types.SimpleNamespace(batch_size=16, accumulate=4), 4)
    flags = types.SimpleNamespace(batch_size=16, accumulate=accumulate)
    with pytest.raises(OasisError, match=f"--batch-size 16 .* take {take}$"):
        train.check_batch_size(flags, replicas)


# ------------------------------------------------------------------------------------------------------------- cluster

def test_without_others_there_is_no_cluster():
    alone = '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}'
    for environment in ({}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, {"TF_CONFIG": alone}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}):
        assert distribute.find_cluster(environment) == ([], 0)


def test_a_chief_in_tf_config_comes_before_the_workers():
    config = {"cluster": {"worker": ["b:2", "c:3"], "chief": ["a:1"]}, "task": {"type": "worker", "index": 1}}
    assert distribute.find_cluster({"TF_CONFIG": json.dumps(config)}) == (["a:1", "b:2", "c:3"], 2)
    config["task"] = {"type": "chief", "index": 0}
    assert distribute.find_cluster({"TF_CONFIG": json.dumps(config)}) == (["a:1", "b:2", "c:3"], 0)


@pytest.mark.parametrize("text", [
    "{", "[]", '{"cluster": {"worker": ["a:1", "b:2"]}}', tf_config(["a:1", "b:2"], 2), tf_config(["a:1", "b:2"], -1), tf_config(["a", "b:2"], 0),
    tf_config(["a:1", "a:1"], 0), '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "ps", "index": 0}}'])
def test_a_tf_config_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(OasisError, match="TF_CONFIG cannot be used") as error:
        distribute.find_cluster({"TF_CONFIG": text})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("node, local, index", [("n2", "0", 4), ("n2", "1", 5), ("n10", "1", 3), ("n1", "0", 0)])
def test_slurms_variables_give_the_cluster_whatever_the_order_of_ranks(monkeypatch, node, local, index):
    for name, value in {"STEP_NUM_TASKS": "6", "STEP_NODELIST": "n[1-2,10]", "STEP_TASKS_PER_NODE": "2(x3)", "PROCID": "0", "JOB_ID": "40017",
                        "LOCALID": local}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", node)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    expected = [f"{host}:{port}" for host in ("n1", "n10", "n2") for port in (10017, 10018)]
    assert distribute.find_cluster() == (expected, index)
    monkeypatch.setenv("SLURMD_NODENAME", "elsewhere")
    with pytest.raises(OasisError, match="SLURM"):
        distribute.find_cluster()


# ------------------------------------------------------------------------------------------------------------- workers

@pytest.fixture
def together(monkeypatch):
    """together(work, count, timeout, facts): a list of what work(workers) returned or raised on each of `count` workers,
    threads of this process without TensorFlow's servers. facts(index) gives theirs; work None is a worker that never comes."""
    monkeypatch.setattr(distribute, "start_servers", lambda *_: None)
    monkeypatch.setattr(distribute.threading, "Timer", lambda *_: types.SimpleNamespace(start=lambda: None, cancel=lambda: None))
    place = threading.local()
    monkeypatch.setattr(distribute, "find_cluster", lambda: (place.addresses, place.index))

    def run(works, timeout=20, facts=lambda index: {}, addresses=None):
        addresses = addresses or free_addresses(len(works))
        results = [None] * len(works)

        def one(index):
            place.addresses, place.index = addresses, index
            try:
                with distribute.Workers(["CPU:0"], timeout, facts(index)) as workers:
                    results[index] = works[index](workers)
            except Exception as error:
                results[index] = error
        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index, work in enumerate(works) if work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results
    return run


def test_every_worker_hears_what_each_one_says(together):
    assert together([lambda workers: workers.exchange(workers.index * 10)] * 3) == [[0, 10, 20]] * 3


def test_the_smallest_count_and_any_signal_count_for_all(together):
    def work(workers):
        stop = types.SimpleNamespace(number=15 if workers.index == 2 else None)
        return workers.agree(types.SimpleNamespace(number=None), 7 - workers.index), workers.agree(stop, 1), stop.number
    assert together([work] * 3) == [(5, 1, 15)] * 3


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_worker_that_never_comes_is_named_in_time(together, absent):
    addresses = free_addresses(3)
    errors = together([None if index == absent else lambda workers: "came" for index in range(3)], timeout=1, addresses=addresses)
    named = [str(error) for index, error in enumerate(errors) if index != absent]
    assert all(isinstance(error, OasisError) for index, error in enumerate(errors) if index != absent)
    assert any(f"worker {absent} ({addresses[absent]})" in text and "within 1 seconds (--worker-timeout" in text for text in named)


def test_other_settings_code_or_data_are_named_on_every_worker(together):
    work = [lambda workers: workers.check_facts(slices=workers.index // 2)] * 3
    facts = {"": {"--dim": 64, "--loss": "l2"}, "code": {"train.py": "ab"}}
    for index, text in enumerate(map(str, together(work, facts=lambda index: facts))):
        assert "worker 2 (" in text and "slices 1, worker 0 has 0" in text
    for other, words in (({"": {"--dim": 32, "--loss": "l2"}, "code": {"train.py": "ab"}}, "--dim 32, worker 0 has 64"),
                         ({**facts, "code": {"train.py": "cd"}}, "code train.py cd, worker 0 has ab"),
                         ({**facts, "code": {}}, "code train.py None, worker 0 has ab")):
        errors = together(work, facts=lambda index: other if index == 1 else facts)
        assert all(isinstance(error, OasisError) and "worker 1 (" in str(error) and words in str(error) for error in errors)


def test_what_one_worker_fails_with_is_what_all_report(together):
    def work(workers):
        if workers.index == 1:
            raise OasisError("no space left")
        return workers.exchange("fine")
    addresses = free_addresses(3)
    errors = [str(error) for error in together([work] * 3, addresses=addresses)]
    assert errors == [f"worker 1 ({addresses[1]}): no space left", "no space left", f"worker 1 ({addresses[1]}): no space left"]


def test_a_worker_that_does_not_answer_is_named_in_time(together):
    silence = threading.Event()

    def work(workers):
        return silence.wait(30) if workers.index else workers.exchange("fine")

    def chief(workers):
        try:
            return work(workers)
        finally:
            silence.set()
    error, _ = together([chief, work], timeout=1)
    assert "worker 1 (" in str(error) and "did not answer within 1 seconds" in str(error)


def test_a_port_in_use_is_refused_at_once(together):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        _, error = together([None, lambda workers: "came"], addresses=["127.0.0.1:1", f"127.0.0.1:{port}"])
    assert f"port {port}" in str(error) and "Address already in use" in str(error)


def test_what_is_not_a_worker_is_not_counted_as_one(together):
    addresses = free_addresses(2)

    def stranger():
        connection = distribute.connect(addresses[0], distribute.time.monotonic() + 20, 20)
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # refused; only then worker 1 comes
        return together([None, lambda workers: workers.exchange(1)], addresses=addresses)[1]

    answer = []
    thread = threading.Thread(target=lambda: answer.append(stranger()))
    thread.start()
    assert together([lambda workers: workers.exchange(0), None], addresses=addresses)[0] == [0, 1]
    thread.join(60)
    assert answer == [[0, 1]]
