"""oasis/weights.py: the weights of the images' losses in the gradient."""
import numpy as np
import pytest
import tensorflow as tf

from helpers import trainer_of
from modules import GaussianDiffusion
from oasis.weights import BINS, LOSS_WEIGHTS

DISTRIBUTION = GaussianDiffusion(1000, "x_start").timestep_distribution("lognormal")


def draws(count, seed):
    return tf.constant(np.random.default_rng(seed).choice(1000, count, p=DISTRIBUTION), tf.int32)


def test_bins_are_equally_probable():
    bins = LOSS_WEIGHTS["learned"](DISTRIBUTION).bins
    assert np.all(np.diff(bins) >= 0) and set(bins) == set(range(BINS))
    np.testing.assert_allclose(np.bincount(bins, DISTRIBUTION), 1 / BINS, atol=2 * DISTRIBUTION.max())


def test_learned_weights_make_all_noise_levels_count_alike():
    """The weighted loss has the same mean in each bin: the mean of the unweighted loss over all t."""
    weights = LOSS_WEIGHTS["learned"](DISTRIBUTION)

    def losses(t, seed):
        noise = np.random.default_rng(seed).uniform(0.9, 1.1, len(t)).astype(np.float32)
        return (0.01 + np.sqrt(t.numpy() / 1000).astype(np.float32)) * noise
    for step in range(200):
        t = draws(64, step)
        weights.update(losses(t, step), t)
    t = draws(40_000, 1000)
    bins = weights.bins[t.numpy()]
    own, weighted = losses(t, 1000), losses(t, 1000) * weights(t).numpy()
    means = np.bincount(bins, weighted) / np.bincount(bins)
    np.testing.assert_allclose(means, own.mean(), rtol=0.15)
    assert weights(t).numpy().max() > 4 * weights(t).numpy().min()


@pytest.mark.parametrize("timesteps", [10, 50, 1000])
def test_equal_losses_at_all_noise_levels_give_equal_weights(timesteps):
    """With few timesteps some bins have none. Their means stay at 1."""
    distribution = GaussianDiffusion(timesteps, "x_start").timestep_distribution("lognormal")
    weights, t = LOSS_WEIGHTS["learned"](distribution), tf.range(timesteps)
    for _ in range(1500):
        weights.update(tf.fill([timesteps], 0.1), t)
    np.testing.assert_allclose(weights(t), 1, rtol=0.01)


def test_a_bin_without_images_keeps_its_mean():
    weights = LOSS_WEIGHTS["learned"](DISTRIBUTION)
    weights.update(tf.constant([3.0, 5.0]), tf.constant([999, 998]))
    means = weights.means.numpy()
    assert np.all(means[:-1] == 1) and means[-1] == pytest.approx(1 + (1 - 0.99**2) * 3)


def test_fixed_weights_are_1():
    assert np.all(LOSS_WEIGHTS["fixed"](DISTRIBUTION)(draws(5, 0)) == 1)


def test_weights_change_the_gradient_and_not_the_loss(tiny):
    """Doubled weights double the gradient."""
    trainer = trainer_of(tiny)
    batch = tf.random.stateless_normal([8, 16, 16, 1], [0, 1])
    losses, _, norm = trainer.update(batch)
    again = trainer_of(tiny)
    again.loss_weights = lambda t: 2 * tf.ones(t.shape)
    again.loss_weights.update = lambda losses, t: None
    losses_again, _, norm_again = again.update(batch)
    np.testing.assert_allclose(losses, losses_again, rtol=1e-6)
    np.testing.assert_allclose(2 * norm, norm_again, rtol=1e-5)
