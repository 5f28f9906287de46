"""Shared by several test files: made-up slices, a network that is traced quickly, and functions that read a run's
folder."""
import ast
import csv
import functools
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import train
from dataset import list_slices, load_slices, load_split
from modules import GaussianDiffusion, UNet, save_model
from oasis.files import OasisError
from oasis.parameters import initialize, named_variables

ROOT = Path(train.__file__).resolve().parent
PROGRAMS = Path(__file__).resolve().parent / "programs"
SAMPLE = ROOT / "dataset" / "sample_slices.zip"
T88 = "PROCESSED/MPRAGE/T88_111/{0}_mpr_n4_anon_111_t88_gfc.hdr"
FSEG = "FSL_SEG/{0}_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr"


def slice_pixels(subject, number, size):
    """A made-up slice, uint8 (size, size): uniform noise, different for each subject and number."""
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
    """Zip the files in `folder` without compression, like the published zip, and return `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def write_image(path, pixels):
    """Write an array as an image file in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_images(folder, names, pixels=None):
    """Write an image for each name, in the format of its suffix. pixels: of all images; None: different images."""
    for i, name in enumerate(names):
        write_image(folder / name, slice_pixels(i, 0, 16) if pixels is None else pixels)
    return folder


def image_file(image, format="PNG"):
    """The bytes of an image file with a PIL Image."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def png(pixels):
    """The bytes of a PNG with the pixels of an array."""
    return image_file(Image.fromarray(pixels))


def png_of(chunks):
    """The bytes of a PNG with these chunks, [(type, data)], and correct checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)


def refused(path, *words, load=load_split, **options):
    """Assert that load(path, **options) refuses the path in one line with all the words."""
    with pytest.raises(OasisError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def set_later(path, seconds=1):
    """Add seconds to the time of the last change of a file. Two changes in a short time may get the same time."""
    changed = path.stat().st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(changed, changed))


def write_volume(path, voxels, zooms=(1, 1, 1), axes="RAS"):
    """Write voxels, whose axes point right, forward and up (RAS), as a volume with the axes `axes`. Return `path`."""
    affine = np.diag([*zooms, 1.0])
    image = nibabel.Nifti1Image(voxels, affine)
    orientation = nibabel.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), orientation))
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nibabel.AnalyzeImage if path.suffix == ".hdr" else nibabel.Nifti1Image
    nibabel.save(kind(image.dataobj, image.affine), path)
    return path


def sample_head(row):
    """Return (slices uint8 (4, 256, 256), their slice indices) of the row-th subject of the sample slices."""
    slices = list_slices(SAMPLE)
    subject = sorted({one.subject for one in slices})[row]
    rows = [i for i, one in enumerate(slices) if one.subject == subject]
    return load_slices(SAMPLE, image_size=256)[rows, :, :, 0], [slices[i].number for i in rows]


def write_analyze(path, planes):
    """Write {slice index: int (176, 208)} like OASIS: int16, four dimensions, the first axis from right to left."""
    voxels = np.zeros((176, 208, 176, 1), np.int16)
    for number, plane in planes.items():
        voxels[::-1, :, 72 + number, 0] = plane
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.AnalyzeImage(voxels, np.diag([-1.0, 1, 1, 1])), path)


