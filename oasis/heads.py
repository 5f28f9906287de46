"""Chosen slices and whole heads: their slice indices, their generation and their files."""
import sys

import imageio.v3 as imageio
import numpy as np
import tensorflow as tf

from dataset import from_uint8
from oasis.conditions import has, with_indices
from oasis.files import OasisError, image_grid, replacing, write_png
from oasis.generate import BatchGenerator
from oasis.noise import noise_of_seeds
from oasis.sources import chosen_range

NEIGHBOUR_T = 0.05      # the timestep of the noise that is added to neighbours, as a share of T


def seed_of_slice(seed, index):
    """The seed, 0 … 2^63 - 1, of the slice with an index in the head with a seed."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generate_heads(networks, diffusion, seeds, indices, batch_size=16, **options):
    """Yield (seeds, heads uint8 (B, K, S, S, C)), a batch at a time.

    A head is a function of its seed, up to float rounding, which depends on the batch size. indices: the K slice
    indices, ascending. The neighbour of each slice is the slice generated before it, with noise added to it. The other
    arguments are those of oasis.generate.BatchGenerator.
    """
    with BatchGenerator(networks, diffusion, len(seeds), batch_size, "heads", len(indices), **options) as generator:
        for rows, length in generator.batches:
            slices = []
            for index in indices:
                slice_seeds = [seed_of_slice(seeds[row], index) for row in rows]
                cond = with_indices(generator.condition, generator.shape, [index] * len(rows))
                if slices:
                    t = tf.fill([len(rows)], int(NEIGHBOUR_T * diffusion.timesteps))
                    noise = noise_of_seeds(tf.constant(slice_seeds, tf.int64), diffusion.timesteps + 1, generator.shape)
                    cond.update(neighbour_t=t, neighbour=diffusion.q_sample(from_uint8(slices[-1]), t, noise))
                slices.append(generator.sample(slice_seeds, cond)[0])
            yield [seeds[row] for row in rows[:length]], np.stack(slices, axis=1)[:length]


def write_head(path, head, indices, geometry, frame_ms):
    """Write a head, uint8 (K, S, S, 1), to `path` with the suffixes .png, .npy, .gif and .nii. Return these paths.

    The PNG is a grid of the slices. The GIF has one slice per frame. The NIfTI needs nibabel; without it, no .nii is
    written. indices, geometry: see write_nifti. frame_ms: milliseconds of a GIF frame; 0 writes no GIF.
    """
    png, array, gif, nifti = (path.with_suffix(suffix) for suffix in (".png", ".npy", ".gif", ".nii"))
    write_png(png, image_grid(head))
    with replacing(array) as temporary:
        np.save(temporary, head)
    written = [png, array]
    if frame_ms:
        with replacing(gif) as temporary:
            imageio.imwrite(temporary, head[..., 0], loop=0, duration=frame_ms)
        written.append(gif)
    if write_nifti(nifti, head, indices, geometry):
        written.append(nifti)
    return written


def write_nifti(path, head, indices, geometry):
    """Write a head, uint8 (K, S, S, 1), as a NIfTI volume with the orientation of the training data.

    indices: the K slice indices, evenly spaced. geometry: see oasis.sources.Source; it determines the size of a voxel.
    Where it is unknown, a pixel is 1 mm wide and consecutive slice indices are 1 mm apart. Returns False and writes
    nothing if nibabel is not installed, else True.
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


def chosen_indices(settings, slices, head):
    """The slice indices to generate: --slice if given, else with --head those of the training data, else [].

    settings: those in a model file. slices, head: the flags of predict.py. Indices above the largest of the
    training data are left out. Raises OasisError if the model was not trained with the condition that the flags need,
    if no index is left, if the first is below the smallest, or if with --head there is only one index, or the indices
    are not slice_step apart.
    """
    condition = settings["condition"]
    for flag, given, needed in ("--head", head, "slice,neighbour"), ("--slice", slices, "slice"):
        if given and not all(has(condition, name) for name in needed.split(",")):
            raise OasisError(f"{flag}: this model was not trained with --condition {needed}. Train one with it, or "
                             "name another with --model.")
    if not slices and not head:
        return []
    indices, step = settings["indices"], settings["slice_step"]
    chosen = list(chosen_range(slices, indices[-1] + 1)) if slices else list(range(indices[0], indices[-1] + 1, step))
    if not chosen or chosen[0] < indices[0]:
        raise OasisError(f"--slice {slices}: the slice indices of this model are {indices[0]} to {indices[-1]}, in "
                         f"steps of {step}. Choose among these.")
    if unknown := [str(index) for index in chosen if index not in indices]:
        print(f"warning: the model was not trained on the slice indices {', '.join(unknown)}", file=sys.stderr)
    if head and len(chosen) < 2:
        raise OasisError(f"--head --slice {slices}: is one slice. Leave out --head, or give --slice START:STOP:STEP.")
    if head and any(after - before != step for before, after in zip(chosen, chosen[1:])):
        raise OasisError(f"--head --slice {slices}: neighbouring slices of this model are {step} apart. Give --slice "
                         f"{chosen[0]}:{chosen[-1] + 1}:{step}")
    return chosen
