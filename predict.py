"""Generate images of brain slices with a trained model, each with a GIF that shows how it emerges from noise.

    python predict.py                              one image, 1000 steps, from the newest run or a bundled model
    python predict.py --sampler dpm                20 steps instead of 1000
    python predict.py --number-of-images 16        16 images, and a grid of them
    python predict.py --number-of-images 1000 --sampler dpm --samples samples.npy      for metrics

A model that was trained with --condition can generate chosen slices:

    python predict.py --slice 12                   the slice with index 12
    python predict.py --slice 0:32:4               each of these slices, from the same noise
    python predict.py --head                       a whole head, from the bottom to the top
"""
import itertools
import json
import sys
from pathlib import Path

from oasis.files import OasisError, image_grid, import_tensorflow, make_folder, replacing, run_script, write_png

import_tensorflow()  # before anything imports TensorFlow

import imageio.v3 as imageio
import numpy as np

import modules
from oasis.conditions import check_guidance, random_indices
from oasis.devices import PRECISIONS, devices, prepare_devices, resolve_precision
from oasis.generate import check_noise, generate, load_on_devices, noise_options
from oasis.heads import chosen_indices, generate_heads, write_head
from oasis.modelfile import find_model
from oasis.settings import auto_or, flag, integer, make_parser, number, read_settings, user_path
from oasis.sources import slice_range

# The settings: each constant is the default of its flag, see oasis/settings.py.
MODEL: flag(user_path) = ""                         # a run's folder, a model file, or the name of a run in
                                                    # --ckpt-path, else of a bundled model; by default the
                                                    # newest run, else oasis64
CKPT_PATH: flag(user_path) = "./checkpoint"         # the folder that holds the runs
GIF_PATH: flag(user_path) = "./gif/"                # the folder for images and GIFs
NUMBER_OF_IMAGES: flag(integer(1, 10**6)) = 1       # number of images to generate
SEED: flag(integer(-2**63)) = 0                     # seed of the first image; each further image has the next seed
SAMPLER: flag(modules.SAMPLERS) = "ddpm"            # ddpm is the sampler of the paper; ddim and dpm need fewer steps
STEPS: flag(integer(0)) = 0                         # sampling steps; 0: all T for ddpm, 50 for ddim, 20 for dpm
ETA: flag(auto_or(number(0, 1))) = "auto"           # fresh noise in every step of ddim and dpm: 0 is none, 1 is as much
                                                    # as in ddpm; auto: 1 for dpm, 0 for ddim
NOISE_SCALE: flag(number(0.5, 2)) = 1.0             # factor of the fresh noise where σ > size / 256, as S_noise of
                                                    # EDM: above 1 the images vary more, and are less precise
VARIANCE: flag(("small", "large")) = "small"        # variance of ddpm's steps: small is the posterior's, large is beta
FRAMES: flag(integer(0, 10_000)) = 60               # frames of a GIF; 0 writes no GIF
SLICE: flag(slice_range) = ""                       # slice indices to generate with each seed: START:STOP:STEP as in
                                                    # Python, or a number; by default each seed draws an index
GUIDANCE: flag(number(0, 20)) = 1.0                 # weight of classifier-free guidance; 1: no guidance
HEAD: flag(bool) = False                            # generate a whole head for each seed instead of an image
BATCH_SIZE: flag(integer(1, 2**16)) = 16            # images generated at a time
PRECISION: flag(("auto", *PRECISIONS)) = "auto"     # auto takes the fastest safe precision of this machine
DEVICES: flag(devices) = "auto"                     # auto takes all GPUs, else the CPU; or cpu, a number of GPUs,
                                                    # or a list: GPU:0,GPU:2 or CPU:0,CPU:1
SAMPLES: flag(user_path) = ""                       # write only the images: as NAME.npy, uint8 (N, S, S, 1), with
                                                    # --head (N, K, S, S, 1), or as PNGs in a folder with this name

SETTINGS = read_settings(sys.modules[__name__])
FRAME_MS = 60
LAST_FRAME_MS = 3000


def check_run(file, settings):
    """Warn if the model file in a run's folder has other settings than the run: it comes from another run then."""
    try:
        run = json.loads((file.parent / "settings.json").read_text(encoding="utf-8"))
        other = [name for name in run if name in settings and run[name] != settings[name]]
    except (OSError, ValueError, TypeError, RecursionError):  # a model file outside a run's folder has no such file
        return
    if other:
        was = ", ".join(f"{name} {settings[name]}, not {run[name]}" for name in other)
        print(f"warning: {file.absolute()} is not from the run in its folder: it has {was}", file=sys.stderr)


def write_gif(path, trajectory):
    """Write uint8 (frames, H, W) as a GIF that repeats without end and holds its last frame.

    Noise does not compress, so all but the last tenth of the frames have only 16 grey levels. Their noise hides the
    difference.
    """
    noisy = len(trajectory) * 9 // 10
    frames = np.concatenate([trajectory[:noisy] // 16 * 17, trajectory[noisy:]])
    with replacing(path) as temporary:
        imageio.imwrite(temporary, frames, loop=0, duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS])


def write_samples(target, batches, count):
    """Write images, uint8 (B, S, S, 1), batch by batch: as one array if target ends in .npy, else as PNGs in a folder.

    Heads, uint8 (B, K, S, S, 1), need an .npy. count: the number of images or heads in all batches together.
    """
    if target.suffix != ".npy":
        for i, image in enumerate(itertools.chain.from_iterable(batches)):
            write_png(target / f"{i:05d}.png", image[:, :, 0])
        return
    with replacing(target) as temporary:
        array, done = None, 0
        for images in batches:
            if array is None:
                array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, *images.shape[1:]))
            array[done:done + len(images)] = images
            done += len(images)
        del array  # Windows renames no open file