def write_session(disc, subject, row=0, scale=7, name=T88, labels=True, session=1):
    """Write the OASIS session of a subject with the slices of the row-th sample subject. Return its folder."""
    session = f"OAS1_{subject:04}_MR{session}"
    head, numbers = sample_head(row)
    planes = dict(zip(numbers, head[:, 40:216, 24:232].astype(int)))
    write_analyze(disc / session / name.format(session), {k: scale * plane for k, plane in planes.items()})
    if labels:
        write_analyze(disc / session / FSEG.format(session), {k: plane // 64 for k, plane in planes.items()})
    return disc / session


class OneConvolution(tf.keras.Model):
    """A stand-in for the U-Net in tests of the loop: tracing the U-Net takes ten seconds."""

    def __init__(self, image_size, precision="float32", seed=0, **settings):
        super().__init__()
        self.image_size, self.settings = image_size, dict(settings, image_size=image_size)
        self.convolution = tf.keras.layers.Conv2D(1, 3, padding="same")
        self.time = tf.keras.layers.Dense(1)
        self(tf.zeros([1, 8, 8, 1]), tf.zeros([1], tf.int32))
        initialize(self, seed)

    def call(self, x, t):
        return self.convolution(x) + self.time(tf.cast(t, tf.float32)[:, None] / 100)[:, None, None]


def awake(network):
    """Add random numbers to all parameters of a network that are initially 0 or 1, and return it. The numbers depend on
    the shapes alone."""
    rng = np.random.default_rng(1)
    for _, variable in named_variables(network):
        if not np.unique(variable.numpy()).size > 1:
            variable.assign(variable + 0.1 * rng.standard_normal(variable.shape))
    return network


def trainer_of(flags, *more, precision="float32"):
    """The Trainer that the flags describe."""
    return train.make_trainer(train.parse_flags([*flags, *more]), precision, mirror_axis=1)


def a_batch(count=8, seed=0):
    """float32 (count, 16, 16, 1) of uniform noise in [-1, 1]."""
    return tf.constant(np.random.default_rng(seed).uniform(-1, 1, [count, 16, 16, 1]), tf.float32)


def state_of(folder):
    """Return {name: array} of the newest state in a run's folder. The record is left out: its durations differ between
    equal trainings."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder / "state")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
            if not any(part in name for part in ("save_counter", "CHECKPOINTABLE", "record"))}


def same_state(a, b):
    """Assert that the newest states of two runs' folders are equal, bit for bit."""
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    for part in ("network/", "ema/", "optimizer/means/", "optimizer/squares/", "optimizer/steps/", "step/"):
        assert any(name.startswith(part) for name in a), part
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different, different[:5]


def files_of(folder):
    """Return {relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses_of(folder):
    """The rows of log.csv without the columns that depend on the clock."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in ("images_per_second", "seconds")}
                for row in csv.DictReader(file)]


def run_in_new_process(command, **options):
    """Run a command and return the finished process. options: arguments of subprocess.run."""
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def network_of_environment():
    """The network that the variable NETWORK names: OneConvolution for "tiny", else a U-Net of one level."""
    return OneConvolution if os.environ.get("NETWORK") == "tiny" else functools.partial(UNet, dim_mults=(1,))


# train.py in a process of its own, with network_of_environment().
SMALL_TRAIN = [sys.executable, str(PROGRAMS / "small_train.py")]


def copy_repository(folder):
    """Copy the files that git does not ignore to a new folder, and return the folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


# train.py in a process of its own, with the network and the signal that environment variables name.
WORKER = [sys.executable, str(PROGRAMS / "worker.py")]


def same_training(a, b):
    """Assert that two runs' folders hold the same training, up to the order of summation.

    Parameters may differ by 1e-4 of the largest value in each array.
    """
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys() and len(first) > 8
    parameters = [name for name in first if name.startswith(("network/", "ema/"))]
    assert len(parameters) >= 8
    for name in parameters:
        assert np.abs(first[name] - second[name]).max() < 1e-4 * np.abs(first[name]).max(), name
    logs = [np.genfromtxt(folder / "log.csv", delimiter=",", names=True) for folder in (a, b)]
    for name in ("loss", "loss_t1", "loss_t4", "validation_loss", "gradient_norm"):
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-3, err_msg=name)


def kernel_has_moved(folder):
    """Assert that the training of a OneConvolution in a run's folder changed its kernel by more than 0.01."""
    kernel, = (array for name, array in state_of(folder).items()
               if name.startswith("network/convolution/") and name.split("/")[2].endswith("kernel"))
    assert np.abs(kernel - OneConvolution(16).convolution.kernel.numpy()).max() > 1e-2


def write_small_model(path, dim_mults=(1, 2)):
    """Write a model file for 16 pixels with random parameters, also in the last convolution. Return `path`."""
    network = UNet(16, dim=16, dim_mults=dim_mults)
    for name, variable in named_variables(network):
        if name.startswith("last_conv"):
            variable.assign(tf.random.stateless_normal(variable.shape, [3, 4]))
    save_model(path, network, {**network.settings, **GaussianDiffusion(50, "x_start").settings, "images": 320})
    return path


def make_heads(count, seed, size=64):
    """Grey ellipses with a bright rim, two holes and some texture, no two alike: uint8 (count, size, size, 1)."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    heads = []
    for _ in range(count):
        width, height, hole, grey = rng.uniform((0.28, 0.33, 0.04, 80), (0.36, 0.42, 0.10, 130))
        radius = np.hypot(x / width, y / height)
        waves = sum(np.sin(2 * np.pi * (rng.uniform(4, 12) * x + rng.uniform(-12, 12) * y)) for _ in range(4))
        brain = grey + 8 * waves - 60 * (np.hypot((np.abs(x) - hole) / hole, y / (2 * hole)) < 0.8)
        heads.append(np.where(radius < 0.9, brain, np.where(radius < 1, 220, 0)))
    return np.clip(np.rint(heads), 0, 255).astype(np.uint8)[..., None]


def flat_images(*greys):
    """One constant image for each of the grey levels: uint8 (N, 64, 64, 1)."""
    return np.stack([np.full((64, 64, 1), grey, np.uint8) for grey in greys])


def imports_of(path):
    """The repository's files that a Python file imports, at its top or in a function, such as {"oasis/files.py"}."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # an imported name may be a module of a package
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") + ".py" for name in imported}
    return {file for file in files if (ROOT / file).is_file()}


def outcome(do, memory=2**30):
    """Call do(): "ok" if it returns, "refused" if it raises an OasisError of one line. It may allocate at most
    `memory` bytes."""
    import resource  # which Windows lacks, and as_on_windows.py imports this file
    size = None
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
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
    """The bytes with one to three random faults: a changed bit, byte, run of bytes or number, a cut end, a removed or a
    repeated piece."""
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
