"""predict.py: which model it takes, what it writes, and that an image depends on its seed alone."""
import os
import shutil
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageSequence

import predict
from helpers import PROGRAMS, ROOT, run_in_new_process, write_small_model
from modules import GaussianDiffusion, load_model
from oasis import modelfile
from oasis.files import OasisError, image_grid
from oasis.generate import noise_label, noise_options
from oasis.modelfile import BUNDLED, find_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file with random parameters."""
    return write_small_model(tmp_path_factory.mktemp("run") / "oasis16" / "model.safetensors", dim_mults=(1,))


def predict_into(folder, model, *arguments):
    predict.main(["--model", str(model), "--gif-path", str(folder), "--precision", "float32", *arguments])
    return folder


def test_one_image_is_a_png_and_a_gif_that_ends_on_it(model, tmp_path, capsys):
    predict_into(tmp_path, model, "--seed", "7")
    assert {path.name for path in tmp_path.iterdir()} == {"oasis16_seed7.png", "oasis16_seed7.gif"}
    assert str(tmp_path / "oasis16_seed7.png") in capsys.readouterr().out
    image = Image.open(tmp_path / "oasis16_seed7.png")
    assert image.mode == "L" and image.size == (16, 16)
    with Image.open(tmp_path / "oasis16_seed7.gif") as gif:
        frames = [(np.asarray(frame.convert("L")), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert 45 <= len(frames) <= 60
    np.testing.assert_array_equal(frames[-1][0], np.asarray(image))
    assert frames[-1][1] == predict.LAST_FRAME_MS and frames[0][1] == predict.FRAME_MS
    noise = frames[0][0].astype(float)
    assert abs(noise.mean() - 127) < 12 and noise.std() > 60  # N(0, 1) clipped to [-1, 1]


def test_several_images_come_with_a_grid(model, tmp_path):
    """Each image depends on its seed alone."""
    more = ["--sampler", "ddim", "--frames", "0"]
    many = predict_into(tmp_path / "many", model, "--number-of-images", "5", "--batch-size", "2", *more)
    one = predict_into(tmp_path / "one", model, "--seed", "3", *more)
    images = [np.asarray(Image.open(many / f"oasis16_seed{seed}.png")).astype(int) for seed in range(5)]
    alone = np.asarray(Image.open(one / "oasis16_seed3.png")).astype(int)
    assert np.abs(images[3] - alone).max() <= 1
    assert np.abs(images[3] - images[2]).max() > 20
    grid = np.asarray(Image.open(many / "oasis16_seed0-4.png"))
    assert grid.shape == (32, 48)
    np.testing.assert_array_equal(grid[16:, :16], images[3])
    assert grid[16:, 32:].max() == 0


def test_samples_for_metrics_are_one_array_or_a_folder(model, tmp_path):
    arguments = ["--number-of-images", "3", "--sampler", "dpm", "--steps", "5"]
    predict_into(tmp_path, model, *arguments, "--samples", str(tmp_path / "out.npy"))
    predict_into(tmp_path, model, *arguments, "--samples", str(tmp_path / "out"))
    array = np.load(tmp_path / "out.npy")
    assert array.shape == (3, 16, 16, 1) and array.dtype == np.uint8
    for i, path in enumerate(sorted((tmp_path / "out").iterdir())):
        np.testing.assert_array_equal(array[i, :, :, 0], np.asarray(Image.open(path)))
    assert {path.name for path in tmp_path.iterdir()} == {"out.npy", "out"}


def test_samples_are_written_batch_by_batch(model, tmp_path):
    """The images of an interrupted call are kept in a folder. There is no half of an array."""
    def generated():
        yield np.full((2, 4, 4, 1), 7, np.uint8)
        raise KeyboardInterrupt
    for target in tmp_path / "out", tmp_path / "out.npy":
        with pytest.raises(KeyboardInterrupt):
            predict.write_samples(target, generated(), 4)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "out/00000.png", "out/00001.png"]


def test_ctrl_c_ends_the_sampler_in_the_next_step(model, tmp_path):
    """Python by itself would notice it only after all steps. The unfinished array is removed."""
    command = [sys.executable, str(PROGRAMS / "interrupted_sampler.py"), str(model), str(tmp_path / "out.npy")]
    done = run_in_new_process(command, cwd=ROOT)
    assert done.returncode == 130 and done.stdout.splitlines()[-1] == "interrupted in step 2"
    assert done.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_home_folder_may_be_called_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = predict.parse_flags(["--samples=~/a.npy", "--gif-path=~/gif", "--ckpt-path=~/runs", "--model=~/m"])
    assert [flags.samples, flags.gif_path, flags.ckpt_path, flags.model] == [
        str(tmp_path / name) for name in ("a.npy", "gif", "runs", "m")]


@pytest.mark.parametrize("sampler, flag, value", [
    ("dpm", "--eta", 0), ("dpm", "--noise-scale", 1.5), ("ddpm", "--variance", "large"), ("ddim", "--eta", 0.5)])
def test_the_flags_of_fresh_noise_reach_the_sampler(model, tmp_path, monkeypatch, sampler, flag, value):
    given = {}

    def sample(diffusion, network, shape, seeds, *arguments, **options):
        given.update(options, sampler=arguments[0])
        return tf.zeros(shape)
    monkeypatch.setattr(GaussianDiffusion, "sample", sample)
    predict_into(tmp_path, model, "--sampler", sampler, flag, str(value), "--samples", str(tmp_path / "out.npy"))
    assert given["sampler"] == sampler and given[flag.lstrip("-").replace("-", "_")] == value


@pytest.mark.parametrize("arguments, noise, label", [
    (["--sampler", "dpm"], {"eta": 1, "noise_scale": 1}, ""),
    (["--sampler", "dpm", "--noise-scale", "1.1"], {"eta": 1, "noise_scale": 1.1}, ", noise scale 1.1"),
    (["--sampler", "dpm", "--eta", "0.5", "--noise-scale", "1.25"], {"eta": 0.5, "noise_scale": 1.25},
     ", eta 0.5, noise scale 1.25"),
    (["--sampler", "ddpm"], {"noise_scale": 1}, ""),
    (["--sampler", "ddim"], {"eta": 0, "noise_scale": 1}, ""),
    (["--sampler", "ddim", "--eta", "0.5"], {"eta": 0.5, "noise_scale": 1}, ", eta 0.5")])
def test_noise_flags_other_than_the_defaults_are_in_the_label(arguments, noise, label):
    flags = predict.parse_flags(arguments)
    options = noise_options(flags.sampler, flags.eta, flags.noise_scale)
    assert options == noise and noise_label(flags.sampler, options) == label


@pytest.mark.parametrize("arguments, words", [
    (["--sampler", "ddpm", "--eta", "0.5"], "--eta is for --sampler ddim and dpm"),
    (["--sampler", "dpm", "--variance", "large"], "--variance is for --sampler ddpm"),
    (["--sampler", "ddim", "--noise-scale", "1.2"], "--noise-scale multiplies fresh noise: give --eta above 0"),
    (["--sampler", "dpm", "--eta", "0", "--noise-scale", "1.2"], "--noise-scale multiplies fresh noise"),
    (["--frames", "1"], "--frames must be 0"),
    (["--samples", "x.png"], "--samples names a folder for PNGs, or an .npy"),
    (["--samples", "x.NPY"], "--samples names a folder for PNGs, or an .npy"),
    (["--frames", "9", "--samples", "x.npy"], "--frames is for GIFs, and --samples writes none"),
    (["--number", "3"], "unrecognized arguments: --number 3")])
def test_a_flag_that_would_do_nothing_is_refused(arguments, words):
    with pytest.raises(OasisError, match=words):
        predict.parse_flags(arguments)


def test_it_says_how_many_files_it_replaces(model, tmp_path, capsys):
    for more, replaced in ([], 0), (["--number-of-images", "2"], 2):
        predict_into(tmp_path, model, "--frames", "2", *more)
        err = capsys.readouterr().err
        assert ("warning: 2 of these files replaced older ones" in err) == (replaced > 0), err


def test_images_are_not_added_to_those_of_another_model(model, tmp_path):
    predict_into(tmp_path, model, "--samples", str(tmp_path / "samples"), "--number-of-images", "2")
    with pytest.raises(OasisError, match="samples: holds PNGs"):
        predict_into(tmp_path, model, "--samples", str(tmp_path / "samples"))
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_the_model_is_the_newest_run_else_the_bundled_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(modelfile, "BUNDLED", tmp_path / "bundled")
    with pytest.raises(OasisError, match="train.py"):
        find_model("", tmp_path)
    (tmp_path / "bundled").mkdir()
    bundled = Path(shutil.copy(model, tmp_path / "bundled" / "oasis64.safetensors"))
    assert find_model("", tmp_path) == ("oasis64", bundled)
    for age, name in enumerate(["new", "old"]):
        (tmp_path / name).mkdir()
        copy = Path(shutil.copy(model, tmp_path / name / "model.safetensors"))
        os.utime(copy, (1000 - age, 1000 - age))
    assert find_model("", tmp_path) == ("new", tmp_path / "new" / "model.safetensors")
    os.renames(tmp_path / "new", tmp_path / "oasis128-phase1" / "oasis64")
    phase = tmp_path / "oasis128-phase1" / "oasis64" / "model.safetensors"
    assert find_model("", tmp_path) == ("oasis64", phase)
    assert find_model("old", tmp_path) == ("old", tmp_path / "old" / "model.safetensors")
    assert find_model("oasis64", tmp_path) == ("oasis64", bundled)
    assert find_model(str(tmp_path / "old"), "nowhere") == ("old", tmp_path / "old" / "model.safetensors")
    monkeypatch.chdir(tmp_path / "old")
    for here in ".", "model.safetensors":  # a run's folder has a name, also if one is in it
        assert find_model(here, "nowhere") == ("old", tmp_path / "old" / "model.safetensors")
    with pytest.raises(OasisError, match="oasis64"):
        find_model("oasis65", tmp_path)


def test_generate_yields_each_seed_once_in_equal_batches(model):
    network, diffusion, _ = load_model(model)
    shapes, sample = [], diffusion.sample

    def noting_shapes(_, shape, seeds, *arguments, **options):
        shapes.append(shape)
        return sample(lambda x, t: x, shape, seeds, "dpm", 2)
    diffusion.sample = noting_shapes
    batches = list(predict.generate({"CPU:0": network}, diffusion, range(10, 17), steps=2, batch_size=3))
    assert [batch for batch, _, _ in batches] == [[10, 11, 12], [13, 14, 15], [16]]
    assert [len(images) for _, images, _ in batches] == [3, 3, 1] and set(shapes) == {(3, 16, 16, 1)}


def test_the_bundled_model_makes_equal_images_on_every_stack():
    """The expected image was generated with one TensorFlow version, with 20 steps of dpm in float32."""
    network, diffusion, _ = load_model(BUNDLED / "oasis64.safetensors", "float32")
    (_, images, _), = predict.generate({"CPU:0": network}, diffusion, range(4), sampler="dpm")
    expected = np.asarray(Image.open(Path(__file__).with_name("oasis64_seed0-3.png")))
    assert expected.std() > 30
    np.testing.assert_allclose(image_grid(images).astype(int), expected.astype(int), atol=2)


def test_a_gif_of_256_pixels_stays_under_3_mb(tmp_path):
    """The worst case: all frames are pure noise, except the last six, which fade to an image."""
    random = np.random.default_rng(0)
    trajectory = random.integers(0, 256, [60, 256, 256], np.uint8)
    trajectory[54:] = np.arange(256, dtype=np.uint8)
    predict.write_gif(tmp_path / "worst.gif", trajectory)
    assert (tmp_path / "worst.gif").stat().st_size < 3_000_000
    np.testing.assert_array_equal(imageio.imread(tmp_path / "worst.gif")[-1][..., 0], trajectory[-1])


@pytest.mark.parametrize("damage, words", [
    (lambda file: file.unlink(), "no model there"),
    (lambda file: file.write_bytes(b""), "not a readable safetensors file"),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), "not a readable safetensors file"),
    (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"), "damaged"),
])
def test_a_damaged_model_file_is_named_and_nothing_written(model, tmp_path, damage, words):
    file = Path(shutil.copy(model, tmp_path / "model.safetensors"))
    damage(file)
    with pytest.raises(OasisError, match=words) as error:
        predict_into(tmp_path / "gif", file)
    assert str(file) in str(error.value) and not (tmp_path / "gif").exists()


@pytest.mark.parametrize("flag, place", [("--gif-path", "file/gif"), ("--samples", "file/samples"),
                                         ("--samples", "file/samples.npy")])
def test_a_folder_that_cannot_be_written_is_refused_at_once(model, tmp_path, monkeypatch, flag, place):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(GaussianDiffusion, "sample", None)
    with pytest.raises(OasisError, match="cannot write .*file"):
        predict.main(["--model", str(model), flag, str(tmp_path / place)])
