"""Inputs of a network besides x_t and t: the slice index K, the next slice below, and whether the image is mirrored.

A condition is a dict of tensors with a row for each image:

    slice: int32 (B,), the slice index K
    neighbour: float32 (B, S, S, C), the slice below in [-1, 1] after noise of timestep t: x_t of the forward process
    level: int32 (B,), the timestep t of the neighbour's noise
    mirrored: int32 (B,), 0 for an image that training has mirrored, else -1

-1 in slice or level means that it is unknown. An unknown neighbour is 0. A condition in which everything is unknown
and nothing is mirrored has the same effect as no condition.
"""
import argparse
import collections

import numpy as np
import tensorflow as tf

from oasis.files import OasisError
from oasis.noise import fold_in, normal_noise, uniform_noise

EMBEDDED = {"slice": "slice", "neighbour": "level", "mirror": "mirrored"}  # {condition: the key that is embedded}
MAX_INDEX = 4095        # the largest slice index
SAMPLING_LEVEL = 0.05   # the timestep of a neighbour's noise when a head is generated, as a share of T


def condition_names(text):
    """An argparse type: "", or names of conditions with commas between them."""
    names = text.split(",") if text else []
    if set(names) - set(EMBEDDED) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(EMBEDDED)} or several of them with commas")
    return ",".join(name for name in EMBEDDED if name in names)


def names_of(condition):
    """The keys of a condition that the network embeds: ("slice", "level") for "slice,neighbour"."""
    return tuple(EMBEDDED[name] for name in condition.split(",") if name)


def needs_heads(condition):
    """Whether training with a condition needs the subject and the slice index of each image."""
    return "slice" in condition or "neighbour" in condition


def unknown(condition, shape):
    """The null condition, in which all is unknown, for a batch of `shape` (B, S, S, C); None if condition is ""."""
    cond = {name: tf.fill([shape[0]], -1) for name in names_of(condition)}
    if "neighbour" in condition:
        cond["neighbour"] = tf.zeros(shape)
    return cond or None


def denoise(denoise_fn, x_t, t, cond):
    """The output of the network for x_t and t and, unless cond is None, the condition."""
    return denoise_fn(x_t, t) if cond is None else denoise_fn(x_t, t, cond)


def embed(cond, condition, layers):
    """The sum of the embeddings of a condition, (B, 4·dim); -1 adds nothing.

    layers: one for each of names_of(condition). Raises OasisError if condition is "".
    """
    if not condition:
        raise OasisError("this network takes no condition: it was not trained with --condition")
    parts = zip([cond[name] for name in names_of(condition)], layers)
    return sum(layer(part) * tf.cast(part >= 0, layer.compute_dtype)[:, None] for part, layer in parts)


def guided(denoise_fn, condition, weight):
    """A denoise_fn with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    Its output is free + weight · (known - free). known is the output with the condition, and free the output with the
    null condition. One call with a doubled batch computes both. A weight of 1 is no guidance, and a weight of 0 ignores
    the condition.
    """
    def guided_fn(x, t, cond=None):
        if cond is None:
            return denoise_fn(x, t)
        nothing = unknown(condition, x.shape)
        both = {name: tf.concat([cond[name], nothing[name]], axis=0) for name in cond}
        known, free = tf.split(denoise_fn(tf.concat([x, x], axis=0), tf.concat([t, t], axis=0), both), 2)
        return free + weight * (known - free)

    return denoise_fn if weight == 1 else guided_fn


# ---------------------------------------------------------------------------------------------------------- generating

def with_indices(condition, shape, indices):
    """The condition of a batch of `shape` (B, S, S, C) of which only the slice indices are known: B integers."""
    return {**unknown(condition, shape), "slice": tf.constant(indices, tf.int32)}


def conditions_of(condition, indices):
    """A function of rows, int (B,), and a shape: the condition with the slice indices of these rows. None without any.
    """
    indices = np.array(indices, np.int32)
    return (lambda rows, shape: with_indices(condition, shape, indices[rows])) if len(indices) else None


def random_indices(settings, seeds):
    """A slice index for each seed, drawn uniformly from the training data's; [] if the model has no condition slice.

    Images with drawn indices are images of the whole distribution, and better ones than with the null condition: see
    docs/heads.md. settings: those in a model file.
    """
    if "slice" not in settings.get("condition", ""):
        return []
    indices = settings["indices"]
    return [indices[np.random.SeedSequence(seed % 2**64).generate_state(1)[0] % len(indices)] for seed in seeds]


# ----------------------------------------------------------------------------------------------------------- training

