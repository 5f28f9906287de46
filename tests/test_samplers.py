"""The samplers against their papers, which papers.py holds in plain numpy; and the loop itself.

With the optimal denoiser of Gaussian pixels, a sampler is an affine function of the noise that it draws. Impulses,
noise that is 1 in one pixel and 0 in all others, give all coefficients of this function. The mean and the std of the
images follow exactly from them.
"""
import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

import modules
from gaussian import ALPHAS_CUMPROD, MEAN, T, gaussian_denoiser, gaussian_output
from modules import SAMPLERS, SCHEDULES, GaussianDiffusion
from oasis import noise as oasis_noise
from oasis.files import OasisError
from papers import ddim_paper, ddpm_paper, dpm_paper

STDS = np.array([0.02, 0.25, 0.5])


# {name: (arguments of sample, the paper's sampler, its timesteps, its arguments)}. 37 divides 999: no rounding.
ALL, EVERY_37TH = range(999, -1, -1), range(999, -1, -37)
DPM_TIMES = GaussianDiffusion(T).sampler_table("dpm", 20)[0]
PAPERS = {
    "ddpm small": (dict(sampler="ddpm"), ddpm_paper, ALL, {}),
    "ddpm large": (dict(sampler="ddpm", variance="large"), ddpm_paper, ALL, dict(large=True)),
    "ddpm small, 28 steps": (dict(steps=28), ddpm_paper, EVERY_37TH, {}),
    "ddpm large, 28 steps": (dict(steps=28, variance="large"), ddpm_paper, EVERY_37TH, dict(large=True)),
    "ddim": (dict(sampler="ddim", steps=28), ddim_paper, EVERY_37TH, {}),
    "ddim half": (dict(sampler="ddim", steps=28, eta=0.5), ddim_paper, EVERY_37TH, dict(eta=0.5)),
    "ddim 1": (dict(sampler="ddim", steps=28, eta=1.0), ddim_paper, EVERY_37TH, dict(eta=1.0)),
    "ddim, all steps": (dict(sampler="ddim", steps=1000), ddim_paper, ALL, {}),
    "ddim 1, all steps": (dict(sampler="ddim", steps=1000, eta=1.0), ddim_paper, ALL, dict(eta=1.0)),
    "dpm": (dict(sampler="dpm", steps=20), dpm_paper, DPM_TIMES, {}),
    "dpm 1": (dict(sampler="dpm", steps=20, eta=1.0), dpm_paper, DPM_TIMES, dict(sde=True)),
}
MADE_STDS = {"ddpm small": [None, 0.24628, 0.49611], "ddpm large": [None, 0.25094, 0.50075]}  # for STDS, by name
PIXELS = T + 2  # pixel k gets only the noise drawn at timestep k, pixel T the initial noise, pixel T + 1 none


def paper_response(name, alphas_cumprod=ALPHAS_CUMPROD, times=None):
    """float64 (3, PIXELS): the images that the paper's sampler makes of impulses, for each of STDS."""
    _, paper, paper_times, options = PAPERS[name]

    def noise_in(x, t):
        return gaussian_output(x, np.sqrt(alphas_cumprod[t]), np.sqrt(1 - alphas_cumprod[t]), STDS[:, None])
    return paper(alphas_cumprod, noise_in, np.tile(np.eye(PIXELS)[T], [3, 1]), lambda t: np.eye(PIXELS)[t],
                 paper_times if times is None else times, **options)


@pytest.fixture
def impulses(monkeypatch):
    """Replaces the noise at timestep k by an impulse: 1 in pixel k and 0 in all others."""
    monkeypatch.setattr(oasis_noise, "normal_noise", lambda shape, seed: tf.reshape(tf.one_hot(seed[1], PIXELS), shape))


def response(objective="noise", schedule="linear", image_size=256, alphas_cumprod=ALPHAS_CUMPROD, **options):
    """paper_response for GaussianDiffusion.sample."""
    denoise_fn = gaussian_denoiser(STDS, objective, alphas_cumprod)
    return pixels_of(GaussianDiffusion(T, objective, schedule, image_size), denoise_fn, clip=False, **options)


