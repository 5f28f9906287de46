"""A run's folder: the files of a training, exact resume, signals and refusals."""
import csv
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import oasis.run
import train
from helpers import (PROGRAMS, ROOT, SMALL_TRAIN, files_of, losses_of, run_in_new_process, same_state, state_of,
                     trainer_of, write_slices)
from modules import UNet, load_model, save_model
from oasis import modelfile
from oasis.files import FailSafeStream, OasisError, first_line
from oasis.log import StepStats
from oasis.modelfile import read_model
from oasis.parameters import named_variables
from oasis.settings import PRIVATE, RESUMABLE
from oasis.signals import StopSignal


pytestmark = pytest.mark.usefixtures("shared_trainers")


# --------------------------------------------------------------------------------------------------- what a run leaves

def test_a_run_leaves_what_the_readme_says(unet, folder, capsys):
    assert train.main([*unet, "--epochs", "5"]) == 0
    assert str(folder / "model.safetensors") in capsys.readouterr().out
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12, 15]
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert all(0 < float(row["gradient_norm"]) < 100 for row in rows)
    network, diffusion, settings = load_model(folder / "model.safetensors")
    assert (network.image_size, diffusion.timesteps, settings["step"], settings["images"]) == (16, 100, 15, 120)
    plot = np.asarray(Image.open(folder / "loss.png").convert("RGB"))
    assert np.all(plot == (31, 119, 180), axis=2).sum() > 500   # the curve of the training loss, in its colour
    image = np.asarray(Image.open(folder / "samples" / "step_0000015.png"))
    assert image.shape == (2 * 16, 4 * 16) and image.std() > 0
    [events] = (folder / "events").glob("events.*")
    logged = {event.step: float(tf.make_ndarray(value.tensor)) for event in
              tf.compat.v1.train.summary_iterator(str(events)) for value in event.summary.value if value.tag == "loss"}
    assert logged == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows}, rel=1e-5)


