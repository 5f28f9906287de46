"""The OASIS brain slices: from a zip or a folder to a uint8 array, and from the array to batches in [-1, 1].

The published data is one zip of 8-bit grey PNGs, 256×256, in which the head lies on its side:

    keras_png_slices_data/keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png

NNN is the subject (three digits, with gaps) and K is the slice index (not padded). The zip also holds label maps,
keras_png_slices_seg_{…}/seg_NNN_slice_K.nii.png, which are never training images.
"""
import contextlib
import hashlib
import io
import os
import re
import struct
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from oasis.files import OasisError, replacing

# The pattern is searched at the end of a path, so the folders above the split's folder do not matter. A name such as
# "._case_…" (macOS) or a folder such as keras_png_slices_seg_train does not match. Some zips contain backslashes.
SLICE_NAME = re.compile(r"(?:^|[/\\])keras_png_slices_(train|validate|test)[/\\]"
                        r"case_([0-9]+)_slice_([0-9]+)\.nii\.png$")
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
MAX_SIDE = 4096         # pixels; a damaged header may claim more than the memory can hold
MAX_BYTES = 2**25       # of one PNG: twice a 4096×4096 slice without compression
CACHE_FORMAT = 1        # increase it when load_slices makes another array of the same files


# ----------------------------------------------------------------------------------------------------------- source

class Slice(NamedTuple):
    """One slice of a brain. subject and number are those of its file name; name is its path, in the zip or on disk."""
    subject: int
    number: int
    name: str


class Source(NamedTuple):
    """A zip or a folder that is open for reading. Members are read in place: nothing is ever unpacked."""
    path: Path
    label: str          # the text before a member's name that makes it a location
    names: list         # of every file in it
    read: Callable      # name -> bytes, from any thread
    stamp: Callable     # names -> a value that changes when one of these files changes


@contextlib.contextmanager
def naming(file, cure):
    """Turn an exception of the block into an OasisError that names the file, the reason and the cure.

    Every Exception is caught, because a damaged file makes zipfile and Pillow raise almost any class: OSError,
    SyntaxError, ValueError, EOFError, RuntimeError (an encrypted member), struct.error, zlib.error, BadZipFile, …
    """
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OasisError(f"{file}: {' '.join(reason.split())}. {cure}") from error


@contextlib.contextmanager
def open_source(path):
    """Yield the Source at `path`, a zip or a folder."""
    with contextlib.ExitStack() as stack:
        with naming(path, "Put keras_png_slices_data.zip there, or name the zip or the unpacked folder that you have."):
            path = Path(path).expanduser().absolute()
            source = open_folder(path) if path.is_dir() else open_zip(path, stack)
        yield source


def open_folder(path):
    def fail(error):            # by default, os.walk ignores a folder that it may not read
        raise error

    def read(name):
        with open(name, "rb") as file:
            return file.read(MAX_BYTES)

    def stamp(names):
        status = []
        for name in names:
            with naming(name, "Remove this file, or take the published data again."):
                status.append(os.stat(name))
        return [(file.st_size, file.st_mtime_ns) for file in status]

    walk = os.walk(path, onerror=fail, followlinks=True)
    return Source(path, "", [os.path.join(folder, name) for folder, _, names in walk for name in names], read, stamp)


def open_zip(path, stack):
    file = stack.enter_context(open(path, "rb"))
    status = os.fstat(file.fileno())            # of the open file: another one may get its name meanwhile
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
    except zipfile.BadZipFile as error:
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":       # the table of contents is at the end
            raise OasisError(f"is a zip with its end missing, as after a broken download ({error})") from error
        raise OasisError("is not a zip") from error
    lock = threading.Lock()                     # zipfile does not promise thread safety

    def read(name):
        if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OasisError("is compressed in a way that can need any amount of memory")  # the dictionary of LZMA
        with lock, archive.open(name) as member:
            return member.read(MAX_BYTES)

    return Source(path, f"{path}: ", archive.namelist(), read, lambda names: (status.st_size, status.st_mtime_ns))


# ------------------------------------------------------------------------------------------------------ which slices

