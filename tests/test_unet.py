"""The network against plain numpy, on either stack; and model files, whole, damaged and foreign.

The references are float64 and written straightforwardly: one loop over heads, one einsum for each product.
"""
import functools
import hashlib
from math import erf

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import modules
from common import OasisError
from modules import (Attention, GroupNormalization, GroupNormSilu, LayerNorm, LinearAttention, PixelsDown, PixelsUp, Residual, TimeEmbedding, UNet,
                     check_image_size, load_model, named_variables, read_model, save_model, start_from_model)

RNG = np.random.default_rng(0)
NAMES_DIGEST = "318761e80a1f807bb5b5d785caf974f92826bf032cafe1b656440f79f7873e76"  # of names and shapes of the default network
SMALL = dict(image_size=16, dim=16, dim_mults=(1, 2))
SETTINGS = dict(image_size=16, dim=16, dim_mults=[1, 2], channels=1, patch_size=1, pixel_width=0, timesteps=1000, objective="v",
                schedule="cosine", note="größer")
X, TIME = RNG.standard_normal([2, 16, 16, 1]).astype(np.float32), np.array([3, 700], np.int32)


@pytest.fixture(scope="module")
def default_network():
    return UNet(64)


@pytest.fixture(scope="module")
def network():
    return small()


@functools.cache
def small(**options):
    """A small network in which every weight matters. Tests share it: they must not change it."""
    return awake(UNet(**{**SMALL, **options}))


def awake(network):
    """The same network with random numbers for every weight that starts at 0 or 1; the same ones for the same shapes."""
    rng = np.random.default_rng(1)
    for name, variable in named_variables(network):
        if not np.unique(variable.numpy()).size > 1:
            variable.assign(variable + 0.1 * rng.standard_normal(variable.shape))
    return network


def randomize(layer, x, *args):
    """Build a layer on x and fill it with random weights; returns {name: float64 array}."""
    layer(tf.constant(x, tf.float32), *args)
    for variable in layer.weights:
        variable.assign(RNG.normal(0.3, 0.5, variable.shape))
    return {name: variable.numpy().astype(np.float64) for name, variable in named_variables(layer)}


# ------------------------------------------------------------------------------------------------------ the weights

def test_the_default_network_has_32294837_weights(default_network):
    assert sum(np.prod(variable.shape) for variable in default_network.trainable_variables) == 32_294_837
    assert sum(np.prod(variable.shape) for variable in default_network.weights) == 32_294_837


def test_names_and_shapes_of_the_weights_never_change(default_network):
    """A model file of one version or one stack must load on another."""
    lines = [f"{name} {tuple(map(int, variable.shape))}" for name, variable in named_variables(default_network)]
    assert len(set(lines)) == len(lines) == len(default_network.weights) == 258
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == NAMES_DIGEST


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = (dict(named_variables(UNet(16, dim=16, dim_mults=[1], seed=seed))) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name].numpy() != other[name].numpy()) == (name.endswith("kernel") and name != "last_conv.kernel")


def test_initial_weights_are_the_same_on_every_stack(default_network):
    variables = dict(named_variables(default_network))
    np.testing.assert_allclose(np.ravel(variables["stem.kernel"])[:3], [0.03984573, -0.01951159, 0.00845368], atol=1e-8)
    np.testing.assert_allclose(np.ravel(variables["up.2.resample.kernel"])[:3], [-0.04847414, 0.01446669, 0.04978989], atol=1e-8)


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
            assert values.std() == pytest.approx(std, rel=0.02) and abs(values).max() == pytest.approx(std * 3**0.5, rel=0.01)


def test_an_untrained_network_returns_zero():
    assert np.all(UNet(**SMALL)(X, TIME) == 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_weight_gets_a_gradient(precision):
    network = small(precision=precision)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(network(X, TIME)))
    for (name, variable), gradient in zip(named_variables(network),
                                          tape.gradient(loss, [variable for _, variable in named_variables(network)])):
        assert gradient is not None and gradient.dtype == variable.dtype == tf.float32, name
        assert np.all(np.isfinite(gradient)) and np.any(gradient != 0), name


