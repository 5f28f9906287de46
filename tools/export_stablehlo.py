"""Export the compiled training step, the network and a whole sampler as StableHLO, for a machine with JAX alone.

    python tools/export_stablehlo.py OUT --image-size 64 --batch-size 32      what train.py runs with these flags
    python tools/export_stablehlo.py OUT --model oasis64 --programs sampler   a sampler of a model file
    python tools/export_stablehlo.py OUT --plain --no-images                  the plain layers, and no training images

The programs are what TensorFlow hands to XLA on a GPU, where it compiles whole steps. tools/run_stablehlo.py hands
them to the XLA of JAX. The flags of train.py describe the training and the network; `auto` precision is bfloat16.
The folder OUT gets

    about.json                what the programs take and return, the names and the initial values of the state, and
                              the settings for the model file
    step.stablehlo, …         the programs: a jax.export artifact each, compressed, which runs on CPUs and GPUs
    parameters.safetensors    the initial parameters; without it, tools/run_stablehlo.py draws random ones
    images.npz                the training images, uint8, and perhaps their positions

Needs `pip install jax==0.10.2` beside TensorFlow, because the conversion uses internals of JAX.
"""
import argparse
import dataclasses
import json
import lzma
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oasis.files import OasisError, import_tensorflow, make_folder, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
import safetensors.numpy
import tensorflow as tf

import modules
import train
from dataset import as_tuple
from oasis import preparation
from oasis.conditions import has, needs_heads, null_condition
from oasis.generate import noise_options
from oasis.modelfile import find_model
from oasis.parameters import layers_inside, named_variables, start_from_model
from oasis.settings import PRIVATE, values_without
from tools.benchmark import gflop_per_image

PROGRAMS = ("step", "network", "sampler")


# ------------------------------------------------------------------------------------------------------- conversion

def lower(function, inputs):
    """Return the serialized HLO of function(*inputs), and the variables that it uses, in the order of its parameters.

    function: of tensors, or dicts of them. TensorFlow lowers it for XLA as it does for a GPU, but with its CPU's
    translation of each operation. If the function changes variables, its results end with all of them.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    captured = compiled.get_concrete_function(*inputs).captured_inputs
    return compiled.experimental_get_compiler_ir(*inputs)(stage="hlo_serialized"), captured


def to_artifact(hlo):
    """Convert a serialized HLO: return a serialized jax.export artifact, and {StableHLO operation: its count}."""
    import jax
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir, passmanager
    from jax._src.lib.mlir.dialects import hlo as stablehlo
    jax.config.update("jax_enable_x64", True)  # seeds and steps are int64
    computation = xla_client.XlaComputation(hlo)
    text = to_stablehlo(xla_client._xla.mlir.xla_computation_to_mlir_module(computation))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo,symbol-dce)").run(module.operation)
        counts = count_operations(str(module))
        week4 = stablehlo.StablehloCompatibilityRequirement.WEEK_4  # a JAX of the last month reads it, and newer ones
        program = stablehlo.serialize_portable_artifact(
            module, stablehlo.get_version_from_compatibility_requirement(week4))
    shape = computation.program_shape()
    result = shape.result_shape()
    return wrap(program, shape.parameter_shapes(), result.tuple_shapes() if result.is_tuple() else [result]), counts


def to_stablehlo(text):
    """Return the text of an MLIR module without mhlo.copy and the module's attributes, which StableHLO lacks."""
    text = re.sub(r"mhlo\.copy (%\w+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", text)
    return re.sub(r"^module @.*$", "module @program {", text, count=1, flags=re.MULTILINE)


