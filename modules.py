"""The diffusion maths and the network. They meet only at denoise_fn(x, t): the maths knows no network, the network no schedule.

Images are float32 (B, H, W, C) in [-1, 1]. Time t is an integer 0 … T-1; t = 0 means one step of noise. The paper is
Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (DDPM, arXiv 2006.11239); equation numbers are its own.
"""
import functools
import hashlib
import json
import math
import warnings

import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf
from einops import EinopsError, rearrange, reduce, repeat
from tensorflow.keras import layers

from common import OasisError, nearest_multiples, replacing

try:  # the one place that knows the stack: TensorFlow Addons ended with TF 2.15, later Keras has the layer itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its farewell notice
        from tensorflow_addons.layers import GroupNormalization
except ImportError:
    from tensorflow.keras.layers import GroupNormalization

OBJECTIVES = ("noise", "x_start", "v")
SCHEDULES = ("linear", "cosine", "shifted")
SAMPLERS = ("ddpm", "ddim", "dpm")
PRECISIONS = ("float32", "bfloat16", "float16")
TIMES = ("uniform", "lognormal")


# ------------------------------------------------------------------------------------------------------- diffusion

def linear_beta_schedule(timesteps):
    """The (T,) float64 variances β of the forward process: 1e-4 … 0.02 at T = 1000 (section 4 of DDPM).

    For another T they are rescaled by 1000 / T, which nearly keeps the product of all 1 - β: the last step is always
    noise. No β passes 0.999, which the rescaled end would for T ≤ 20.
    """
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=np.float64)


