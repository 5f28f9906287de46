"""Train a PyTorch peer for some minutes; tools/equal_minutes.py calls this script in an environment with PyTorch.

    python tools/peer_training.py lucidrains SLICES.npy OUT --minutes 12 30 --images 192

SLICES.npy holds uint8 (N, S, S, 1). For each of the minutes, OUT/PEER_MINUTES.npy gets images that the EMA generates
with 50 steps of DDIM, uint8 (n, S, S, 1). The minutes count from the start of the script, without the sampling.

The peers are those of tools/peers.py with dim 64. They predict the noise with a linear schedule, as --recipe original
does. The learning rate of 8e-5 and the EMA's decay of 0.995 are those of lucidrains' README. The memory format is
channels last with bfloat16 and contiguous with float32: for each type, the faster one on a CPU.
"""
import time

START = time.time()

import argparse
from pathlib import Path

import numpy as np
import peers
import torch
from diffusers import DDIMScheduler
from torch import nn

EMA_DECAY = 0.995
BATCH_SIZE = 16
SAMPLING_STEPS = 50


def batches(images, memory_format):
    """Yield batches of images, (B, C, S, S), without end. Each epoch has every image once, in a new order.

    The last batch of an epoch may be smaller. images: float32 (N, C, S, S).
    """
    while True:
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            yield images[rows].contiguous(memory_format=memory_format)


def sample(denoise, shape, device):
    """Generate images, float32 `shape` (B, C, S, S) in [-1, 1], by DDIM.

    denoise(x, t) returns the noise that it predicts in x, (B, C, S, S), at the timesteps t, int (B,).
    """
    scheduler, x = DDIMScheduler(1000), torch.randn(shape, device=device)
    scheduler.set_timesteps(SAMPLING_STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.expand(len(x)).to(device)).float(), t, x).prev_sample
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=tuple(peers.PEERS))
    parser.add_argument("slices")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[12.0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = args.precision == "bfloat16"
    memory_format = torch.channels_last if half else torch.contiguous_format
    torch.manual_seed(0)
    slices = torch.from_numpy(np.load(args.slices)).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    module, _, loss, denoise = peers.PEERS[args.peer](slices.shape[-1], 64)
    module.to(device, memory_format=memory_format)
    parameters = list(module.parameters())
    ema, step, stream = [parameter.detach().clone() for parameter in parameters], 0, batches(slices, memory_format)
    optimizer = torch.optim.Adam(parameters, lr=8e-5, betas=(0.9, 0.99))
    snapshots = {}
    for minutes in sorted(args.minutes):
        while time.time() - START < 60 * minutes:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                value = loss(next(stream))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        print(f"{args.peer}: {step * BATCH_SIZE:,} images after {minutes:g} minutes", flush=True)
        snapshots[minutes] = [tensor.clone() for tensor in ema]
    module.eval()
    for minutes, snapshot in snapshots.items():
        images = []
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
            torch._foreach_copy_(parameters, snapshot)
            for start in range(0, args.images, 32):
                shape = (min(32, args.images - start), *slices.shape[1:])
                images.append(sample(denoise, shape, device).float().cpu())
        images = ((torch.cat(images).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.save(args.out / f"{args.peer}_{minutes:g}.npy", images)


if __name__ == "__main__":
    main()