def pixels_of(diffusion, denoise_fn, **options):
    images = diffusion.sample(denoise_fn, (3, 1, PIXELS, 1), [0, 1, 2], **options)
    return images.numpy()[:, 0, :, 0].astype(np.float64)


def mean_and_std(response):
    """The mean and the std (3,) of the pixels for independent N(0, 1) noise."""
    mean = response[:, -1]
    return mean, np.sqrt(np.sum((response - mean[:, None])**2, axis=1))


@pytest.mark.parametrize("name", PAPERS)
def test_every_draw_of_noise_does_what_the_paper_says(name, impulses):
    real, paper = response(**PAPERS[name][0]), paper_response(name)
    np.testing.assert_allclose(real, paper, atol=3e-6)
    np.testing.assert_allclose(mean_and_std(real), mean_and_std(paper), atol=3e-6)
    for std, expected in zip(mean_and_std(real)[1], MADE_STDS.get(name, [])):
        assert expected is None or std == pytest.approx(expected, abs=8e-6)


@pytest.mark.parametrize("objective", ["x_start", "v"])
def test_every_objective_makes_the_same_images(objective, impulses):
    np.testing.assert_allclose(response(objective, **PAPERS["dpm"][0]), paper_response("dpm"), atol=3e-6)


@pytest.mark.parametrize("name, schedule", [("dpm", "cosine"), ("dpm", "shifted"),
                                            ("ddpm large, 28 steps", "cosine"), ("ddim half", "shifted")])
def test_every_schedule_is_sampled_as_the_paper_says(name, schedule, impulses):
    diffusion, options = GaussianDiffusion(T, "x_start", schedule, image_size=256), PAPERS[name][0]
    times = diffusion.sampler_table(**options)[0] if name == "dpm" else None
    real = response("x_start", schedule, alphas_cumprod=diffusion.alphas_cumprod, **options)
    np.testing.assert_allclose(real, paper_response(name, diffusion.alphas_cumprod, times), atol=3e-6)


def test_ddpm_makes_the_std_of_the_data_out_of_real_noise():
    """The std of random images. Unlike impulses, it shows whether the noise is N(0, 1) and independent."""
    images = GaussianDiffusion(T).sample(gaussian_denoiser(0.25), (4, 128, 128, 1), range(4), clip=False).numpy()
    assert images.mean() == pytest.approx(MEAN, abs=0.004)  # 4 standard errors of 65,536 pixels
    assert images.std() == pytest.approx(0.24628, abs=0.0028)  # 0.25 is outside
    assert np.all(np.abs(np.corrcoef(images.reshape(4, -1)) - np.eye(4)) < 4 / 128)


# ----------------------------------------------------------------------------------------------------- noise scale

@pytest.mark.parametrize("name, image_size", [("ddpm large, 28 steps", 64), ("dpm 1", 256)])
def test_noise_scale_multiplies_the_noise_of_coarse_shapes(name, image_size, impulses):
    """noise_scale multiplies the noise that is drawn where σ > image_size / 256, except the initial noise."""
    plain, scaled = (response(image_size=image_size, **PAPERS[name][0], noise_scale=scale) for scale in (1.0, 1.1))
    without_noise = plain[:, -1:]
    np.testing.assert_allclose(scaled[:, -1:], without_noise, atol=1e-7)
    sigmas = np.sqrt(1 / ALPHAS_CUMPROD - 1)
    factors = np.append(np.where(sigmas > image_size / 256, 1.1, 1.0), [1.0, 1.0])
    coarse = plain[:, factors > 1] - without_noise
    assert 0 < np.sum(coarse**2) < np.sum((plain - without_noise)**2)
    np.testing.assert_allclose(scaled - without_noise, (plain - without_noise) * factors, atol=3e-6)


