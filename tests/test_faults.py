"""Nothing is lost: killed, out of disk, damaged, fed with nonsense. Every test injects the fault and looks at what is left."""
import collections
import csv
import ctypes
import gc
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import common
import evaluate
import modules
import predict
import train
from common import OasisError
from conftest import slice_pixels, write_slices, zip_folder
from dataset import decode, load_slices
from modules import GaussianDiffusion, UNet, load_model, model_digest, read_model, save_model
from test_train import OneConvolution, same_state, tiny, trainer_of, a_batch  # noqa: F401  tiny is a fixture

ROOT = Path(train.__file__).parent


@pytest.fixture
def quick(tiny, monkeypatch, tmp_path):
    """quick(*flags) trains on `tiny` and returns the run's folder. All trainings with one seed share a Trainer, set back to its
    first values in between: tracing it takes longer than the training. Saves after every 3 steps."""
    shared = {}

    def trainer(flags, precision, make=train.Trainer):
        key = (flags.seed, precision)
        if key not in shared:
            made = make(flags, precision)
            shared[key] = made, [(variable, variable.numpy()) for variable in made.variables]
        made, first = shared[key]
        for variable, value in first:
            variable.assign(value)
        return made

    def run(*more, ckpt_path="checkpoint"):
        assert train.main([*tiny, "--ckpt-path", str(tmp_path / ckpt_path), *more]) == 0
        return tmp_path / ckpt_path / "oasis16"

    run.Trainer = train.Trainer
    monkeypatch.setattr(train, "Trainer", trainer)
    monkeypatch.setattr(train, "SAMPLE_EVERY", 2)
    monkeypatch.setattr(train.Run, "plot_losses", plot_nothing)
    return run


