"""oasis/sources.py: folders, zips, arrays and volumes become training and validation images of subjects."""
import itertools

import numpy as np
import pytest

from dataset import list_slices, load_slices, load_split, slice_subjects
from helpers import refused, slice_pixels, write_images, write_volume, zip_folder
from oasis.files import OasisError
from oasis.pixels import load_samples, pad_to_square
from oasis.sources import AXES, chosen_range, slice_range
from oasis.subjects import find_subjects, is_label, split_of

pytestmark = pytest.mark.usefixtures("cache")
GREY = slice_pixels(1, 1, 16)


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


def test_the_cache_keeps_the_slices_along_each_axis_apart(tmp_path):
    path = write_volume(tmp_path / "a.nii", np.random.default_rng(0).uniform(size=(8, 8, 8)).astype(np.float32))
    images = {axis: load_slices(path, image_size=8, axis=axis) for axis in AXES}
    for one, other in itertools.combinations(AXES, 2):
        assert np.any(images[one] != images[other])
    for axis in AXES:
        np.testing.assert_array_equal(load_slices(path, image_size=8, axis=axis), images[axis])


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
