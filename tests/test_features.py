"""oasis/features.py: the classifier is right and is read safely, and features do not depend on the batch."""
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from oasis import features
from oasis.files import OasisError

pytest.importorskip(features.PARAMETERS_PACKAGE, reason="pip install -r requirements-evaluate.txt")
datasets = pytest.importorskip("sklearn.datasets", reason="pip install -r requirements-evaluate.txt")

DAISY = 985
MEANS_AND_STDS = [[0.09535760, 0.11360579, 0.12543853], [0.36340152, 0.43171540, 0.44188338]]
LAKE_PALACE = {442: "bell cote", 449: "boathouse", 483: "castle", 663: "monastery", 698: "palace", 975: "lakeside"}


@pytest.fixture(scope="module")
def parameters():
    return features.read_tensors(features.find_parameters())


@pytest.fixture(scope="module")
def extractor():
    return features.load_features("efficientnet")


def smooth_images(count, size=64):
    """Different grey blobs, the same on every machine: uint8 (N, S, S, 1)."""
    y, x = np.mgrid[:size, :size] / size
    waves = [128 + 60 * np.sin(2 * np.pi * (1 + k % 3) * x + k) + 60 * np.cos(2 * np.pi * (1 + k % 4) * y + k * k)
             for k in range(count)]
    return np.rint(waves).astype(np.uint8)[..., None]


# ----------------------------------------------------------------------------------------------------- the classifier

def probabilities(parameters, name):
    """The 1000 probabilities for the central square of a bundled photograph."""
    photograph = datasets.load_sample_image(name)
    side = min(photograph.shape[:2])
    top, left = ((length - side) // 2 for length in photograph.shape[:2])
    square = photograph[None, top:top + side, left:left + side]
    _, logits = features.efficientnet_lite0(parameters)(features.resize(square, 224))
    exponentials = np.exp(logits.numpy()[0].astype(np.float64))
    return exponentials / exponentials.sum()


def test_photographs_are_recognized(parameters):
    # The confidences detect errors that leave the class right. For the daisy: 0.134 with padding on both sides, 0.301
    # with BGR, 0.210 with bilinear resizing, 0.101 or 0.232 with other means and stds, 0.253 with another epsilon.
    daisy = probabilities(parameters, "flower.jpg")
    assert daisy.argmax() == DAISY and daisy[DAISY] == pytest.approx(0.2273, abs=1e-3)
    palace = probabilities(parameters, "china.jpg")
    assert set(palace.argsort()[-5:]) <= set(LAKE_PALACE)
    assert palace[698] == pytest.approx(0.3018, abs=1e-3)


def test_every_parameter_has_a_place(parameters):
    assert sum(array.size for array in parameters.values()) == 4_694_024      # 4,652,008 plus moving averages
    with pytest.raises(AssertionError, match="left_over"):
        features.efficientnet_lite0({**parameters, "left_over.weight": np.zeros(3, np.float32)})
    with pytest.raises(KeyError, match="_blocks.7._bn1.bias"):
        features.efficientnet_lite0({name: array for name, array in parameters.items()
                                     if name != "_blocks.7._bn1.bias"})


# ------------------------------------------------------------------------------------------------------- the features

def test_features_are_the_same_on_every_stack(extractor):
    found = features.extract(extractor, smooth_images(3))
    assert found.shape == (3, 1280) and found.dtype == np.float64
    means_and_stds = np.stack([found.mean(axis=1), found.std(axis=1)])
    np.testing.assert_allclose(means_and_stds, MEANS_AND_STDS, rtol=0, atol=1e-6)


def test_features_do_not_depend_on_the_batch_around_them(extractor):
    images = smooth_images(features.BATCH + 3)
    together = features.extract(extractor, images)
    np.testing.assert_allclose(together[-1:], features.extract(extractor, images[-1:]), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(together[:3], features.extract(extractor, images[:3]))


def test_grey_is_red_green_and_blue_alike(extractor):
    grey = smooth_images(2)
    colour = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(features.extract(extractor, grey), features.extract(extractor, colour))


def test_resize_neither_aliases_nor_rounds():
    checkerboard = (np.indices((448, 448)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, :, :, None]
    np.testing.assert_allclose(features.resize(checkerboard, 224)[:, 4:-4, 4:-4], 127.5, atol=1.0)   # not 0 and 255
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))[None, :, :, None]
    enlarged = features.resize(ramp, 224)[0, 112, 20:-20, 0]
    np.testing.assert_allclose(enlarged, (np.arange(20, 204) + 0.5) * 64 / 224 - 0.5, atol=0.05)     # not in steps of 1


# --------------------------------------------------------------------------------------------- the parameters on disk

class Attack:
    """An object whose pickle makes the reader write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "owned")


@pytest.mark.parametrize("make", [lambda path: Attack(path), lambda path: OrderedDict(weight=Attack(path)),
                                  lambda path: eval, lambda path: __import__("os").system])
def test_a_malicious_pickle_is_refused(tmp_path, make):
    victim = tmp_path / "victim"
    attack = tmp_path / "attack"
    attack.write_bytes(pickle.dumps(make(victim), protocol=2))
    with attack.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="is not a tensor"):
        features.TensorUnpickler(file).load()
    assert not victim.exists()


def test_a_tensor_cannot_reach_out_of_its_storage():
    storage = np.arange(6, dtype="<f4")
    np.testing.assert_array_equal(features.rebuild_tensor(storage, 0, (2, 3), (1, 2)), storage.reshape(3, 2).T)
    np.testing.assert_array_equal(features.rebuild_tensor(storage, 2, (2, 2), (2, 1)), [[2, 3], [4, 5]])
    for offset, shape, strides in ((0, (7,), (1,)), (2, (5,), (1,)), (0, (2, 3), (4, 1)), (0, (2,), (-1,))):
        with pytest.raises((ValueError, TypeError)):
            features.rebuild_tensor(storage, offset, shape, strides)


def test_parameters_of_another_content_are_not_even_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "TensorUnpickler", None)
    damaged = tmp_path / "weights.pth"
    content = bytearray(features.find_parameters().read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    for path in (damaged, tmp_path / "missing.pth"):
        with pytest.raises(OasisError, match="pip install --force-reinstall"):
            features.read_tensors(path)


def test_missing_parameters_are_reported_with_a_cure(monkeypatch):
    def no_network(**_options):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(features.tf.keras.applications, "InceptionV3", no_network)
    with pytest.raises(OasisError, match="URL fetch failure.*--features efficientnet"):
        features.load_features("inception")
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OasisError, match="pip install -r requirements-evaluate.txt"):
        features.load_features("efficientnet")
