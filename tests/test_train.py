"""train.py: the step, exact resume, interruptions, refusals. The loop is tested on a network that is traced in a moment."""
import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import train
from common import OasisError
from modules import UNet, best_precision, initialize, load_model, named_variables, read_model, save_model

ROOT = Path(train.__file__).parent


class OneConvolution(tf.keras.Model):
    """Stands in for the U-Net where a test is about the loop: tracing the U-Net takes ten seconds."""

    def __init__(self, image_size, dim, patch_size, pixel_width, precision, seed):
        super().__init__()
        self.image_size, self.dim, self.patch_size, self.pixel_width = image_size, dim, patch_size, pixel_width
        self.convolution = tf.keras.layers.Conv2D(1, 3, padding="same")
        self.time = tf.keras.layers.Dense(1)
        self(tf.zeros([1, 8, 8, 1]), tf.zeros([1], tf.int32))
        initialize(self, seed)

    @property
    def settings(self):
        return dict(image_size=self.image_size, dim=self.dim, patch_size=self.patch_size, pixel_width=self.pixel_width)

    def call(self, x, t):
        return self.convolution(x) + self.time(tf.cast(t, tf.float32)[:, None] / 100)[:, None, None]


@pytest.fixture
def tiny(make_zip, tmp_path, monkeypatch):
    """Flags of a run on 24 slices at 16 pixels, three steps an epoch, in tmp_path/checkpoint; in this process the network
    is OneConvolution."""
    monkeypatch.setattr(train, "UNet", OneConvolution)
    monkeypatch.setattr(train, "SAMPLE_STEPS", 2)
    make_zip(subjects=range(100, 103), slices=range(4), size=32, split="validate")
    path = make_zip(subjects=range(6), slices=range(4), size=32)
    return ["--path", str(path), "--ckpt-path", str(tmp_path / "checkpoint"), "--image-size", "16", "--dim", "16",
            "--batch-size", "8", "--timesteps", "100", "--number-of-samples", "0", "--precision", "float32"]


@pytest.fixture
def unet(tiny, monkeypatch):
    """tiny, with a U-Net of one level."""
    monkeypatch.setattr(train, "UNet", functools.partial(UNet, dim_mults=(1,)))
    return tiny


def trainer_of(tiny, *more):
    return train.Trainer(train.parse_flags([*tiny, *more]), "float32")


def a_batch(count=8, seed=0):
    return tf.constant(np.random.default_rng(seed).uniform(-1, 1, [count, 16, 16, 1]), tf.float32)


