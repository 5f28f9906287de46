"""Each plain layer against numpy, and each function of oasis/fused.py against the plain layer that it equals.

The references are float64 and written straightforwardly: one loop over heads, one einsum for each product.
"""
from math import erf

import numpy as np
import pytest
import tensorflow as tf

from modules import Attention, Block, Embedding, LinearAttention, PixelsDown, PixelsUp, Residual
from oasis import fused
from oasis.parameters import named_variables

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(1.0, 2.0, [3, 6, 5, 24]).astype(np.float32) * np.linspace(0.5, 3, 24, dtype=np.float32)
PRECISIONS = [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 6e-3)]  # the tolerances against float32


def randomize(layer, x, *args):
    """Build a layer on x and fill it with random parameters; returns {name: float64 array}."""
    layer(tf.constant(x, tf.float32), *args)
    for variable in layer.weights:
        variable.assign(RNG.normal(0.3, 0.5, variable.shape))
    return {name: variable.numpy().astype(np.float64) for name, variable in named_variables(layer)}


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


def reference_resnet_block(x, time, weights, block):
    y, scale_shift = x, silu(time) @ weights[f"{block}.time.kernel"] + weights[f"{block}.time.bias"]
    for name in f"{block}.block1", f"{block}.block2":
        norm = weights[f"{name}.norm.gamma"], weights[f"{name}.norm.beta"]
        y = reference_convolution(y, weights, f"{name}.conv")
        y = silu(reference_group_norm(y, *norm, scale_shift=scale_shift))
        scale_shift = None
    return y + (reference_convolution(x, weights, f"{block}.skip") if f"{block}.skip.kernel" in weights else x)


