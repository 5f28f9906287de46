"""The loop over the steps of a sampler, as one compiled function."""
import numpy as np
import tensorflow as tf


def compile_loop(start, step, steps, frames, jit_compile, on_step):
    """Return a tf.function loop(*inputs) that returns (x, trajectory).

    A state is a tuple of tensors, the first of which is x. The loop begins with start(*inputs), and step(i, state,
    *inputs) returns the next state, for i = 0 … steps - 1. It returns the last x. trajectory: a stack of max(frames,
    2) evenly spaced x, from the one before the first step to the one after the last.

    on_step: a Python function without arguments that is called in every step, or None; None if jit_compile.
    """
    frame_steps = np.linspace(0, steps, max(frames, 2)).round().astype(np.int32)  # the number of steps done

    def call_on_step():
        on_step()  # the result is not returned, because py_function would make a tensor of it

    @tf.function(jit_compile=jit_compile, autograph=False)
    def loop(*inputs):
        def counted_step(i, *state):
            x, *rest = step(i, state, *inputs)
            if on_step:
                with tf.control_dependencies([tf.py_function(call_on_step, [], [])]):
                    x = tf.identity(x)
            return i + 1, tf.ensure_shape(x, state[0].shape), *rest

        def to_next_frame(frame, trajectory, i, *state):
            until = tf.gather(frame_steps, frame)
            i, *state = tf.while_loop(lambda i, *_: i < until, counted_step, (i, *state), parallel_iterations=1)
            return frame + 1, trajectory.write(frame, state[0]), i, *state

        state = start(*inputs)
        trajectory = tf.TensorArray(tf.float32, size=len(frame_steps), element_shape=state[0].shape).write(0, state[0])
        _, trajectory, _, x, *_ = tf.while_loop(
            lambda frame, *_: frame < len(frame_steps), to_next_frame,
            (tf.constant(1), trajectory, tf.constant(0), *state), parallel_iterations=1)
        return x, trajectory.stack()
    return loop
