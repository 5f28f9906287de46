"""The samplers as their papers write them, in plain numpy.

alphas_cumprod: ᾱ (T,). noise_in(x, t): the noise that the network predicts in x at timestep t. x: pure noise. noise(t):
the fresh noise that a sampler draws at t. times: the timesteps, descending.
"""
import numpy as np


def ddpm_paper(alphas_cumprod, noise_in, x, noise, times, large=False):
    """Algorithm 2 of DDPM. Over a subsequence of the timesteps: Nichol & Dhariwal 2021, eq. 19."""
    for t, before in zip(times, [*times[1:], None]):
        alpha_bar, alpha_bar_before = alphas_cumprod[t], 1.0 if before is None else alphas_cumprod[before]
        alpha = alpha_bar / alpha_bar_before
        beta = 1 - alpha
        variance = beta if large else beta * (1 - alpha_bar_before) / (1 - alpha_bar)
        z = 0 if before is None else noise(t)
        x = (x - beta / np.sqrt(1 - alpha_bar) * noise_in(x, t)) / np.sqrt(alpha) + np.sqrt(variance) * z
    return x


def ddim_paper(alphas_cumprod, noise_in, x, noise, times, eta=0.0):
    """Eq. 12 and 16 of DDIM."""
    for t, before in zip(times, [*times[1:], None]):
        alpha, alpha_before = alphas_cumprod[t], 1.0 if before is None else alphas_cumprod[before]
        sigma = eta * np.sqrt((1 - alpha_before) / (1 - alpha)) * np.sqrt(1 - alpha / alpha_before)
        epsilon = noise_in(x, t)
        x_start = (x - np.sqrt(1 - alpha) * epsilon) / np.sqrt(alpha)
        x = np.sqrt(alpha_before) * x_start + np.sqrt(1 - alpha_before - sigma**2) * epsilon + sigma * noise(t)
    return x


def dpm_paper(alphas_cumprod, noise_in, x, noise, times, sde=False):
    """Algorithm 2 of DPM-Solver++, or its SDE variant.

    The last step, to an infinite log-SNR, returns the predicted x_start.
    """
    alpha, sigma = np.sqrt(alphas_cumprod[times]), np.sqrt(1 - alphas_cumprod[times])
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
