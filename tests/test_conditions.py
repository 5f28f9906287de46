"""oasis/conditions.py and oasis/heads.py: the conditions in training and in the generation of slices and heads."""
import argparse

import nibabel
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageSequence

import predict
import train
from dataset import load_split
from helpers import awake, trainer_of, write_slices, write_volume
from modules import GaussianDiffusion, UNet, load_model, save_model
from oasis.conditions import condition_names, guided, null_condition, random_indices, with_indices
from oasis.files import OasisError
from oasis.heads import NEIGHBOUR_T, generate_heads, seed_of_slice, write_nifti
from oasis.modelfile import read_model
from oasis.parameters import named_variables
from oasis.preparation import Preparation, attach, head_metadata, load_data, slice_step

BOTH, ALL = "slice,neighbour", "slice,neighbour,mirror"


@pytest.fixture(scope="module")
def network():
    """A network of one level that takes all conditions, with random parameters."""
    return awake(UNet(16, dim=16, dim_mults=(1,), condition=ALL))


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "heads16.safetensors"
    diffusion = GaussianDiffusion(50, "x_start")
    heads = {"indices": [0, 2, 4], "slice_step": 2, "geometry": dict(axes="RAS", side=256.0, step=1.0)}
    save_model(path, network, {**network.settings, **diffusion.settings, **heads, "images": 320})
    return path


def a_condition(count=3, seed=0):
    """A condition in which everything is known."""
    rng = np.random.default_rng(seed)
    return {"slice": tf.constant(rng.permutation(32)[:count], tf.int32),
            "neighbour": tf.constant(rng.uniform(-1, 1, [count, 16, 16, 1]), tf.float32),
            "neighbour_t": tf.constant(rng.integers(0, 25, count), tf.int32),
            "mirrored": tf.constant(rng.integers(-1, 1, count), tf.int32)}


def inputs(count=3):
    return tf.random.stateless_normal([count, 16, 16, 1], [1, 2]), tf.range(count) * 7


# -------------------------------------------------------------------------------------------------------- the network

def test_the_null_condition_equals_no_condition(network):
    x, t = inputs()
    np.testing.assert_array_equal(network(x, t, null_condition(ALL, x.shape)), network(x, t))


@pytest.mark.parametrize("part", ["slice", "neighbour_t", "neighbour", "mirrored"])
def test_each_part_of_a_condition_matters_to_its_own_image_only(network, part):
    x, t = inputs()
    cond, other = a_condition(), a_condition()
    changed = other[part].numpy()
    changed[1] = {"neighbour": changed[1] * 0.5 + 1, "mirrored": -1 - changed[1]}.get(part, changed[1] + 1)
    other[part] = tf.constant(changed)
    same = np.all(np.isclose(network(x, t, cond), network(x, t, other), atol=1e-6), axis=(1, 2, 3))
    assert same.tolist() == [True, False, True]


def test_a_network_without_conditions_refuses_one():
    network = UNet(16, dim=16, dim_mults=(1,))
    with pytest.raises(OasisError, match="takes no condition"):
        network(*inputs(), a_condition())


def test_a_condition_adds_parameters_and_changes_no_others():
    plain, told = (dict(named_variables(UNet(16, dim=16, dim_mults=(1,), condition=condition)))
                   for condition in ("", "slice"))
    assert {name.split(".")[0] for name in set(told) - set(plain)} == {"condition_embeddings"}
    for name, variable in plain.items():
        np.testing.assert_array_equal(variable, told[name])


@pytest.mark.parametrize("text, names", [("", ""), ("slice", "slice"), ("neighbour", "neighbour"), (BOTH, BOTH),
                                         ("neighbour,slice", BOTH), ("mirror", "mirror"),
                                         ("mirror,slice,neighbour", ALL)])
def test_names_of_conditions_are_put_in_order(text, names):
    assert condition_names(text) == names


@pytest.mark.parametrize("text", ["age", "slice,age", "slice,slice", "slice,", "Slice"])
def test_other_names_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="slice, neighbour, mirror"):
        condition_names(text)


# ----------------------------------------------------------------------------------------------------------- guidance

