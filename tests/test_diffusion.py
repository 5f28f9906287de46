"""The diffusion maths against closed forms and against the papers, written down here a second time in plain numpy.

Pixels that are N(MEAN, s²) have a closed-form optimal denoiser, linear in x. Every sampler is then affine in the noise it is
fed: one pixel for each draw of noise, which sees that draw alone as 1 and all others as 0, shows the whole map, and the mean
and the standard deviation of what the sampler makes follow without any statistics.
"""
from math import erf

import numpy as np
import pytest
import tensorflow as tf

import modules
from common import OasisError
from modules import SCHEDULES, GaussianDiffusion, cosine_beta_schedule, linear_beta_schedule, shifted_beta_schedule

T = 1000
BETAS = 1e-4 + (0.02 - 1e-4) * np.arange(T) / (T - 1)  # section 4 of DDPM
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
MEAN = -0.5
STDS = np.array([0.02, 0.25, 0.5])
TIMES = np.arange(T)[:, None, None, None]  # a batch with every t
RNG = np.random.default_rng(0)
X_START, NOISE = RNG.uniform(-1, 1, [T, 2, 3, 1]), RNG.standard_normal([T, 2, 3, 1])


# -------------------------------------------------------------------------------------------------------- schedule

def test_beta_goes_from_1e_4_to_0_02():
    betas = linear_beta_schedule(T)
    assert betas.shape == (T,) and betas.dtype == np.float64
    np.testing.assert_allclose(betas, BETAS, rtol=1e-13)
    np.testing.assert_array_equal(betas, GaussianDiffusion(T).betas)


def test_t_0_is_one_step_of_noise_and_the_last_is_all_noise():
    alphas_cumprod = GaussianDiffusion(T).alphas_cumprod
    assert alphas_cumprod.shape == (T,) and alphas_cumprod.dtype == np.float64
    assert alphas_cumprod[0] == 1 - 1e-4
    assert alphas_cumprod[-1] == pytest.approx(4.0358e-5, abs=5e-10)


def test_posterior_variance_at_both_ends_and_between():
    variance = GaussianDiffusion(T).posterior_variance
    assert variance.shape == (T,) and variance[0] == 0
    np.testing.assert_allclose(variance[[487, 999]], [0.0097916, 0.0199999], atol=1e-7)


@pytest.mark.parametrize("timesteps", [21, 100, 500, 1001, 4000])
def test_any_number_of_steps_ends_in_the_same_noise(timesteps):
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


def test_shifted_schedule_hides_the_mean_of_a_block_as_the_linear_one_hides_a_pixel():
    diffusion = GaussianDiffusion(T, "x_start", "shifted", 256)
    of_blocks = diffusion.alphas_cumprod / ((1 - diffusion.alphas_cumprod) / 4**2)  # the variance of the mean of 4×4 pixels
    np.testing.assert_allclose(of_blocks, ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------- identities

def test_q_sample_is_the_chain_of_single_steps():
    mean, variance = np.ones(1), np.zeros(1)
    for t, beta in enumerate(BETAS):  # eq. 2, step by step, on the mean and the variance of x_t
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 487, 999):
            one, zero = tf.ones([1, 1, 1, 1], tf.float64), tf.zeros([1, 1, 1, 1], tf.float64)
            assert GaussianDiffusion(T).q_sample(one, [t], zero).numpy().item() == pytest.approx(mean.item(), rel=1e-12)
            assert GaussianDiffusion(T).q_sample(zero, [t], one).numpy().item()**2 == pytest.approx(variance.item(), rel=1e-11)


def test_predict_x_start_undoes_q_sample():
    diffusion = GaussianDiffusion(T)
    x_t = diffusion.q_sample(tf.constant(X_START), np.arange(T), tf.constant(NOISE))
    assert x_t.dtype == tf.float64
    np.testing.assert_allclose(diffusion.predict_x_start(x_t, np.arange(T), NOISE), X_START, atol=1e-12)


