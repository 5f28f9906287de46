"""The diffusion maths and the network, which meet only at denoise_fn(x, t[, cond]): neither knows the other.

Images are float32 (B, H, W, C) in [-1, 1]. A timestep t is an integer 0 … T-1; t = 0 means one step of noise. "DDPM" is
Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239). "eq. 4" alone means its eq. 4.
"""
import functools
import inspect
import warnings

import numpy as np
import tensorflow as tf
from einops import rearrange
from tensorflow.keras import layers

from oasis import fused as fused_layers
from oasis import modelfile
from oasis.conditions import embed, embedded_keys, has, null_condition
from oasis.devices import use_xla
from oasis.files import OasisError, check_choice, check_image_size, check_range
from oasis.loop import compile_loop
from oasis.noise import noise_of_seeds
from oasis.parameters import assign_parameters, initialize, layers_inside, named_variables

try:  # the layer of the original, on TensorFlow 2.15; that of Keras is equal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the end-of-life notice of TensorFlow Addons
        from tensorflow_addons.layers import GroupNormalization
except ImportError:
    from tensorflow.keras.layers import GroupNormalization

OBJECTIVES = ("noise", "x_start", "v")
LOSSES = ("l2", "l1")
DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpm": 20}   # None: all T
SAMPLERS = tuple(DEFAULT_STEPS)
TIMES = ("uniform", "lognormal")
MAX_LOOPS = 16            # compiled sampling loops that a GaussianDiffusion keeps: one for each device and setting
DIFFUSION_SETTINGS = ("timesteps", "objective", "schedule")
DIM_MULTS = (1, 2, 4, 8)


# ------------------------------------------------------------------------------------------------------- diffusion

def linear_beta_schedule(timesteps):
    """The variances β_t of the forward process, float64 (T,): linear from 1e-4 to 0.02 at T = 1000 (section 4 of DDPM).

    For another T both ends are multiplied by 1000 / T, so that ᾱ_T stays near zero. The upper end is at most 0.999.
    """
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=np.float64)