def count_operations(text):
    """Return {name: count} of the operations in the text of an MLIR module, {"add": 2994, …}, most frequent first."""
    names, counts = np.unique(re.findall(r"\bstablehlo\.(\w+)", text), return_counts=True)
    return {str(names[i]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}


def wrap(program, parameters, results):
    """A serialized jax.export artifact that holds a StableHLO program with these XLA shapes instead of its own."""
    import jax
    from jax import export
    inputs, outputs = ([jax.ShapeDtypeStruct(one.dimensions(), np.dtype(one.numpy_dtype())) for one in shapes]
                       for shapes in (parameters, results))

    def stand_in(*_):
        return tuple(jax.numpy.zeros(one.shape, one.dtype) for one in outputs)
    artifact = export.export(jax.jit(stand_in), platforms=["cpu"])(*inputs)
    return dataclasses.replace(artifact, mlir_module_serialized=program, uses_global_constants=False,
                               module_kept_var_idx=tuple(range(len(inputs)))).serialize()


# --------------------------------------------------------------------------------------------------------- programs

def describe(tensors):
    """Return [{name, shape, dtype}] of {name: tensor}."""
    return [dict(name=name, shape=list(tensor.shape), dtype=tf.as_dtype(tensor.dtype).name)
            for name, tensor in tensors.items()]


def export_program(folder, name, function, inputs, outputs, variables, **facts):
    """Write folder/NAME.stablehlo of function(*inputs) and return its entry for about.json.

    inputs: {name: tensor or dict of tensors}. outputs: the names of its results. variables: {name: variable}, all that
    the function may use.
    """
    began = time.perf_counter()
    hlo, captured = lower(function, list(inputs.values()))
    names = {id(variable.handle): name for name, variable in variables.items()}
    state = [names[id(handle)] for handle in captured]
    artifact, counts = to_artifact(hlo)
    (folder / f"{name}.stablehlo").write_bytes(lzma.compress(bytes(artifact)))
    print(f"{name}: {sum(counts.values()):,} operations, {time.perf_counter() - began:.0f} s", flush=True)
    flat = {f"{name}/{key}" if key else name: value for name, part in inputs.items()
            for key, value in (sorted(part.items()) if isinstance(part, dict) else [("", part)])}
    return dict(inputs=describe(flat), outputs=outputs, state=state, operations=counts, **facts)


def state_of(trainer):
    """Return {name: variable} of all that training changes: parameters, their EMA, and the optimizer's moments."""
    names = [name for name, _ in named_variables(trainer.network)]
    kinds = dict(parameter=trainer.parameters, ema=trainer.ema_parameters, mean=trainer.optimizer.means,
                 square=trainer.optimizer.squares)
    state = {f"{kind}/{name}": variable for kind, variables in kinds.items()
             for name, variable in zip(names, variables)}
    state.update({"optimizer_steps": trainer.optimizer.steps, "step": trainer.step})
    return state | {f"loss_weights/{i}": one for i, one in enumerate(trainer.loss_weights.variables)}


def describe_state(variables):
    """Describe {name: variable} for about.json: a list with a dict of name, shape, dtype and start for each variable.

    start: the initial value of all entries, or None if they differ, as those of a kernel do.
    """
    values = [variable.numpy() for variable in variables.values()]
    return [dict(entry, start=value.flat[0].item() if np.ptp(value) == 0 else None)
            for entry, value in zip(describe(variables), values)]


def export_step(folder, trainer, batch_size, data):
    """Export the training step, Trainer.update, see export_program. data: a result of preparation.attach."""
    images, *positions = as_tuple(data)
    inputs = dict(images=tf.zeros([batch_size, *images.shape[1:]]))
    if positions:
        inputs["positions"] = tf.zeros([batch_size, *positions[0].shape[1:]], tf.int32)

    def step(*batch):
        return trainer.update(batch if positions else batch[0])
    return export_program(folder, "step", step, inputs, ["losses", "t", "norm"], state_of(trainer))


def export_network(folder, network, batch_size):
    """Export the network, which is denoise_fn(x, t[, cond]), see export_program."""
    shape = batch_size, network.image_size, network.image_size, network.channels
    inputs = dict(x=tf.zeros(shape), t=tf.zeros([batch_size], tf.int32))
    if cond := null_condition(network.condition, shape):
        inputs["cond"] = cond
    return export_program(folder, "network", network, inputs, ["output"], parameters_of(network))


def export_sampler(folder, network, diffusion, batch_size, sampler, steps):
    """Export a sampler with all its steps, see export_program: from int64 seeds to images in [-1, 1], unconditional."""
    shape = batch_size, network.image_size, network.image_size, network.channels
    steps = len(diffusion.sampler_table(sampler, steps)[0])
    # sample() runs at once; what it compiles is a function of seeds that can be exported
    loop = diffusion.sampling_loop(network, shape, sampler, steps, True, "small", frames=0, jit_compile=True,
                                   notify=False, **{"eta": 0.0, **noise_options(sampler)})
    inputs = dict(seeds=tf.range(batch_size, dtype=tf.int64))
    return export_program(folder, "sampler", lambda seeds: loop(seeds, None)[0], inputs, ["images"],
                          parameters_of(network), sampler=sampler, steps=steps)


def parameters_of(network):
    return {f"parameter/{name}": variable for name, variable in named_variables(network)}


# ------------------------------------------------------------------------------------------------------------- main

def with_layers(network, plain):
    """Let the network compute with its plain layers if `plain`, else with its fused ones. Return the network."""
    for layer in (network, *layers_inside(network)):
        layer.fused = not plain
    return network


def load_data(flags, wanted):
    """The preparation.Data that the flags of train.py describe.

    If it is not wanted, nothing is read: the data is one black image, the metadata is empty, and flags.flips is 0.5 if
    it was "auto".
    """
    if wanted:
        return preparation.load_data(flags, validation_limit=1)
    flags.flips = 0.5 if flags.flips == "auto" else flags.flips
    images = np.zeros([1, flags.image_size, flags.image_size, 1 + has(flags.condition, "neighbour")], np.uint8)
    training = (images, np.zeros([1, 2], np.int32)) if needs_heads(flags.condition) else images
    return preparation.Data(training, None, mirror_axis=1, metadata={})


def export_training(args, flags):
    """Export what train.py's flags describe."""
    data = load_data(flags, args.images)
    trainer = train.make_trainer(flags, flags.precision, data.mirror_axis)
    network = with_layers(trainer.network, args.plain)
    initial_images = 0
    if flags.initial_model:
        _, file = find_model(flags.initial_model, flags.ckpt_path)
        initial_images = start_from_model(network, file, trainer.diffusion, trainer.ema_parameters)
    settings = {**values_without(PRIVATE, train.SETTINGS, flags), **data.metadata, **network.settings,
                **trainer.diffusion.settings}
    about = dict(settings=settings, precision=flags.precision, batch_size=flags.batch_size, seed=flags.seed,
                 initial_images=initial_images, state=describe_state(state_of(trainer)))
    if args.images:
        images, *positions = as_tuple(data.training)
        np.savez_compressed(args.out / "images.npz", images=images,
                            **({"positions": positions[0]} if positions else {}))
    step = {"step": export_step(args.out, trainer, flags.batch_size, data.training)} if "step" in args.programs else {}
    finish(args, about, network, trainer.diffusion, flags.batch_size, step)


def export_model(args, flags):
    """Export the network and the sampler of a model file."""
    if "step" in args.programs:
        raise OasisError("--model has no training step. Give the flags of train.py instead, and --initial-model to "
                         "start from this model.")
    network, diffusion, settings = modules.load_model(find_model(args.model, flags.ckpt_path)[1], flags.precision)
    with_layers(network, args.plain)
    about = dict(settings=settings, precision=flags.precision, state=describe_state(parameters_of(network)))
    finish(args, about, network, diffusion, flags.batch_size, {})


def finish(args, about, network, diffusion, batch_size, programs):
    """Export the network and the sampler, and write about.json and the parameters."""
    size = args.sample_batch or batch_size
    if "network" in args.programs:
        programs["network"] = export_network(args.out, network, size)
    if "sampler" in args.programs:
        programs["sampler"] = export_sampler(args.out, network, diffusion, size, args.sampler, args.steps)
    if args.parameters:
        arrays = {name: variable.numpy() for name, variable in named_variables(network)}
        safetensors.numpy.save_file(arrays, args.out / "parameters.safetensors")
    gflop = None if network.condition else gflop_per_image(network, network.image_size)
    about = dict(about, layers="plain" if args.plain else "fused", image_size=network.image_size, gflop_forwards=gflop,
                 programs=programs)
    (args.out / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    print(f"written: {args.out.absolute()}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--programs", type=lambda text: text.split(","), default=list(PROGRAMS),
                        help="which of step,network,sampler (all)")
    parser.add_argument("--model", help="a model file, a run's folder or a bundled model, instead of train.py's flags")
    parser.add_argument("--plain", action="store_true", help="use the plain layers of modules.py, not the fused ones")
    parser.add_argument("--sample-batch", type=int, help="images a call of network and sampler (--batch-size)")
    parser.add_argument("--sampler", choices=modules.SAMPLERS, default="dpm", help="the sampler (dpm)")
    parser.add_argument("--steps", type=int, help="its steps (as predict.py)")
    parser.add_argument("--no-parameters", dest="parameters", action="store_false", help="leave the parameters out")
    parser.add_argument("--no-images", dest="images", action="store_false", help="leave the training images out")
    args, rest = parser.parse_known_args(arguments)
    if unknown_programs := set(args.programs) - set(PROGRAMS):
        raise OasisError(f"--programs {sorted(unknown_programs)[0]!r} is not one of {', '.join(PROGRAMS)}")
    make_folder(args.out)
    flags = train.parse_flags(rest)
    flags.precision = "bfloat16" if flags.precision == "auto" else flags.precision
    (export_model if args.model else export_training)(args, flags)


if __name__ == "__main__":
    run_script(main)
