"""Shared by the tests of the diffusion: the noise schedule of DDPM, and the optimal denoiser of Gaussian pixels.

The optimal denoiser of pixels N(MEAN, s²) has a closed form, which is affine in x.
"""
import numpy as np
import tensorflow as tf

T = 1000
BETAS = 1e-4 + (0.02 - 1e-4) * np.arange(T) / (T - 1)  # section 4 of DDPM
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
MEAN = -0.5


def gaussian_output(x, signal, noise_rate, std, objective="noise"):
    """The output of the optimal denoiser of pixels N(MEAN, std²) at x = signal · x_start + noise_rate · noise."""
    variance = (signal * std)**2 + noise_rate**2
    noise = noise_rate * (x - signal * MEAN) / variance
    x_start = MEAN + signal * std**2 * (x - signal * MEAN) / variance
    return {"noise": noise, "x_start": x_start, "v": signal * noise - noise_rate * x_start}[objective]


def gaussian_denoiser(stds, objective="noise", alphas_cumprod=ALPHAS_CUMPROD):
    """The denoiser of gaussian_output as a denoise_fn. stds: one std, or one for each image."""
    stds = tf.reshape(tf.constant(stds, tf.float32), [-1, 1, 1, 1])

    def denoise_fn(x, t):
        signal = tf.gather(tf.constant(np.sqrt(alphas_cumprod), tf.float32), t)[:, None, None, None]
        noise_rate = tf.gather(tf.constant(np.sqrt(1 - alphas_cumprod), tf.float32), t)[:, None, None, None]
        return gaussian_output(x, signal, noise_rate, stds, objective)
    return denoise_fn