# ------------------------------------------------------------------------------------------------------- the layers

def reference_group_norm(x, gamma, beta, groups=8, scale_shift=None):
    x = x.astype(np.float64)
    y = x.reshape(*x.shape[:3], groups, -1)
    y = (y - y.mean((1, 2, 4), keepdims=True)) / np.sqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * gamma + beta
    if scale_shift is not None:
        scale, shift = np.split(scale_shift.astype(np.float64)[:, None, None], 2, axis=-1)
        y = y * (scale + 1) + shift
    return y


def silu(x):
    return x / (1 + np.exp(-x))


def reference_layer_norm(x, gamma, beta):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def reference_attention(x, weights, heads, head_dim, linear):
    batch, height, width, _ = x.shape
    qkv = (x.astype(np.float64) @ weights["qkv.kernel"][0, 0]).reshape(batch, height * width, 3, heads, head_dim)
    y = np.zeros([batch, height * width, heads, head_dim])
    for head in range(heads):
        q, k, v = (qkv[:, :, i, head] for i in range(3))
        if linear:
            q, k, v = softmax(q, axis=2) * head_dim**-0.5, softmax(k, axis=1), v / (height * width)
            context = np.einsum("bnd,bne->bde", k, v)
            y[:, :, head] = np.einsum("bnd,bde->bne", q, context)
        else:
            similarity = softmax(np.einsum("bnd,bmd->bnm", q * head_dim**-0.5, k), axis=2)
            y[:, :, head] = np.einsum("bnm,bmd->bnd", similarity, v)
    y = y.reshape(batch, height, width, heads * head_dim) @ weights["out.kernel"][0, 0] + weights["out.bias"]
    return reference_layer_norm(y, weights["out_norm.gamma"], weights["out_norm.beta"]) if linear else y


FEATURES = RNG.normal(1.0, 2.0, [3, 6, 5, 24]).astype(np.float32) * np.linspace(0.5, 3, 24, dtype=np.float32)


def test_group_norm_of_this_stack_and_ours_are_the_paper():
    """3 channels a group, another mean and size in every channel; the stack's own layer takes our weights."""
    ours, stack = (cls(groups=8, epsilon=1e-5) for cls in (GroupNormSilu, GroupNormalization))
    weights = randomize(ours, FEATURES)
    stack.build(FEATURES.shape)
    for mine, theirs in zip(ours.weights, stack.weights):
        assert mine.shape == theirs.shape == (24,)
        theirs.assign(mine)
    expected = reference_group_norm(FEATURES, weights["gamma"], weights["beta"])
    np.testing.assert_allclose(stack(FEATURES), expected, atol=1e-5)
    np.testing.assert_allclose(ours(FEATURES), silu(expected), atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 2**-7), ("float16", 2**-10)])
def test_group_norm_scales_and_shifts_by_time(dtype, tolerance):
    norm = GroupNormSilu(groups=8, epsilon=1e-5, dtype="float32", autocast=False)
    weights = randomize(norm, FEATURES)
    x = tf.cast(FEATURES, dtype)
    scale_shift = tf.cast(RNG.standard_normal([3, 48]), dtype)
    expected = reference_group_norm(tf.cast(x, tf.float32).numpy(), **weights, scale_shift=tf.cast(scale_shift, tf.float32).numpy())
    y = norm(x, scale_shift)
    assert y.dtype == dtype
    # rounded: the product and the sum, each at most as large as the two terms of the sum
    np.testing.assert_allclose(tf.cast(y, tf.float32), silu(expected), atol=tolerance * np.abs(expected).max())


def test_group_norm_in_half_precision_takes_its_statistics_in_float32():
    norm = GroupNormSilu(groups=8, epsilon=1e-5, dtype="float32", autocast=False)
    x = tf.cast(np.full([1, 64, 64, 16], 300.0) + RNG.normal(0, 100, [1, 64, 64, 16]), tf.float16)  # the squares overflow
    expected = reference_group_norm(x.numpy(), 1.0, 0.0)
    np.testing.assert_allclose(tf.cast(norm(x), tf.float32), silu(expected), atol=0.01)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 4e-3)])