def plot_nothing(run):
    """Stands in for matplotlib, which takes longer than all else."""
    common.write_png(run.folder / "loss.png", np.zeros((2, 2), np.uint8))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses_of(folder):
    """The rows of log.csv without what the clock says."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in ("images_per_second", "seconds")} for row in csv.DictReader(file)]


# -------------------------------------------------------------------------------------------------------------- kill

def harness(kills, seed, folder, arguments):
    """Train in `folder`, SIGKILLed `kills` times at random moments; in a process that has imported TensorFlow and done
    nothing with it, of which every training is a fork. Prints a report as JSON.

    Half of the kills come from outside, at a random time; the other half from inside, when the training touches a file
    for the k-th time. While it trains, the model file is read over and over, as predict.py does.
    """
    random.seed(seed)
    train.UNet, train.SAMPLE_STEPS, train.SAMPLE_EVERY, train.SECONDS_PER_CALL = OneConvolution, 2, 2, 0.02
    train.Run.plot_losses = plot_nothing
    shared = mmap.mmap(-1, 16)  # (step that training has reached, step where it started)
    model, report = Path(folder) / "oasis16" / "model.safetensors", collections.Counter()
    run, start = train.Trainer.run, train.Run.start

    def noted_run(trainer, batches, count, bad_steps):
        result = run(trainer, batches, count, bad_steps)
        shared[:8] = struct.pack("q", int(trainer.step))
        return result

    def noted_start(self, trainer):
        step = start(self, trainer)
        shared[:] = struct.pack("qq", step, step)
        return step
    train.Trainer.run, train.Run.start = noted_run, noted_start

    def child(kill_at_touch):
        touches = [0]

        def touch(event, details):
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(details[0]):
                touches[0] += 1
                if touches[0] == kill_at_touch:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(touch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(train.main([*arguments, "--ckpt-path", str(folder)]))

    Path(folder).mkdir()
    known, reached = 0, 0
    for attempt in range(10 * kills + 10):
        dying = report["kills"] < kills
        shared[:] = struct.pack("qq", -1, -1)
        pid = os.fork()
        if not pid:
            try:
                child(random.randrange(1, 120) if dying and attempt % 2 else None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        wait = random.uniform(0.0, 0.6) if dying and not attempt % 2 else None
        begun = None
        while True:
            time.sleep(0.0005)  # leave the training some of the processor
            at, began = struct.unpack("qq", shared)
            if at > began >= 0:  # it is past the tracing
                begun = begun or time.monotonic()
            if wait is not None and begun and time.monotonic() - begun > wait:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if known or model.exists():
                step = read_model(model)[1]["step"]
                assert step >= known, f"the model went back from step {known} to {step}"
                known = step
                report["reads"] += 1
            if ended:
                break
        at, began = struct.unpack("qq", shared)
        if began >= 0:
            assert began >= reached - 3, f"more than a save interval lost: was at {reached}, went on from {began}"
            report["restarts that lost steps"] += reached > began
            reached = at
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            report["kills"] += 1
        else:
            assert os.WEXITSTATUS(status) == 0, (Path(folder) / "stderr").read_text()[-3000:]
            if not dying:
                break
            raise AssertionError(f"done after {report['kills']} kills: train longer")
    else:
        raise AssertionError("never done")
    print(json.dumps(report))


@pytest.mark.parametrize("kills, seed", [(2, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_a_training_killed_at_random_moments_ends_where_an_uninterrupted_one_does(tiny, quick, tmp_path, kills, seed):
    arguments = [*tiny, "--max-steps", str(30 * kills)]
    code = f"import conftest, test_faults; test_faults.harness({kills}, {seed}, {str(tmp_path / 'killed')!r}, {arguments!r}); conftest.pytest_unconfigure()"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    print(report)
    assert report["kills"] == kills and report["reads"] > kills
    whole = quick("--max-steps", str(30 * kills))
    same_state(whole, tmp_path / "killed" / "oasis16")
    assert [row["step"] for row in losses_of(whole)] == [row["step"] for row in losses_of(tmp_path / "killed" / "oasis16")]
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "killed" / "oasis16" / "model.safetensors").read_bytes()
    names, killed = ({name for name in files_of(folder) if not name.startswith("events")} for folder in (whole, tmp_path / "killed" / "oasis16"))
    assert killed <= names  # a kill leaves no litter
    assert all(name.startswith("samples") for name in names - killed)  # at most a picture, where the kill came before it


@pytest.fixture
def moments(monkeypatch):
    """moments(folder, do): call do() and return copies of the folder as it was on disk before and after every line of
    train.py, common.py, modules.py and how TensorFlow lists states that changed it: what a SIGKILL there leaves."""
    watched = [train.__file__, common.__file__, modules.__file__, "checkpoint_management.py", "file_io.py"]

    def take(folder, do):
        seen, copies = None, []

        def line(frame, *_):
            nonlocal seen
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            now = [(str(path), path.stat().st_size, path.stat().st_ino) for path in files if "events" not in str(path)]
            if now != seen:
                seen = now
                copies.append(folder.parent.parent / f"moment{len(copies)}" / folder.name)
                shutil.copytree(folder, copies[-1])
            return line
        sys.settrace(lambda frame, *_: line(frame) if frame.f_code.co_filename.endswith(tuple(watched)) else None)
        try:
            do()
        finally:
            sys.settrace(None)
        return copies
    return take


def test_a_kill_between_any_two_lines_loses_at_most_one_interval_and_leaves_a_model(quick, moments, tmp_path):
    whole = files_of(quick("--max-steps", "12", ckpt_path="whole"))
    folder = quick("--max-steps", "6")
    copies = moments(folder, lambda: quick("--max-steps", "12"))  # saves at 9 and 12: each deletes an older state
    assert len(copies) > 25, len(copies)
    known = 6
    for copy in copies:
        step = read_model(copy / "model.safetensors")[1]["step"]
        assert known <= step <= known + 3
        known = step
        quick("--max-steps", "12", ckpt_path=str(copy.parent))
        same_state(tmp_path / "whole" / "oasis16", copy)
        left = files_of(copy)
        assert left["model.safetensors"] == whole["model.safetensors"]
        assert not [name for name in left if name not in whole and "events" not in name]
        shutil.rmtree(copy.parent)
    assert known == 12


def test_a_second_training_is_refused_by_the_process_next_door(tiny, tmp_path):
    """The lock is the kernel's: it ends with its process, however that dies, and a lock file that is left means nothing."""
    code = "import sys, train; run = train.Run(train.parse_flags(sys.argv[1:])).__enter__(); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, *tiny], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OasisError, match="another training is at work"):
            train.main([*tiny, "--max-steps", "1"])
        process.kill()
        process.wait()
        with train.Run(train.parse_flags(tiny)):
            assert (tmp_path / "checkpoint" / "oasis16" / "lock").exists()


# -------------------------------------------------------------------------------------------------------------- disk

@pytest.fixture
def at_saves(monkeypatch):
    """at_saves({step: do}) calls do(run's folder) just before the save at that step."""
    save = train.Run.save

    def plan(doings):
        def save_after(run, trainer, *more, **options):
            doings.get(int(trainer.step), lambda folder: None)(run.folder)
            save(run, trainer, *more, **options)
        monkeypatch.setattr(train.Run, "save", save_after)
    return plan


def block(name):
    """A function of a run's folder that puts something in the way of writing `name`, which stops root too."""
    def do(folder):
        path = folder / name
        if path.exists():
            path.rename(path.with_name(path.name + ".aside"))
        if "." in name:
            (path / "in the way").mkdir(parents=True)
        else:
            path.write_text("in the way")
    return do


