"""dataset.py: it finds the right slices and pixels, its cache is never wrong, and batches depend on (seed, k) alone."""
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset
import helpers
from dataset import list_slices, load_slices, make_dataset, slice_subjects, to_uint8
from helpers import image_file, png, set_later, slice_pixels, write_slices, zip_folder
from oasis.files import OasisError


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def decoded(monkeypatch):
    """A list that gets the number of slices whenever load_slices decodes slices instead of reading its cache."""
    counts, decode_slices = [], dataset.decode_slices
    monkeypatch.setattr(dataset, "decode_slices", lambda *args: counts.append(len(args[1])) or decode_slices(*args))
    return counts


def pixels_of(slices, size=16):
    return np.stack([slice_pixels(s.subject, s.number, size) for s in slices])[..., None]


def refused(path, *words, **kwargs):
    """Assert that load_slices refuses the path in one line with all the words, and writes nothing to the cache."""
    helpers.refused(path, *words, load=load_slices, **kwargs)
    assert not list(Path(os.environ["OASIS_CACHE"]).glob("*"))


# ------------------------------------------------------------------------------------------------------ which slices

def test_slices_are_sorted_by_subject_and_by_number_not_by_text(make_zip):
    path = make_zip(subjects=(12, 1, 5), slices=(0, 10, 2))
    assert [s[:2] for s in list_slices(path)] == [(s, k) for s in (1, 5, 12) for k in (0, 2, 10)]
    assert np.array_equal(load_slices(path, image_size=16), pixels_of(list_slices(path)))


@pytest.mark.parametrize("above", ["", "keras_png_slices_data", "a/b c/keras_png_slices_data"])
def test_zip_and_folder_are_the_same_whatever_lies_above(tmp_path, above):
    write_slices(tmp_path / "data" / above)
    from_zip = load_slices(zip_folder(tmp_path / "data", tmp_path / "data.zip"), image_size=16)
    assert np.array_equal(from_zip, load_slices(tmp_path / "data", image_size=16)) and len(from_zip) == 9
    assert np.array_equal(from_zip, load_slices(tmp_path / "data" / above / "keras_png_slices_train", image_size=16))


def test_only_slices_of_the_asked_split_are_found(tmp_path):
    """Label maps and the hidden files of macOS are left out."""
    inside = tmp_path / "data" / "keras_png_slices_data"
    write_slices(inside, subjects=(1,))
    write_slices(inside, subjects=(2, 3), split="validate")
    train = inside / "keras_png_slices_train"
    for name in ".DS_Store", "._case_001_slice_0.nii.png", "case_009_slice_0.nii.png.part", "seg_001_slice_9.nii.png":
        (train / name).write_bytes(b"not a slice")
    mac = tmp_path / "data" / "__MACOSX" / "keras_png_slices_train"
    mac.mkdir(parents=True)
    (mac / "case_001_slice_0.nii.png").write_bytes(b"not a slice")
    (inside / "keras_png_slices_seg_train" / "case_008_slice_0.nii.png").write_bytes(png(slice_pixels(8, 0, 16)))
    for path in tmp_path / "data", zip_folder(tmp_path / "data", tmp_path / "data.zip"):
        assert slice_subjects(path).tolist() == [1, 1, 1]
        assert slice_subjects(path, "validate").tolist() == [2, 2, 2, 3, 3, 3]
        assert load_slices(path, "validate").any(axis=(1, 2, 3)).all()           # the made-up label maps are black
        for split in "test", "seg_train":
            with pytest.raises(OasisError, match=f"'{split}'.*train, validate"):
                load_slices(path, split)


def test_a_member_twice_counts_once_and_a_copy_is_refused(make_zip):
    """If a zip holds one name twice, the last member counts. A copy is a file of the same name in another folder."""
    path = make_zip(subjects=(1,), slices=(0,))
    name = list_slices(path)[0].name
    new = slice_pixels(7, 7, 16)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(name, png(new))
    assert np.array_equal(load_slices(path, image_size=16)[..., 0], [new])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("copy/" + name, png(new))
    with pytest.raises(OasisError, match=f"twice.*{name}.*copy/{name}"):
        list_slices(path)