def slice_step(split):
    """The most frequent difference between neighbouring slice indices of a head in a Split.

    Raises OasisError if no subject has several slices, or if the slice indices of a subject are not distinct.
    """
    steps = collections.Counter(after.number - before.number for before, after in zip(split.slices, split.slices[1:])
                                if before.subject == after.subject)
    if not steps:
        raise OasisError(f"--condition needs several {split.noun} of each subject, but there are {split.description}")
    if min(steps) < 1 or max(one.number for one in split.slices) > MAX_INDEX:
        raise OasisError(f"--condition needs the index of each slice, 0 to {MAX_INDEX}, at the end of its file's name, "
                         f"different for all slices of a subject. The {split.description} do not have it.")
    return steps.most_common(1)[0][0]


def attach(condition, split, step, limit=None):
    """The images of a Split, uint8 (N, S, S, C), or (images, positions) if the condition needs heads.

    positions, int32 (N, 2), holds the slice index of each image and whether it has a neighbour: the slice of the same
    head whose index is lower by `step`. If the condition includes the neighbour, the images have 2·C channels; the last
    C hold the neighbour, or 0 if there is none. limit: the largest N, for which evenly spaced images are chosen.
    """
    if not needs_heads(condition):
        return split.images
    rows = {one[:2]: row for row, one in enumerate(split.slices)}
    below = np.array([rows.get((one.subject, one.number - step), -1) for one in split.slices])
    places = np.stack([[one.number for one in split.slices], below >= 0], axis=1).astype(np.int32)
    chosen = np.arange(len(places)) if limit is None or limit >= len(places) else \
        np.linspace(0, len(places) - 1, limit).round().astype(int)
    images = split.images[chosen]
    if "neighbour" in condition:
        neighbours = split.images[below[chosen]] * places[chosen, 1].astype(np.uint8)[:, None, None, None]
        images = np.concatenate([images, neighbours], axis=-1)
    return images, places[chosen]


def facts_of(condition, split, step):
    """{name: value} for the model file: a description of the images and, if the condition needs heads, of the slices.
    """
    indices = sorted({int(one.number) for one in split.slices})
    heads = dict(indices=indices, slice_step=int(step), geometry=split.geometry) if needs_heads(condition) else {}
    return dict(data=split.description, **heads)


class Preparation:
    """Mirrors a share of the images in a batch of make_dataset, and makes the condition of the batch.

    condition: the names of the conditions. dropout: the share of the images whose slice and neighbour become unknown,
    so that the network also learns to generate without a condition. Of the other images, half lose their neighbour.
    diffusion: adds noise to the neighbours, at timesteps with its lognormal distribution. flips: the share of the
    images that are mirrored. mirror_axis: 1 mirrors top and bottom, which are left and right of the head in OASIS
    slices; 2 mirrors left and right.
    """

    def __init__(self, condition, dropout, diffusion, flips=0.0, mirror_axis=1):
        self.condition, self.dropout, self.diffusion = condition, dropout, diffusion
        self.flips, self.mirror_axis = flips, mirror_axis
        self.levels = np.cumsum(diffusion.timestep_distribution("lognormal"))[:-1]

    def __call__(self, images, *others, seed, training=True):
        """(images float32 (B, S, S, C), condition); (images, *others) if condition is "".

        images, others: a batch of the arrays that attach() returns. seed: two int64, which determine all randomness.
        training=False mirrors no image and leaves out no known part of the condition.
        """
        def draw(number):
            return uniform_noise(images.shape[:1], fold_in(seed, number))

        mirror = (draw(3) < self.flips) & training
        if self.flips:
            images = tf.where(mirror[:, None, None, None], tf.reverse(images, [self.mirror_axis]), images)
        if not self.condition:
            return images, *others
        cond, told = {}, (draw(0) >= self.dropout) | (not training)
        if "slice" in self.condition:
            cond["slice"] = tf.where(told, others[0][:, 0], -1)
        if "neighbour" in self.condition:
            images, below = tf.split(images, 2, axis=-1)
            known = told & ((draw(1) >= 0.5) | (not training)) & (others[0][:, 1] > 0)
            level = tf.searchsorted(tf.constant(self.levels, tf.float32), draw(2), side="right")
            noise = normal_noise(below.shape, fold_in(seed, 4))
            cond["neighbour"] = tf.where(known[:, None, None, None], self.diffusion.q_sample(below, level, noise), 0)
            cond["level"] = tf.where(known, level, -1)
        if "mirror" in self.condition:
            cond["mirrored"] = tf.where(mirror, 0, -1)
        return images, cond
