"""Nothing is lost: killed, out of disk, damaged, fed with nonsense. Every test injects the fault and looks at what is left."""
import collections
import contextlib
import csv
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
from dataset import decode, list_slices, load_slices
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
            variables = [*made.weights, *made.ema_weights, *made.optimizer.means, *made.optimizer.squares, made.optimizer.steps, made.step]
            shared[key] = made, [(variable, variable.numpy()) for variable in variables]
        made, first = shared[key]
        for variable, value in first:
            variable.assign(value)
        return made

    def run(*more, ckpt_path="checkpoint"):
        assert train.main([*tiny, "--ckpt-path", str(tmp_path / ckpt_path), *more]) == 0
        return tmp_path / ckpt_path / "oasis16"

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
            finally:
                os._exit(99)
        wait = random.uniform(0.0, 0.6) if dying and not attempt % 2 else None
        begun = None
        while True:
            if shared[8:] != struct.pack("q", -1):
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
            report["steps lost"] += max(reached - began, 0)
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


@pytest.mark.parametrize("kills, seed", [(6, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
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
    train.py, common.py, modules.py and TensorFlow's manager of states that changed it: what a SIGKILL there leaves."""
    watched = [train.__file__, common.__file__, modules.__file__, "checkpoint_management.py"]

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
    whole = files_of(quick("--max-steps", "15", ckpt_path="whole"))
    folder = quick("--max-steps", "6")
    copies = moments(folder, lambda: quick("--max-steps", "15"))  # saves at 9, 12 and 15: each deletes an older state
    assert len(copies) > 40, len(copies)
    known = 6
    for copy in copies:
        step = read_model(copy / "model.safetensors")[1]["step"]
        assert known <= step <= known + 3
        known = step
        quick("--max-steps", "15", ckpt_path=str(copy.parent))
        same_state(tmp_path / "whole" / "oasis16", copy)
        left = files_of(copy)
        assert left["model.safetensors"] == whole["model.safetensors"]
        assert not [name for name in left if name not in whole and "events" not in name]
        shutil.rmtree(copy.parent)
    assert known == 15


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
            assert (start == 9) or f"state/ckpt-9 is not used" in out, (name, kind)
            assert name != "model.safetensors" or kind == "swapped" or "model.safetensors: " in out, (name, kind)
            outcomes[start] += 1
    print(outcomes)


def test_a_whole_state_of_another_run_is_not_taken_for_this_ones(damaged):
    def swap(run, other):
        for path in (other / "state").glob("ckpt-9*"):
            shutil.copy(path, run / "state")
    start, out = damaged(swap)
    assert start == 6 and "state/ckpt-9 is not used" in out and "made with other settings" in out


def test_a_state_written_before_states_had_a_record_is_continued(damaged, quick, monkeypatch):
    def strip(run, _):
        shutil.rmtree(run / "state")
        old = train.Trainer(train.parse_flags(["--image-size", "16", "--dim", "16"]), "float32")
        manager = tf.train.CheckpointManager(old.checkpoint, str(run / "state"), max_to_keep=2)
        old.checkpoint.restore(str(run.parent.parent / "base" / "oasis16" / "state" / "ckpt-9")).assert_existing_objects_matched().expect_partial()
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
    path = tmp_path_factory.mktemp("run") / "oasis16" / "model.safetensors"
    save_model(path, network, {**network.settings, **GaussianDiffusion(50, "x_start").settings, "images": 320, "seed": 0})
    return path


NONSENSE = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf"), True, None, "16", "", [], [1], {}, "v", "noise", [2**40],
            [1] * 1000, [[1]], ["1"], [0], [-1], [1, 2, 4, 8]]


def test_2000_mutated_model_files_load_the_same_weights_or_are_refused(model, tmp_path, monkeypatch):
    """A third are damaged anywhere, a third in the header, a third have nonsense for settings and a checksum that is right."""
    rng, outcomes, intact = np.random.default_rng(0), collections.Counter(), model.read_bytes()
    weights, settings = read_model(model)
    header = 8 + int.from_bytes(intact[:8], "little")
    network = UNet(16, dim=16, dim_mults=(1,))
    built = []

    def build(image_size, dim, dim_mults, channels, patch_size, precision):
        """The U-Net, where it is the one of the file: of others it is noted that their size is bounded, for tracing takes long."""
        built.append((image_size, dim, dim_mults, channels, patch_size))
        modules.check_image_size(image_size, patch_size, len(dim_mults))
        if (dim, dim_mults, channels, patch_size) == (16, [1], 1, 1):
            return network
        assert 16 * dim * dim <= network.count_params() and 9 * (dim * max(dim_mults))**2 <= network.count_params()
        raise ValueError("another network")
    monkeypatch.setattr(modules, "UNet", build)
    file = tmp_path / "model.safetensors"
    for i in range(2000):
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
    assert os.listdir(tmp_path) == ["model.safetensors"] and len(built) > 50
    assert sum(outcomes.values()) == 2000 and outcomes["settings", "ok"] > 5 and outcomes["anywhere", "refused"] > 500


def test_a_model_file_that_claims_to_be_huge_costs_no_memory(model, tmp_path):
    weights, settings = read_model(model)
    for change in ({"dim": 4096}, {"dim_mults": [1, 4096]}, {"channels": 4096}, {"patch_size": 4096}, {"image_size": 2**20},
                   {"timesteps": 2**40}, {"dim_mults": [1] * 10**6}):
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


def test_2000_mutated_zips_are_read_or_refused_and_nothing_is_unpacked(tmp_path, monkeypatch):
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
    for i in range(2000):
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
    assert sorted(tmp_path.rglob("*")) == before and sum(outcomes.values()) == 2000
    assert all(outcomes[kind, "refused"] > 100 for kind in ("anywhere", "table", "png"))
