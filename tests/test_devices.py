"""oasis/devices.py, oasis/replicas.py: which devices are chosen; several generate and train the same as one.

TensorFlow's devices cannot change after its start, so tests of two devices start a new process. Others use "CPU:0" and
"/CPU:0", two names of one device, as if they were two devices.
"""
import os
import platform
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import test_util

import predict
import train
from gaussian import gaussian_denoiser
from helpers import PROGRAMS, ROOT, WORKER, kernel_has_moved, run_in_new_process, same_training, write_small_model
from modules import GaussianDiffusion, UNet, load_model
from oasis import devices, fused, generate, replicas
from oasis.files import OasisError

TWO_NAMES = ["CPU:0", "/CPU:0"]


# ------------------------------------------------------------------------------------------------------- selection

@pytest.mark.parametrize("text, value", [("AUTO", "auto"), ("cpu", "cpu"), ("4", "4"), ("gpu:0,gpu:2", "GPU:0,GPU:2"),
                                         ("CPU:0", "CPU:0")])
def test_devices_are_named_in_four_ways(text, value):
    assert train.parse_flags(["--devices", text]).devices == predict.parse_flags(["--devices", text]).devices == value


@pytest.mark.parametrize("text", ["0", "-1", "gpu", "GPU:0,CPU:1", "GPU:0,GPU:0", "GPU:", "GPU:0;GPU:1", ""])
def test_other_names_of_devices_are_refused(text):
    with pytest.raises(OasisError, match="--devices"):
        train.parse_flags(["--devices", text])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="TensorFlow has oneDNN only on x86")
def test_tensorflow_uses_onednn():
    assert test_util.IsMklEnabled() == (os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1")  # 0 if the user says so


@pytest.fixture
def machine(monkeypatch):
    """A stand-in for tf.config with four GPUs that records the calls."""
    told = {}
    gpus = [f"gpu {i}" for i in range(4)]
    config = types.SimpleNamespace(
        list_physical_devices=lambda kind: {"GPU": gpus, "CPU": ["cpu"]}[kind],
        set_visible_devices=lambda devices, kind: told.update({kind: devices}),
        set_logical_device_configuration=lambda cpu, devices: told.update({cpu: devices}),
        LogicalDeviceConfiguration=lambda: "logical",
        experimental=types.SimpleNamespace(set_memory_growth=lambda gpu, _: told.setdefault("grow", []).append(gpu)))
    test = types.SimpleNamespace(is_built_with_gpu_support=lambda: True)
    monkeypatch.setattr(devices, "tf", types.SimpleNamespace(config=config, test=test))
    return told


@pytest.mark.parametrize("choice, names, told", [
    ("auto", ["GPU:0", "GPU:1", "GPU:2", "GPU:3"], {"grow": ["gpu 0", "gpu 1", "gpu 2", "gpu 3"]}),
    ("2", ["GPU:0", "GPU:1"], {"GPU": ["gpu 0", "gpu 1"], "grow": ["gpu 0", "gpu 1"]}),
    ("GPU:3,GPU:1", ["GPU:0", "GPU:1"], {"GPU": ["gpu 3", "gpu 1"], "grow": ["gpu 3", "gpu 1"]}),
    ("cpu", ["CPU:0"], {"GPU": []}),
    ("CPU:0,CPU:1", ["CPU:0", "CPU:1"], {"GPU": [], "cpu": ["logical", "logical"]})])
def test_only_the_chosen_devices_are_shown_to_tensorflow(machine, choice, names, told):
    assert devices.prepare_devices(choice) == names
    assert machine == told


def test_gpus_without_xla_are_hidden(machine, monkeypatch):
    monkeypatch.setattr(devices.tf.test, "is_built_with_gpu_support", lambda: False)
    assert devices.prepare_devices("auto") == ["CPU:0"] and machine == {"GPU": []}


@pytest.mark.parametrize("choice", ["5", "GPU:4", "CPU:1"])
def test_devices_that_are_not_there_are_refused(machine, choice):
    with pytest.raises(OasisError, match=f"--devices {choice}"):
        devices.prepare_devices(choice)


@pytest.mark.parametrize("count, accumulate, take", [(3, 1, "15 or 18"), (4, 3, "12 or 24"), (32, 1, "32")])
def test_a_batch_that_devices_cannot_share_is_refused(count, accumulate, take):
    replicas.check_batch_size(16, accumulate=4, replicas=4)
    with pytest.raises(OasisError, match=f"--batch-size 16 .* take {take}$"):
        replicas.check_batch_size(16, accumulate, count)


# ------------------------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("capabilities, precision", [
    ([(8, 0)], "bfloat16"), ([(9, 0), (8, 6)], "bfloat16"), ([(7, 5)], "float16"), ([(9, 0), (7, 0)], "float16"),
    ([(6, 1)], "float32"), ([(9, 0), None], "float32")])