def test_guidance_leads_away_from_the_output_without_a_condition():
    calls = []

    def denoise_fn(x, t, cond):
        calls.append(x.shape[0])
        time, index = (tf.cast(value, tf.float32)[:, None, None, None] for value in (t, cond["slice"]))
        return x + 10.0 * time + index
    x, t = inputs(2)
    cond = {"slice": tf.constant([3, 8])}
    free = x + 10.0 * np.array([0, 7], np.float32)[:, None, None, None] - 1
    expected = free + 2.5 * (np.array([3, 8], np.float32) + 1)[:, None, None, None]
    np.testing.assert_allclose(guided(denoise_fn, "slice", 2.5)(x, t, cond), expected, rtol=1e-5)
    assert calls == [4]                                 # one call with a doubled batch


def test_a_guidance_scale_of_1_is_no_guidance(network):
    assert guided(network, ALL, 1) is network


def test_guidance_with_the_network_is_the_formula(network):
    (x, t), cond = inputs(), a_condition()
    known, free = network(x, t, cond), network(x, t)
    np.testing.assert_allclose(guided(network, ALL, 3.0)(x, t, cond), free + 3 * (known - free), atol=2e-5)


# ----------------------------------------------------------------------------------------------------------- training

@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))
    write_slices(tmp_path / "data", subjects=(1, 2, 5), slices=(0, 2, 4, 6))
    return load_split(tmp_path / "data", image_size=16)


def test_neighbours_are_the_slices_below_in_the_same_head(split):
    images, positions = attach(BOTH, split, slice_step(split))
    assert positions.tolist() == [[k, k > 0] for _ in range(3) for k in (0, 2, 4, 6)]
    np.testing.assert_array_equal(images[..., :1], split.images)
    for row in range(12):
        expected = split.images[row - 1] if row % 4 else np.zeros_like(split.images[0])
        np.testing.assert_array_equal(images[row, :, :, 1:], expected)


def test_without_the_neighbour_the_images_have_one_channel(split):
    images, positions = attach("slice", split, 2, limit=4)
    assert images.shape == (4, 16, 16, 1) and positions[:, 0].tolist() == [0, 0, 6, 6]


def test_a_slice_whose_neighbour_is_missing_has_none(split):
    """The step is the most frequent one. Heads may start at different slice indices."""
    del split.slices[7], split.slices[1]                # the last slice of the second head, the second of the first
    odd = [one._replace(number=one.number + 1) if one.subject == 2 else one for one in split.slices]
    images = np.delete(split.images, [1, 7], axis=0)
    split = split._replace(slices=odd, images=images)
    assert slice_step(split) == 2
    _, positions = attach(BOTH, split, 2)
    assert positions.tolist() == [[0, 0], [4, 0], [6, 1], [1, 0], [3, 1], [5, 1], [0, 0], [2, 1], [4, 1], [6, 1]]
    metadata = head_metadata(split, 2)
    assert metadata["indices"] == [0, 1, 2, 3, 4, 5, 6] and metadata["slice_step"] == 2
    assert metadata["index_counts"] == [2, 1, 1, 1, 2, 1, 2]


@pytest.mark.parametrize("slices, words", [
    ([(k, 0) for k in range(12)], "need subjects with several slices"), ([(0, 3)] * 12, "no index twice in a subject"),
    ([*((0, k) for k in range(9)), (1, 3), (1, 5), (1, 5)], "subject 1 has 2 slices with the index 5. Keep one volume"),
    ([(0, 20240131 + k) for k in range(12)], "at most 4095.*subject 0 has 1 slices with the index 20240142")])
def test_data_without_heads_are_refused(split, slices, words):
    other = split._replace(slices=[one._replace(subject=s, number=n) for one, (s, n) in zip(split.slices, slices)])
    with pytest.raises(OasisError, match=words):
        slice_step(other)


def batches(count=4000):
    """Return (images, positions) as attach() does. Image i is constant; its neighbour is the negative of it."""
    share = np.linspace(-1, 1, count, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)
    positions = [[k % 32, k % 4 > 0] for k in range(count)]
    return tf.constant(np.concatenate([share, -share], axis=-1)), tf.constant(positions)


def test_dropout_hides_its_share_of_the_conditions(network):
    """A tenth of the images get the null condition, half of the others no neighbour. First slices never have one."""
    batch, positions = batches()
    images, cond = Preparation(BOTH, 0.1, GaussianDiffusion(50), 0.0, 1)(batch, positions, seed=[3, 4])
    np.testing.assert_array_equal(images, batch[..., :1])
    told, neighbour = cond["slice"].numpy() >= 0, cond["neighbour_t"].numpy() >= 0
    assert abs(told.mean() - 0.9) < 0.02 and not np.any(neighbour & ~told)
    followed = positions[:, 1].numpy() > 0
    assert not neighbour[~followed].any() and abs(neighbour[told & followed].mean() - 0.5) < 0.03
    np.testing.assert_array_equal(cond["slice"].numpy()[told], positions[:, 0].numpy()[told])
    assert not cond["neighbour"].numpy()[~neighbour].any()
    levels = np.log(GaussianDiffusion(50).sigmas[cond["neighbour_t"].numpy()[neighbour]])
    assert abs(np.median(levels) + 1.2) < 0.2 and abs(levels.std() - 1.2) < 0.25


