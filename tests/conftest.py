"""Setup of all tests: the repository on sys.path, a quiet TensorFlow, a separate cache, and the fixtures that several
files use."""
import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"                                    # before anything imports TensorFlow
os.environ["OASIS_CACHE"] = tempfile.mkdtemp(prefix="oasis-tests-")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest

import train
from helpers import OneConvolution, write_slices, zip_folder
from modules import UNet
from oasis import run
from oasis.files import write_png
from oasis.settings import RESUMABLE, TRAINER


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; only `pytest -m slow` runs it")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_collection_finish():
    gc.freeze()  # the million objects of TensorFlow's modules stay, so nobody needs to look for garbage among them


def pytest_unconfigure():
    shutil.rmtree(os.environ["OASIS_CACHE"], ignore_errors=True)


@pytest.fixture
def make_zip(tmp_path):
    """make_zip(subjects=…, slices=…, size=…, split=…) -> path of a zip with made-up slices in the published layout."""
    def make(**what):
        folder = tmp_path / "unpacked"
        write_slices(folder / "keras_png_slices_data", **what)
        return zip_folder(folder, tmp_path / "keras_png_slices_data.zip")
    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache of slices, empty and only for this test."""
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def voxels():
    """float32 (8, 10, 6) whose smallest value is 0 and whose 99.9th percentile is 255."""
    values = np.random.default_rng(0).integers(0, 256, (8, 10, 6)).astype(np.float32)
    values[0, 0, 0], values[1:, 0, 0] = 0, 255
    return values


@pytest.fixture
def tiny(make_zip, tmp_path, monkeypatch):
    """Flags of a run on 24 slices at 16 pixels, three steps an epoch, in tmp_path/checkpoint; the network is
    OneConvolution."""
    monkeypatch.setattr(train, "UNet", OneConvolution)
    monkeypatch.setattr(train, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_STEPS", 1)
    make_zip(subjects=range(100, 103), slices=range(4), size=32, split="validate")
    path = make_zip(subjects=range(6), slices=range(4), size=32)
    return ["--path", str(path), "--ckpt-path", str(tmp_path / "checkpoint"), "--image-size", "16", "--dim", "16",
            "--batch-size", "8", "--timesteps", "100", "--number-of-samples", "0", "--precision", "float32"]


@pytest.fixture
def unet(tiny, monkeypatch):
    """tiny, with a U-Net of one level."""
    monkeypatch.setattr(train, "UNet", functools.partial(UNet, dim_mults=(1,)))
    return tiny


@pytest.fixture(scope="module")
def shared_trainers():
    """Trainers for all tests of a file that use this fixture. They must not replace a function that is traced."""
    return {}


@pytest.fixture
def trainers(request):
    """The Trainers of fast_loop: shared_trainers if the test uses this fixture, else an empty dict."""
    return request.getfixturevalue("shared_trainers") if "shared_trainers" in request.fixturenames else {}


@pytest.fixture
def folder(tmp_path):
    """The run's folder of `tiny`, `unet` and `quick`."""
    return tmp_path / "checkpoint" / "oasis16"


@pytest.fixture
def fast_loop(monkeypatch, trainers):
    """Trainings share a Trainer if all settings that it depends on are equal: tracing takes longer than training.

    Each training starts from the initial variables. loss.png is an empty image.
    """
    make = train.make_trainer
    settings = [name for name, setting in train.SETTINGS.items()
                if RESUMABLE not in setting.facts or TRAINER in setting.facts]

    def make_trainer(flags, *more):
        key = repr([train.UNet, [getattr(flags, name) for name in settings], more])
        if key not in trainers:
            made = make(flags, *more)
            trainers[key] = made, [(variable, variable.numpy()) for variable in made.variables]
        made, initial = trainers[key]
        for variable, value in initial:
            variable.assign(value)
        return made
    monkeypatch.setattr(train, "make_trainer", make_trainer)
    monkeypatch.setattr(run, "plot_losses", lambda path, *_: write_png(path, np.zeros((2, 2), np.uint8)))


@pytest.fixture
def quick(tiny, fast_loop, monkeypatch, tmp_path):
    """quick(*flags) trains on `tiny` and returns the run's folder. It saves after every 3 steps."""
    def go(*more, ckpt_path="checkpoint"):
        assert train.main([*tiny, "--ckpt-path", str(tmp_path / ckpt_path), *more]) == 0
        return tmp_path / ckpt_path / "oasis16"
    monkeypatch.setattr(train, "SAMPLE_EVERY", 2)
    return go