def test_samples_have_at_most_as_many_steps_as_timesteps(quick, monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_STEPS", 20)
    folder = quick("--timesteps", "5", "--max-steps", "3")
    assert np.asarray(Image.open(folder / "samples" / "step_0000003.png")).std() > 0


def test_the_model_file_holds_the_ema(quick):
    folder = quick("--max-steps", "4")
    kernel = read_model(folder / "model.safetensors")[0]["convolution.kernel"]
    kernels = {name: value for name, value in state_of(folder).items() if value.shape == kernel.shape}
    equal = [name.split("/")[0] for name, value in kernels.items() if np.array_equal(kernel, value)]
    assert equal == ["ema"]
    assert any("network" in name or "optimizer/parameters" in name for name in kernels)


def test_settings_json_holds_what_a_resumed_run_must_share(quick):
    """The model file holds all settings except the private ones."""
    folder = quick("--max-steps", "1", "--objective", "v")
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["objective"] == "v" and settings["batch_size"] == 8 and settings["timesteps"] == 100
    resumable, private = ({name for name, setting in train.SETTINGS.items() if fact in setting.facts}
                          for fact in (RESUMABLE, PRIVATE))
    assert set(settings) == set(train.SETTINGS) - resumable
    metadata = read_model(folder / "model.safetensors")[1]
    assert set(train.SETTINGS) - set(metadata) == private and metadata["max_steps"] == 1


def test_a_run_starts_from_a_given_model_and_goes_on_without(unet, fast_loop, tmp_path, folder, monkeypatch, capsys):
    network, file = train.UNet(16, dim=16, seed=5), tmp_path / "start.safetensors"
    save_model(file, network, dict(network.settings, timesteps=100, objective="noise", schedule="linear"))
    command = [*unet, "--learning-rate", "1e-9"]
    monkeypatch.setattr(modelfile, "BUNDLED", tmp_path)
    train.main([*command, "--initial-model", "start", "--max-steps", "1"])  # named as in predict.py --model
    file.unlink()
    train.main([*command, "--max-steps", "2"])
    assert capsys.readouterr().out.count(f"starting from {file}\n") == 1
    parameters, settings = read_model(folder / "model.safetensors")
    assert settings["step"] == 2
    for name, variable in named_variables(network):
        np.testing.assert_allclose(parameters[name], variable, atol=1e-7)


def test_a_restart_may_start_from_the_run_that_it_renames(unet, fast_loop, folder):
    train.main([*unet, "--max-steps", "1"])
    parameters = read_model(folder / "model.safetensors")[0]
    command = [*unet, "--learning-rate", "1e-9", "--max-steps", "1", "--restart", "--initial-model", "oasis16"]
    with pytest.raises(OasisError, match="was trained with --objective noise"):
        train.main([*command, "--objective", "v"])
    assert not folder.with_name("oasis16.old-1").exists()
    train.main(command)
    assert folder.with_name("oasis16.old-1").exists()
    for name, value in read_model(folder / "model.safetensors")[0].items():
        np.testing.assert_allclose(value, parameters[name], atol=1e-6)


# -------------------------------------------------------------------------------------------------------- exact resume

def test_a_state_holds_every_number_that_training_changes(unet):
    """This includes the layers in the U-Net's lists, which tf.train.Checkpoint does not track in Keras 3."""
    command = [*unet, "--loss-weight", "learned", "--condition", "slice,neighbour,mirror"]
    trainer, flags = trainer_of(command), train.parse_flags(command)
    adam, learned = trainer.optimizer, trainer.loss_weights.means
    variables = [*trainer.parameters, *trainer.ema_parameters, *adam.means, *adam.squares, adam.steps, trainer.step,
                 learned]
    assert len(variables) == 4 * len(named_variables(trainer.network)) + 3
    with train.make_run(flags) as run:
        run.start(trainer)
        for number, variable in enumerate(variables, start=1):
            variable.assign(tf.cast(tf.fill(variable.shape, number), variable.dtype))
        run.save(trainer)
    for variable in variables:
        variable.assign(tf.zeros_like(variable))
    with train.make_run(flags) as run:
        run.start(trainer)
    for number, variable in enumerate(variables, start=1):
        assert np.all(variable.numpy() == number), number


def test_a_run_resumed_twice_is_bit_equal_to_a_whole_one(quick):
    """It is resumed in the middle of an epoch, too."""
    whole = quick("--accumulate", "2", "--max-steps", "7", ckpt_path="whole")
    for steps in ("2", "5", "7"):
        parts = quick("--accumulate", "2", "--max-steps", steps, ckpt_path="parts")
    same_state(whole, parts)
    (parameters, settings), (part_parameters, part_settings) = (
        read_model(path / "model.safetensors") for path in (whole, parts))
    assert {**settings, "max_steps": 0} == {**part_settings, "max_steps": 0}
    for name in parameters:
        np.testing.assert_array_equal(parameters[name], part_parameters[name])


@pytest.mark.slow
def test_a_resumed_run_with_conditions_and_learned_weights_is_bit_equal(unet, tmp_path):
    """Each training has its own Trainer, so nothing but the state can remember the steps before."""
    for ckpt_path, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        train.main([*unet, "--ckpt-path", str(tmp_path / ckpt_path), "--max-steps", steps, "--condition",
                    "slice,neighbour,mirror", "--flips", "0.5", "--loss-weight", "learned", "--accumulate", "2"])
    same_state(tmp_path / "whole/oasis16", tmp_path / "parts/oasis16")


@pytest.mark.slow
def test_a_run_resumed_in_a_new_process_is_bit_equal(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path, steps in ((whole, "5"), (parts, "3"), (parts, "5")):
        command = [*SMALL_TRAIN, *tiny, "--ckpt-path", str(path), "--max-steps", steps]
        assert run_in_new_process(command, cwd=ROOT).returncode == 0
    same_state(whole / "oasis16", parts / "oasis16")
    assert len({(path / "oasis16" / "model.safetensors").read_bytes() for path in (whole, parts)}) == 1


@pytest.mark.slow
def test_more_epochs_later_equal_one_longer_run(quick, monkeypatch):
    monkeypatch.setattr(train, "UNet", functools.partial(UNet, dim_mults=(1,)))
    more = ["--accumulate", "2", "--precision", "bfloat16"]
    whole = quick(*more, "--epochs", "3", ckpt_path="whole")
    for epochs in "1", "3":
        parts = quick(*more, "--epochs", epochs, ckpt_path="parts")
    same_state(whole, parts)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(tiny, folder, capsys, number, status):
    command, environment = [*SMALL_TRAIN, *tiny, "--max-steps", "100000"], {**os.environ, "NETWORK": "tiny"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          env=environment) as process:
        for line in process.stdout:  # ends when the process does
            if line.startswith("run: "):
                break
        while "images/s" not in process.stderr.read(1) + process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status and "saved at step" in errors and "Traceback" not in errors
    step = read_model(folder / "model.safetensors")[1]["step"]
    assert step > 0
    train.main([*tiny, "--max-steps", str(step + 1)])
    assert f"steps {step:,} to {step + 1:,}" in capsys.readouterr().out


def test_a_signal_before_the_first_step_leaves_no_run(tiny, folder, monkeypatch, capsys):
    make = train.make_trainer

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return make(*arguments)
    monkeypatch.setattr(train, "make_trainer", interrupted)
    assert train.main([*tiny, "--max-steps", "3"]) == 143
    assert "stopped before the first step" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists() and not list((folder / "state").glob("ckpt-*"))
    monkeypatch.setattr(train, "make_trainer", make)
    assert train.main([*tiny, "--max-steps", "1", "--batch-size", "4"]) == 0   # other settings are not refused


def test_the_progress_bar_leaves_out_the_time_of_the_first_step(tiny, capsys):
    """The first step is compiled. With its time, the bar would promise hours."""
    train.main([*tiny, "--max-steps", "3"])
    first, *_, last = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert re.search(r" 1/3 \[00:00<\?, +\?step/s, loss \d", first) and re.search(r" 3/3 .*images/s\]", last)


def test_the_row_of_an_interrupted_epoch_has_all_of_its_steps(quick, tiny, tmp_path, monkeypatch):
    """The training is stopped after its first step, and the first row of its log is due after three."""
    whole, parts = quick("--max-steps", "3", ckpt_path="whole"), tmp_path / "parts"
    add = StepStats.add

    def interrupted(stats, *sums):
        signal.raise_signal(signal.SIGTERM)
        add(stats, *sums)
    with monkeypatch.context() as patch:
        patch.setattr(StepStats, "add", interrupted)
        assert train.main([*tiny, "--max-steps", "3", "--ckpt-path", str(parts)]) == 143
    quick("--max-steps", "3", ckpt_path="parts")
    (expected,), (row,) = losses_of(whole), losses_of(parts / "oasis16")
    assert {name: float(value) for name, value in row.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_a_signal_during_the_last_save_ends_the_run_as_done(tiny, monkeypatch, capsys):
    """It must not save again. The status tells that no other phase may begin."""
    saves, save = [], oasis.run.Run.save

    def interrupted(run, trainer, *row, **last):
        saves.append(save(run, trainer, *row, **last))
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(oasis.run.Run, "save", interrupted)
    assert train.main([*tiny, "--max-steps", "2", "--save-every", "2"]) == 143
    shown = capsys.readouterr()
    assert len(saves) == 1 and "done: " in shown.out and "saved at" not in shown.err


def test_a_signal_before_a_finished_run_is_not_lost(tiny, monkeypatch, capsys):
    train.main([*tiny, "--max-steps", "2"])
    make_trainer = train.make_trainer
    monkeypatch.setattr(train, "make_trainer", lambda *arguments: (
        signal.raise_signal(signal.SIGTERM) or make_trainer(*arguments)))
    assert train.main([*tiny, "--max-steps", "2"]) == 143
    assert "nothing left to do: step 2 is the last" in capsys.readouterr().out


def test_a_run_beyond_the_last_step_says_where_it_is(quick, capsys):
    quick("--max-steps", "4")
    quick("--max-steps", "2")
    shown = capsys.readouterr().out
    assert "steps 4 to 4" in shown and "step 2 is the last (--max-steps, --epochs), the run is at 4" in shown


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_path_that_looks_like_a_state_resumes_and_keeps_two_states(quick):
    for steps in ("3", "9", "12"):
        folder = quick("--max-steps", steps, ckpt_path="run.data-1/of.index")
    states = {path.name.split(".")[0] for path in (folder / "state").glob("ckpt-*")}
    assert states == {"ckpt-9", "ckpt-12"}
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6", "9", "12"]


# ---------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("settings_file", ["there", "gone"])
def test_other_settings_are_refused_by_name(quick, settings_file):
    """No file changes. settings.json is not needed, because the state holds its settings."""
    folder = quick("--max-steps", "6")
    if settings_file == "gone":
        (folder / "settings.json").unlink()
    before = files_of(folder)
    with pytest.raises(OasisError, match=r"--learning-rate 0.0001, not 0.01") as error:
        quick("--max-steps", "9", "--learning-rate", "0.01")
    assert "\n" not in str(error.value)
    assert files_of(folder) == before


def test_a_run_is_not_continued_on_other_images(quick, make_zip, tmp_path):
    folder = quick("--max-steps", "2")
    before = files_of(folder)
    shutil.move(tmp_path / "keras_png_slices_data.zip", tmp_path / "moved.zip")
    make_zip(subjects=range(7), slices=range(4), size=32)
    with pytest.raises(OasisError, match="oasis16 was trained on 24 slices of 6 subjects, not on 28 .* 7 subjects"):
        quick("--max-steps", "3")
    with pytest.raises(OasisError, match="was trained on 24 slices"):  # not that of the settings, which says less
        quick("--max-steps", "3", "--flips", "0.5")
    assert files_of(folder) == before
    quick("--max-steps", "3", "--path", str(tmp_path / "moved.zip"))
    assert read_model(folder / "model.safetensors")[1]["step"] == 3


def test_a_run_that_continues_on_changed_images_says_so(quick, tmp_path, capsys):
    quick("--max-steps", "1")
    quick("--max-steps", "2")
    assert "other images" not in capsys.readouterr().err
    write_slices(tmp_path / "other", subjects=range(6), slices=range(1, 5), size=32)  # as many of as many subjects
    quick("--max-steps", "3", "--path", str(tmp_path / "other"))
    assert capsys.readouterr().err.count("was trained on other images so far") == 1


def test_a_run_goes_on_without_an_image_that_became_unreadable(quick, tmp_path, capsys):
    write_slices(tmp_path / "data", range(6), range(4), 32)
    folder = quick("--max-steps", "2", "--path", str(tmp_path / "data"))
    assert read_model(folder / "model.safetensors")[1]["data"] == "24 slices of 6 subjects"
    for victim in (tmp_path / "data").rglob("case_*_slice_1.nii.png"):
        victim.write_bytes(b"damaged")
    quick("--max-steps", "3", "--path", str(tmp_path / "data"), "--skip-unreadable")
    settings = read_model(folder / "model.safetensors")[1]
    assert (settings["step"], settings["data"]) == (3, "18 slices of 6 subjects")
    assert ("oasis16 was trained on 24 slices of 6 subjects so far. It continues with 18 slices of 6 subjects."
            in capsys.readouterr().err)


def test_restart_starts_over_and_keeps_the_old_run(quick):
    folder = quick("--max-steps", "2")
    old = (folder / "model.safetensors").read_bytes()
    quick("--max-steps", "1", "--restart", "--seed", "5")
    assert read_model(folder / "model.safetensors")[1]["step"] == 1
    assert (folder.with_name("oasis16.old-1") / "model.safetensors").read_bytes() == old


@pytest.mark.parametrize("remove", ["state", "state/*.index", "state/*.data*"])
def test_a_run_without_its_state_is_not_started_over(quick, remove):
    folder = quick("--max-steps", "6")
    for path in list(folder.glob(remove)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(folder)
    words = "no state to continue from.*" if remove == "state" else ""
    with pytest.raises(OasisError, match=f"oasis16.*{words}--restart"):
        quick("--max-steps", "9")
    assert files_of(folder) == before
    (folder / "settings.json").unlink()
    quick("--max-steps", "3", "--restart")
    kept = files_of(folder.with_name("oasis16.old-1"))
    assert all(kept[name] == data for name, data in before.items() if name != "settings.json")


def test_a_folder_in_which_tensorflow_finds_no_state_is_refused(tiny, tmp_path):
    with pytest.raises(OasisError, match=r"runs\[1\].*with \[ in its name"):
        train.main([*tiny, "--ckpt-path", str(tmp_path / "runs[1]")])
    assert not (tmp_path / "runs[1]").exists()


def test_a_folder_that_cannot_be_written_is_refused_by_name(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OasisError, match="cannot write .*file"):
        train.main([*tiny, "--ckpt-path", str(tmp_path / "file" / "runs")])


@pytest.mark.parametrize("more, advice", [
    (["--batch-size", "12"], "--accumulate 2 or a smaller --batch-size or --recipe recommended"),
    (["--batch-size", "12", "--accumulate", "4", "--recipe", "recommended"],
     "--accumulate 6 or a smaller --batch-size"),
    (["--accumulate", "8"], "a smaller --batch-size or --recipe recommended"),
    (["--accumulate", "8", "--patch-size", "2"], "a smaller --batch-size")])
def test_out_of_memory_names_flags_that_help(tiny, monkeypatch, more, advice):
    def exhausted(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
    monkeypatch.setattr(train.Trainer, "train_steps", exhausted)
    with pytest.raises(OasisError, match=rf"try {advice} \(OOM when allocating"):
        train.main([*tiny, "--max-steps", "1", "--image-size", "128", *more])


def test_the_first_line_of_an_error_in_a_compiled_function_is_its_message():
    @tf.function
    def failing(x):
        tf.debugging.assert_less(x, 1.0, "x is too large")
        return x
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        failing(tf.constant(2.0))
    assert "Graph execution error" in str(error.value) and "x is too large" in first_line(error.value)
    assert first_line(ValueError("[Op:MatMul]")) == "ValueError"


# -------------------------------------------------------------------------------------------------- where it trains

def test_training_and_sampling_need_nothing_that_windows_lacks(tiny, tmp_path):
    """Train, resume, restart and generate in a process without the modules and signals that Windows lacks. The code for
    several workers is not imported."""
    command = [sys.executable, str(PROGRAMS / "as_on_windows.py"), str(tmp_path / "runs"), *tiny]
    done = run_in_new_process(command)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = done.stdout.splitlines()[-1].split()
    assert "oasis.run" in modules and "oasis.workers" not in modules
    assert (tmp_path / "runs" / "oasis16.old-1" / "model.safetensors").is_file()
    assert Image.open(tmp_path / "runs" / "gif" / "oasis64_seed0.gif").n_frames > 1


def test_the_command_to_go_on_with_can_be_pasted(quick, capsys):
    """The path contains spaces, quotes and umlauts, and the command is run by a shell."""
    folder = quick("--max-steps", "3", ckpt_path="my rüns' \"place\"")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("now: ")]
    python, script, *flags = shlex.split(line.removeprefix("now: "))
    assert (python, flags[0]) == ("python", "--model") and os.path.samefile(script, ROOT / "predict.py")
    assert os.path.samefile(flags[1], folder)


def test_a_log_without_a_terminal_has_few_lines(quick, capsys):
    quick("--max-steps", "30")
    lines = capsys.readouterr().err.splitlines()
    assert "30/30" in lines[-1] and len(lines) <= 3 and "\r" not in "".join(lines)


def test_an_output_that_cannot_be_written_does_not_end_the_training():
    class Full:
        def write(self, *text):
            raise OSError(28, "No space left on device")
        flush = write
    with pytest.raises(OSError):
        print("loss", file=Full())
    print("loss", file=FailSafeStream(Full()), flush=True)