@pytest.mark.parametrize("limit", range(1, 14))
def test_limit_is_even_over_subjects_and_within_a_head(tmp_path, limit):
    write_slices(tmp_path, subjects=(1, 2, 9), slices=range(4), size=1)
    write_slices(tmp_path, subjects=(4,), slices=(3,), size=1)                    # a subject with one slice only
    slices = list_slices(tmp_path, limit=limit)
    counts = {s: sum(x.subject == s for x in slices) for s in (1, 2, 4, 9)}
    assert len(slices) == len(set(slices)) == min(limit, 13) and slices == sorted(slices)
    assert max(counts.values()) - min(counts[s] for s in (1, 2, 9)) <= 1          # the full heads get equal shares
    assert counts[4] == 1 or limit < 4
    assert np.array_equal(load_slices(tmp_path, image_size=1, limit=limit), pixels_of(slices, 1))


def test_few_slices_are_middles_of_heads_from_all_over(make_zip):
    path = make_zip(subjects=range(10, 20), slices=range(0, 10, 2), size=1)
    assert [s[:2] for s in list_slices(path, limit=1)] == [(15, 4)]
    assert [s[:2] for s in list_slices(path, limit=2)] == [(12, 4), (17, 4)]
    assert [s.number for s in list_slices(path, limit=20)] == [2, 6] * 10


@pytest.mark.parametrize("limit, words", [
    (5, "training on 5 of 12 slices: --number-of-samples 0 takes all\n"), (12, ""), (None, ""),
    (13, "holds 12 training slices, not 13: training on all\n")])
def test_training_says_how_many_images_are_left_out(make_zip, capsys, limit, words):
    dataset.load_training(make_zip(subjects=range(4), slices=range(3), size=1), 1, limit, None)
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert "".join(line for line in lines if "training on" in line).endswith(words)
    assert any("training on" in line for line in lines) == bool(words)


def test_validation_files_that_cannot_be_read_mean_no_validation_loss(tmp_path, capsys):
    """Training files that cannot be read are an error."""
    for split in "train", "validate":
        write_slices(tmp_path / "data", subjects=(1,), split=split)
    bad = sorted((tmp_path / "data" / "keras_png_slices_validate").iterdir())
    for file in bad:
        file.write_bytes(b"not a slice")
    training, validation = dataset.load_training(tmp_path / "data", 16, None, None, skip_unreadable=True)
    assert len(training.images) == 3 and validation is None
    assert f"no validation loss: {tmp_path / 'data'}: none of its 3 files can be read. The first error: {bad[0]}" in \
        capsys.readouterr().out
    bad[0].parent.rename(tmp_path / "validate")
    dataset.load_training(tmp_path / "data", 16, None, None)
    assert f"no validation loss: {tmp_path / 'data'}: holds no slices of split 'validate'" in capsys.readouterr().out
    (tmp_path / "validate").rename(tmp_path / "keras_png_slices_train")
    with pytest.raises(OasisError, match="none of its 3 files can be read"):
        dataset.load_training(tmp_path / "keras_png_slices_train", 16, None, None, skip_unreadable=True)


# ----------------------------------------------------------------------------------------------------------- pixels

def test_pixels_at_the_size_of_the_file_are_those_of_the_file(make_zip):
    path = make_zip(size=256, subjects=(1,), slices=(0, 1))
    images = load_slices(path, image_size=256)
    assert images.dtype == np.uint8 and np.array_equal(images, pixels_of(list_slices(path), 256))


def test_slices_of_several_sizes_are_resized(tmp_path):
    write_slices(tmp_path, subjects=(1,), size=32)
    write_slices(tmp_path, subjects=(2,), size=16)
    images = load_slices(tmp_path, image_size=16)
    assert np.array_equal(images[3:], pixels_of(list_slices(tmp_path)[3:]))
    mean = pixels_of(list_slices(tmp_path)[:3], 32).reshape(3, 16, 2, 16, 2, 1).mean(axis=(2, 4))
    assert np.abs(images[:3] - mean).max() <= 0.5


