"""oasis/sources.py and oasis/archives.py: files that cannot be read, and folders that do not say what to read, are
refused in one line."""
import io
import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from dataset import list_slices, load_slices, load_split, print_report, slice_subjects
from helpers import refused, set_later, slice_pixels, write_images, write_slices, write_volume, zip_folder

pytestmark = pytest.mark.usefixtures("cache")


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
        path.rename(tmp_path / "A.HDR")
        path.with_suffix(".img").rename(tmp_path / "A.IMG")
        os.utime(tmp_path / "A.HDR", (0, 0))                    # the header alone seems to be the same
        set_later(tmp_path / "A.IMG", number)
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
