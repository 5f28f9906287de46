"""The whole network: its parameters, its precision, patches and the full-resolution level; the fused, frozen and
compiled networks."""
import functools
import hashlib

import numpy as np
import pytest
import tensorflow as tf

from helpers import awake
from modules import UNet
from oasis.files import OasisError, check_image_size
from oasis.fused import frozen
from oasis.parameters import initialize, named_variables

RNG = np.random.default_rng(0)
NAMES_DIGEST = "318761e80a1f807bb5b5d785caf974f92826bf032cafe1b656440f79f7873e76"  # of the default network
SMALL = dict(image_size=16, dim=16, dim_mults=(1, 2))
UPSTREAM = np.random.default_rng(2).standard_normal([2, 16, 16, 1]).astype(np.float32)
X, TIME = RNG.standard_normal([2, 16, 16, 1]).astype(np.float32), np.array([3, 700], np.int32)


@pytest.fixture(scope="module")
def default_network():
    return UNet(64)


@pytest.fixture(scope="module")
def network():
    return small()


@functools.cache
def small(**options):
    """A small network in which every parameter matters. Tests share it: they must not change it."""
    return awake(UNet(**{**SMALL, **options}))


# ------------------------------------------------------------------------------------------------------ parameters

def test_the_default_network_has_32294837_parameters(default_network):
    assert sum(np.prod(variable.shape) for variable in default_network.trainable_variables) == 32_294_837
    assert sum(np.prod(variable.shape) for variable in default_network.weights) == 32_294_837


def test_names_and_shapes_of_the_parameters_never_change(default_network):
    """Every version of the program and of TensorFlow must load the same model files."""
    lines = [f"{name} {tuple(map(int, variable.shape))}" for name, variable in named_variables(default_network)]
    assert len(set(lines)) == len(lines) == len(default_network.weights) == 258
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == NAMES_DIGEST