def test_shrinking_is_the_average_of_the_area_rounded_once(make_zip):
    path = make_zip(size=256, subjects=(1,), slices=(0, 1))
    mean = pixels_of(list_slices(path), 256).reshape(2, 64, 4, 64, 4, 1).mean(axis=(2, 4))
    assert np.abs(load_slices(path, image_size=64) - mean).max() <= 0.5


def test_uneven_shrinking_is_closer_to_the_area_than_box():
    old, new, pixels = 64, 24, slice_pixels(0, 0, 64)
    edges, pixel = np.arange(new + 1)[:, None] * old / new, np.arange(old)
    overlap = np.clip(np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel), 0, None) * new / old
    area = overlap @ pixels @ overlap.T
    box = Image.fromarray(pixels).resize((new, new), Image.Resampling.BOX)
    assert np.abs(dataset.resize(pixels, new) - area).mean() < 0.8 * np.abs(np.asarray(box) - area).mean()


def test_enlarging_draws_a_smooth_curve_and_no_steps():
    def waves(size):
        x = (np.arange(size) + 0.5) / size * 8
        return 127.5 + 100 * np.sin(x)[:, None] * np.cos(x)
    large = dataset.resize(np.rint(waves(32)).astype(np.uint8), 64)
    assert np.abs(large - waves(64))[4:-4, 4:-4].max() < 2


# ------------------------------------------------------------------------------------------------------------ cache

def test_a_second_load_comes_from_the_cache_and_is_the_same(make_zip, decoded):
    path = make_zip()
    assert np.array_equal(load_slices(path), load_slices(path)) and decoded == [9]


def test_another_split_size_limit_or_place_is_another_entry(make_zip, tmp_path, decoded):
    make_zip(split="validate")
    path = make_zip()
    asked = [{}, {"split": "validate"}, {"image_size": 8}, {"limit": 4}]
    shapes = [load_slices(path, **what).shape for what in asked * 2]
    assert shapes == [(9, 64, 64, 1), (9, 64, 64, 1), (9, 8, 8, 1), (4, 64, 64, 1)] * 2 and len(decoded) == 4
    load_slices(tmp_path / "unpacked")
    assert len(decoded) == 5


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_new_pixels_under_the_same_name_are_read_anew(tmp_path, make_zip, kind):
    zipped, folder = make_zip(subjects=(1,), slices=(0,)), tmp_path / "unpacked"
    path = zipped if kind == "zip" else folder
    load_slices(path, image_size=16)
    changed = next(folder.rglob("case_001_slice_0.nii.png"))
    changed.write_bytes(png(slice_pixels(9, 9, 16)))
    zip_folder(folder, zipped)
    set_later(changed if kind == "folder" else zipped)
    assert np.array_equal(load_slices(path, image_size=16)[0, :, :, 0], slice_pixels(9, 9, 16))


@pytest.mark.parametrize("where", [0, 9, 30, 70, 128, 200, 600, -200, -5, -1])
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_cache_is_silently_rebuilt(make_zip, cache, decoded, capsys, where, how):
    """A changed byte 9 (in the date) or last byte is harmless. The cache is then used."""
    path = make_zip(subjects=(1,))
    images = load_slices(path, image_size=16)
    [entry] = cache.iterdir()
    data = bytearray(entry.read_bytes())
    data[where] ^= 4
    entry.write_bytes(data if how == "flip" else data[:where])
    for _ in range(2):
        assert np.array_equal(load_slices(path, image_size=16), images)
    assert decoded == ([3] if how == "flip" and where in (9, -1) else [3, 3]) and not any(capsys.readouterr())


def test_a_cache_that_cannot_be_written_costs_one_line(make_zip, tmp_path, monkeypatch, capsys):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "a file" / "cache"))
    assert len(load_slices(make_zip())) == 9
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "a file" in warning


# -------------------------------------------------------------------------------------------------------- bad input

