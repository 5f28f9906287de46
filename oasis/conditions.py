"""What a network may be told besides x_t and t: the slice index K, and the neighbour, the next slice below.

A condition is a dict of tensors with a row for each image:

    slice: int32 (B,), K
    neighbour: float32 (B, S, S, C), the neighbour in [-1, 1] after noise of timestep t: x_t of the forward process
    level: int32 (B,), that timestep t

-1 in slice or level means unknown. An unknown neighbour is 0. A condition with nothing known equals no condition.
"""
import argparse
import collections

import numpy as np
import tensorflow as tf

from oasis.files import OasisError
from oasis.noise import normal_noise, uniform_noise

CONDITIONS = ("slice", "neighbour")
MAX_INDEX = 4095        # of a slice
HIGHEST_LEVEL = 0.5     # noise levels of neighbours in training are timesteps below this share of T
SAMPLING_LEVEL = 0.05   # the timestep of a neighbour's noise when a head is generated, as a share of T


def condition_names(text):
    """An argparse type: "", or one of CONDITIONS, or both with a comma between them."""
    names = text.split(",") if text else []
    if set(names) - set(CONDITIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CONDITIONS)} or both with a comma between")
    return ",".join(name for name in CONDITIONS if name in names)


def names_of(condition):
    """The keys of a condition that the network embeds: ("slice", "level") for "slice,neighbour"."""
    return tuple({"slice": "slice", "neighbour": "level"}[name] for name in condition.split(",") if name)


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
    """The sum of the embeddings of a condition, (B, 4·dim); a slice index or a level of -1 adds nothing.

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
    """The images of a Split, uint8 (N, S, S, C), or a tuple of them and of what Conditioning needs.

    In the tuple the second array, int32 (N, 2), holds the slice index and whether there is a neighbour, which is the
    slice of the same head with an index lower by `step`. If the neighbour is in the condition, it takes C more channels
    of the images; they are black where there is none. limit: at most so many images, evenly spaced.
    """
    if not condition:
        return split.images
    rows = {one[:2]: row for row, one in enumerate(split.slices)}
    below = np.array([rows.get((one.subject, one.number - step), -1) for one in split.slices])
    facts = np.stack([[one.number for one in split.slices], below >= 0], axis=1).astype(np.int32)
    chosen = np.arange(len(facts)) if limit is None or limit >= len(facts) else \
        np.linspace(0, len(facts) - 1, limit).round().astype(int)
    images = split.images[chosen]
    if "neighbour" in condition:
        neighbours = split.images[below[chosen]] * facts[chosen, 1].astype(np.uint8)[:, None, None, None]
        images = np.concatenate([images, neighbours], axis=-1)
    return images, facts[chosen]


def facts_of(condition, split, step):
    """{name: value} for the model file: what the images were and, if there is a condition, which slices of a head."""
    indices = sorted({int(one.number) for one in split.slices})
    heads = dict(indices=indices, slice_step=int(step), geometry=split.geometry) if condition else {}
    return dict(data=split.description, **heads)


class Conditioning:
    """Turns a batch that make_dataset made of attach() into images and a condition.

    condition: its names. dropout: the share of the training images that get the null condition, so that the network
    learns to generate without a condition too. Half of the others lose their neighbour. diffusion: noises neighbours.
    """

    def __init__(self, condition, dropout, diffusion):
        self.condition, self.dropout, self.diffusion = condition, dropout, diffusion

    def __call__(self, batch, facts, seed, training=True):
        """(images float32 (B, S, S, C), condition). seed: two int64; all that is random is a function of it.

        Without training nothing that is known is left out.
        """
        told, with_neighbour, level = (
            uniform_noise(batch.shape[:1], tf.random.experimental.stateless_fold_in(seed, i)) for i in range(3))
        told = (told >= self.dropout) | (not training)
        images, cond = batch, {}
        if "slice" in self.condition:
            cond["slice"] = tf.where(told, facts[:, 0], -1)
        if "neighbour" in self.condition:
            images, below = tf.split(batch, 2, axis=-1)
            known = told & ((with_neighbour >= 0.5) | (not training)) & (facts[:, 1] > 0)
            level = tf.cast(level * HIGHEST_LEVEL * self.diffusion.timesteps, tf.int32)
            noise = normal_noise(below.shape, tf.random.experimental.stateless_fold_in(seed, 3))
            cond["neighbour"] = tf.where(known[:, None, None, None], self.diffusion.q_sample(below, level, noise), 0)
            cond["level"] = tf.where(known, level, -1)
        return images, cond
