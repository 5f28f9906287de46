"""Train, sample and time on a machine with JAX what tools/export_stablehlo.py exported. TensorFlow is not needed.

    python tools/run_stablehlo.py train ARTIFACT RUN --max-steps 8000     train on the exported images
    python tools/run_stablehlo.py sample ARTIFACT OUT.npy --model RUN     images of the EMA, as many as a batch holds
    python tools/run_stablehlo.py time ARTIFACT                           images/s, seconds of compiling and memory

It needs jax, flatbuffers, numpy and safetensors. The state stays on the device, all images too, and a call runs many
steps. The same `train` command continues from RUN. RUN holds

    state.safetensors    all that training changes, and the step
    model.safetensors    the EMA, for predict.py and evaluate.py, in float32 or, with --float16, half as large
    log.csv              step, loss, gradient norm, skipped steps and images/s, a row a call

Batch k of a training holds the images k·B … (k+1)·B - 1 of a stream with all images once an epoch, in an order that
depends on the seed and the epoch alone, as in dataset.make_dataset. The orders differ from those there.
"""
import argparse
import csv
import dataclasses
import functools
import json
import lzma
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import export

from oasis.modelbytes import model_bytes

jax.config.update("jax_enable_x64", True)  # steps and seeds are int64

BETWEEN_SAVES = 60.0       # seconds
LOG = ("step", "loss", "gradient_norm", "skipped", "images_per_second", "seconds")


class Artifact:
    """A folder of programs that tools/export_stablehlo.py wrote. about: the dict in its about.json."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    def program(self, name):
        """Return a function that runs a program on the default device. Its arguments are the inputs, then the state."""
        packed = (self.folder / f"{name}.stablehlo").read_bytes()
        artifact = export.deserialize(bytearray(lzma.decompress(packed)))
        # The program holds nothing that is peculiar to a platform, so it runs on each.
        return dataclasses.replace(artifact, platforms=(jax.default_backend(),)).call

    def parameters(self):
        """Return {name: array} of the initial parameters. If the folder has no file of them, they are random."""
        file, rng = self.folder / "parameters.safetensors", np.random.default_rng(0)
        if file.exists():
            return safetensors.numpy.load_file(file)
        return {one["name"].removeprefix("parameter/"): initial(one, lambda shape: 0.02 * rng.standard_normal(shape))
                for one in self.about["state"] if one["name"].startswith("parameter/")}

    def state(self):
        """Return {name: array} of the state at the start of a training."""
        parameters = self.parameters()
        return {one["name"]: initial(one, lambda _: parameters[one["name"].split("/", 1)[1]])
                for one in self.about["state"]}

    def inputs(self, name):
        """Random arrays for the inputs of a program: images and noise, timesteps, seeds, positions."""
        rng, arrays = np.random.default_rng(0), []
        for one in self.about["programs"][name]["inputs"]:
            integer = one["dtype"].startswith("int")
            drawn = rng.integers(0, 100, one["shape"]) if integer else rng.uniform(-1, 1, one["shape"])
            arrays.append(jnp.asarray(drawn, one["dtype"]))
        return arrays


def initial(entry, otherwise):
    """The initial array of an entry of about["state"]: filled with its "start", or otherwise(shape) if that is None."""
    value = otherwise(entry["shape"]) if entry["start"] is None else entry["start"]
    return np.broadcast_to(np.asarray(value, entry["dtype"]), entry["shape"])


def write(path, data):
    """Replace the file at path by one with these bytes, in one step. A killed program leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------- training

