"""For all tests: the repo on sys.path, a quiet TensorFlow, a cache of their own, tiny data of the real layout."""
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"                                    # before anything imports TensorFlow
os.environ["OASIS_CACHE"] = tempfile.mkdtemp(prefix="oasis-tests-")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
from PIL import Image


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; only `pytest -m slow` runs it")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_unconfigure():
    shutil.rmtree(os.environ["OASIS_CACHE"], ignore_errors=True)


def slice_pixels(subject, number, size):
    """A made-up slice, uint8 (size, size): like no other, and noisy enough that shrinking has something to average."""
    return np.random.default_rng([subject, number]).integers(0, 256, (size, size), dtype=np.uint8)


def write_slices(folder, subjects=(1, 2, 5), slices=(0, 2, 10), size=16, split="train"):
    """Write keras_png_slices_<split>/case_….png and the label maps beside it into `folder`."""
    for kind, name in ("", "case"), ("seg_", "seg"):
        target = Path(folder) / f"keras_png_slices_{kind}{split}"
        target.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            for number in slices:
                pixels = slice_pixels(subject, number, size) if name == "case" else np.zeros((size, size), np.uint8)
                Image.fromarray(pixels).save(target / f"{name}_{subject:03}_slice_{number}.nii.png")


def zip_folder(folder, path):
    """Zip what is in `folder`, without compression as the published zip is."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def make_zip(tmp_path):
    """make_zip(subjects=…, slices=…, size=…, split=…) -> path of a zip with made-up slices in the published layout."""
    def make(**what):
        folder = tmp_path / "unpacked"
        write_slices(folder / "keras_png_slices_data", **what)
        return zip_folder(folder, tmp_path / "keras_png_slices_data.zip")
    return make
