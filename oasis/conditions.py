"""What a network may be told besides x_t and t: the slice index K, the next slice below, and whether it is mirrored.

A condition is a dict of tensors with a row for each image:

    slice: int32 (B,), K
    neighbour: float32 (B, S, S, C), the slice below in [-1, 1] after noise of timestep t: x_t of the forward process
    level: int32 (B,), that timestep t
    mirrored: int32 (B,), 0 for an image that training has mirrored

-1 in slice or level means unknown. An unknown neighbour is 0. -1 in mirrored means as in the data. A condition with
nothing known equals no condition.
"""
import argparse
import collections

import numpy as np
import tensorflow as tf

from oasis.files import OasisError
from oasis.noise import fold_in, normal_noise, uniform_noise

EMBEDDED = {"slice": "slice", "neighbour": "level", "mirror": "mirrored"}  # by its name: what the network embeds
MAX_INDEX = 4095        # of a slice
HIGHEST_LEVEL = 0.5     # noise levels of neighbours in training are timesteps below this share of T
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
    """Whether training with a condition needs to know which slice of which head an image is."""
    return "slice" in condition or "neighbour" in condition


def unknown(condition, shape):
    """The null condition of a batch of `shape` (B, S, S, C), of which nothing is known; None if condition is ""."""
    cond = {name: tf.fill([shape[0]], -1) for name in names_of(condition)}
    if "neighbour" in condition:
        cond["neighbour"] = tf.zeros(shape)
    return cond or None


def denoise(denoise_fn, x_t, t, cond):
    """denoise_fn(x_t, t), or denoise_fn(x_t, t, cond) if there is a condition."""
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


# ----------------------------------------------------------------------------------------------------------- training

def slice_step(split):
    """The distance from a slice index to the next one of the same head, which most pairs of slices have.

    Raises OasisError if the subjects of the Split have no heads: several slices each, with numbers of their own.
    """
    steps = collections.Counter(after.number - before.number for before, after in zip(split.slices, split.slices[1:])
                                if before.subject == after.subject)
    if not steps:
        raise OasisError(f"--condition needs several {split.noun} of each subject; here are {split.description}")
    if min(steps) < 1 or max(one.number for one in split.slices) > MAX_INDEX:
        raise OasisError(f"--condition needs the index of each slice, 0 to {MAX_INDEX}, at the end of its file's name, "
                         f"and no index twice in a subject. Among {split.description} that is not so.")
    return steps.most_common(1)[0][0]


def attach(condition, split, step, limit=None):
    """The images of a Split, uint8 (N, S, S, C); if the condition needs heads, a tuple of them and their positions.

    In the tuple the second array, int32 (N, 2), holds the slice index and whether there is a neighbour, which is the
    slice of the same head with an index lower by `step`. If the neighbour is in the condition, it takes C more channels
    of the images; they are black where there is none. limit: at most so many images, evenly spaced.
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
    """{name: value} for the model file: what the images were and, if the condition needs heads, which of their slices.
    """
    indices = sorted({int(one.number) for one in split.slices})
    heads = dict(indices=indices, slice_step=int(step), geometry=split.geometry) if needs_heads(condition) else {}
    return dict(data=split.description, **heads)


class Preparation:
    """Makes training examples of a batch of make_dataset: mirrors a share of the images and makes their condition.

    condition: its names. dropout: the share of the images that get the null condition, but for mirrored, so that the
    network learns to generate without a condition too. Half of the others lose their neighbour. diffusion: noises
    neighbours. flips: the share of the images that is mirrored. mirror_axis: 1 mirrors top and bottom, which are the
    sides of the head in the OASIS slices; 2 mirrors left and right.
    """

    def __init__(self, condition, dropout, diffusion, flips=0.0, mirror_axis=1):
        self.condition, self.dropout, self.diffusion = condition, dropout, diffusion
        self.flips, self.mirror_axis = flips, mirror_axis

    def __call__(self, batch, places=None, *, seed, training=True):
        """(images float32 (B, S, S, C),) or, if there is a condition, (images, condition).

        batch, places: of the arrays that attach() returns. seed: two int64; all that is random is a function of it.
        Without training no image is mirrored, and nothing that is known is left out.
        """
        told, with_neighbour, level, mirror = (uniform_noise(batch.shape[:1], fold_in(seed, i)) for i in range(4))
        told = (told >= self.dropout) | (not training)
        mirror = (mirror < self.flips) & training
        images, cond = batch, {}
        if self.flips:
            images = tf.where(mirror[:, None, None, None], tf.reverse(images, [self.mirror_axis]), images)
        if "slice" in self.condition:
            cond["slice"] = tf.where(told, places[:, 0], -1)
        if "neighbour" in self.condition:
            images, below = tf.split(images, 2, axis=-1)
            known = told & ((with_neighbour >= 0.5) | (not training)) & (places[:, 1] > 0)
            level = tf.cast(level * HIGHEST_LEVEL * self.diffusion.timesteps, tf.int32)
            noise = normal_noise(below.shape, fold_in(seed, 4))
            cond["neighbour"] = tf.where(known[:, None, None, None], self.diffusion.q_sample(below, level, noise), 0)
            cond["level"] = tf.where(known, level, -1)
        if "mirror" in self.condition:
            cond["mirrored"] = tf.where(mirror, 0, -1)
        return (images, cond) if cond else (images,)