def cosine_beta_schedule(timesteps):
    """The (T,) float64 variances β that make ᾱ a squared cosine, none above 0.999 (Nichol & Dhariwal 2021, arXiv
    2102.09672, eq. 17): slower at both ends than the linear schedule."""
    angles = (np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2
    alphas_cumprod = np.cos(angles)**2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def shifted_beta_schedule(timesteps, image_size):
    """The (T,) float64 variances β of the linear schedule with its log-SNR shifted by 2·log(64 / image_size).

    The mean of k×k pixels has 1/k² of their noise, so a picture k times as large needs k² the noise to hide as much
    (Hoogeboom 2023, "simple diffusion", arXiv 2301.11093; Chen 2023, arXiv 2301.10972). At 64 pixels it is the linear one.
    """
    alphas_cumprod = np.cumprod(1 - linear_beta_schedule(timesteps))
    snr = alphas_cumprod / (1 - alphas_cumprod) * (64 / image_size)**2
    noise = 1 / (1 + snr)  # 1 - ᾱ
    noise_before = np.append(0.0, noise[:-1])
    return (noise - noise_before) / (1 - noise_before)


def best_noise(sampler, image_size):
    """The eta and noise_scale of GaussianDiffusion.sample that measured best, as a dict.

    With fresh noise 20 steps of dpm measure like 1000 of ddpm, without it worse. The bundled model of 256 pixels lacks variety, which
    more of it gives back (the README's results); the smaller ones have enough.
    """
    if sampler != "dpm":
        return dict(eta=0.0, noise_scale=1.0)
    return dict(eta=1.0, noise_scale=1.1 if image_size >= 256 else 1.0)


class GaussianDiffusion:
    """The forward process that turns an image into noise in T steps, and the samplers that go back.

    timesteps: T.
    objective: what denoise_fn(x_t, t) returns, all float32 (B, H, W, C): "noise" the noise ε in x_t, "x_start" the
        clean image, "v" the velocity √ᾱ ε - √(1-ᾱ) x_start (Salimans & Ho 2022, arXiv 2202.00512).
    schedule: of β, "linear", "cosine" or "shifted", which alone depends on image_size, the pixels a side.

    betas, alphas_cumprod (ᾱ) and posterior_variance (β̃) are float64 numpy arrays (T,).
    """

    def __init__(self, timesteps=1000, objective="noise", schedule="linear", image_size=64):
        if objective not in OBJECTIVES:
            raise OasisError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
        if timesteps < 1:
            raise OasisError(f"{timesteps} timesteps: a diffusion has at least 1")
        schedules = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule,
                     "shifted": lambda timesteps: shifted_beta_schedule(timesteps, image_size)}
        if schedule not in schedules:
            raise OasisError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
        self.timesteps, self.objective, self.schedule, self.image_size = timesteps, objective, schedule, image_size
        self._loops = {}
        self.betas = schedules[schedule](timesteps)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.signal_rates = np.sqrt(self.alphas_cumprod)      # x_t = signal_rate · x_start + noise_rate · noise:
        self.noise_rates = np.sqrt(1 - self.alphas_cumprod)   # their squares add up to 1

    @property
    def settings(self):
        """The arguments, but image_size, that make a diffusion like this one, as a dict that JSON can hold."""
        return dict(timesteps=self.timesteps, objective=self.objective, schedule=self.schedule)

    def q_sample(self, x_start, t, noise):
        """x_t, the image after t + 1 steps of noise, in one go: √ᾱ x_start + √(1-ᾱ) noise (eq. 4). t: int (B,)."""
        return at(self.signal_rates, t, x_start) * x_start + at(self.noise_rates, t, x_start) * noise

    def predict_x_start(self, x_t, t, noise):
        """The clean image that x_t is a noisy version of, if `noise` is the noise in it: eq. 4 solved for x_start."""
        return (x_t - at(self.noise_rates, t, x_t) * noise) / at(self.signal_rates, t, x_t)

    def q_posterior(self, x_start, x_t, t):
        """Mean (B, H, W, C) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_start), a Gaussian (eq. 6 and 7)."""
        from_x_start = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        from_x_t = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        mean = at(from_x_start, t, x_t) * x_start + at(from_x_t, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)

    def x_start_of_output(self, x_t, t, output):
        """The clean image that the network's output stands for, whatever the objective."""
        if self.objective == "noise":
            return self.predict_x_start(x_t, t, output)
        if self.objective == "v":
            return at(self.signal_rates, t, x_t) * x_t - at(self.noise_rates, t, x_t) * output
        return output

    def training_loss(self, denoise_fn, x_start, t, noise, loss="l2", max_weight=20.0):
        """The error of denoise_fn at time t, float32 (B,): the mean over pixels, "l2" (eq. 14) or "l1".

        The error of a predicted x_start is weighted by min(1/(1-ᾱ), max_weight), which makes it the error of v: plain, nearly
        all of it would come from the noisiest steps. 1/(1-ᾱ), the SNR + 1, grows to 10,000 at t = 0, where little is left to
        learn: capped, this is the min-SNR weight of Hang 2023, arXiv 2303.09556. Where a pixel is black (-1) or white (1), a
        prediction beyond that is no error: samplers hold x_start in [-1, 1], and black is half of a slice. A network whose
        output is zero scores 1.0 (l2) or √(2/π) = 0.798 (l1) with objective "noise".
        """
        x_t = self.q_sample(x_start, t, noise)
        if self.objective == "noise":
            target = noise
        elif self.objective == "v":
            target = at(self.signal_rates, t, noise) * noise - at(self.noise_rates, t, noise) * x_start
        else:
            target = x_start
        error = tf.cast(denoise_fn(x_t, t), target.dtype) - target
        weight = np.ones(self.timesteps)
        if self.objective == "x_start":
            beyond = (target <= -1) & (error < 0) | (target >= 1) & (error > 0)
            error = tf.where(beyond, tf.zeros_like(error), error)
            weight = np.minimum(self.noise_rates**-2, max_weight)
        if loss == "l2":
            return tf.reduce_mean(at(weight, t, error) * tf.square(error), axis=[1, 2, 3])
        if loss == "l1":
            return tf.reduce_mean(at(np.sqrt(weight), t, error) * tf.abs(error), axis=[1, 2, 3])
        raise OasisError(f"loss {loss!r} is not one of l2, l1")

    def training_times(self, times="uniform"):
        """How often training takes each t: float64 (T,) probabilities.

        times: "uniform" (algorithm 1 of DDPM), or "lognormal": the noise σ = √((1-ᾱ)/ᾱ) beside a signal of 1 is such that
            ln σ ~ N(-1.2, 1.2²) at 64 pixels and below (Karras 2022, arXiv 2206.00364, table 1). A picture k times as large has
            coarser shapes, which noise hides k times less: its range reaches ln k further to the noisy side.

        With the linear schedule half of all t have σ > 5, where little of a picture but its brightness can be seen.
        """
        if times not in TIMES:
            raise OasisError(f"times {times!r} is not one of {', '.join(TIMES)}")
        if times == "uniform":
            return np.full(self.timesteps, 1 / self.timesteps)
        further = np.log(max(self.image_size / 64, 1)) / 2
        log_noise = np.log(self.noise_rates / self.signal_rates)
        density = np.exp(-0.5 * ((log_noise + 1.2 - further) / (1.2 + further))**2) * np.gradient(log_noise)
        return density / density.sum()

    def sampler_table(self, sampler="ddpm", steps=None, variance="small", eta=0.0, noise_scale=1.0):
        """A sampler as a table. Returns times int (S,), falling, and float64 (S, 4) coefficients, one row a step:

            x_next = row[0] · x  +  row[1] · x_start  +  row[2] · previous x_start  +  row[3] · fresh noise

        where x_start is the clean image predicted from x, and `previous` the one predicted a step before. The last
        row ends at the clean image.

        sampler: "ddpm", ancestral sampling (algorithm 2 of DDPM), every step or a subsequence of S of them, with
            variance β̃ ("small") or β ("large") and no noise in the last step. "ddim" (Song 2021, arXiv 2010.02502,
            eq. 12): eta = 0 is deterministic, eta = 1 is ddpm. "dpm", DPM-Solver++ 2M (Lu 2022, arXiv 2211.01095,
            algorithm 2): uniform in log-SNR, second order but for the first and the last step; eta = 1 is the paper's
            SDE-DPM-Solver++ 2M. A step by h in half the log-SNR keeps the share e^(-eta·h) of the old noise and draws the rest.
        steps: S, 1 … T; None for T with ddpm, 50 with ddim, 20 with dpm.
        noise_scale: the fresh noise is multiplied by it (S_noise of Karras 2022, arXiv 2206.00364, algorithm 2) where the noise σ beside
            a signal of 1 is above image_size / 256, which is where the coarse shapes are decided. Networks err towards the mean; drawn
            with 1.0, heads are more alike than they should be.
        """
        if sampler not in SAMPLERS:
            raise OasisError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        if steps is None:
            steps = min({"ddpm": self.timesteps, "ddim": 50, "dpm": 20}[sampler], self.timesteps)
        if variance not in ("small", "large"):
            raise OasisError(f"variance {variance!r} is not one of small, large")
        if not 1 <= steps <= self.timesteps:
            raise OasisError(f"{steps} sampling steps: this model has 1 … {self.timesteps}")
        if not 0 <= eta <= 1:
            raise OasisError(f"eta {eta} is not in 0 … 1")
        if not 0.5 <= noise_scale <= 2:
            raise OasisError(f"noise scale {noise_scale} is not in 0.5 … 2")
        if sampler == "dpm":
            times = self._times_uniform_in_log_snr(steps)
        else:
            times = np.linspace(self.timesteps - 1, 0, steps).round().astype(int)

        signal, noise = self.signal_rates[times], self.noise_rates[times]
        signal_next, noise_next = np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)
        scale = np.where(noise / signal > self.image_size / 256, noise_scale, 1.0)
        table = np.zeros((steps, 4))
        if sampler == "dpm":
            h = np.log(signal_next[:-1] * noise[:-1] / (signal[:-1] * noise_next[:-1]))  # log-SNR gained, halved
            extrapolation = np.zeros(steps)  # of x_start, a straight line through this and the previous prediction
            extrapolation[1:-1] = h[1:] / (2 * h[:-1])
            kept = np.append(np.exp(-eta * h), 0.0)
            table[:, 0] = noise_next / noise * kept
            of_x_start = signal_next - table[:, 0] * signal
            table[:, 1] = of_x_start * (1 + extrapolation)
            table[:, 2] = of_x_start * -extrapolation
            table[:, 3] = noise_next * np.sqrt(1 - kept**2) * scale
            return times, table
        posterior_std = noise_next / noise * np.sqrt(1 - (signal / signal_next)**2)
        std = posterior_std * (eta if sampler == "ddim" else 1.0)
        table[:, 0] = np.sqrt(np.maximum(noise_next**2 - std**2, 0)) / noise
        table[:, 1] = signal_next - table[:, 0] * signal
        table[:, 3] = std
        if sampler == "ddpm" and variance == "large":
            table[:-1, 3] = np.sqrt(1 - (signal / signal_next)**2)[:-1]
        table[:, 3] *= scale
        return times, table

    def _times_uniform_in_log_snr(self, steps):
        """int (S,) times from T-1 to 0 whose log-SNR is as near to evenly spaced as distinct integers allow."""
        half_log_snr = np.log(self.signal_rates / self.noise_rates)
        targets = np.linspace(half_log_snr[-1], half_log_snr[0], steps)[::-1]
        times = np.interp(-targets, -half_log_snr, np.arange(self.timesteps)).round().astype(int)
        for i in range(1, steps):  # near t = 0 the schedule is coarser than the spacing asked for
            times[i] = max(times[i], times[i - 1] + 1)
        times = np.minimum(times, self.timesteps - np.arange(steps, 0, -1))
        return times[::-1]

    def sample(self, denoise_fn, shape, seeds, sampler="ddpm", steps=None, clip=True, variance="small", eta=0.0,
               noise_scale=1.0, frames=0, jit_compile=None, on_step=None):
        """Generate images from noise: float32 `shape` (B, H, W, C), with clip in [-1, 1].

        With frames = F ≥ 2 returns (images, frames): float32 (F, B, H, W, C), x_t at F evenly spaced moments, the first
        the pure noise, the last the images.

        seeds: B integers, one an image. Image i depends on seeds[i] alone, never on the batch around it.
        sampler, steps, variance, eta, noise_scale: see sampler_table. clip: hold each predicted x_start in [-1, 1].
        jit_compile: compile the loop with XLA; None: where there is a GPU (on a CPU it halves the speed).
        on_step: a function without arguments, called in every step; only without XLA.

        All steps run in one compiled loop, which is kept: a second call with the same arguments compiles nothing.
        """
        if len(seeds) != shape[0]:
            raise OasisError(f"{len(seeds)} seeds for {shape[0]} images")
        if frames < 0 or frames == 1:
            raise OasisError(f"{frames} frames: a film has at least 2, the noise and the image")
        jit_compile = xla_pays() if jit_compile is None else jit_compile
        counted = on_step is not None and not jit_compile
        key = (denoise_fn, tuple(shape), sampler, steps, clip, variance, eta, noise_scale, frames, jit_compile, counted)
        if key not in self._loops:
            self._loops[key] = self._compile_loop(*key)
        self._on_step = on_step
        loop = self._loops[key]
        images, film = loop(tf.constant(np.asarray(seeds, np.int64)))
        return (images, film) if frames else images

    def _compile_loop(self, denoise_fn, shape, sampler, steps, clip, variance, eta, noise_scale, frames, jit_compile, counted):
        times, table = self.sampler_table(sampler, steps, variance, eta, noise_scale)
        stops = np.linspace(0, len(times), max(frames, 2)).round().astype(np.int32)  # steps done at each frame

        def noise(seeds, moment):
            # One call an image: see `seeds` above.
            return tf.stack([normal_noise(shape[1:], [seed, tf.cast(moment, tf.int64)])
                             for seed in tf.unstack(seeds, shape[0])])

        def count_step():
            self._on_step()  # and return nothing: py_function would take it for a tensor

        def step(i, x, previous, seeds):
            t = tf.gather(tf.constant(times, tf.int32), i)
            row = tf.gather(tf.constant(table, tf.float32), i)
            batch_t = tf.fill([shape[0]], t)
            x_start = self.x_start_of_output(x, batch_t, tf.cast(denoise_fn(x, batch_t), tf.float32))
            if clip:
                x_start = tf.clip_by_value(x_start, -1.0, 1.0)
            x = row[0] * x + row[1] * x_start + row[2] * previous
            if table[:, 3].any():
                x += row[3] * noise(seeds, t)
            if counted:
                with tf.control_dependencies([tf.py_function(count_step, [], [])]):
                    x = tf.identity(x)
            return i + 1, tf.ensure_shape(x, shape), x_start, seeds

        @tf.function(jit_compile=jit_compile, autograph=False)
        def loop(seeds):
            x = noise(seeds, self.timesteps)  # no step has this number
            state = (tf.constant(0), x, tf.zeros(shape), seeds)
            film = tf.TensorArray(tf.float32, size=len(stops), element_shape=shape).write(0, x)

            def to_next_stop(stop, film, *state):
                state = tf.while_loop(lambda i, *_: i < tf.gather(stops, stop), step, state, parallel_iterations=1)
                return stop + 1, film.write(stop, state[1]), *state

            _, film, _, x, _, _ = tf.while_loop(lambda stop, *_: stop < len(stops), to_next_stop,
                                                (tf.constant(1), film, *state), parallel_iterations=1)
            return x, film.stack()
        return loop