def unblock(name):
    def do(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.with_name(path.name + ".aside").rename(path)
    return do


def limit_files(size):
    """A function that lets no file grow beyond that size, as a full disk does; the writes fail in the kernel."""
    return lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    yield
    limit_files(resource.RLIM_INFINITY)()


@pytest.mark.parametrize("fail, mend", [(block("state"), unblock("state")), (block("model.safetensors"), unblock("model.safetensors")),
                                        (limit_files(400), limit_files(resource.RLIM_INFINITY))], ids=["state", "model", "full"])
def test_a_save_that_fails_is_said_and_tried_again_and_training_goes_on(quick, at_saves, tmp_path, capsys, unlimited, fail, mend):
    whole = quick("--max-steps", "15", ckpt_path="whole")
    at_saves({6: fail, 12: mend})  # so that the saves at 6 and 9 fail
    folder = quick("--max-steps", "15")
    errors = capsys.readouterr().err
    assert errors.count("not saved, training goes on") == 2 and "Traceback" not in errors
    same_state(whole, folder)
    names = set(files_of(folder)) - {name for name in files_of(folder) if name.startswith(("events", "samples"))}
    assert names == {name for name in files_of(whole) if not name.startswith(("events", "samples"))}
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("steps", [{"--max-steps": 30}, {"--max-steps": 9}], ids=["three in a row", "the last"])
def test_where_nothing_can_be_saved_any_more_training_stops_and_the_last_state_is_whole(quick, at_saves, tmp_path, unlimited, steps):
    whole = quick("--max-steps", "12", ckpt_path="whole")
    at_saves({6 if steps["--max-steps"] == 30 else 9: limit_files(400)})
    with pytest.raises(OasisError, match=f"step {12 if steps['--max-steps'] == 30 else 9} could not be saved: .*oasis16.*space") as error:
        quick("--max-steps", str(steps["--max-steps"]))
    assert "\n" not in str(error.value)
    at_saves({})
    limit_files(resource.RLIM_INFINITY)()
    folder = tmp_path / "checkpoint" / "oasis16"
    last = 3 if steps["--max-steps"] == 30 else 6
    assert read_model(folder / "model.safetensors")[1]["step"] == last
    quick("--max-steps", "12")
    same_state(whole, folder)


def test_pictures_plots_logs_and_events_that_fail_cost_one_line_each_and_no_training(quick, at_saves, tmp_path, capsys):
    whole = quick("--max-steps", "12", ckpt_path="whole")
    capsys.readouterr()
    at_saves({3: lambda folder: [block(name)(folder) for name in ("log.csv", "loss.png", "samples", "events")]})
    folder = quick("--max-steps", "12")
    errors = capsys.readouterr().err
    for name in "log.csv", "loss.png", "samples", "events":
        assert errors.count(f"oasis16/{name}: not written") == 1, (name, errors)
    assert "Traceback" not in errors
    same_state(whole, folder)


def test_a_folder_removed_meanwhile_is_made_again(quick, at_saves, tmp_path, capsys):
    whole = quick("--max-steps", "12", ckpt_path="whole")
    at_saves({9: shutil.rmtree})
    folder = quick("--max-steps", "12")
    assert capsys.readouterr().err.count("was removed while training: made again") == 1
    same_state(whole, folder)
    kept = [name for name in files_of(whole) if not name.startswith(("events", "samples"))]
    assert set(kept) <= set(files_of(folder))
    assert losses_of(whole) == losses_of(folder)


def test_a_folder_that_another_training_took_meanwhile_is_left_alone(quick, at_saves, tmp_path, tiny):
    others = []

    def take(folder):
        shutil.rmtree(folder)
        others.append(train.Run(train.parse_flags(tiny)))
        others[0].folder = folder
        others[0].__enter__()
    at_saves({6: take})
    with pytest.raises(OasisError, match="another training is at work"):
        quick("--max-steps", "30")
    assert set(files_of(others[0].folder)) == {"lock"}
    others[0].__exit__()


def test_a_network_drive_without_locks_is_trained_on_with_a_warning(quick, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(train.fcntl, "flock", no_locks)
    quick("--max-steps", "3")
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ damage

def flip(path):
    data = bytearray(path.read_bytes() or b" ")  # the lock is empty
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "bit": lambda path, other: flip(path),
    "empty": lambda path, other: path.write_bytes(b""),
    "gone": lambda path, other: path.unlink(),
    "swapped": lambda path, other: shutil.copy(other, path),
}


@pytest.fixture
def damaged(quick, tmp_path, capsys):
    """damaged(do) copies a run of 9 steps, calls do(copy, another run of 9 steps), trains on to 12 and checks that the result
    is that of an uninterrupted run of 12 steps. Returns (the step where it went on, what was printed)."""
    whole, base = quick("--max-steps", "12", ckpt_path="whole"), quick("--max-steps", "9", ckpt_path="base")
    other = quick("--max-steps", "9", "--seed", "1", ckpt_path="other")

    def go_on(do):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = Path(shutil.copytree(base, tmp_path / "copy" / "oasis16"))
        do(copy, other)
        capsys.readouterr()
        quick("--max-steps", "12", ckpt_path="copy")
        out = capsys.readouterr().out
        same_state(whole, copy)
        assert (copy / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert [row["step"] for row in losses_of(copy)] == ["3", "6", "9", "12"]
        assert {name: float(value) for name, value in losses_of(copy)[-1].items()} == pytest.approx(
            {name: float(value) for name, value in losses_of(whole)[-1].items()}, rel=1e-5)  # sums in another order
        return int(out.split("steps ")[1].split()[0]), out
    return go_on


def test_damage_to_any_file_of_a_run_is_mended_or_made_good_from_the_state_before(damaged, quick, tmp_path, capsys):
    names = [name for name in files_of(quick("--max-steps", "9", ckpt_path="base")) if not name.startswith("events")]
    assert {"settings.json", "model.safetensors", "log.csv", "loss.png", "state/checkpoint", "state/ckpt-6.index", "state/ckpt-9.index",
            "state/ckpt-9.data-00000-of-00001", "lock"} < set(names)
    outcomes = collections.Counter()
    for name in names:
        for kind, damage in DAMAGE.items():
            start, out = damaged(lambda run, other: damage(run / name, other / name))
            assert start == (6 if name.startswith("state/ckpt-9") else 9), (name, kind)
            assert (start == 9) or "state/ckpt-9 is not used" in out, (name, kind)
            assert name != "model.safetensors" or kind == "swapped" or "model.safetensors: " in out, (name, kind)
            outcomes[start] += 1
    print(outcomes)


def test_a_whole_state_of_another_run_is_not_taken_for_this_ones(damaged):
    def swap(run, other):
        for path in (other / "state").glob("ckpt-9*"):
            shutil.copy(path, run / "state")
    start, out = damaged(swap)
    assert start == 6 and "state/ckpt-9 is not used" in out and "made with other settings" in out


def test_a_state_holds_every_number_that_training_changes(tiny, monkeypatch, tmp_path):
    """The U-Net, for its layers lie in lists: Keras 3 hides those from tf.train.Checkpoint."""
    monkeypatch.setattr(train, "UNet", lambda **options: UNet(**options, dim_mults=(1,)))
    trainer = trainer_of(tiny)
    variables = [*trainer.weights, *trainer.ema_weights, *trainer.optimizer.means, *trainer.optimizer.squares, trainer.optimizer.steps, trainer.step]
    assert len(variables) == 4 * len(modules.named_variables(trainer.network)) + 2
    with train.Run(train.parse_flags(tiny)) as run:
        run.start(trainer)
        for number, variable in enumerate(variables, start=1):
            variable.assign(tf.cast(tf.fill(variable.shape, number), variable.dtype))
        run.save(trainer)
    for variable in variables:
        variable.assign(tf.zeros_like(variable))
    with train.Run(train.parse_flags(tiny)) as run:
        run.start(trainer)
    for number, variable in enumerate(variables, start=1):
        assert np.all(variable.numpy() == number), number


def test_a_state_written_before_states_had_a_record_is_continued(damaged, quick, monkeypatch):
    def strip(run, _):
        shutil.rmtree(run / "state")
        trainer = train.Trainer(train.parse_flags(["--image-size", "16", "--dim", "16"]), "float32")
        old = tf.train.Checkpoint(network=trainer.network, ema=trainer.ema, optimizer=trainer.optimizer, step=trainer.step)
        manager = tf.train.CheckpointManager(old, str(run / "state"), max_to_keep=2)
        trainer.checkpoint.restore(str(run.parent.parent / "base" / "oasis16" / "state" / "ckpt-9")).assert_existing_objects_matched().expect_partial()
        manager.save(checkpoint_number=9)
    start, _ = damaged(strip)
    assert start == 9


@pytest.mark.parametrize("remove", ["state", "state/*.index", "state/*.data*"])
def test_without_a_state_nothing_starts_over_in_silence(quick, remove):
    folder = quick("--max-steps", "6")
    for path in list(folder.glob(remove)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(folder)
    with pytest.raises(OasisError, match="oasis16.*--restart"):
        quick("--max-steps", "9")
    assert files_of(folder) == before
    (folder / "settings.json").unlink()
    quick("--max-steps", "3", "--restart")
    kept = files_of(folder.with_name("oasis16.old-1"))
    assert all(kept[name] == data for name, data in before.items() if name != "settings.json")


def test_other_settings_are_refused_by_name_even_without_settings_json(quick):
    folder = quick("--max-steps", "6")
    (folder / "settings.json").unlink()
    before = files_of(folder)
    with pytest.raises(OasisError, match="--learning-rate 0.0001, not 0.01"):
        quick("--max-steps", "9", "--learning-rate", "0.01")
    assert files_of(folder) == before


def test_a_model_of_another_run_is_not_used_without_a_word(tmp_path, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        network = UNet(16, dim=16, dim_mults=(1,), seed=seed)
        settings = {**network.settings, **GaussianDiffusion(5, "x_start").settings, "seed": seed}
        save_model(tmp_path / name / "model.safetensors", network, settings)
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    arguments = ["--gif-path", str(tmp_path / "gif"), "--frames", "0", "--model", str(tmp_path / "two")]
    predict.main(arguments)
    assert "warning" not in capsys.readouterr().err
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "two")
    predict.main(arguments)
    assert "two/model.safetensors is not a model of the run in its folder: it has seed 1, not 2" in capsys.readouterr().err


def outcome(do, memory=2**30):
    """"ok" or "refused" where do() returns or raises an OasisError of one line; it may not take more than `memory` bytes more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else None
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, limits[1]))
    try:
        do()
        return "ok"
    except OasisError as error:
        assert "\n" not in str(error) and not isinstance(error.__cause__, MemoryError), error
        return "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutate(data, rng):
    """The bytes with one to three random faults: a bit, a byte, a run of bytes, a number made huge, a cut, a piece twice or away."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, length = rng.integers(len(data)), int(rng.integers(1, 17))
        kind = rng.integers(7)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at] = rng.integers(256)
        elif kind == 2:
            data[at:at + length] = rng.bytes(length)
        elif kind == 3:
            data[at:at + 4] = int(rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
        elif kind == 4 and rng.integers(4) == 0:
            del data[at:]
        elif kind == 5:
            del data[at:at + length]
        else:
            data[at:at] = data[at:at + length]
        if not data:
            return b""
    return bytes(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = UNet(16, dim=16, dim_mults=(1,))
    network.last_conv.kernel.assign(tf.random.stateless_normal(network.last_conv.kernel.shape, [3, 4]))  # at first it is zero
    path = tmp_path_factory.mktemp("run") / "oasis16" / "model.safetensors"
    save_model(path, network, {**network.settings, **GaussianDiffusion(50, "x_start").settings, "images": 320, "seed": 0})
    return path


NONSENSE = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf"), True, None, "16", "", [], [1], {}, "v", "noise", [2**40],
            [1] * 1000, [[1]], ["1"], [0], [-1], [1, 2, 4, 8]]


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_model_files_load_the_same_weights_or_are_refused(count, model, tmp_path, monkeypatch):
    """A third are damaged anywhere, a third in the header, a third have nonsense for settings and a checksum that is right."""
    rng, outcomes, intact = np.random.default_rng(0), collections.Counter(), model.read_bytes()
    weights, settings = read_model(model)
    header = 8 + int.from_bytes(intact[:8], "little")
    network = UNet(16, dim=16, dim_mults=(1,))
    built = []

    def build(image_size, dim, dim_mults, channels, patch_size, pixel_width, precision):
        """The U-Net, where it is the one of the file: of others it is noted that their size is bounded, for tracing takes long."""
        built.append((image_size, dim, dim_mults, channels, patch_size, pixel_width))
        modules.check_image_size(image_size, patch_size, len(dim_mults))
        if (dim, dim_mults, channels, patch_size, pixel_width) == (16, [1], 1, 1, 0):
            return network
        assert 16 * dim * dim <= network.count_params() and 9 * (dim * max(dim_mults))**2 <= network.count_params()
        raise ValueError("another network")
    monkeypatch.setattr(modules, "UNet", build)
    file = tmp_path / "model.safetensors"
    for i in range(count):
        if i % 3 == 0:
            kind, data = "anywhere", mutate(intact, rng)
        elif i % 3 == 1:
            kind, data = "header", mutate(intact[:header], rng) + intact[header:]
        else:
            changed = dict(settings)
            for name in rng.choice(sorted(settings), rng.integers(1, 3), replace=False):
                changed[name] = NONSENSE[rng.integers(len(NONSENSE))]
                if rng.integers(8) == 0:
                    del changed[name]
            text = json.dumps(changed) if rng.integers(10) else ["[" * 100_000, "[]", "[[1, 2]]", "7", "null", "", "{"][rng.integers(7)]
            metadata = {"format": modules.FORMAT, "settings": text, "sha256": model_digest(weights, text)}
            kind, data = "settings", modules.safetensors.numpy.save(weights, metadata)
        file.write_bytes(data)

        def load():
            _, _, loaded = load_model(file)
            assert i % 3 == 2 or loaded == settings or data == intact
        outcomes[kind, outcome(load)] += 1
    print(outcomes)
    assert os.listdir(tmp_path) == ["model.safetensors"] and len(built) > count // 40
    assert sum(outcomes.values()) == count and outcomes["settings", "ok"] > 0 and outcomes["anywhere", "refused"] > count // 4


def test_a_model_file_that_claims_to_be_huge_costs_no_memory(model, tmp_path):
    weights, settings = read_model(model)
    for change in ({"dim": 4096}, {"dim_mults": [1, 4096]}, {"channels": 4096}, {"patch_size": 4096}, {"pixel_width": 4096}, {"pixel_width": 1024},
                   {"image_size": 2**20}, {"timesteps": 2**40}, {"dim_mults": [1] * 10**6}):
        text = json.dumps({**settings, **change})
        metadata = {"format": modules.FORMAT, "settings": text, "sha256": model_digest(weights, text)}
        (tmp_path / "model.safetensors").write_bytes(modules.safetensors.numpy.save(weights, metadata))
        began = time.process_time()
        assert outcome(lambda: load_model(tmp_path / "model.safetensors"), memory=2**28) == "refused", change
        assert time.process_time() - began < 1


def png_chunks(png):
    """[(type, data)] of a PNG."""
    chunks, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at:at + 4], "big")
        chunks.append((png[at + 4:at + 8], png[at + 8:at + 8 + length]))
        at += 12 + length
    return chunks


def png_of(chunks):
    """A PNG of the chunks, with the right checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mutate_png(data, rng):
    """A PNG whose chunks are damaged, missing, twice, out of order or foreign, while all its checksums are right."""
    chunks = png_chunks(data)
    at = rng.integers(len(chunks))
    kind, content = chunks[at]
    fault = rng.integers(5)
    if fault == 0:
        chunks[at] = kind, mutate(content, rng) if content else b"x"
    elif fault == 1:
        del chunks[at]
    elif fault == 2:
        chunks.insert(rng.integers(len(chunks)), chunks[at])
    elif fault == 3:
        chunks.insert(1, ((b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"gAMA", b"eXIf")[rng.integers(9)], rng.bytes(30)))
    else:
        raw = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
        chunks[[kind for kind, _ in chunks].index(b"IDAT")] = b"IDAT", zlib.compress(mutate(raw, rng))
    return png_of(chunks)


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_zips_are_read_or_refused_and_nothing_is_unpacked(count, tmp_path, monkeypatch):
    """Half are damaged anywhere, a quarter in their table of contents, a quarter hold damaged PNGs and are else whole."""
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "file" / "cache"))  # a file is no folder: nothing is cached
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_slices(tmp_path / "data", subjects=(1,), slices=(0, 1), size=16)
    path = zip_folder(tmp_path / "data", tmp_path / "data.zip")
    rng, outcomes, intact = np.random.default_rng(0), collections.Counter(), path.read_bytes()
    table = intact.index(b"PK\1\2")
    before = sorted(tmp_path.rglob("*"))
    for i in range(count):
        if i % 4 < 2:
            kind, data = "anywhere", mutate(intact, rng)
        elif i % 4 == 2:
            kind, data = "table", intact[:table] + mutate(intact[table:], rng)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("keras_png_slices_train/case_001_slice_0.nii.png", png(slice_pixels(1, 0, 16)))
                archive.writestr("keras_png_slices_train/case_001_slice_1.nii.png", mutate_png(png(slice_pixels(1, 1, 16)), rng))
            kind, data = "png", path.read_bytes()
        path.write_bytes(data)
        outcomes[kind, outcome(lambda: load_slices(path, image_size=16))] += 1
    print(outcomes)
    assert sorted(tmp_path.rglob("*")) == before and sum(outcomes.values()) == count
    assert all(outcomes[kind, "refused"] > count // 20 for kind in ("anywhere", "table", "png"))


# ----------------------------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("where", ["batch", "batch inf", "gradient", "weights", "averages"])
def test_what_is_not_finite_changes_nothing_or_is_never_saved(quick, tmp_path, monkeypatch, where):
    """In steps 5 to 8, or from step 5 on where it gets into the weights."""
    run, batches = quick.Trainer.run, train.make_dataset
    if where.startswith("batch"):
        value = np.nan if where == "batch" else np.inf

        def bad_batches(images, batch_size, seed, start, flips):
            steps = tf.data.Dataset.counter(start)
            spoil = lambda step, batch: tf.where((step >= 5) & (step < 8), value, 1.0) * batch  # noqa: E731
            return tf.data.Dataset.zip((steps, batches(images, batch_size, seed, start, flips))).map(spoil)
        monkeypatch.setattr(train, "make_dataset", bad_batches)
        folder = quick("--max-steps", "12")
        assert [row["skipped"] for row in losses_of(folder)] == ["0", "1", "2", "0"]
        assert all(np.isfinite(float(value)) for row in losses_of(folder) for value in row.values())
        return
    if where == "gradient":
        gradients = quick.Trainer.accumulated_gradients

        def bad_gradients(trainer, *arguments):
            losses, parts = gradients(trainer, *arguments)
            return losses, [part + tf.where((trainer.step >= 5) & (trainer.step < 8), np.nan, 0.0) for part in parts[:1]] + list(parts[1:])
        monkeypatch.setattr(quick.Trainer, "accumulated_gradients", bad_gradients)
        assert [row["skipped"] for row in losses_of(quick("--max-steps", "12"))] == ["0", "1", "2", "0"]
        return

    def spoil(trainer, iterator, count, bad_steps):
        if int(trainer.step) >= 3:
            variable = (trainer.weights if where == "weights" else trainer.ema_weights)[0]
            variable.assign(tf.fill(variable.shape, np.inf))
        return run(trainer, iterator, count, bad_steps)
    monkeypatch.setattr(quick.Trainer, "run", spoil)
    with pytest.raises(OasisError, match="NaN or infinite values at step 6.*--learning-rate or --precision float32"):
        quick("--max-steps", "12")
    folder = tmp_path / "checkpoint" / "oasis16"
    assert read_model(folder / "model.safetensors")[1]["step"] == 3
    monkeypatch.setattr(quick.Trainer, "run", run)
    same_state(quick("--max-steps", "9"), quick("--max-steps", "9", ckpt_path="whole"))


@pytest.mark.parametrize("rate", ["1e37", "1e300"])
def test_a_training_that_diverges_keeps_the_last_good_state(quick, tmp_path, rate):
    with pytest.raises(OasisError, match="--learning-rate"):
        quick("--max-steps", "200", "--learning-rate", rate)
    model = tmp_path / "checkpoint" / "oasis16" / "model.safetensors"
    assert not model.exists() or all(np.isfinite(array).all() for array in read_model(model)[0].values())


@pytest.mark.parametrize("float16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "float16"])
def test_an_overflow_is_skipped_and_counted(tiny, monkeypatch, float16):
    if float16:
        monkeypatch.setattr(train, "UNet", lambda **options: UNet(**options, dim_mults=(1,)))
    trainer = train.Trainer(train.parse_flags(tiny), "float16" if float16 else "float32")
    before = [weight.numpy() for weight in trainer.weights]
    batches = tf.data.Dataset.from_tensors(a_batch())
    *_, skipped, bad_steps = trainer.run(iter(batches.map(lambda x: (1e6 if float16 else 1e30) * x)), tf.constant(1), tf.constant(0))
    assert (int(skipped), int(bad_steps), int(trainer.step)) == (1, 1, 1)
    assert all(np.array_equal(old, weight) for old, weight in zip(before, trainer.weights))
    *_, skipped, bad_steps = trainer.run(iter(batches), tf.constant(1), bad_steps)
    assert (int(skipped), int(bad_steps)) == (0, 0)
    assert not all(np.array_equal(old, weight) for old, weight in zip(before, trainer.weights))


def resident():
    """Megabytes of memory that this process holds, without what is free already: matplotlib's figures, which wait for Python's
    garbage collector, and what the allocator keeps. Both come and go by 30."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("more, saves, megabytes", [(["--max-steps", "20000", "--save-every", "200"], 100, 8), (["--epochs", "200"], 200, 12)],
                         ids=["20000 steps", "200 epochs"])
