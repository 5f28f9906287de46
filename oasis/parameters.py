"""The parameters of a network by name: found, initialized and assigned the same way in all TensorFlow versions."""
import json

import numpy as np
import tensorflow as tf
from tensorflow.keras import layers

from oasis import modelfile
from oasis.files import OasisError, first_line
from oasis.settings import as_flag


def children(layer):
    """Return [(name, layer)] of a layer's attributes that are layers ("stem"), or lists of layers ("down.0")."""
    found = []
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            is_list = isinstance(value, (list, tuple))
            found += [(f"{name}.{i}", child) for i, child in enumerate(value)] if is_list else [(name, value)]
    return [(name, child) for name, child in found if isinstance(child, layers.Layer)]


def layers_inside(layer):
    """All layers inside a layer, at any depth."""
    return [found for _, child in children(layer) for found in (child, *layers_inside(child))]


def named_variables(layer, prefix=""):
    """Return [(name, variable)] of a layer and all layers inside it, such as "down.0.block1.block1.conv.kernel".

    The names come from the attributes of the layers, so they are unique and the same in every TensorFlow version.
    """
    inside = [pair for name, child in children(layer) for pair in named_variables(child, f"{prefix}{name}.")]
    found = {id(variable) for _, variable in inside}
    own = [variable for variable in layer.weights if id(variable) not in found]
    return inside + [(prefix + variable.name.split("/")[-1].split(":")[0], variable) for variable in own]


def exchange_values(first, second):
    """Exchange the values of two variables. If there is no memory for the copies, neither changes."""
    values = tf.identity(first), tf.identity(second)
    second.assign(values[0])
    first.assign(values[1])


def initialize(network, seed, zero=()):
    """Set Glorot-uniform kernels (Glorot & Bengio 2010), which depend on the seed and the kernel's place alone.

    zero: names of layers, such as "last_conv", whose parameters become zero instead.
    """
    for index, (name, variable) in enumerate(named_variables(network)):
        if f".{name}".split(".")[-2] in zero:
            variable.assign(tf.zeros(variable.shape))
        elif name.endswith("kernel"):
            area = np.prod(variable.shape[:-2])
            limit = np.sqrt(6 / (area * (variable.shape[-2] + variable.shape[-1])))
            variable.assign(tf.random.stateless_uniform(variable.shape, [seed, index], -limit, limit, alg="philox"))


def assign_parameters(network, arrays, error):
    """Set the parameters of a network to {name: array}. Raises OasisError(error) if a name or a shape differs."""
    variables = dict(named_variables(network))
    if {name: array.shape for name, array in arrays.items()} != {name: tuple(v.shape) for name, v in variables.items()}:
        raise OasisError(error)
    for name, variable in variables.items():
        variable.assign(arrays[name].astype(np.float32))


def start_from_model(network, path, diffusion, ema=()):
    """Copy the parameters of a model file into a network, which may have larger images and patches than the model.

    modelfile.enlarge adapts the parameters to larger patches. If the full-resolution level (pixel_width) of the network
    has another width or patch size than that of the model, it keeps its initial parameters.
    ema: the variables of the EMA, in the order of named_variables. They get the same values.
    Returns the number of images that the model was trained on. Raises OasisError if the network differs from that of
    the model in anything else, or if the model has another objective, schedule, number of timesteps or condition.
    """
    arrays, settings = modelfile.read_model(path)
    print(f"starting from {path}")
    for name, value in {**diffusion.settings, "condition": network.settings["condition"]}.items():
        if (other := settings.get(name, "")) != value:
            raise OasisError(f"{path}: was trained with {as_flag(name, other)}, so it cannot be the start of a model "
                             f"with {as_flag(name, value)}: give {as_flag(name, other)}, or another model")
    try:
        modelfile.check_settings(settings, sum(array.size for array in arrays.values()))
        initial = {name: variable.numpy() for name, variable in named_variables(network) if name.startswith("pixels")}
        arrays = {**initial, **modelfile.enlarge(arrays, settings, network.settings)}
        assign_parameters(network, arrays, "its parameters have other shapes")
    except modelfile.SETTINGS_ERRORS as error:
        wrong = ", ".join(f"{name} {settings.get(name)} instead of {value}"
                          for name, value in json.loads(json.dumps(network.settings)).items()
                          if settings.get(name) != value) or first_line(error)
        raise OasisError(f"{path}: cannot be the start of this network, because it has {wrong}. Only pixel_width may "
                         "differ, and image_size and patch_size may be smaller by a whole factor.") from error
    for variable, (_, parameter) in zip(ema, named_variables(network)):
        variable.assign(parameter)
    return settings.get("images", 0)