def test_gradients_of_group_norm_are_those_of_the_plain_formula(dtype, tolerance, compiled):
    """They are written out in closed form, which XLA compiles in a graph; here the formula of the paper is differentiated, in float64."""
    norm = GroupNormSilu(groups=8, epsilon=1e-5, dtype="float32", autocast=False)
    randomize(norm, FEATURES)
    x, scale_shift = tf.cast(FEATURES, dtype), tf.cast(RNG.standard_normal([3, 48]), dtype)
    upstream = tf.cast(RNG.standard_normal(FEATURES.shape), dtype)

    def gradients(x, scale_shift, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, scale_shift, bias])
            y = norm(x, scale_shift, bias)
        return tape.gradient(y, [x, scale_shift, bias, norm.gamma, norm.beta], upstream)
    bias = tf.constant(RNG.standard_normal(24), tf.float32)
    ours = (tf.function(gradients) if compiled else gradients)(x, scale_shift, bias)

    weights = (tf.convert_to_tensor(norm.gamma), tf.convert_to_tensor(norm.beta))
    inputs = [tf.cast(tensor, tf.float64) for tensor in (x, scale_shift, bias, *weights)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        x, scale_shift, bias, gamma, beta = inputs
        groups = tf.reshape(x + bias, [3, 6, 5, 8, 3])
        mean, variance = tf.nn.moments(groups, axes=[1, 2, 4], keepdims=True)
        y = tf.reshape((groups - mean) / tf.sqrt(variance + 1e-5), x.shape) * gamma + beta
        scale, shift = tf.split(scale_shift[:, None, None], 2, axis=-1)
        y = y * (scale + 1) + shift
        y = y * tf.sigmoid(y)
    for mine, expected in zip(ours, tape.gradient(y, inputs, tf.cast(upstream, tf.float64))):
        np.testing.assert_allclose(tf.cast(mine, tf.float64), expected, atol=tolerance * np.abs(expected).max())


def test_group_norm_of_a_flat_picture_is_its_beta():
    norm = GroupNormSilu(groups=8, epsilon=1e-5)
    assert np.all(np.isfinite(norm(tf.fill([1, 4, 4, 16], 1000.0)))) and np.all(norm(tf.zeros([1, 4, 4, 16])) == 0)


@pytest.mark.parametrize("policy,tolerance", [("float32", 1e-5), ("mixed_bfloat16", 2**-6), ("mixed_float16", 2**-9)])
def test_layer_norm_behind_a_centred_map_is_over_the_channels_of_each_pixel(policy, tolerance):
    norm = LayerNorm(dtype=tf.keras.mixed_precision.Policy(policy))
    weights = randomize(norm, FEATURES)
    x = tf.cast(modules.centred(FEATURES, axis=-1), norm.compute_dtype)
    expected = reference_layer_norm(tf.cast(x, tf.float32).numpy(), **weights)
    y = norm(x)
    assert y.dtype == norm.compute_dtype
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=tolerance * np.abs(expected).max())


def test_layer_norm_goes_into_the_matrix_behind_it():
    norm, matrix = LayerNorm(), RNG.standard_normal([24, 5]).astype(np.float32)
    weights = randomize(norm, FEATURES)
    kernel, bias = norm.into(matrix)
    expected = reference_layer_norm(FEATURES, **weights) @ matrix
    np.testing.assert_allclose(modules.divide_by_deviation(FEATURES).numpy() @ kernel.numpy() + bias, expected, atol=1e-4)


PLAIN = {  # each in its own words, and how many (C,) parameters it takes
    modules.divide_by_deviation: (lambda x: x / tf.sqrt(tf.math.reduce_variance(x, axis=-1, keepdims=True) + 1e-5), 0),
    modules.norm_of_centred: (lambda x, gamma, beta: x / tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + 1e-5) * gamma + beta, 2),
    modules.softmax: (tf.nn.softmax, 0),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 2e-3)])