def test_a_day_of_training_holds_no_more_memory_than_an_hour(tiny, monkeypatch, tmp_path, more, saves, megabytes):
    """20,000 steps by themselves; 200 epochs with a save, a plot, pictures and events each, which take 20 MB in the first 20 and
    then no more. One trace, and files whose size is a small number of bytes a save."""
    sizes, trainers = [], []
    log, make = train.Run.log, train.Trainer
    monkeypatch.setattr(train, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(train, "Trainer", lambda *arguments: trainers.append(make(*arguments)) or trainers[-1])
    if saves == 100:
        for name in "write_state", "write_model", "plot_losses", "write_events", "picture":
            monkeypatch.setattr(train.Run, name, lambda *_: None)
    monkeypatch.setattr(train.Run, "log", lambda run: log(run) or sizes.append(resident()))
    began = time.monotonic()
    train.main([*tiny, *more])
    files = {name: len(data) for name, data in files_of(tmp_path / "checkpoint" / "oasis16").items()}
    events = sum(size for name, size in files.items() if name.startswith("events"))
    print(f"{more}: {[round(size) for size in sizes[::len(sizes) // 10]]} and at the end {sizes[-1]:.0f} MB, {time.monotonic() - began:.0f} s; "
          f"bytes: log.csv {files['log.csv']:,}, events {events:,}, loss.png {files.get('loss.png', 0):,}")
    assert len(sizes) == saves
    assert sizes[-1] < sizes[2 * saves // 5] + megabytes
    assert trainers[-1].run.experimental_get_tracing_count() == 1
    assert trainers[-1].losses_of_ema.experimental_get_tracing_count() == 1
    assert files["log.csv"] < 200 * (saves + 1) and events < 3000 * saves


# ------------------------------------------------------------------------------------------------------------- input

def interlaced(pixels):
    """The bytes of an 8-bit grey PNG in the seven passes of Adam7, which Pillow reads but does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right] if row.size]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 1)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")])


@pytest.mark.parametrize("size", [1, 5, 16])
def test_an_interlaced_png_holds_the_same_pixels(size):
    pixels = slice_pixels(1, 2, size)
    assert np.array_equal(decode(interlaced(pixels), size), pixels)


@pytest.mark.parametrize("name", ["../../../keras_png_slices_train/case_001_slice_0.nii.png", "/tmp/keras_png_slices_train/case_001_slice_0.nii.png",
                                  "C:\\keras_png_slices_train\\case_001_slice_0.nii.png"])
def test_a_name_in_a_zip_that_leads_out_of_it_is_read_in_place(tmp_path, name):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    pixels, path = slice_pixels(1, 0, 16), tmp_path / "a" / "b" / "c" / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, png(pixels))
    assert np.array_equal(load_slices(path, image_size=16)[0, :, :, 0], pixels)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("method, size", [(zipfile.ZIP_DEFLATED, 2**28), (zipfile.ZIP_LZMA, 1000), (zipfile.ZIP_BZIP2, 1000)])
def test_a_zip_bomb_is_refused_and_costs_no_memory(tmp_path, method, size):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("keras_png_slices_train/case_001_slice_0.nii.png", "w") as member:
        member.write(png(slice_pixels(1, 0, 16)))
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    before = png(slice_pixels(1, 0, 16))
    assert outcome(lambda: load_slices(path, image_size=16), memory=2**28) == ("ok" if method == zipfile.ZIP_DEFLATED else "refused")
    huge = bytearray(before)
    huge[16:24] = (4096).to_bytes(4, "big") * 2  # says that it is as large as is allowed, and holds next to nothing
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("keras_png_slices_train/case_001_slice_0.nii.png", png_of([(kind, bytes(huge[16:29]) if kind == b"IHDR" else data)
                                                                                     for kind, data in png_chunks(before)]))
    assert outcome(lambda: load_slices(path, image_size=16), memory=2**28) == "refused"


def test_a_folder_or_zip_that_only_holds_the_zip_is_told_so(make_zip, tmp_path):
    path = make_zip()
    (tmp_path / "dataset").mkdir()
    inner = Path(shutil.move(path, tmp_path / "dataset"))
    with pytest.raises(OasisError, match=f"holds no slices, but {inner}"):
        load_slices(tmp_path / "dataset")
    with pytest.raises(OasisError, match=f"outer.zip: holds no slices, but {inner.name}"):
        load_slices(zip_folder(tmp_path / "dataset", tmp_path / "outer.zip"))


@pytest.mark.parametrize("limit, size", [(0, 16), (-1, 16), (None, 0), (None, -5), (3, 10**9), (None, 10**18)])
def test_as_many_slices_as_cannot_be_are_refused(make_zip, limit, size):
    with pytest.raises(OasisError):
        load_slices(make_zip(), image_size=size, limit=limit)


@pytest.mark.parametrize("script", [train, predict, evaluate])
def test_every_flag_refuses_by_name_what_it_cannot_be(script):
    parser = common.flags_from_constants(script.__file__, vars(script), script.FLAG_TYPES)
    nonsense = ["", "x", "nan", "-nan", "1,5", "0x10"]
    tried = 0
    for name, value in vars(parser.parse_args([])).items():
        flag = "--" + name.replace("_", "-")
        bad = {bool: ["1"], int: [*nonsense, "1.5", "1e3", "inf", str(2**63), str(-2**63 - 1), str(10**30)],
               float: [*nonsense, "inf", "-inf", "-1", "1e999"]}.get(type(value), [])
        if type(value) is int and name != "seed":
            bad.append("-1")
        if name in ("epochs", "batch_size", "image_size", "timesteps", "dim", "patch_size", "accumulate", "number_of_images"):
            bad.append("0")
        if any(action.choices for action in parser._actions if action.dest == name):
            bad = ["", "x", value.upper() + " "]
        for text in bad:
            with pytest.raises(OasisError, match=flag):
                print("accepted:", parser.parse_args([f"{flag}={text}"]))
            tried += 1
    assert tried > 50


def test_seeds_of_64_bits_are_all_different_and_beyond_them_refused(model, tmp_path):
    network, diffusion, _ = load_model(model)
    seeds = [0, 2**32, 2**63 - 1, -2**63, -1]
    (_, images, _), = predict.generate(network, diffusion, seeds, "dpm", 2)
    assert len({image.tobytes() for image in images}) == len(seeds)
    with pytest.raises(OasisError, match="64 bits.*--seed"):
        predict.main(["--model", str(model), "--gif-path", str(tmp_path), "--seed", str(2**63 - 1), "--number-of-images", "2"])


def test_a_training_seed_of_64_bits_counts_in_all_its_bits(quick):
    folders = [quick("--max-steps", "3", f"--seed={seed}", ckpt_path=str(seed)) for seed in (1, 2**32 + 1, 2**63 - 1)]
    assert len({read_model(folder / "model.safetensors")[0]["convolution.kernel"].tobytes() for folder in folders}) == 3


# --------------------------------------------------------------------------------------------------------- exactness

def test_the_same_command_writes_the_same_bytes(tiny, model, tmp_path):
    files = []
    for folder in tmp_path / "one", tmp_path / "two":
        train.main([*tiny, "--max-steps", "7", "--ckpt-path", str(folder)])
        predict.main(["--model", str(model), "--gif-path", str(folder), "--number-of-images", "2", "--sampler", "ddim", "--steps", "5",
                      "--frames", "3"])
        files.append(files_of(folder))
    names = [name for name in files[0] if name.endswith((".safetensors", ".gif")) or "seed" in name or "samples" in name]
    assert len(names) == 1 + 2 + 3 + 1
    assert all(files[0][name] == files[1][name] for name in names)


@pytest.mark.parametrize("with_unet", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stand-in", "unet"])
def test_epochs_asked_for_later_are_those_of_a_longer_run(quick, tmp_path, monkeypatch, with_unet):
    if with_unet:
        monkeypatch.setattr(train, "UNet", lambda **options: UNet(**options, dim_mults=(1,)))
    more = ["--accumulate", "2", "--precision", "bfloat16"]
    whole = quick(*more, "--epochs", "3", ckpt_path="whole")
    for epochs in "1", "3":
        parts = quick(*more, "--epochs", epochs, ckpt_path="parts")
    same_state(whole, parts)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
