"""Train a PyTorch peer on slices for some minutes; tools/equal_minutes.py calls this in an environment with PyTorch.

    python tools/peer_training.py lucidrains SLICES.npy OUT --minutes 12 30 --images 192

SLICES.npy: uint8 (N, S, S, 1). For each of --minutes, images of the EMA, uint8 (n, S, S, 1), are written to
OUT/NAME_MINUTES.npy. The minutes count from the start of the process and exclude the sampling. The peers:

- lucidrains: denoising_diffusion_pytorch in the settings of its README
- diffusers: UNet2DModel in the shape of diffusers' unconditional example, with 64 channels instead of 128

Both train in bfloat16 with the memory format channels last, which is fastest for both on a CPU and on a GPU.
"""
import time

START = time.time()

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

EMA_DECAY = 0.995
BATCH_SIZE = 16
SAMPLING_STEPS = 50


def lucidrains(size):
    """(the network, a function of images in [0, 1] that returns the loss, a function of n that returns images)."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    network = Unet(dim=64, channels=1, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=size, timesteps=1000, sampling_timesteps=SAMPLING_STEPS)

    def sample(network, count):
        diffusion.model = network
        return diffusion.sample(batch_size=count)
    return network, diffusion, sample


def diffusers(size):
    """The same for diffusers."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    network = UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(64, 128, 256, 512),
        norm_num_groups=8, attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"))
    scheduler, sampler = DDPMScheduler(1000), DDIMScheduler(1000)

    def loss(images):
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),), device=images.device)
        noisy = scheduler.add_noise(2 * images - 1, noise, t)
        return nn.functional.mse_loss(network(noisy, t).sample, noise)

    def sample(network, count):
        x = torch.randn(count, 1, size, size, device=next(network.parameters()).device)
        sampler.set_timesteps(SAMPLING_STEPS)
        for t in sampler.timesteps:
            x = sampler.step(network(x, t).sample, t, x).prev_sample
        return (x + 1) / 2
    return network, loss, sample


def batches(images):
    """An endless stream of batches; every image once per epoch."""
    while True:
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            yield images[rows].contiguous(memory_format=torch.channels_last)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("lucidrains", "diffusers"))
    parser.add_argument("slices")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[12.0])
    parser.add_argument("--images", type=int, default=192)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    slices = torch.from_numpy(np.load(args.slices)).permute(0, 3, 1, 2).float().to(device) / 255
    network, loss, sample = globals()[args.peer](slices.shape[-1])
    network.to(device, memory_format=torch.channels_last)
    if isinstance(loss, nn.Module):
        loss.to(device)
    ema, step, stream = copy.deepcopy(network), 0, batches(slices)
    optimizer = torch.optim.Adam(network.parameters(), lr=8e-5, betas=(0.9, 0.99))
    snapshots = {}
    for minutes in args.minutes:
        while time.time() - START < 60 * minutes:
            with torch.autocast(device, torch.bfloat16):
                value = loss(next(stream))
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            with torch.no_grad():
                for average, parameter in zip(ema.parameters(), network.parameters()):
                    average.lerp_(parameter, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        print(f"{args.peer}: {step * BATCH_SIZE:,} images after {minutes:g} minutes", flush=True)
        snapshots[minutes] = copy.deepcopy(ema)
    for minutes, snapshot in snapshots.items():
        parts, missing = [], args.images
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            while missing:
                parts.append(sample(snapshot.eval(), min(32, missing)).float().cpu())
                missing -= len(parts[-1])
        images = (torch.cat(parts).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        np.save(args.out / f"{args.peer}_{minutes:g}.npy", images)


if __name__ == "__main__":
    main()
