"""oasis/sources.py: images of every kind become the right grey squares, or are refused in one line."""
import io
import os
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset import list_slices, load_slices, load_split, print_report, slice_subjects
from helpers import slice_pixels, write_image, write_slices, write_volume, zip_folder
from oasis.files import OasisError
from oasis.pixels import load_samples, pad_to_square, to_grey
from oasis.sources import chosen_range, slice_range
from oasis.subjects import find_subjects, is_label, split_of

GREY = slice_pixels(1, 1, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))


def write_images(folder, names, pixels=None):
    """Write an image for each name, in the format of its suffix. pixels: of all images; None: different images."""
    for i, name in enumerate(names):
        write_image(folder / name, slice_pixels(i, 0, 16) if pixels is None else pixels)
    return folder


def refused(path, *words, **options):
    """Assert that load_split refuses the path in one line with all the words."""
    with pytest.raises(OasisError) as caught:
        load_split(path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def only_image(folder, size=16):
    """Return (the only image of a folder, uint8 (size, size); its conversions)."""
    split = load_split(folder, image_size=size)
    return split.images[0, :, :, 0], split.conversions


# ------------------------------------------------------------------------------------------------------------- pixels

@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "PNG"])
def test_every_lossless_format_gives_its_pixels(tmp_path, suffix):
    image, conversions = only_image(write_images(tmp_path / "data", [f"a.{suffix}"], GREY))
    assert np.array_equal(image, GREY) and conversions == {}


def test_a_jpeg_gives_the_pixels_that_pillow_decodes(tmp_path):
    path = write_images(tmp_path / "data", ["a.jpg"], GREY) / "a.jpg"
    assert np.array_equal(only_image(path.parent)[0], np.asarray(Image.open(path)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_a_grey_image_that_was_saved_as_colour_comes_back_exactly(tmp_path, mode):
    every_grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    suffix = "tif" if mode == "CMYK" else "png"
    (tmp_path / "data").mkdir()
    colour = Image.fromarray(every_grey).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    colour.save(tmp_path / "data" / f"a.{suffix}")
    image, conversions = only_image(tmp_path / "data")
    assert np.array_equal(image, every_grey) and conversions == ({} if mode == "LA" else {"colour became grey": 1})


def test_colours_become_the_luma_of_bt_601():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 200, 30]]], np.uint8)
    grey, _ = to_grey(Image.fromarray(colours))
    assert np.abs(grey[0] - colours[0] @ [0.299, 0.587, 0.114]).max() <= 0.5


def test_transparent_pixels_become_black():
    rgba = np.full((1, 3, 4), 200, np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    grey, conversions = to_grey(Image.fromarray(rgba))
    assert grey[0, 0] == 0 and abs(int(grey[0, 1]) - 100) <= 1 and grey[0, 2] == 200
    assert "transparent pixels became black" in conversions


@pytest.mark.parametrize("dtype, suffix", [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"),
                                           (np.float32, "tif")])
def test_deep_pixels_are_scaled_by_the_range_of_their_file(tmp_path, dtype, suffix):
    deep = (1000 + 7 * np.arange(256).reshape(16, 16)).astype(dtype)
    image, conversions = only_image(write_images(tmp_path / "data", [f"a.{suffix}"], deep))
    assert np.array_equal(image, np.arange(256).reshape(16, 16))
    assert conversions == {"16 bits or more became 8, by the range of each file": 1}


def png_of_16_bits(colour, channels):
    """The bytes of a PNG of 1×1 pixels of 16 bits, which Pillow does not write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, colour, 0, 0, 0)),
              (b"IDAT", zlib.compress(b"\0" + b"\1\2" * channels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)


def tiff_of_16_bits(channels):
    """The bytes of a TIFF of 1×1 pixels, RGB or grey, of 16 bits. Pillow does not write one in colour."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, channels, 122 if channels == 3 else 16), (259, 3, 1, 1),
            (262, 3, 1, 2 if channels == 3 else 1), (273, 4, 1, 128), (277, 3, 1, channels), (278, 3, 1, 1),
            (279, 4, 1, 2 * channels)]
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) +
            bytes(4) + struct.pack("<3H", 16, 16, 16) + b"\1\2" * channels)


@pytest.mark.parametrize("name, data, words", [
    ("a.png", png_of_16_bits(2, 3), "holds 16 bits a channel: save it as 16-bit grey"),
    ("a.png", png_of_16_bits(4, 2), "holds 16 bits a channel"), ("a.png", png_of_16_bits(6, 4), "16 bits a channel"),
    ("a.tif", tiff_of_16_bits(3), "holds 16 bits a channel"), ("a.png", png_of_16_bits(0, 1), None),
    ("a.tif", tiff_of_16_bits(1), None)],
    ids=["RGB PNG", "grey PNG with alpha", "RGBA PNG", "RGB TIFF", "grey PNG", "grey TIFF"])
