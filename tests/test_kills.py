"""A training that is killed at any time, or finds a damaged file, has the result of an uninterrupted training."""
import collections
import ctypes
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oasis.files
import oasis.log
import oasis.modelfile
import oasis.run
import oasis.states
import train
from helpers import PROGRAMS, files_of, losses_of, same_state
from oasis.modelfile import read_model


pytestmark = pytest.mark.usefixtures("shared_trainers")


# -------------------------------------------------------------------------------------------------------------- kill

@pytest.mark.parametrize("kills, seed", [(2, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_a_training_killed_at_random_moments_loses_nothing(tiny, tmp_path, kills, seed):
    command = [sys.executable, str(PROGRAMS / "killed_training.py"), str(kills), str(seed), str(tmp_path),
               *tiny, "--max-steps", str(30 * kills + 120)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout)
    print(counts)
    assert counts["kills"] == kills and counts["reads"] > kills
    whole, killed = (tmp_path / name / "oasis16" for name in ("whole", "killed"))
    same_state(whole, killed)
    assert [row["step"] for row in losses_of(whole)] == [row["step"] for row in losses_of(killed)]
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    names, killed_names = ({name for name in files_of(path) if not name.startswith("events")}
                           for path in (whole, killed))
    assert killed_names <= names  # the killed training left no temporary file
    # At most one image is missing: the training was killed before writing it.
    assert all(name.startswith("samples") for name in names - killed_names)


# A test stops at every line of these files: ours that write into a run's folder, and two of TensorFlow.
WATCHED = (*(module.__file__ for module in (train, oasis.run, oasis.states, oasis.log, oasis.files, oasis.modelfile)),
           "checkpoint_management.py", "file_io.py")


class Disk:
    """What survives a power failure at worst: flushed data in files whose folder was flushed after their creation.

    A deleted file is lost at once. All files that exist at the start survive.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self.fsync, self.flushes = folder, os.fsync, 0
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.entries = {path: path.stat().st_ino for path in files}
        self.data = {path.stat().st_ino: path.read_bytes() for path in files}
        monkeypatch.setattr(os, "fsync", self.flush)

    def flush(self, descriptor):
        self.fsync(descriptor)
        self.flushes += 1
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            listed = {file: file.stat().st_ino for file in path.iterdir() if file.is_file()}
            self.entries = {file: ino for file, ino in self.entries.items() if file.parent != path} | listed
        else:
            self.data[path.stat().st_ino] = path.read_bytes()

    def copy(self, folder, target):
        for path, ino in self.entries.items():
            if path.exists():
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self.data.get(ino, b""))


def moments(folder, do, copy=shutil.copytree, version=lambda: 0):
    """Call do(). Return copies of the folder before and after each line of the WATCHED files that changes it.

    copy(folder, target) writes a copy, by default of all files, as after a SIGKILL. A change of version() also makes
    a copy.
    """
    seen, copies = None, []

    def line(*_):
        nonlocal seen
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        now = [(str(path), path.stat().st_size, path.stat().st_ino) for path in files if "events" not in str(path)]
        if [now, version()] != seen:
            seen = [now, version()]
            copies.append(folder.parent.parent / f"moment{len(copies)}" / folder.name)
            copy(folder, copies[-1])
        return line
    sys.settrace(lambda frame, *_: line() if frame.f_code.co_filename.endswith(WATCHED) else None)
    try:
        do()
    finally:
        sys.settrace(None)
    return copies


@pytest.mark.parametrize("fault", ["kill", pytest.param("power failure", marks=pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc"))])
def test_a_fault_between_any_two_lines_loses_one_interval(quick, tmp_path, monkeypatch, fault):
    """The training loses at most one interval and keeps a model file. The saves at steps 9 and 12 delete old states."""
    whole = files_of(quick("--max-steps", "12", ckpt_path="whole"))
    folder = quick("--max-steps", "6")
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch) if fault == "power failure" else None
        more = dict(copy=disk.copy, version=lambda: disk.flushes) if disk else {}
        copies = moments(folder, lambda: quick("--max-steps", "12"), **more)
    assert len(copies) > 25, len(copies)
    known, before = 6, {}
    for copy in copies:
        if files_of(copy) == before:  # the same files as in the copy before
            continue
        before = files_of(copy)
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


# ------------------------------------------------------------------------------------------------------------ damage

def flip(path):
    data = bytearray(path.read_bytes() or b" ")  # the lock is empty
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# {name: a function that damages a file, given the same file of another run}
DAMAGE = {
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "bit": lambda path, other: flip(path),
    "empty": lambda path, other: path.write_bytes(b""),
    "gone": lambda path, other: path.unlink(),
    "swapped": lambda path, other: shutil.copy(other, path),
}


@pytest.fixture
def damaged(quick, trainers, tmp_path, capsys):
    """damaged(do) copies a run of 9 steps, calls do(copy, another run of 9 steps), trains to step 12 and asserts that
    the result equals an uninterrupted run of 12 steps. It returns (the step where it continued, the output)."""
    whole, base = quick("--max-steps", "12", ckpt_path="whole"), quick("--max-steps", "9", ckpt_path="base")
    other = quick("--max-steps", "9", "--seed", "1", ckpt_path="other")
    assert len(trainers) == 2  # one for each seed, or the test takes minutes

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
        last, whole_last = ({name: float(value) for name, value in losses_of(run)[-1].items()} for run in (copy, whole))
        assert last == pytest.approx(whole_last, rel=1e-5)  # the order of summation differs
        return int(out.split("steps ")[1].split()[0]), out
    return go_on


def test_damage_to_any_file_of_a_run_is_repaired(damaged, tmp_path):
    """If the newest state is damaged, the training continues from the state before it."""
    names = [name for name in files_of(tmp_path / "base" / "oasis16") if not name.startswith("events")]
    assert {"settings.json", "model.safetensors", "log.csv", "loss.png", "lock", "state/checkpoint",
            "state/ckpt-6.index", "state/ckpt-9.index", "state/ckpt-9.data-00000-of-00001"} < set(names)
    outcomes = collections.Counter()
    for name in names:
        for kind, damage in DAMAGE.items():
            start, out = damaged(lambda run, other: damage(run / name, other / name))
            assert start == (6 if name.startswith("state/ckpt-9") else 9), (name, kind)
            assert start == 9 or "state/ckpt-9 is not used" in out, (name, kind)
            assert name != "model.safetensors" or kind == "swapped" or "model.safetensors is written again" in out, name
            outcomes[start] += 1
    print(outcomes)


def test_a_state_of_another_run_is_not_taken_for_this_ones(damaged):
    def swap(run, other):
        for path in (other / "state").glob("ckpt-9*"):
            shutil.copy(path, run / "state")
    start, out = damaged(swap)
    assert start == 6 and "state/ckpt-9 is not used" in out and "made with other settings" in out


# ------------------------------------------------------------------------------------------------------------ memory

def resident_megabytes():
    """The memory of this process in MiB, without garbage such as matplotlib's figures and without free memory that the
    allocator keeps. These two vary by 30 MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("more, saves, megabytes", [
    (["--max-steps", "20000", "--save-every", "200"], 100, 8), (["--epochs", "200"], 200, 12)],
    ids=["20000 steps", "200 epochs"])
def test_a_day_of_training_holds_no_more_than_an_hour(tiny, monkeypatch, tmp_path, more, saves, megabytes):
    """One case is 20,000 steps, the other 200 epochs that each save, plot and write samples and events. The first 20
    epochs take 20 MB. Afterwards memory does not grow, nothing is traced again, and files grow little per save."""
    sizes, trainers = [], []
    log, make = oasis.run.Run.log, train.Trainer
    monkeypatch.setattr(train, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(train, "Trainer", lambda *args, **options: trainers.append(make(*args, **options))
                        or trainers[-1])
    if saves == 100:
        monkeypatch.setattr(oasis.run, "plot_losses", lambda *_: None)
        for name in "write_state", "write_model", "write_events", "write_samples":
            monkeypatch.setattr(oasis.run.Run, name, lambda *_: None)
    monkeypatch.setattr(oasis.run.Run, "log", lambda run: log(run) or sizes.append(resident_megabytes()))
    began = time.monotonic()
    train.main([*tiny, *more])
    files = {name: len(data) for name, data in files_of(tmp_path / "checkpoint" / "oasis16").items()}
    events = sum(size for name, size in files.items() if name.startswith("events"))
    print(f"{more}: {[round(size) for size in sizes[::len(sizes) // 10]]} and at the end {sizes[-1]:.0f} MB, "
          f"{time.monotonic() - began:.0f} s; bytes: log.csv {files['log.csv']:,}, events {events:,}, "
          f"loss.png {files.get('loss.png', 0):,}")
    assert len(sizes) == saves
    assert sizes[-1] < sizes[2 * saves // 5] + megabytes
    assert trainers[-1].train_steps.experimental_get_tracing_count() == 1
    assert trainers[-1].loss_fn.experimental_get_tracing_count() == 1
    assert files["log.csv"] < 200 * (saves + 1) and events < 3000 * saves