def state_of(folder):
    """Every tensor of the newest state in a run's folder, by name; but the record, which says how long the steps took."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder / "state")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
            if not any(part in name for part in ("save_counter", "CHECKPOINTABLE", "record"))}


def same_state(a, b):
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    for part in ("network/", "ema/", "optimizer/means/", "optimizer/squares/", "optimizer/steps/", "step/"):
        assert any(name.startswith(part) for name in a), part
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different, different[:5]


# train.py in a process of its own, with a U-Net of one level.
SMALL_TRAIN = [sys.executable, "-c", """
import functools, train
train.UNet = functools.partial(train.UNet, dim_mults=(1,))
train.SAMPLE_STEPS = 2
train.run_script(train.main)
"""]


def run_in_new_process(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


# ------------------------------------------------------------------------------------------------------------- flags

def test_every_constant_is_the_default_of_its_flag():
    flags = vars(train.parse_flags([]))
    names = "path number-of-samples image-size ckpt-path epochs batch-size max-steps learning-rate loss timesteps dim patch-size " \
            "objective ema-decay accumulate precision seed restart demo recipe".split()
    for name in names:
        assert flags[name.replace("-", "_")] == getattr(train, name.upper().replace("-", "_")), name
    assert (flags["path"], flags["number_of_samples"], flags["image_size"]) == ("./dataset/keras_png_slices_data.zip", 2000, 128)
    assert (flags["ckpt_path"], flags["epochs"], flags["batch_size"], flags["learning_rate"]) == ("./checkpoint", 30, 16, 1e-4)


def test_a_given_flag_wins_over_recipe_and_demo():
    assert train.parse_flags(["--recipe", "recommended", "--image-size", "256"]).patch_size == 4
    assert train.parse_flags(["--recipe", "recommended", "--image-size", "256", "--patch-size", "2"]).patch_size == 2
    recommended = train.parse_flags(["--recipe", "recommended"])
    assert (recommended.objective, recommended.times, recommended.flips) == ("x_start", "lognormal", 0.5)
    assert train.parse_flags(["--recipe", "recommended", "--objective", "v"]).objective == "v"
    assert train.parse_flags(["--recipe", "recommended", "--flips", "0"]).flips == 0
    demo = train.parse_flags(["--demo", "--dim", "48"])
    assert demo.dim == 48 and demo.objective == "x_start" and demo.path.endswith("sample_slices.zip")


@pytest.mark.parametrize("flag, value", [
    ("--batch-size", "0"), ("--batch-size", "1.5"), ("--image-size", "-64"), ("--learning-rate", "nan"), ("--learning-rate", "0"),
    ("--epochs", "many"), ("--loss", "l3"), ("--ema-decay", "1.5"), ("--seed", str(2**63)), ("--batchsize", "4"), ("--dim", "8")])
def test_a_flag_out_of_range_is_refused_by_name(flag, value):
    with pytest.raises(OasisError, match=flag):
        train.parse_flags([flag, value])


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(OasisError, match="--accumulate 3"):
        train.parse_flags(["--batch-size", "16", "--accumulate", "3"])


# -------------------------------------------------------------------------------------------------------------- step

def test_a_step_is_a_function_of_seed_and_step_alone(tiny):
    losses = []
    for more in ([], [], ["--seed", "1"]):
        trainer = trainer_of(tiny, *more)
        trainer.step.assign(7)
        losses.append(trainer.update(a_batch())[0].numpy())
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.allclose(losses[0], losses[2])


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_every_t_is_trained_as_often_as_its_flag_says(tiny, times):
    trainer = trainer_of(tiny, "--timesteps", "8", "--times", times)
    drawn = np.concatenate([trainer.update(a_batch())[1].numpy() for _ in range(40)])
    expected = 320 * trainer.diffusion.training_times(times)
    assert drawn.min() == 0 and drawn.max() <= 7
    assert np.all(abs(np.bincount(drawn, minlength=8) - expected) <= 4 * np.sqrt(expected))


def test_a_quarter_of_t_that_no_picture_fell_in_has_no_loss():
    totals = train.Totals()
    totals.add(np.array([3.0, 2.0, 0.0, 0.0]), np.array([4.0, 2.0, 2.0, 0.0]), 1.0, 0, 1, 8, 1.0)
    row = totals.row()
    assert [row[f"loss_t{i}"] for i in (1, 2, 3)] == [0.75, 1.0, 0.0] and np.isnan(row["loss_t4"]) and row["loss"] == 0.625


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny):
    images, t = a_batch(), tf.constant([0, 3, 10, 30, 50, 70, 90, 99])
    noise = tf.random.stateless_normal(images.shape, [1, 2])
    results = []
    for parts in ("1", "4"):
        trainer = trainer_of(tiny, "--accumulate", parts)
        results.append(tf.function(trainer.accumulated_gradients)(images, t, noise))
    (losses, gradients), (part_losses, part_gradients) = results
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    largest = max(float(tf.reduce_max(tf.abs(gradient))) for gradient in gradients)
    assert largest > 0
    for gradient, part_gradient in zip(gradients, part_gradients):
        np.testing.assert_allclose(part_gradient, gradient, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.slow
def test_micro_batches_of_the_full_network_train_on_in_a_second_call():
    """Grappler's memory optimizer, which leaves small graphs alone, would make it find the temporary variables of the first."""
    trainer = train.Trainer(train.parse_flags(["--image-size", "64", "--batch-size", "32", "--accumulate", "4"]), best_precision())
    batches = iter(tf.data.Dataset.from_tensors(tf.zeros([32, 64, 64, 1])).repeat())
    assert [trainer.run(batches, tf.constant(count), tf.constant(0))[3] for count in (1, 2)] == [0, 0]


@pytest.mark.parametrize("decay_after", [0, 2])
def test_adam_is_algorithm_1_of_the_paper(decay_after):
    rng = np.random.default_rng(0)
    weights = [tf.Variable(rng.standard_normal(shape).astype(np.float32)) for shape in ([3, 5], [7])]
    adam = train.Adam(weights, 0.01, decay_after)
    expected = [[weight.numpy().astype(np.float64), 0.0, 0.0] for weight in weights]
    for step in range(1, 6):
        gradients = [rng.standard_normal(weight.shape).astype(np.float32) for weight in weights]
        adam.apply(gradients, 0.5)
        learning_rate = 0.01 / np.sqrt(step / 2) if decay_after and step > 2 else 0.01
        for state, gradient in zip(expected, gradients):
            weight, mean, square = state
            mean = 0.9 * mean + 0.1 * (0.5 * gradient)
            square = 0.999 * square + 0.001 * (0.5 * gradient.astype(np.float64))**2
            weight = weight - learning_rate * (mean / (1 - 0.9**step)) / np.sqrt(square / (1 - 0.999**step))
            state[:] = weight, mean, square
    for weight, (value, _, _) in zip(weights, expected):
        np.testing.assert_allclose(weight, value, atol=1e-6)


