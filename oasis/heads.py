"""Whole heads: slice upon slice, each with the one below as its condition; and the files that they are written to."""
import numpy as np
import tensorflow as tf

from dataset import to_uint8
from modules import noise_of_seeds
from oasis.conditions import SAMPLING_LEVEL, unknown
from oasis.devices import sample_on_devices
from oasis.files import OasisError, replacing
from oasis.generate import equal_batches, prepare
from oasis.progress import progress
from oasis.sources import chosen_range


def seed_of_slice(seed, index):
    """The seed, int64, of a slice of the head with this seed."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def slice_condition(condition, shape, indices, below=None, diffusion=None, noise=None):
    """The condition of a batch of `shape` (B, S, S, C): its slice indices and, if given, its neighbours.

    indices: B integers. below: uint8 images of `shape`. noise: N(0, 1) of `shape`, which the neighbours get.
    """
    cond = unknown(condition, shape)
    if "slice" in cond:
        cond["slice"] = tf.constant(indices, tf.int32)
    if below is not None:
        cond["level"] = tf.fill([shape[0]], int(SAMPLING_LEVEL * diffusion.timesteps))
        cond["neighbour"] = diffusion.q_sample(tf.cast(below, tf.float32) / 127.5 - 1.0, cond["level"], noise)
    return cond


def generate_heads(networks, diffusion, seeds, indices, sampler="dpm", steps=None, batch_size=16, guidance=1.0,
                   **options):
    """Yield (seeds, heads uint8 (B, K, S, S, 1)), a batch at a time. A head depends on its seed alone.

    indices: the K slice indices, rising. Each slice is generated with the one below as its neighbour.
    """
    network = next(iter(networks.values()))
    size = equal_batches(len(seeds), batch_size)
    shape = (size, network.image_size, network.image_size, network.channels)
    times, _ = diffusion.sampler_table(sampler, steps)
    calls = len(times) * len(indices) * -(-len(seeds) // size)
    networks = prepare(networks, calls, guidance)
    with progress(total=calls, unit="step", desc=f"{sampler}, {size} heads at a time", delay=2) as bar:
        for start in range(0, len(seeds), size):
            batch, slices = list(seeds[start:start + size]), []
            padded = batch + batch[-1:] * (size - len(batch))
            for index in indices:
                drawn = [seed_of_slice(seed, index) for seed in padded]
                noise = noise_of_seeds(tf.constant(drawn, tf.int64), diffusion.timesteps + 1, shape)
                cond = slice_condition(network.condition, shape, [index] * size, slices[-1] if slices else None,
                                       diffusion, noise)
                images = sample_on_devices(diffusion, networks, shape, drawn, sampler, steps, cond=cond,
                                           on_step=bar.update, **options)
                slices.append(to_uint8(images))
            yield batch, np.stack(slices, axis=1)[:len(batch)]


def write_nifti(path, head, indices, geometry):
    """Write uint8 (K, S, S, 1) as a NIfTI volume with the spacing of the training data, 1 mm where it is unknown.

    geometry: see oasis.sources.Source. Returns whether nibabel is installed, without which nothing is written.
    """
    try:
        import nibabel
    except ImportError:
        return False
    voxels = np.moveaxis(head[..., 0], 0, -1)                       # (S, S, K)
    pixel = geometry["side"] / head.shape[1] if geometry["side"] else 1.0
    step = (geometry["step"] or 1.0) * (indices[1] - indices[0] if len(indices) > 1 else 1)
    orientation = nibabel.orientations.axcodes2ornt(tuple(geometry["axes"]))
    voxels = nibabel.apply_orientation(voxels, orientation)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = pixel, pixel, step
    with replacing(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*spacing, 1.0])), temporary)
    return True


def chosen_indices(settings, slices, head, guidance):
    """The slice indices that --slice names, by default all of the training data for --head, else none.

    settings: of a model file. The others are flags of predict.py. Raises OasisError if the model was not trained with
    the condition that they need.
    """
    for flag, given, needed in ("--head", head, "neighbour"), ("--slice", slices, "slice"):
        if given and needed not in settings.get("condition", "").split(","):
            raise OasisError(f"{flag}: this model was not trained with --condition {needed}. Train one with "
                             "--condition slice,neighbour, or name another with --model.")
    if guidance != 1 and not (slices or head):
        raise OasisError("--guidance leads towards a condition: give --slice or --head too")
    if not slices:
        return settings["indices"] if head else []
    indices = list(chosen_range(slices, max(settings["indices"]) + 1))
    if not indices:
        raise OasisError(f"--slice {slices}: the slice indices of this model end at {max(settings['indices'])}")
    return indices