def test_noise_scale_restores_the_std_that_a_network_loses(impulses):
    """The network's predictions are too close to the mean."""
    optimal, diffusion = gaussian_denoiser(STDS, "x_start"), GaussianDiffusion(T, "x_start", image_size=64)

    def timid(x, t):
        return MEAN + 0.98 * (optimal(x, t) - MEAN)

    def std(denoise_fn, **options):
        return mean_and_std(pixels_of(diffusion, denoise_fn, sampler="dpm", clip=False, eta=1.0, **options))[1]
    plain, scaled = (np.abs(std(timid, noise_scale=scale) / std(optimal) - 1) for scale in (1.0, 1.1))
    assert np.all(plain[1:] > 0.1) and np.all(scaled[1:] < 0.06)


# ------------------------------------------------------------------------------------------- timesteps and convergence

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [21, T])
def test_ddpm_steps_are_draws_from_q_posterior(schedule, timesteps):
    diffusion = GaussianDiffusion(timesteps, schedule=schedule)
    times, table = diffusion.sampler_table("ddpm")
    one, zero = (tf.fill([timesteps, 1, 1, 1], tf.constant(value, tf.float64)) for value in (1, 0))
    from_x_start, variance = diffusion.q_posterior(one, zero, times)
    from_x_t, _ = diffusion.q_posterior(zero, one, times)
    np.testing.assert_array_equal(times, np.arange(timesteps)[::-1])
    np.testing.assert_allclose(table[:, 0], np.ravel(from_x_t), rtol=1e-12)
    np.testing.assert_allclose(table[:, 1], np.ravel(from_x_start), rtol=1e-12)
    np.testing.assert_array_equal(table[:, 2], 0)
    np.testing.assert_allclose(table[:, 3], np.sqrt(np.ravel(variance)), rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 28, 50, 333, 999, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_fall_from_the_last_to_0_and_all_differ(sampler, steps):
    times, table = GaussianDiffusion(T).sampler_table(sampler, steps)
    assert times.shape == (steps,) and table.shape == (steps, 4) and np.isfinite(table).all()
    assert times[0] == T - 1 and (steps == 1 or times[-1] == 0) and np.all(np.diff(times) < 0)
    if sampler != "dpm" and steps > 1:
        assert np.all(np.abs(-np.diff(times) - (T - 1) / (steps - 1)) <= 1)


@pytest.mark.parametrize("sampler, more", [("ddpm", {"eta": 0.5}), ("ddim", {"variance": "large"}),
                                           ("dpm", {"variance": "large"})])
def test_an_argument_that_a_sampler_does_not_use_is_refused(sampler, more):
    with pytest.raises(OasisError, match=f"{[*more][0]} is no argument of the sampler {sampler}"):
        GaussianDiffusion(T).sampler_table(sampler, 5, **more)


def test_the_default_numbers_of_steps():
    for timesteps, expected in (T, [T, 50, 20]), (10, [10, 10, 10]):
        assert [len(GaussianDiffusion(timesteps).sampler_table(name)[0]) for name in SAMPLERS] == expected


@pytest.mark.parametrize("schedule, image_size", [("linear", 64), ("shifted", 256)])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpm_timesteps_are_even_in_log_snr(steps, schedule, image_size):
    diffusion = GaussianDiffusion(T, schedule=schedule, image_size=image_size)
    log_snr = np.log(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    times = diffusion.sampler_table("dpm", steps)[0]
    off = np.abs(log_snr[times] - np.linspace(log_snr[-1], log_snr[0], steps))
    to_neighbour = np.abs(np.gradient(log_snr))[times]
    assert np.all(off <= 0.55 * to_neighbour)  # rounded to the nearest timestep


def test_dpm_takes_one_step_alone_where_there_is_only_noise():
    """σ of the cosine schedule rises to 20,000. Above σ = 164, x_t shows nothing of the image."""
    diffusion = GaussianDiffusion(T, schedule="cosine")
    sigmas = diffusion.sigmas[diffusion.sampler_table("dpm", 20)[0]]
    assert sigmas[0] > 20_000 and sigmas[1] < 164


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_step_is_the_prediction_from_pure_noise(sampler):
    predict = gaussian_denoiser(0.25, "x_start")
    image, frames = GaussianDiffusion(T, "x_start").sample(predict, (1, 8, 8, 1), [5], sampler, 1, clip=False, frames=2)
    np.testing.assert_allclose(image, predict(frames[0], [T - 1]), atol=1e-6)


@pytest.mark.parametrize("sampler, least, most", [("ddim", 1.9, 2.1), ("dpm", 3.7, 4.4)])
def test_order_of_convergence(sampler, least, most):
    """Twice as many steps halve the error of DDIM (first order) and quarter that of DPM-Solver++ 2M (second order).

    From t = T-1 to t = 0 the probability flow keeps (x - √ᾱ MEAN) / √(ᾱ s² + 1-ᾱ) constant. The last step of each
    sampler returns the predicted clean image, as does the exact solution here.
    """
    std = 0.25
    predict = gaussian_denoiser(std, "x_start")
    ends = ALPHAS_CUMPROD[[0, -1]]
    signal, total = np.sqrt(ends), np.sqrt(ends * std**2 + 1 - ends)
    errors = []
    for steps in (20, 40, 80):  # with fewer the order is not visible yet; with more, dpm's timesteps are not even
        images, frames = GaussianDiffusion(T, "x_start").sample(predict, (1, 16, 16, 1), [0], sampler, steps,
                                                                clip=False, frames=2)
        exact = signal[0] * MEAN + total[0] * (frames[0] - signal[1] * MEAN) / total[1]
        exact = MEAN + signal[0] * std**2 / total[0]**2 * (exact - signal[0] * MEAN)
        errors.append(np.sqrt(np.mean((images - exact)**2)))
    assert least < errors[0] / errors[1] < most and least < errors[1] / errors[2] < most


# ------------------------------------------------------------------------------------------------- the loop itself

SHAPE = (2, 8, 8, 1)
DENOISER = gaussian_denoiser(0.25)
DIFFUSION = GaussianDiffusion(T)


def draw(shape=SHAPE, seeds=(3, 4), denoise_fn=DENOISER, **options):
    return DIFFUSION.sample(denoise_fn, shape, seeds, **{"steps": 20, **options})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler):
    batch = draw((8, 5, 7, 3), range(8), sampler=sampler).numpy()
    assert batch.dtype == np.float32 and batch.shape == (8, 5, 7, 3)
    for i in (0, 5):
        np.testing.assert_array_equal(draw((1, 5, 7, 3), [i], sampler=sampler)[0], batch[i])


def test_seeds_count_in_all_their_64_bits():
    seeds = [1, 1 + 2**32, 1 + 2**40, -1, 2**63 - 1, 1]
    images = draw((6, 4, 4, 1), seeds, sampler="ddim").numpy()
    np.testing.assert_array_equal(images[0], images[5])
    assert len(np.unique(images.reshape(6, -1)[:, 0])) == 5


def test_noise_is_the_same_on_every_stack_and_device():
    """The expected values are constants: a seed must give the same image in every TensorFlow version."""
    first = draw((1, 2, 2, 1), [42], frames=2)[1][0].numpy().ravel()
    np.testing.assert_allclose(first, [2.5745335, 0.0818156, -0.7870349, -0.3393387], atol=1e-6)


def test_new_seeds_are_the_same_under_xla():
    """Seeds of all sizes: TensorFlow's default differs under XLA for those of more than 32 bits."""
    def new_seeds(seed):
        return oasis_noise.split_seed(seed, 2), oasis_noise.fold_in(seed, 3)
    compiled = tf.function(new_seeds, jit_compile=True)
    for seed in [0, 3], [-5, 2**40], [2**63 - 1, -2**63]:
        for ours, theirs in zip(new_seeds(tf.constant(seed, tf.int64)), compiled(tf.constant(seed, tf.int64))):
            np.testing.assert_array_equal(ours, theirs)


def test_frames_go_evenly_from_the_noise_to_the_images():
    images, trajectory = draw((2, 32, 32, 1), frames=21)  # the noise and every step
    _, few = draw((2, 32, 32, 1), frames=5)
    assert trajectory.shape == (21, 2, 32, 32, 1) and trajectory.dtype == tf.float32
    noise = trajectory[0]
    assert np.mean(noise) == pytest.approx(0, abs=0.09) and np.std(noise) == pytest.approx(1, abs=0.07)
    np.testing.assert_array_equal(noise, draw((2, 32, 32, 1), sampler="dpm", frames=2)[1][0])
    np.testing.assert_array_equal(trajectory[-1], images)
    np.testing.assert_array_equal(few, trajectory[::5])
    assert all(np.any(trajectory[i] != trajectory[i + 1]) for i in range(20))


def test_frames_do_not_change_the_images():
    np.testing.assert_array_equal(draw(frames=7)[0], draw())
    images, trajectory = draw(steps=3, frames=10)  # more frames than steps
    assert trajectory.shape == (10, *SHAPE) and np.all(trajectory[-1] == images)


@pytest.mark.parametrize("sampler", SAMPLERS)
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


def test_a_half_precision_network_is_welcome():
    """Its outputs, -1, 0 and 1, are exact in bfloat16. So are the images, since the sampler computes in float32."""
    exact, images = (draw(denoise_fn=lambda x, t: tf.cast(tf.sign(x), dtype), sampler="ddim")
                     for dtype in (tf.float32, tf.bfloat16))
    assert images.dtype == tf.float32
    np.testing.assert_array_equal(images, exact)


def test_the_timestep_reaches_the_network_as_int32_of_the_batch():
    def denoise_fn(x, t):
        assert x.shape == SHAPE and x.dtype == tf.float32 and t.shape == (2,) and t.dtype == tf.int32
        return x
    draw(denoise_fn=denoise_fn)


@pytest.mark.parametrize("options", [dict(sampler="ddpm"), dict(sampler="ddim", eta=0.5), dict(sampler="dpm")])
def test_the_loop_compiles_under_xla(options, impulses):
    plain, compiled = (GaussianDiffusion(T).sample(DENOISER, (1, 1, PIXELS, 1), [0], steps=20, frames=4,
                                                   jit_compile=jit_compile, **options) for jit_compile in (False, True))
    np.testing.assert_allclose(compiled[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(compiled[1], plain[1], atol=1e-5)


def test_a_seed_makes_the_same_image_under_xla():
    np.testing.assert_allclose(draw(sampler="ddpm", jit_compile=True), draw(sampler="ddpm"), atol=1e-4)


def test_on_step_is_called_once_a_step():
    """A loop that was compiled for an earlier call calls the on_step of the latest one."""
    diffusion, images, counts = GaussianDiffusion(T, "x_start"), [], [0, 0]
    for i in range(2):
        def count():
            counts[i] += 1
        images.append(diffusion.sample(DENOISER, SHAPE, [0, 1], steps=7, on_step=count))
        assert counts == [[7, 0], [7, 7]][i]
    assert diffusion.sampling_loop.cache_info().misses == 1
    np.testing.assert_array_equal(images[0], diffusion.sample(DENOISER, SHAPE, [0, 1], steps=7))


@pytest.mark.parametrize("options", [
    dict(sampler="euler"), dict(variance="medium"), dict(steps=-1), dict(steps=T + 1), dict(sampler="ddim", eta=1.5),
    dict(sampler="ddim", eta=-0.1), dict(noise_scale=0.4), dict(noise_scale=2.1), dict(noise_scale=np.nan),
    dict(seeds=[1]), dict(seeds=[1, 2, 3]), dict(frames=1), dict(frames=-1)])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(OasisError):
        draw(**options)


# ----------------------------------------------------------------------------------------------------- compiled loops

def counting(denoise_fn=DENOISER):
    """Return (denoise_fn that also counts, a list that gets an item whenever denoise_fn is traced)."""
    traces = []
    return lambda *arguments: traces.append(len(arguments)) or denoise_fn(*arguments), traces


def draw_from(diffusion, denoise_fn):
    return diffusion.sample(denoise_fn, (1, 2, 2, 1), [0], "dpm", 1)


def test_a_second_call_traces_nothing():
    denoise_fn, traces = counting()
    first = draw(denoise_fn=denoise_fn)
    once = len(traces)
    np.testing.assert_array_equal(draw(denoise_fn=denoise_fn), first)
    assert np.any(draw(denoise_fn=denoise_fn, seeds=[8, 9]) != first)
    assert 1 <= once <= 2 and len(traces) == once  # denoise_fn is not traced in every step


def test_100_calls_with_fresh_functions_leave_16_loops(monkeypatch):
    monkeypatch.setattr(modules, "compile_loop", lambda *_: lambda seeds, cond: (seeds, None))
    diffusion = GaussianDiffusion(T)
    for calls in range(1, 101):
        draw_from(diffusion, lambda x, t: x)
        assert diffusion.sampling_loop.cache_info().currsize == min(calls, 16)


def test_a_loop_that_is_dropped_is_freed(monkeypatch):
    gc.freeze()  # so that gc.collect() does not look through the objects of earlier tests
    monkeypatch.setattr(modules, "MAX_LOOPS", 1)
    diffusion, alive = GaussianDiffusion(T, "x_start"), weakref.WeakSet()
    for _ in range(2):
        denoise_fn, _ = counting(lambda x, t: x)
        alive.add(denoise_fn)
        draw_from(diffusion, denoise_fn)
    del denoise_fn
    gc.collect()
    assert len(alive) == 1


def test_the_least_recently_used_loop_is_dropped(monkeypatch):
    made = []
    monkeypatch.setattr(modules, "MAX_LOOPS", 3)
    monkeypatch.setattr(modules, "compile_loop", lambda *_: made.append(1) or (lambda seeds, cond: (seeds, None)))
    diffusion, functions = GaussianDiffusion(T), [lambda x, t: x for _ in range(4)]

    def compiled(i):
        before = len(made)
        draw_from(diffusion, functions[i])
        return len(made) > before
    assert all(compiled(i) for i in range(3)) and not compiled(0)
    assert compiled(3)                                      # it replaces loop 1, which is now the oldest
    assert not compiled(0) and not compiled(2) and not compiled(3) and compiled(1)


# ---------------------------------------------------------------------------------------------------------- condition

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_image_has_its_own_row_of_the_condition(sampler):
    """A second call with another condition of the same shape traces nothing."""
    denoise_fn, traces = counting(lambda x, t, cond: cond[:, None, None] + tf.zeros_like(x))
    diffusion, once = GaussianDiffusion(T, "x_start"), None
    for rows in ([-0.75, 0.25, 0.5], [0.0, -1.0, 1.0]):
        cond = tf.constant(rows)[:, None]
        images = diffusion.sample(denoise_fn, (3, 4, 5, 1), [0, 1, 2], sampler, 20, cond=cond)
        np.testing.assert_allclose(images, np.broadcast_to(cond[:, None, None], images.shape), atol=1e-6)
        once = once or len(traces)
    assert set(traces) == {3} and len(traces) == once


def test_an_image_depends_on_its_seed_and_its_row_alone():
    def denoise_fn(x, t, cond):
        return DENOISER(x, t) + 0.1 * cond[:, None, None]
    cond = tf.constant([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    both = draw((2, 4, 4, 3), [6, 7], denoise_fn=denoise_fn, cond=cond)
    np.testing.assert_array_equal(draw((1, 4, 4, 3), [7], denoise_fn=denoise_fn, cond=cond[1:])[0], both[1])
    without = draw((2, 4, 4, 3), [6, 7], denoise_fn=denoise_fn, cond=tf.zeros_like(cond))
    np.testing.assert_array_equal(np.any(both != without, axis=(1, 2)), cond > 0)
