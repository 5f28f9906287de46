"""Generate many images in batches of equal size, on several devices, with guidance, and with frozen networks."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from dataset import to_uint8
from oasis import fused
from oasis.conditions import guided, with_indices
from oasis.devices import use_xla
from oasis.files import OasisError
from oasis.progress import progress
from oasis.signals import watching_ctrl_c

FREEZE_FROM = 250     # calls of the network from which fused.frozen saves time
# eta in the three scripts. Fresh noise improves the KID of dpm a little and harms its recall, see docs/results.md.
DEFAULT_ETA = {"ddim": 0.0, "dpm": 1.0}


def noise_options(sampler, eta="auto", noise_scale=1.0):
    """Return {"eta": …, "noise_scale": …} for GaussianDiffusion.sample. With eta "auto", it is DEFAULT_ETA.

    For ddpm the dict has no eta.
    """
    eta = {} if sampler == "ddpm" else {"eta": DEFAULT_ETA[sampler] if eta == "auto" else eta}
    return {**eta, "noise_scale": noise_scale}


def noise_label(sampler, noise):
    """The noise_options and the guidance that differ from the default, as the end of a label, such as ", eta 0"."""
    defaults = dict(noise_options(sampler), guidance=1.0)
    return "".join(f", {name.replace('_', ' ')} {noise[name]:g}"
                   for name, default in defaults.items() if noise.get(name, default) != default)


def check_noise(parser, flags):
    """Refuse --eta with --sampler ddpm, and --noise-scale without fresh noise: they would change nothing."""
    if flags.sampler == "ddpm" and flags.eta != "auto":
        parser.error("--eta is for --sampler ddim and dpm")
    if flags.noise_scale != 1 and not noise_options(flags.sampler, flags.eta).get("eta", 1):
        parser.error("--noise-scale multiplies fresh noise: give --eta above 0, too")


def load_on_devices(load, names):
    """Return ({device name: network}, diffusion, settings), where load() returns (network, diffusion, settings).

    All networks have the parameters of the first: a running training may replace the model file between two calls.
    """
    loaded = {}
    for name in names:
        with tf.device(name if len(names) > 1 else None):
            loaded[name] = load()
    first, diffusion, settings = loaded[names[0]]
    networks = {name: network for name, (network, _, _) in loaded.items()}
    for name in names[1:]:
        for variable, value in zip(networks[name].variables, first.variables):
            variable.assign(value)
    return networks, diffusion, settings


def gather_rows(cond, rows):
    """Return the rows with these indices, int (N,), of a condition: a tensor (B, …) or a dict of tensors; or None."""
    return None if cond is None else tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), cond)


def sample_on_devices(diffusion, networks, shape, seeds, *arguments, frames=0, cond=None, **options):
    """The result of diffusion.sample. If there are several devices, each generates a part of the images in its thread.

    networks: {device name: denoise_fn}. Image k depends on its seed and its row of cond alone, so the devices exchange
    nothing. The number of images need not be a multiple of the number of devices.
    """
    if len(networks) == 1:
        return diffusion.sample(*networks.values(), shape, seeds, *arguments, frames=frames, cond=cond, **options)
    part = -(-len(seeds) // len(networks))
    rows = np.minimum(np.arange(part * len(networks)), len(seeds) - 1)  # copies of the last row fill the last part

    def on_device(mine, name, denoise_fn):
        with tf.device(name):
            result = diffusion.sample(denoise_fn, (part, *shape[1:]), [seeds[row] for row in mine], *arguments,
                                      frames=frames, cond=gather_rows(cond, mine), **options)
        return result if frames else (result, None)

    with ThreadPoolExecutor(len(networks)) as pool:
        images, trajectories = zip(*pool.map(on_device, np.split(rows, len(networks)), networks, networks.values()))
    images = np.concatenate(images)[:len(seeds)]
    return (images, np.concatenate(trajectories, axis=1)[:, :len(seeds)]) if frames else images


class BatchGenerator:
    """A context manager that generates batches of images of one shape, with a progress bar.

    batches: a list with (rows, length) of each batch. rows, int (B,): its rows of 0 … count-1; the last batch is filled
    up with copies of the last row, and only its first `length` images count. shape: (B, S, S, C).

    networks: {device name: network}, see load_on_devices. count: the number of rows. calls: sample() calls per batch.
    guidance: see oasis.conditions.guided. options: arguments of GaussianDiffusion.sample.
    """

    def __init__(self, networks, diffusion, count, batch_size, label, calls=1, sampler="dpm", steps=None, frames=0,
                 guidance=1.0, **options):
        network = next(iter(networks.values()))
        batches = -(-count // batch_size)
        size = -(-count // batches)  # one size, because each shape is compiled
        self.shape = size, network.image_size, network.image_size, network.channels
        self.batches = [(np.minimum(np.arange(start, start + size), count - 1), min(size, count - start))
                        for start in range(0, count, size)]
        self.diffusion, self.sampler, self.steps, self.frames, self.options = diffusion, sampler, steps, frames, options
        self.steps_a_call = len(diffusion.sampler_table(sampler, steps)[0])
        total = self.steps_a_call * calls * batches
        if total >= FREEZE_FROM and network.fused and not use_xla():
            networks = {name: fused.frozen(network) for name, network in networks.items()}
        self.condition = network.condition
        self.networks = {name: guided(denoise_fn, self.condition, guidance) for name, denoise_fn in networks.items()}
        self.bar = progress(total=total, unit="step", desc=f"{sampler}, batches of {size} {label}", delay=2)

    def __enter__(self):
        print("compiling the sampler …", flush=True)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def count_step(self):
        """Advance the progress bar by one sampling step."""
        if self.bar.n == 0:
            self.bar.unpause()  # the first step includes compiling, whose time is not that of a step
        self.bar.update()

    def sample(self, seeds, cond=None):
        """Generate a batch: (images uint8 (B, S, S, C), trajectory uint8 (frames, B, S, S, C) or None)."""
        done = self.bar.n + self.steps_a_call
        try:
            with watching_ctrl_c() as pressed:
                def on_step():
                    if pressed():
                        raise KeyboardInterrupt  # it ends the loop
                    if len(self.networks) == 1:  # several devices would all count the same steps
                        self.count_step()
                result = sample_on_devices(self.diffusion, self.networks, self.shape, seeds, self.sampler, self.steps,
                                           frames=self.frames, cond=cond, on_step=on_step, **self.options)
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise OasisError(f"out of memory with {self.shape[0]} images of {self.shape[1]} px at a time: try a "
                             f"smaller --batch-size{' or fewer --frames' if self.frames else ''}") from error
        self.bar.update(max(done - self.bar.n, 0))  # under XLA on_step is not called
        images, trajectory = result if self.frames else (result, None)
        return to_uint8(images), None if trajectory is None else to_uint8(trajectory)


def generate(networks, diffusion, seeds, batch_size=16, indices=(), **options):
    """Generate an image for each seed. Yield for each batch (its seeds, images, trajectory or None).

    images: uint8 (B, S, S, C). trajectory: uint8 (frames, B, S, S, C).

    seeds: one int64 for each image. indices: a slice index for each image, or empty. An image is a function of its seed
    and its index, up to float rounding, which depends on the batch size. For the other arguments see BatchGenerator.
    """
    if max(seeds) >= 2**63:
        raise OasisError(f"the seed of the last image, {max(seeds)}, does not fit 64 bits: give a smaller --seed")
    with BatchGenerator(networks, diffusion, len(seeds), batch_size, "images", **options) as generator:
        for rows, length in generator.batches:
            batch_seeds = [seeds[row] for row in rows]
            cond = None
            if len(indices):
                cond = with_indices(generator.condition, generator.shape, [indices[row] for row in rows])
            images, trajectory = generator.sample(batch_seeds, cond)
            yield batch_seeds[:length], images[:length], None if trajectory is None else trajectory[:, :length]
