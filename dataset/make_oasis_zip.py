"""Make keras_png_slices_data.zip from the discs of OASIS-1, downloaded from oasis-brains.org and unpacked.

    pip install -r requirements-volumes.txt
    python dataset/make_oasis_zip.py DISC [DISC …]

A DISC is a folder that contains OAS1_0001_MR1, OAS1_0002_MR1, …, at any depth. dataset/README.md says which steps of
the published zip are known, and which are guesses.
"""
import io
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from oasis.archives import naming, walk
from oasis.files import OasisError, replacing, run_script
from oasis.progress import progress
from oasis.settings import make_parser

SHAPE = 176, 208, 176                           # voxels of 1 mm: to the right, the front and the top
SLICES = range(72, 104)                         # the middle 32 axial slices become slices 0 … 31
IMAGE = 256                                     # pixels a side; the slice lies in the middle
LABEL_STEP = 85                                 # the labels 0 … 3 become 0, 85, 170 and 255
SUBJECTS = {"train": range(1, 402), "validate": range(402, 441), "test": range(441, 458)}
ABSENT = {*range(73, 81), *range(92, 151)}      # subjects of OASIS-1 that the published zip lacks
PUBLISHED = {"train": 302, "validate": 35, "test": 17}  # number of subjects
T88 = "PROCESSED/MPRAGE/T88_111/OAS1_*_t88"     # volumes in the space of the atlas of Talairach and Tournoux (1988)
ADVICE = "Take this file from the disc again."


def split_of(subject):
    """The split of a subject in the published zip, or None."""
    return next((split for split, subjects in SUBJECTS.items() if subject in subjects and subject not in ABSENT), None)


def find_sessions(discs):
    """Return {subject: folder} of the first session of each subject that the published zip holds."""
    sessions = {}
    for disc in discs:
        with naming(disc, "Name a folder with the unpacked discs of OASIS-1."):
            if not disc.is_dir():
                raise OasisError("is not a folder")
        for folder in sorted(Path(folder) for folder, _ in walk(disc.absolute())):
            match = re.fullmatch("OAS1_([0-9]{4})_MR1", folder.name)
            if match and split_of(int(match[1])):
                sessions.setdefault(int(match[1]), folder)
    if not sessions:
        raise OasisError(f"{', '.join(map(str, discs))}: contains no OAS1_0001_MR1, OAS1_0002_MR1, …. Name the folders "
                         "with the unpacked discs of OASIS-1.")
    return dict(sorted(sessions.items()))


def find_volume(session, *patterns):
    """The first file that matches the first pattern for which there is a file, or None."""
    return next((path for pattern in patterns for path in sorted(session.glob(pattern))), None)


def read_volume(path):
    """The voxels of an Analyze volume, an array of SHAPE."""
    import nibabel
    with naming(path, ADVICE):
        volume = nibabel.as_closest_canonical(nibabel.load(path))
        if volume.shape not in (SHAPE, (*SHAPE, 1)):
            raise OasisError(f"has the shape {volume.shape}, not {SHAPE}")
        return np.asarray(volume.dataobj).reshape(SHAPE)


def png_of(pixels):
    """The bytes of an 8-bit grey PNG of IMAGE × IMAGE pixels with uint8 (H, W) in its middle."""
    square = np.zeros((IMAGE, IMAGE), np.uint8)
    top, left = ((IMAGE - length) // 2 for length in pixels.shape)
    square[top:top + pixels.shape[0], left:left + pixels.shape[1]] = pixels
    file = io.BytesIO()
    Image.fromarray(square).save(file, "PNG")
    return file.getvalue()


def grey_of(plane):
    """A slice as uint8: 0 stays 0, and the brightest pixel becomes 255."""
    return np.rint(np.maximum(plane, 0) * (255 / max(plane.max(), 1))).astype(np.uint8)


def labels_of(voxels, path):
    """The label maps of a subject as uint8: the labels 0 … 3 times LABEL_STEP."""
    rounded = np.rint(voxels)
    if rounded.min() < 0 or rounded.max() > 3:
        raise OasisError(f"{path}: holds labels {rounded.min():g} to {rounded.max():g}, not 0 to 3. {ADVICE}")
    return rounded.astype(np.uint8) * LABEL_STEP


def write_session(archive, subject, session):
    """Write the slices of a subject, and its label maps if there are any. Return the name of the brain's volume."""
    brain = find_volume(session, f"{T88}_gfc.hdr", f"{T88}_masked_gfc.hdr")
    if brain is None:
        raise OasisError(f"{session}: holds no {T88}_gfc.hdr. Unpack the disc once more.")
    labels = find_volume(session, "FSL_SEG/OAS1_*_fseg.hdr")
    voxels = read_volume(brain)
    segments = labels_of(read_volume(labels), labels) if labels else None
    for number, z in enumerate(SLICES):
        folder, split = "keras_png_slices_data/keras_png_slices", split_of(subject)
        name = f"{subject:03}_slice_{number}.nii.png"
        archive.writestr(zipfile.ZipInfo(f"{folder}_{split}/case_{name}"), png_of(grey_of(voxels[:, :, z])))
        if labels:
            archive.writestr(zipfile.ZipInfo(f"{folder}_seg_{split}/seg_{name}"), png_of(segments[:, :, z]))
    return brain.name


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("discs", nargs="+", type=Path, metavar="DISC", help="a folder with unpacked discs")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("keras_png_slices_data.zip"),
                        help="the zip to write (%(default)s)")
    flags = parser.parse_args(arguments)
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise OasisError(f"run pip install -r requirements-volumes.txt first ({error})") from error
    sessions, masked = find_sessions(flags.discs), 0
    counts = dict.fromkeys(PUBLISHED, 0)
    with replacing(flags.output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for subject, session in progress(sessions.items(), "subjects", unit=""):
            masked += "masked" in write_session(archive, subject, session)
            counts[split_of(subject)] += 1
    for split, count in counts.items():
        print(f"{split}: {count} of {PUBLISHED[split]} subjects, {count * len(SLICES):,} slices")
    if counts != PUBLISHED:
        print("warning: these are not all subjects of the published zip: name all discs", file=sys.stderr)
    if masked:
        print(f"warning: {masked} subjects have only a masked volume: their slices lack the skull", file=sys.stderr)
    print(flags.output.absolute())


if __name__ == "__main__":
    run_script(main)
