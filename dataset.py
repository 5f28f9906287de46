"""Images to train on: from files to a uint8 array, and from the array to batches in [-1, 1].

The published OASIS data is one zip of 8-bit grey PNGs, 256×256, in which the head lies on its side:

    keras_png_slices_data/keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png

NNN is the subject (three digits, with gaps) and K is the slice index (not padded). The zip also holds label maps,
keras_png_slices_seg_{…}/seg_NNN_slice_K.nii.png, which are never training images. Other images are read as well, see
oasis/sources.py.
"""
import collections
import hashlib
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from oasis.archives import naming
from oasis.files import OasisError, replacing
from oasis.progress import progress
from oasis.sources import NoSuchSplit, Reading, open_source

CACHE_FORMAT = 3        # increase it when the same files result in another array
LISTED = 10             # number of unreadable files that are printed


# ------------------------------------------------------------------------------------------------------ which slices

def evenly(items, count):
    """`count` of the items, evenly spaced; the middle one for a count of 1."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def choose_slices(slices, limit):
    """At most `limit` of the slices, in their order, evenly spread over all subjects. The choice is always the same.

    Each subject gives the same number of slices, evenly spaced in the head, or all of its slices if it has fewer. If
    this is less than the limit, some subjects, evenly spaced in the list of subjects, give one more.
    """
    if limit is None or limit >= len(slices):
        return slices
    if limit < 1:
        raise OasisError(f"cannot load {limit} slices: the number of slices must be at least 1.")
    by_subject = {}
    for slice_ in slices:
        by_subject.setdefault(slice_.subject, []).append(slice_)
    quotas = dict.fromkeys(by_subject, 0)
    while missing := limit - sum(quotas.values()):
        unfinished = [subject for subject, own in by_subject.items() if quotas[subject] < len(own)]
        for subject in evenly(unfinished, min(missing, len(unfinished))):
            quotas[subject] += 1
    return [slice_ for subject, own in by_subject.items() for slice_ in evenly(own, quotas[subject])]


def list_slices(path, split="train", limit=None, **reading):
    """The Slices whose images load_slices returns for these arguments, in the same order.

    Files that --skip-unreadable leaves out while decoding are still in the list.
    """
    with open_source(path, Reading(**reading)) as source:
        return choose_slices(source.slices(split), limit)


def slice_subjects(path, split="train", **reading):
    """The subject of each Slice of list_slices: int64 (N,) for OASIS, else an array of texts."""
    return np.array([one.subject for one in list_slices(path, split, **reading)])


# ----------------------------------------------------------------------------------------------------------- decode

def resize(image, image_size):
    """Resize a square uint8 image to (image_size, image_size). An image of this size is returned unchanged.

    Shrinking averages the area under each new pixel, so that the thin skull does not turn into dots. BOX does this
    exactly if the new size divides the old one. Otherwise HAMMING is used, whose error is less than half of BOX's
    from 256 to 96, 160 or 192 pixels. Enlarging is BICUBIC.
    """
    side, image = len(image), Image.fromarray(image)
    if side % image_size == 0:
        return np.asarray(image.reduce(side // image_size))         # BOX, rounded once instead of twice
    resampling = Image.Resampling.HAMMING if image_size < side else Image.Resampling.BICUBIC
    return np.asarray(image.resize((image_size, image_size), resampling))


def decode_slices(source, slices, image_size):
    """Return (images uint8 (N, S, S, 1), the slices, {conversion: number of images}), without unreadable files.

    Files are decoded in threads, because Pillow and zlib release Python's global lock.
    """
    try:
        images = np.empty((len(slices), image_size, image_size, 1), np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than a process can address
        raise OasisError(f"{len(slices)} images of {image_size}×{image_size} pixels do not fit into memory: "
                         "load fewer images, or choose a smaller image size.") from error
    rows, errors = {}, {}
    for row, one in enumerate(slices):
        rows.setdefault(one.name, []).append(row)

    def decode_into(name):
        location = source.files.location(name)
        try:
            with naming(location, "" if source.reading.skip_unreadable else source.advice):
                squares, conversions = source.read(name, [slices[row].number for row in rows[name]])
                for row, square in zip(rows[name], squares):
                    images[row, :, :, 0] = resize(square, image_size)
            return collections.Counter(dict.fromkeys(conversions, len(rows[name])))
        except OasisError as error:
            if not source.reading.skip_unreadable:
                raise
            errors[name] = str(error)
            return {}

    conversions = collections.Counter()
    with ThreadPoolExecutor(source.threads or os.cpu_count()) as pool:
        for made in progress(pool.map(decode_into, rows), f"decoding {source.path.name}", len(rows), unit=" files",
                             delay=1):
            conversions.update(made)
    # The threads may have met the errors in any order.
    source.unreadable.update({source.files.location(name): errors[name] for name in rows if name in errors})
    if len(errors) == len(rows):
        raise NoSuchSplit(f"{source.path}: none of its {len(rows)} files can be read. The first error: "
                          f"{next(iter(source.unreadable.values()))}")
    if errors:
        readable = [one.name not in errors for one in slices]
        images, slices = images[readable], list(itertools.compress(slices, readable))
    return images, slices, dict(conversions)


class Split(NamedTuple):
    """The images of a split and facts about them."""
    images: np.ndarray      # uint8 (N, S, S, 1)
    slices: list            # the Slice of each
    available: int          # images of the split at the path, loaded or not
    noun: str               # the word for the images in messages, such as "slices"
    mirror_axis: int        # of images, along which --flips mirrors
    flips: float            # the share of them that --flips auto mirrors
    geometry: dict          # see oasis.sources.Source
    report: str             # lines about the images and subjects at the path
    conversions: dict       # {conversion: number of images that needed it}
    unreadable: dict        # {file: why it was left out}

    @property
    def description(self):
        """The number of images and of subjects in words, such as "4,832 slices of 302 subjects"."""
        return f"{len(self.images):,} {self.noun} of {len({one.subject for one in self.slices}):,} subjects"


def print_report(*splits):
    """Print how the images of these Splits, all of one path, were found and converted, and which files are left out."""
    conversions, unreadable = collections.Counter(), {}
    for split in splits:
        conversions.update(split.conversions)
        unreadable.update(split.unreadable)
    noun, errors = splits[0].noun, [f"left out: {error}" for error in unreadable.values()]
    lines = [splits[0].report, *(f"{count:,} {noun}: {text}" for text, count in sorted(conversions.items())),
             *errors[:LISTED]]
    if len(errors) > LISTED:
        lines.append(f"left out: … and {len(errors) - LISTED:,} more")
    for line in filter(None, lines):
        print(line)


def load_split(path, split="train", image_size=64, limit=None, **reading):
    """The Split that load_slices takes its images from; the arguments are the same."""
    if image_size < 1:
        raise OasisError(f"cannot make images of {image_size}×{image_size} pixels: the size must be at least 1.")
    with open_source(path, Reading(**reading)) as source:
        available = source.slices(split)
        slices = choose_slices(available, limit)
        stamp = source.stamp(dict.fromkeys(one.name for one in slices))
        contents = repr((CACHE_FORMAT, type(source).__name__, str(source.path), stamp, int(image_size), source.reading,
                         slices))
        key = hashlib.blake2b(contents.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        images, conversions = read_cache(key, (len(slices), image_size, image_size, 1)) or (None, {})
        if images is None:
            images, slices, conversions = decode_slices(source, slices, image_size)
            if not source.unreadable:  # its permissions may change, which the stamp does not show
                write_cache(key, images, conversions)
        return Split(images, slices, len(available), source.noun, source.mirror_axis, source.flips, source.geometry,
                     source.report, conversions, source.unreadable)


def load_slices(path, split="train", image_size=64, limit=None, **reading):
    """Load the images of a split: uint8 (N, S, S, 1), S = image_size, in the order of subjects and slice indices.

    path: keras_png_slices_data.zip or the folder that it unpacks to; a folder or zip of other images; an .npy; or a
    NIfTI or Analyze volume or a folder of them. split: "train", "validate" or "test". limit: load at most so many
    images, evenly spread over all subjects, always the same ones; None loads all. reading: fields of Reading.

    The array is cached in ~/.cache/oasis-diffusion (or the folder $OASIS_CACHE), so a second call is fast. The name
    of the file is a hash of everything that the images depend on. The folder can be deleted safely.

    Raises OasisError for a path without images of the split and, unless skip_unreadable is true, for the first file
    that is damaged or, among OASIS slices, not a square 8-bit grey PNG.
    """
    return load_split(path, split, image_size, limit, **reading).images


def load_training(path, image_size, limit, validation_limit, **reading):
    """Return (training Split, validation Split or None). Prints which images were found, converted and left out."""
    training, validation = load_split(path, "train", image_size, limit, **reading), None
    try:
        validation = load_split(path, "validate", image_size, validation_limit, **reading)
    except NoSuchSplit as error:
        reason = error
    print_report(*filter(None, [training, validation]))
    if limit and training.available < limit:
        print(f"{path} holds {training.available:,} training {training.noun}, not {limit:,}: training on all")
    if limit and training.available > limit:
        print(f"training on {len(training.images):,} of {training.available:,} {training.noun}: "
              "--number-of-samples 0 takes all")
    if not validation:
        print(f"no validation loss: {reason}")
    return training, validation


# ------------------------------------------------------------------------------------------------------------ cache

def cache_path(key):
    return Path(os.environ.get("OASIS_CACHE") or "~/.cache/oasis-diffusion").expanduser() / f"{key}.npz"


def read_cache(key, shape):
    """Return the (images, conversions) that write_cache() wrote, or None if the file is missing or damaged.

    Each array in the file has a checksum.
    """
    try:
        with np.load(cache_path(key), allow_pickle=False) as file:
            images, conversions = file["images"], json.loads(str(file["conversions"]))
        return (images, conversions) if images.shape == shape and images.dtype == np.uint8 else None
    except Exception:           # whatever is wrong with the file, the images are decoded again
        return None


def write_cache(key, images, conversions):
    """Keep images and {conversion: number of images} under a key. A failure only costs time, so it only warns."""
    try:
        with replacing(cache_path(key)) as temporary:
            np.savez(temporary, images=images, conversions=json.dumps(conversions))
    except (OasisError, RuntimeError) as error:        # RuntimeError: there is no home folder
        print(f"warning: the decoded images could not be cached: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- batches

def make_dataset(images, batch_size, seed, start_step=0):
    """An endless tf.data.Dataset of float32 (batch_size, S, S, C) in [-1, 1]; its first element is batch start_step.

    images: uint8 (N, S, S, C), or a tuple of such an array and an array (N, …) with an entry for each image, such as a
    label. The elements are then tuples too. seed: any int64.

    Batch k is a pure function of the arguments and k: elements k·batch_size … (k+1)·batch_size − 1 of a stream that
    holds every image once per epoch, in a different order in each epoch. So a run that is resumed at step k sees the
    same batches as a run without interruption, and starting at batch k takes no extra time.
    """
    images, *others = as_tuple(images)
    assert images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0 and batch_size > 0, images.shape
    count = len(images)
    # The shuffling op uses 31 bits of each of three numbers. Two come from a hash of the seed, the third is the epoch.
    order = tf.constant(np.random.SeedSequence(int(seed) % 2**64).generate_state(2), tf.int64)

    # This copies the images. tf.numpy_function would not, but 2 of 4 runs with it on TensorFlow 2.15 never exited.
    with tf.device("CPU"):      # only batches go to a GPU
        pixels, *others = (tf.constant(array) for array in (images, *others))

    def rows_at(positions):
        # Positions in one permutation for each epoch, without computing the whole permutation. The function
        # tf.random.experimental.index_shuffle does the same with 4 rounds instead of 16, but with 4 rounds the orders
        # of two epochs correlate (r = 0.07 for 4832 images).
        seeds = tf.concat([tf.repeat(order[None], batch_size, axis=0), positions[:, None] // count], axis=1)
        return tf.raw_ops.RandomIndexShuffle(index=positions % count, seed=seeds,
                                             max_index=tf.constant(count - 1, tf.int64), rounds=16)

    def batch(step):
        positions = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        rows = rows_at(positions)
        slices = from_uint8(tf.gather(pixels, rows))
        return (slices, *(tf.gather(array, rows) for array in others)) if others else slices

    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False      # they would copy all images once more
    steps = tf.data.Dataset.counter(start_step)
    batches = steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def as_tuple(batch):
    """Images, or a tuple of images and more arrays, as a tuple."""
    return batch if isinstance(batch, tuple) else (batch,)


def from_uint8(images):
    """Convert uint8 images of any shape to float32: 0 … 255 becomes [-1, 1]."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def to_uint8(x):
    """Convert images x in [-1, 1], of any shape, to uint8 0 … 255, clipped and rounded.

    to_uint8(from_uint8(x)) equals x. Raises OasisError for NaN and infinity, which would become black or white.
    """
    x = np.asarray(x).astype(np.float32)
    if not np.isfinite(x).all():
        raise OasisError("the generated images hold NaN or infinite values. Give --precision float32. If it does not "
                         "help, the model has diverged: train it again with a lower --learning-rate.")
    return np.rint(np.clip((x + 1.0) * 127.5, 0, 255)).astype(np.uint8)
