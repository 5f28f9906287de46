"""Random numbers that depend on their seed alone, not on the TensorFlow version, the device or the use of XLA.

The algorithm is always Philox. "auto_select" takes another one on some devices, and other bits for large seeds under
XLA.
"""
import numpy as np
import tensorflow as tf


def split_seed(seed, count):
    """`count` independent seeds, int64 (count, 2): a function of seed (two int64)."""
    return tf.random.experimental.stateless_split(seed, count, alg="philox")


def fold_in(seed, number):
    """A seed (w, number), two int32: w is the first 32 bits that seed (two integers) draws, so all numbers share w."""
    return tf.random.experimental.stateless_fold_in(seed, number, alg="philox")


def uniform_noise(shape, seed):
    """Uniform random numbers in the open interval (0, 1), float32 `shape`: a function of seed (two int64).

    It is made from raw bits, because tf.random.stateless_uniform and stateless_normal draw different floats under XLA
    (tensorflow issue 117644).
    """
    bits = tf.random.stateless_uniform(shape, seed, None, None, tf.uint32, alg="philox")
    return (tf.cast(tf.bitwise.right_shift(bits, 9), tf.float32) + 0.5) * 2.0**-23


def timesteps_at(quantiles, distribution):
    """The timesteps, int32 (B,), at quantiles, float32 (B,) in (0, 1), of a distribution of t, float64 (T,)."""
    cumulative = tf.constant(np.cumsum(distribution)[:-1], tf.float32)  # P(t' ≤ t) for t < T - 1
    return tf.searchsorted(cumulative, quantiles, side="right")


def normal_noise(shape, seed):
    """Gaussian noise N(0, 1), float32 `shape`: a function of seed (two int64), with and without XLA equal to 1e-4."""
    return tf.math.ndtri(uniform_noise(shape, seed))


def noise_of_seeds(seeds, t, shape):
    """N(0, 1) noise of `shape` (B, H, W, C), of which image i is a function of seeds[i], int64, and t alone."""
    return tf.map_fn(lambda seed: normal_noise(shape[1:], tf.stack([seed, tf.cast(t, tf.int64)])), seeds,
                     fn_output_signature=tf.TensorSpec(shape[1:], tf.float32))