def parse_flags(arguments=None):
    parser = make_parser(__doc__, SETTINGS)
    flags = parser.parse_args(arguments)
    target = Path(flags.samples)
    suffix = target.suffix
    if flags.head and flags.samples and suffix != ".npy":
        parser.error("with --head, --samples must be an .npy")
    if suffix != ".npy" and suffix.lower() in (".npy", ".npz", ".png", ".jpg", ".jpeg", ".gif"):
        parser.error("--samples names a folder for PNGs, or an .npy")
    if flags.sampler != "ddpm" and flags.variance != VARIANCE:
        parser.error("--variance is for --sampler ddpm")
    if flags.samples and flags.frames != FRAMES:
        parser.error("--frames is for GIFs, and --samples writes none")
    if flags.frames == 1:
        parser.error("--frames must be 0 (no GIF) or at least 2: the noise and the image")
    check_noise(parser, flags)
    if flags.samples and suffix != ".npy" and any(target.glob("*.png")):  # evaluate.py would judge them, too
        raise OasisError(f"{target.absolute()}: holds PNGs. Give --samples an empty folder, or another name.")
    return flags


def main(arguments=None):
    flags = parse_flags(arguments)
    names = prepare_devices(flags.devices)
    name, file = find_model(flags.model, flags.ckpt_path)
    precision = resolve_precision(flags.precision)
    networks, diffusion, settings = load_on_devices(lambda: modules.load_model(file, precision), names)
    size = settings["image_size"]
    check_run(file, settings)
    samples = Path(flags.samples)
    target = make_folder(samples.parent if samples.suffix == ".npy" else flags.samples or flags.gif_path)
    existing = set(target.absolute().iterdir())
    data = f", trained on {settings['data']}" if "data" in settings else ""
    print(f"model: {file.absolute()} ({size}×{size}{data}, {settings.get('images', 0):,} images seen)")
    options = dict(sampler=flags.sampler, steps=flags.steps or None, batch_size=flags.batch_size,
                   variance=flags.variance, guidance=flags.guidance,
                   **noise_options(flags.sampler, flags.eta, flags.noise_scale))
    seeds = range(flags.seed, flags.seed + flags.number_of_images)
    indices = chosen_indices(settings, flags.slice, flags.head)
    check_guidance(settings, flags.guidance)
    if flags.head:
        count, batches = len(seeds), generate_heads(networks, diffusion, seeds, indices, **options)
    else:
        repeated = [seed for seed in seeds for _ in indices or [None]]
        count = len(repeated)
        image_indices = indices * len(seeds) or random_indices(settings, seeds)
        batches = generate(networks, diffusion, repeated, frames=0 if flags.samples else flags.frames,
                           indices=image_indices, **options)
    if flags.samples:
        write_samples(samples, (images for _, images, *_ in batches), count)
        written = [samples]
    elif flags.head:
        written = write_heads(batches, target / name, indices, settings["geometry"], flags.frames > 0)
    else:
        written = write_images(batches, target / name, seeds, indices)
    written = [path.absolute() for path in written]
    print(*written, sep="\n")
    if replaced := existing & set(written):
        print(f"warning: {len(replaced)} of these files replaced older ones. Give another "
              f"{'--samples' if flags.samples else '--gif-path'} to keep them.", file=sys.stderr)


def write_images(batches, target, seeds, indices):
    """Write the images and trajectories that generate() yields as PNGs and GIFs; return the files.

    Their names begin with target. Several images are written as a grid, too. indices: the slice indices that were
    generated for each seed, or [].
    """
    suffixes = itertools.cycle([f"_slice{index}" for index in indices] or [""])
    written, all_images = [], []
    for batch, images, trajectory in batches:
        for i, (seed, image) in enumerate(zip(batch, images)):
            path = target.with_name(f"{target.name}_seed{seed}{next(suffixes)}.png")
            write_png(path, image[:, :, 0])
            written.append(path)
            if trajectory is not None:
                write_gif(path.with_suffix(".gif"), trajectory[:, i, :, :, 0])
                written.append(path.with_suffix(".gif"))
        all_images.extend(images)
    if len(all_images) > 1:
        seed_range = f"seed{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"seed{seeds[0]}"
        path = target.with_name(f"{target.name}_{seed_range}{'_slices' if indices else ''}.png")
        write_png(path, image_grid(np.stack(all_images), columns=len(indices) or None))
        written.append(path)
    return written


def write_heads(batches, target, indices, geometry, gif):
    """Write the heads that generate_heads() yields, see write_head; return the files. gif: whether to write GIFs."""
    return [path for seeds, heads in batches for seed, head in zip(seeds, heads)
            for path in write_head(target.with_name(f"{target.name}_head{seed}.png"), head, indices, geometry,
                                   2 * FRAME_MS if gif else 0)]


if __name__ == "__main__":
    run_script(main)
