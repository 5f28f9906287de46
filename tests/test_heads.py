"""oasis/heads.py: chosen slices and whole heads are generated and written, or refused if the model knows none."""
import nibabel
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageSequence

import predict
import train
from dataset import load_split
from helpers import awake
from modules import GaussianDiffusion, UNet, load_model, save_model
from oasis.conditions import random_indices, with_indices
from oasis.files import OasisError
from oasis.heads import NEIGHBOUR_T, generate_heads, seed_of_slice, write_nifti
from oasis.modelfile import read_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of one level that takes all conditions, with random parameters, for slices with the indices 0, 2, 4."""
    network = awake(UNet(16, dim=16, dim_mults=(1,), condition="slice,neighbour,mirror"))
    path = tmp_path_factory.mktemp("run") / "heads16.safetensors"
    diffusion = GaussianDiffusion(50, "x_start")
    heads = {"indices": [0, 2, 4], "slice_step": 2, "geometry": dict(axes="RAS", side=256.0, step=1.0)}
    save_model(path, network, {**network.settings, **diffusion.settings, **heads, "images": 320})
    return path


def predict_into(folder, model, *arguments):
    """Return {name: path} of the files that predict.py writes into a folder."""
    predict.main(["--model", str(model), "--gif-path", str(folder), "--precision", "float32", "--sampler", "dpm",
                  "--steps", "3", *arguments])
    return {path.name: path for path in folder.iterdir()}


def pixels(path):
    return np.asarray(Image.open(path))


def test_slices_are_generated_by_index_and_seed(model, tmp_path):
    files = predict_into(tmp_path / "all", model, "--slice", "0:6:2", "--number-of-images", "2", "--batch-size", "4",
                         "--frames", "0")
    names = [f"heads16_seed{seed}_slice{k}.png" for seed in (0, 1) for k in (0, 2, 4)]
    assert set(files) == {*names, "heads16_seed0-1_slices.png"}
    grid = pixels(files["heads16_seed0-1_slices.png"])
    assert grid.shape == (2 * 16, 3 * 16)
    for i, name in enumerate(names):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(grid[16 * row:, 16 * column:][:16, :16], pixels(files[name]))
    assert len({pixels(files[name]).tobytes() for name in names}) == 6
    alone = predict_into(tmp_path / "one", model, "--slice", "2", "--seed", "1")["heads16_seed1_slice2.png"]
    assert np.abs(pixels(alone).astype(int) - pixels(files[names[4]])).max() <= 1


def test_without_an_index_each_seed_draws_one(model, tmp_path):
    """All indices are equally likely. The image is the one that --slice gives for this seed and index."""
    settings = read_model(model)[1]
    drawn = random_indices(settings, range(3000))
    assert drawn[7:9] == random_indices(settings, [7, 8]) and random_indices({"condition": ""}, [7]) == []
    assert {k: abs(drawn.count(k) / 3000 - 1 / 3) < 0.04 for k in set(drawn)} == {0: True, 2: True, 4: True}
    free = predict_into(tmp_path / "free", model, "--seed", "5", "--frames", "0")["heads16_seed5.png"]
    index = random_indices(settings, [5])[0]
    told = predict_into(tmp_path / "told", model, "--seed", "5", "--frames", "0", "--slice", str(index))
    np.testing.assert_array_equal(pixels(free), pixels(told[f"heads16_seed5_slice{index}.png"]))


def test_an_index_is_drawn_as_often_as_the_training_data_have_it():
    settings = {"condition": "slice", "indices": [0, 3, 7], "index_counts": [5, 1, 4]}
    drawn = random_indices(settings, range(3000))
    for index, share in [(0, 0.5), (3, 0.1), (7, 0.4)]:
        assert abs(drawn.count(index) / 3000 - share) < 0.03


def test_samples_of_a_run_are_the_images_that_predict_generates(unet, tmp_path):
    """Both draw the slice indices from the seeds."""
    train.main([*unet, "--condition", "slice", "--learning-rate", "0.1", "--max-steps", "3"])
    run = tmp_path / "checkpoint" / "oasis16"
    files = predict_into(tmp_path / "again", run, "--number-of-images", "8", "--steps", "2", "--frames", "0")
    images = [pixels(files[f"oasis16_seed{seed}.png"]) for seed in range(8)]
    samples = pixels(run / "samples" / "step_0000003.png")
    for k, image in enumerate(images):
        row, column = divmod(k, 4)
        np.testing.assert_allclose(samples[16 * row:, 16 * column:][:16, :16], image.astype(float), atol=1)


def test_slice_indices_that_the_model_was_not_trained_on_are_named(model, tmp_path, capsys):
    """It was trained on 0, 2 and 4."""
    predict_into(tmp_path / "known", model, "--slice", "0:5:2", "--frames", "0")
    assert "was not trained on" not in capsys.readouterr().err
    predict_into(tmp_path / "unknown", model, "--slice", "1:4", "--frames", "0")
    assert "warning: the model was not trained on the slice indices 1, 3\n" in capsys.readouterr().err


def test_each_image_needs_a_slice_index():
    with pytest.raises(OasisError, match="give one slice index for each image: there are 3 for 2 images"):
        with_indices("slice", (2, 8, 8, 1), [1, 2, 3])


def test_guidance_changes_a_slice(model, tmp_path):
    images = [pixels(predict_into(tmp_path / weight, model, "--slice", "4", "--guidance", weight)[
        "heads16_seed0_slice4.png"]).astype(int) for weight in ("1", "3")]
    assert np.abs(images[0] - images[1]).max() > 5


def test_a_head_is_a_grid_a_gif_an_array_and_a_volume(model, tmp_path):
    files = predict_into(tmp_path / "heads", model, "--head", "--number-of-images", "2")
    assert set(files) == {f"heads16_head{seed}.{kind}" for seed in (0, 1) for kind in ("png", "gif", "npy", "nii")}
    head = np.load(files["heads16_head1.npy"])
    assert head.shape == (3, 16, 16, 1) and head.dtype == np.uint8
    with Image.open(files["heads16_head1.gif"]) as gif:
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(gif)]
    np.testing.assert_array_equal(frames, head[..., 0])
    np.testing.assert_array_equal(pixels(files["heads16_head1.png"])[:16, 16:], head[1, :, :, 0])
    volume = nibabel.load(files["heads16_head1.nii"])
    np.testing.assert_array_equal(np.asarray(volume.dataobj), np.moveaxis(head[..., 0], 0, -1))
    np.testing.assert_allclose(volume.header.get_zooms(), (16, 16, 2))      # 256 mm in 16 pixels, every second slice
    alone = predict_into(tmp_path / "one", model, "--head", "--seed", "1")["heads16_head1.npy"]
    assert np.abs(np.load(alone).astype(int) - head).max() <= 1


def test_each_slice_of_a_head_has_the_one_below_as_its_neighbour():
    """A denoiser that returns its neighbour, made brighter by a constant, generates heads with a linear ramp."""
    def denoise_fn(x, t, cond):
        seen.append((int(cond["slice"][0]), int(cond["neighbour_t"][0])))
        if len(seen) > 1:  # the noise of the neighbour must not be that of the slice itself
            assert abs(np.corrcoef(np.ravel(x), np.ravel(cond["neighbour"]))[0, 1]) < 0.15
        return tf.where(cond["neighbour_t"][:, None, None, None] < 0, -1.0, cond["neighbour"] / rate + 0.25) + 0 * x

    seen, diffusion = [], GaussianDiffusion(1000, "x_start", image_size=32)
    denoise_fn.image_size, denoise_fn.channels, denoise_fn.fused = 32, 1, False
    denoise_fn.condition = "slice,neighbour"
    t = int(NEIGHBOUR_T * 1000)
    rate = diffusion.signal_rates[t]
    tf.config.run_functions_eagerly(True)
    try:
        (_, heads), = generate_heads({"CPU:0": denoise_fn}, diffusion, [5], [1, 2, 3, 4], steps=1)
    finally:
        tf.config.run_functions_eagerly(False)
    assert seen == [(1, -1), *((k, t) for k in (2, 3, 4))]
    means = heads[0].mean(axis=(1, 2, 3))
    assert means[0] == 0 and np.all(abs(np.diff(means) - 0.25 * 127.5) < 3)


def test_seeds_of_slices_are_all_different():
    seeds = {seed_of_slice(seed, index) for seed in (0, 1, -1, 2**63 - 1) for index in range(32)}
    assert len(seeds) == 4 * 32 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("axes", ["RAS", "PRS", "IRA", "IAR"])
def test_a_nifti_keeps_slices_where_they_were_cut(tmp_path, axes, cache):
    """Slices of a volume that are written as a NIfTI and read again are the same."""
    head = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), dtype=np.uint8)
    head[0, 0, 0], head[1, 0, :] = 0, 255
    write_nifti(tmp_path / "a.nii", head, [0, 2, 4, 6, 8], dict(axes=axes, side=16.0, step=1.5))
    axis = {"S": "axial", "A": "coronal", "R": "sagittal"}[axes[2]]
    again = load_split(tmp_path / "a.nii", "train", 8, axis=axis)
    expected = head[:, :, :, 0]
    if axes == "RAS":                                   # OASIS slices lie on their side
        expected = np.rot90(expected, axes=(1, 2))
    np.testing.assert_array_equal(again.images[..., 0], expected)
    if axes != "RAS":
        assert again.geometry == dict(axes=axes, side=16.0, step=3.0)


@pytest.mark.parametrize("arguments, words", [
    (["--slice", "4"], "--slice: this model was not trained with --condition slice"),
    (["--head"], "--head: this model was not trained with --condition slice,neighbour"),
    (["--guidance", "2"], "--guidance: this model was not trained with --condition slice")])
def test_flags_for_a_missing_condition_are_refused(tmp_path, arguments, words):
    network, path = UNet(16, dim=16, dim_mults=(1,)), tmp_path / "plain.safetensors"
    save_model(path, network, {**network.settings, **GaussianDiffusion(50).settings})
    with pytest.raises(OasisError, match=words):
        predict_into(tmp_path, path, *arguments)


@pytest.mark.parametrize("arguments, words", [
    (["--slice", "9"], "--slice 9: the slice indices of this model are 0 to 4"),
    (["--slice", "2", "--head"], "--head --slice 2: is one slice. Leave out --head"),
    (["--slice", "0:4", "--head"], "neighbouring slices of this model are 2 apart. Give --slice 0:4:2"),
    (["--head", "--samples", "folder"], "must be an .npy")])
def test_slices_that_a_model_does_not_know_are_refused(model, tmp_path, arguments, words):
    with pytest.raises(OasisError, match=words):
        predict_into(tmp_path, model, *arguments)


def test_a_head_of_chosen_slices_as_one_array(model, tmp_path):
    predict_into(tmp_path, model, "--head", "--slice", "2:5:2", "--number-of-images", "3", "--batch-size", "2",
                 "--samples", str(tmp_path / "heads.npy"))
    assert np.load(tmp_path / "heads.npy").shape == (3, 2, 16, 16, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.npy"]


def test_a_model_file_with_a_wrong_condition_is_refused(model, tmp_path):
    network, diffusion, settings = load_model(model)
    wrongs = [*({"condition": wrong} for wrong in ("age", 5, None)), {"indices": []}, {"indices": [2, 0]},
              {"indices": ["a"]}, {"indices": 5}, {"slice_step": 0}, {"slice_step": 2.0}, {"geometry": None},
              {"geometry": dict(axes="XYZ", side=1.0, step=1.0)}]
    for wrong in wrongs:
        save_model(tmp_path / "wrong.safetensors", network, {**settings, **wrong})
        with pytest.raises(OasisError, match="wrong.safetensors"):
            load_model(tmp_path / "wrong.safetensors")
