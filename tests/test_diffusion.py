"""The forward process and the training loss against closed forms, and against the papers in plain numpy.

The samplers are in test_samplers.py.
"""
from math import erf

import numpy as np
import pytest
import tensorflow as tf

from gaussian import ALPHAS_CUMPROD, BETAS, T
from modules import SCHEDULES, GaussianDiffusion, cosine_beta_schedule, linear_beta_schedule, shifted_beta_schedule
from oasis.files import OasisError

TIMES = np.arange(T)[:, None, None, None]  # a batch with every t
RNG = np.random.default_rng(0)
X_START, NOISE = RNG.uniform(-1, 1, [T, 2, 3, 1]), RNG.standard_normal([T, 2, 3, 1])
OBJECTIVES = ["noise", "x_start", "v"]


# -------------------------------------------------------------------------------------------------------- schedule

def test_beta_goes_from_1e_4_to_0_02():
    betas = linear_beta_schedule(T)
    assert betas.shape == (T,) and betas.dtype == np.float64
    np.testing.assert_allclose(betas, BETAS, rtol=1e-13)
    np.testing.assert_array_equal(betas, GaussianDiffusion(T).betas)


def test_timestep_0_is_one_step_of_noise_and_the_last_all_noise():
    alphas_cumprod = GaussianDiffusion(T).alphas_cumprod
    assert alphas_cumprod.shape == (T,) and alphas_cumprod.dtype == np.float64
    assert alphas_cumprod[0] == 1 - 1e-4
    assert alphas_cumprod[-1] == pytest.approx(4.0358e-5, abs=5e-10)


def test_posterior_variance_at_both_ends_and_between():
    variance = GaussianDiffusion(T).posterior_variance
    assert variance.shape == (T,) and variance[0] == 0
    np.testing.assert_allclose(variance[[487, 999]], [0.0097916, 0.0199999], atol=1e-7)


@pytest.mark.parametrize("timesteps", [21, 100, 500, 1001, 4000])
def test_any_number_of_timesteps_ends_in_the_same_noise(timesteps):
    diffusion = GaussianDiffusion(timesteps)
    assert diffusion.betas.sum() == pytest.approx(BETAS.sum(), rel=1e-12)
    assert 0 < diffusion.betas.min() and diffusion.betas.max() < 1
    assert diffusion.alphas_cumprod[-1] < 4.4e-5


def log_snr(betas):
    alphas_cumprod = np.cumprod(1 - betas)
    return np.log(alphas_cumprod / (1 - alphas_cumprod))


def test_cosine_schedule_is_that_of_its_paper():
    betas = cosine_beta_schedule(T)
    assert betas.shape == (T,) and betas.dtype == np.float64 and betas[-1] == 0.999 and np.all(betas[:-1] < 0.999)
    f = np.cos((np.arange(1, T) / T + 0.008) / 1.008 * np.pi / 2)**2 / np.cos(0.008 / 1.008 * np.pi / 2)**2  # eq. 17
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], f, rtol=1e-9)
    np.testing.assert_array_equal(betas, GaussianDiffusion(T, schedule="cosine").betas)


@pytest.mark.parametrize("image_size", [16, 64, 128, 256])
def test_shifted_schedule_adds_the_same_to_every_log_snr(image_size):
    betas = shifted_beta_schedule(T, image_size)
    assert betas.shape == (T,) and betas.dtype == np.float64 and np.all((0 < betas) & (betas < 1))
    np.testing.assert_allclose(log_snr(betas) - log_snr(BETAS), 2 * np.log(64 / image_size), atol=1e-9)
    np.testing.assert_array_equal(betas, GaussianDiffusion(T, "x_start", "shifted", image_size).betas)


def test_wrong_schedules_are_refused_by_name():
    with pytest.raises(OasisError, match="schedule 'sigmoid' is not one of linear, cosine, shifted"):
        GaussianDiffusion(T, schedule="sigmoid")


# ------------------------------------------------------------------------------------------------------- identities

def test_q_sample_is_the_chain_of_single_steps():
    """Eq. 2 of DDPM, step by step, on the mean and the variance of x_t."""
    diffusion, mean, variance = GaussianDiffusion(T), 1.0, 0.0
    one, zero = tf.ones([1, 1, 1, 1], tf.float64), tf.zeros([1, 1, 1, 1], tf.float64)
    for t, beta in enumerate(BETAS):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 487, 999):
            assert diffusion.q_sample(one, [t], zero).numpy().item() == pytest.approx(mean, rel=1e-12)
            assert diffusion.q_sample(zero, [t], one).numpy().item()**2 == pytest.approx(variance, rel=1e-11)