def test_deep_colour_of_which_pillow_reads_8_bits_is_refused(tmp_path, name, data, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(data)
    if words:
        refused(tmp_path / "data", name, words)
    else:
        assert only_image(tmp_path / "data", 1)[0] == 0


def test_deep_pixels_of_one_value_become_black():
    assert not to_grey(Image.fromarray(np.full((2, 2), 500, np.uint16)))[0].any()


def test_exif_rotation_is_honoured(tmp_path):
    """With orientation 6, the rows of the file are the columns of the scene, from right to left."""
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "data" / "a.png", exif=exif)
    image, conversions = only_image(tmp_path / "data")
    assert np.array_equal(image, np.rot90(GREY, -1)) and conversions == {"rotated as their EXIF data say": 1}


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (5, 10), (9, 10), (3, 3)])
def test_padding_puts_the_image_in_the_middle_of_black(shape):
    image = np.full(shape, 9, np.uint8)
    square, conversions = pad_to_square(image)
    rows, columns = (np.flatnonzero(square.any(axis=axis)) for axis in (1, 0))
    for places, length in (rows, shape[0]), (columns, shape[1]):
        assert len(places) == length and 0 <= (len(square) - 1 - places[-1]) - places[0] <= 1
    assert square.shape == (max(shape),) * 2 and bool(conversions) == (shape[0] != shape[1])


def test_images_of_several_shapes_are_padded_then_averaged(tmp_path):
    wide = np.full((16, 32), 200, np.uint8)
    write_images(tmp_path / "data", ["wide.png"], wide)
    write_images(tmp_path / "data", ["large.png"], np.full((64, 64), 100, np.uint8))
    split = load_split(tmp_path / "data", "train", 8), load_split(tmp_path / "data", "validate", 8)
    images = {part.slices[0].subject: part.images[0, :, :, 0] for part in split}
    assert (images["large.png"] == 100).all()
    assert (images["wide.png"][2:6] == 200).all() and not images["wide.png"][[0, 1, 6, 7]].any()


# ----------------------------------------------------------------------------------------- splits, labels, subjects

@pytest.mark.parametrize("name, split", [
    ("train/a.png", "train"), ("x/Training/y/a.png", "train"), ("val/a.png", "validate"), ("valid/a.png", "validate"),
    ("validate/a.png", "validate"), ("Validation/a.png", "validate"), ("TEST/a.png", "test"), ("trained/a.png", None),
    ("train.png", None), ("a/test.png", None), ("train_images/a.png", "train"), ("Val-Images/p1/a.png", "validate"),
    ("images test/a.png", "test"), ("keras_png_slices_validate/case_001_slice_0.png", "validate"),
    ("training_data/val/a.png", "validate"), ("train_test_split/a.png", None), ("a_test_b/a.png", None),
    ("train_a.png", None), ("x/val_1.png", None)])
def test_folders_name_splits(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name, label", [
    ("masks/a.png", True), ("a_mask.png", True), ("FSL_SEG/a.hdr", True), ("x_fseg.png", True), ("labelsTr/a", True),
    ("a/brainmask.nii.gz", True), ("img_label.png", True), ("Segmentation/1.png", True), ("sub-1-seg.png", True),
    ("keras_png_slices_seg_train/case_001_slice_0.png", True), ("keras_png_slices_train/case_001_slice_0.png", False),
    ("OAS1_0001_t88_masked_gfc.hdr", False), ("imagesTr/a.nii", False), ("a.png", False), ("segmented/a.png", False)])
def test_labels_and_masks_are_known_by_their_names(name, label):
    assert is_label(name) == label