def test_q_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) · q(x_{t-1} | x_0): precisions add."""
    alphas, before = 1 - BETAS[1:], ALPHAS_CUMPROD[:-1]
    precisions = np.stack([alphas / BETAS[1:], 1 / (1 - before)])[..., None, None, None]
    x_t, x_start = X_START[1:] * 2, X_START[1:]
    means = np.stack([x_t / np.sqrt(1 - BETAS[TIMES[1:]]), np.sqrt(ALPHAS_CUMPROD[TIMES[1:] - 1]) * x_start])
    mean, variance = GaussianDiffusion(T).q_posterior(tf.constant(x_start), tf.constant(x_t), np.arange(1, T))
    np.testing.assert_allclose(variance, 1 / precisions.sum(0), rtol=1e-11)  # 1 - ᾱ loses four of sixteen digits
    np.testing.assert_allclose(mean, (precisions * means).sum(0) / precisions.sum(0), atol=1e-12)


def test_q_posterior_of_the_first_step_is_the_clean_image():
    x_start = tf.constant(X_START[:1])
    mean, variance = GaussianDiffusion(T).q_posterior(x_start, x_start * 2, [0])
    np.testing.assert_allclose(mean, x_start, atol=1e-12)
    assert np.all(variance == 0)


def outputs(x_start, noise):
    """What a perfect network returns for every t, by objective."""
    signal, noise_rate = np.sqrt(ALPHAS_CUMPROD[TIMES]), np.sqrt(1 - ALPHAS_CUMPROD[TIMES])
    return {"noise": noise, "x_start": x_start, "v": signal * noise - noise_rate * x_start}


@pytest.mark.parametrize("objective", ["noise", "x_start", "v"])
def test_every_objective_means_the_same_clean_image(objective):
    diffusion = GaussianDiffusion(T, objective)
    x_t = diffusion.q_sample(tf.constant(X_START), np.arange(T), tf.constant(NOISE))
    x_start = diffusion.x_start_of_output(x_t, np.arange(T), tf.constant(outputs(X_START, NOISE)[objective]))
    np.testing.assert_allclose(x_start, X_START, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- loss

def loss_of(objective, error, loss="l2", x_start=X_START, **options):
    """The loss at every t of a network whose clean image is wrong by `error`, with the other objectives to match."""
    noise_error = -error * np.sqrt(ALPHAS_CUMPROD[TIMES] / (1 - ALPHAS_CUMPROD[TIMES]))
    output = outputs(x_start + error, NOISE + noise_error)[objective]
    return GaussianDiffusion(T, objective).training_loss(lambda x, t: tf.constant(output), tf.constant(x_start), np.arange(T),
                                                         tf.constant(NOISE), loss, **options).numpy()


@pytest.mark.parametrize("objective", ["noise", "x_start", "v"])
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_a_perfect_network_scores_0(objective, loss):
    assert loss_of(objective, np.zeros_like(X_START), loss).shape == (T,)
    np.testing.assert_allclose(loss_of(objective, np.zeros_like(X_START), loss), 0, atol=1e-24 if loss == "l2" else 1e-12)


@pytest.mark.parametrize("loss,score", [("l2", 1.0), ("l1", np.sqrt(2 / np.pi))])
def test_a_network_whose_output_is_zero(loss, score):
    noise = tf.random.stateless_normal([1000, 32, 32, 1], [1, 2])
    losses = GaussianDiffusion(T).training_loss(lambda x, t: tf.zeros_like(x), tf.zeros_like(noise), np.arange(T), noise, loss)
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
    error = np.full_like(X_START, 0.1)
    weight = np.minimum(1 / (1 - ALPHAS_CUMPROD), cap)
    np.testing.assert_allclose(loss_of("x_start", error, **options), weight * 0.1**2, rtol=1e-12)
    np.testing.assert_allclose(loss_of("x_start", error, "l1", **options), np.sqrt(weight) * 0.1, rtol=1e-12)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_blacker_than_black_and_whiter_than_white_are_no_error_of_x_start(loss):
    """The clipped prediction is right there; towards grey, and beyond an end where the pixel is grey, it is an error as ever."""
    clean = tf.constant([-1.0, -1.0, 1.0, 1.0, -0.99, 0.99])[:, None, None, None]
    output = tf.constant([-1.5, -0.5, 1.5, 0.5, -1.49, 1.49])[:, None, None, None]
    diffusion, t = GaussianDiffusion(T, "x_start"), np.full(6, T - 1)
    with tf.GradientTape() as tape:
        tape.watch(output)
        losses = diffusion.training_loss(lambda x, t: output, clean, t, tf.zeros_like(clean), loss)
    np.testing.assert_allclose(losses, np.array([0, 1, 0, 1, 1, 1]) * (0.25 if loss == "l2" else 0.5), rtol=1e-3)
    np.testing.assert_array_equal(np.sign(tape.gradient(losses, output)).ravel(), [0, 1, 0, -1, -1, 1])


def test_uniform_times_are_all_alike():
    np.testing.assert_allclose(GaussianDiffusion(T).training_times("uniform"), 1 / T, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("image_size, mean, std", [(32, -1.2, 1.2), (64, -1.2, 1.2), (256, -1.2 + np.log(2), 1.2 + np.log(2))])
def test_lognormal_times_make_the_noise_level_lognormal(schedule, image_size, mean, std):
    """Whatever the schedule, the share of ln σ below any level is that of the Gaussian, cut off where the schedule ends."""
    diffusion = GaussianDiffusion(T, schedule=schedule, image_size=image_size)
    share = diffusion.training_times("lognormal")
    log_noise = np.log(np.sqrt(1 / diffusion.alphas_cumprod - 1))
    between = (log_noise[1:] + log_noise[:-1]) / 2
    edges = [2 * log_noise[0] - between[0], *between, 2 * log_noise[-1] - between[-1]]  # of the levels that each t stands for
    below = np.array([(1 + erf((level - mean) / std / 2**0.5)) / 2 for level in edges])
    assert share.shape == (T,) and share.min() >= 0 and share.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.cumsum(share), (below[1:] - below[0]) / (below[-1] - below[0]), atol=2e-3)


def test_loss_belongs_to_its_picture():
    error = np.zeros_like(X_START)
    error[7] = 1
    assert np.flatnonzero(loss_of("v", error) > 1e-12) == [7]


def test_denoise_fn_is_called_with_the_noisy_image_and_its_time():
    def denoise_fn(x, t):
        np.testing.assert_allclose(x[:, 0, 0, 0], np.sqrt(ALPHAS_CUMPROD[[3, 700]]) * 0.5, rtol=1e-6)
        np.testing.assert_array_equal(t, [3, 700])
        return x
    GaussianDiffusion(T).training_loss(denoise_fn, tf.fill([2, 4, 4, 1], 0.5), tf.constant([3, 700]), tf.zeros([2, 4, 4, 1]))


# --------------------------------------------------------------------------- the samplers as their papers write them

def ddpm_paper(noise_in, x, noise, times, large=False):
    """Algorithm 2 of DDPM; over fewer times, with the β that lead from one to the next (Nichol & Dhariwal 2021, eq. 19)."""
    for t, before in zip(times, [*times[1:], None]):
        alpha_bar, alpha_bar_before = ALPHAS_CUMPROD[t], 1.0 if before is None else ALPHAS_CUMPROD[before]
        alpha = alpha_bar / alpha_bar_before
        beta = 1 - alpha
        variance = beta if large else beta * (1 - alpha_bar_before) / (1 - alpha_bar)
        z = 0 if before is None else noise(t)
        x = (x - beta / np.sqrt(1 - alpha_bar) * noise_in(x, t)) / np.sqrt(alpha) + np.sqrt(variance) * z
    return x


def ddim_paper(noise_in, x, noise, times, eta=0.0):
    """Eq. 12 and 16 of DDIM."""
    for t, before in zip(times, [*times[1:], None]):
        alpha, alpha_before = ALPHAS_CUMPROD[t], 1.0 if before is None else ALPHAS_CUMPROD[before]
        sigma = eta * np.sqrt((1 - alpha_before) / (1 - alpha)) * np.sqrt(1 - alpha / alpha_before)
        epsilon = noise_in(x, t)
        x_start = (x - np.sqrt(1 - alpha) * epsilon) / np.sqrt(alpha)
        x = np.sqrt(alpha_before) * x_start + np.sqrt(1 - alpha_before - sigma**2) * epsilon + sigma * noise(t)
    return x


def dpm_paper(noise_in, x, noise, times, sde=False):
    """Algorithm 2 of DPM-Solver++, or its SDE variant; then, at infinite log-SNR, the first-order step: the prediction itself."""
    alpha, sigma = np.sqrt(ALPHAS_CUMPROD[times]), np.sqrt(1 - ALPHAS_CUMPROD[times])
    lam = np.log(alpha / sigma)
    predictions = []
    for i, t in enumerate(times):
        predictions.append((x - sigma[i] * noise_in(x, t)) / alpha[i])
        if i + 1 == len(times):
            return predictions[-1]
        h, D = lam[i + 1] - lam[i], predictions[-1]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * predictions[i] - 1 / (2 * r) * predictions[i - 1]
        if sde:
            x = sigma[i + 1] / sigma[i] * np.exp(-h) * x + alpha[i + 1] * (1 - np.exp(-2 * h)) * D
            x = x + sigma[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * noise(t)
        else:
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (np.exp(-h) - 1) * D


def gaussian_output(x, signal, noise_rate, std, objective="noise"):
    """The output of the optimal denoiser of pixels N(MEAN, std²) at x, where those rates of signal and noise make up x."""
    variance = (signal * std)**2 + noise_rate**2
    noise = noise_rate * (x - signal * MEAN) / variance
    x_start = MEAN + signal * std**2 * (x - signal * MEAN) / variance
    return {"noise": noise, "x_start": x_start, "v": signal * noise - noise_rate * x_start}[objective]


def gaussian_denoiser(stds, objective="noise"):
    """That denoiser as a denoise_fn; stds: a number, or one for each picture."""
    stds = tf.reshape(tf.constant(stds, tf.float32), [-1, 1, 1, 1])

    def denoise_fn(x, t):
        signal = tf.gather(tf.constant(np.sqrt(ALPHAS_CUMPROD), tf.float32), t)[:, None, None, None]
        noise_rate = tf.gather(tf.constant(np.sqrt(1 - ALPHAS_CUMPROD), tf.float32), t)[:, None, None, None]
        return gaussian_output(x, signal, noise_rate, stds, objective)
    return denoise_fn


# The real sampler's arguments, then the paper, its times and its other arguments. 37 divides 999, so that no time is rounded.
ALL, EVERY_37TH = range(999, -1, -1), range(999, -1, -37)
DPM_TIMES = GaussianDiffusion(T).sampler_table("dpm", 20)[0]
PAPERS = {
    "ddpm small": (dict(sampler="ddpm"), ddpm_paper, ALL, {}),
    "ddpm large": (dict(sampler="ddpm", variance="large"), ddpm_paper, ALL, dict(large=True)),
    "ddpm small, 28 steps": (dict(sampler="ddpm", steps=28), ddpm_paper, EVERY_37TH, {}),
    "ddpm large, 28 steps": (dict(sampler="ddpm", steps=28, variance="large"), ddpm_paper, EVERY_37TH, dict(large=True)),
    "ddim": (dict(sampler="ddim", steps=28), ddim_paper, EVERY_37TH, {}),
    "ddim half": (dict(sampler="ddim", steps=28, eta=0.5), ddim_paper, EVERY_37TH, dict(eta=0.5)),
    "ddim 1": (dict(sampler="ddim", steps=28, eta=1.0), ddim_paper, EVERY_37TH, dict(eta=1.0)),
    "ddim, all steps": (dict(sampler="ddim", steps=1000), ddim_paper, ALL, {}),
    "ddim 1, all steps": (dict(sampler="ddim", steps=1000, eta=1.0), ddim_paper, ALL, dict(eta=1.0)),
    "dpm": (dict(sampler="dpm", steps=20), dpm_paper, DPM_TIMES, {}),
    "dpm 1": (dict(sampler="dpm", steps=20, eta=1.0), dpm_paper, DPM_TIMES, dict(sde=True)),
}
DESIGN = {"ddpm small": [None, 0.24628, 0.49611], "ddpm large": [None, 0.25094, 0.50075]}  # standard deviations made
PIXELS = T + 2  # pixel k sees the noise drawn at time k, pixel T that before the first step, pixel T + 1 none


def paper_response(name):
    """(3, PIXELS) float64: what each draw of noise does to the picture, for each of STDS."""
    _, paper, times, options = PAPERS[name]

    def noise_in(x, t):
        return gaussian_output(x, np.sqrt(ALPHAS_CUMPROD[t]), np.sqrt(1 - ALPHAS_CUMPROD[t]), STDS[:, None])
    return paper(noise_in, np.tile(np.eye(PIXELS)[T], [3, 1]), lambda t: np.eye(PIXELS)[t], times, **options)


@pytest.fixture
def impulses(monkeypatch):
    """Instead of normal noise at time k: 1 in pixel k and 0 in all others."""
    monkeypatch.setattr(modules, "normal_noise", lambda shape, seed: tf.reshape(tf.one_hot(seed[1], PIXELS), shape))


def response(objective="noise", schedule="linear", image_size=256, **options):
    """(3, PIXELS): the same of the real loop."""
    diffusion = GaussianDiffusion(T, objective, schedule, image_size)
    images = diffusion.sample(gaussian_denoiser(STDS, objective), (3, 1, PIXELS, 1), [0, 1, 2], clip=False, **options)
    return images.numpy()[:, 0, :, 0].astype(np.float64)


def mean_and_std(response):
    """Of the pixels that independent N(0, 1) noise makes."""
    mean = response[:, -1]
    return mean, np.sqrt(np.sum((response - mean[:, None])**2, axis=1))


@pytest.mark.parametrize("name", PAPERS)
def test_every_draw_of_noise_does_what_the_paper_says(name, impulses):
    real, paper = response(**PAPERS[name][0]), paper_response(name)
    np.testing.assert_allclose(real, paper, atol=3e-6)
    np.testing.assert_allclose(mean_and_std(real), mean_and_std(paper), atol=3e-6)
    for std, figure in zip(mean_and_std(real)[1], DESIGN.get(name, [])):
        assert figure is None or std == pytest.approx(figure, abs=8e-6)


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("name", ["ddpm small", "ddpm large, 28 steps", "ddim half", "dpm 1"])
def test_noise_scale_multiplies_the_draws_that_decide_coarse_shapes(name, image_size, impulses):
    plain, scaled = (response(image_size=image_size, **PAPERS[name][0], noise_scale=scale) for scale in (1.0, 1.1))
    without_noise = plain[:, -1:]
    np.testing.assert_allclose(scaled[:, -1:], without_noise, atol=1e-7)
    noise_beside_signal = np.sqrt(1 / ALPHAS_CUMPROD - 1)
    factors = np.append(np.where(noise_beside_signal > image_size / 256, 1.1, 1.0), [1.0, 1.0])     # the noise before the first step is as it was
    assert 0 < np.sum((plain - without_noise)[:, factors > 1]**2) < np.sum((plain - without_noise)**2)
    np.testing.assert_allclose(scaled - without_noise, (plain - without_noise) * factors, atol=3e-6)


def test_noise_scale_gives_back_the_spread_that_a_network_takes_which_errs_towards_the_mean(impulses):
    optimal = gaussian_denoiser(STDS, "x_start")

    def std(denoise_fn, **options):
        diffusion = GaussianDiffusion(T, "x_start", image_size=64)
        images = diffusion.sample(denoise_fn, (3, 1, PIXELS, 1), [0, 1, 2], "dpm", clip=False, eta=1.0, **options)
        return mean_and_std(images.numpy()[:, 0, :, 0].astype(np.float64))[1]

    def timid(x, t):
        return MEAN + 0.98 * (optimal(x, t) - MEAN)
    plain, scaled = (np.abs(std(timid, noise_scale=scale) / std(optimal) - 1) for scale in (1.0, 1.1))
    assert np.all(plain[1:] > 0.1) and np.all(scaled[1:] < 0.06)


@pytest.mark.parametrize("objective", ["x_start", "v"])
@pytest.mark.parametrize("name", ["ddpm small", "ddim half", "dpm"])
def test_every_objective_makes_the_same_pictures(name, objective, impulses):
    np.testing.assert_allclose(response(objective, **PAPERS[name][0]), paper_response(name), atol=3e-6)


@pytest.mark.parametrize("schedule", ["cosine", "shifted"])
@pytest.mark.parametrize("name", ["ddpm small", "ddpm large, 28 steps", "ddim half", "dpm"])
def test_every_schedule_is_sampled_as_the_paper_says(name, schedule, impulses, monkeypatch):
    diffusion = GaussianDiffusion(T, "x_start", schedule, image_size=256)
    options, paper, times, more = PAPERS[name]
    times = diffusion.sampler_table(**options)[0] if name == "dpm" else times
    monkeypatch.setitem(PAPERS, name, (options, paper, times, more))
    monkeypatch.setitem(globals(), "ALPHAS_CUMPROD", diffusion.alphas_cumprod)  # what the papers above go by
    np.testing.assert_allclose(response("x_start", schedule, **options), paper_response(name), atol=3e-6)


def test_the_last_step_of_ddpm_adds_no_noise(impulses):
    for variance in ("small", "large"):
        draws = response(variance=variance)[:, :T] - response(variance=variance)[:, -1:]
        assert np.all(np.abs(draws[:, 0]) < 1e-6) and np.all(draws[1:, 1] > 1e-3)


def test_ddpm_makes_the_spread_of_the_data_out_of_real_noise():
    """The same figure by statistics, which sees noise that is not N(0, 1) or repeats itself."""
    images = GaussianDiffusion(T).sample(gaussian_denoiser(0.25), (4, 128, 128, 1), range(4), clip=False).numpy()
    assert images.mean() == pytest.approx(MEAN, abs=0.004)  # 4 standard errors of 65,536 pixels
    assert images.std() == pytest.approx(0.24628, abs=0.0028)  # 0.25 is outside
    assert np.all(np.abs(np.corrcoef(images.reshape(4, -1)) - np.eye(4)) < 4 / 128)


# -------------------------------------------------------------------------------------------- times and convergence

@pytest.mark.parametrize("steps", [1, 2, 3, 20, 28, 50, 333, 999, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_times_fall_from_the_last_to_0_and_all_differ(sampler, steps):
    times, table = GaussianDiffusion(T).sampler_table(sampler, steps)
    assert times.shape == (steps,) and table.shape == (steps, 4) and np.isfinite(table).all()
    assert times[0] == T - 1 and (steps == 1 or times[-1] == 0) and np.all(np.diff(times) < 0)
    if sampler != "dpm" and steps > 1:
        assert np.all(np.abs(-np.diff(times) - (T - 1) / (steps - 1)) <= 1)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpm_times_are_even_in_log_snr(steps):
    log_snr = np.log(ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD))
    times = GaussianDiffusion(T).sampler_table("dpm", steps)[0]
    off = np.abs(log_snr[times] - np.linspace(log_snr[-1], log_snr[0], steps))
    to_neighbour = np.abs(np.gradient(log_snr))[times]
    assert np.all(off <= 0.55 * to_neighbour)  # rounded to the nearest whole time


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_single_step_is_the_prediction_from_pure_noise(sampler):
    predict = gaussian_denoiser(0.25, "x_start")
    image, frames = GaussianDiffusion(T, "x_start").sample(predict, (1, 8, 8, 1), [5], sampler, 1, clip=False, frames=2)
    np.testing.assert_allclose(image, predict(frames[0], [T - 1]), atol=1e-6)


@pytest.mark.parametrize("std", [0.25, 0.5])
@pytest.mark.parametrize("sampler,least,most", [("ddim", 1.9, 2.1), ("dpm", 3.7, 4.4)])
def test_order_of_convergence(sampler, least, most, std):
    """Twice the steps: half the error of DDIM (first order), a quarter of DPM-Solver++ 2M's (second order).

    Between t = T-1 and t = 0 the probability flow leaves (x - √ᾱ MEAN) / √(ᾱ s² + 1-ᾱ) as it is. After that every
    sampler jumps to the clean image of its last prediction, and so does the exact solution here.
    """
    predict = gaussian_denoiser(std, "x_start")
    signal, total = np.sqrt(ALPHAS_CUMPROD[[0, -1]]), np.sqrt(ALPHAS_CUMPROD[[0, -1]] * std**2 + 1 - ALPHAS_CUMPROD[[0, -1]])
    errors = []
    for steps in (20, 40, 80):  # fewer: not in the limit yet; more: whole times are not even enough for dpm
        images, frames = GaussianDiffusion(T, "x_start").sample(predict, (1, 16, 16, 1), [0], sampler, steps, clip=False, frames=2)
        exact = signal[0] * MEAN + total[0] * (frames[0] - signal[1] * MEAN) / total[1]
        exact = MEAN + signal[0] * std**2 / total[0]**2 * (exact - signal[0] * MEAN)
        errors.append(np.sqrt(np.mean((images - exact)**2)))
    assert least < errors[0] / errors[1] < most and least < errors[1] / errors[2] < most


# --------------------------------------------------------------------------------------------------- the loop itself

SHAPE = (2, 8, 8, 1)
DENOISER = gaussian_denoiser(0.25)
DIFFUSION = GaussianDiffusion(T)


def draw(shape=SHAPE, seeds=(3, 4), denoise_fn=DENOISER, **options):
    return DIFFUSION.sample(denoise_fn, shape, seeds, **{"steps": 20, **options})


def test_ddim_with_eta_1_is_ddpm():
    np.testing.assert_allclose(draw(sampler="ddim", eta=1.0), draw(sampler="ddpm"), atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_picture_does_not_depend_on_its_batch(sampler):
    batch = draw((8, 5, 7, 3), range(8), sampler=sampler).numpy()
    assert batch.dtype == np.float32 and batch.shape == (8, 5, 7, 3)
    for i in (0, 5):
        np.testing.assert_array_equal(draw((1, 5, 7, 3), [i], sampler=sampler)[0], batch[i])


def test_seeds_count_in_all_their_64_bits():
    seeds = [1, 1 + 2**32, 1 + 2**40, -1, 2**63 - 1, 1]
    images = draw((6, 4, 4, 1), seeds, sampler="ddim").numpy()
    np.testing.assert_array_equal(images[0], images[5])
    assert len(np.unique(images.reshape(6, -1)[:, 0])) == 5


def test_the_noise_is_the_same_on_every_stack_and_device():
    """One picture's first noise, pinned: the pictures of a seed must not change with the version of TensorFlow."""
    first = draw((1, 2, 2, 1), [42], frames=2)[1][0].numpy().ravel()
    np.testing.assert_allclose(first, [2.5745335, 0.0818156, -0.7870349, -0.3393387], atol=1e-6)