@pytest.mark.parametrize("size, scale", [(1.0, 1.0), (1.0, 1024.0), (0.01, 1.0)])
def test_gradients_are_clipped_to_norm_1_whatever_the_loss_scale(tiny, size, scale):
    trainer = trainer_of(tiny, "--objective", "x_start")
    trainer.loss_scale = scale
    *_, norm = trainer.update(size * tf.ones([8, 16, 16, 1]))
    assert (norm > 2) == (size == 1.0)  # what is reported is the norm before
    np.testing.assert_allclose(tf.linalg.global_norm(trainer.optimizer.means), 0.1 * min(1.0, float(norm)), rtol=1e-4)


def test_ema_follows_the_weights_with_a_warm_up(tiny):
    trainer = trainer_of(tiny)
    expected = [weight.numpy().astype(np.float64) for weight in trainer.ema_weights]
    for step in range(3):
        trainer.update(a_batch())
        decay = min(0.999, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * weight.numpy() for old, weight in zip(expected, trainer.weights)]
    for average, value in zip(trainer.ema_weights, expected):
        np.testing.assert_allclose(average, value, atol=1e-7)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tiny):
    trainer = trainer_of(tiny)
    before = [variable.numpy() for variable in (*trainer.weights, *trainer.ema_weights)]
    bad = a_batch().numpy()
    bad[3, 5, 5] = np.nan
    *_, skipped, bad_steps = trainer.run(iter(tf.data.Dataset.from_tensors(bad).repeat()), tf.constant(3), tf.constant(4))
    assert int(skipped) == 3 and int(bad_steps) == 7 and int(trainer.step) == 3
    for old, variable in zip(before, (*trainer.weights, *trainer.ema_weights)):
        np.testing.assert_array_equal(old, variable.numpy())
    *_, bad_steps = trainer.run(iter(tf.data.Dataset.from_tensors(a_batch()).repeat()), tf.constant(1), bad_steps)
    assert int(bad_steps) == 0


def test_many_steps_trace_once(tiny):
    trainer = trainer_of(tiny)
    traces = []
    accumulated_gradients = trainer.accumulated_gradients
    trainer.accumulated_gradients = lambda *arguments: traces.append(1) or accumulated_gradients(*arguments)
    batches = iter(tf.data.Dataset.from_tensors(a_batch()).repeat())
    bad_steps = tf.constant(0)
    for count in (1, 2, 5):
        *_, bad_steps = trainer.run(batches, tf.constant(count), bad_steps)
    assert int(trainer.step) == 8
    assert len(traces) <= 2  # the loop's body is traced a second time where its variables' shapes are settled


def test_the_step_compiles_under_xla(unet):
    trainer, other = trainer_of(unet), trainer_of(unet)
    losses, t, norm = trainer.update(a_batch())
    compiled = tf.function(functools.partial(train.Trainer.update, other), jit_compile=True, autograph=False)
    xla_losses, xla_t, xla_norm = compiled(a_batch())
    np.testing.assert_array_equal(xla_t, t)
    np.testing.assert_allclose(xla_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(xla_norm, norm, rtol=1e-3)


def test_training_learns(tiny):
    trainer = trainer_of(tiny, "--learning-rate", "0.03", "--objective", "x_start")
    batches = iter(tf.data.Dataset.from_tensors(tf.zeros([8, 16, 16, 1]) + 0.5).repeat())
    losses = []
    for _ in range(2):
        loss_sums, counts, *_ = trainer.run(batches, tf.constant(30), tf.constant(0))
        losses.append(float(tf.reduce_sum(loss_sums) / tf.reduce_sum(counts)))
    assert losses[1] < losses[0] / 4


# --------------------------------------------------------------------------------------------------------------- run

def test_a_run_leaves_what_the_readme_says(unet, tmp_path, capsys):
    assert train.main([*unet, "--epochs", "5"]) == 0
    folder = tmp_path / "checkpoint" / "oasis16"
    assert str(folder / "model.safetensors") in capsys.readouterr().out
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12, 15]
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert all(0 < float(row["gradient_norm"]) < 100 for row in rows)  # of a step, not of all of them together
    network, diffusion, settings = load_model(folder / "model.safetensors")
    assert (network.image_size, diffusion.timesteps, settings["step"], settings["images"]) == (16, 100, 15, 120)
    assert Image.open(folder / "loss.png").size[0] > 600
    picture = np.asarray(Image.open(folder / "samples" / "step_0000015.png"))
    assert picture.shape == (2 * 16, 4 * 16) and picture.std() > 0
    assert list((folder / "events").glob("events.*"))