@pytest.mark.parametrize("paths, subjects, how", [
    (["demented/OAS1_0028_MR1_mpr-1_100.jpg", "OAS1_0028_MR2_mpr-1_101.jpg", "OAS1_0030_MR1_mpr-1_100.jpg"],
     ["OAS1_0028", "OAS1_0028", "OAS1_0030"], "word"),
    (["oas1_0028_1.png", "OAS1_0028_2.png", "OAS1_28_3.png"], ["oas1_0028"] * 3, "word"),
    (["OAS30001_MR_d0129/1.png", "OAS30001_MR_d0757/1.png", "OAS30002_MR_d0001/1.png", "OAS42001_0129.png"],
     ["OAS30001", "OAS30001", "OAS30002", "OAS42001"], "word"),
    (["sub-A1/anat/x_1.png", "sub-A1/anat/x_2.png", "sub-2B/x.png"], ["sub-A1", "sub-A1", "sub-2B"], "word"),
    (["a/Patient 12/3.png", "a/Patient 13/3.png"], ["Patient 12", "Patient 13"], "word"),
    (["Patient_01/1.png", "later/patient-1/1.png"], ["Patient_01", "Patient_01"], "word"),
    (["sub-01/1.png", "sub-01/2.png", "template.png"], ["sub-01", "sub-01", "template.png"], "and by file"),
    (["sub-acute/1.png", "sub-old/1.png"], ["sub-acute/1.png", "sub-old/1.png"], "file"),
    (["001_S_01/2010-01/scan.nii", "001_S_01/2011-01/scan.nii", "002_S_01/2010-01/scan.nii"],
     ["001_S_01", "001_S_01", "002_S_01"], "folder"),
    (["train/p1/1.png", "val/p1/2.png", "train/p2/1.png"], ["p1", "p1", "p2"], "folder"),
    (["train_images/p1/1.png", "val_images/p1/2.png", "train_images/p2/1.png"], ["p1", "p1", "p2"], "folder"),
    (["train_001/1.png", "train_001/2.png", "train_002/1.png"], ["train_001", "train_001", "train_002"], "folder"),
    (["BraTS20_Training_001_slice_70.png", "BraTS20_Training_001_slice_71.png", "BraTS20_Training_002_slice_70.png"],
     ["BraTS20_Training_001", "BraTS20_Training_001", "BraTS20_Training_002"], "first 2 numbers"),
    (["T1_001_slice_70.png", "T1_001_slice_71.png", "T1_002_slice_70.png"], ["T1_001", "T1_001", "T1_002"],
     "first 2 numbers"),
    (["1-1-12-1.png", "1-1-12-2.png", "1-1-13-1.png"], ["1-1-12", "1-1-12", "1-1-13"], "first 3 numbers"),
    (["img12_1.png", "img12_2.png", "img13_1.png"], ["img12", "img12", "img13"], "first number"),
    (["p1/1.png", "p1/2.png", "p2/1.png"], ["p1", "p1", "p2"], "folder"),
    (["p1/slice_01_T1.png", "p1/slice_02_T1.png", "p2/slice_01_T1.png"], ["p1", "p1", "p2"], "folder"),
    (["visit1/p1_s1.png", "visit2/p1_s1.png", "visit1/p2_s1.png"], ["p1", "p1", "p2"], "first number"),
    ([*(f"p{k}_1.png" for k in range(5)), *(f"p{k}_2.png" for k in range(5)), "overview.png"],
     [*(f"p{k}" for k in range(5)), *(f"p{k}" for k in range(5)), "overview.png"], "number in their names and by file"),
    (["p1/1.png", *(f"p1/a{k}.png" for k in range(20)), "overview.png"],
     ["p1/1.png", *(f"p1/a{k}.png" for k in range(20)), "overview.png"], "file"),
    (["ill/1.png", "ill/2.png", "well/1.png"], ["ill/1.png", "ill/2.png", "well/1.png"], "file"),
    (["1.png", "2.png"], ["1.png", "2.png"], "file"),
    (["T1_12.nii", "T1_13.nii", "T1_14.nii"], ["T1_12.nii", "T1_13.nii", "T1_14.nii"], "file"),
    (["T1_1.nii", "T1_2.nii"], ["T1_1.nii", "T1_2.nii"], "file"),
    (["grid1.png", "grid2.png"], ["grid1.png", "grid2.png"], "file")])
def test_subjects_are_found_in_names_folders_or_files(paths, subjects, how):
    found, said = find_subjects(paths)
    assert [found[path] for path in paths] == subjects and how in said


def test_a_tenth_of_the_subjects_validates_and_no_subject_is_in_both(tmp_path):
    names = [f"OAS1_{subject:04}_MR1_{k}.png" for subject in range(30) for k in range(4)]
    data = write_images(tmp_path / "data", names)
    subjects = {split: slice_subjects(data, split) for split in ("train", "validate")}
    assert len(set(subjects["validate"])) == 3 and len(subjects["validate"]) == 12
    assert len(subjects["train"]) == 108 and not set(subjects["train"]) & set(subjects["validate"])
    report = load_split(data, image_size=16).report
    assert "120 images of 30 subjects" in report and "OAS1_0000" in report and "train 27, validate 3" in report
    moved = zip_folder(write_images(tmp_path / "other" / "nested", names).parent, tmp_path / "data.zip")
    assert slice_subjects(moved, "validate").tolist() == subjects["validate"].tolist()      # the path has no effect


def test_of_files_without_a_subject_the_last_tenth_validates(tmp_path):
    """Neighbouring slices of one head are then not spread over training and validation."""
    data = write_images(tmp_path / "data", [f"slice_{k}.png" for k in range(60)])
    assert [one.number for one in list_slices(data)] == list(range(54))
    assert [one.number for one in list_slices(data, "validate")] == list(range(54, 60))
    report = load_split(data, image_size=16).report
    assert "told apart by file (validating on the last tenth), such as slice_0.png (train 54, validate 6)" in report
    write_images(data, ["val/1.png"])
    assert "last tenth" not in load_split(data, image_size=16).report


def test_validation_images_of_one_folder_alone_are_a_warning(tmp_path):
    data = write_images(tmp_path / "data", [f"{kind}/{name}.png" for kind in ("cats", "dogs") for name in range(20)])
    assert "all validation images are from the folder dogs" in load_split(data, image_size=16).report
    write_images(data, [f"x{name}.png" for name in range(6)])
    assert "all validation images are in no folder. Make" in load_split(data, image_size=16).report
    write_images(data, ["train/cats/1.png", "train/dogs/2.png", "val/cats/3.png"])
    assert "from the folder" not in load_split(data, image_size=16).report