def test_frames_go_evenly_from_the_noise_to_the_images():
    images, film = draw((2, 32, 32, 1), frames=21)  # the noise and every step
    _, few = draw((2, 32, 32, 1), frames=5)
    assert film.shape == (21, 2, 32, 32, 1) and film.dtype == tf.float32
    assert np.mean(film[0]) == pytest.approx(0, abs=0.09) and np.std(film[0]) == pytest.approx(1, abs=0.07)
    np.testing.assert_array_equal(film[0], draw((2, 32, 32, 1), sampler="dpm", frames=2)[1][0])
    np.testing.assert_array_equal(film[-1], images)
    np.testing.assert_array_equal(few, film[::5])
    assert all(np.any(film[i] != film[i + 1]) for i in range(20))


def test_frames_do_not_change_the_images():
    np.testing.assert_array_equal(draw(frames=7)[0], draw())


def test_more_frames_than_steps():
    images, film = draw(steps=3, frames=10)
    assert film.shape == (10, *SHAPE) and np.all(film[-1] == images)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_clip_keeps_the_images_between_black_and_white(sampler):
    bright = gaussian_denoiser(3.0)
    assert np.max(np.abs(draw(denoise_fn=bright, sampler=sampler, clip=False))) > 1
    assert np.max(np.abs(draw(denoise_fn=bright, sampler=sampler))) == 1