def many_steps(step):
    """A compiled function (state, data, rows, count) -> (state, losses, norms) of `count` training steps.

    step: the exported program. state: a tuple of arrays, which the function overwrites. data: a tuple of the images,
    uint8 (N, S, S, C), and perhaps their positions, (N, 2). rows: int (K, B); step i uses the images rows[i % K].
    losses, norms: float32 (K,), the mean loss and the gradient norm of the last step with each row; 0 without a step.
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, data, rows, count):
        def one_step(i, carried):
            state, all_losses, norms = carried
            i = i % len(rows)
            images, *positions = (part[rows[i]] for part in data)
            losses, _, norm, *state = step(images.astype(jnp.float32) / 127.5 - 1.0, *positions, *state)
            return tuple(state), all_losses.at[i].set(losses.mean()), norms.at[i].set(norm)
        zeros = jnp.zeros(len(rows), jnp.float32)
        return jax.lax.fori_loop(0, count, one_step, (state, zeros, zeros))
    return run


def rows_of(start, count, batch_size, images, seed):
    """Return which images are in the batches start … start + count - 1: indices, int32 (count, batch_size)."""
    stream = np.arange(start * batch_size, (start + count) * batch_size)
    epochs = stream // images
    orders = {epoch: np.random.default_rng([seed % 2**64, epoch]).permutation(images) for epoch in np.unique(epochs)}
    rows = np.concatenate([orders[epoch][stream[epochs == epoch] % images] for epoch in orders])
    return rows.astype(np.int32).reshape(count, batch_size)


class Training:
    """The state of one training, on the device, and the files in its folder."""

    def __init__(self, artifact, folder, float16):
        self.about, self.folder, self.float16 = artifact.about, Path(folder), float16
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = self.about["programs"]["step"]["state"]
        file = self.folder / "state.safetensors"
        arrays = safetensors.numpy.load_file(file) if file.exists() else artifact.state()
        self.state = tuple(jnp.array(arrays[name]) for name in self.names)
        file = np.load(artifact.folder / "images.npz")
        self.data = tuple(jnp.asarray(file[name]) for name in ("images", "positions") if name in file)
        self.run = many_steps(artifact.program("step"))

    @property
    def step(self):
        return int(self.state[self.names.index("step")])

    def go(self, steps, limit):
        """Train `steps` steps, at most `limit`, for which the function is compiled. Returns a row of the log."""
        began, step, batch_size = time.perf_counter(), self.step, self.about["batch_size"]
        rows = rows_of(step, limit, batch_size, len(self.data[0]), self.about["seed"])
        self.state, losses, norms = self.run(self.state, self.data, rows, steps)
        losses, norms = np.asarray(losses)[:steps], np.asarray(norms)[:steps]
        seconds, good = time.perf_counter() - began, np.isfinite(norms)
        mean_loss, mean_norm = (float(part[good].mean()) if good.any() else float("nan") for part in (losses, norms))
        return dict(zip(LOG, (step + steps, mean_loss, mean_norm, int((~good).sum()), steps * batch_size / seconds,
                              seconds)))

    def save(self):
        """Write the state and the model file."""
        arrays = {name: np.asarray(array) for name, array in zip(self.names, self.state)}
        write(self.folder / "state.safetensors", safetensors.numpy.save(arrays))
        images = self.about["initial_images"] + self.step * self.about["batch_size"]
        settings = {**self.about["settings"], "step": self.step, "images": images}
        dtype = np.float16 if self.float16 else np.float32
        ema = {name.removeprefix("ema/"): array.astype(dtype) for name, array in arrays.items()
               if name.startswith("ema/")}
        write(self.folder / "model.safetensors", model_bytes(ema, settings))

    def log(self, row):
        """Print a row of the log and append it to the file."""
        print(" ".join(f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value:,}"
                       for name, value in row.items()), flush=True)
        file = self.folder / "log.csv"
        is_new = not file.exists()
        with open(file, "a", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, LOG)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def train(args):
    """Train up to --max-steps, or until --seconds have passed."""
    began = time.perf_counter()
    training = Training(Artifact(args.artifact), args.run, args.float16)
    saved = time.perf_counter()
    while training.step < args.max_steps and time.perf_counter() - began < args.seconds:
        steps = min(args.steps_per_call, args.max_steps - training.step)
        training.log(training.go(steps, args.steps_per_call))  # rows of one shape: JAX compiles once
        if time.perf_counter() - saved > BETWEEN_SAVES:
            training.save()
            saved = time.perf_counter()
    training.save()
    print(f"saved at step {training.step:,}: {training.folder.absolute()}")


# --------------------------------------------------------------------------------------------------------- sampling

def sample(args):
    """Generate images with the exported sampler and write them to --out, an .npy: uint8 (N, S, S, C).

    Image i has the seed --seed + i. N is --number-of-images.
    """
    artifact = Artifact(args.artifact)
    about = artifact.about["programs"]["sampler"]
    model = Path(args.model) / "model.safetensors" if args.model and Path(args.model).is_dir() else args.model
    parameters = safetensors.numpy.load_file(model) if model else artifact.parameters()
    state = [jnp.asarray(parameters[name.removeprefix("parameter/")], jnp.float32) for name in about["state"]]
    run, (size,) = jax.jit(artifact.program("sampler")), about["inputs"][0]["shape"]
    batches = []
    for start in range(0, args.number_of_images or size, size):
        batches.append(np.asarray(jax.tree.leaves(run(args.seed + start + jnp.arange(size), *state))[0]))
    images = np.concatenate(batches)[:args.number_of_images or size]
    np.save(args.out, np.rint(np.clip((images + 1.0) * 127.5, 0, 255)).astype(np.uint8))
    print(f"written: {Path(args.out).absolute()}, {len(images)} images")


# ---------------------------------------------------------------------------------------------------------- timing

ROWS = 16              # different batches that a timed training sees


def program_to_time(artifact, name):
    """Return (function, data, images per run). function(state, data, count) is jitted and runs a program `count` times.

    The first result of the function is the new state; the function destroys the given state. A run of a network or
    sampler takes the output of the run before, so that the compiler cannot drop a run.
    """
    inputs, program = artifact.inputs(name), artifact.program(name)
    batch = inputs[0].shape[0]
    if name == "step":
        images = np.random.default_rng(0).integers(0, 256, [4 * batch, *inputs[0].shape[1:]], np.uint8)
        positions = [np.ones([4 * batch, 2], np.int32)] * (len(inputs) - 1)
        many, rows = many_steps(program), rows_of(0, ROWS, batch, len(images), 0)
        return (jax.jit(lambda state, data, count: many(state, *data, count), donate_argnums=0),
                ((images, *positions), rows), batch)

    def run(state, data, count):
        first, *others = data

        def again(_, first):
            output = jax.tree.leaves(program(first, *others, *state))[0]
            return output if name == "network" else first + (output > 2).sum()  # seeds stay as they are
        return state, jax.lax.fori_loop(0, count, again, first)
    return jax.jit(run, donate_argnums=0), inputs, batch


def compile_program(artifact, name):
    """Compile a program. Return a dict of function, make_arguments, images and figures.

    function(*make_arguments(), count) runs the program `count` times. images: those of one run. figures:
    compile_seconds and, if XLA reports it, xla_bytes, the memory of the program.
    """
    function, data, images = program_to_time(artifact, name)
    names = artifact.about["programs"][name]["state"]
    entries = {one["name"]: jax.ShapeDtypeStruct(one["shape"], one["dtype"]) for one in artifact.about["state"]}
    lowered, began = function.lower(tuple(entries[one] for one in names), data, 1), time.perf_counter()
    compiled = lowered.compile()
    figures = dict(compile_seconds=time.perf_counter() - began)
    if memory := compiled.memory_analysis():
        figures["xla_bytes"] = (memory.argument_size_in_bytes + memory.output_size_in_bytes
                                + memory.temp_size_in_bytes - memory.alias_size_in_bytes)

    def make_arguments():
        arrays = artifact.state()
        return tuple(jnp.array(arrays[one]) for one in names), jax.tree.map(jnp.asarray, data)
    return dict(function=compiled, make_arguments=make_arguments, images=images, figures=figures)


def peak_bytes():
    """Return the peak memory of this process on the device, in bytes; 0 if the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def time_program(compiled, seconds=1.0):
    """Time a program. Return a dict of images_per_second, the figures of compile_program() and perhaps peak_bytes.

    compiled: the result of compile_program(). images_per_second: the median of 3 calls of about `seconds` each.
    peak_bytes: the peak memory of the device; missing if an earlier program needed more.
    """
    peak, (state, data), times, count = peak_bytes(), compiled["make_arguments"](), [], 1
    for round_ in range(5):  # the first warms up, the second tells how many repetitions take that long
        began = time.perf_counter()
        state, *_ = jax.block_until_ready(compiled["function"](state, data, count))
        times.append((time.perf_counter() - began) / count)
        count = max(1, round(seconds / times[-1])) if round_ == 1 else count
    memory = dict(peak_bytes=peak_bytes()) if peak_bytes() > peak else {}
    return dict(images_per_second=compiled["images"] / float(np.median(times[2:])), **compiled["figures"], **memory)