def test_images_of_other_formats_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.webp").touch()
    refused(tmp_path / "data", "holds no images of a format that is read, only", "a.webp. Name")
    write_images(tmp_path / "data", ["b.png"])
    assert "left out: 1 images of other formats" in load_split(tmp_path / "data", image_size=16).report


@pytest.mark.parametrize("pool", ["images", "zz"])
def test_splits_may_be_links_to_files_and_folders(tmp_path, pool):
    """Whatever the names of the folders, an image is read once, in the split of its link."""
    data = write_images(tmp_path / "data", [f"{pool}/{k}.png" for k in range(5)])
    write_images(data / pool / "more", ["5.png", "6.png"])
    for split, numbers in ("train", (0, 1, 2)), ("val", (3, 4)):
        (data / split).mkdir()
        for k in numbers:
            (data / split / f"{k}.png").symlink_to(f"../{pool}/{k}.png")
    (data / "test").symlink_to(f"{pool}/more")
    found = {split: [one.name for one in list_slices(data, split)] for split in ("train", "validate", "test")}
    assert found == {"train": [str(data / "train" / f"{k}.png") for k in (0, 1, 2)],
                     "validate": [str(data / "val" / f"{k}.png") for k in (3, 4)],
                     "test": [str(data / "test" / f"{k}.png") for k in (5, 6)]}


def test_published_folders_with_other_file_names_are_splits(tmp_path):
    data = write_images(tmp_path / "data", [f"keras_png_slices_{split}/case_{k:03}_slice_0.png" for split, k in (
        ("train", 1), ("train", 2), ("validate", 3), ("test", 4), ("seg_train", 5))])
    subjects = {split: slice_subjects(data, split).tolist() for split in ("train", "validate", "test")}
    assert subjects == {"train": ["case_001", "case_002"], "validate": ["case_003"], "test": ["case_004"]}


def test_a_new_subject_moves_at_most_one_other(tmp_path):
    data = write_images(tmp_path / "data", [f"sub-{subject}_1.png" for subject in range(20)])
    before = set(slice_subjects(data, "validate"))
    write_images(data, ["sub-20_1.png"])
    assert len(before) == 2 and len(before - set(slice_subjects(data, "validate"))) <= 1


def test_folders_of_splits_win_and_what_is_outside_is_left_out(tmp_path):
    data = write_images(tmp_path / "data", ["train/a1.png", "train/a2.png", "val/b1.png", "test/c1.png", "d1.png"])
    assert [one.name for one in list_slices(data)] == [str(data / "train" / name) for name in ("a1.png", "a2.png")]
    assert [len(list_slices(data, split)) for split in ("validate", "test")] == [1, 1]
    assert "left out: 1 files outside the folders of splits" in load_split(data, image_size=16).report


def test_without_a_folder_train_all_but_the_test_images_train_or_validate(tmp_path):
    data = write_images(tmp_path / "data", [*(f"sub-{k}.png" for k in range(10)), "test/sub-10.png"])
    assert [len(list_slices(data, split)) for split in ("train", "validate", "test")] == [9, 1, 1]


def test_labels_are_left_out_and_counted(tmp_path):
    data = write_images(tmp_path / "data", ["a.png", "b.png", "a_mask.png", "masks/b.png", "._a.png"])
    assert "2 images of 2 subjects" in (report := load_split(data, image_size=16).report)
    assert "left out: 2 labels and masks" in report
    data = write_images(tmp_path / "labels", ["seg/1.png"])
    refused(data, "holds no images but 1 labels or masks, such as seg/1.png")


def test_slices_are_sorted_by_the_values_of_their_numbers(tmp_path):
    data = write_images(tmp_path / "data", [f"sub-{s}_{k}.png" for s in (10, 9) for k in (10, 2)])
    slices = list_slices(data) + list_slices(data, "validate")
    assert sorted((one.subject, one.number) for one in slices) == [
        ("sub-10", 2), ("sub-10", 10), ("sub-9", 2), ("sub-9", 10)]
    for split in "train", "validate":
        numbers = [one.number for one in list_slices(data, split)]
        assert numbers == [2, 10]


# ------------------------------------------------------------------------------------------------------ kinds of input

def test_a_zip_and_a_folder_are_the_same(tmp_path):
    data = write_images(tmp_path / "data", [f"a/{k}.png" for k in range(5)] + ["b/9.bmp"])
    for split in "train", "validate":
        from_zip = load_slices(zip_folder(data, tmp_path / "data.zip"), split, 16)
        assert np.array_equal(from_zip, load_slices(data, split, 16)) and len(from_zip)


