"""The kinds of data that --path may name: the published OASIS slices, other images, an array or volumes.

Each kind is a class. It lists the Slices of each split and reads the images of one file as squares, uint8 (H, H), of
their own size. dataset.py resizes and caches them.
"""
import argparse
import collections
import contextlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from oasis.archives import Folder, Zip, naming
from oasis.files import OasisError, first_line, printable
from oasis.pixels import pad_to_square, read_grey_png, square_pixels, to_grey
from oasis.settings import RESUMABLE, flag, read_settings
from oasis.subjects import find_subjects, is_label, last_tenth, natural, split_of, validating


def slice_range(text):
    """An argparse type: START:STOP or START:STOP:STEP as in Python, with STEP ≥ 1; or one number, or nothing."""
    if not re.fullmatch(r"|-?[0-9]+|(-?[0-9]+)?:(-?[0-9]+)?(:0*[1-9][0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP, START:STOP:STEP or a number")
    return text


def chosen_range(text, count):
    """The range of the indices 0 … count-1 that a slice_range names."""
    bounds = [int(part) if part else None for part in text.split(":")]
    if len(bounds) == 1 and text:
        return range(count)[bounds[0]:][:1] if -count <= bounds[0] else range(0)
    return range(count)[slice(*bounds)] if text else range(count)


AXES = ("sagittal", "coronal", "axial")  # in the order of nibabel's canonical axes: to the right, front and top

# How files are read, for train.py and evaluate.py: each constant is the default of a flag, see oasis/settings.py.
SLICES: flag(slice_range) = ""           # slices of volumes: START:STOP:STEP as in Python, or a number; by default all;
                                         # write = before a negative number, as in --slices=-9:
AXIS: flag(AXES) = "axial"               # orientation of the slices of volumes
SKIP_UNREADABLE: flag(bool, RESUMABLE) = False  # leave out the files that cannot be read, and list them

SETTINGS = read_settings(sys.modules[__name__])


def reading_of(flags):
    """Return {name: value} of these settings: the arguments of Reading."""
    return {name: getattr(flags, name) for name in SETTINGS}


def reading_of_model(settings):
    """Return {name: value} of slices and axis, with which a model's training images were read, if its file has them.

    settings: those in the model file.
    """
    return {name: settings[name] for name in ("slices", "axis") if name in settings}


ORDER = ("train", "validate", "test")
MAX_BYTES = 2**27         # of one image file
MAX_SLICE_BYTES = 2**26   # of an OASIS slice, which is a PNG of about 20 kB; what follows is not read
MAX_SIDE = 2**13          # pixels a side of an image; a damaged header may claim more than the memory can hold
BRIGHTEST = 99.9          # percentile of the voxels of a volume that becomes 255
FEW_SUBJECTS = 10         # up to this number of subjects a warning is printed
OTHER_IMAGES = (".webp", ".gif", ".heic", ".avif", ".jp2", ".dcm")  # suffixes of images that are not read
Image.MAX_IMAGE_PIXELS = None  # MAX_SIDE is checked instead
logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # without its warnings about unusual headers


class NoSuchSplit(OasisError):
    """The data hold images, but the requested split has none, or none of them can be read."""


class Slice(NamedTuple):
    """One image."""
    subject: Any        # an int for OASIS, else a text
    number: int         # the slice index
    name: str           # the path of the file, or the member of a zip


class Reading(NamedTuple):
    """The values of the settings above."""
    slices: str = SLICES
    axis: str = AXIS
    skip_unreadable: bool = SKIP_UNREADABLE


