"""Many images in batches of equal size, on frozen networks where that pays, and with guidance."""
import numpy as np
import tensorflow as tf

from dataset import to_uint8
from oasis import fused
from oasis.conditions import guided
from oasis.devices import sample_on_devices, take, use_xla
from oasis.files import OasisError
from oasis.progress import progress

FREEZE_FROM = 250     # calls of the network from which fused.frozen pays


def equal_batches(count, batch_size):
    """The size of the batches, as few and as equal as possible, since each shape is compiled."""
    return -(-count // -(-count // batch_size))


def prepare(networks, calls, guidance=1.0):
    """{device name: denoise_fn}: frozen networks for many calls, see fused.frozen, and with guidance."""
    condition = next(iter(networks.values())).settings.get("condition", "")
    if calls >= FREEZE_FROM and not use_xla():
        networks = {name: fused.frozen(network) if network.fused else network for name, network in networks.items()}
    return {name: guided(denoise_fn, condition, guidance) for name, denoise_fn in networks.items()}


def generate(networks, diffusion, seeds, sampler="dpm", steps=None, batch_size=16, frames=0, cond=None, guidance=1.0,
             **options):
    """Yield (seeds, images uint8 (B, S, S, 1), trajectory uint8 (frames, B, S, S, 1) or None), a batch at a time.

    networks: {device name: network}, see load_on_devices. seeds: one int64 for each image, which depends on its seed
    and on its row of cond alone. guidance: see oasis.conditions.guided. The other arguments are those of
    GaussianDiffusion.sample.
    """
    if max(seeds) >= 2**63:
        raise OasisError(f"the seed of the last image, {max(seeds)}, does not fit 64 bits: give a smaller --seed")
    network = next(iter(networks.values()))
    size = equal_batches(len(seeds), batch_size)
    shape = (size, network.image_size, network.image_size, network.channels)
    times, _ = diffusion.sampler_table(sampler, steps)
    calls = len(times) * -(-len(seeds) // size)
    networks = prepare(networks, calls, guidance)
    with progress(total=calls, unit="step", desc=f"{sampler}, {size} at a time", delay=2) as bar:
        for start in range(0, len(seeds), size):
            rows = np.minimum(np.arange(start, start + size), len(seeds) - 1)  # the last image fills the last batch
            batch = list(seeds[start:start + size])
            try:
                result = sample_on_devices(diffusion, networks, shape, [seeds[row] for row in rows], sampler, steps,
                                           frames=frames, cond=take(cond, rows), on_step=bar.update, **options)
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                raise OasisError(f"out of memory with {size} images of {shape[1]} px at a time: try a smaller "
                                 f"--batch-size{' or fewer --frames' if frames else ''}") from error
            images, trajectory = result if frames else (result, None)
            bar.n = len(times) * (start // size + 1)  # under XLA on_step is not called
            bar.refresh()
            trajectory = None if trajectory is None else to_uint8(trajectory)[:, :len(batch)]
            yield batch, to_uint8(images)[:len(batch)], trajectory