def test_auto_is_a_precision_that_all_gpus_are_fast_in(monkeypatch, capabilities, precision):
    details = {f"gpu {i}": {"compute_capability": pair} if pair else {} for i, pair in enumerate(capabilities)}
    config = types.SimpleNamespace(get_visible_devices=lambda kind: list(details) if kind == "GPU" else ["cpu"],
                                   experimental=types.SimpleNamespace(get_device_details=details.get))
    monkeypatch.setattr(devices, "tf", types.SimpleNamespace(config=config))
    assert devices.resolve_precision("auto") == precision
    assert devices.use_xla()


@pytest.mark.parametrize("cpuinfo, precision", [
    ("flags : fpu avx512_bf16 sse", "bfloat16"), ("flags : amx_bf16", "bfloat16"),
    ("flags : fpu avx512f avx_bf16_not", "float32"), (None, "float32")])
def test_auto_on_a_cpu_asks_its_instruction_set(monkeypatch, tmp_path, cpuinfo, precision):
    file = tmp_path / "cpuinfo"
    if cpuinfo:
        file.write_text(cpuinfo)
    monkeypatch.setattr(devices, "open", lambda name, **options: open(file, **options), raising=False)
    config = types.SimpleNamespace(get_visible_devices=lambda kind: [])
    monkeypatch.setattr(devices, "tf", types.SimpleNamespace(config=config))
    assert devices.resolve_precision("auto") == precision
    assert not devices.use_xla()


@pytest.mark.parametrize("precision", devices.PRECISIONS)
def test_a_precision_that_is_given_is_taken(precision):
    assert devices.resolve_precision(precision) == precision


# -------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("frames", [0, 3])
def test_several_devices_make_the_images_of_one(frames):
    """Each device has a network and a thread of its own. The batch need not be a multiple of the number of devices."""
    diffusion, seeds, names = GaussianDiffusion(1000), [3, 1, 4, 1, 5], [*TWO_NAMES, "cpu:0"]
    networks = {name: gaussian_denoiser(0.25) for name in names}
    made = generate.sample_on_devices(diffusion, networks, (5, 4, 4, 1), seeds, "dpm", 4, frames=frames, eta=0.5)
    alone = diffusion.sample(gaussian_denoiser(0.25), (5, 4, 4, 1), seeds, "dpm", 4, frames=frames, eta=0.5)
    for parts, part in zip(made, alone) if frames else [(made, alone)]:
        assert parts.shape == part.shape
        np.testing.assert_allclose(parts, part, atol=1e-6)
    assert diffusion.sampling_loop.cache_info().currsize == len(names) + 1


def test_each_device_gets_its_rows_of_the_condition():
    diffusion, cond = GaussianDiffusion(1000, "x_start"), tf.constant([[0.1], [0.2], [0.3]])
    networks = {name: lambda x, t, cond: cond[:, None, None] + tf.zeros_like(x) for name in TWO_NAMES}
    made = generate.sample_on_devices(diffusion, networks, (3, 4, 4, 1), [0, 1, 2], "dpm", 2, cond=cond)
    np.testing.assert_allclose(made, np.broadcast_to(cond[:, None, None], made.shape), atol=1e-6)