@contextlib.contextmanager
def open_source(path, reading):
    """Yield the source at `path`: a folder, a zip, or a single image, .npy or volume."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # warnings of Pillow and NumPy; a file that cannot be read raises an error
        with naming(str(path) or "--path", "Name your images with --path, or the OASIS slices "
                          "(dataset/README.md tells how to get them). Without them, train.py --demo works, and "
                          "evaluate.py --path dataset/sample_slices.zip."):
            if not str(path):
                raise OasisError("is empty")
            path = Path(path).expanduser().absolute()
            if path.is_dir():
                files = Folder(path)
            elif path.is_file() and path.name.lower().endswith((*ArraySource.suffixes, *ImageSource.suffixes,
                                                                *VolumeSource.suffixes, ".img")):
                files = Folder(path.parent, [str(partner(path, ".hdr") if path.suffix.lower() == ".img" else path)])
            else:
                files = Zip(path, stack)
        yield kind_of(files, reading)(path, files, reading)


def kind_of(files, reading):
    """The subclass of Source for a Folder or a Zip. Raises OasisError for mixed kinds of files and several arrays."""
    if any(OasisSource.pattern.search(name) for name in files.names):
        return OasisSource
    arrays, images, volumes = ([name for name in files.names if name.lower().endswith(kind.suffixes)]
                               for kind in (ArraySource, ImageSource, VolumeSource))
    if images and volumes and not reading.slices:
        raise OasisError(f"{files.path}: holds images ({images[0]}, …) and volumes ({volumes[0]}, …). Name a folder "
                         "that holds only one of the two, or give --slices : to read the volumes.")
    if not images and not volumes and len(arrays) > 1:
        raise OasisError(f"{files.path}: holds {len(arrays)} arrays. Name one of them, such as {arrays[0]}.")
    return VolumeSource if volumes else ArraySource if arrays and not images else ImageSource


def partner(path, suffix):
    """The other file of an Analyze pair: the path with this suffix, .hdr or .img.

    The suffix is in upper case if only that file exists. If neither file exists, the suffix is as given.
    """
    return next((other for other in (path.with_suffix(suffix), path.with_suffix(suffix.upper())) if other.is_file()),
                path.with_suffix(suffix))


# ---------------------------------------------------------------------------------------------------- kinds of source

class Source:
    """The base class of the kinds of data. A subclass defines read(), and either divide() or slices_of().

    read(name, numbers) reads the images of a file that have these slice indices. It returns a list of uint8 (H, H) and
    the set of conversions that the images needed, such as {"colour became grey"}.
    """
    noun = "images"             # the word for the images in messages
    suffixes = ()               # of the files
    advice = "Repair or remove this file, or give --skip-unreadable to go on without it."
    threads = None              # the largest number of files read at a time; None: one per core
    mirror_axis, flips = 2, 0.0     # the axis of (N, H, W, 1) that --flips mirrors, and the value of --flips auto
    report = ""                 # lines about the images and subjects, set by divide()
    left_out = 0                # number of files without three dimensions, which slices_of() counts
    # axes: the directions (Right, Left, Anterior, Posterior, Superior, Inferior) in which rows, columns and slice
    # indices increase. side, step: the width of an image and the distance of consecutive slice indices in mm, or None.
    geometry = dict(axes="PRS", side=None, step=None)

    def __init__(self, path, files, reading):
        self.path, self.files, self.reading = path, files, reading
        self.unreadable = {}    # {location: error} of the files that --skip-unreadable left out
        if (reading.slices, reading.axis) != (SLICES, AXIS) and not isinstance(self, VolumeSource):
            raise OasisError(f"{path}: holds {self.noun}, not volumes. Leave out --slices and --axis, which are "
                             "for volumes only.")

    def slices(self, split):
        """Return the Slices of a split, one for each image. They are sorted by subject, then by slice index."""
        splits = self.divide()
        if not splits.get(split):
            has = ", ".join(name for name in ORDER if splits.get(name)) or self.report
            why = "".join(f" Left out: {error}" for error in list(self.unreadable.values())[:1])
            raise NoSuchSplit(f"{self.path}: holds no {self.noun} of split {split!r}. It has: {has}.{why}")
        return splits[split]

    def divide(self):
        """Return {split: its Slices, sorted by subject, then by slice index}, without label maps. Sets self.report.

        Folders named train, validate and test are splits. Images outside of them are left out if there is a folder
        train, else they are training images. Without a folder validate, a tenth of the training subjects is used for
        validation, see validating(). Raises OasisError if there are no images.
        """
        names = {self.files.relative(name): name for name in self.files.names if name.lower().endswith(self.suffixes)}
        images = sorted([path for path in names if not is_label(path)], key=natural)
        if not images:
            self.refuse(list(names))
        splits = {path: split_of(path) for path in images}
        named = set(splits.values())
        splits = {path: split or "train" for path, split in splits.items() if split or "train" not in named}
        subjects, how = find_subjects(list(splits))
        trained = {subjects[path] for path, split in splits.items() if split == "train"}
        by_file = all(subject == path for path, subject in subjects.items())
        chosen = set() if "validate" in named else validating(trained, neighbours=by_file)
        slices = {}
        for path, split in splits.items():
            split = "validate" if split == "train" and subjects[path] in chosen else split
            slices.setdefault(split, []).extend(self.slices_of(names[path], subjects[path]))
        how += " (validating on the last tenth)" if chosen and by_file else ""
        self.report = self.describe(slices, how, {"labels and masks": len(names) - len(images),
                                                  "files outside the folders of splits": len(images) - len(splits),
                                                  "files that are not three-dimensional": self.left_out,
                                                  "images of other formats": len(self.other_images())})
        folders, validated = ({subject.rpartition("/")[0] for subject in some} for some in (trained - chosen, chosen))
        if by_file and len(validated) == 1 < len(folders):  # each subject is a path
            where = f"from the folder {printable(*validated)}" if any(validated) else "in no folder"
            self.report += f"\nwarning: all validation images are {where}. Make folders named train and validate"
        return {split: sorted(part, key=lambda one: (natural(one.subject), one.number, natural(one.name)))
                for split, part in slices.items()}

    def other_images(self):
        """The names of the files with one of the suffixes OTHER_IMAGES."""
        return [name for name in self.files.names if name.lower().endswith(OTHER_IMAGES)]

    def refuse(self, labels):
        """Raise the OasisError for a path without images. labels: the label maps at the path."""
        inner = [name for name in self.files.names if name.lower().endswith(".zip")]
        if inner and not labels:
            raise OasisError(f"{self.path}: holds no images, but {inner[0]}. Name this zip, after unpacking "
                             "it if necessary.")
        others = self.other_images()
        only = f" but {len(labels)} labels or masks, such as {labels[0]}" if labels else \
            f" of a format that is read, only {others[0]}" + (", …" if others[1:] else "") if others else ""
        raise OasisError(f"{self.path}: holds no images{only}. Name an .npy, a NIfTI or Analyze volume or a "
                         "folder of them, or a folder or zip of PNG, JPEG, TIFF or BMP images or of OASIS slices "
                         "(keras_png_slices_train/case_001_slice_0.nii.png, …).")

    def describe(self, splits, how, left_out):
        """A line about the images and subjects that divide() found, and warnings.

        splits: {split: Slices}. how: how subjects are told apart, in words. left_out: {kind of file: number left out}.
        """
        slices = [one for part in splits.values() for one in part]
        subjects = {split: {one.subject for one in part} for split, part in splits.items()}
        splits_of = collections.Counter(subject for part in subjects.values() for subject in part)
        shared = sorted(subject for subject, count in splits_of.items() if count > 1)
        counts = ", ".join(f"{split} {len(subjects[split]):,}" for split in ORDER if subjects.get(split))
        ignored = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
        text = (f"{len(slices):,} {self.noun} of {len(splits_of):,} subjects, told apart {how}, such as "
                f"{printable(min(slices).subject)} ({counts})") if slices else "none"
        lines = [f"{text}; left out: {ignored}" if ignored else text]
        if shared:
            lines.append(f"warning: {len(shared)} subjects are in more than one split, such as {printable(shared[0])}")
        if 1 < len(splits_of) <= FEW_SUBJECTS:
            lines.append("warning: few subjects. If these are not people, sort the files into folders named train and "
                         "validate")
        return "\n".join(lines)

    def stamp(self, names):
        """A value that changes when one of these files changes."""
        return self.files.stamp(names)


class OasisSource(Source):
    """The published layout: keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png, 8-bit grey squares."""
    noun, mirror_axis, flips = "slices", 1, 0.5  # the head lies on its side, so its midline is horizontal
    geometry = dict(axes="RAS", side=256.0, step=1.0)
    advice = "Slices are square 8-bit grey PNGs, 256×256 in OASIS: remove this file, or copy the data again."
    # It matches the end of a path, so the folders above do not matter. Names such as "._case_…" (macOS) and folders
    # such as keras_png_slices_seg_train do not match. Some zips contain backslashes.
    pattern = re.compile(r"(?:^|[/\\])keras_png_slices_(train|validate|test)[/\\]"
                         r"case_([0-9]+)_slice_([0-9]+)\.nii\.png$")

    def divide(self):
        slices, others = {}, 0
        for name in self.files.names:
            if match := self.pattern.search(name):
                one = Slice(int(match[2]), int(match[3]), name)
                first = slices.setdefault(match[1], {}).setdefault(one[:2], one)
                if first is not one:
                    raise OasisError(f"{self.path}: holds one slice twice, {first.name} and {name}. Remove "
                                     "one of them.")
            else:
                others += name.lower().endswith(ImageSource.suffixes) and not is_label(self.files.relative(name))
        self.report = f"left out: {others:,} other images" if others else ""
        return {split: sorted(part.values()) for split, part in slices.items()}

    def read(self, name, numbers):
        return [read_grey_png(self.files.read(name, MAX_SLICE_BYTES))], set()


class ImageSource(Source):
    """A folder or a zip of PNG, JPEG, TIFF and BMP images of any size, depth and colour."""
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
    formats = ("PNG", "JPEG", "TIFF", "BMP")    # as Pillow names them

    def slices_of(self, name, subject):
        """The one Slice of a file. Its slice index is the last number in the file's name, 0 if there is none."""
        numbers = re.findall("[0-9]+", re.split(r"[/\\]", name)[-1].rsplit(".", 1)[0])
        return [Slice(subject, int(numbers[-1]) if numbers else 0, name)]

    def read(self, name, numbers):
        """Read an image file. Return ([the image, uint8 (H, H)], a set of texts that name its conversions).

        numbers: not used, since a file has one image.
        Raises OasisError for a file of 128 MiB or more, an image of more than 8192 pixels a side, a TIFF with several
        images, and colour or transparency of 16 bits, of which Pillow reads 8.
        """
        data = self.files.read(name, MAX_BYTES)
        if len(data) == MAX_BYTES:
            raise OasisError(f"is too large: an image file must be smaller than {MAX_BYTES // 2**20} MiB")
        try:
            image = Image.open(io.BytesIO(data), formats=self.formats)
        except UnidentifiedImageError:
            raise OasisError(f"is not an image of these kinds: {', '.join(self.formats)}") from None
        with image:
            if max(image.size) > MAX_SIDE:
                raise OasisError(f"is {image.width}×{image.height}, more than {MAX_SIDE} pixels a side")
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                raise OasisError(f"holds {image.n_frames} images: save each as a file of its own")
            bits = data[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(258, [8]))
            if bits > 8 and not image.mode.startswith(("I", "F")):
                raise OasisError(f"holds {bits} bits a channel: save it as 16-bit grey, or with 8 bits a channel")
            turned = image.getexif().get(0x0112, 1) in range(2, 9)  # the tag Orientation
            grey, conversions = to_grey(ImageOps.exif_transpose(image))
        square, padded = pad_to_square(grey)
        return [square], conversions | padded | ({"rotated as their EXIF data say"} if turned else set())