def test_clip_holds_every_prediction_not_only_the_last():
    def too_bright_until_the_end(x, t):
        return x + 100 * tf.cast(t > 0, tf.float32)[:, None, None, None]

    def white_until_the_end(x, t):
        return tf.where((t > 0)[:, None, None, None], tf.ones_like(x), x)
    clipped, white = (GaussianDiffusion(T, "x_start").sample(denoise_fn, SHAPE, [0, 1], "ddim", 20)
                      for denoise_fn in (too_bright_until_the_end, white_until_the_end))
    np.testing.assert_allclose(clipped, white, atol=1e-6)


def test_all_samplers_land_where_a_certain_network_says():
    for sampler in ("ddpm", "ddim", "dpm"):
        images = GaussianDiffusion(T, "x_start").sample(lambda x, t: tf.fill(tf.shape(x), 0.75), SHAPE, [0, 1], sampler)
        np.testing.assert_allclose(images, 0.75, atol=1e-6)


def test_a_half_precision_network_is_welcome():
    def half(x, t):
        return tf.cast(DENOISER(x, t), tf.bfloat16)
    images = draw(denoise_fn=half, sampler="ddim")
    assert images.dtype == tf.float32
    np.testing.assert_allclose(images, draw(sampler="ddim"), atol=0.1)