def reference_convolution(x, weights, name):
    kernel = weights[f"{name}.kernel"]
    reach, (height, width) = kernel.shape[0] // 2, x.shape[1:3]
    x = np.pad(x.astype(np.float64), [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    shifts = np.ndindex(*kernel.shape[:2])
    return weights[f"{name}.bias"] + sum(x[:, i:i + height, j:j + width] @ kernel[i, j] for i, j in shifts)


# ------------------------------------------------------------------------------------------------- the plain layers

@pytest.mark.parametrize("with_time", [False, True])
def test_block_is_convolution_group_norm_scale_shift_silu(with_time):
    block = Block(16)
    weights = randomize(block, FEATURES)
    scale_shift = RNG.standard_normal([3, 32]) if with_time else None
    expected = silu(reference_group_norm(reference_convolution(FEATURES, weights, "conv"), weights["norm.gamma"],
                                         weights["norm.beta"], scale_shift=scale_shift))
    y = block(FEATURES, None if scale_shift is None else tf.constant(scale_shift, tf.float32))
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layer, fast", [(LinearAttention, fused.linear_attention), (Attention, fused.attention)])
def test_half_precision_does_not_round_the_parameters_of_a_norm(layer, fast):
    seen = []
    residual = Residual(layer(24, 2, dtype=policy("bfloat16")), lambda layer, norm, x: seen.append(
        [tf.convert_to_tensor(norm.gamma), tf.convert_to_tensor(norm.beta)]) or fast(layer, norm, x),
        dtype=policy("bfloat16"))
    residual(FEATURES)
    residual.norm.gamma.assign(tf.fill([24], 1.001))  # the bfloat16 numbers beside it are 1 and 1.0078
    residual.fused = residual.layer.fused = True
    residual(FEATURES)
    (gamma, beta), = seen
    assert gamma.dtype == beta.dtype == tf.float32 and np.all(gamma == np.float32(1.001))


@pytest.mark.parametrize("heads, head_dim", [(1, 32), (3, 8)])
@pytest.mark.parametrize("layer, linear", [(LinearAttention, True), (Attention, False)])
def test_attention_is_the_paper_head_by_head(layer, linear, heads, head_dim):
    attention = layer(24, heads, head_dim)
    weights = randomize(attention, FEATURES)
    expected = reference_attention(FEATURES, weights, heads, head_dim, linear)
    np.testing.assert_allclose(attention(FEATURES), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_residual_adds_the_layer_of_the_normalized_input():
    residual = Residual(tf.keras.layers.Dense(24))
    weights = randomize(residual, FEATURES)
    normalized = reference_layer_norm(FEATURES, weights["norm.gamma"], weights["norm.beta"])
    expected = FEATURES + normalized @ weights["layer.kernel"] + weights["layer.bias"]
    np.testing.assert_allclose(residual(FEATURES), expected, atol=1e-5 * np.abs(expected).max())
    residual.fused = True  # without a fast function, the plain layer is used
    np.testing.assert_allclose(residual(FEATURES), expected, atol=1e-5 * np.abs(expected).max())


def test_the_down_half_of_the_full_resolution_level():
    """A 3×3 convolution of the noisy image and a ResNet block give the skip. Each of its patches, times a matrix, is
    the term for the stem."""
    level = PixelsDown(8, stem_width=3, patch_size=2)
    image, time = RNG.standard_normal([2, 6, 4, 2]), RNG.standard_normal([2, 7])
    weights = randomize(level, image, tf.constant(time, tf.float32))
    skip = reference_resnet_block(reference_convolution(image, weights, "stem"), time, weights, "block")
    patches = skip.reshape(2, 3, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 3, 2, 32)
    folded = patches @ weights["fold.kernel"].reshape(32, 3) + weights["fold.bias"]
    for computed, expected in zip(level(tf.constant(image, tf.float32), tf.constant(time, tf.float32)), (folded, skip)):
        np.testing.assert_allclose(computed, expected, atol=1e-5 * np.abs(expected).max())


def test_the_up_half_of_the_full_resolution_level():
    """Two ResNet blocks on the skip connection and the features of each patch, which are turned into pixels."""
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


def test_time_embedding_is_sines_then_cosines_from_1_to_1_in_10000():
    embedding = Embedding(16)
    t = np.array([0, 1, 999], np.int32)
    weights = randomize(embedding, t)
    angles = t[:, None] * 10000.0 ** -(np.arange(8) / 7)
    x = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    x = x @ weights["dense1.kernel"] + weights["dense1.bias"]
    x = x * (1 + np.vectorize(erf)(x / 2**0.5)) / 2
    np.testing.assert_allclose(embedding(t), x @ weights["dense2.kernel"] + weights["dense2.bias"], atol=5e-4)


def test_time_embedding_tells_neighbouring_times_apart_in_half_precision():
    """In bfloat16, 998 and 1000 round to the same number."""
    embedding = Embedding(64, dtype=tf.keras.mixed_precision.Policy("mixed_bfloat16"))
    y = tf.cast(embedding(tf.range(990, 1000)), tf.float32).numpy()
    assert len(np.unique(y, axis=0)) == 10


# ------------------------------------------------------------------------------------------------- fused = plain

def policy(precision):
    return tf.keras.mixed_precision.Policy(precision if precision == "float32" else f"mixed_{precision}")


LAYERS = {
    "block": (lambda **options: Block(16, **options), False),
    "block with time": (lambda **options: Block(16, **options), True),
    "linear attention, 1 head": (
        lambda **options: Residual(LinearAttention(24, 1, 32, **options), fused.linear_attention, **options), False),
    "linear attention, 3 heads": (
        lambda **options: Residual(LinearAttention(24, 3, 8, **options), fused.linear_attention, **options), False),
    "attention, 1 head": (
        lambda **options: Residual(Attention(24, 1, 32, **options), fused.attention, **options), False),
    "attention, 3 heads": (
        lambda **options: Residual(Attention(24, 3, 8, **options), fused.attention, **options), False),
}


def values_and_gradients(layer, inputs, upstream):
    """The output of a layer, and {name: gradient} with respect to the inputs and the parameters."""
    variables = dict(named_variables(layer))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layer(*inputs)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * upstream)
    gradients = tape.gradient(loss, [*inputs, *variables.values()])
    names = ["x", "scale_shift"][:len(inputs)] + list(variables)
    return {"y": y, **dict(zip(names, gradients))}


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_fused_layer_equals_the_plain_one(name, precision, tolerance):
    """In half precision, the reference is the plain layer in float32 with the same rounded numbers."""
    make, with_time = LAYERS[name]
    rng = np.random.default_rng(1)  # a new generator: the numbers do not depend on earlier tests
    plain, fast = make(), make(dtype=policy(precision))
    plain(FEATURES), fast(FEATURES)
    for mine, theirs in zip(plain.weights, fast.weights):
        mine.assign(tf.cast(tf.cast(rng.normal(0.1, 0.2, mine.shape), precision), tf.float32))
        theirs.assign(mine)
    for layer in (fast, *([fast.layer] if name[0] != "b" else [])):
        layer.fused = True
    inputs = [tf.cast(tensor, precision) for tensor in (FEATURES, rng.standard_normal([3, 32]))[:1 + with_time]]
    upstream = tf.cast(tf.cast(rng.standard_normal(plain(FEATURES).shape), precision), tf.float32)

    def call(layer, *inputs):
        return values_and_gradients(layer, list(inputs), upstream)
    ours = tf.function(call, autograph=False)(fast, *inputs)
    expected = call(plain, *(tf.cast(tensor, tf.float32) for tensor in inputs))
    assert ours["y"].dtype == ours["x"].dtype == precision
    for key, value in expected.items():
        error = np.sqrt(np.mean((tf.cast(ours[key], tf.float32) - value)**2))
        # In float16, large terms cancel in this gradient: of 16 draws the largest error was 0.0076.
        cancels = (key, precision) == ("norm.gamma", "float16") and name.startswith("linear")
        assert error <= (2 if cancels else 1) * tolerance * np.sqrt(np.mean(value**2)), key


def test_pointwise_equals_a_1x1_convolution():
    layer = tf.keras.layers.Conv2D(5, 1)
    randomize(layer, FEATURES)
    x, upstream = tf.constant(FEATURES), tf.constant(RNG.standard_normal([3, 6, 5, 5]), tf.float32)
    results = []
    for function in (layer, lambda x: fused.pointwise(layer, x)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        results.append([y, *tape.gradient(y, [x, *layer.weights], upstream)])
    for mine, expected in zip(*results):
        np.testing.assert_allclose(mine, expected, atol=1e-5 * np.abs(expected).max())


PLAIN = {  # {fused function: (plain formula, number of (C,) parameters)}
    fused.divide_by_std: (lambda x: x / tf.sqrt(tf.math.reduce_variance(x, axis=-1, keepdims=True) + 1e-5), 0),
    fused.layer_norm_of_centred: (
        lambda x, gamma, beta: x / tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + 1e-5) * gamma + beta, 2),
    fused.softmax: (tf.nn.softmax, 0),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 2e-3)])