def test_paths_that_are_no_data(tmp_path, make_zip):
    refused(tmp_path / "none.zip", "none.zip", "No such file")
    for data in b"", b"<html>not found</html>":
        (tmp_path / "page.zip").write_bytes(data)
        refused(tmp_path / "page.zip", "page.zip: is not a zip")
    refused(zip_folder(tmp_path / "nothing", tmp_path / "empty.zip"), "empty.zip", "holds no images")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "holds no images")
    path = make_zip()
    refused(path, "'test'", "train", split="test")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_zip_is_called_that(make_zip, part):
    path = make_zip()
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    refused(path, path, "end is missing")


def test_a_flipped_bit_in_a_zip_names_the_slice(make_zip):
    path = make_zip()
    data, victim = bytearray(path.read_bytes()), png(slice_pixels(2, 10, 16))
    data[data.index(victim) + len(victim) // 2] ^= 1
    path.write_bytes(data)
    refused(path, path, "case_002_slice_10.nii.png", "CRC")


def test_an_encrypted_zip_says_so(make_zip):
    path = make_zip(subjects=(1,), slices=(0,))
    data = bytearray(path.read_bytes())
    for header, flags in (b"PK\x03\x04", 6), (b"PK\x01\x02", 8):
        place = data.find(header)
        while place >= 0:
            data[place + flags] |= 1
            place = data.find(header, place + 1)
    path.write_bytes(data)
    refused(path, "case_001_slice_0.nii.png", "encrypted")


GREY = slice_pixels(1, 1, 16)
HUGE = bytearray(png(GREY))
HUGE[16:24] = (60000).to_bytes(4, "big") * 2
BAD_SLICES = {
    "empty": (b"", "not a PNG"),
    "text": (b"x" * 1000, "not a PNG"),
    "jpeg": (image_file(Image.fromarray(GREY), "JPEG"), "not a PNG"),
    "cut in the header": (png(GREY)[:20], "not a PNG"),
    "cut in the pixels": (png(GREY)[:150], "case_002"),
    "16 bit": (png(GREY.astype(np.uint16)), "16-bit grey"),
    "1 bit": (image_file(Image.fromarray(GREY).convert("1")), "1-bit grey"),
    "rgb": (image_file(Image.fromarray(GREY).convert("RGB")), "8-bit RGB"),
    "palette": (image_file(Image.fromarray(GREY).convert("P")), "palette"),
    "alpha": (image_file(Image.fromarray(GREY).convert("LA")), "alpha"),
    "not square": (png(GREY[:8]), "16×8"),
    "bomb": (bytes(HUGE), "60000×60000", "not within 4096"),
}


@pytest.mark.parametrize("bad", BAD_SLICES)
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_slice_of_another_kind_is_refused_by_name(tmp_path, kind, bad):
    data, *words = BAD_SLICES[bad]
    write_slices(tmp_path / "data")
    (tmp_path / "data" / "keras_png_slices_train" / "case_002_slice_2.nii.png").write_bytes(data)
    path = tmp_path / "data" if kind == "folder" else zip_folder(tmp_path / "data", tmp_path / "data.zip")
    refused(path, path, "case_002_slice_2.nii.png: ", *words)


def test_a_slice_that_cannot_be_read_is_refused_by_name(tmp_path):
    write_slices(tmp_path)
    file = tmp_path / "keras_png_slices_train" / "case_002_slice_2.nii.png"
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    refused(tmp_path, "case_002_slice_2.nii.png", "No such file")


def test_a_folder_that_cannot_be_entered_is_not_passed_over(tmp_path, monkeypatch):
    write_slices(tmp_path)
    write_slices(tmp_path, split="validate")
    scandir = os.scandir

    def forbid(folder):
        if str(folder).endswith("keras_png_slices_train"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", forbid)
    refused(tmp_path, tmp_path, "Permission denied")


# ---------------------------------------------------------------------------------------------------------- batches

def numbered(count):
    """Images that identify themselves: all pixels of image i are i."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)


def rows(count, batch_size, seed, steps, start_step=0):
    """The numbers of the images in the batches: int (steps, batch_size)."""
    batches = make_dataset(numbered(count), batch_size, seed, start_step).take(steps)
    return np.stack([to_uint8(batch)[:, 0, 0, 0] for batch in batches])


@pytest.mark.parametrize("count, batch_size", [(12, 4), (10, 4), (3, 7), (1, 3), (2, 1)])
def test_every_image_comes_once_an_epoch(count, batch_size):
    """This holds also if a batch contains images of two epochs."""
    epochs = rows(count, batch_size, 5, 3 * count).reshape(-1, count)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(count), (3 * batch_size, 1)))


def test_a_batch_is_a_function_of_seed_and_step():
    stream = rows(50, 8, 3, 30)
    assert np.array_equal(stream, rows(50, 8, 3, 30))
    for start in 1, 6, 7, 20:
        assert np.array_equal(stream[start:], rows(50, 8, 3, 30 - start, start))
    assert rows(50, 8, 3, 1, start_step=10**12).shape == (1, 8)                   # a late start takes no time


def test_every_epoch_and_every_64_bit_seed_has_its_own_order():
    epochs = rows(50, 50, 3, 20)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert not any((epoch == np.arange(50)).mean() > 0.2 for epoch in epochs)
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -2**63, -2**32]
    assert len({tuple(rows(50, 50, seed, 1)[0]) for seed in seeds}) == len(seeds)


def test_orders_of_epochs_do_not_resemble_each_other():
    count, epochs = 4832, 40
    bytes_of_number = np.arange(count, dtype=">u2").view(np.uint8).reshape(count, 1, 2, 1)
    batches = make_dataset(bytes_of_number, count, seed=0).take(epochs)
    orders = np.stack([to_uint8(batch).reshape(count, 2) @ [256, 1] for batch in batches])
    correlations = np.corrcoef(orders)[np.triu_indices(epochs, 1)]                # 780 pairs; r by chance: 0.0144
    assert correlations.std() < 1.2 / np.sqrt(count)


def test_batches_are_the_same_on_every_tensorflow():
    assert rows(10, 5, 7, 2).tolist() == [[3, 1, 5, 4, 9], [8, 0, 2, 6, 7]]


def test_labels_belong_to_their_images_in_every_batch():
    """Labels may have any shape and type. They do not change which images a batch holds."""
    count, batch_size, steps = 10, 4, 6
    images = numbered(count)
    for labels in (np.arange(count) * 3 + 7, np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)):
        pairs = make_dataset((images, labels), batch_size, 3, 2)
        assert pairs.element_spec[0].shape == (batch_size, 2, 2, 1)
        assert pairs.element_spec[1].shape == (batch_size, *labels.shape[1:])
        alone, epochs_seen = make_dataset(images, batch_size, 3, 2), set()
        for pair, batch in zip(pairs.take(steps), alone.take(steps)):
            assert isinstance(pair, tuple) and len(pair) == 2
            np.testing.assert_array_equal(pair[0], batch)
            numbers = to_uint8(pair[0])[:, 0, 0, 0]
            np.testing.assert_array_equal(pair[1], labels[numbers])
            assert pair[1].dtype == labels.dtype
            epochs_seen.update(numbers)
        assert epochs_seen == set(range(count))


def test_a_batch_is_float32_of_known_shape_in_minus_1_to_1():
    data = make_dataset(numbered(256), 256, 0)
    assert data.element_spec.shape == (256, 2, 2, 1) and data.element_spec.dtype == "float32"
    batch = next(iter(data)).numpy()
    assert batch.min() == -1 and batch.max() == 1
    assert np.array_equal(np.sort(to_uint8(batch)[:, 0, 0, 0]), np.arange(256))    # to_uint8 is the exact inverse


def test_to_uint8_rounds_clips_and_refuses_what_is_no_number():
    assert to_uint8([-7, -1, 1 / 255, 0.2 / 127.5, 1, 1.1]).tolist() == [0, 0, 128, 128, 255, 255]
    for bad in np.nan, np.inf, -np.inf:
        with pytest.raises(OasisError, match="NaN or infinite"):
            to_uint8([[0, bad]])
