"""Fast versions of four layers of modules.py, with fewer memory passes and analytic gradients.

The plain layers are the definitions. Each public function names the plain layer that it equals and takes this layer,
whose parameters it reads. Most of the time of a U-Net that is not spent in convolutions goes into memory passes. A
normalization written with TensorFlow's operations takes about thirty memory passes in a training step. Here it takes
three or four, in functions that XLA compiles even on a CPU.

Notation: dx is the gradient of the loss with respect to x; x32 is x in float32.
"""
import functools
import math

import numpy as np
import tensorflow as tf
from einops import rearrange, reduce, repeat

from oasis.parameters import layers_inside

NORM_EPSILON = 1e-5   # of LayerNorm and GroupNorm
GROUPS = 8


def traced_once(function, xla=False):
    """Decorate a function of tensors so that a graph traces it once for each set of shapes. xla: compile it with XLA.

    A later call with the same shapes adds one operation to the graph, instead of all operations of the function. This
    shortens the start of a training, because each operation of the graph takes time to add. An eager call runs the
    function as it is.
    """
    traced = tf.function(function, jit_compile=xla or None, autograph=False)

    @functools.wraps(function)
    def call(*tensors):
        return (function if tf.executing_eagerly() else traced)(*map(tf.convert_to_tensor, tensors))
    return call


xla_fused = functools.partial(traced_once, xla=True)  # the compiled operations share one pass over memory


# ------------------------------------------------------------------------------------------------------------- Block

def block(layer, x, scale_shift=None):
    """Equals modules.Block: convolution, GroupNorm, scale and shift, SiLU. (B, H, W, C) → (B, H, W, F).

    The bias of the convolution, the normalization, γ and β, scale and shift are all affine in x. They are multiplied
    out on (B, F) numbers first, so that one pass over x applies all of them.
    """
    kernel = layer.conv.kernel if layer.frozen_kernel is None else tf.constant(layer.frozen_kernel)  # see frozen
    x = tf.nn.conv2d(x, tf.cast(kernel, x.dtype), strides=1, padding="SAME")
    if scale_shift is None:  # zeros, so that all Blocks of this shape share one trace
        scale_shift = tf.zeros([x.shape[0] or 1, 2 * x.shape[-1]])
    bias, scale_shift = tf.cast(layer.conv.bias, tf.float32), tf.cast(scale_shift, tf.float32)
    return norm_scale_shift_silu(x, layer.norm.gamma, layer.norm.beta, bias, scale_shift)


