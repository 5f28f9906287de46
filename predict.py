"""Generate brain slices with a trained model: a picture, and a GIF of it emerging from noise.

    python predict.py                              one slice, 1000 steps, from the newest run or a bundled model
    python predict.py --sampler dpm                20 steps instead of 1000
    python predict.py --number-of-images 16        sixteen, and a grid of them
    python predict.py --number-of-images 1000 --sampler dpm --samples samples.npy      for metrics
"""
import json
import sys
from pathlib import Path

import common

common.quiet_tensorflow()  # before anything imports it

import imageio.v3 as imageio
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import distribute
import modules
from common import OasisError, auto_or, flags_from_constants, image_grid, integer, make_folder, number, replacing, run_script, write_png
from dataset import to_uint8

MODEL = ""                    # a run's folder, a model file or a bundled model's name; else the newest run, else oasis64
CKPT_PATH = "./checkpoint"    # the folder that holds the runs
GIF_PATH = "./gif/"           # the folder that pictures and GIFs are written to
NUMBER_OF_IMAGES = 1          # how many to generate
SEED = 0                      # of the first image; the next one has the next seed
SAMPLER = "ddpm"              # ddpm as in the paper; ddim and dpm need far fewer steps
STEPS = 0                     # sampling steps; 0 takes all for ddpm, 50 for ddim, 20 for dpm
ETA = "auto"                  # noise that ddim and dpm draw anew in every step: 0 none, 1 as much as ddpm; auto takes 1 for dpm, 0 for ddim
NOISE_SCALE = "auto"          # multiplies the noise drawn while coarse shapes are decided; auto takes 1.1 for dpm from 256 pixels on, else 1
VARIANCE = "small"            # of ddpm: small is the posterior's, large is beta
FRAMES = 60                   # of the GIF; 0 writes none
BATCH_SIZE = 16               # images generated at a time
PRECISION = "auto"            # of the arithmetic; auto takes the fastest that is safe on this machine
DEVICES = "auto"              # auto takes all GPUs, else the CPU; or cpu, a number of GPUs, a list: GPU:0,GPU:2 or CPU:0,CPU:1
SAMPLES = ""                  # write the images there instead: NAME.npy, uint8 (N, S, S, 1), or a folder of PNGs

FLAG_TYPES = {
    "SEED": integer(-2**63), "SAMPLER": modules.SAMPLERS, "STEPS": integer(0), "ETA": auto_or(number(0, 1)),
    "NOISE_SCALE": auto_or(number(0.5, 2)), "VARIANCE": ("small", "large"), "FRAMES": integer(0, 10_000),
    "NUMBER_OF_IMAGES": integer(1, 10**6), "BATCH_SIZE": integer(1, 2**16),
    "PRECISION": ("auto", *modules.PRECISIONS), "DEVICES": distribute.devices,
}
BUNDLED = Path(__file__).resolve().parent / "checkpoint"
RUN_SETTINGS = ("image_size", "dim", "patch_size", "pixel_width", "objective", "timesteps", "loss", "learning_rate", "batch_size", "seed")
FREEZE_FROM = 250     # calls of the network, from which on UNet.freeze pays
FRAME_MS = 60
LAST_FRAME_MS = 3000


def time_of(path):
    """When the file was last written; 0 where it has just gone, as when its run is renamed by a --restart."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def find_model(model, ckpt_path):
    """(name, file) of the model meant by --model; without one the newest run's, else the bundled oasis64."""
    if model:
        places = [Path(model), Path(model) / "model.safetensors", Path(ckpt_path) / model / "model.safetensors",
                  BUNDLED / f"{model}.safetensors"]
        found = [place for place in places if place.is_file()]
        if not found:
            bundled = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.safetensors"))) or "none"
            raise OasisError(f"{model}: no model there. Name a run's folder, a .safetensors file or a bundled model ({bundled}).")
    else:
        runs = sorted(Path(ckpt_path).glob("*/model.safetensors"), key=time_of)
        found = [*runs[::-1], *BUNDLED.glob("oasis64.safetensors")]
        if not found:
            raise OasisError(f"{Path(ckpt_path).absolute()}: no trained model there. Run python train.py first, "
                             "or name a model file with --model.")
    name = found[0].parent.name if found[0].name == "model.safetensors" else found[0].stem
    return name, found[0]


def check_run(file, settings):
    """Warn where a run's model file has other settings than the run: somebody has put another run's model there."""
    try:
        run = json.loads((file.parent / "settings.json").read_text(encoding="utf-8"))
        other = [name for name in RUN_SETTINGS if name in run and name in settings and run[name] != settings[name]]
    except (OSError, ValueError, TypeError, RecursionError):  # a copied model has none
        return
    if other:
        was = ", ".join(f"{name} {settings[name]}, not {run[name]}" for name in other)
        print(f"warning: {file.absolute()} is not a model of the run in its folder: it has {was}", file=sys.stderr)


def noise_options(flags, image_size):
    """The numbers that --eta and --noise-scale stand for with that --sampler, by their names in GaussianDiffusion.sample."""
    best = modules.best_noise(flags.sampler, image_size)
    return {name: best[name] if getattr(flags, name) == "auto" else getattr(flags, name) for name in best}


