"""Build the networks of two PyTorch repositories for a comparison of speed, and time their training and denoising.

lucidrains: denoising_diffusion_pytorch 2.1.1, Unet(dim, dim_mults=(1, 2, 4, 8)), the living relative of this network.
diffusers: UNet2DModel of diffusers 0.42.1, with the levels and widths of lucidrains and attention at the coarsest.

A training step is the loss, the gradients and Adam in bfloat16 autocast: no EMA, no gradient clip, no input.
"""
import importlib.util
import sys
import time
import types

import numpy as np
import torch

STUBS = ("torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid", "pytorch_fid.fid_score",
         "pytorch_fid.inception")


def import_lucidrains():
    """The module denoising_diffusion_pytorch. Empty modules stand in for missing ones that the timing does not use."""
    missing = [name for name in STUBS if importlib.util.find_spec(name.split(".")[0]) is None]
    stubs = {name: types.ModuleType(name) for name in missing}
    for name, stub in stubs.items():
        stub.__getattr__ = lambda attribute: stubs.get(f"torchvision.{attribute}", object)
    sys.modules.update(stubs)
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch
    for name in missing:
        del sys.modules[name]
    return denoising_diffusion_pytorch


def lucidrains(size, dim):
    """Return (module with the parameters, a function that compiles its network, loss of images, denoise(x, t))."""
    lucidrains = import_lucidrains()
    network = lucidrains.Unet(dim=dim, channels=1, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = lucidrains.GaussianDiffusion(network, image_size=size, timesteps=1000, objective="pred_noise",
                                             beta_schedule="linear")

    def use_compiled():
        diffusion.model = torch.compile(network)
    return diffusion, use_compiled, lambda x: diffusion((x + 1) / 2), lambda x, t: diffusion.model(x, t)


def diffusers(size, dim):
    """The same of diffusers."""
    from diffusers import DDPMScheduler, UNet2DModel
    network = UNet2DModel(sample_size=size, in_channels=1, out_channels=1, layers_per_block=2,
                          block_out_channels=(dim, 2 * dim, 4 * dim, 8 * dim), norm_num_groups=8, attention_head_dim=32,
                          down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                          up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"))
    scheduler, called = DDPMScheduler(1000), [network]

    def use_compiled():
        called[0] = torch.compile(network)

    def loss(x):
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        return torch.nn.functional.mse_loss(called[0](scheduler.add_noise(x, noise, t), t).sample, noise)
    return network, use_compiled, loss, lambda x, t: called[0](x, t).sample


PEERS = {"lucidrains": lucidrains, "diffusers": diffusers}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step, device, seconds):
    """Return (seconds of a call, seconds of the first call) of step(), a function without arguments.

    Two calls warm up; the first of them is the first call. Then each of 3 rounds repeats step() for about
    `seconds`. The seconds of a call are the median over the rounds of the round's mean. device: of torch.
    """
    times, count = [], 1
    for round_ in range(5):  # as run_stablehlo.time_program has it
        began = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        times.append((time.perf_counter() - began) / count)
        count = max(1, round(seconds / times[-1])) if round_ == 1 else count
    return float(np.median(times[2:])), times[0]


def time_peer(name, size, dim, batch, compiled, channels_last, device, seconds=1.0):
    """Return {train_images_per_s, denoise_images_per_s, compile_seconds, peak_bytes} of a peer with bfloat16 autocast.

    compiled: whether with torch.compile; compile_seconds are those of the first training step then.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module, use_compiled, loss, denoise = PEERS[name](size, dim)
    module.to(device=device, memory_format=memory_format)
    if compiled:
        use_compiled()
    optimizer = torch.optim.Adam(module.parameters(), 1e-4, fused=True)
    x = torch.randn(batch, 1, size, size, device=device).clamp(-1, 1).to(memory_format=memory_format)
    t = torch.full((batch,), 500, device=device)

    def train_step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            value = loss(x)
        value.backward()
        optimizer.step()

    def denoise_step():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            denoise(x, t)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training, first = seconds_of(train_step, device, seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    denoising, _ = seconds_of(denoise_step, device, seconds)
    return dict(train_images_per_s=batch / training, denoise_images_per_s=batch / denoising,
                compile_seconds=first if compiled else None, peak_bytes=peak)