def evenly(items, count):
    """`count` of the items, evenly spaced; the middle one for a count of 1."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def find_slices(source, split):
    """The Slices of a split, sorted by subject, then by slice index."""
    found, splits = {}, set()
    for name in dict.fromkeys(source.names):    # a zip may hold a name twice: the last one counts, as in unzip
        match = SLICE_NAME.search(name)
        if not match or "__MACOSX" in name:
            continue
        splits.add(match[1])
        if match[1] == split:
            slice_ = Slice(int(match[2]), int(match[3]), name)
            twin = found.setdefault(slice_[:2], slice_)
            if twin is not slice_:
                raise OasisError(f"{source.path}: holds one slice twice, {twin.name} and {name}. Remove one of them.")
    if not splits:
        inner = [name for name in source.names if name.endswith("keras_png_slices_data.zip")]
        if inner:
            raise OasisError(f"{source.path}: holds no slices, but {inner[0]}. Name this file, which may have to be "
                             "unpacked first.")
        raise OasisError(f"{source.path}: holds no OASIS slices (keras_png_slices_train/case_001_slice_0.nii.png, …). "
                         "Name keras_png_slices_data.zip or the folder that it unpacks to.")
    if not found:
        raise OasisError(f"{source.path}: holds no slices of split {split!r}. It has: {', '.join(sorted(splits))}.")
    return [found[key] for key in sorted(found)]


def choose_slices(slices, limit):
    """At most `limit` of the slices, in their order, evenly spread over all subjects. The choice is always the same.

    Every round takes one slice of each subject until there are enough; the last round takes evenly spaced subjects.
    The slices of one subject are evenly spaced in its head.
    """
    if limit is None or limit >= len(slices):
        return slices
    if limit < 1:
        raise OasisError(f"cannot load {limit} slices: the number of slices must be at least 1.")
    heads = {}
    for slice_ in slices:
        heads.setdefault(slice_.subject, []).append(slice_)
    quotas = dict.fromkeys(heads, 0)
    while missing := limit - sum(quotas.values()):
        willing = [subject for subject in heads if quotas[subject] < len(heads[subject])]
        for subject in evenly(willing, min(missing, len(willing))):
            quotas[subject] += 1
    return [slice_ for subject, head in heads.items() for slice_ in evenly(head, quotas[subject])]


def list_slices(path, split="train", limit=None):
    """The Slices that load_slices(path, split, limit=limit) loads: one for each of its rows."""
    with open_source(path) as source:
        return choose_slices(find_slices(source, split), limit)


def slice_subjects(path, split="train", limit=None):
    """The subject (the case number) of each row of load_slices(path, split, limit=limit): int64 (N,)."""
    return np.array([slice_.subject for slice_ in list_slices(path, split, limit)], np.int64)


# ----------------------------------------------------------------------------------------------------------- decode

def side_of(png):
    """The side in pixels of a square 8-bit grey PNG, read from its header alone. Others raise OasisError."""
    if len(png) < 26 or not png.startswith(PNG_START):
        raise OasisError("is not a PNG")
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    if (depth, colour) != (8, 0):
        raise OasisError(f"is {depth}-bit {PNG_COLOURS.get(colour, 'of an unknown colour')}, not 8-bit grey")
    if width != height or not 1 <= width <= MAX_SIDE:
        raise OasisError(f"is {width}×{height}, not square or not within {MAX_SIDE}×{MAX_SIDE}")
    return width


def decode(png, image_size):
    """One slice, uint8 (image_size, image_size). A PNG of this size is not changed.

    Shrinking averages the area under each new pixel, so that the thin skull does not turn into dots. Pillow's BOX does
    so only if the new size divides the old one. From 256 to 96, 160 or 192 pixels, the error of Pillow's HAMMING is
    less than half of BOX's error.
    """
    side = side_of(png)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        if side % image_size == 0:
            return np.asarray(image.reduce(side // image_size))        # BOX, rounded once instead of twice
        resampling = Image.Resampling.HAMMING if image_size < side else Image.Resampling.BICUBIC
        return np.asarray(image.resize((image_size, image_size), resampling))


def decode_slices(source, slices, image_size):
    """The slices as uint8 (N, S, S, 1). They are decoded in threads: Pillow and zlib work outside Python's lock."""
    try:
        images = np.empty((len(slices), image_size, image_size, 1), np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than a process can address
        raise OasisError(f"{len(slices)} slices of {image_size}×{image_size} pixels do not fit into the memory: "
                         "ask for fewer or smaller ones.") from error
    first = []

    def decode_into(row):
        with naming(source.label + slices[row].name, "Slices are square 8-bit grey PNGs of one size, 256×256 in OASIS: "
                                                     "remove this file, or take the published data again."):
            png = source.read(slices[row].name)
            side = side_of(png)
            if row == 0:
                first.append(side)
            elif side != first[0]:
                raise OasisError(f"is {side}×{side}, but {slices[0].name} is {first[0]}×{first[0]}")
            images[row, :, :, 0] = decode(png, image_size)

    decode_into(0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(decode_into, range(1, len(slices)))
        for _ in tqdm(rows, f"decoding {source.path.name}", len(slices), initial=1, unit=" slices", delay=1):
            pass
    return images


def load_slices(path, split="train", image_size=64, limit=None):
    """The slices of a split: uint8 (N, S, S, 1) with S = image_size, sorted by subject, then by slice index.

    path: keras_png_slices_data.zip, or the folder that it unpacks to. split: "train", "validate" or "test".
    limit: the largest number of slices, evenly spread over all subjects and always the same; None loads all.

    The array is cached in ~/.cache/oasis-diffusion (or the folder $OASIS_CACHE), so a second call takes no time. Its
    name there is a hash of everything that it depends on. The folder can be deleted safely.

    Raises OasisError for a path that holds no such slices, and for the first slice that is damaged, not an 8-bit grey
    PNG, or of another size than the others.
    """
    if image_size < 1:
        raise OasisError(f"cannot make images of {image_size}×{image_size} pixels: the size must be at least 1.")
    with open_source(path) as source:
        slices = choose_slices(find_slices(source, split), limit)
        names = [slice_.name for slice_ in slices]
        contents = repr((CACHE_FORMAT, str(source.path), source.stamp(names), int(image_size), names))
        key = hashlib.blake2b(contents.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        images = read_cache(key, (len(slices), image_size, image_size, 1))
        if images is None:
            images = decode_slices(source, slices, image_size)
            write_cache(key, images)
        return images


# ------------------------------------------------------------------------------------------------------------ cache

def cache_path(key):
    return Path(os.environ.get("OASIS_CACHE") or "~/.cache/oasis-diffusion").expanduser() / f"{key}.npy"


def read_cache(key, shape):
    """The array that was written under this key, or None if the file is missing or damaged."""
    try:
        with open(cache_path(key), "rb") as file:
            images = np.load(file, allow_pickle=False)
            intact = images.shape == shape and images.dtype == np.uint8 and file.read() == checksum(images)
            return images if intact else None
    except Exception:           # the array is made again, whatever is wrong with the file
        return None


def write_cache(key, images):
    """Write the array as an .npy file with a checksum after its end. A failure only costs time, so it is a warning."""
    try:
        with replacing(cache_path(key)) as temporary, open(temporary, "wb") as file:
            np.save(file, images, allow_pickle=False)
            file.write(checksum(images))
    except (OasisError, RuntimeError) as error:        # RuntimeError: there is no home folder
        print(f"warning: the decoded slices are not kept for the next time: {error}", file=sys.stderr)


def checksum(images):
    return struct.pack("<I", zlib.crc32(images))


# ---------------------------------------------------------------------------------------------------------- batches

def make_dataset(images, batch_size, seed, start_step=0, flips=0.0):
    """An endless tf.data.Dataset of float32 (batch_size, S, S, 1) in [-1, 1]; its first element is batch start_step.

    images: uint8 (N, S, S, 1), or a tuple of such an array and an array (N, …) with an entry for each image, such as a
    label. The elements are then tuples too. seed: any int64. flips: the share of the images that is mirrored across the
    midline of the brain, which is horizontal in these slices. These are different images in each epoch.

    Batch k is a pure function of the arguments and k: elements k·batch_size … (k+1)·batch_size − 1 of a stream that
    holds every image once per epoch, in a different order in each epoch. So a run that is resumed at step k sees the
    same batches as a run without interruption, and the start at batch k costs nothing.
    """
    images, *others = images if isinstance(images, tuple) else (images,)
    assert images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0 and batch_size > 0, images.shape
    count = len(images)
    # The shuffling op uses 31 bits of each of three numbers. Two come from a hash of the seed, the third is the epoch.
    order, flip = tf.constant(np.random.SeedSequence(int(seed) % 2**64).generate_state(4).reshape(2, 2), tf.int64)

    # This copies the images. tf.numpy_function would not, but 2 of 4 runs with it on TensorFlow 2.15 never exited.
    with tf.device("CPU"):      # only batches go to a GPU
        pixels, *others = (tf.constant(array) for array in (images, *others))

    def places(positions, seed):
        # Positions in one permutation for each epoch, without computing the whole permutation. The function
        # tf.random.experimental.index_shuffle does the same with 4 rounds instead of 16, but with 4 rounds the orders
        # of two epochs correlate (r = 0.07 for 4832 images).
        seeds = tf.concat([tf.repeat(seed[None], batch_size, axis=0), positions[:, None] // count], axis=1)
        return tf.raw_ops.RandomIndexShuffle(index=positions % count, seed=seeds,
                                             max_index=tf.constant(count - 1, tf.int64), rounds=16)

    def batch(step):
        positions = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        rows = places(positions, order)
        slices = tf.gather(pixels, rows)
        if flips:
            mirrored = places(positions, flip) < round(flips * count)
            slices = tf.where(mirrored[:, None, None, None], slices[:, ::-1], slices)
        slices = tf.cast(slices, tf.float32) / 127.5 - 1.0
        return (slices, *(tf.gather(array, rows) for array in others)) if others else slices

    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False      # they would copy all images once more
    steps = tf.data.Dataset.counter(start_step)
    batches = steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def to_uint8(x):
    """Images x in [-1, 1], of any shape, as uint8 0 … 255, clipped and rounded.

    This undoes the scaling of make_dataset exactly. Raises OasisError for NaN and infinity, which would become black.
    """
    x = np.asarray(x).astype(np.float32)
    if not np.isfinite(x).all():
        raise OasisError("the images hold NaN or infinite values: the model that made them has diverged. Train it "
                         "again with a lower --learning-rate or with --precision float32.")
    return np.rint(np.clip((x + 1.0) * 127.5, 0, 255)).astype(np.uint8)
