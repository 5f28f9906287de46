"""The Adam optimizer of train.py."""
import tensorflow as tf


class Adam(tf.Module):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980) as one TensorFlow kernel per parameter. Keras needs twenty operations.

    With a few hundred parameters, Keras' operations make up half of the graph and a third of the time until the first
    step.
    """
    BETA1, BETA2 = 0.9, 0.999
    EPSILON = 1e-7  # ε̂, which is added before the bias correction (end of section 2 of the paper), as in Keras

    def __init__(self, parameters, learning_rate, decay_after=0):
        """decay_after: s; if s > 0, the learning rate of each step k > s is divided by √(k/s) (Karras 2024, arXiv
        2312.02696), otherwise it is constant."""
        super().__init__()
        self.parameters, self.learning_rate, self.decay_after = parameters, learning_rate, decay_after
        self.means = [tf.Variable(tf.zeros(parameter.shape)) for parameter in parameters]
        self.squares = [tf.Variable(tf.zeros(parameter.shape)) for parameter in parameters]
        self.steps = tf.Variable(0, dtype=tf.int64)

    def apply(self, gradients, factor):
        """Do one step of Adam for the gradients times `factor`, a scalar."""
        add_one(self.steps)
        steps = tf.cast(self.steps, tf.float32)
        decay = tf.math.rsqrt(tf.maximum(steps / self.decay_after, 1.0)) if self.decay_after else 1.0
        rate, beta1, beta2, epsilon = map(tf.constant, (self.learning_rate, self.BETA1, self.BETA2, self.EPSILON))
        numbers = dict(lr=rate * decay, beta1=beta1, beta2=beta2, epsilon=epsilon, beta1_power=beta1**steps,
                       beta2_power=beta2**steps)
        for parameter, mean, square, gradient in zip(self.parameters, self.means, self.squares, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=parameter.handle, m=mean.handle, v=square.handle, grad=gradient * factor, **numbers)


def add_one(counter):
    """Add 1 to an int64 variable on this replica alone; assign_add would communicate with the other replicas."""
    tf.raw_ops.AssignAddVariableOp(resource=counter.handle, value=tf.constant(1, tf.int64))