@pytest.mark.parametrize("function", PLAIN)
def test_analytic_gradients_compiled_by_xla_are_those_of_the_formula(function, dtype, tolerance):
    plain_function, number = PLAIN[function]
    upstream = tf.cast(RNG.standard_normal(FEATURES.shape), dtype)
    inputs = [tf.cast(FEATURES, dtype), *(tf.constant(RNG.standard_normal(24), tf.float32) for _ in range(number))]

    def value_and_gradients(function, upstream, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        return y, *tape.gradient(y, inputs, upstream)
    ours = tf.function(lambda *tensors: value_and_gradients(function, *tensors), jit_compile=True,
                       autograph=False)(upstream, *inputs)
    plain = value_and_gradients(plain_function, *(tf.cast(tensor, tf.float64) for tensor in (upstream, *inputs)))
    assert len(ours) == len(plain) == 1 + len(inputs)
    for mine, expected, like in zip(ours, plain, [upstream, *inputs]):
        assert mine.dtype == like.dtype
        np.testing.assert_allclose(tf.cast(mine, tf.float64), expected, atol=tolerance * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------ hard inputs

def wide_block(precision):
    """A fused Block of 16 channels whose convolution is the identity."""
    block = Block(16, dtype=policy(precision))
    block(tf.zeros([1, 4, 4, 16]))
    block.fused = True
    kernel = np.zeros([3, 3, 16, 16], np.float32)
    kernel[1, 1] = np.eye(16)
    block.conv.kernel.assign(kernel)
    return block


def test_fused_statistics_are_float32_in_half_precision():
    x = tf.cast(RNG.normal(300, 100, [1, 64, 64, 16]), tf.float16)  # the squares overflow
    expected = silu(reference_group_norm(x.numpy(), 1.0, 0.0))
    np.testing.assert_allclose(tf.cast(wide_block("float16")(x), tf.float32), expected, atol=0.01)


def test_a_flat_image_is_finite_and_a_black_one_zero():
    block = wide_block("float32")
    assert np.all(np.isfinite(block(tf.fill([1, 4, 4, 16], 1000.0)))) and np.all(block(tf.zeros([1, 4, 4, 16])) == 0)


@pytest.mark.parametrize("layer, fast", [(LinearAttention, fused.linear_attention), (Attention, fused.attention)])
def test_attention_survives_large_logits(layer, fast):
    residual = Residual(layer(24, 2), fast)
    randomize(residual, FEATURES)
    residual.layer.qkv.kernel.assign(1000 * residual.layer.qkv.kernel)
    for residual.fused in (False, True):
        assert np.all(np.isfinite(residual(FEATURES)))