def test_q_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) · q(x_{t-1} | x_0): precisions add."""
    alphas, before = 1 - BETAS[1:], ALPHAS_CUMPROD[:-1]
    precisions = np.stack([alphas / BETAS[1:], 1 / (1 - before)])[..., None, None, None]
    x_t, x_start = X_START[1:] * 2, X_START[1:]
    means = np.stack([x_t / np.sqrt(1 - BETAS[TIMES[1:]]), np.sqrt(ALPHAS_CUMPROD[TIMES[1:] - 1]) * x_start])
    mean, variance = GaussianDiffusion(T).q_posterior(tf.constant(x_start), tf.constant(x_t), np.arange(1, T))
    np.testing.assert_allclose(variance, 1 / precisions.sum(0), rtol=1e-11)  # 1 - ᾱ loses four of sixteen digits
    np.testing.assert_allclose(mean, (precisions * means).sum(0) / precisions.sum(0), atol=1e-12)


def test_q_posterior_of_the_first_timestep_is_the_clean_image():
    x_start = tf.constant(X_START[:1])
    mean, variance = GaussianDiffusion(T).q_posterior(x_start, x_start * 2, [0])
    np.testing.assert_allclose(mean, x_start, atol=1e-12)
    assert np.all(variance == 0)


def outputs(x_start, noise):
    """Return {objective: the output of a perfect network for every t}."""
    signal, noise_rate = np.sqrt(ALPHAS_CUMPROD[TIMES]), np.sqrt(1 - ALPHAS_CUMPROD[TIMES])
    return {"noise": noise, "x_start": x_start, "v": signal * noise - noise_rate * x_start}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_means_the_same_clean_image(objective):
    diffusion, output = GaussianDiffusion(T, objective), outputs(X_START, NOISE)[objective]
    x_t = diffusion.q_sample(tf.constant(X_START), np.arange(T), tf.constant(NOISE))
    x_start = diffusion.x_start_from_output(x_t, np.arange(T), tf.constant(output))
    np.testing.assert_allclose(x_start, X_START, atol=1e-12)
    target = diffusion.target(tf.constant(X_START), np.arange(T), tf.constant(NOISE))
    np.testing.assert_allclose(target, output, atol=1e-12)


def test_wrong_objectives_are_refused():
    with pytest.raises(OasisError, match="epsilon"):
        GaussianDiffusion(T, "epsilon")


# ------------------------------------------------------------------------------------------------------------- loss

def loss_of(objective, error, loss="l2", x_start=X_START, **options):
    """The loss at every t of a network that predicts x_start + error, expressed as the objective."""
    noise_error = -error * np.sqrt(ALPHAS_CUMPROD[TIMES] / (1 - ALPHAS_CUMPROD[TIMES]))
    output = tf.constant(outputs(x_start + error, NOISE + noise_error)[objective])
    return GaussianDiffusion(T, objective).training_loss(lambda x, t: output, tf.constant(x_start), np.arange(T),
                                                         tf.constant(NOISE), loss, **options).numpy()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss, tolerance", [("l2", 1e-24), ("l1", 1e-12)])
def test_a_perfect_network_scores_0(objective, loss, tolerance):
    losses = loss_of(objective, np.zeros_like(X_START), loss)
    assert losses.shape == (T,)
    np.testing.assert_allclose(losses, 0, atol=tolerance)


@pytest.mark.parametrize("loss, score", [("l2", 1.0), ("l1", np.sqrt(2 / np.pi))])
def test_the_score_of_a_network_whose_output_is_zero(loss, score):
    noise = tf.random.stateless_normal([1000, 32, 32, 1], [1, 2])
    losses = GaussianDiffusion(T).training_loss(lambda x, t: tf.zeros_like(x), tf.zeros_like(noise), np.arange(T),
                                                noise, loss)
    assert losses.shape == (1000,) and losses.dtype == tf.float32
    assert np.mean(losses) == pytest.approx(score, abs=0.005)  # 4 standard errors: 4 · √2 / √1,024,000


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_an_x_start_error_costs_what_its_v_error_costs(loss):
    error = RNG.standard_normal(X_START.shape)
    exact = 1 / (1 - ALPHAS_CUMPROD) < 20
    x_start, v = loss_of("x_start", error, loss), loss_of("v", error, loss)
    np.testing.assert_allclose(x_start[exact], v[exact], rtol=1e-11)
    assert np.all(x_start[~exact] < v[~exact]) and 20 < np.sum(~exact) < 100


@pytest.mark.parametrize("options, cap", [({}, 20), ({"max_weight": 200.0}, 200)])
def test_the_weight_of_x_start_is_capped(options, cap):
    weight = np.minimum(1 / (1 - ALPHAS_CUMPROD), cap)
    np.testing.assert_allclose(GaussianDiffusion(T, "x_start").loss_weight(**options), weight, rtol=1e-12)
    assert weight.max() == cap and np.sum(weight < cap) > 800
    error = np.full_like(X_START, 0.1)
    np.testing.assert_allclose(loss_of("x_start", error, **options), weight * 0.1**2, rtol=1e-12)
    np.testing.assert_allclose(loss_of("x_start", error, "l1", **options), np.sqrt(weight) * 0.1, rtol=1e-12)


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_other_objectives_have_the_weight_1(objective):
    for options in ({}, {"max_weight": 200.0}):
        np.testing.assert_array_equal(GaussianDiffusion(T, objective).loss_weight(**options), np.ones(T))


CLEAN = np.array([-1.0, -1.0, 1.0, 1.0, -0.99, 0.99])      # six pixels and, below, their predictions
BEYOND = np.array([-1.5, -0.5, 1.5, 0.5, -1.49, 1.49])


def pixel_losses(loss):
    """The loss of each pixel of CLEAN at T - 1, and the sign of its gradient."""
    clean, output = (tf.constant(pixels, tf.float32)[:, None, None, None] for pixels in (CLEAN, BEYOND))
    diffusion = GaussianDiffusion(T, "x_start")
    with tf.GradientTape() as tape:
        tape.watch(output)
        losses = diffusion.training_loss(lambda x, t: output, clean, np.full(6, T - 1), tf.zeros_like(clean), loss)
    return losses.numpy(), np.sign(tape.gradient(losses, output)).ravel()


@pytest.mark.parametrize("loss, score", [("l2", 0.25), ("l1", 0.5)])
def test_blacker_than_black_is_no_error_of_x_start(loss, score):
    """Clipping corrects such a prediction, and one above white. Errors towards grey, or of grey pixels, count."""
    losses, signs = pixel_losses(loss)
    np.testing.assert_allclose(losses, np.array([0, 1, 0, 1, 1, 1]) * score, rtol=1e-3)
    np.testing.assert_array_equal(signs, [0, 1, 0, -1, -1, 1])


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_every_error_of_noise_and_v_counts(objective):
    """An error of the implied x_start beyond black or white counts as much as one towards grey."""
    up, down = (loss_of(objective, np.full_like(X_START, error), x_start=np.sign(X_START)) for error in (0.5, -0.5))
    np.testing.assert_allclose(up, down, rtol=1e-3)
    assert np.all(up > 0)


def test_a_loss_belongs_to_its_image():
    error = np.zeros_like(X_START)
    error[7] = 1
    assert np.flatnonzero(loss_of("v", error) > 1e-12) == [7]


def test_denoise_fn_gets_the_noisy_image_and_its_timestep():
    def denoise_fn(x, t):
        np.testing.assert_allclose(x[:, 0, 0, 0], np.sqrt(ALPHAS_CUMPROD[[3, 700]]) * 0.5, rtol=1e-6)
        np.testing.assert_array_equal(t, [3, 700])
        return x
    zeros = tf.zeros([2, 4, 4, 1])
    GaussianDiffusion(T).training_loss(denoise_fn, zeros + 0.5, tf.constant([3, 700]), zeros, cond=None)


def test_each_loss_depends_on_its_own_row_of_the_condition():
    """Without a condition, denoise_fn gets two arguments."""
    zeros, t = tf.zeros([3, 4, 4, 1]), tf.constant([0, 500, 999])
    losses = GaussianDiffusion(T).training_loss(lambda x, t, cond: zeros + cond[:, None, None], zeros, t, zeros,
                                                cond=tf.constant([[1.0], [2.0], [3.0]]))
    np.testing.assert_allclose(losses, [1, 4, 9], rtol=1e-6)
    counts = []
    GaussianDiffusion(T).training_loss(lambda *arguments: counts.append(len(arguments)) or zeros, zeros, t, zeros)
    assert counts == [2]


def test_wrong_losses_are_refused():
    zeros = tf.zeros([2, 4, 4, 1])
    with pytest.raises(OasisError, match="huber"):
        GaussianDiffusion(T).training_loss(lambda x, t: x, zeros, tf.constant([0, 1]), zeros, "huber")


# ---------------------------------------------------------------------------------------- distribution of timesteps

def test_uniform_timesteps_are_all_alike():
    np.testing.assert_allclose(GaussianDiffusion(T).timestep_distribution("uniform"), 1 / T, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("image_size, shift", [(32, 0.0), (64, 0.0), (256, np.log(2))])
def test_lognormal_timesteps_make_the_noise_level_lognormal(schedule, image_size, shift):
    """For any schedule, ln σ has the distribution of a Gaussian that is truncated at the ends of the schedule."""
    diffusion, mean, std = GaussianDiffusion(T, "noise", schedule, image_size), -1.2 + shift, 1.2 + shift
    share = diffusion.timestep_distribution("lognormal")
    log_sigma = np.log(np.sqrt(1 / diffusion.alphas_cumprod - 1))
    between = (log_sigma[1:] + log_sigma[:-1]) / 2
    edges = [2 * log_sigma[0] - between[0], *between, 2 * log_sigma[-1] - between[-1]]  # around each t
    below = np.array([(1 + erf((level - mean) / std / 2**0.5)) / 2 for level in edges])
    assert share.shape == (T,) and share.min() >= 0 and share.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.cumsum(share), (below[1:] - below[0]) / (below[-1] - below[0]), atol=2e-3)
    np.testing.assert_allclose(np.log(diffusion.sigmas), log_sigma, atol=1e-9)


def test_wrong_distributions_of_timesteps_are_refused():
    with pytest.raises(OasisError, match="uniform, lognormal"):
        GaussianDiffusion(T).timestep_distribution("normal")