def test_a_long_job_runs_on_frozen_networks(tmp_path, monkeypatch):
    """Each of two devices has a frozen network, which generates the same images."""
    names = TWO_NAMES
    model, frozen, freeze = write_small_model(tmp_path / "model.safetensors", (1,)), [], fused.frozen
    monkeypatch.setattr(fused, "frozen", lambda network: frozen.append(network) or freeze(network))
    monkeypatch.setattr(generate, "FREEZE_FROM", 100)
    networks, diffusion, _ = generate.load_on_devices(lambda: load_model(model), names)
    assert list(networks) == names and len(set(map(id, networks.values()))) == len(names)

    def images(count):
        batches = predict.generate(networks, diffusion, range(count), steps=20, batch_size=2)
        return np.concatenate([images for _, images, _ in batches])
    short = images(8)   # calls the network 80 times
    assert not frozen
    long = images(10)   # calls it 100 times
    assert frozen == list(networks.values())
    np.testing.assert_array_equal(long[:8], short)


def test_a_model_file_that_changes_while_it_is_loaded_gives_all_devices_the_same_parameters():
    biases = iter([1.0, 2.0])

    def load():
        network = UNet(16, dim=16, dim_mults=(1,))
        network.last_conv.bias.assign([next(biases)])
        return network, None, None
    networks, _, _ = generate.load_on_devices(load, TWO_NAMES)
    assert [network.last_conv.bias.numpy() for network in networks.values()] == [1.0, 1.0]


# -------------------------------------------------------------------------------------------------------- training

def as_on_one_device(flags, tmp_path, network):
    """Train on one device and on two. Return (flags, the folder of the run on two devices)."""
    flags = [*flags, "--max-steps", "20", "--save-every", "10", "--learning-rate", "0.003"]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main([*flags, "--ckpt-path", str(one)])
    result = run_in_new_process([*WORKER, *flags, "--ckpt-path", str(two), "--devices", "CPU:0,CPU:1",
                                 "--accumulate", "2"], env={**os.environ, "NETWORK": network}, cwd=ROOT)
    assert result.returncode == 0 and "on the 2 CPUs" in result.stdout, result.stderr
    same_training(one / "oasis16", two / "oasis16")
    return flags, two


def test_two_devices_train_the_parameters_of_one(tiny, tmp_path, capsys):
    """One device also continues a run that two devices have saved."""
    flags, two = as_on_one_device(tiny, tmp_path, "tiny")
    kernel_has_moved(two / "oasis16")
    train.main([*flags, "--ckpt-path", str(two), "--max-steps", "21"])
    assert "steps 20 to 21" in capsys.readouterr().out


@pytest.mark.slow
def test_two_devices_train_a_unet_like_one(unet, tmp_path):
    as_on_one_device(unet, tmp_path, "unet")


@pytest.mark.slow
def test_two_devices_skip_a_bad_step_and_make_equal_images(tiny, tmp_path):
    model = write_small_model(tmp_path / "model.safetensors", (1,))
    predict.main(["--model", str(model), "--precision", "float32", "--sampler", "dpm", "--steps", "4",
                  "--number-of-images", "5", "--samples", str(tmp_path / "one.npy")])
    result = run_in_new_process([sys.executable, str(PROGRAMS / "two_devices.py"), str(tmp_path), *tiny], cwd=ROOT)
    assert result.stdout.endswith("well\n"), result.stderr
    one, two, frozen = (np.load(tmp_path / f"{name}.npy").astype(int) for name in ("one", "two", "frozen"))
    assert one.shape == two.shape == (5, 16, 16, 1) and np.abs(one[4] - one[3]).max() > 20
    assert np.abs(one - two).max() <= 1
    np.testing.assert_array_equal(frozen, two)