def test_parameters_of_a_layer_with_sublayers_have_names_too():
    class Scaled(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = tf.keras.layers.Dense(2)
            self.dense.build([1, 3])
            self.gain = self.add_weight(name="gain", shape=[2], initializer="ones")

    layer = Scaled()
    assert [name for name, _ in named_variables(layer)] == ["dense.kernel", "dense.bias", "gain"]
    initialize(layer, seed=0)
    np.testing.assert_array_equal(layer.gain, [1, 1])


def test_initial_parameters_are_a_function_of_the_seed():
    first, again, other = (dict(named_variables(UNet(16, dim=16, dim_mults=[1], seed=seed))) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        depends = name.endswith("kernel") and name != "last_conv.kernel"
        assert np.any(first[name].numpy() != other[name].numpy()) == depends


def test_initial_parameters_are_the_same_on_every_stack(default_network):
    variables = dict(named_variables(default_network))
    np.testing.assert_allclose(np.ravel(variables["stem.kernel"])[:3], [0.03984573, -0.01951159, 0.00845368], atol=1e-8)
    up = np.ravel(variables["up.2.resample.kernel"])[:3]
    np.testing.assert_allclose(up, [-0.04847414, 0.01446669, 0.04978989], atol=1e-8)


def test_kernels_are_glorot_uniform_and_the_rest_is_neutral(default_network):
    for name, variable in named_variables(default_network):
        values = variable.numpy()
        if name.startswith("last_conv") or name.endswith(("bias", "beta")):
            assert np.all(values == 0)
        elif name.endswith("gamma"):
            assert np.all(values == 1)
        elif values.size > 20_000:
            area = np.prod(values.shape[:-2])
            std = np.sqrt(2 / (area * (values.shape[-2] + values.shape[-1])))
            assert values.std() == pytest.approx(std, rel=0.02)
            assert abs(values).max() == pytest.approx(std * 3**0.5, rel=0.01)


# -------------------------------------------------------------------------------------------------------- the whole

def test_images_of_a_batch_are_independent(network):
    np.testing.assert_allclose(network(X, TIME)[1:], network(X[1:], TIME[1:]), atol=1e-5)
    assert np.any(np.abs(network(X, TIME[::-1]) - network(X, TIME)) > 1e-2)  # but each depends on its timestep


def test_one_network_takes_every_size_and_shape(network):
    for height, width in ((2, 2), (32, 32), (16, 24)):
        assert network(tf.zeros([1, height, width, 1]), TIME[:1]).shape == (1, height, width, 1)


def test_patches_fold_pixels_into_channels():
    """With patch size p the same network works on an S/p grid of p² channels: only first and last kernels differ."""
    plain, patched = (awake(UNet(16, dim=16, dim_mults=[1], channels=channels, patch_size=patch_size))
                      for channels, patch_size in ((4, 1), (1, 2)))
    for (name, theirs), (same_name, mine) in zip(named_variables(patched), named_variables(plain)):
        assert name == same_name and theirs.shape == mine.shape
        theirs.assign(mine)
    x = RNG.standard_normal([2, 8, 8, 4]).astype(np.float32)
    unfolded = x.reshape(2, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 16, 1)
    y = plain(x, TIME).numpy().reshape(2, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 16, 1)
    np.testing.assert_allclose(patched(unfolded, TIME), y, atol=1e-5)


def test_a_full_resolution_level_changes_nothing_at_first():
    """The terms that it adds to the stem and to the output are zero at first, and not zero for other parameters."""
    plain, with_level = (UNet(**SMALL, patch_size=2, pixel_width=width) for width in (0, 8))
    theirs = dict(named_variables(awake(plain)))
    mine = dict(named_variables(with_level))
    for name, variable in theirs.items():
        mine[name].assign(variable)
    expected = plain(X, TIME)
    np.testing.assert_array_equal(with_level(X, TIME), expected)
    for layer in "pixels_down.fold", "pixels_up.last_conv":
        kernel = mine[f"{layer}.kernel"]
        kernel.assign(RNG.normal(0, 0.5, kernel.shape))
        assert np.std(with_level(X, TIME) - expected) > 0.1
        kernel.assign(tf.zeros(kernel.shape))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frozen_network_computes_the_same_from_constants(precision):
    """The kernels are constants in the frozen network's graph, but not in a graph traced from the network later."""
    network = small(precision=precision)

    def kernels_in_graph(denoise_fn):
        graph = tf.function(lambda x, t: denoise_fn(x, t), autograph=False).get_concrete_function(X, TIME)
        found = [operation.outputs[0].shape for operation in graph.graph.get_operations()
                 if operation.type == "Const" and operation.outputs[0].shape.rank == 4]
        return graph(tf.constant(X), tf.constant(TIME)), sorted(map(tuple, found))

    output, constants = kernels_in_graph(frozen(network))
    expected, none = kernels_in_graph(network)
    np.testing.assert_array_equal(output, expected)
    blocks = [variable.shape for name, variable in named_variables(network)
              if ".block1.conv.kernel" in name or ".block2.conv.kernel" in name]
    assert constants == sorted(map(tuple, blocks)) and len(blocks) == 18 and none == []


def output_and_gradients(network):
    with tf.GradientTape() as tape:
        y = network(X, TIME)
        loss = tf.reduce_sum(y * tf.constant(UPSTREAM))
    return y, tape.gradient(loss, [variable for _, variable in named_variables(network)])


@pytest.fixture(scope="module")
def plain():
    """(network, output, gradients) of the plain network in float32."""
    network = awake(UNet(**SMALL, fused=False))
    return network, *tf.function(output_and_gradients, autograph=False)(network)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 4e-3)])
def test_fused_and_plain_networks_agree(plain, precision, tolerance):
    """Outputs and the gradients of all parameters agree. In half precision, the reference is the plain network in
    float32."""
    fast, (plain_network, expected, plain_gradients) = small(precision=precision), plain
    for (name, theirs), (same_name, mine) in zip(named_variables(fast), named_variables(plain_network)):
        assert name == same_name and np.array_equal(theirs, mine)
    y, gradients = tf.function(output_and_gradients, autograph=False)(fast)
    assert np.sqrt(np.mean((y - expected)**2)) < tolerance * np.std(expected)
    for (name, _), gradient, expected in zip(named_variables(fast), gradients, plain_gradients):
        error = np.sqrt(np.mean((gradient - expected)**2)) / np.sqrt(np.mean(expected**2))
        assert error < 10 * tolerance, (name, error)


def test_it_compiles_under_xla(network):
    compiled = tf.function(network, jit_compile=True)
    expected = network(X, TIME)
    np.testing.assert_allclose(compiled(X, TIME), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("image_size,patch_size,levels,nearest", [
    (100, 1, 4, "96 and 104"), (250, 4, 4, "224 and 256"), (7, 1, 4, "8"), (0, 1, 4, "8"), (18, 2, 2, "16 and 20")])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(image_size, patch_size, levels, nearest):
    with pytest.raises(OasisError, match=f"{image_size}.* (is|are) {nearest}$"):
        check_image_size(image_size, patch_size, levels)
    with pytest.raises(OasisError, match=nearest):
        UNet(image_size, dim=16, dim_mults=[1] * levels, patch_size=patch_size)


def test_sizes_that_divide_are_fine():
    for image_size, patch_size in ((8, 1), (64, 1), (104, 1), (32, 4), (256, 4)):
        check_image_size(image_size, patch_size, 4)