def test_the_model_file_holds_the_averaged_weights(tiny, tmp_path):
    train.main([*tiny, "--max-steps", "4"])
    folder = tmp_path / "checkpoint" / "oasis16"
    kernel = read_model(folder / "model.safetensors")[0]["convolution.kernel"]
    kernels = {name: value for name, value in state_of(folder).items() if value.shape == kernel.shape}
    equal = [name.split("/")[0] for name, value in kernels.items() if np.array_equal(kernel, value)]
    assert equal == ["ema"] and any("network" in name or "optimizer/weights" in name for name in kernels)


def test_a_run_starts_from_a_model_that_is_given_and_goes_on_without_it(unet, tmp_path):
    network, file = train.UNet(16, dim=16, seed=5), tmp_path / "start.safetensors"
    save_model(file, network, dict(network.settings, timesteps=100, objective="noise"))
    command = [*unet, "--learning-rate", "1e-9"]
    train.main([*command, "--initial-model", str(file), "--max-steps", "1"])
    file.unlink()
    train.main([*command, "--max-steps", "2"])
    weights, settings = read_model(tmp_path / "checkpoint" / "oasis16" / "model.safetensors")
    assert settings["step"] == 2
    for name, variable in named_variables(network):
        np.testing.assert_allclose(weights[name], variable, atol=1e-7)


@pytest.mark.parametrize("more", [[], ["--accumulate", "2", "--precision", "bfloat16"]], ids=["float32", "accumulate-bfloat16"])
def test_a_run_that_is_resumed_twice_is_bit_equal_to_an_uninterrupted_one(tiny, tmp_path, more):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*tiny, *more, "--ckpt-path", str(whole), "--max-steps", "7"])
    for steps in ("2", "5", "7"):
        train.main([*tiny, *more, "--ckpt-path", str(parts), "--max-steps", steps])
    same_state(whole / "oasis16", parts / "oasis16")
    (weights, settings), (part_weights, part_settings) = (read_model(path / "oasis16" / "model.safetensors") for path in (whole, parts))
    assert {**settings, "max_steps": 0} == {**part_settings, "max_steps": 0}
    for name in weights:
        np.testing.assert_array_equal(weights[name], part_weights[name])