def noise_label(sampler, image_size, noise):
    """What of noise_options auto would not have taken, as in ", eta 0": the end of a label."""
    return "".join(f", {name.replace('_', ' ')} {noise[name]:g}" for name, best in modules.best_noise(sampler, image_size).items()
                   if noise[name] != best)


def generate(network, diffusion, seeds, sampler="dpm", steps=None, batch_size=16, frames=0, **options):
    """Yield (seeds, images uint8 (B, S, S, 1), film uint8 (frames, B, S, S, 1) or None), a batch at a time.

    seeds: one int64 an image; the image depends on it alone. The rest is as in GaussianDiffusion.sample. Where there is much to do
    the network is frozen first, see UNet.freeze.
    """
    if max(seeds) >= 2**63:
        raise OasisError(f"the seed of the last image, {max(seeds)}, does not fit 64 bits: give a smaller --seed")
    size = -(-len(seeds) // -(-len(seeds) // batch_size))  # batches as equal as can be, for one shape compiles once
    shape = (size, network.image_size, network.image_size, network.channels)
    times, _ = diffusion.sampler_table(sampler, steps)
    calls = len(times) * -(-len(seeds) // size)
    if calls >= FREEZE_FROM:
        for part in diffusion.networks if isinstance(diffusion, distribute.Spread) else [network]:
            part.freeze()
    with tqdm(total=calls, unit="step", desc=f"{sampler}, {size} at a time", delay=2) as bar:
        for start in range(0, len(seeds), size):
            batch = list(seeds[start:start + size])
            padded = batch + batch[-1:] * (size - len(batch))
            try:
                result = diffusion.sample(network, shape, padded, sampler, steps, frames=frames, on_step=bar.update, **options)
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                raise OasisError(f"out of memory with {size} images of {shape[1]} px at a time: try a smaller --batch-size"
                                 + (" or fewer --frames" if frames else "")) from error
            images, film = result if frames else (result, None)
            bar.n = len(times) * (start // size + 1)  # under XLA nothing counts the steps
            bar.refresh()
            yield batch, to_uint8(images)[:len(batch)], None if film is None else to_uint8(film)[:, :len(batch)]


def write_gif(path, film):
    """Write uint8 (frames, H, W) as a GIF that plays for ever and holds its last frame.

    Noise does not compress: what is still noisy is kept in 16 greys, which its own noise hides; the last frames in all.
    """
    noisy = len(film) * 9 // 10
    film = np.concatenate([film[:noisy] // 16 * 17, film[noisy:]])
    with replacing(path) as temporary:
        imageio.imwrite(temporary, film, loop=0, duration=[FRAME_MS] * (len(film) - 1) + [LAST_FRAME_MS])


def write_samples(target, images):
    """Write uint8 (N, S, S, 1) as one .npy, or as PNGs 00000.png … in a folder."""
    if target.suffix == ".npy":
        with replacing(target) as temporary:
            np.save(temporary, images)
    else:
        for i, image in enumerate(images):
            write_png(target / f"{i:05d}.png", image[:, :, 0])


def parse_flags(arguments=None):
    return flags_from_constants(__file__, globals(), FLAG_TYPES).parse_args(arguments)


def main(arguments=None):
    flags = parse_flags(arguments)
    names = distribute.prepare_devices(flags.devices)
    name, file = find_model(flags.model, flags.ckpt_path)
    precision = modules.best_precision() if flags.precision == "auto" else flags.precision
    network, diffusion, settings = distribute.load_on_devices(lambda: modules.load_model(file, precision), names)
    check_run(file, settings)
    target = make_folder(Path(flags.samples).parent if flags.samples.endswith(".npy") else flags.samples or flags.gif_path)
    print(f"model: {file.absolute()} ({network.image_size}×{network.image_size}, {settings.get('images', 0):,} images seen)")

    seeds = range(flags.seed, flags.seed + flags.number_of_images)
    frames = 0 if flags.samples else flags.frames
    batches = generate(network, diffusion, seeds, flags.sampler, flags.steps or None, flags.batch_size, frames,
                       variance=flags.variance, **noise_options(flags, network.image_size))
    pictures, written = [], []
    for batch, images, film in batches:
        pictures.append(images)
        for i, seed in enumerate(batch if not flags.samples else []):
            path = target / f"{name}_seed{seed}.png"
            write_png(path, images[i, :, :, 0])
            written.append(path)
            if frames:
                write_gif(path.with_suffix(".gif"), film[:, i, :, :, 0])
                written.append(path.with_suffix(".gif"))
    pictures = np.concatenate(pictures)
    if flags.samples:
        write_samples(Path(flags.samples), pictures)
        written = [Path(flags.samples)]
    elif len(pictures) > 1:
        path = target / f"{name}_seed{seeds[0]}-{seeds[-1]}.png"
        write_png(path, image_grid(pictures))
        written.append(path)
    print(*(path.absolute() for path in written), sep="\n")


if __name__ == "__main__":
    run_script(main)
