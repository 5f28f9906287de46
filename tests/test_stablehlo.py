"""tools/export_stablehlo.py and tools/run_stablehlo.py: a training and a sampler agree with TensorFlow's."""
import csv
import functools
import json

import numpy as np
import pytest
import tensorflow as tf

jax = pytest.importorskip("jax", reason="JAX is not installed; pip install jax==0.10.2 for these tests")

import train
from dataset import from_uint8
from helpers import awake, trainer_of
from modules import UNet, load_model
from oasis.files import OasisError
from oasis.parameters import named_variables
from tools import export_stablehlo, run_stablehlo

STEPS = 10
SMALL = ["--image-size", "16", "--dim", "16", "--batch-size", "4", "--timesteps", "50", "--precision", "float32"]
TRAINING = [*SMALL, "--number-of-samples", "0", "--condition", "mirror", "--loss-weight", "learned", "--flips", "0.5"]


@pytest.fixture
def small(monkeypatch):
    """Networks of train.py have one level, and random numbers in all parameters."""
    monkeypatch.setattr(train, "UNet", lambda *args, **options: awake(UNet(*args, dim_mults=(1,), **options)))


@pytest.fixture(autouse=True)
def compile_once(tmp_path_factory):
    """XLA keeps what it has compiled: a second `train` of a test takes no time."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    names = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    old = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture
def artifact(small, make_zip, tmp_path):
    """An exported training on 12 slices, with its step and its sampler."""
    path = make_zip(subjects=range(3), slices=range(4), size=16)
    export_stablehlo.main([str(tmp_path / "artifact"), "--programs", "step,sampler", "--sample-batch", "2", "--steps",
                           "3", "--path", str(path), *TRAINING])
    return tmp_path / "artifact"


def run(*arguments):
    run_stablehlo.main([str(argument) for argument in arguments])


def test_ten_steps_and_a_sample_agree_with_tensorflow(artifact, tmp_path):
    folder = tmp_path / "run"
    run("train", artifact, folder, "--max-steps", STEPS // 2, "--steps-per-call", STEPS // 2)
    run("train", artifact, folder, "--max-steps", STEPS, "--steps-per-call", STEPS // 2)  # continues from the files
    trainer, losses = trainer_of(TRAINING), []
    images = np.load(artifact / "images.npz")["images"]
    for rows in run_stablehlo.rows_of(0, STEPS, 4, len(images), seed=0):
        losses.append(float(tf.reduce_mean(trainer.update(from_uint8(images[rows]))[0])))

    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [STEPS // 2, STEPS]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], np.mean(np.reshape(losses, [2, -1]), axis=1),
                               rtol=1e-4)
    network, diffusion, settings = load_model(folder / "model.safetensors")
    assert settings["step"] == STEPS and settings["images"] == 4 * STEPS and settings["condition"] == "mirror"
    assert len(list(named_variables(network))) == len(trainer.ema_parameters)
    for (name, variable), expected in zip(named_variables(network), trainer.ema_parameters):
        np.testing.assert_allclose(variable.numpy(), expected.numpy(), atol=1e-4, err_msg=name)

    run("sample", artifact, tmp_path / "images.npy", "--model", folder, "--number-of-images", 3, "--seed", 5)
    expected = diffusion.sample(network, (3, 16, 16, 1), [5, 6, 7], "dpm", 3, eta=1.0)
    got = from_uint8(np.load(tmp_path / "images.npy"))
    np.testing.assert_allclose(got, expected, atol=0.51 / 127.5 + 1e-3)


def test_the_network_of_a_model_file_is_the_same_with_both_kinds_of_layers(small, tmp_path):
    trainer = trainer_of(SMALL)
    settings = {**trainer.network.settings, **trainer.diffusion.settings}
    train.modules.save_model(tmp_path / "model.safetensors", trainer.network, settings)
    outputs = []
    for plain in ([], ["--plain"]):
        export_stablehlo.main([str(tmp_path / "artifact"), "--model", str(tmp_path / "model.safetensors"), "--programs",
                               "network", *plain, *SMALL])
        artifact = run_stablehlo.Artifact(tmp_path / "artifact")
        x, t = artifact.inputs("network")
        state = [artifact.parameters()[name.removeprefix("parameter/")]
                 for name in artifact.about["programs"]["network"]["state"]]
        outputs.append(np.asarray(artifact.program("network")(x, t, *state)[0]))
    expected = trainer.network(tf.constant(np.asarray(x)), tf.constant(np.asarray(t)))
    np.testing.assert_allclose(outputs, np.stack([expected, expected]), atol=1e-4)


def test_timing_needs_no_parameters_and_no_images(small, tmp_path, capsys):
    export_stablehlo.main([str(tmp_path / "artifact"), "--programs", "network", "--no-parameters", "--no-images",
                           "--condition", "slice,neighbour", *SMALL])
    assert sorted(path.name for path in (tmp_path / "artifact").iterdir()) == ["about.json", "network.stablehlo"]
    capsys.readouterr()
    run("time", tmp_path / "artifact", "--seconds", 0.01)
    figures = json.loads(capsys.readouterr().out)
    assert figures["network"]["images_per_second"] > 0 and figures["network"]["compile_seconds"] > 0


def test_every_image_comes_once_an_epoch_in_another_order():
    rows_of = functools.partial(run_stablehlo.rows_of, batch_size=4, images=6, seed=-1)
    stream = rows_of(0, 6).reshape(4, 6)
    assert (np.sort(stream) == np.arange(6)).all() and len(np.unique(stream, axis=0)) > 1
    np.testing.assert_array_equal(rows_of(2, 3), rows_of(0, 6)[2:5])


def test_a_program_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(OasisError, match="'steps' is not one of step, network, sampler"):
        export_stablehlo.main([str(tmp_path), "--programs", "steps"])