def cosine_beta_schedule(timesteps):
    """The variances β_t ≤ 0.999, float64 (T,), that make ᾱ a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672,
    eq. 17)."""
    angles = (np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2
    alphas_cumprod = np.cos(angles)**2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def shifted_beta_schedule(timesteps, image_size):
    """The variances β_t, float64 (T,), of the linear schedule with its log-SNR shifted by 2·log(64 / image_size).

    The mean of k×k pixels has 1/k² of their noise variance, so an image k times as large needs k² times the variance
    to lose as much structure (Hoogeboom 2023, "simple diffusion", arXiv 2301.11093).
    """
    alphas_cumprod = np.cumprod(1 - linear_beta_schedule(timesteps))
    snr = alphas_cumprod / (1 - alphas_cumprod) * (64 / image_size)**2
    noise = 1 / (1 + snr)  # 1 - ᾱ
    noise_prev = np.append(0.0, noise[:-1])
    return (noise - noise_prev) / (1 - noise_prev)


SCHEDULES = {  # functions of T and of the image size
    "linear": lambda timesteps, image_size: linear_beta_schedule(timesteps),
    "cosine": lambda timesteps, image_size: cosine_beta_schedule(timesteps),
    "shifted": shifted_beta_schedule,
}


def posterior_coefficients(alphas_cumprod, alphas_cumprod_prev):
    """Return (from_x_start, from_x_t, variance) of the posterior q(x_s | x_t, x_start), s < t; eq. 6, 7 have s = t - 1.

    Its mean is from_x_start · x_start + from_x_t · x_t. alphas_cumprod: ᾱ_t. alphas_cumprod_prev: ᾱ_s, 1 without noise.
    """
    alphas = alphas_cumprod / alphas_cumprod_prev
    from_x_start = np.sqrt(alphas_cumprod_prev) * (1 - alphas) / (1 - alphas_cumprod)
    from_x_t = np.sqrt(alphas) * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    variance = (1 - alphas) * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    return from_x_start, from_x_t, variance


class GaussianDiffusion:
    """The forward process, which turns an image into noise in T steps, the training loss and the samplers.

    timesteps: T.
    objective: what denoise_fn(x_t, t) returns, float32 (B, H, W, C): "noise" is ε, "x_start" the clean image and "v"
        the velocity √ᾱ ε - √(1-ᾱ) x_start (Salimans & Ho 2022, arXiv 2202.00512).
    schedule: one of SCHEDULES.
    image_size: pixels a side. The schedule "shifted", lognormal timesteps, dpm's steps and noise_scale depend on it.
    betas, alphas_cumprod (ᾱ) and posterior_variance (β̃) are float64 numpy arrays (T,).
    """

    def __init__(self, timesteps=1000, objective="noise", schedule="linear", image_size=64):
        check_choice("objective", objective, OBJECTIVES)
        check_choice("schedule", schedule, SCHEDULES)
        check_range("timesteps", timesteps, 2, modelfile.MAX_TIMESTEPS)
        self.timesteps, self.objective, self.schedule, self.image_size = timesteps, objective, schedule, image_size
        self.betas = SCHEDULES[schedule](timesteps, image_size)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.signal_rates = np.sqrt(self.alphas_cumprod)      # x_t = signal_rate · x_start + noise_rate · noise;
        self.noise_rates = np.sqrt(1 - self.alphas_cumprod)   # the squares of the two rates add up to 1
        self.sigmas = self.noise_rates / self.signal_rates    # σ, the noise level: noise relative to the signal
        _, _, self.posterior_variance = posterior_coefficients(self.alphas_cumprod, self.alphas_cumprod_prev)
        self.sampling_loop = functools.lru_cache(MAX_LOOPS)(self.sampling_loop)  # a cache that is freed with self

    @property
    def settings(self):
        """The arguments of __init__ as {name: value}, for the model file. image_size is in network.settings instead."""
        return {name: getattr(self, name) for name in DIFFUSION_SETTINGS}

    def q_sample(self, x_start, t, noise):
        """A sample x_t of q(x_t | x_start), with t + 1 steps of noise: √ᾱ x_start + √(1-ᾱ) noise (eq. 4). t: (B,)."""
        return extract(self.signal_rates, t, x_start) * x_start + extract(self.noise_rates, t, x_start) * noise

    def predict_x_start(self, x_t, t, noise):
        """x_start = (x_t - √(1-ᾱ) noise) / √ᾱ, which is eq. 4 solved for x_start. t: int (B,)."""
        return (x_t - extract(self.noise_rates, t, x_t) * noise) / extract(self.signal_rates, t, x_t)

    def q_posterior(self, x_start, x_t, t):
        """Mean (B, H, W, C) and variance (B, 1, 1, 1) of the Gaussian q(x_{t-1} | x_t, x_start) (eq. 6 and 7)."""
        from_x_start, from_x_t, variance = posterior_coefficients(self.alphas_cumprod, self.alphas_cumprod_prev)
        mean = extract(from_x_start, t, x_t) * x_start + extract(from_x_t, t, x_t) * x_t
        return mean, extract(variance, t, x_t)

    def x_start_from_output(self, x_t, t, output):
        """The predicted clean image x_start, computed from the output of the network for the objective."""
        if self.objective == "noise":
            return self.predict_x_start(x_t, t, output)
        if self.objective == "v":
            return extract(self.signal_rates, t, x_t) * x_t - extract(self.noise_rates, t, x_t) * output
        return output

    def target(self, x_start, t, noise):
        """What the network should return for x_t = q_sample(x_start, t, noise): noise, x_start or v, by objective."""
        if self.objective == "noise":
            return noise
        if self.objective == "v":
            return extract(self.signal_rates, t, noise) * noise - extract(self.noise_rates, t, noise) * x_start
        return x_start

    def loss_weight(self, max_weight=20.0):
        """The weight of the squared error at each t, float64 (T,): 1, or with x_start min(1/(1-ᾱ), max_weight).

        1/(1-ᾱ) = SNR + 1 turns the x_start error into the v error; it is truncated since it reaches 10,000 at t = 0.
        This truncated v-weight is like min-SNR (Hang 2023, arXiv 2303.09556), whose weight for x_start is min(SNR, γ).
        """
        if self.objective != "x_start":
            return np.ones(self.timesteps)
        return np.minimum(self.noise_rates**-2, max_weight)

    def error(self, output, target):
        """The error output - target, like target (B, H, W, C).

        With objective "x_start" the error is 0 where the output is below -1 at a black pixel (target -1) or above 1 at
        a white pixel (target 1), because the samplers clip x_start to [-1, 1].
        """
        error = tf.cast(output, target.dtype) - target
        if self.objective == "x_start":  # half of the pixels of a slice are black
            clipped = (target <= -1) & (error < 0) | (target >= 1) & (error > 0)
            error = tf.where(clipped, tf.zeros_like(error), error)
        return error

    def training_loss(self, denoise_fn, x_start, t, noise, loss="l2", max_weight=20.0, cond=None):
        """The training loss of each image, float32 (B,): the mean over pixels of w · error² ("l2", eq. 14) or of
        √w · |error| ("l1"), where w is loss_weight(max_weight) at t.

        t: int (B,). noise: like x_start. A network whose output is zero scores 1.0 (l2) or √(2/π) = 0.798 (l1) with
        objective "noise".
        """
        check_choice("loss", loss, LOSSES)
        output = call_denoise_fn(denoise_fn, self.q_sample(x_start, t, noise), t, cond)
        error = self.error(output, self.target(x_start, t, noise))
        weight = self.loss_weight(max_weight)
        if loss == "l2":
            return tf.reduce_mean(extract(weight, t, error) * tf.square(error), axis=[1, 2, 3])
        return tf.reduce_mean(extract(np.sqrt(weight), t, error) * tf.abs(error), axis=[1, 2, 3])

    def timestep_distribution(self, times="uniform"):
        """The probability with which training draws each t: float64 (T,).

        times: "uniform" (algorithm 1 of DDPM), or "lognormal": ln σ ~ N(-1.2, 1.2²) at 64 pixels and below (Karras
            2022, arXiv 2206.00364, table 1). At 64·k pixels the same σ destroys less structure, so the mean and the
            deviation of ln σ both grow by ½ ln k: mean + deviation grows by ln k, and mean - deviation stays.
        """
        check_choice("times", times, TIMES)
        if times == "uniform":
            return np.full(self.timesteps, 1 / self.timesteps)
        shift = np.log(max(self.image_size / 64, 1)) / 2
        log_sigma = np.log(self.sigmas)
        density = np.exp(-0.5 * ((log_sigma + 1.2 - shift) / (1.2 + shift))**2) * np.gradient(log_sigma)
        return density / density.sum()

    def sampler_table(self, sampler="ddpm", steps=None, variance="small", eta=0.0, noise_scale=1.0):
        """Return the timesteps of a sampler, int (S,), descending, and its table, float64 (S, 4), one row per step:

            x_next = row[0] · x  +  row[1] · x_start  +  row[2] · previous x_start  +  row[3] · fresh noise

        x_start is the clean image predicted from x in this step; previous x_start was predicted one step earlier.

        sampler: "ddpm", "ddim" or "dpm": see ddpm_rows, ddim_rows, dpm_rows. variance, eta (0 … 1): their arguments.
        steps: S, 1 … T; None: T for ddpm, 50 for ddim, 20 for dpm.
        noise_scale: S_noise of Karras 2022 (arXiv 2206.00364, algorithm 2), 0.5 … 2: a factor of the fresh noise where
            σ > image_size / 256, which are the noise levels of coarse shapes. Above 1 the images vary more.
        """
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("variance", variance, ("small", "large"))
        steps = min(DEFAULT_STEPS[sampler] or self.timesteps, self.timesteps) if steps is None else steps
        check_range("number of sampling steps", steps, 1, self.timesteps)
        check_range("eta", eta, 0, 1)
        check_range("noise scale", noise_scale, 0.5, 2)
        if (sampler == "ddpm" and eta) or (sampler != "ddpm" and variance != "small"):
            raise OasisError(f"{'eta' if sampler == 'ddpm' else 'variance'} is no argument of the sampler {sampler}")
        evenly_spaced = np.linspace(self.timesteps - 1, 0, steps).round().astype(int)
        times = self.even_in_log_snr(steps) if sampler == "dpm" else evenly_spaced
        rows = {"ddpm": self.ddpm_rows, "ddim": self.ddim_rows, "dpm": self.dpm_rows}[sampler]
        table = rows(times, variance if sampler == "ddpm" else eta)
        table[:, 3] *= np.where(self.sigmas[times] > self.image_size / 256, noise_scale, 1.0)
        return times, table

    def ddpm_rows(self, times, variance):
        """The steps of ancestral sampling (algorithm 2 of DDPM): x_next is drawn from q_posterior(x_start, x, t).

        variance: "small" is that of q_posterior (β̃), "large" is β. The last step adds no noise. For a subsequence of
        the timesteps, β is the variance of a single step between neighbours in it (Nichol & Dhariwal 2021, eq. 19).
        """
        alphas_cumprod, alphas_cumprod_next = self.alphas_cumprod[times], np.append(self.alphas_cumprod[times[1:]], 1.0)
        from_x_start, from_x_t, posterior_variance = posterior_coefficients(alphas_cumprod, alphas_cumprod_next)
        if variance == "large":
            posterior_variance[:-1] = (1 - alphas_cumprod / alphas_cumprod_next)[:-1]
        return np.stack([from_x_t, from_x_start, np.zeros(len(times)), np.sqrt(posterior_variance)], axis=1)

    def ddim_rows(self, times, eta):
        """The steps of DDIM (Song 2021, arXiv 2010.02502, eq. 12 and 16): eta = 0 adds no noise, eta = 1 is ddpm."""
        signal, noise, signal_next, noise_next = self.rates_along(times)
        std = eta * noise_next / noise * np.sqrt(1 - (signal / signal_next)**2)
        from_x = np.sqrt(np.maximum(noise_next**2 - std**2, 0)) / noise
        return np.stack([from_x, signal_next - from_x * signal, np.zeros(len(times)), std], axis=1)

    def dpm_rows(self, times, eta):
        """The steps of DPM-Solver++ 2M (Lu 2022, arXiv 2211.01095, algorithm 2), rows of sampler_table. The first and
        the last step have order 1, the others order 2.

        eta = 1 is the paper's SDE-DPM-Solver++ 2M. With λ = ln(signal / noise), h = λ_next - λ and k = e^(-eta·h), the
        noise of x_next is noise_next · (k · the predicted noise + √(1-k²) · fresh noise).
        """
        signal, noise, signal_next, noise_next = self.rates_along(times)
        h = np.log(signal_next[:-1] * noise[:-1] / (signal[:-1] * noise_next[:-1]))
        extrapolation = np.zeros(len(times))  # linear, from this x_start and the previous one
        extrapolation[1:-1] = h[1:] / (2 * h[:-1])
        k = np.append(np.exp(-eta * h), 0.0)  # the last step ends without noise
        from_x = noise_next / noise * k
        from_x_start = signal_next - from_x * signal
        std = noise_next * np.sqrt(1 - k**2)
        return np.stack([from_x, from_x_start * (1 + extrapolation), from_x_start * -extrapolation, std], axis=1)

    def rates_along(self, times):
        """Return (signal, noise, signal_next, noise_next), float64 (S,): the rates before and after each step."""
        signal, noise = self.signal_rates[times], self.noise_rates[times]
        return signal, noise, np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)

    def even_in_log_snr(self, steps):
        """Return S timesteps from T-1 down to 0, int (S,), with evenly spaced log-SNRs, as far as distinct integers
        allow. Above σ = 164 (at 64 pixels) x_t is only noise: one step covers that part of a schedule.
        """
        lambdas = np.log(self.signal_rates / self.noise_rates)  # half the log-SNR, as in dpm_rows
        lowest = max(lambdas[-1], -5.1 - np.log(max(self.image_size / 64, 1)))  # 5.1 = ln 164
        targets = np.linspace(lowest, lambdas[0], steps)[::-1]
        times = np.interp(-targets, -lambdas, np.arange(self.timesteps)).round().astype(int)
        for i in range(1, steps):  # near t = 0 several targets may round to one timestep
            times[i] = max(times[i], times[i - 1] + 1)
        times[-1] = self.timesteps - 1
        return np.minimum(times, self.timesteps - np.arange(steps, 0, -1))[::-1]

    def sample(self, denoise_fn, shape, seeds, sampler="ddpm", steps=None, clip=True, variance="small", eta=0.0,
               noise_scale=1.0, frames=0, jit_compile=None, on_step=None, cond=None):
        """Generate images, float32 `shape` (B, H, W, C), from noise by the steps of a sampler. With clip, in [-1, 1].

        With frames = F ≥ 2 it returns (images, trajectory): F evenly spaced x_t, noise first, float32 (F, B, H, W, C).

        seeds: B integers. The noise of image i depends on seeds[i] alone, not on the other images of the batch.
        sampler, steps, variance, eta, noise_scale: see sampler_table. clip: clip each predicted x_start to [-1, 1].
        jit_compile: compile the loop with XLA; None: only on a GPU. on_step: called without arguments in every step,
        but not under XLA. cond: a tensor (B, …) or a dict of tensors, the third argument of denoise_fn; or None.

        All steps run in one compiled loop. The last 16 loops are kept for later calls with the same arguments.
        """
        if len(seeds) != shape[0]:
            raise OasisError(f"give one seed for each image: there are {len(seeds)} seeds for {shape[0]} images")
        if frames < 0 or frames == 1:
            raise OasisError(f"frames is {frames}, but it must be 0 or at least 2: the noise and the image")
        jit_compile = use_xla() if jit_compile is None else jit_compile
        notify = on_step is not None and not jit_compile
        loop = self.sampling_loop(denoise_fn, tuple(shape), sampler, steps, clip, variance, eta, noise_scale, frames,
                                  jit_compile, notify)
        self._on_step = on_step  # a loop from the cache calls that of the latest sample()
        images, trajectory = loop(tf.constant(np.asarray(seeds, np.int64)), cond)
        return (images, trajectory) if frames else images

    def sampling_loop(self, denoise_fn, shape, sampler, steps, clip, variance, eta, noise_scale, frames, jit_compile,
                      notify):
        """A tf.function of seeds and cond that returns (images, trajectory). notify: whether to call self._on_step."""
        times, table = self.sampler_table(sampler, steps, variance, eta, noise_scale)

        def start(seeds, cond):
            return noise_of_seeds(seeds, self.timesteps, shape), tf.zeros(shape)  # no step draws it again: t < T

        def step(i, state, seeds, cond):
            x, previous = state
            t, row = tf.gather(tf.constant(times, tf.int32), i), tf.gather(tf.constant(table, tf.float32), i)
            batch_t = tf.fill([shape[0]], t)
            output = tf.cast(call_denoise_fn(denoise_fn, x, batch_t, cond), tf.float32)
            x_start = self.x_start_from_output(x, batch_t, output)
            if clip:
                x_start = tf.clip_by_value(x_start, -1.0, 1.0)
            x = row[0] * x + row[1] * x_start + row[2] * previous
            if table[:, 3].any():
                x += row[3] * noise_of_seeds(seeds, t, shape)
            return x, x_start
        return compile_loop(start, step, len(times), frames, jit_compile, (lambda: self._on_step()) if notify else None)


