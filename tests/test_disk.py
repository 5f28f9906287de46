"""A run's folder that is locked, full, removed or partly not writable."""
import errno
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest

import oasis.run
import train
from helpers import files_of, losses_of, same_state
from oasis.files import OasisError
from oasis.modelfile import read_model


pytestmark = pytest.mark.usefixtures("shared_trainers")


# ------------------------------------------------------------------------------------------------------------- locks

def test_a_lock_ends_with_its_process(tiny, folder):
    """The kernel releases the lock when the process ends for any reason, so an old lock file has no effect."""
    folder.mkdir(parents=True)
    program = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('locked', flush=True)"
    command = [sys.executable, "-c", program + "; sys.stdin.read()", str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OasisError, match="another training is running"):
            train.main([*tiny, "--max-steps", "1"])
        process.kill()
        process.wait()
    with train.make_run(train.parse_flags(tiny)):
        pass


def test_a_network_drive_without_locks_costs_a_warning(quick, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(oasis.run.FileLock, "acquire", no_locks)
    quick("--max-steps", "3")
    assert "cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- disk

@pytest.fixture
def at_saves(monkeypatch):
    """at_saves({step: do}) calls do(run's folder) just before the save at that step."""
    save = oasis.run.Run.save

    def plan(actions):
        def act_and_save(run, trainer, *more, **options):
            actions.get(int(trainer.step), lambda folder: None)(run.folder)
            save(run, trainer, *more, **options)
        monkeypatch.setattr(oasis.run.Run, "save", act_and_save)
    return plan


def block(name):
    """A function of a run's folder that makes it impossible to write `name` there, also for root."""
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
    """A function of a run's folder that undoes block(name)."""
    def do(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.with_name(path.name + ".aside").rename(path)
    return do


def limit_files(size):
    """A function that limits files to `size` bytes. The kernel then refuses writes, as on a full disk."""
    return lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    """Removes the limit of limit_files after the test."""
    yield
    limit_files(resource.RLIM_INFINITY)()


def same_model(a, b):
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def lasting_files(folder):
    """The names of a run's files, except events and samples."""
    return {name for name in files_of(folder) if not name.startswith(("events", "samples"))}


@pytest.mark.parametrize("fail, mend", [
    (block("state"), unblock("state")), (block("model.safetensors"), unblock("model.safetensors")),
    (limit_files(400), limit_files(resource.RLIM_INFINITY))], ids=["state", "model", "full"])
def test_a_failed_save_is_reported_and_tried_again(quick, at_saves, capsys, unlimited, fail, mend):
    whole = quick("--max-steps", "15", ckpt_path="whole")
    at_saves({6: fail, 12: mend})  # the saves at 6 and 9 fail
    folder = quick("--max-steps", "15")
    errors = capsys.readouterr().err
    assert errors.count("not saved. Training continues") == 2 and "Traceback" not in errors
    same_state(whole, folder)
    assert lasting_files(folder) == lasting_files(whole) and same_model(folder, whole)


@pytest.mark.parametrize("steps, full_at, failed, left", [("30", 6, 12, 3), ("9", 9, 9, 6)],
                         ids=["three in a row", "the last"])
def test_when_nothing_can_be_saved_training_stops(quick, at_saves, folder, unlimited, steps, full_at, failed, left):
    """The last state is intact."""
    whole = quick("--max-steps", "12", ckpt_path="whole")
    at_saves({full_at: limit_files(400)})
    with pytest.raises(OasisError, match=f"step {failed} could not be saved: .*oasis16.*space") as error:
        quick("--max-steps", steps)
    assert "\n" not in str(error.value)
    at_saves({})
    limit_files(resource.RLIM_INFINITY)()
    assert read_model(folder / "model.safetensors")[1]["step"] == left
    quick("--max-steps", "12")
    same_state(whole, folder)


def test_a_full_disk_stops_the_run_and_keeps_its_model(quick, monkeypatch):
    folder = quick("--max-steps", "3")
    model = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OasisError, match="No space left on device"):
        quick("--max-steps", "6")
    assert (folder / "model.safetensors").read_bytes() == model
    assert not list(folder.glob(".model*"))


def test_a_drive_without_fsync_of_folders_is_no_error(quick, monkeypatch):
    fsync = os.fsync

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", of_files)
    assert read_model(quick("--max-steps", "3") / "model.safetensors")[1]["step"] == 3


def test_samples_plots_logs_and_events_that_fail_cost_a_line(quick, at_saves, capsys):
    """Each failure prints one warning, and the training continues."""
    whole = quick("--max-steps", "12", ckpt_path="whole")
    capsys.readouterr()
    at_saves({3: lambda folder: [block(name)(folder) for name in ("log.csv", "loss.png", "samples", "events")]})
    folder = quick("--max-steps", "12")
    errors = capsys.readouterr().err
    for name in "log.csv", "loss.png", "samples", "events":
        assert errors.count(f"oasis16/{name}: not written") == 1, (name, errors)
    assert "Traceback" not in errors
    same_state(whole, folder)


def test_a_folder_removed_meanwhile_is_made_again(quick, at_saves, capsys):
    whole = quick("--max-steps", "12", ckpt_path="whole")
    at_saves({9: shutil.rmtree})
    folder = quick("--max-steps", "12")
    assert capsys.readouterr().err.count("was removed during training: created again") == 1
    same_state(whole, folder)
    assert lasting_files(whole) <= set(files_of(folder))
    assert losses_of(whole) == losses_of(folder)


def test_a_folder_that_another_training_took_is_left_alone(quick, at_saves, tiny):
    others = []

    def take(folder):
        shutil.rmtree(folder)
        others.append(train.make_run(train.parse_flags(tiny)))
        others[0].folder = folder
        others[0].__enter__()
    at_saves({6: take})
    with pytest.raises(OasisError, match="another training is running"):
        quick("--max-steps", "30")
    assert set(files_of(others[0].folder)) == {"lock"}
    others[0].__exit__()