def test_neighbours_have_the_noise_of_their_level():
    diffusion = GaussianDiffusion(50)
    batch, positions = batches()
    _, cond = Preparation("neighbour", 0.0, diffusion, 0.0, 1)(batch, positions, seed=[3, 4], training=False)
    rows = np.flatnonzero(positions[:, 1])
    level = cond["neighbour_t"].numpy()[rows]
    noise = (cond["neighbour"].numpy()[rows] - diffusion.signal_rates[level][:, None, None, None] *
             batch.numpy()[rows, :, :, 1:]) / diffusion.noise_rates[level][:, None, None, None]
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert np.all(cond["neighbour_t"].numpy()[np.flatnonzero(positions[:, 1] == 0)] == -1)


def test_a_condition_is_a_function_of_the_seed():
    batch, positions = batches(50)
    prepare = Preparation(ALL, 0.5, GaussianDiffusion(50), 0.5, 1)
    first, again, other = (prepare(batch, positions, seed=seed)[1] for seed in ([3, 4], [3, 4], [3, 5]))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name] != other[name])


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("condition", ["", "mirror", ALL])
def test_a_share_of_the_images_is_mirrored_and_the_network_is_told_which(condition, axis):
    """The neighbour is mirrored with its image. The dropout does not affect the key mirrored."""
    count = 4000
    images = np.random.default_rng(0).uniform(-1, 1, [count, 2, 2, 2 if condition == ALL else 1]).astype(np.float32)
    positions = [tf.ones([count, 2], tf.int32)] if condition == ALL else []
    prepare = Preparation(condition, 0.5, GaussianDiffusion(1000), 0.3, axis)
    made, *cond = prepare(tf.constant(images), *positions, seed=[3, 4])
    mirrored = np.any(made != images[..., :1], axis=(1, 2, 3))
    assert abs(mirrored.mean() - 0.3) < 0.03
    expected = np.where(mirrored[:, None, None, None], np.flip(images, axis), images)
    np.testing.assert_array_equal(made, expected[..., :1])
    if condition:
        np.testing.assert_array_equal(cond[0]["mirrored"], np.where(mirrored, 0, -1))
    if condition == ALL:
        clear = (cond[0]["neighbour_t"].numpy() >= 0) & (cond[0]["neighbour_t"].numpy() < 5)     # hardly any noise
        assert clear.sum() > 5
        np.testing.assert_allclose(cond[0]["neighbour"].numpy()[clear], expected[clear][..., 1:], atol=0.2)
    kept, *cond = prepare(tf.constant(images), *positions, seed=[3, 4], training=False)
    np.testing.assert_array_equal(kept, images[..., :1])
    assert not condition or np.all(cond[0]["mirrored"] == -1)


@pytest.fixture
def flags(unet):
    return [*unet, "--condition", ALL, "--objective", "x_start", "--flips", "0.5"]