def call_denoise_fn(denoise_fn, x_t, t, cond):
    """Call denoise_fn(x_t, t, cond), or denoise_fn(x_t, t) without a condition, so such a function needs no cond."""
    return denoise_fn(x_t, t) if cond is None else denoise_fn(x_t, t, cond)


def extract(values, t, like):
    """values[t] of a float64 (T,) array for timesteps t (B,), as (B, 1, 1, 1) in the dtype of `like`."""
    return tf.gather(tf.constant(values, like.dtype), t)[:, None, None, None]


# --------------------------------------------------------------------------------------------------------- network

class UNet(tf.keras.Model):
    """The time-embedded attention U-Net: network(x_t, t) is the prediction, float32 (B, S, S, C) like x_t. t: int (B,).

    A port of the network of lucidrains/denoising-diffusion-pytorch in mid-2022, with 32,294,837 parameters by default.

    image_size: S, a multiple of patch_size · 2^(levels - 1), or OasisError is raised. levels: the length of dim_mults.
    dim, dim_mults: level i has dim · dim_mults[i] channels and half the resolution of level i-1; 8 divides dim.
    channels: C, 1 for grey.
    patch_size: p > 1 turns each patch of p×p pixels into channels, so the network works on an S/p grid at 1/p² of the
        cost (Hoogeboom 2023, "simple diffusion", arXiv 2301.11093).
    pixel_width: channels of one more level, at full resolution, for detail that patches lose: a multiple of 8, or 0.
    condition: what cond holds, names of oasis/conditions.py separated by commas. cond=None is the null condition.
    precision: "float32", "bfloat16" or "float16", the type of convolutions and matrix products. The parameters, the
        softmax, the statistics of norms and the output stay float32.
    seed: gives the initial parameters, equal in all TensorFlow versions. The last convolution starts at zero.
    fused: compute Blocks and attention with the faster functions of oasis/fused.py, which equal the layers below.
    """

    def __init__(self, image_size, dim=64, dim_mults=DIM_MULTS, channels=1, patch_size=1, pixel_width=0,
                 condition="", *, precision="float32", seed=0, fused=True):  # before the *: NETWORK_SETTINGS
        check_image_size(image_size, patch_size, len(dim_mults))
        super().__init__(dtype="float32", name="unet")
        self.image_size, self.dim, self.dim_mults, self.channels = image_size, dim, tuple(dim_mults), channels
        self.patch_size, self.pixel_width, self.condition = patch_size, pixel_width, condition
        policy = precision if precision == "float32" else f"mixed_{precision}"
        options = dict(dtype=tf.keras.mixed_precision.Policy(policy))
        heads = max(dim // 16, 1)  # of 32 features each; 4 at dim 64, as in lucidrains
        stem_width, bottom = dim // 3 * 2, dim * dim_mults[-1]
        widths = [stem_width, *(dim * mult for mult in dim_mults)]
        in_out = list(zip(widths, widths[1:]))

        self.time_embedding = Embedding(dim, **options)
        self.stem = layers.Conv2D(stem_width, 7, padding="same", **options)
        self.down = [Level(width_in, width, heads, "down" if i + 1 < len(dim_mults) else None, **options)
                     for i, (width_in, width) in enumerate(in_out)]
        self.middle_block1 = ResnetBlock(bottom, bottom, **options)
        self.middle_attention = Residual(Attention(bottom, heads, **options), fused_layers.attention, **options)
        self.middle_block2 = ResnetBlock(bottom, bottom, **options)
        self.up = [Level(2 * width, width_in, heads, "up", **options) for width_in, width in reversed(in_out[1:])]
        self.last_block = ResnetBlock(2 * widths[1], dim, timed=False, **options)
        self.last_conv = layers.Conv2D(channels * patch_size**2, 1, dtype="float32")
        if pixel_width:
            self.pixels_down = PixelsDown(pixel_width, stem_width, patch_size, **options)
            self.pixels_up = PixelsUp(pixel_width, channels, patch_size, **options)
        self.condition_embeddings = [Embedding(dim, **options) for _ in embedded_keys(condition)]

        self.fused = False  # the plain layers create the parameters, which the fused functions read
        smallest = patch_size * 2**(len(dim_mults) - 1)  # image_size changes no parameter: the smallest will do
        size = 1, smallest, smallest, channels
        self(tf.zeros(size), tf.zeros([1], tf.int32), null_condition(condition, size))
        initialize(self, seed, zero=("last_conv", "fold"))
        for layer in (self, *layers_inside(self)):
            layer.fused = fused

    @property
    def settings(self):
        """The arguments that determine the shape of the network, as a dict that JSON can hold."""
        return {name: getattr(self, name) for name in NETWORK_SETTINGS}

    def build(self, *_):
        self.built = True

    def call(self, x, t, cond=None):
        time = self.time_embedding(t)
        if cond is not None:
            time += embed(cond, self.condition, self.condition_embeddings)
        if has(self.condition, "neighbour"):
            x = tf.concat([x, tf.zeros_like(x) if cond is None else cond["neighbour"]], axis=-1)
        image = x
        if self.patch_size > 1:
            x = tf.nn.space_to_depth(x, self.patch_size)
        x = self.stem(x)
        if self.pixel_width:
            from_pixels, pixel_skip = self.pixels_down(image, time)
            x = x + from_pixels
        skips = []
        for level in self.down:
            x, skip = level(x, time)
            skips.append(skip)
        x = self.middle_block1(x, time)
        x = self.middle_attention(x)
        x = self.middle_block2(x, time)
        for level in self.up:
            x, _ = level(tf.concat([x, skips.pop()], axis=-1), time)
        x_and_skip = tf.concat([x, skips.pop()], axis=-1)
        x = self.last_block(x_and_skip)
        output = fused_layers.pointwise(self.last_conv, x) if self.fused else self.last_conv(x)
        output = depth_to_space(output, self.patch_size)
        if self.pixel_width:
            output += self.pixels_up(pixel_skip, tf.concat([x_and_skip, x], axis=-1), time)
        return output


NETWORK_SETTINGS = inspect.getfullargspec(UNet.__init__).args[1:]


class Composite(layers.Layer):
    """The base class of layers that contain layers. build() keeps Keras 3 from tracing them all once more."""
    fused = False

    def build(self, *_):
        self.built = True


class Embedding(Composite):
    """Embed integers n (B,) as (B, 4·dim): sin(f·n), cos(f·n) at dim/2 frequencies 1 … 1/10000, then dense layers."""

    def __init__(self, dim, **options):
        super().__init__(**options)
        self.frequencies = np.exp(-np.log(10000) * np.arange(dim // 2) / (dim // 2 - 1)).astype(np.float32)
        self.dense1 = layers.Dense(4 * dim, activation="gelu", **options)
        self.dense2 = layers.Dense(4 * dim, **options)

    def call(self, t):
        angles = tf.cast(t, tf.float32)[:, None] * self.frequencies
        return self.dense2(self.dense1(tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)))


class Level(Composite):
    """One resolution on the way down or up: two ResnetBlocks, linear attention, then a change of resolution, if any.

    call(x, time) returns (the input of the next level, the skip connection).
    """

    def __init__(self, width_in, width, heads, resample, **options):
        super().__init__(**options)
        self.block1 = ResnetBlock(width_in, width, **options)
        self.block2 = ResnetBlock(width, width, **options)
        self.attention = Residual(LinearAttention(width, heads, **options), fused_layers.linear_attention, **options)
        convolution = {"down": layers.Conv2D, "up": layers.Conv2DTranspose}.get(resample)
        self.resample = convolution and convolution(width, 4, strides=2, padding="same", **options)

    def call(self, x, time):
        x = self.attention(self.block2(self.block1(x, time), time))
        return (self.resample(x) if self.resample else x), x


class PixelsDown(Composite):
    """The full-resolution level before the U-Net: (a term for the stem's output, zero at first; PixelsUp's skip)."""

    def __init__(self, width, stem_width, patch_size, **options):
        super().__init__(**options)
        self.stem = layers.Conv2D(width, 3, padding="same", **options)
        self.block = ResnetBlock(width, width, **options)
        self.fold = layers.Conv2D(stem_width, patch_size, strides=patch_size, **options)

    def call(self, image, time):
        x = self.block(self.stem(image), time)
        return self.fold(x), x


class PixelsUp(Composite):
    """The full-resolution level after the U-Net. UNet adds its result, initially zero, to the output (B, S, S, C)."""

    def __init__(self, width, channels, patch_size, **options):
        super().__init__(**options)
        self.patch_size = patch_size
        self.unfold = layers.Conv2D(width * patch_size**2, 1, **options)
        self.block1 = ResnetBlock(2 * width, width, **options)
        self.block2 = ResnetBlock(width, width, **options)
        self.last_conv = layers.Conv2D(channels, 1, dtype="float32")

    def call(self, skip, x, time):
        x = depth_to_space(self.unfold(x), self.patch_size)
        x = self.block2(self.block1(tf.concat([skip, x], axis=-1), time), time)
        return self.last_conv(x)


class ResnetBlock(Composite):
    """Two Blocks with a skip connection around them. The time embedding scales and shifts the first one's features."""

    def __init__(self, width_in, width, timed=True, **options):
        super().__init__(**options)
        self.time = layers.Dense(2 * width, **options) if timed else None
        self.block1 = Block(width, **options)
        self.block2 = Block(width, **options)
        self.skip = layers.Conv2D(width, 1, **options) if width_in != width else None

    def call(self, x, time=None):
        scale_shift = self.time(tf.nn.silu(time)) if self.time else None
        y = self.block2(self.block1(x, scale_shift))
        return y + (self.skip(x) if self.skip else x)


class Block(Composite):
    """3×3 convolution, GroupNorm (Wu & He 2018, arXiv 1803.08494), scale and shift from the time embedding, SiLU."""
    frozen_kernel = None  # see fused.frozen

    def __init__(self, width, **options):
        super().__init__(**options)
        self.conv = layers.Conv2D(width, 3, padding="same", **options)
        self.norm = GroupNormalization(groups=fused_layers.GROUPS, epsilon=fused_layers.NORM_EPSILON, dtype="float32")

    def call(self, x, scale_shift=None):
        if self.fused:
            return fused_layers.block(self, x, scale_shift)
        x = self.norm(self.conv(x))                                         # (B, H, W, C)
        if scale_shift is not None:
            scale_shift = tf.cast(scale_shift, x.dtype)
            scale, shift = tf.unstack(rearrange(scale_shift, "b (two c) -> two b 1 1 c", two=2))
            x = x * (scale + 1) + shift
        return tf.cast(tf.nn.silu(x), self.compute_dtype)


class Residual(Composite):
    """Pre-norm residual: x + layer(norm(x)), where norm is LayerNorm over the channels (Ba 2016, arXiv 1607.06450).

    fast: a function of (layer, norm, x) equal to layer(norm(x)), or None.
    """

    def __init__(self, layer, fast=None, **options):
        super().__init__(**options)
        self.norm = layers.LayerNormalization(epsilon=fused_layers.NORM_EPSILON, **options)
        self.layer, self.fast = layer, fast

    def call(self, x):
        if self.fused and self.fast:
            return x + self.fast(self.layer, self.norm, x)
        return x + self.layer(self.norm(x))


class Attention(Composite):
    """Multi-head self-attention between all pixels of the coarsest U-Net level (Vaswani 2017, arXiv 1706.03762)."""

    def __init__(self, width, heads, head_dim=32, **options):
        super().__init__(**options)
        self.heads, self.head_dim = heads, head_dim
        self.qkv = layers.Conv2D(3 * heads * head_dim, 1, use_bias=False, **options)
        self.out = layers.Conv2D(width, 1, **options)

    def call(self, x):
        q, k, v = split_heads(self.qkv(x), self.heads)                      # (B, heads, N, d) each, N = H·W
        similarity = tf.einsum("bhnd,bhmd->bhnm", q * self.head_dim**-0.5, k)
        y = tf.einsum("bhnm,bhmd->bhnd", softmax(similarity, axis=-1), v)   # (B, heads, N, d)
        return self.out(rearrange(y, "b heads (h w) d -> b h w (heads d)", h=x.shape[1]))


class LinearAttention(Attention):
    """Attention at a cost linear in the number of pixels N = H·W (Shen 2018, "Efficient Attention", arXiv 1812.01243).

    kᵀ v is a small d×d matrix for each head, so q (kᵀ v) costs N · d² where (q kᵀ) v costs N² · d.
    """

    def __init__(self, width, heads, head_dim=32, **options):
        super().__init__(width, heads, head_dim, **options)
        self.out_norm = layers.LayerNormalization(epsilon=fused_layers.NORM_EPSILON, **options)

    def call(self, x):
        height, width = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x), self.heads)                      # (B, heads, N, d) each
        q = softmax(q, axis=-1) * self.head_dim**-0.5                       # over the features of a head
        k = softmax(k, axis=-2)                                             # over the pixels
        context = tf.einsum("bhnd,bhne->bhde", k, v / (height * width))     # (B, heads, d, d); v / N as in lucidrains
        y = tf.einsum("bhnd,bhde->bhne", q, context)                        # (B, heads, N, d)
        return self.out_norm(self.out(rearrange(y, "b heads (h w) d -> b h w (heads d)", h=height)))


