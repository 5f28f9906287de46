"""oasis/conditions.py and oasis/preparation.py: what a condition does to the network, and conditions in training."""
import argparse

import numpy as np
import pytest
import tensorflow as tf

import train
from dataset import load_split
from helpers import awake, trainer_of, write_slices, write_volume
from modules import GaussianDiffusion, UNet
from oasis.conditions import condition_names, guided, null_condition
from oasis.files import OasisError
from oasis.noise import normal_noise
from oasis.parameters import named_variables
from oasis.preparation import Preparation, attach, head_metadata, load_data, slice_step

BOTH, ALL = "slice,neighbour", "slice,neighbour,mirror"


@pytest.fixture(scope="module")
def network():
    """A network of one level that takes all conditions, with random parameters."""
    return awake(UNet(16, dim=16, dim_mults=(1,), condition=ALL))


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
def split(tmp_path, cache):
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
    """30 % of the images get the null condition, half of the others no neighbour. First slices never have one."""
    batch, positions = batches()
    images, cond = Preparation(BOTH, 0.3, GaussianDiffusion(50), 0.0, 1)(batch, positions, seed=[3, 4])
    np.testing.assert_array_equal(images, batch[..., :1])
    told, neighbour = cond["slice"].numpy() >= 0, cond["neighbour_t"].numpy() >= 0
    assert abs(told.mean() - 0.7) < 0.02 and not np.any(neighbour & ~told)
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
    noise_of_step = normal_noise(batch[..., :1].shape, [3, 4]).numpy()[rows]  # which is added to the image itself
    assert abs(np.corrcoef(noise.ravel(), noise_of_step.ravel())[0, 1]) < 0.04
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
    """The neighbour is mirrored with its image. Dropout never hides `mirrored`, and hides half of the rest."""
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
        assert clear.sum() > 5 and abs(np.mean(cond[0]["slice"].numpy()[mirrored] >= 0) - 0.5) < 0.06
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
        data = load_data(settings, 10)
        assert len(data.training[0]) == 24
        images, slice_facts = data.validation
        assert images.shape == (10, 16, 16, 2) and np.array_equal(slice_facts[:, 1], slice_facts[:, 0] > 0)


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
