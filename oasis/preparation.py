"""The data of a training: its images, the slice index and neighbour of each, and the condition of a batch."""
import collections
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dataset import load_training
from oasis import sources
from oasis.conditions import MAX_INDEX, has, needs_heads
from oasis.files import OasisError
from oasis.noise import fold_in, normal_noise, timesteps_at, uniform_noise


class Data(NamedTuple):
    """The images for training and for validation, and facts about them."""
    training: Any           # uint8 (N, S, S, 1), or with slice or neighbour a tuple, see attach
    validation: Any         # the same, or None if the path holds nothing to validate on
    mirror_axis: int        # of images, along which --flips mirrors
    metadata: dict          # for the model file: {"data": "4,832 slices of 302 subjects"}, and perhaps head_metadata()


def load_data(flags, validation_limit):
    """The Data that the flags of train.py describe. If flags.flips is "auto", it becomes the share for these images.

    validation_limit: the largest number of validation images. Raises OasisError if sagittal slices are to be mirrored.
    Raises it, too, if the condition has neighbour and --number-of-samples leaves out slices, since many of the others
    would then have no neighbour.
    """
    heads = needs_heads(flags.condition)  # the neighbours of the chosen validation images must be loaded, too
    training, validation = load_training(flags.path, flags.image_size, flags.number_of_samples or None,
                                         None if heads else validation_limit, **sources.reading_of(flags))
    if has(flags.condition, "neighbour") and 0 < flags.number_of_samples < training.available:
        raise OasisError(f"--condition neighbour needs all slices of a subject, not {flags.number_of_samples:,} of "
                         f"{training.available:,} {training.noun}: give --number-of-samples 0")
    flags.flips = training.flips if flags.flips == "auto" else flags.flips
    if flags.flips and flags.axis == "sagittal":
        raise OasisError(f"--flips {flags.flips:g} would swap the front and the back of sagittal slices. Leave it out.")
    if not flags.flips and has(flags.condition, "mirror"):
        print("no image is mirrored (--flips 0), so the condition mirror has no effect")
    metadata = dict(data=training.description)
    if not heads:
        return Data(training.images, validation and validation.images, training.mirror_axis, metadata)
    step = slice_step(training)
    return Data(attach(flags.condition, training, step),
                validation and attach(flags.condition, validation, step, validation_limit),
                training.mirror_axis, {**metadata, **head_metadata(training, step)})


def slice_step(split):
    """The most frequent difference between neighbouring slice indices of a head in a Split.

    Raises OasisError if no subject has several slices, if a subject has an index twice, or if an index is too large.
    """
    steps = collections.Counter(after.number - before.number for before, after in zip(split.slices, split.slices[1:])
                                if before.subject == after.subject)
    if not steps:
        raise OasisError(f"the conditions slice and neighbour need subjects with several {split.noun}, but there are "
                         f"{split.description}. Leave them out of --condition, or name the files by subject and index, "
                         "such as case_001_slice_04.png.")
    counts = collections.Counter((one.subject, one.number) for one in split.slices)
    (subject, number), count = max(counts.items(), key=lambda item: (item[1], item[0][1]))
    if count > 1 or number > MAX_INDEX:
        raise OasisError(f"the conditions slice and neighbour need slice indices of at most {MAX_INDEX}, with no "
                         f"index twice in a subject, but subject {subject} has {count} {split.noun} with the index "
                         f"{number}. Keep one volume or series per subject, let the names of image files end in the "
                         "index of the slice, or leave slice and neighbour out of --condition.")
    return steps.most_common(1)[0][0]


def attach(condition, split, step, limit=None):
    """Return (images, slice_facts) of a Split, for training with the condition slice or neighbour.

    images: uint8 (N, S, S, C), or, if the condition has neighbour, (N, S, S, 2·C): the last C channels hold the
    neighbour, or 0 if there is none. The neighbour is the slice of the same subject whose index is lower by `step`, the
    result of slice_step(). slice_facts, int32 (N, 2), holds the slice index of each image, and 1 if it has a neighbour,
    else 0. limit: the largest N; the images are evenly spaced.
    """
    rows = {(one.subject, one.number): row for row, one in enumerate(split.slices)}
    below = np.array([rows.get((one.subject, one.number - step), -1) for one in split.slices])
    slice_facts = np.stack([[one.number for one in split.slices], below >= 0], axis=1).astype(np.int32)
    count = len(slice_facts) if limit is None else min(limit, len(slice_facts))
    chosen = np.linspace(0, len(slice_facts) - 1, count).round().astype(int)
    images = split.images[chosen]
    if has(condition, "neighbour"):
        # Without a neighbour, below is -1, which takes the last image. The factor 0 makes it black.
        neighbours = split.images[below[chosen]] * slice_facts[chosen, 1].astype(np.uint8)[:, None, None, None]
        images = np.concatenate([images, neighbours], axis=-1)
    return images, slice_facts[chosen]


def head_metadata(split, step):
    """Return {name: value} for the model file: indices (the sorted slice indices), index_counts (the number of images
    with each index), slice_step, and geometry as in oasis.sources.Source. split: a Split. step: its slice_step()."""
    counts = collections.Counter(int(one.number) for one in split.slices)
    indices = sorted(counts)
    return dict(indices=indices, index_counts=[counts[index] for index in indices], slice_step=int(step),
                geometry=split.geometry)


class Preparation:
    """A function of a training batch that mirrors a share of the images and makes the condition, a network input.

    condition: the names of the conditions. dropout: the share of the images whose slice index and neighbour become
    unknown, so that the network also learns to generate without them. Of the other images, half lose their neighbour.
    diffusion: a GaussianDiffusion, which adds noise to the neighbours at lognormal timesteps. flips: the share of the
    images that are mirrored. mirror_axis: 1 swaps top and bottom, as OASIS slices need, where the head lies on its
    side; 2 swaps left and right.
    """

    def __init__(self, condition, dropout, diffusion, flips, mirror_axis):
        self.condition, self.dropout, self.diffusion = condition, dropout, diffusion
        self.flips, self.mirror_axis = flips, mirror_axis
        self.t_distribution = diffusion.timestep_distribution("lognormal")

    def __call__(self, images, *slice_facts, seed, training=True):
        """Return (images float32 (B, S, S, C), condition); (images, *slice_facts) if condition is "".

        images, slice_facts: a batch of the arrays that attach() returns. seed: two int64, for all randomness.
        training=False mirrors no image and leaves out no known part of the condition.
        """
        def draw(number):
            return uniform_noise(images.shape[:1], fold_in(seed, number))

        mirror = (draw(3) < self.flips) & training
        if self.flips:
            images = tf.where(mirror[:, None, None, None], tf.reverse(images, [self.mirror_axis]), images)
        if not self.condition:
            return images, *slice_facts
        cond, keep = {}, (draw(0) >= self.dropout) | (not training)
        if has(self.condition, "slice"):
            cond["slice"] = tf.where(keep, slice_facts[0][:, 0], -1)
        if has(self.condition, "neighbour"):
            images, below = tf.split(images, 2, axis=-1)
            known = keep & ((draw(1) >= 0.5) | (not training)) & (slice_facts[0][:, 1] > 0)
            t = timesteps_at(draw(2), self.t_distribution)
            noise = normal_noise(below.shape, fold_in(seed, 4))
            cond["neighbour"] = tf.where(known[:, None, None, None], self.diffusion.q_sample(below, t, noise), 0)
            cond["neighbour_t"] = tf.where(known, t, -1)
        if has(self.condition, "mirror"):
            cond["mirrored"] = tf.where(mirror, 0, -1)
        return images, cond