@pytest.mark.parametrize("function", PLAIN)
def test_gradients_by_hand_are_those_of_the_plain_formula(function, dtype, tolerance, compiled):
    plain_function, number = PLAIN[function]
    upstream = tf.cast(RNG.standard_normal(FEATURES.shape), dtype)
    inputs = [tf.cast(FEATURES, dtype), *(tf.constant(RNG.standard_normal(24), tf.float32) for _ in range(number))]

    def value_and_gradients(function, upstream, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        return y, *tape.gradient(y, inputs, upstream)
    ours = tf.function(lambda *tensors: value_and_gradients(function, *tensors), jit_compile=compiled, autograph=False)(upstream, *inputs)
    plain = value_and_gradients(plain_function, *(tf.cast(tensor, tf.float64) for tensor in (upstream, *inputs)))
    for mine, expected, like in zip(ours, plain, [upstream, *inputs], strict=True):
        assert mine.dtype == like.dtype
        np.testing.assert_allclose(tf.cast(mine, tf.float64), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("heads,head_dim", [(1, 32), (3, 8)])
@pytest.mark.parametrize("layer,linear", [(LinearAttention, True), (Attention, False)])
def test_attention_is_the_paper_head_by_head(layer, linear, heads, head_dim):
    """x + attention(norm(x)), the norm and the layer apart."""
    residual = Residual(layer(24, heads, head_dim))
    weights = randomize(residual, FEATURES)
    inner = {name.removeprefix("layer."): array for name, array in weights.items()}
    normalised = reference_layer_norm(FEATURES, weights["norm.gamma"], weights["norm.beta"])
    expected = FEATURES + reference_attention(normalised, inner, heads, head_dim, linear)
    np.testing.assert_allclose(residual(FEATURES), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layer", [LinearAttention, Attention])
def test_attention_in_half_precision_is_near_float32(layer):
    policy = tf.keras.mixed_precision.Policy("mixed_bfloat16")
    exact, half = Residual(layer(24, 3, 8)), Residual(layer(24, 3, 8, dtype=policy), dtype=policy)
    randomize(exact, FEATURES)
    randomize(half, FEATURES)
    for theirs, mine in zip(half.weights, exact.weights):
        theirs.assign(mine)
    x = tf.cast(tf.cast(FEATURES, tf.bfloat16), tf.float32)
    expected, y = exact(x) - x, half(x)
    assert y.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(y, tf.float32) - x, expected, atol=0.03 * np.abs(expected).max() + 2**-9 * np.abs(y).max())


def test_attention_survives_large_logits():
    for layer in (LinearAttention(24, 2), Attention(24, 2)):
        residual = Residual(layer)
        randomize(residual, FEATURES)
        layer.qkv.kernel.assign(1000 * layer.qkv.kernel)
        assert np.all(np.isfinite(residual(FEATURES)))


def test_time_embedding_is_sines_then_cosines_from_1_to_1_in_10000():
    embedding = TimeEmbedding(16)
    t = np.array([0, 1, 999], np.int32)
    weights = randomize(embedding, t)
    angles = t[:, None] * 10000.0 ** -(np.arange(8) / 7)
    x = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    x = x @ weights["dense1.kernel"] + weights["dense1.bias"]
    x = x * (1 + np.vectorize(erf)(x / 2**0.5)) / 2
    np.testing.assert_allclose(embedding(t), x @ weights["dense2.kernel"] + weights["dense2.bias"], atol=5e-4)


def test_time_embedding_tells_neighbouring_times_apart_in_half_precision():
    """In bfloat16 itself 998 and 1000 would be one number."""
    embedding = TimeEmbedding(64, dtype=tf.keras.mixed_precision.Policy("mixed_bfloat16"))
    y = tf.cast(embedding(tf.range(990, 1000)), tf.float32).numpy()
    assert len(np.unique(y, axis=0)) == 10


# -------------------------------------------------------------------------------------------------------- the whole

@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_output_is_float32_of_the_size_of_the_input(precision):
    y = small(precision=precision)(X, TIME)
    assert y.shape == (2, 16, 16, 1) and y.dtype == tf.float32 and np.all(np.isfinite(y)) and np.std(y) > 0.1


@pytest.mark.parametrize("precision,tolerance", [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision_is_near_float32(network, precision, tolerance):
    half = small(precision=precision)
    exact, rounded = network(X, TIME), half(X, TIME)
    assert 0 < np.sqrt(np.mean((exact - rounded)**2)) < tolerance * np.std(exact)


def test_pictures_of_a_batch_do_not_see_each_other(network):
    np.testing.assert_allclose(network(X, TIME)[1:], network(X[1:], TIME[1:]), atol=1e-5)
    assert np.any(np.abs(network(X, TIME[::-1]) - network(X, TIME)) > 1e-2)  # and they see their time


def test_one_network_takes_every_size_and_shape(network):
    for height, width in ((2, 2), (32, 32), (16, 24)):
        assert network(tf.zeros([1, height, width, 1]), TIME[:1]).shape == (1, height, width, 1)


def test_patches_fold_pixels_into_channels():
    """Patch p is the same network on an S/p grid of p² channels: only the first and the last convolution differ."""
    plain, patched = (awake(UNet(16, dim=16, dim_mults=[1], channels=channels, patch_size=patch_size))
                      for channels, patch_size in ((4, 1), (1, 2)))
    for (name, theirs), (same_name, mine) in zip(named_variables(patched), named_variables(plain)):
        assert name == same_name and theirs.shape == mine.shape
        theirs.assign(mine)
    x = RNG.standard_normal([2, 8, 8, 4]).astype(np.float32)
    unfolded = x.reshape(2, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 16, 1)
    y = plain(x, TIME).numpy().reshape(2, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 16, 1)
    np.testing.assert_allclose(patched(unfolded, TIME), y, atol=1e-5)


def test_the_way_down_of_the_pixel_level_is_its_formula():
    """A ResNet block on the 3×3 convolution of the noisy image; a patch of that, times a matrix, is what the patches' stem gets."""
    level = PixelsDown(8, stem_width=3, patch_size=2)
    image, time = RNG.standard_normal([2, 6, 4, 2]), RNG.standard_normal([2, 7])
    weights = randomize(level, image, tf.constant(time, tf.float32))
    skip = reference_resnet_block(reference_convolution(image, weights, "stem"), time, weights, "block")
    patches = skip.reshape(2, 3, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 3, 2, 32)
    folded = patches @ weights["fold.kernel"].reshape(32, 3) + weights["fold.bias"]
    for computed, expected in zip(level(tf.constant(image, tf.float32), tf.constant(time, tf.float32)), (folded, skip)):
        np.testing.assert_allclose(computed, expected, atol=1e-5 * np.abs(expected).max())


def test_the_way_up_of_the_pixel_level_is_its_formula():
    """Two ResNet blocks on the skip connection beside the features, each pixel's own where a patch unfolds."""
    level = PixelsUp(8, channels=2, patch_size=2)
    skip, features, time = (RNG.standard_normal(shape) for shape in ([2, 6, 4, 8], [2, 3, 2, 5], [2, 7]))
    weights = randomize(level, skip, *(tf.constant(x, tf.float32) for x in (features, time)))
    unfolded = features @ weights["unfold.kernel"][0, 0] + weights["unfold.bias"]
    unfolded = unfolded.reshape(2, 3, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 4, 8)
    x = np.concatenate([skip, unfolded], axis=-1)
    for block in "block1", "block2":
        x = reference_resnet_block(x, time, weights, block)
    expected = reference_convolution(x, weights, "last_conv")
    computed = level(*(tf.constant(x, tf.float32) for x in (skip, features, time)))
    np.testing.assert_allclose(computed, expected, atol=1e-5 * np.abs(expected).max())


def reference_resnet_block(x, time, weights, block):
    y, scale_shift = x, silu(time) @ weights[f"{block}.time.kernel"] + weights[f"{block}.time.bias"]
    for name in f"{block}.block1", f"{block}.block2":
        norm = weights[f"{name}.norm.gamma"], weights[f"{name}.norm.beta"]
        y = silu(reference_group_norm(reference_convolution(y, weights, f"{name}.conv"), *norm, scale_shift=scale_shift))
        scale_shift = None
    return y + (reference_convolution(x, weights, f"{block}.skip") if f"{block}.skip.kernel" in weights else x)


def reference_convolution(x, weights, name):
    kernel = weights[f"{name}.kernel"]
    reach, (height, width) = kernel.shape[0] // 2, x.shape[1:3]
    x = np.pad(x.astype(np.float64), [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    return weights[f"{name}.bias"] + sum(x[:, i:i + height, j:j + width] @ kernel[i, j] for i, j in np.ndindex(*kernel.shape[:2]))


def test_a_network_starts_as_if_it_had_no_pixel_level():
    """What it adds to the patches' stem and to the output is zero at first, and later neither is."""
    plain, with_pixels = (UNet(**SMALL, patch_size=2, pixel_width=width) for width in (0, 8))
    theirs = dict(named_variables(awake(plain)))
    mine = dict(named_variables(with_pixels))
    for name, variable in theirs.items():
        mine[name].assign(variable)
    expected = plain(X, TIME)
    np.testing.assert_array_equal(with_pixels(X, TIME), expected)
    for layer in "pixels_down.fold", "pixels_up.last_conv":
        kernel = mine[f"{layer}.kernel"]
        kernel.assign(RNG.normal(0, 0.5, kernel.shape))
        assert np.std(with_pixels(X, TIME) - expected) > 0.1
        kernel.assign(tf.zeros(kernel.shape))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frozen_network_computes_the_same_from_constants(precision):
    """Only then does TensorFlow keep the kernels as its convolutions want them: as variables they could change."""
    network = awake(UNet(**SMALL, precision=precision))
    expected = tf.function(network, autograph=False)(X, TIME)
    network.freeze()
    frozen = tf.function(lambda x, t: network(x, t), autograph=False).get_concrete_function(X, TIME)
    np.testing.assert_array_equal(frozen(tf.constant(X), tf.constant(TIME)), expected)
    kernels = [variable.shape for name, variable in named_variables(network) if ".block1.conv.kernel" in name or ".block2.conv.kernel" in name]
    constants = [operation.outputs[0].shape for operation in frozen.graph.get_operations()
                 if operation.type == "Const" and operation.outputs[0].shape.rank == 4]
    assert sorted(map(tuple, constants)) == sorted(map(tuple, kernels)) and len(kernels) == 18


def test_it_compiles_under_xla(network):
    compiled = tf.function(network, jit_compile=True)
    expected = network(X, TIME)
    np.testing.assert_allclose(compiled(X, TIME), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("image_size,patch_size,levels,nearest", [(100, 1, 4, "96 and 104"), (250, 4, 4, "224 and 256"),
                                                                 (7, 1, 4, "8"), (0, 1, 4, "8"), (18, 2, 2, "16 and 20")])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(image_size, patch_size, levels, nearest):
    with pytest.raises(OasisError, match=f"{image_size}.* {nearest}$"):
        check_image_size(image_size, patch_size, levels)
    with pytest.raises(OasisError, match=nearest):
        UNet(image_size, dim=16, dim_mults=[1] * levels, patch_size=patch_size)


def test_sizes_that_divide_are_fine():
    for image_size, patch_size in ((8, 1), (64, 1), (104, 1), (32, 4), (256, 4)):
        check_image_size(image_size, patch_size, 4)


# ------------------------------------------------------------------------------------------------------ model files

@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, network, SETTINGS)
    return path


def test_a_model_comes_back_as_it_was_saved(network, saved):
    again, diffusion, settings = load_model(saved)
    np.testing.assert_array_equal(again(X, TIME), network(X, TIME))
    assert settings == SETTINGS
    assert (diffusion.timesteps, diffusion.objective, diffusion.schedule) == (1000, "v", "cosine")
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # nothing temporary is left


def test_every_argument_of_the_network_travels_in_the_file(tmp_path):
    network = awake(UNet(24, dim=8, dim_mults=(1, 3), channels=2, patch_size=2, pixel_width=16))
    save_model(tmp_path / "a.safetensors", network, {**SETTINGS, "image_size": 24, "dim": 8, "dim_mults": [1, 3], "channels": 2,
                                                     "patch_size": 2, "pixel_width": 16, "timesteps": 50, "objective": "x_start", "schedule": "shifted"})
    again, diffusion, _ = load_model(tmp_path / "a.safetensors")
    x = tf.random.stateless_normal([1, 24, 24, 2], [1, 2])
    np.testing.assert_array_equal(again(x, TIME[:1]), network(x, TIME[:1]))
    assert (again.image_size, again.channels, again.patch_size, again.pixel_width) == (24, 2, 2, 16)
    assert (diffusion.timesteps, diffusion.objective, diffusion.schedule, diffusion.image_size) == (50, "x_start", "shifted", 24)


def test_a_file_from_before_there_were_schedules_and_pixel_levels_has_the_linear_one_and_none(network, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name not in ("schedule", "pixel_width")}
    save_model(tmp_path / "a.safetensors", network, settings)
    again, diffusion, _ = load_model(tmp_path / "a.safetensors")
    assert diffusion.schedule == "linear" and again.pixel_width == 0


@pytest.mark.parametrize("ratio, patch_size, pixel_width", [(1, 1, 0), (2, 1, 0), (4, 1, 8), (2, 2, 0)])
def test_a_larger_network_starts_as_the_smaller_one_on_the_means_of_pixels(tmp_path, ratio, patch_size, pixel_width):
    channels = 2 if patch_size == 1 else 1
    options = dict(dim=16, dim_mults=(1, 2), channels=channels)
    theirs = awake(UNet(8, patch_size=patch_size, **options))
    save_model(tmp_path / "small.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(8 * ratio, patch_size=patch_size * ratio, pixel_width=pixel_width, seed=1, **options)
    start_from_model(mine, tmp_path / "small.safetensors", SETTINGS["objective"])
    x = RNG.standard_normal([2, 8 * ratio, 8 * ratio, channels]).astype(np.float32)
    means = x.reshape(2, 8, ratio, 8, ratio, channels).mean(axis=(2, 4))
    expected = theirs(means, TIME).numpy().repeat(ratio, axis=1).repeat(ratio, axis=2)
    np.testing.assert_allclose(mine(x, TIME), expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("width, taken_over", [(8, True), (0, False), (16, False)])
def test_a_pixel_level_of_another_width_starts_anew(tmp_path, width, taken_over):
    theirs = awake(UNet(**SMALL, patch_size=2, pixel_width=8))
    save_model(tmp_path / "theirs.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(**SMALL, patch_size=2, pixel_width=width)
    start_from_model(mine, tmp_path / "theirs.safetensors", SETTINGS["objective"])
    expected = theirs
    if not taken_over:
        expected = UNet(**SMALL, patch_size=2)
        weights = dict(named_variables(theirs))
        for name, variable in named_variables(expected):
            variable.assign(weights[name])
        assert np.std(theirs(X, TIME) - expected(X, TIME)) > 0.1
    np.testing.assert_array_equal(mine(X, TIME), expected(X, TIME))


@pytest.mark.parametrize("other", [dict(dim=32), dict(dim_mults=(1, 1)), dict(channels=3), dict(patch_size=4)])
def test_a_network_of_another_shape_is_no_start(tmp_path, other):
    theirs = UNet(16, **{**dict(dim=16, dim_mults=(1, 2), patch_size=2), **other})
    save_model(tmp_path / "other.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(16, dim=16, dim_mults=(1, 2), patch_size=2)
    before = [variable.numpy() for variable in mine.weights]
    with pytest.raises(OasisError, match="other.safetensors.*only the patch size"):
        start_from_model(mine, tmp_path / "other.safetensors", SETTINGS["objective"])
    for old, variable in zip(before, mine.weights):
        np.testing.assert_array_equal(old, variable)


def test_a_model_that_predicts_something_else_is_no_start(saved):
    mine = UNet(**SMALL)
    before = [variable.numpy() for variable in mine.weights]
    with pytest.raises(OasisError, match="predicts v, .* --objective x_start"):
        start_from_model(mine, saved, "x_start")
    for old, variable in zip(before, mine.weights):
        np.testing.assert_array_equal(old, variable)


def test_a_float16_file_is_half_the_size_and_nearly_the_same(network, saved, tmp_path):
    save_model(tmp_path / "half.safetensors", network, SETTINGS, np.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * saved.stat().st_size
    again, _, _ = load_model(tmp_path / "half.safetensors")
    exact = network(X, TIME)
    assert all(variable.dtype == "float32" for variable in again.weights)
    assert np.sqrt(np.mean((again(X, TIME) - exact)**2)) < 0.004 * np.std(exact)


def test_a_model_computes_in_the_precision_asked_for(network, saved):
    half, _, _ = load_model(saved, precision="bfloat16")
    np.testing.assert_array_equal(half.stem.kernel, network.stem.kernel)
    assert half.stem.compute_dtype == "bfloat16" and np.any(half(X, TIME) != network(X, TIME))


def refused(path, content=None):
    """The message with which load_model refuses that file."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OasisError) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    return str(refusal.value)


def refused_with_one_bit_flipped(path, content, positions):
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(OasisError, match=str(path)):
            read_model(path)


def test_a_damaged_byte_of_the_weights_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    names = 8 + content[8:].index(b"}") + 2  # after the metadata
    header = 8 + int.from_bytes(content[:8], "little")
    refused_with_one_bit_flipped(tmp_path / "a.safetensors", content, [*range(8), *range(names, header, 97), header - 1])
    refused_with_one_bit_flipped(tmp_path / "a.safetensors", content, [*range(header, len(content), 99_991), len(content) - 1])


def test_a_damaged_byte_of_the_settings_is_noticed(saved, tmp_path):
    """Not one digit of them may change: the network would take its 1000 steps for 1001."""
    content = saved.read_bytes()
    start = content.index(b'"settings":"') + 12
    refused_with_one_bit_flipped(tmp_path / "a.safetensors", content, range(start, content.index(b'}"', start)))


def test_truncated_files_are_refused(saved, tmp_path):
    content = saved.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        refused(tmp_path / "short.safetensors", content[:length])
    refused(tmp_path / "long.safetensors", content + b"\0")


def test_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "a.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(1000))
    assert "train.py" in refused(tmp_path / "b.safetensors", safetensors.numpy.save({"kernel": np.zeros(3, np.float32)}))
    assert "train.py" in refused(tmp_path / "c.safetensors", safetensors.numpy.save({"kernel": np.zeros(3)}, {"format": "pt"}))
    assert "no such" in refused(tmp_path / "missing.safetensors")
    refused(tmp_path)


@pytest.mark.parametrize("change", [dict(image_size=17), dict(dim=32), dict(dim_mults=[1, 2, 4]), dict(objective="score"),
                                    dict(timesteps=0), dict(dim=None), dict(channels=0)])
def test_settings_that_do_not_fit_the_weights_are_refused(network, tmp_path, change):
    save_model(tmp_path / "a.safetensors", network, {**SETTINGS, **change})
    refused(tmp_path / "a.safetensors")


def test_settings_that_are_not_there_are_refused(network, tmp_path):
    for settings in ({}, [], None, {name: value for name, value in SETTINGS.items() if name != "timesteps"}):
        save_model(tmp_path / "a.safetensors", network, settings)
        refused(tmp_path / "a.safetensors")


def test_a_save_that_fails_leaves_the_old_file(network, saved, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())
    with pytest.raises(TypeError):
        save_model(path, network, {"settings": object()})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert read_model(path)[1] == SETTINGS