@pytest.mark.slow
def test_a_run_resumed_in_a_new_process_is_bit_equal_to_an_uninterrupted_one(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path, steps in ((whole, "5"), (parts, "3"), (parts, "5")):
        assert run_in_new_process([*SMALL_TRAIN, *tiny, "--ckpt-path", str(path), "--max-steps", steps], cwd=ROOT).returncode == 0
    same_state(whole / "oasis16", parts / "oasis16")
    assert len({(path / "oasis16" / "model.safetensors").read_bytes() for path in (whole, parts)}) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(tiny, tmp_path, number, status):
    command = [*SMALL_TRAIN, *tiny, "--max-steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:  # ends when the process does
            if line.startswith("run: "):
                break
        while "images/s" not in process.stderr.read(1) + process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status and "saved at step" in errors and "Traceback" not in errors
    folder = tmp_path / "checkpoint" / "oasis16"
    step = read_model(folder / "model.safetensors")[1]["step"]
    assert step > 0
    again = run_in_new_process([*SMALL_TRAIN, *tiny, "--max-steps", str(step + 1)], cwd=ROOT)
    assert again.returncode == 0 and f"steps {step:,} to {step + 1:,}" in again.stdout


@pytest.mark.parametrize("more, words", [([], "folds 2×2 pixels into channels: about 1/4"), (["--patch-size", "2"], "")])
def test_the_original_recipe_says_what_the_recommended_one_would_save(tiny, capsys, more, words):
    train.main([*tiny, "--image-size", "128", "--max-steps", "1", *more])
    out = capsys.readouterr().out
    assert words in out and ("--recipe recommended" in out) == bool(words)


# ---------------------------------------------------------------------------------------------------------- refusals

def test_other_settings_are_refused_by_name_and_nothing_changes(tiny, tmp_path):
    train.main([*tiny, "--max-steps", "2"])
    folder = tmp_path / "checkpoint" / "oasis16"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OasisError, match=r"--learning-rate 0.0001, not 0.01") as error:
        train.main([*tiny, "--max-steps", "4", "--learning-rate", "0.01"])
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_restart_starts_over_and_keeps_the_old_run(tiny, tmp_path):
    train.main([*tiny, "--max-steps", "2"])
    folder = tmp_path / "checkpoint" / "oasis16"
    old = (folder / "model.safetensors").read_bytes()
    train.main([*tiny, "--max-steps", "1", "--restart", "--seed", "5"])
    assert read_model(folder / "model.safetensors")[1]["step"] == 1
    assert (folder.with_name("oasis16.old-1") / "model.safetensors").read_bytes() == old


def test_a_second_training_in_the_same_folder_is_refused(tiny):
    with train.Run(train.parse_flags(tiny)):
        with pytest.raises(OasisError, match="another training is at work"):
            train.main([*tiny, "--max-steps", "1"])


def test_a_damaged_state_gives_way_to_the_one_before_and_two_stop_the_run(tiny, tmp_path, capsys):
    train.main([*tiny, "--max-steps", "6"])  # saves at 3 and 6
    state = tmp_path / "checkpoint" / "oasis16" / "state"
    newest = state / "ckpt-6.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[:1000])
    train.main([*tiny, "--max-steps", "4"])
    out = capsys.readouterr().out
    assert str(state / "ckpt-6") in out and "steps 3 to 4" in out
    for path in state.glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(OasisError, match="--restart"):
        train.main([*tiny, "--max-steps", "5"])


def test_a_run_without_its_state_is_not_started_over_silently(tiny, tmp_path):
    train.main([*tiny, "--max-steps", "1"])
    shutil.rmtree(tmp_path / "checkpoint" / "oasis16" / "state")
    with pytest.raises(OasisError, match="no state to continue from"):
        train.main([*tiny, "--max-steps", "2"])


def test_a_folder_that_cannot_be_written_is_refused_by_name(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OasisError, match="cannot write .*file"):
        train.main([*tiny, "--ckpt-path", str(tmp_path / "file" / "runs")])


def test_a_loss_that_is_never_finite_stops_the_run_with_advice(tiny, monkeypatch):
    monkeypatch.setattr(train, "make_dataset", lambda *_: tf.data.Dataset.from_tensors(tf.fill([8, 16, 16, 1], np.nan)).repeat())
    with pytest.raises(OasisError, match="--learning-rate or --precision float32"):
        train.main([*tiny, "--max-steps", "200"])


def test_a_full_disk_stops_the_run_and_keeps_the_last_state(tiny, tmp_path, monkeypatch):
    train.main([*tiny, "--max-steps", "3"])
    folder = tmp_path / "checkpoint" / "oasis16"
    model = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OasisError, match="No space left on device"):
        train.main([*tiny, "--max-steps", "6"])
    assert (folder / "model.safetensors").read_bytes() == model
    assert not list(folder.glob(".model*"))


def test_out_of_memory_names_the_flag_that_helps(tiny, monkeypatch):
    def exhausted(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
    monkeypatch.setattr(train.Trainer, "run", exhausted)
    with pytest.raises(OasisError, match="--accumulate 2"):
        train.main([*tiny, "--max-steps", "1"])


@pytest.mark.parametrize("arguments, words", [
    (["--path", "nowhere.zip"], "nowhere.zip"),
    (["--image-size", "100"], "96 and 104"),
    (["--image-size", "129", "--patch-size", "4"], "128 and 160"),
    (["--pixel-width", "12"], "--pixel-width 12 is not a multiple of 8"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, words):
    result = run_in_new_process([sys.executable, str(ROOT / "train.py"), *arguments, "--ckpt-path", str(tmp_path)], cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_settings_are_those_of_the_flags(tiny, tmp_path):
    train.main([*tiny, "--max-steps", "1", "--objective", "v"])
    settings = json.loads((tmp_path / "checkpoint" / "oasis16" / "settings.json").read_text())
    assert settings["objective"] == "v" and settings["batch_size"] == 8 and settings["timesteps"] == 100
