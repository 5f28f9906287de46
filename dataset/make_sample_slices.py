"""Make sample_slices.zip: synthetic subjects, in the layout of the OASIS slices, for `--demo` and the tests.

The anatomy is the MNI ICBM152 2009a T1 average, which the nilearn wheel contains. Each subject is a smooth deformation
of this template, with its own ventricles, contrast and shading. The template is skull-stripped and the OASIS slices are
not, so skull, scalp and temple muscle are drawn around it. The same versions of the packages write the same bytes.

The program needs neither nilearn nor scipy. To run this file again:

    python -m venv .venv-sample && .venv-sample/bin/pip install nilearn pillow
    .venv-sample/bin/python dataset/make_sample_slices.py
"""
import io
import zipfile
from pathlib import Path

import numpy as np
from nilearn.datasets import load_mni152_template
from PIL import Image
from scipy import ndimage

ZIP = Path(__file__).with_name("sample_slices.zip")
SUBJECTS = {"train": (501, 84), "validate": (801, 10), "test": (901, 6)}  # (first number, count), above those of OASIS
SLICE_STEP = 8      # a subject has every 8th of the slices 0 … 31, starting at a different one
SEED = 152
IMAGE, FIELD = 256, (176, 208)  # pixels of 1 mm; rows go from side to side, columns from back to front
BLOCK = 2           # equal pixels in blocks of 2 × 2: half the file size, the same image at 128 pixels and below
GREY_STEP = 8       # grey values are multiples of 8: the PNGs are smaller by a third, and 64-pixel images look the same
CORNERS = 136       # |row| + |column| from the centre at which the octagon of measured pixels ends
CENTRE = (0, -17)   # the template's x and y at the centre of the image, mm
LOWEST = -2         # the template's z of slice 0, mm; one slice is 1 mm
AIR, BONE = 8, 24   # grey values outside the head and between brain and scalp


def smooth_noise(rng, points, spacing):
    """Values at points (3, …), in mm, of a smooth random field: mean 0, deviation about 1, knots `spacing` mm apart."""
    knots = rng.standard_normal([int(240 / spacing) + 4] * 3)
    splines_shrink_noise_to = 0.33
    return ndimage.map_coordinates(knots, (points + 120) / spacing + 1, order=3, mode="mirror",
                                   prefilter=False) / splines_shrink_noise_to


def deform(rng, points):
    """Map points of a new subject to points of the template: float (3, K, R, C), in mm, to the same.

    The subject has at a point the tissue that the template has at the mapped point. rng: a numpy Generator.
    """
    head = np.array([*CENTRE, 15]).reshape(3, 1, 1, 1)
    turn = np.eye(3) * rng.normal(0.995, 0.015) + rng.normal(0, 0.018, (3, 3))
    warped = head + np.einsum("ij,jkrc->ikrc", turn, points - head - rng.normal(0, 1.5, 3).reshape(3, 1, 1, 1))
    for amplitude, spacing in (1.1, 60), (1.1, 22), (1.2, 11):  # lobes, gyri, sulci
        warped += amplitude * np.stack([smooth_noise(rng, points, spacing) for _ in range(3)])
    growth = 0.75 * rng.beta(1, 1.7)  # of the ventricles: small in young subjects, large in old ones
    for centre, size in ((-14, -20, 16), (13, 14, 16)), ((14, -20, 16), (13, 14, 16)), ((0, 10, 16), (22, 16, 14)):
        offset = warped - np.reshape(centre, (3, 1, 1, 1))
        near = np.exp(-0.5 * np.sum((offset / np.reshape(size, (3, 1, 1, 1))) ** 2, axis=0))
        warped -= growth * near * offset
    return warped


def distance_to(region):
    """The distance, in mm, of each pixel of a slice from the nearest True pixel of the region."""
    return ndimage.distance_transform_edt(~region, sampling=BLOCK)