@pytest.mark.parametrize("shape", [(20, 8, 8), (20, 8, 8, 1), (20, 4, 8)])
def test_an_npy_holds_images(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    parts = [load_split(tmp_path / "images.npy", split, 8) for split in ("train", "validate")]
    assert [one.number for one in parts[1].slices] == [18, 19] and len(parts[0].images) == 18
    for part in parts:
        for image, one in zip(part.images, part.slices):
            square = pad_to_square(images[one.number].reshape(shape[1:3]))[0]
            assert np.array_equal(image[:, :, 0], square)


@pytest.mark.parametrize("array", [np.zeros((2, 8, 8)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8),
                                   np.zeros((8, 8, 3), np.uint8),
                                   np.zeros((0, 8, 8), np.uint8), np.array([{}])])
def test_an_npy_of_something_else_is_refused(tmp_path, array):
    np.save(tmp_path / "images.npy", array, allow_pickle=True)
    refused(tmp_path / "images.npy", "images.npy", "as an .npy uint8 (N, H, W)")


def test_samples_are_grey_pngs_without_the_hidden_files_of_macos(tmp_path):
    write_images(tmp_path / "samples", ["a.png", "b.png"], GREY)
    (tmp_path / "samples" / "._a.png").write_bytes(b"not an image")
    assert np.array_equal(load_samples(tmp_path / "samples", 10)[..., 0], [GREY, GREY])


def test_samples_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "samples.npz", GREY)
    with pytest.raises(OasisError, match="samples.npz: is an .npz. Name an .npy with images"):
        load_samples(tmp_path / "samples.npz", 10)


@pytest.fixture
def voxels():
    """float32 (8, 10, 6) whose smallest value is 0 and whose 99.9th percentile is 255."""
    values = np.random.default_rng(0).integers(0, 256, (8, 10, 6)).astype(np.float32)
    values[0, 0, 0], values[1:, 0, 0] = 0, 255
    return values