def test_micro_batches_cut_a_condition_too(flags):
    """Micro-batches give the gradient of the whole batch."""
    results = []
    for parts in "1", "2":
        trainer = trainer_of(flags, "--accumulate", parts)
        awake(trainer.network)
        batch = tf.constant(np.random.default_rng(0).uniform(-1, 1, [8, 16, 16, 2]), tf.float32)
        losses, _, norm = trainer.update((batch, tf.constant([[k, 1] for k in range(8)])))
        results.append([*losses.numpy(), float(norm)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


@pytest.mark.parametrize("limit, refused", [("12", True), ("24", False), ("0", False)])
def test_a_neighbour_needs_all_slices_of_the_subjects(flags, limit, refused):
    """The data has 24 slices."""
    settings = train.parse_flags([*flags, "--number-of-samples", limit])
    if refused:
        with pytest.raises(OasisError, match="needs all slices of a subject, not 12 of 24 slices"):
            load_data(settings, 10)
    else:
        assert len(load_data(settings, 10).training[0]) == 24


@pytest.mark.parametrize("condition", ["", "mirror"])
def test_without_slice_and_neighbour_the_data_are_images_alone(flags, condition):
    data = load_data(train.parse_flags([*flags, "--condition", condition]), 10)
    assert data.training.shape == (24, 16, 16, 1) and data.validation.shape == (10, 16, 16, 1)
    assert data.metadata == {"data": "24 slices of 6 subjects"}


@pytest.mark.parametrize("condition, flips, said", [("mirror", "0", True), ("mirror", "0.5", False), ("", "0", False)])
def test_a_mirror_condition_without_mirrored_images_is_named(flags, capsys, condition, flips, said):
    load_data(train.parse_flags([*flags, "--condition", condition, "--flips", flips]), 10)
    printed = "no image is mirrored (--flips 0), so the condition mirror has no effect\n" in capsys.readouterr().out
    assert printed == said


@pytest.mark.parametrize("axis, flips, refused", [("sagittal", "0.5", True), ("sagittal", "auto", False),
                                                  ("sagittal", "0", False), ("coronal", "0.5", False)])
def test_sagittal_slices_are_not_mirrored(tmp_path, unet, axis, flips, refused):
    write_volume(tmp_path / "a.nii", np.random.default_rng(0).uniform(size=(8, 8, 8)).astype(np.float32))
    settings = train.parse_flags([*unet, "--path", str(tmp_path / "a.nii"), "--axis", axis, "--flips", flips])
    if refused:
        with pytest.raises(OasisError, match="--flips 0.5 would swap the front and the back of sagittal slices"):
            load_data(settings, 10)
    else:
        load_data(settings, 10)
        assert settings.flips == (0.5 if flips == "0.5" else 0)


# --------------------------------------------------------------------------------------------------------- generating

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
        return tf.where(cond["neighbour_t"][:, None, None, None] < 0, -1.0, cond["neighbour"] / rate + 0.25) + 0 * x

    seen, diffusion = [], GaussianDiffusion(1000, "x_start", image_size=4)
    denoise_fn.image_size, denoise_fn.channels, denoise_fn.fused = 4, 1, False
    denoise_fn.condition = BOTH
    t = int(NEIGHBOUR_T * 1000)
    rate = diffusion.signal_rates[t]
    tf.config.run_functions_eagerly(True)
    try:
        (_, heads), = generate_heads({"CPU:0": denoise_fn}, diffusion, [5], [1, 2, 3, 4], steps=1)
    finally:
        tf.config.run_functions_eagerly(False)
    assert seen == [(1, -1), *((k, t) for k in (2, 3, 4))]
    means = heads[0].mean(axis=(1, 2, 3))
    assert means[0] == 0 and np.all(abs(np.diff(means) - 0.25 * 127.5) < 20)


def test_seeds_of_slices_are_all_different():
    seeds = {seed_of_slice(seed, index) for seed in (0, 1, -1, 2**63 - 1) for index in range(32)}
    assert len(seeds) == 4 * 32 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("axes", ["RAS", "PRS", "IRA", "IAR"])
def test_a_nifti_keeps_slices_where_they_were_cut(tmp_path, axes, monkeypatch):
    """Slices of a volume that are written as a NIfTI and read again are the same."""
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))
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
    predict_into(tmp_path / "gif", model, "--head", "--number-of-images", "2")
    predict_into(tmp_path, model, "--head", "--slice", "2:5:2", "--number-of-images", "3", "--batch-size", "2",
                 "--samples", str(tmp_path / "heads.npy"))
    assert np.load(tmp_path / "heads.npy").shape == (3, 2, 16, 16, 1)
    assert set(path.name for path in tmp_path.iterdir()) == {"gif", "heads.npy"}


def test_a_model_file_with_a_wrong_condition_is_refused(model, tmp_path):
    network, diffusion, settings = load_model(model)
    wrongs = [*({"condition": wrong} for wrong in ("age", 5, None)), {"indices": []}, {"indices": [2, 0]},
              {"indices": ["a"]}, {"indices": 5}, {"slice_step": 0}, {"slice_step": 2.0}, {"geometry": None},
              {"geometry": dict(axes="XYZ", side=1.0, step=1.0)}]
    for wrong in wrongs:
        save_model(tmp_path / "wrong.safetensors", network, {**settings, **wrong})
        with pytest.raises(OasisError, match="wrong.safetensors"):
            load_model(tmp_path / "wrong.safetensors")