class ArraySource(Source):
    """One .npy file, an array uint8 (N, H, W) or (N, H, W, 1). Each image is a subject; the last tenth validates."""
    suffixes = (".npy",)

    def divide(self):
        [name] = [name for name in self.files.names if name.lower().endswith(self.suffixes)]
        with naming(self.files.location(name), "Save images 0 … 255 as an .npy uint8 (N, H, W) or (N, H, W, 1)."):
            if isinstance(self.files, Zip):
                raise OasisError("is in a zip or an .npz: unpack it, or save it with numpy.save")
            try:
                self.array = np.load(name, mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise OasisError(f"cannot be read as an array of numbers ({first_line(error)})") from error
            shape = self.array.shape
            one_image = len(shape) == 3 and shape[2] <= 4   # (H, W, channels)
            if self.array.dtype != np.uint8 or len(shape) < 3 or shape[3:] not in ((), (1,)) or 0 in shape or one_image:
                raise OasisError(f"holds {self.array.dtype} {shape} instead of uint8 (N, H, W)")
        slices = [Slice(str(row), row, name) for row in range(shape[0])]
        validation = last_tenth(slices)
        splits = {"train": slices[:len(slices) - len(validation)], "validate": validation}
        self.report = self.describe(splits, "by row", {})
        return splits

    def read(self, name, numbers):
        squares = [pad_to_square(self.array[row].reshape(self.array.shape[1:3])) for row in numbers]
        return [square for square, _ in squares], squares[0][1]


class VolumeSource(Source):
    """NIfTI and Analyze volumes, read by nibabel, cut into slices.

    In an axial slice, the front of the head is at the top of the image, and the left of the body is on the left. In a
    coronal slice, the top of the head is at the top, and the left of the body is on the left. In a sagittal slice, the
    top of the head is at the top, and the front is on the right. In each volume, the smallest voxel becomes 0, the
    99.9th percentile becomes 255, and brighter voxels are clipped.
    """
    suffixes = (".nii", ".nii.gz", ".hdr")  # the voxels of an .hdr are in the .img beside it
    threads = 2                             # a volume takes some hundred megabytes while it is read

    def __init__(self, path, files, reading):
        super().__init__(path, files, reading)
        self.axis, self.noun = AXES.index(reading.axis), f"{reading.axis} slices"
        self.geometry = dict(axes=("IAR", "IRA", "PRS")[self.axis], side=None, step=None)
        self.sizes = collections.Counter()  # {(side, step): number of volumes}; the geometry has the most frequent one
        if isinstance(files, Zip):
            raise OasisError(f"{path}: holds volumes, which are not read from a zip. Unpack it and name the folder.")
        try:
            import nibabel
        except ImportError as error:
            raise OasisError(f"{path}: to read volumes, run pip install -r requirements-volumes.txt "
                             f"({error})") from error
        self.nibabel = nibabel

    def open(self, name):
        """Return (nibabel's image, the orientation of its axes, the size of its voxels in mm along AXES) of a file.

        Raises OasisError if its voxels are no numbers or missing, or if its affine gives no orientation.
        """
        volume = self.nibabel.load(name)
        if volume.get_data_dtype().kind not in "iuf":
            raise OasisError(f"holds {volume.get_data_dtype()}, not grey values")
        if 0 in volume.shape:
            raise OasisError("has no voxels")
        if not np.isfinite(volume.affine).all():
            raise OasisError("has NaN or infinity in its affine, so its orientation is unknown")
        orientation = self.nibabel.io_orientation(volume.affine)
        if np.isnan(orientation).any():
            raise OasisError("has a singular affine, so its orientation is unknown")
        return volume, orientation, self.nibabel.affines.voxel_sizes(volume.affine)[np.argsort(orientation[:, 0])]

    def slices_of(self, name, subject):
        """The Slices that --slices and --axis select from a file. Counts its size for self.geometry."""
        try:
            with naming(name, "" if self.reading.skip_unreadable else self.advice):
                volume, orientation, mm = self.open(name)
                if len(volume.shape) < 3 or np.prod(volume.shape[3:]) != 1:
                    self.left_out += 1
                    return []
        except OasisError as error:
            if not self.reading.skip_unreadable:
                raise
            self.unreadable[name] = str(error)
            return []
        voxels = np.array(volume.shape)[np.argsort(orientation[:, 0])]
        count = int(voxels[self.axis])
        side, step = np.delete(voxels * mm, self.axis).max(), mm[self.axis]
        self.sizes[round(float(side), 3), round(float(step), 3)] += 1
        self.geometry["side"], self.geometry["step"] = self.sizes.most_common(1)[0][0]
        chosen = chosen_range(self.reading.slices, count)
        if not chosen:
            raise OasisError(f"{name}: has {count} {self.noun}, none of them in --slices {self.reading.slices}. Choose "
                             "other slices, or remove this file.")
        return [Slice(subject, number, name) for number in chosen]

    def read(self, name, numbers):
        """Read slices from a volume. numbers: their slice indices.

        Return (a list of slices, uint8 (H, H) each, and a set of texts that name the conversions of these slices).
        """
        volume, orientation, mm = self.open(name)
        voxels = np.asarray(volume.dataobj, np.float32).reshape(volume.shape[:3])
        finite = voxels[np.isfinite(voxels)]
        low, high = (float(finite.min()), float(np.percentile(finite, BRIGHTEST))) if finite.size else (0.0, 0.0)
        if not low < high:
            raise OasisError("holds no image: nearly all of its voxels are equal")
        conversions = set() if finite.size == voxels.size else {"NaN and infinity became black"}
        voxels = np.nan_to_num(voxels, nan=low, posinf=low, neginf=low)
        voxels = np.moveaxis(self.nibabel.apply_orientation(voxels, orientation), self.axis, 0)[numbers].astype(float)
        grey = np.rint(np.clip((voxels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        width, height = np.delete(mm, self.axis)
        squares = [pad_to_square(square_pixels(image.T[::-1], height, width)) for image in grey]
        if not np.isclose(width, height, rtol=0.01):
            conversions.add("resampled to square pixels")
        return [square for square, _ in squares], conversions | squares[0][1]

    def stamp(self, names):
        return self.files.stamp(dict.fromkeys([*names, *(str(partner(Path(name), ".img")) for name in names)]))
