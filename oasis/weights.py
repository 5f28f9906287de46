"""Weights of the losses of images, for the gradient alone. GaussianDiffusion.loss_weight is part of the loss itself."""
import numpy as np
import tensorflow as tf

BINS = 20          # of the timesteps, with equal probabilities in training
MEMORY = 100       # images in the running mean of a bin's loss


class FixedWeights(tf.Module):
    """All weights are 1."""

    def __init__(self, distribution):
        super().__init__()

    def __call__(self, t):
        """float32 (B,) for timesteps t, int (B,)."""
        return tf.ones(t.shape)

    def update(self, losses, t):
        """Learn from the losses, float32 (B,), at the timesteps t, int (B,)."""


class LearnedWeights(FixedWeights):
    """Weights for which all noise levels count equally: the mean loss over all t divided by that in the bin of t.

    It is the uncertainty weighting of EDM2 (Karras 2024, arXiv 2312.02696, eq. 21), with bins in place of the
    network for u(σ). E[loss / e^u + u] is least where e^u = E[loss | σ], and a running mean of the losses in each bin
    of t estimates this e^u. The factor E[loss] keeps the scale of the gradient.

    distribution: the probability of each t in training, float64 (T,). means: the variable with the mean loss in each
    bin, (BINS,).
    """

    def __init__(self, distribution):
        super().__init__(distribution)
        middle = np.cumsum(distribution) - distribution / 2
        self.bins = np.minimum(middle * BINS, BINS - 1).astype(np.int32)
        self.probabilities = np.bincount(self.bins, distribution, BINS).astype(np.float32)
        self.means = tf.Variable(tf.ones([BINS]))

    def __call__(self, t):
        mean = tf.tensordot(self.probabilities, self.means, 1)  # a bin without timesteps has probability 0
        return mean / tf.gather(self.means, tf.gather(self.bins, t))

    def update(self, losses, t):
        members = tf.one_hot(tf.gather(self.bins, t), BINS, axis=0)                     # (BINS, B)
        count = tf.reduce_sum(members, axis=1)
        change = tf.linalg.matvec(members, losses) / tf.maximum(count, 1.0) - self.means
        tf.raw_ops.AssignAddVariableOp(resource=self.means.handle,                      # on this replica alone
                                       value=(1 - (1 - 1 / MEMORY)**count) * change)


LOSS_WEIGHTS = {"fixed": FixedWeights, "learned": LearnedWeights}