def group_norm_coefficients(moments, gamma, beta, bias, scale_shift):
    """Return (scale, shift), float32 (B, C): x · scale + shift is everything in a Block between convolution and SiLU.

    moments: the channel_moments of x. The other arguments are those of norm_scale_shift_silu.
    """
    time_scale, time_shift = tf.split(scale_shift, 2, axis=-1)
    mean, mean_square = tf.unstack(moments)
    channels = mean.shape[-1]
    moments = tf.stack([mean + bias, mean_square + bias * (2 * mean + bias)])
    mean, mean_square = tf.unstack(reduce(moments, "two b (g c) -> two b g", "mean", g=GROUPS))
    inverse_std = tf.math.rsqrt(tf.nn.relu(mean_square - tf.square(mean)) + NORM_EPSILON)
    mean, inverse_std = tf.unstack(repeat(tf.stack([mean, inverse_std]), "two b g -> two b (g c)",
                                          c=channels // GROUPS))
    scale = gamma * inverse_std
    shift = beta + (bias - mean) * scale
    return scale * (time_scale + 1), shift * (time_scale + 1) + time_shift


@traced_once
def norm_scale_shift_silu(x, gamma, beta, bias, scale_shift):
    """The part of modules.Block after its convolution, with the shape and dtype of x, in few memory passes.

    It adds the bias, applies GroupNorm, multiplies by scale + 1, adds the shift and applies SiLU. x: (B, H, W, C), the
    output of the convolution without its bias. gamma, beta: float32 (C,), of the GroupNorm. bias: float32 (C,), of the
    convolution. scale_shift: float32 (B, 2·C), the scale first. The backward pass keeps no activation but x and takes
    three memory passes.
    """
    @tf.custom_gradient
    def forward(x, *parameters):
        moments = channel_moments(x)

        def backward(dy):
            # The tape belongs in backward. In forward, the tensors that it keeps, such as axes of sums, would become
            # outputs of forward. XLA needs axes as compile-time constants, so it would take all inputs, the parameters
            # too, for constants, and compile the training step anew in every step.
            with tf.GradientTape() as tape:
                tape.watch([moments, *parameters])
                scale, shift = group_norm_coefficients(moments, *parameters)
            dz = silu_backward(dy, x, scale, shift)
            dshift, dscale = pixel_sums(dz, x)
            dmoments, *dparameters = tape.gradient([scale, shift], [moments, *parameters], [dscale, dshift])
            return affine_backward(dz, x, scale, dmoments), *dparameters
        z = affine(x, *group_norm_coefficients(moments, *parameters))
        # tf.nn.silu would not be fused, because TensorFlow does not know the shape of a compiled function's result.
        return z * tf.sigmoid(z), backward
    return forward(x, gamma, beta, bias, scale_shift)


@xla_fused
def affine(x, scale, shift):
    """z = x · scale + shift in the dtype of x (B, H, W, C). scale, shift: float32 (B, C)."""
    return tf.cast(tf.cast(x, tf.float32) * scale[:, None, None] + shift[:, None, None], x.dtype)


@xla_fused
def silu_backward(dy, x, scale, shift):
    """dz for y = z · σ(z), whose derivative is σ(z) (1 + z (1 - σ(z))), at z = x · scale + shift."""
    dy, x32 = tf.cast(dy, tf.float32), tf.cast(x, tf.float32)
    z = x32 * scale[:, None, None] + shift[:, None, None]
    sigmoid = tf.sigmoid(z)
    return tf.cast(dy * sigmoid * (1 + z * (1 - sigmoid)), x.dtype)


@xla_fused
def affine_backward(dz, x, scale, dmoments):
    """The gradient with respect to x of z = x · scale + shift, whose scale and shift depend on mean(x) and mean(x²).

    dz: the gradient with respect to z. dmoments: that with respect to mean(x) and mean(x²), (2, B, C).
    """
    dz, x32 = tf.cast(dz, tf.float32), tf.cast(x, tf.float32)
    dmean, dmean_square = tf.unstack(dmoments[:, :, None, None] / float(x.shape[1] * x.shape[2]))
    return tf.cast(dz * scale[:, None, None] + 2 * dmean_square * x32 + dmean, x.dtype)


def channel_moments(x):
    """E[x] and E[x²] over the pixels, for each image and channel of x (B, H, W, C): float32 (2, B, C)."""
    return tf.stack(pixel_sums(x, x)) / float(x.shape[1] * x.shape[2])


def pixel_sums(y, x):
    """Return the sums over all pixels of y and of y · x, float32 (B, C) each. y, x: (B, H, W, C)."""
    rows = (rearrange(sums, "b h (k c) -> b (h k) c", c=x.shape[-1]) for sums in row_sums(y, x))
    return [tf.reduce_sum(sums, axis=1) for sums in rows]


@xla_fused
def row_sums(y, x):
    """The sums of y and of y · x over every k-th pixel of a row: float32 (B, H, k·C) each.

    XLA is fastest on a CPU with 512 sums side by side, so k is about 512 / C.
    """
    k = math.gcd(x.shape[2], max(512 // x.shape[3], 1))
    y, x = (rearrange(tf.cast(part, tf.float32), "b h (w k) c -> b h w (k c)", k=k) for part in (y, x))
    return tf.reduce_sum(y, axis=2), tf.reduce_sum(y * x, axis=2)


# --------------------------------------------------------------------------------------------------------- attention

def linear_attention(layer, norm, x):
    """layer(norm(x)) in fewer memory passes. layer: a modules.LinearAttention. norm: the LayerNormalization before it.

    The γ and β of the LayerNorm in front are folded into the projections q, k and v, which thereby get biases. Because
    v = x W_v, we have kᵀv = (kᵀx) W_v. So W_v, the output projection, its bias and the mean subtraction of the output
    norm are applied to the small context matrix instead of to all N pixels. The softmax weights of k sum to one over
    the pixels, so the bias of v passes through unchanged, and the bias of k cancels. Those of q sum to one over the
    features of each head, so every row of the context gets the output's bias / heads.
    """
    height, width = x.shape[1:3]
    x = divide_by_std(x)
    pixels = rearrange(x, "b h w c -> b (h w) c")
    kernels = tf.split(matrix(layer.qkv), 3, axis=-1)
    (q_kernel, q_bias), (k_kernel, _), (v_kernel, v_bias) = (fold_layer_norm(norm, kernel) for kernel in kernels)
    # A 1×1 convolution is better than a matrix product here: TensorFlow adds its bias in the same memory pass.
    q = tf.nn.conv2d(x, tf.cast(q_kernel, x.dtype)[None, None], strides=1, padding="SAME")
    q = tf.nn.bias_add(q, tf.cast(q_bias, x.dtype))
    q = softmax(rearrange(q, "b h w (heads d) -> b (h w) heads d", heads=layer.heads))
    q = rearrange(q, "b n heads d -> b n (heads d)")
    k = tf.matmul(tf.cast(k_kernel, x.dtype)[None], pixels, transpose_a=True, transpose_b=True)
    k = softmax(k)                                                  # (B, heads·d, N), over the pixels
    context = tf.matmul(k, pixels)                                  # (B, heads·d, C)
    # The k of every head is multiplied by the v of every head, and a mask removes the cross terms. This takes a few
    # percent more arithmetic, but no transposes.
    context = tf.matmul(tf.cast(context, tf.float32), v_kernel) + v_bias
    context = context * (same_head(layer.heads, layer.head_dim) / (float(height * width) * layer.head_dim**0.5))
    out_bias = tf.cast(layer.out.bias, tf.float32) / layer.heads
    context = tf.matmul(context, tf.cast(matrix(layer.out), tf.float32)) + out_bias
    context = context - tf.reduce_mean(context, axis=-1, keepdims=True)
    y = tf.matmul(q, tf.cast(context, x.dtype))
    y = rearrange(y, "b (h w) c -> b h w c", h=height)
    gamma, beta = (tf.cast(part, tf.float32) for part in (layer.out_norm.gamma, layer.out_norm.beta))
    return layer_norm_of_centred(y, gamma, beta)


def attention(layer, norm, x):
    """Equals layer(norm(x)), a modules.Attention after a LayerNormalization: its qkv includes the norm."""
    x = divide_by_std(x)
    kernel, bias = (tf.cast(part, x.dtype) for part in fold_layer_norm(norm, matrix(layer.qkv)))
    qkv = tf.tensordot(x, kernel, 1) + bias
    qkv = rearrange(qkv, "b h w (three heads d) -> three b heads (h w) d", three=3, heads=layer.heads)
    q, k, v = tf.unstack(qkv)
    similarity = tf.matmul(q * layer.head_dim**-0.5, k, transpose_b=True)
    y = tf.matmul(softmax(similarity), v)
    return layer.out(rearrange(y, "b heads (h w) d -> b h w (heads d)", h=x.shape[1]))


def matrix(convolution):
    """The kernel of a 1×1 convolution as a matrix (C, F)."""
    return tf.reshape(convolution.kernel, convolution.kernel.shape[2:])


def same_head(heads, head_dim):
    """float32 (heads·d, heads·d): 1 where row and column belong to the same head, else 0."""
    return np.kron(np.eye(heads), np.ones([head_dim, head_dim])).astype(np.float32)


def fold_layer_norm(norm, kernel):
    """Return (K, b), float32 (C, F) and (F,), for which divide_by_std(x) @ K + b equals norm(x) @ kernel.

    Except for the division by the standard deviation, LayerNorm is affine: its mean subtraction, γ and β become part
    of the linear layer after it. norm: a LayerNormalization. kernel: (C, F).
    """
    gamma, beta, kernel = (tf.cast(part, tf.float32) for part in (norm.gamma, norm.beta, kernel))
    scaled = gamma[:, None] * kernel
    return scaled - tf.reduce_mean(scaled, axis=0, keepdims=True), tf.linalg.matvec(kernel, beta, transpose_a=True)


def divide_by_std(x):
    """Divide x, (B, H, W, C), by its standard deviation over the channels: y = x / √(variance + ε), in the dtype of x.

    The mean is not subtracted. The gradient is dx = (dy - (y - mean(y)) · mean(dy · y)) / √(variance + ε).
    """
    @tf.custom_gradient
    def forward(x):
        y, scale, mean = divide_by_std_forward(x)
        return y, lambda dy: divide_by_std_backward(dy, y, scale, mean)
    return forward(x)


@xla_fused
def divide_by_std_forward(x):
    """Return (y, 1/√(variance + ε), mean of y). The last two are float32 (B, H, W, 1) in every precision.

    All black pixels have the same value, so a rounding error of their scale would not average out.
    """
    x32 = tf.cast(x, tf.float32)
    mean = channel_mean(x32)
    scale = tf.math.rsqrt(channel_mean(tf.square(x32 - mean)) + NORM_EPSILON)
    return tf.cast(x32 * scale, x.dtype), scale, mean * scale


@xla_fused
def divide_by_std_backward(dy, y, scale, mean):
    """dx of y = divide_by_std(x), given dy. scale, mean: the second and third result of divide_by_std_forward."""
    dy, y32 = tf.cast(dy, tf.float32), tf.cast(y, tf.float32)
    return tf.cast((dy - (y32 - mean) * channel_mean(dy * y32)) * scale, y.dtype)


def layer_norm_of_centred(x, gamma, beta):
    """LayerNorm, in the dtype of x, of an x (B, H, W, C) whose channels have mean 0. gamma, beta: float32 (C,)."""
    @tf.custom_gradient
    def forward(x, gamma, beta):
        y, scale = layer_norm_forward(x, gamma, beta)

        def backward(dy):
            dx, normalized = layer_norm_backward(dy, x, scale, gamma)
            dbeta, dgamma = (tf.reduce_sum(sums, axis=0) for sums in pixel_sums(dy, normalized))
            return dx, dgamma, dbeta
        return y, backward
    return forward(x, gamma, beta)


@xla_fused
def layer_norm_forward(x, gamma, beta):
    """Return (LayerNorm of a centred x, 1/√(variance + ε) as float32 (B, H, W, 1))."""
    x32 = tf.cast(x, tf.float32)
    scale = tf.math.rsqrt(channel_mean(tf.square(x32)) + NORM_EPSILON)
    return tf.cast(x32 * scale * gamma + beta, x.dtype), scale


@xla_fused
def layer_norm_backward(dy, x, scale, gamma):
    """Return (dx, normalized x), both in the dtype of x: the gradient of layer_norm_forward, and x / √(variance + ε).

    dy: the gradient of its first result. scale: its second result, 1 / √(variance + ε). gamma: float32 (C,).
    """
    dy, normalized = tf.cast(dy, tf.float32) * gamma, tf.cast(x, tf.float32) * scale
    return tf.cast((dy - normalized * channel_mean(dy * normalized)) * scale, x.dtype), tf.cast(normalized, x.dtype)


def channel_mean(x):
    """The mean over the channels, (B, H, W, 1): a matrix product, because XLA sums a short axis slowly on a CPU."""
    channels = x.shape[-1]
    return tf.tensordot(x, tf.fill([channels, 1], 1 / channels), 1)


@tf.custom_gradient
def softmax(x):
    """Equals tf.nn.softmax over the last axis, in the dtype of x, but always computed in float32.

    TensorFlow's op computes float32 and bfloat16 in float32. float16 is cast first.
    """
    y = tf.cast(tf.nn.softmax(tf.cast(x, tf.float32) if x.dtype == tf.float16 else x), x.dtype)
    return y, lambda dy: softmax_backward(dy, y)


@xla_fused
def softmax_backward(dy, y):
    """dx = y · (dy - sum(dy · y)), with the sum over the last axis."""
    dy, y32 = tf.cast(dy, tf.float32), tf.cast(y, tf.float32)
    return tf.cast(y32 * (dy - tf.reduce_sum(dy * y32, axis=-1, keepdims=True)), y.dtype)


# --------------------------------------------------------------------------------------------------- last convolution

def pointwise(layer, x):
    """Equals layer(x), where layer is a 1×1 convolution, but computes a matrix product.

    If the convolution has few output channels, the gradient of its kernel takes half the time this way.
    """
    return tf.tensordot(tf.cast(x, layer.compute_dtype), matrix(layer), 1) + layer.bias


# ----------------------------------------------------------------------------------------------------------- sampling

def frozen(network):
    """Return a denoise_fn that equals the network, with the kernels of all Blocks, 4/5 of the parameters, as constants.

    TensorFlow changes the memory layout of a constant once, when it compiles, but that of a variable in every call.
    Compiling takes longer, so this pays from about 250 calls on. XLA does the same by itself: with XLA, use the
    network.
    """
    blocks = [layer for layer in layers_inside(network) if hasattr(layer, "frozen_kernel")]
    kernels = [tf.cast(block.conv.kernel, block.compute_dtype).numpy() for block in blocks]

    def denoise_fn(x, t, cond=None):
        for block, kernel in zip(blocks, kernels):
            block.frozen_kernel = kernel
        try:
            return network(x, t, cond)
        finally:
            for block in blocks:
                block.frozen_kernel = None
    return denoise_fn
