"""What a network may be told besides x_t and t: the slice index K, and the neighbour, the next slice below.

A condition is a dict of tensors with a row for each image:

    slice: int32 (B,), K
    neighbour: float32 (B, S, S, C), the neighbour in [-1, 1] after noise of timestep t: x_t of the forward process
    level: int32 (B,), that timestep t

-1 in slice or level means unknown. An unknown neighbour is 0. A condition with nothing known equals no condition.
"""
import argparse

import numpy as np
import tensorflow as tf

from oasis.files import OasisError
from oasis.noise import normal_noise, uniform_noise

CONDITIONS = ("slice", "neighbour")
HIGHEST_LEVEL = 0.5     # noise levels of neighbours in training are timesteps below this share of T
SAMPLING_LEVEL = 0.05   # the timestep of a neighbour's noise when a head is generated, as a share of T


def condition_names(text):
    """An argparse type: "", or one of CONDITIONS, or both with a comma between them."""
    names = text.split(",") if text else []
    if set(names) - set(CONDITIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CONDITIONS)} or both with a comma between")
    return ",".join(name for name in CONDITIONS if name in names)


def names_of(condition):
    """The names of the embedded parts of a condition: ("slice", "level") for "slice,neighbour"."""
    return tuple({"slice": "slice", "neighbour": "level"}[name] for name in condition.split(",") if name)


def unknown(condition, shape):
    """The condition of a batch of `shape` (B, S, S, C) of which nothing is known, or None if condition is ""."""
    cond = {name: tf.fill([shape[0]], -1) for name in names_of(condition)}
    if "neighbour" in condition:
        cond["neighbour"] = tf.zeros(shape)
    return cond or None


def guided(denoise_fn, condition, weight):
    """A denoise_fn with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): o + weight · (c - o).

    c is the output with the condition and o the output without it; both come from one call with a doubled batch.
    A weight of 1 is no guidance.
    """
    def denoise(x, t, cond):
        nothing = unknown(condition, x.shape)
        both = {name: tf.concat([cond[name], nothing[name]], axis=0) for name in cond}
        known, free = tf.split(denoise_fn(tf.concat([x, x], axis=0), tf.concat([t, t], axis=0), both), 2)
        return free + weight * (known - free)

    return denoise_fn if weight == 1 else denoise


# ----------------------------------------------------------------------------------------------------------- training

def attach(condition, split, limit=None):
    """The images of a Split, uint8 (N, S, S, C), or a tuple of them and of what Conditioning needs.

    In the tuple the images have 2·C channels if the neighbour is asked for, which is black where there is none; the
    second array, int32 (N, 2), holds the slice index and whether there is a neighbour. limit: at most so many images,
    evenly spaced. Raises OasisError for data without heads.
    """
    if not condition:
        return split.images
    subjects, numbers = (np.array([getattr(one, name) for one in split.slices]) for name in ("subject", "number"))
    follows = np.append(False, (subjects[1:] == subjects[:-1]))
    steps = (numbers[1:] - numbers[:-1])[follows[1:]]
    if not len(steps) or steps.min() < 1 or numbers.min() < 0:
        raise OasisError(f"--condition {condition} needs several {split.noun} of each subject, and their numbers at "
                         f"the end of the names of their files; here are {split.description}")
    if "neighbour" in condition and steps.min() < steps.max():
        raise OasisError(f"--condition {condition} needs evenly spaced {split.noun}, but they are {steps.min()} to "
                         f"{steps.max()} apart: give --number-of-samples 0")
    images, facts = split.images, np.stack([numbers, follows], axis=1).astype(np.int32)
    if "neighbour" in condition:
        below = np.concatenate([images[:1], images[:-1]]) * follows[:, None, None, None].astype(np.uint8)
        images = np.concatenate([images, below], axis=-1)
    rows = np.arange(len(images)) if limit is None or limit >= len(images) else \
        np.linspace(0, len(images) - 1, limit).round().astype(int)
    return images[rows], facts[rows]


def facts_of(condition, split):
    """{name: value} for the model file: what the images were and, if there is a condition, which slices of a head."""
    indices = sorted({int(one.number) for one in split.slices})
    return dict(data=split.description, **(dict(indices=indices, geometry=split.geometry) if condition else {}))


class Conditioning:
    """Makes the images and the condition of a batch from what attach() and then make_dataset made.

    condition: its names. dropout: the share of the training images of which nothing is known, so that the network
    learns to generate without a condition too. Of the others, half have no neighbour. diffusion: noises neighbours.
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