def test_time_reaches_the_network_as_int32_of_the_batch():
    def denoise_fn(x, t):
        assert x.shape == SHAPE and x.dtype == tf.float32 and t.shape == (2,) and t.dtype == tf.int32
        return x
    draw(denoise_fn=denoise_fn)


def test_a_second_call_traces_nothing():
    traces = []

    def denoise_fn(x, t):
        traces.append(1)
        return DENOISER(x, t)
    first = draw(denoise_fn=denoise_fn)
    once = len(traces)
    np.testing.assert_array_equal(draw(denoise_fn=denoise_fn), first)
    assert np.any(draw(denoise_fn=denoise_fn, seeds=[8, 9]) != first)
    assert 1 <= once <= 2 and len(traces) == once  # not one trace a step either


@pytest.mark.parametrize("options", [dict(sampler="ddpm"), dict(sampler="ddim", eta=0.5), dict(sampler="dpm")])
def test_the_loop_compiles_under_xla(options, impulses):
    plain, compiled = (GaussianDiffusion(T).sample(DENOISER, (1, 1, PIXELS, 1), [0], steps=20, frames=4, jit_compile=jit_compile,
                                                   **options) for jit_compile in (False, True))
    np.testing.assert_allclose(compiled[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(compiled[1], plain[1], atol=1e-5)


def test_a_seed_makes_the_same_picture_under_xla():
    np.testing.assert_allclose(draw(sampler="ddpm", jit_compile=True), draw(sampler="ddpm"), atol=1e-4)


def test_on_step_is_called_once_a_step():
    calls = []
    images = draw(steps=7, on_step=lambda: calls.append(1))
    assert len(calls) == 7
    np.testing.assert_array_equal(images, draw(steps=7))


@pytest.mark.parametrize("options", [dict(sampler="euler"), dict(variance="medium"), dict(steps=-1),
                                     dict(steps=T + 1), dict(sampler="ddim", eta=1.5), dict(sampler="ddim", eta=-0.1),
                                     dict(noise_scale=0.4), dict(noise_scale=2.1), dict(noise_scale=np.nan),
                                     dict(seeds=[1]), dict(seeds=[1, 2, 3])])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(OasisError):
        draw(**options)


def test_wrong_schedules_are_refused_by_name():
    with pytest.raises(OasisError, match="schedule 'sigmoid' is not one of linear, cosine, shifted"):
        GaussianDiffusion(T, schedule="sigmoid")


def test_wrong_objectives_and_losses_are_refused():
    with pytest.raises(OasisError, match="uniform, lognormal"):
        GaussianDiffusion(T).training_times("normal")
    with pytest.raises(OasisError, match="epsilon"):
        GaussianDiffusion(T, "epsilon")
    with pytest.raises(OasisError, match="huber"):
        GaussianDiffusion(T).training_loss(lambda x, t: x, tf.zeros(SHAPE), tf.constant([0, 1]), tf.zeros(SHAPE), "huber")
