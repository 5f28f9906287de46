"""Inputs of a network besides x_t and t: the slice index K, the next slice below, and whether the image is mirrored.

A condition is a dict of tensors with a row for each image:

    slice: int32 (B,), the slice index K
    neighbour: float32 (B, S, S, C), the slice below after neighbour_t + 1 steps of noise; 0 if it is unknown. The noise
        is conditioning augmentation (Ho 2021, arXiv 2106.15282): the network learns how far to trust the neighbour.
    neighbour_t: int32 (B,), another timestep than t of the image itself
    mirrored: int32 (B,), 0 if training has mirrored the image, else -1. It is an index, not a truth value.

The network embeds slice, neighbour_t and mirrored, and adds the embeddings to that of t. -1 adds nothing: the value is
unknown, or the image is not mirrored. The null condition has -1 everywhere. Its effect is that of no condition.
"""
import argparse

import numpy as np
import tensorflow as tf

from oasis.files import OasisError

EMBEDDED = {"slice": "slice", "neighbour": "neighbour_t", "mirror": "mirrored"}  # {condition: the key that is embedded}
MAX_INDEX = 4095        # the largest slice index


def condition_names(text):
    """An argparse type: "", or names of conditions with commas between them."""
    names = text.split(",") if text else []
    if set(names) - set(EMBEDDED) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(EMBEDDED)} or several of them with commas")
    return ",".join(name for name in EMBEDDED if name in names)


def has(condition, name):
    """Whether a condition such as "slice,neighbour" includes a name such as "slice"."""
    return name in condition.split(",")


def embedded_keys(condition):
    """The keys of a condition (a dict) whose integers the network embeds: ("slice", "neighbour_t") if the setting is
    "slice,neighbour"."""
    return tuple(EMBEDDED[name] for name in condition.split(",") if name)


def needs_heads(condition):
    """Whether training with a condition needs the subject and the slice index of each image."""
    return has(condition, "slice") or has(condition, "neighbour")


def null_condition(condition, shape):
    """The condition of a batch of `shape` (B, S, S, C) with nothing known: no slice index, neighbour or mirroring.

    None if the network takes no condition (condition is "").
    """
    cond = {key: tf.fill([shape[0]], -1) for key in embedded_keys(condition)}
    if has(condition, "neighbour"):
        cond["neighbour"] = tf.zeros(shape)
    return cond or None


def embed(cond, condition, layers):
    """The sum of the embeddings of a condition, (B, 4·dim); -1 adds nothing.

    layers: one for each of embedded_keys(condition). Raises OasisError if condition is "".
    """
    if not condition:
        raise OasisError("this network takes no condition: it was not trained with --condition")
    parts = zip([cond[key] for key in embedded_keys(condition)], layers)
    return sum(layer(part) * tf.cast(part >= 0, layer.compute_dtype)[:, None] for part, layer in parts)


def guided(denoise_fn, condition, scale):
    """A denoise_fn with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    Its output is uncond + scale · (cond - uncond), of the outputs with the null condition and with the condition. The
    scale is 1 + w of the paper's eq. 6: 1 is no guidance, and 0 ignores the condition. One call with a doubled batch
    computes both outputs.
    """
    def guided_fn(x, t, cond=None):
        if cond is None:
            return denoise_fn(x, t)
        null = null_condition(condition, x.shape)
        both = {key: tf.concat([cond[key], null[key]], axis=0) for key in cond}
        cond_output, uncond_output = tf.split(
            denoise_fn(tf.concat([x, x], axis=0), tf.concat([t, t], axis=0), both), 2)
        return uncond_output + scale * (cond_output - uncond_output)

    return denoise_fn if scale == 1 else guided_fn


def check_guidance(settings, scale):
    """Raise OasisError for a guidance scale other than 1 if the model was not trained with the condition slice.

    settings: those in its model file.
    """
    if scale != 1 and not has(settings["condition"], "slice"):
        raise OasisError("--guidance: this model was not trained with --condition slice. Train one with it, or name "
                         "another with --model.")


# ---------------------------------------------------------------------------------------------------------- generating

def with_indices(condition, shape, indices):
    """The condition of a batch of `shape` (B, S, S, C) of which only the slice indices are known: B integers.

    Raises OasisError if the condition does not include slice, or if there are more or fewer than B indices.
    """
    if len(indices) != shape[0]:
        raise OasisError(f"give one slice index for each image: there are {len(indices)} for {shape[0]} images")
    if not has(condition, "slice"):
        raise OasisError("slice indices were given, but this network was trained without --condition slice")
    return {**null_condition(condition, shape), "slice": tf.constant(indices, tf.int32)}


def random_indices(settings, seeds):
    """A slice index for each seed, as frequent as in the training data; [] if the model has no condition slice.

    Images with drawn indices are images of the whole distribution, and better than images with the null condition, see
    docs/heads.md. settings: those in a model file. If it has no index_counts, all indices are equally frequent.
    """
    if not has(settings["condition"], "slice"):
        return []
    ends = np.cumsum(settings.get("index_counts", np.ones(len(settings["indices"]), int)))
    drawn = [np.random.SeedSequence(seed % 2**64).generate_state(1)[0] % ends[-1] for seed in seeds]
    return [settings["indices"][row] for row in np.searchsorted(ends, drawn, side="right")]