@pytest.mark.parametrize("axes", ["RAS", "LPS", "ASR", "IPL"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_a_volume_do_not_depend_on_the_order_of_its_axes(tmp_path, voxels, axes, suffix):
    path = write_volume(tmp_path / f"a{suffix}", voxels, axes=axes)
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        planes = np.moveaxis(voxels, axis, 0)
        split = load_split(path, "train", max(planes.shape[1:]), axis=name)
        assert [one.number for one in split.slices] == list(range(len(planes)))
        for image, plane in zip(split.images[..., 0], planes):
            upright = plane.T[::-1]                     # rows from the top, or from the front, of the head down
            assert np.array_equal(image, np.rint(pad_to_square(upright)[0]))
        assert split.noun == f"{name} slices"


def test_the_front_of_the_head_is_at_the_top_and_its_left_on_the_left(tmp_path):
    voxels = np.zeros((8, 8, 2), np.float32)
    voxels[0, 7] = 100                                  # left, front
    image = load_slices(write_volume(tmp_path / "a.nii", voxels), image_size=8)[0, :, :, 0]
    assert np.argwhere(image).tolist() == [[0, 0]]


def test_an_analyze_pair_is_read_by_either_name_and_once(tmp_path, voxels):
    path = write_volume(tmp_path / "data" / "a.hdr", voxels, axes="LAS")
    images = load_slices(path, image_size=10)
    assert len(images) == 6 and images.any()
    for other in path.with_suffix(".img"), path.parent:
        assert np.array_equal(load_slices(other, image_size=10), images)


def test_voxels_are_scaled_from_their_least_to_their_99_9th_percentile(tmp_path):
    voxels = np.arange(-500, 500, dtype=np.float32).reshape(10, 10, 10)
    images = load_slices(write_volume(tmp_path / "a.nii", voxels), image_size=10)
    values = np.sort(images.ravel().astype(float))
    assert values[0] == 0 and values[-1] == 255
    assert np.abs(values - np.arange(1000) / 998.001 * 255).max() <= 0.51 + 255 / 998


def test_voxels_that_are_no_numbers_become_black(tmp_path, voxels):
    voxels[2, 3, 4], voxels[3, 3, 4] = np.nan, np.inf
    split = load_split(write_volume(tmp_path / "a.nii", voxels), "train", 10)
    assert split.conversions["NaN and infinity became black"] == 6
    square = split.images[4, :, :, 0]
    assert square[10 - 1 - 3, 1 + 2] == square[10 - 1 - 3, 1 + 3] == 0


def test_oblong_voxels_become_square_pixels(tmp_path, voxels):
    split = load_split(write_volume(tmp_path / "a.nii", voxels, zooms=(1, 1, 3)), "train", 18, axis="coronal")
    assert split.conversions["resampled to square pixels"] == 10
    filled = split.images[:, :, :, 0].any(axis=(0, 1))
    assert filled.sum() == 8                            # of 8 × 6 voxels of 1 × 3 mm: 8 columns, 18 rows


@pytest.mark.parametrize("axes", ["RAS", "LPS", "ASR", "IPL"])
@pytest.mark.parametrize("axis, side, step", [("sagittal", 20.0, 1.5), ("coronal", 18.0, 2.0), ("axial", 20.0, 3.0)])
def test_the_geometry_is_that_of_most_volumes(tmp_path, voxels, axes, axis, side, step):
    """The volumes have 8×10×6 voxels. The first and the last one are of another size."""
    for k, zooms in enumerate([(1, 1, 1), (1.5, 2, 3), (1.5, 2, 3), (4, 4, 4)]):
        write_volume(tmp_path / f"sub-{k}.nii", voxels, zooms=zooms, axes=axes)
    geometry = load_split(tmp_path, "train", 8, axis=axis).geometry
    assert (geometry["side"], geometry["step"]) == (side, step)


@pytest.mark.parametrize("text, count, indices", [
    ("", 5, [0, 1, 2, 3, 4]), ("1:4", 5, [1, 2, 3]), ("::2", 5, [0, 2, 4]), ("60:120:2", 70, [60, 62, 64, 66, 68]),
    ("-2:", 5, [3, 4]), (":2", 5, [0, 1]), ("3", 5, [3]), ("-1", 5, [4]), ("0", 5, [0]), ("7", 5, []),
    ("-9", 5, [])])
def test_slices_are_chosen_as_in_python(text, count, indices):
    assert list(chosen_range(slice_range(text), count)) == indices


@pytest.mark.parametrize("text", ["a", "1:2:0", "1:2:-1", "1,2", "1:2:3:4", " 1", "1.5"])
def test_other_texts_choose_no_slices(text):
    with pytest.raises(Exception, match="START:STOP"):
        slice_range(text)


def test_slices_and_axis_choose_and_name_the_slices(tmp_path, voxels):
    write_volume(tmp_path / "data" / "sub-1.nii", voxels)
    write_volume(tmp_path / "data" / "sub-2.nii.gz", voxels)
    parts = [load_split(tmp_path / "data", split, 10, slices="1:5:2", axis="sagittal")
             for split in ("train", "validate")]
    assert [[one.number for one in part.slices] for part in parts] == [[1, 3], [1, 3]]
    assert parts[0].description == "2 sagittal slices of 1 subjects"
    refused(tmp_path / "data", "has 6 axial slices", "--slices 9", slices="9")
    refused(write_images(tmp_path / "images", ["a.png"]), "for volumes only", slices="9")
    refused(tmp_path / "images", "for volumes only", axis="coronal")


# -------------------------------------------------------------------------------------------------------------- faults

def cut(data):
    return data[:len(data) // 2]


@pytest.mark.parametrize("name, damage, words", [
    ("a.png", cut, "truncated"), ("a.jpg", cut, "Truncated"), ("a.tif", cut, ""), ("a.bmp", cut, "truncated"),
    ("a.png", lambda data: b"", "is not an image of these kinds"), ("a.png", lambda data: b"text", "is not an image"),
    ("a.nii", cut, ""), ("a.nii.gz", cut, ""), ("a.nii", lambda data: b"", ""), ("a.hdr", cut, "")])
def test_one_unreadable_file_is_named_or_skipped(tmp_path, voxels, name, damage, words):
    """The other files can be read. With --skip-unreadable only they are read."""
    volume = name.endswith((".nii", ".nii.gz", ".hdr"))
    suffix = name.split(".", 1)[1]
    for k in range(5):
        path = tmp_path / "data" / f"sub-{k}.{suffix}"
        write_volume(path, voxels) if volume else write_images(path.parent, [path.name], slice_pixels(k, 0, 16))
    victim = tmp_path / "data" / f"sub-{list_slices(tmp_path / 'data')[-1].subject[4:]}.{suffix}"
    victim.write_bytes(damage(victim.read_bytes()))
    refused(tmp_path / "data", victim, words, "--skip-unreadable")
    for _ in range(2):                                  # the second time from the cache
        split = load_split(tmp_path / "data", "train", 16, skip_unreadable=True)
        [(file, error)] = split.unreadable.items()
        assert file == str(victim) and error.startswith(file) and "--skip-unreadable" not in error
        validating = set(slice_subjects(tmp_path / "data", "validate", skip_unreadable=True))
        assert {one.subject for one in split.slices} == {f"sub-{k}" for k in range(5)} - {victim.name.split(".")[0]} - \
            validating
        assert len(split.images) == len(split.slices) == 3 * (6 if volume else 1)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"text")
    refused(tmp_path / "data", "none of its 1 files can be read", "a.png", skip_unreadable=True)


def test_a_link_that_leads_nowhere_is_named_or_skipped(tmp_path):
    data = write_images(tmp_path / "data", ["a.png", "b.png", "c.png"])
    victim = data / f"{list_slices(data)[0].subject}"
    victim.unlink()
    victim.symlink_to(tmp_path / "gone")
    refused(data, victim, "No such file", "--skip-unreadable")
    assert list(load_split(data, "train", 16, skip_unreadable=True).unreadable) == [str(victim)]


def test_links_and_hidden_folders_do_not_double_an_image(tmp_path):
    """Examples: git-annex, whose files are links into a hidden folder, and a folder that contains a link to itself."""
    hidden = write_images(tmp_path / "data", [f".annex/{k}.png" for k in range(4)]) / ".annex"
    write_images(tmp_path / "data", ["plain.png", ".ipynb_checkpoints/plain-checkpoint.png", "__MACOSX/plain.png"])
    for k in range(4):
        (tmp_path / "data" / f"img{k}.png").symlink_to(hidden / f"{k}.png")
    for name in "self", "again":
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    found = [one.name for split in ("train", "validate") for one in list_slices(tmp_path / "data", split)]
    names = [*(f"img{k}.png" for k in range(4)), "plain.png"]
    assert sorted(found) == [str(tmp_path / "data" / name) for name in names]


def test_names_that_are_not_utf_8_are_read_and_printed(tmp_path, capsys):
    write_images(tmp_path / "data", [f"patient{k}.png" for k in range(12)])
    (tmp_path / "data" / "patient3.png").rename(os.fsdecode(os.fsencode(tmp_path / "data") + b"/Gr\xfc\xdfe\n3.png"))
    os.truncate(tmp_path / "data" / "patient4.png", 50)
    splits = [load_split(tmp_path / "data", split, 16, skip_unreadable=True) for split in ("train", "validate")]
    print_report(*splits)
    lines = capsys.readouterr().out.encode().splitlines()          # encode() fails if a surrogate is left
    assert len(lines) == 2 and b"12 images of 12 subjects" in lines[0] and b"patient4.png" in lines[1]
    os.truncate(splits[0].slices[0].name, 50)
    refused(tmp_path / "data", "--skip-unreadable")


@pytest.mark.parametrize("count, last", [(10, "left out: /sub-9.png"), (12, "left out: … and 2 more")])
def test_of_many_unreadable_files_the_first_ten_are_printed(tmp_path, capsys, count, last):
    split = load_split(write_images(tmp_path / "data", ["a.png"]), image_size=16)
    print_report(split._replace(unreadable={str(k): f"/sub-{k}.png" for k in range(count)}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert lines[:10] == [f"left out: /sub-{k}.png" for k in range(10)] and lines[-1] == last and len(lines) <= 11


def test_a_line_break_in_a_name_is_printed_in_one_line(tmp_path):
    write_images(tmp_path / "data", ["a\nb.png"])
    (tmp_path / "data" / "a\nb.png").write_bytes(b"text")
    refused(tmp_path / "data", "a\\nb.png", "is not an image")


def test_subjects_on_both_sides_and_few_subjects_are_warnings(tmp_path):
    names = [f"{split}/patient{k}_{split}.png" for k in range(12) for split in ("train", "val")]
    data = write_images(tmp_path / "data", names)
    report = load_split(data, image_size=16).report
    assert "warning: 12 subjects are in more than one split, such as patient0" in report
    others = write_images(tmp_path / "others", ["val/patient7_1.png", "test/patient7_2.png", "train/patient8.png"])
    report = load_split(others, image_size=16).report
    assert "warning: 1 subjects are in more than one split, such as patient7" in report
    few = write_images(tmp_path / "few", ["T1_1.png", "T1_2.png", "T2_1.png", "T2_2.png"])
    assert "warning: few subjects" in load_split(few, image_size=16).report


def test_volumes_among_figures_are_read_if_slices_are_asked_for(tmp_path, voxels):
    for k in range(3):
        write_volume(tmp_path / "data" / f"sub-{k}" / "anat" / f"sub-{k}_T1w.nii", voxels)
    write_volume(tmp_path / "data" / "sub-0" / "func" / "sub-0_bold.nii", np.stack([voxels] * 2, axis=-1))
    write_images(tmp_path / "data", ["figures/plot.png"])
    refused(tmp_path / "data", "plot.png", "T1w.nii", "--slices :")
    split = load_split(tmp_path / "data", image_size=10, slices=":")
    assert len(split.images) == 12 and "left out: 1 files that are not three-dimensional" in split.report


def test_arrays_are_read_one_at_a_time_and_not_from_a_zip(tmp_path):
    for name in "a", "b":
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / f"{name}.npy", np.zeros((20, 8, 8), np.uint8))
    refused(tmp_path / "data", "holds 2 arrays", "a.npy")
    (tmp_path / "data" / "b.npy").unlink()
    (tmp_path / "data" / "README.txt").write_text("one array")
    assert len(load_slices(tmp_path / "data", image_size=8)) == 18
    refused(zip_folder(tmp_path / "data", tmp_path / "data.zip"), "a.npy", "unpack it")


def test_upper_case_analyze_is_read_anew_when_its_voxels_change(tmp_path, voxels):
    for number in 1, 2:
        path = write_volume(tmp_path / "a.hdr", np.roll(voxels, number, axis=0), axes="LAS")
        time.sleep(0.02)                                        # the times of files are coarse
        path.rename(tmp_path / "A.HDR")
        path.with_suffix(".img").rename(tmp_path / "A.IMG")
        images = load_slices(tmp_path / "A.IMG", image_size=10)
        assert images[0, 0, 1 + (4 + number) % 8, 0] == voxels[4, 9, 0]


def test_a_volume_of_any_range_is_scaled(tmp_path, voxels):
    huge = np.where(voxels > 128, 3e38, -3e38).astype(np.float32)
    images = load_slices(write_volume(tmp_path / "a.nii", huge), image_size=10)[..., 0]
    np.testing.assert_array_equal(images[:, :, 1:9] == 255, np.moveaxis(voxels > 128, 2, 0).transpose(0, 2, 1)[:, ::-1])


def test_a_pile_of_pages_is_refused(tmp_path):
    pages = [Image.fromarray(slice_pixels(1, k, 16)) for k in range(3)]
    (tmp_path / "data").mkdir()
    pages[0].save(tmp_path / "data" / "a.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "data", "a.tif", "holds 3 images")


def test_paths_without_images(tmp_path, voxels):
    refused(tmp_path / "none", "none", "No such file", "--path", "--demo")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images", "PNG", "NIfTI", "keras_png_slices_train")
    write_volume(tmp_path / "both" / "a.nii", voxels)
    refused(write_images(tmp_path / "both", ["b.png"]), "a.nii", "b.png", "only one of the two")
    write_volume(tmp_path / "volumes" / "a.nii", voxels)
    refused(zip_folder(tmp_path / "volumes", tmp_path / "volumes.zip"), "Unpack it")
    refused(tmp_path / "volumes", "'validate'", "It has: train", split="validate")
    write_volume(tmp_path / "4d.nii", np.stack([voxels] * 3, axis=-1))
    refused(tmp_path / "4d.nii", "It has: none; left out: 1 files that are not three-dimensional.")
    write_volume(tmp_path / "colour.nii", np.zeros((8, 8, 8), np.complex64))
    refused(tmp_path / "colour.nii", "colour.nii", "complex64, not grey values")
    refused("", "--path: is empty. Name your images with --path")
    write_volume(tmp_path / "none.nii", np.zeros((8, 0, 6), np.float32))
    refused(tmp_path / "none.nii", "none.nii: has no voxels. Repair or remove")
    write_volume(tmp_path / "flat.nii", np.full((8, 8, 8), 5.0, np.float32))
    refused(tmp_path / "flat.nii", "flat.nii", "all of its voxels are equal")


@pytest.mark.parametrize("number, words", [(0.0, "has a singular affine"), (np.nan, "has NaN or infinity")])
def test_a_volume_without_an_orientation_is_refused(tmp_path, voxels, number, words):
    data = bytearray(write_volume(tmp_path / "a.nii", voxels).read_bytes())
    data[280:328] = struct.pack("<12f", *[number] * 12)         # the sform
    (tmp_path / "a.nii").write_bytes(data)
    refused(tmp_path / "a.nii", f"a.nii: {words}", "so its orientation is unknown. Repair or remove this file")


def test_a_volume_of_one_time_has_three_dimensions(tmp_path, voxels):
    """The volumes of OASIS are examples: (176, 208, 176, 1)."""
    assert np.array_equal(load_slices(write_volume(tmp_path / "4d.nii", voxels[..., None]), image_size=10),
                          load_slices(write_volume(tmp_path / "3d.nii", voxels), image_size=10))


def test_an_image_that_claims_to_be_huge_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "data").mkdir()
    file = io.BytesIO()
    Image.new("1", (9000, 10)).save(file, "PNG")
    (tmp_path / "data" / "a.png").write_bytes(file.getvalue())
    refused(tmp_path / "data", "a.png", "is 9000×10, more than 8192 pixels a side")


def test_without_nibabel_volumes_say_what_to_install(tmp_path, voxels, monkeypatch):
    path = write_volume(tmp_path / "a.nii", voxels)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    refused(path, "a.nii", "pip install -r requirements-volumes.txt")


def test_oasis_slices_win_over_other_images_beside_them(tmp_path):
    write_slices(tmp_path / "data")
    assert load_split(tmp_path / "data", image_size=16).report == ""                # the label maps are no news
    write_images(tmp_path / "data", ["photo.png", "more/photo.jpg"])
    assert slice_subjects(tmp_path / "data").tolist() == [1, 1, 1, 2, 2, 2, 5, 5, 5]
    assert load_split(tmp_path / "data", image_size=16).report == "left out: 2 other images"


def test_an_encrypted_image_in_a_zip_says_so(tmp_path):
    path = zip_folder(write_images(tmp_path / "data", ["a.png"]), tmp_path / "data.zip")
    data = bytearray(path.read_bytes())
    for header, flags in (b"PK\x03\x04", 6), (b"PK\x01\x02", 8):
        data[data.find(header) + flags] |= 1
    path.write_bytes(data)
    refused(path, "a.png", "encrypted")