def uniform_noise(shape, seed):
    """U(0, 1) noise, float32 `shape`, never 0 nor 1: a function of seed (two int64), with or without XLA the same, on any device.

    From raw bits, for tf.random.stateless_uniform and stateless_normal draw other floats under XLA (tensorflow issue 117644).
    Philox by name: "auto" picks another generator on some devices.
    """
    bits = tf.random.stateless_uniform(shape, seed, None, None, tf.uint32, alg="philox")
    return (tf.cast(tf.bitwise.right_shift(bits, 9), tf.float32) + 0.5) * 2.0**-23


def normal_noise(shape, seed):
    """N(0, 1) noise, float32 `shape`, a function of seed (two int64): with or without XLA the same to 1e-4, on any device."""
    return tf.math.ndtri(uniform_noise(shape, seed))


def at(values, t, like):
    """values[t] of a float64 (T,) array for a batch of times t (B,), as (B, 1, 1, 1) in the dtype of `like`."""
    return tf.gather(tf.constant(values, like.dtype), t)[:, None, None, None]


# --------------------------------------------------------------------------------------------------------- network

class UNet(tf.keras.Model):
    """The time-embedded attention U-Net: network(x, t) for float32 (B, S, S, C) and int (B,) gives float32 (B, S, S, C).

    A port of the network of lucidrains/denoising-diffusion-pytorch in mid-2022, with 32,294,837 weights at its defaults.

    image_size: S, a multiple of patch_size · 2^(levels - 1).
    dim, dim_mults: level i has dim · dim_mults[i] channels and half the resolution of the one above.
    channels: C, 1 for grey.
    patch_size: p > 1 folds each p×p block of pixels into channels, so that the network works on an S/p grid at 1/p² of
        the cost (Hoogeboom 2023, "simple diffusion", arXiv 2301.11093).
    pixel_width: w > 0 puts a level of w channels at full resolution around that, ResNet blocks without attention: what patches are too
        coarse for. A multiple of 8.
    precision: "float32", or "bfloat16"/"float16": convolutions and matmuls compute in it from float32 weights, while
        sums, of softmax and of the statistics of norms, and the output stay float32.
    seed: of the initial weights, which are the same on every stack. The last convolution starts at zero.
    """

    def __init__(self, image_size, dim=64, dim_mults=(1, 2, 4, 8), channels=1, patch_size=1, pixel_width=0, precision="float32", seed=0):
        check_image_size(image_size, patch_size, len(dim_mults))
        super().__init__(dtype="float32", name="unet")
        self.image_size, self.channels, self.patch_size, self.pixel_width = image_size, channels, patch_size, pixel_width
        self.dim, self.dim_mults = dim, dim_mults
        policy = precision if precision == "float32" else f"mixed_{precision}"
        options = dict(dtype=tf.keras.mixed_precision.Policy(policy))
        heads = max(dim // 16, 1)
        stem_width, bottom = dim // 3 * 2, dim * dim_mults[-1]
        widths = [stem_width, *(dim * mult for mult in dim_mults)]

        self.time_embedding = TimeEmbedding(dim, **options)
        self.stem = layers.Conv2D(stem_width, 7, padding="same", **options)
        self.down = [Level(width_in, width, heads, "down" if i + 1 < len(dim_mults) else None, **options)
                     for i, (width_in, width) in enumerate(zip(widths, widths[1:]))]
        self.middle_block1 = ResnetBlock(bottom, bottom, **options)
        self.middle_attention = Residual(Attention(bottom, heads, **options), **options)
        self.middle_block2 = ResnetBlock(bottom, bottom, **options)
        self.up = [Level(2 * width_in, width, heads, "up", **options)
                   for width_in, width in zip(widths[:1:-1], widths[-2:0:-1])]
        self.last_block = ResnetBlock(2 * widths[1], dim, timed=False, **options)
        self.last_conv = layers.Conv2D(channels * patch_size**2, 1, dtype="float32")
        self.last_conv.build([None, None, None, dim])
        if pixel_width:
            self.pixels_down = PixelsDown(pixel_width, stem_width, patch_size, **options)
            self.pixels_up = PixelsUp(pixel_width, channels, patch_size, **options)

        smallest = patch_size * 2**(len(dim_mults) - 1)  # the weights know no image size: build them on the cheapest
        self(tf.zeros([1, smallest, smallest, channels]), tf.zeros([1], tf.int32))
        initialize(self, seed)

    @property
    def settings(self):
        """The arguments that make a network like this one, as a dict that JSON can hold."""
        return dict(image_size=self.image_size, dim=self.dim, dim_mults=list(self.dim_mults), channels=self.channels,
                    patch_size=self.patch_size, pixel_width=self.pixel_width)

    def build(self, *_):
        self.built = True

    def freeze(self):
        """Make the kernels of all Blocks, seven eighths of the weights, constants of what is compiled from now on: for generating alone.

        They are cast once, and TensorFlow lays them out for its convolutions once, not in every call, but it compiles for longer: that
        pays from about 250 calls on. Where XLA compiles, which lays them out itself, nothing changes.
        """
        for layer in layers_inside(self):
            if isinstance(layer, Block) and not xla_pays():
                layer.constant = tf.cast(layer.conv.kernel, layer.compute_dtype).numpy()

    def call(self, x, t):
        image = x
        if self.patch_size > 1:
            x = tf.nn.space_to_depth(x, self.patch_size)
        time = self.time_embedding(t)
        x = self.stem(x)
        if self.pixel_width:
            of_pixels, pixel_skip = self.pixels_down(image, time)
            x = x + of_pixels
        skips = []
        for level in self.down:
            x, skip = level(x, time)
            skips.append(skip)
        x = self.middle_block1(x, time)
        x = self.middle_attention(x)
        x = self.middle_block2(x, time)
        for level in self.up:
            x, _ = level(tf.concat([x, skips.pop()], axis=-1), time)
        before = tf.concat([x, skips.pop()], axis=-1)
        x = self.last_block(before)
        # As a product of matrices: the kernel's gradient, of so few features, takes half as long as a convolution's.
        output = tf.tensordot(tf.cast(x, tf.float32), self.last_conv.kernel[0, 0], 1) + self.last_conv.bias
        output = unfold(output, self.patch_size)
        if self.pixel_width:
            output += self.pixels_up(pixel_skip, tf.concat([before, x], axis=-1), time)
        return output


def unfold(x, patch_size):
    """(B, H, W, p·p·C) → (B, p·H, p·W, C): what tf.nn.depth_to_space does, but in every precision and for p = 1 too."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=patch_size, j=patch_size)


class Composite(layers.Layer):
    """A layer made of layers. They build themselves when they are first called; Keras 3, not told so, would trace every
    level of nesting once more to find out."""

    def build(self, *_):
        self.built = True


class TimeEmbedding(Composite):
    """int t (B,) → (B, 4·dim): sines and cosines of t at dim/2 frequencies from 1 to 1/10000, then two dense layers."""

    def __init__(self, dim, **options):
        super().__init__(**options)
        self.frequencies = np.exp(-np.log(10000) * np.arange(dim // 2) / (dim // 2 - 1)).astype(np.float32)
        self.dense1 = layers.Dense(4 * dim, activation="gelu", **options)
        self.dense2 = layers.Dense(4 * dim, **options)

    def call(self, t):
        angles = tf.cast(t, tf.float32)[:, None] * self.frequencies
        return self.dense2(self.dense1(tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)))


class Level(Composite):
    """One resolution of the U-Net: two ResnetBlocks, linear attention, then a change of resolution, if any.

    call(x, time) returns (what goes on to the next level, the skip connection at this resolution).
    """

    def __init__(self, width_in, width, heads, resample, **options):
        super().__init__(**options)
        self.block1 = ResnetBlock(width_in, width, **options)
        self.block2 = ResnetBlock(width, width, **options)
        self.attention = Residual(LinearAttention(width, heads, **options), **options)
        convolution = {"down": layers.Conv2D, "up": layers.Conv2DTranspose}.get(resample)
        self.resample = convolution and convolution(width, 4, strides=2, padding="same", **options)

    def call(self, x, time):
        x = self.block2(self.block1(x, time), time)
        x = self.attention(x)
        return (self.resample(x) if self.resample else x), x


class PixelsDown(Composite):
    """The way down of the level of single pixels, which is around the one of patches: what a patch's few features cannot hold of the image.

    call(image, time): (B, S, S, C) and the time embedding give (what is added to the stem of the patches, at first zero; the skip
    connection at full resolution).
    """

    def __init__(self, width, stem_width, patch_size, **options):
        super().__init__(**options)
        self.stem = layers.Conv2D(width, 3, padding="same", **options)
        self.block = ResnetBlock(width, width, **options)
        self.fold = layers.Conv2D(stem_width, patch_size, strides=patch_size, **options)

    def call(self, image, time):
        x = self.block(self.stem(image), time)
        return self.fold(x), x


class PixelsUp(Composite):
    """The way up of the level of single pixels: a correction at each.

    call(skip, x, time): the skip connection, the features of the patches (B, S/p, S/p, F) and the time embedding give float32
    (B, S, S, C), at first zero.
    """

    def __init__(self, width, channels, patch_size, **options):
        super().__init__(**options)
        self.patch_size = patch_size
        self.unfold = layers.Conv2D(width * patch_size**2, 1, **options)
        self.block1 = ResnetBlock(2 * width, width, **options)
        self.block2 = ResnetBlock(width, width, **options)
        self.last_conv = layers.Conv2D(channels, 1, dtype="float32")

    def call(self, skip, x, time):
        x = unfold(self.unfold(x), self.patch_size)
        x = self.block2(self.block1(tf.concat([skip, x], axis=-1), time), time)
        return self.last_conv(tf.cast(x, tf.float32))


class ResnetBlock(Composite):
    """Two Blocks and a skip around them; the first is scaled and shifted by a function of time."""

    def __init__(self, width_in, width, timed=True, **options):
        super().__init__(**options)
        self.time = layers.Dense(2 * width, **options) if timed else None
        self.block1 = Block(width_in, width, **options)
        self.block2 = Block(width, width, **options)
        self.skip = layers.Conv2D(width, 1, **options) if width_in != width else None

    def call(self, x, time=None):
        scale_shift = self.time(tf.nn.silu(time)) if self.time else None
        y = self.block2(self.block1(x, scale_shift))
        return y + (self.skip(x) if self.skip else x)


class Block(Composite):
    """3×3 convolution → GroupNorm → scale and shift → SiLU.

    The convolution leaves its bias to the norm, which is affine in x as it is: a pass over the picture less, forwards and back.
    """

    def __init__(self, width_in, width, **options):
        super().__init__(**options)
        self.conv = layers.Conv2D(width, 3, padding="same", **options)
        self.conv.build([None, None, None, width_in])
        self.norm = GroupNormSilu(groups=8, epsilon=1e-5, dtype="float32", autocast=False)
        self.constant = None  # the kernel's value, see UNet.freeze

    def call(self, x, scale_shift=None):
        kernel = self.conv.kernel if self.constant is None else tf.constant(self.constant)
        x = tf.nn.conv2d(x, tf.cast(kernel, x.dtype), strides=1, padding="SAME")
        return self.norm(x, scale_shift, tf.cast(self.conv.bias, tf.float32))


class GroupNormSilu(GroupNormalization):
    """GroupNormalization (Wu & He 2018, arXiv 1803.08494) of x + bias, then times scale + 1, plus shift, then SiLU, in as few
    passes over x as can be.

    The bias, normalising, gamma and beta, scale and shift are each affine in x, so they are multiplied out on (B, C) numbers
    first. Statistics are float32 whatever x is; the result has the dtype of x. scale_shift: (B, 2·C) or None; bias: (C,) or 0.
    """

    def call(self, x, scale_shift=None, bias=0.0):
        time = (0.0, 0.0) if scale_shift is None else tf.split(tf.cast(scale_shift, tf.float32), 2, axis=-1)
        return affine_silu(x, self.scale_and_shift, self.gamma, self.beta, bias, *time)

    def scale_and_shift(self, moments, gamma, beta, bias, time_scale, time_shift):
        """float32 (B, C) each, from the channel_moments of x: all that happens to x before SiLU is x · scale + shift."""
        mean, mean_square = tf.unstack(moments)
        channels = mean.shape[-1]
        moments = tf.stack([mean + bias, mean_square + bias * (2 * mean + bias)])
        mean, mean_square = tf.unstack(reduce(moments, "two b (g c) -> two b g", "mean", g=self.groups))
        inverse_std = tf.math.rsqrt(tf.nn.relu(mean_square - tf.square(mean)) + self.epsilon)
        mean, inverse_std = tf.unstack(repeat(tf.stack([mean, inverse_std]), "two b g -> two b (g c)", c=channels // self.groups))
        scale = gamma * inverse_std
        shift = beta + (bias - mean) * scale
        return scale * (time_scale + 1), shift * (time_scale + 1) + time_shift


def affine_silu(x, scale_and_shift, *parameters):
    """SiLU(x · scale + shift) of (B, H, W, C), in its dtype, where scale, shift = scale_and_shift(channel_moments(x), *parameters).

    Its gradient keeps nothing of that size but x, and takes three compiled passes over it: TensorFlow's operations, each a pass of its
    own, would take about thirty.
    """
    @tf.custom_gradient
    def forwards(x, *parameters):
        with tf.GradientTape() as tape:
            moments = channel_moments(x)
            tape.watch([moments, *parameters])
            scale, shift = scale_and_shift(moments, *parameters)

        def backwards(upstream):
            to_z = gradient_to_z(upstream, x, scale, shift)
            to_shift, to_scale = pixel_sums(to_z, x)
            to_moments, *to_parameters = tape.gradient([scale, shift], [moments, *parameters], [to_scale, to_shift])
            return gradient_to_x(to_z, x, scale, to_moments), *to_parameters
        z = affine(x, scale, shift)
        # Not tf.nn.silu: behind a compiled pass, whose shape it does not know, TensorFlow would not make one operation of that.
        return z * tf.sigmoid(z), backwards
    return forwards(x, *map(tf.convert_to_tensor, parameters))


def one_pass(function):
    """A chain of operations as one pass over memory: where a graph calls it XLA compiles it, on a CPU too."""
    compiled = tf.function(function, jit_compile=True, autograph=False)

    @functools.wraps(function)
    def call(*tensors):
        return (function if tf.executing_eagerly() else compiled)(*tensors)
    return call


@one_pass
def affine(x, scale, shift):
    """x · scale + shift of (B, H, W, C), in its dtype; scale and shift: float32 (B, C)."""
    return tf.cast(tf.cast(x, tf.float32) * scale[:, None, None] + shift[:, None, None], x.dtype)


@one_pass
def gradient_to_z(upstream, x, scale, shift):
    """upstream times the derivative of z · σ(z), which is σ(z) (1 + z (1 - σ(z))), at z = x · scale + shift."""
    upstream, wide = tf.cast(upstream, tf.float32), tf.cast(x, tf.float32)
    z = wide * scale[:, None, None] + shift[:, None, None]
    sigmoid = tf.sigmoid(z)
    return tf.cast(upstream * sigmoid * (1 + z * (1 - sigmoid)), x.dtype)


@one_pass
def gradient_to_x(to_z, x, scale, to_moments):
    """What z = x · scale + shift brings, and what the moments do: their gradients to x are 1/HW and 2x/HW."""
    to_z, wide = tf.cast(to_z, tf.float32), tf.cast(x, tf.float32)
    to_mean, to_mean_square = tf.unstack(to_moments[:, :, None, None] / float(x.shape[1] * x.shape[2]))
    return tf.cast(to_z * scale[:, None, None] + 2 * to_mean_square * wide + to_mean, x.dtype)


def channel_moments(x):
    """The means of x and of x² over the pixels of (B, H, W, C): float32 (2, B, C)."""
    return tf.stack(pixel_sums(x, x)) / float(x.shape[1] * x.shape[2])


def pixel_sums(y, x):
    """The sums of y and of y · x over the pixels of (B, H, W, C): float32 (B, C) each."""
    rows = (rearrange(sums, "b h (k c) -> b (h k) c", c=x.shape[-1]) for sums in sums_of_rows(y, x))
    return [tf.reduce_sum(sums, axis=1) for sums in rows]


@one_pass
def sums_of_rows(y, x):
    """The same sums of every k-th pixel of a row, float32 (B, H, k·C) each, in one pass: XLA is at its best with 512 sums side by side."""
    every = math.gcd(x.shape[2], max(512 // x.shape[3], 1))
    y, x = (rearrange(tf.cast(part, tf.float32), "b h (w k) c -> b h w (k c)", k=every) for part in (y, x))
    return tf.reduce_sum(y, axis=2), tf.reduce_sum(y * x, axis=2)


class LayerNorm(layers.Layer):
    """γ (x - mean)/√(variance + 1e-5) + β over the channels of each pixel (Ba 2016, arXiv 1607.06450), beside a linear map.

    All but the division by the deviation is linear in x, so a norm before a matrix goes into that matrix, and one behind it finds its
    input centred: half of the passes over x remain.
    """

    def build(self, shape):
        self.gamma = self.add_weight(name="gamma", shape=[shape[-1]], initializer="ones")
        self.beta = self.add_weight(name="beta", shape=[shape[-1]], initializer="zeros")

    def into(self, kernel):
        """(kernel, bias) such that divide_by_deviation(x) @ kernel + bias is norm(x) @ the kernel given: float32 (C, F) and (F,)."""
        gamma, beta, kernel = (tf.cast(weight, tf.float32) for weight in (self.gamma, self.beta, kernel))
        return centred(gamma[:, None] * kernel, axis=0), tf.linalg.matvec(kernel, beta, transpose_a=True)

    def call(self, x):
        """x: (B, H, W, C), with mean zero over C already."""
        return norm_of_centred(x, tf.cast(self.gamma, tf.float32), tf.cast(self.beta, tf.float32))


def centred(x, axis):
    """x without its mean over that axis."""
    return x - tf.reduce_mean(x, axis, keepdims=True)


def divide_by_deviation(x):
    """y = x/√(variance + 1e-5), the variance being that over the channels of (B, H, W, C), in the dtype of x.

    The gradient is (g - (y - mean(y)) · mean(g · y)) / √(variance + 1e-5) for g upstream.
    """
    @tf.custom_gradient
    def forwards(x):
        y, scale, centre = quotient(x)
        return y, lambda upstream: gradient_of_quotient(upstream, y, scale, centre)
    return forwards(x)


def norm_of_centred(x, gamma, beta):
    """gamma · x/√(variance + 1e-5) + beta, in the dtype of x, (B, H, W, C) with mean zero over the channels; gamma, beta: float32 (C,)."""
    @tf.custom_gradient
    def forwards(x, gamma, beta):
        z, scale = affine_quotient(x, gamma, beta)

        def backwards(upstream):
            to_x, y = gradient_of_affine_quotient(upstream, x, scale, gamma)
            to_beta, to_gamma = (tf.reduce_sum(sums, axis=0) for sums in pixel_sums(upstream, y))
            return to_x, to_gamma, to_beta
        return z, backwards
    return forwards(x, gamma, beta)


@one_pass
def quotient(x):
    """y as above, then its scale 1/√(variance + 1e-5) and its mean, float32 (B, H, W, 1) each.

    In float32: the black pixels are all alike, so what one rounding does to their scale does not average out.
    """
    wide = tf.cast(x, tf.float32)
    mean = channel_mean(wide)
    scale = tf.math.rsqrt(channel_mean(tf.square(wide - mean)) + 1e-5)
    return tf.cast(wide * scale, x.dtype), scale, mean * scale


@one_pass
def gradient_of_quotient(upstream, y, scale, centre):
    """What the scaling of y, whose mean is `centre`, passes on, less what the deviation takes back."""
    upstream, y_wide = tf.cast(upstream, tf.float32), tf.cast(y, tf.float32)
    return tf.cast((upstream - (y_wide - centre) * channel_mean(upstream * y_wide)) * scale, y.dtype)


@one_pass
def affine_quotient(x, gamma, beta):
    """The norm of a centred x and its scale, float32 (B, H, W, 1)."""
    wide = tf.cast(x, tf.float32)
    scale = tf.math.rsqrt(channel_mean(tf.square(wide)) + 1e-5)
    return tf.cast(wide * scale * gamma + beta, x.dtype), scale


@one_pass
def gradient_of_affine_quotient(upstream, x, scale, gamma):
    """The gradient to a centred x, and y = x · scale."""
    upstream, y = tf.cast(upstream, tf.float32) * gamma, tf.cast(x, tf.float32) * scale
    return tf.cast((upstream - y * channel_mean(upstream * y)) * scale, x.dtype), tf.cast(y, x.dtype)


def channel_mean(x):
    """The mean over the channels of (B, H, W, C): (B, H, W, 1). As a product, for XLA is slow on a CPU to add up so short an axis."""
    channels = x.shape[-1]
    return tf.tensordot(x, tf.fill([channels, 1], 1 / channels), 1)


class Residual(Composite):
    """x + layer(norm(x)), where the layer, which begins with a matrix, takes the norm into that."""

    def __init__(self, layer, **options):
        super().__init__(**options)
        self.norm = LayerNorm(**options)
        self.layer = layer

    def build(self, shape):
        self.norm.build(shape)
        super().build()

    def call(self, x):
        return x + self.layer(divide_by_deviation(x), norm=self.norm)


class LinearAttention(Composite):
    """Attention at a cost linear in the number of pixels N (Shen 2018, "Efficient Attention", arXiv 1812.01243).

    q is a softmax over the features of a head, k a softmax over the pixels; (kᵀ v) is a small matrix, so q (kᵀ v) costs
    N · d² a head where (q kᵀ) v costs N² · d. What is linear happens to the small matrix, not to N pixels: v is x times a kernel, so
    kᵀ v is (kᵀ x) times it, and the last projection, both biases and the centring of the last norm go the same way. A softmax adds
    up to 1, so what is added to v comes out at the end, and a bias of k changes nothing.
    """

    def __init__(self, width, heads, head_dim=32, **options):
        super().__init__(**options)
        self.heads, self.head_dim = heads, head_dim
        self.qkv = layers.Conv2D(3 * heads * head_dim, 1, use_bias=False, **options)
        self.qkv.build([None, None, None, width])
        self.out = layers.Conv2D(width, 1, **options)
        self.out.build([None, None, None, heads * head_dim])
        self.out_norm = LayerNorm(**options)
        self.same_head = np.kron(np.eye(heads), np.ones([head_dim, head_dim])).astype(np.float32)

    def call(self, x, norm):
        height, width = x.shape[1:3]
        pixels = rearrange(x, "b h w c -> b (h w) c")
        kernels = tf.split(self.qkv.kernel[0, 0], 3, axis=-1)
        (q_kernel, q_bias), (k_kernel, _), (v_kernel, v_bias) = (norm.into(kernel) for kernel in kernels)
        # A 1×1 convolution, for TensorFlow adds its bias in the same pass.
        q = tf.nn.conv2d(x, tf.cast(q_kernel, x.dtype)[None, None], strides=1, padding="SAME")
        q = tf.nn.bias_add(q, tf.cast(q_bias, x.dtype))
        q = softmax(rearrange(q, "b h w (heads d) -> b (h w) heads d", heads=self.heads))
        q = rearrange(q, "b n heads d -> b n (heads d)")
        k = tf.matmul(tf.cast(k_kernel, x.dtype)[None], pixels, transpose_a=True, transpose_b=True)
        k = softmax(k)  # (B, features, N): over the pixels
        context = tf.matmul(k, pixels)
        # Every head's k with every head's v, then the mask: a few percent more arithmetic and no transposed copies.
        context = tf.matmul(tf.cast(context, tf.float32), v_kernel) + v_bias
        context = context * (self.same_head / (float(height * width) * self.head_dim**0.5))
        context = tf.matmul(context, tf.cast(self.out.kernel[0, 0], tf.float32)) + tf.cast(self.out.bias, tf.float32) / self.heads
        y = tf.matmul(q, tf.cast(centred(context, axis=-1), x.dtype))
        return self.out_norm(rearrange(y, "b (h w) c -> b h w c", h=height))


class Attention(Composite):
    """Full multi-head attention between all pixels (Vaswani 2017, arXiv 1706.03762), for the coarsest level."""

    def __init__(self, width, heads, head_dim=32, **options):
        super().__init__(**options)
        self.heads, self.head_dim = heads, head_dim
        self.qkv = layers.Conv2D(3 * heads * head_dim, 1, use_bias=False, **options)
        self.qkv.build([None, None, None, width])
        self.out = layers.Conv2D(width, 1, **options)

    def call(self, x, norm):
        kernel, bias = (tf.cast(part, x.dtype) for part in norm.into(self.qkv.kernel[0, 0]))
        qkv = tf.tensordot(x, kernel, 1) + bias
        qkv = rearrange(qkv, "b h w (three heads d) -> three b heads (h w) d", three=3, heads=self.heads)
        q, k, v = tf.unstack(qkv)
        similarity = tf.matmul(q * self.head_dim**-0.5, k, transpose_b=True)
        y = tf.matmul(softmax(similarity), v)
        return self.out(rearrange(y, "b heads (h w) d -> b h w (heads d)", h=x.shape[1]))


@tf.custom_gradient
def softmax(x):
    """The softmax over the last axis, in the dtype of x; TensorFlow's kernels compute in float32 inside, but for float16."""
    y = tf.cast(tf.nn.softmax(tf.cast(x, tf.float32) if x.dtype == tf.float16 else x), x.dtype)
    return y, lambda upstream: gradient_of_softmax(upstream, y)


@one_pass
def gradient_of_softmax(upstream, y):
    """y · (upstream - sum(upstream · y)), the sum being that over the last axis."""
    upstream, wide = tf.cast(upstream, tf.float32), tf.cast(y, tf.float32)
    return tf.cast(wide * (upstream - tf.reduce_sum(upstream * wide, axis=-1, keepdims=True)), y.dtype)


def check_image_size(image_size, patch_size, levels):
    """Raises OasisError, naming the nearest sizes that work, unless the patches and the levels divide the image size."""
    unit = patch_size * 2**(levels - 1)
    if image_size % unit or image_size < unit:
        nearest = nearest_multiples(image_size, unit)
        raise OasisError(f"image size {image_size}: patch size {patch_size} and {levels} levels need a multiple of {unit}; "
                         f"the nearest {'is' if len(nearest) == 1 else 'are'} {' and '.join(map(str, nearest))}")


def children(layer):
    """[(name, layer)] of the layers that are attributes of a layer, such as "stem", or in a list there, such as "down.0"."""
    found = []
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            found += [(f"{name}.{i}", child) for i, child in enumerate(value)] if isinstance(value, (list, tuple)) else [(name, value)]
    return [(name, child) for name, child in found if isinstance(child, layers.Layer)]


def layers_inside(layer):
    """All layers inside a layer, at any depth."""
    return [found for _, child in children(layer) for found in (child, *layers_inside(child))]


def named_variables(layer, prefix=""):
    """[(name, variable)] of a layer and all layers inside it, such as "down.0.block1.block1.conv.kernel".

    The names come from the attributes above, so they are the same on every stack and never repeat.
    """
    inside = [pair for name, child in children(layer) for pair in named_variables(child, f"{prefix}{name}.")]
    return inside or [(prefix + variable.name.split("/")[-1].split(":")[0], variable) for variable in layer.weights]


def initialize(network, seed):
    """Glorot-uniform kernels (Glorot & Bengio 2010), a function of (seed, place) alone; the last convolution and what pixels add zero."""
    for index, (name, variable) in enumerate(named_variables(network)):
        if name.split(".")[-2] in ("last_conv", "fold"):
            variable.assign(tf.zeros(variable.shape))
        elif name.endswith("kernel"):
            area = np.prod(variable.shape[:-2])
            limit = np.sqrt(6 / (area * (variable.shape[-2] + variable.shape[-1])))
            variable.assign(tf.random.stateless_uniform(variable.shape, [seed, index], -limit, limit, alg="philox"))


# ------------------------------------------------------------------------------------------------------ model files

FORMAT = "oasis-brain-slice-diffusion"
NETWORK_SETTINGS = ("image_size", "dim", "dim_mults", "channels", "patch_size", "pixel_width")
DIFFUSION_SETTINGS = ("timesteps", "objective", "schedule", "image_size")  # the image size is the network's
MAX_IMAGE_SIZE = 4096     # far above any use, so that a wrong number is refused before it fills the memory
MAX_TIMESTEPS = 100_000


def save_model(path, network, settings, dtype=np.float32):
    """Write the weights and the settings as one safetensors file, whole or not at all.

    settings: a dict that JSON can hold, with at least network.settings and diffusion.settings in it; it travels in the
    file's metadata. dtype: of the weights in the file, float32 or float16.
    """
    weights = {name: variable.numpy().astype(dtype) for name, variable in named_variables(network)}
    settings = json.dumps(settings)
    metadata = {"format": FORMAT, "settings": settings, "sha256": model_digest(weights, settings)}
    with replacing(path) as temporary:
        temporary.write_bytes(in_order(safetensors.numpy.save(weights, metadata)))


def in_order(file):
    """The bytes of a safetensors file with its metadata sorted: their order is random, and two equal models would differ."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the weights stay aligned
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(file)[8 + length:]])


def load_model(path, precision="float32"):
    """(network, diffusion, settings) of a model file: all that it takes to generate images.

    precision: what the network computes in, see UNet. Raises OasisError, naming the file, where it is missing, damaged
    or not a model of this program.
    """
    weights, settings = read_model(path)
    try:
        check_model_settings(settings, sum(array.size for array in weights.values()))
        network = UNet(**{name: settings[name] for name in NETWORK_SETTINGS}, precision=precision)
        diffusion = GaussianDiffusion(**{name: settings[name] for name in DIFFUSION_SETTINGS})
    except (KeyError, TypeError, ValueError, ArithmeticError, OasisError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise OasisError(f"{path}: its settings do not make a network ({reason}). Take another model file.") from error
    assign_weights(network, weights, f"{path}: its weights are not those of the network that its settings describe. "
                                     "Take another model file.")
    return network, diffusion, settings


def assign_weights(network, weights, complaint):
    """Give a network the weights {name: array}; raises OasisError(complaint), and changes nothing, where a name or shape differs."""
    variables = dict(named_variables(network))
    if {name: array.shape for name, array in weights.items()} != {name: tuple(v.shape) for name, v in variables.items()}:
        raise OasisError(complaint)
    for name, variable in variables.items():
        variable.assign(weights[name].astype(np.float32))


def start_from_model(network, path, objective):
    """Give a network the weights of a model file, made at the same image size or a smaller one, with patches as large or smaller.

    A network with patches r times as large a side starts as the smaller one applied to the means of r×r pixels, repeated
    over them: the brains are there, their detail is not. With the schedule "shifted" those means are just as noisy at
    every t as the smaller model's pixels were. A level of single pixels of another width starts anew, and adds nothing at first.
    Raises OasisError where the two networks differ in anything else, or the model predicts something else than `objective`.
    """
    weights, settings = read_model(path)
    if settings.get("objective") != objective:
        raise OasisError(f"{path}: predicts {settings.get('objective')}, so it cannot be the start of a model with --objective {objective}")
    try:
        check_model_settings(settings, sum(array.size for array in weights.values()))
        ratio = max(network.patch_size // settings["patch_size"], 1)
        patch = dict(i=settings["patch_size"], j=settings["patch_size"], p=ratio, q=ratio)
        weights["stem.kernel"] = repeat(weights["stem.kernel"] / ratio**2, "h w (i j c) d -> h w (i p j q c) d", **patch)
        weights["last_conv.kernel"] = repeat(weights["last_conv.kernel"], "h w d (i j c) -> h w d (i p j q c)", **patch)
        weights["last_conv.bias"] = repeat(weights["last_conv.bias"], "(i j c) -> (i p j q c)", **patch)
        pixels = {name: variable.numpy() for name, variable in named_variables(network) if name.startswith("pixels")}
        if settings["pixel_width"] != network.pixel_width:
            weights = {name: array for name, array in weights.items() if not name.startswith("pixels")}
        assign_weights(network, {**pixels, **weights}, "its weights have other shapes")
    except (KeyError, TypeError, ValueError, ArithmeticError, EinopsError, OasisError) as error:
        found = {name: settings.get(name) for name in NETWORK_SETTINGS}
        raise OasisError(f"{path}: a network of {found} cannot be the start of one of {network.settings}: only the patch size and "
                         "the image size may differ, by a whole factor, and the pixel width") from error


def check_model_settings(settings, weights):
    """Raise OasisError unless the settings of a model file are of the right kind and need no more weights than it has.

    Otherwise a network of any size would be made only to find that the file is another's, or the memory too small.
    """
    integers = [*(settings[name] for name in ("image_size", "dim", "channels", "patch_size")), *settings["dim_mults"]]
    pixel_width = settings["pixel_width"]
    if not all(type(value) is int and 1 <= value <= MAX_IMAGE_SIZE for value in [*integers, pixel_width or 1]):
        raise OasisError(f"a number in them is not an integer in 1 … {MAX_IMAGE_SIZE}")
    timesteps = settings["timesteps"]
    if type(timesteps) is not int or timesteps > MAX_TIMESTEPS or type(settings.get("images", 0)) is not int:
        raise OasisError(f"timesteps or images is not an integer, or timesteps is above {MAX_TIMESTEPS}")
    dim, mults = settings["dim"], settings["dim_mults"]
    least = (dim * dim * 16, 9 * (dim * max(mults))**2, 9 * pixel_width**2,
             dim * max(settings["channels"], pixel_width) * settings["patch_size"]**2)
    if max(*least, len(mults)) > weights:  # of the time embedding, the widest 3×3 convolutions, the last one or the unfolding
        raise OasisError("they are those of a larger network")


def read_model(path):
    """({name: array}, settings) of a model file; raises OasisError where it is missing, damaged or foreign."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise OasisError(f"{path}: there is no such model file") from None
    except Exception as error:  # safetensors raises its own class, OSError or ValueError, by what is damaged
        raise OasisError(f"{path}: not a readable safetensors file ({error}). Take another copy of it.") from error
    if metadata.get("format") != FORMAT:
        raise OasisError(f"{path}: a safetensors file, but not a model that train.py wrote")
    if metadata.get("sha256") != model_digest(weights, metadata.get("settings", "")):
        raise OasisError(f"{path}: damaged, it does not match its checksum. Take another copy of it.")
    try:
        settings = dict(json.loads(metadata["settings"]))
        return weights, {"schedule": "linear", "pixel_width": 0, **settings}  # the only one before there was a choice
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OasisError(f"{path}: damaged, its settings cannot be read ({error}). Take another copy of it.") from error


def model_digest(weights, settings):
    """The SHA-256 of the settings, as text, and of names, types, shapes and bytes of {name: array}."""
    digest = hashlib.sha256(settings.encode())
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- devices

def xla_pays():
    """Whether to compile with XLA: on a GPU. On the CPUs measured it halves the speed."""
    return bool(tf.config.get_visible_devices("GPU"))


def best_precision():
    """The fastest precision of this machine that trains safely.

    On a GPU bfloat16 from compute capability 8 (Ampere), float16 on 7.x (Volta, Turing), which have fast units for
    them; on a CPU bfloat16 where the instruction set has it; else float32.
    """
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        capability = min(tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus)
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(file.read().split()) else "float32"
    except OSError:
        return "float32"