def draw_scalp(rng, mask, points):
    """Return (grey values (K, R, C) of scalp and temple muscle, at most 255; bool (K, R, C), True inside the head).

    mask: bool (K, R, C), True in the brain. points: (3, K, R, C), the positions of the pixels in mm.
    """
    thickness = rng.normal(6.2, 0.8) + 0.5 * smooth_noise(rng, points, 50)
    x, y, z = np.abs(points[0]), points[1], points[2]
    temple = rng.uniform(3, 8) * np.exp(-((y - 18) / 20) ** 2)
    temple = temple * np.clip((22 - z) / 20, 0, 1) * np.clip((x - 35) / 15, 0, 1)
    width = np.clip(rng.normal(1.7, 0.3) + 0.25 * smooth_noise(rng, points, 30), 1.0, 2.5)
    brightness = np.clip(0.75 + 0.17 * smooth_noise(rng, points, 25), 0.3, 1.2)
    muscle = rng.uniform(45, 80)
    reach, margin = 24, 20  # mm and pixels
    scalp, inside = np.empty(mask.shape), np.empty(mask.shape, bool)
    for k, brain in enumerate(np.pad(mask, ((0, 0), (margin, margin), (margin, margin)))):
        near = distance_to(brain) <= reach
        hull = distance_to(~near) > reach  # closes the sulci and the gap between the hemispheres
        distance = ndimage.gaussian_filter(distance_to(hull) - distance_to(~hull), 7 / BLOCK)  # a skull has no dents
        distance = distance[margin:-margin, margin:-margin]
        skin = thickness[k] + temple[k]
        ring = brightness[k] * np.exp(-0.5 * ((distance - skin) / width[k]) ** 2)
        layer = np.clip((distance - thickness[k] + 1.5) / 2, 0, 1) * np.clip((skin - distance) / 2, 0, 1)
        scalp[k] = np.maximum(255 * ring / ring.max(), muscle * layer)
        inside[k] = distance < skin
    return scalp, inside


def make_subject(rng, template, to_voxels, slices):
    """uint8 (K, 256, 256): the given slices of a new subject.

    template: float (X, Y, Z), 0 outside the brain. to_voxels: the 4×4 matrix from mm to indices of the template.
    """
    rows, columns = (np.arange(0, n, BLOCK) + (BLOCK - n) / 2 for n in FIELD)
    z, x, y = np.meshgrid(LOWEST + np.array(slices, float), rows + CENTRE[0], columns + CENTRE[1], indexing="ij")
    points = np.stack([x, y, z])
    warped = deform(rng, points)
    voxels = np.einsum("ij,jkrc->ikrc", to_voxels[:3, :3], warped) + to_voxels[:3, 3].reshape(3, 1, 1, 1)
    tissue = ndimage.map_coordinates(template, voxels, order=1)

    white = np.clip(rng.normal(121, 18), 85, 175)
    fluid, grey = rng.uniform(0.10, 0.16), rng.normal(0.59, 0.03)
    brain = white * np.interp(tissue, (0, 0.28, 0.66, 0.88, 1.1), (0, fluid, grey, 1, 1.08))
    brain *= 1 + 0.06 * smooth_noise(rng, points, 80)  # the sensitivity of the coil varies
    scalp, inside = draw_scalp(rng, tissue > 0.1, points)
    head = np.maximum(np.maximum(brain, scalp), np.where(inside, BONE, AIR))

    shift = rng.uniform(-4, 4, 2)
    measured = np.abs(x - CENTRE[0] - shift[0]) + np.abs(y - CENTRE[1] - shift[1]) < CORNERS + rng.uniform(-6, 6)
    head = np.clip(np.where(measured, head, 0) / GREY_STEP, 0, 255 // GREY_STEP).round() * GREY_STEP
    for picture in head:
        picture[picture == picture.max()] = 255  # as in every OASIS slice
    head = head.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)
    margins = [((IMAGE - n) // 2,) * 2 for n in FIELD]
    return np.pad(head, ((0, 0), *margins)).astype(np.uint8)


def main():
    image = load_mni152_template(resolution=1)
    template = image.get_fdata()
    sharper = template + 1.4 * (template - ndimage.gaussian_filter(template, 2))  # the average of 152 brains is blurred
    template = np.where(template > 0, np.clip(sharper, 0.01, 1.1), 0)
    to_voxels = np.linalg.inv(image.affine)

    with zipfile.ZipFile(ZIP, "w") as archive:
        for split, (first, count) in SUBJECTS.items():
            for subject in range(first, first + count):
                slices = range(subject % SLICE_STEP, 32, SLICE_STEP)
                pictures = make_subject(np.random.default_rng([SEED, subject]), template, to_voxels, slices)
                for k, picture in zip(slices, pictures):
                    png = io.BytesIO()
                    Image.fromarray(picture).save(png, "PNG", optimize=True)
                    name = f"keras_png_slices_data/keras_png_slices_{split}/case_{subject}_slice_{k}.nii.png"
                    archive.writestr(zipfile.ZipInfo(name), png.getvalue())  # ZipInfo's date is constant
    print(f"{ZIP.absolute()}: {ZIP.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