def split_heads(qkv, heads):
    """Split qkv, (B, H, W, 3·heads·d), into q, k and v, (B, heads, H·W, d) each."""
    return tf.unstack(rearrange(qkv, "b h w (three heads d) -> three b heads (h w) d", three=3, heads=heads))


def softmax(x, axis):
    """Softmax, computed in float32 and returned in the dtype of x."""
    return tf.cast(tf.nn.softmax(tf.cast(x, tf.float32), axis), x.dtype)


def depth_to_space(x, patch_size):
    """(B, H, W, p·p·C) → (B, p·H, p·W, C): tf.nn.depth_to_space for every precision and for p = 1 too."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=patch_size, j=patch_size)


# ------------------------------------------------------------------------------------------------------ model files

def save_model(path, network, settings):
    """Write the parameters of a network and settings, among them network.settings and diffusion.settings, to a file."""
    modelfile.write_model(path, {name: variable.numpy() for name, variable in named_variables(network)}, settings)


def load_model(path, precision="float32"):
    """Read (network, diffusion, settings), all that generating needs, from a model file. precision: see UNet.

    Settings of the network that an older file lacks have their defaults. Raises OasisError, naming the file, if it is
    missing, damaged or not a model of this program.
    """
    parameters, settings = modelfile.read_model(path)
    try:
        modelfile.check_settings(settings, sum(array.size for array in parameters.values()))
        network = UNet(**{name: settings[name] for name in NETWORK_SETTINGS if name in settings}, precision=precision)
        diffusion = GaussianDiffusion(**{name: settings[name] for name in (*DIFFUSION_SETTINGS, "image_size")})
    except modelfile.SETTINGS_ERRORS as error:
        reason = str(error) if isinstance(error, OasisError) else " ".join(repr(error).split())[:300]
        raise OasisError(f"{path}: bad settings: {reason}. Use another file, or the code that wrote it.") from error
    assign_parameters(network, parameters, f"{path}: its parameters do not fit the network that its settings "
                                           "describe. Use another model file.")
    return network, diffusion, {**network.settings, **settings}