def time_artifact(args):
    """Time each exported program and print its images/s, compile seconds and memory as JSON."""
    artifact = Artifact(args.artifact)
    print(json.dumps({name: time_program(compile_program(artifact, name), args.seconds)
                      for name in args.programs or artifact.about["programs"]}, indent=1))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, name in ((train, "train"), (sample, "sample"), (time_artifact, "time")):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("artifact", help="the folder that tools/export_stablehlo.py wrote")
        command.set_defaults(function=function)
    train_flags, sample_flags, time_flags = (commands.choices[name] for name in ("train", "sample", "time"))
    train_flags.add_argument("run", help="the folder to train in")
    train_flags.add_argument("--max-steps", type=int, required=True, help="the step to stop at")
    train_flags.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; no limit")
    train_flags.add_argument("--float16", action="store_true", help="write the model file in float16")
    sample_flags.add_argument("out", help="the .npy to write")
    sample_flags.add_argument("--model", help="a model file or a folder of `train` (the exported parameters)")
    sample_flags.add_argument("--number-of-images", type=int, default=0, help="images to generate (one batch)")
    sample_flags.add_argument("--seed", type=int, default=0, help="of the first image (0)")
    time_flags.add_argument("--programs", type=lambda text: text.split(","), help="of step,network,sampler (all)")
    time_flags.add_argument("--seconds", type=float, default=1.0, help="of each of the three calls (1)")
    train_flags.add_argument("--steps-per-call", type=int, default=200, help="steps in one call (200)")
    args = parser.parse_args(arguments)
    args.function(args)


if __name__ == "__main__":
    main()
