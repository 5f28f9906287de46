"""Measure the speed of the network, the scripts and the data on this machine, and compare it with the machine's peak.

    python tools/benchmark.py                                      the network: about 3 minutes on 2 cores
    python tools/benchmark.py --memory --size 256 --patch-size 4   only the memory, of this machine and of XLA
    python tools/benchmark.py --path ZIP --scripts --json          all but --memory: an hour

Measurements that are compared alternate in every round. Every figure is the median over the rounds.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from oasis.files import OasisError, import_tensorflow, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
import tensorflow as tf

import modules
import train
from dataset import load_slices, make_dataset
from oasis.devices import resolve_precision, without_grappler
from oasis.fused import frozen
from oasis.settings import make_parser


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(calls, rounds):
    """Return {name: median seconds} of {name: call}, after one call of each to warm up. Each round calls each once."""
    for call in calls.values():
        call()
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: float(np.median([time[name] for time in times])) for name in calls}


def convolution(dtype, size, batch, width=128):
    """Return (a function that runs ten 3×3 convolutions, their GFLOP). Other layers reach fewer GFLOP/s."""
    x = tf.cast(tf.random.stateless_normal([batch, size, size, width], [0, 1]), dtype)
    kernel = tf.cast(tf.random.stateless_normal([3, 3, width, width], [0, 2]), dtype)

    @tf.function(autograph=False)
    def ten():
        y = x
        for _ in range(10):
            y = tf.nn.conv2d(y, kernel, 1, "SAME") * tf.cast(0.03, dtype)
        return tf.reduce_sum(y)
    return lambda: ten().numpy(), 10 * 2 * 9 * width**2 * batch * size**2 / 1e9


def gflop_per_image(network, size):
    """The billions of floating-point operations of a forward pass of one image, counted by TensorFlow's profiler."""
    call = tf.function(network, autograph=False).get_concrete_function(
        tf.TensorSpec([1, size, size, 1]), tf.TensorSpec([1], tf.int32))
    options = tf.compat.v1.profiler.ProfileOptionBuilder(tf.compat.v1.profiler.ProfileOptionBuilder.float_operation())
    return tf.compat.v1.profiler.profile(call.graph, options=options.with_empty_output().build()).total_float_ops / 1e9


def shape_flags(args):
    return ["--dim", str(args.dim), "--patch-size", str(args.patch_size), "--pixel-width", str(args.pixel_width)]


def make_trainer(args):
    diffusion = modules.GaussianDiffusion(image_size=args.size)
    return train.Trainer(make_network(args), diffusion, accumulate=args.accumulate)


def training_call(trainer, args, batch, steps):
    images = tf.random.stateless_uniform([batch, args.size, args.size, 1], [1, 2], -1, 1)
    batches = iter(tf.data.Dataset.from_tensors(images).repeat())

    def call():
        with without_grappler():  # as train.py does
            return trainer.train_steps(batches, tf.constant(steps), tf.constant(0))[2].numpy()
    return call


def make_network(args):
    return modules.UNet(args.size, args.dim, patch_size=args.patch_size, pixel_width=args.pixel_width,
                        precision=args.precision, fused=not args.plain)


def denoising_call(network, args, batch):
    """A function without arguments that runs the network once on `batch` images, without a sampler."""
    denoise = tf.function(network, autograph=False)
    x, t = tf.zeros([batch, args.size, args.size, 1]), tf.fill([batch], 500)
    return lambda: denoise(x, t).numpy()


def measure_network(args):
    """Images/s of training and of denoising, and their share of the GFLOP/s of a convolution.

    Denoising is measured with a frozen network, as in long jobs of predict.py, and without, as in short jobs.
    """
    trainer = make_trainer(args)
    network, constant = trainer.network, frozen(make_network(args))
    side = args.size // args.patch_size
    convolutions = {dtype: convolution(dtype, side, args.batch) for dtype in {"bfloat16", "float32", args.precision}}
    time = medians({"training": training_call(trainer, args, args.batch, 2),
                    "denoising": denoising_call(constant, args, args.batch),
                    "denoising_short": denoising_call(network, args, args.batch),
                    "one": denoising_call(constant, args, 1),
                    "one_short": denoising_call(network, args, 1),
                    **{dtype: call for dtype, (call, _) in convolutions.items()}}, args.rounds)
    gflop = gflop_per_image(network, args.size)
    peaks = {dtype: work / time[dtype] for dtype, (_, work) in convolutions.items()}
    peak = peaks[args.precision]
    training, denoising = 2 * args.batch / time["training"], args.batch / time["denoising"]
    return {"parameters": network.count_params(), "precision": args.precision,
            "convolution_bfloat16_gflops": peaks["bfloat16"], "convolution_float32_gflops": peaks["float32"],
            "gflop_per_image_forwards": gflop, "training_images_per_s": training, "denoising_images_per_s": denoising,
            "denoising_images_per_s_in_a_short_job": args.batch / time["denoising_short"],
            "denoising_images_per_s_one_at_a_time": 1 / time["one"],
            "denoising_images_per_s_one_at_a_time_in_a_short_job": 1 / time["one_short"],
            "training_share_of_limit": 3 * gflop * training / peak,
            "denoising_share_of_limit": gflop * denoising / peak}


def measure_input(args):
    """Return {"input_images_per_s": the speed of make_dataset} with 4,832 black images, as many as the models' data."""
    batches = iter(make_dataset(np.zeros([4832, args.size, args.size, 1], np.uint8), args.batch, seed=0))
    time = medians({"fifty": lambda: [next(batches) for _ in range(50)][-1].numpy()}, args.rounds)["fifty"]
    return {"input_images_per_s": 50 * args.batch / time}


def in_a_process_of_its_own(args, batch, what, **environment):
    command = [sys.executable, __file__, *shape_flags(args), "--size", str(args.size), "--precision", args.precision,
               "--accumulate", str(args.accumulate), "--batch", str(batch), "--only", what,
               *["--plain"] * args.plain]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment}).stdout


def peak_memory(args):
    """Megabytes that training needs for one more image in the batch.

    It is the growth of the peak resident memory from the batch size to twice the batch size, divided by the batch size.
    """
    peaks = [int(in_a_process_of_its_own(args, batch, "peak")) / 1e6 for batch in (args.batch, 2 * args.batch)]
    return {"megabytes_per_image_in_training": (peaks[1] - peaks[0]) / args.batch, "megabytes_at_batch": peaks[0]}


def print_peak_of_one_step(args):
    trainer = make_trainer(args)
    training_call(trainer, args, args.batch, 2)()
    import resource  # Windows does not have it
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def xla_memory(args):
    """Return the memory of a training step by XLA's buffer assignment: megabytes per image, megabytes at this batch
    size with the parameters, and the largest batch that fits each of some GPUs.

    The step is compiled for this CPU, where bfloat16 takes as much memory as float32. An accelerator should need no
    more.
    """
    totals = []
    for batch in (args.batch, 2 * args.batch):
        with tempfile.TemporaryDirectory() as folder:
            flags = (f"--xla_dump_to={folder} --xla_backend_optimization_level=0 "
                     "--xla_llvm_disable_expensive_passes=true")
            in_a_process_of_its_own(args, batch, "compile", XLA_FLAGS=flags)
            assigned, = Path(folder).glob("*_update_*buffer-assignment.txt")
            sizes = re.findall(r"^allocation \d+: size (\d+),", assigned.read_text(), flags=re.MULTILINE)
            totals.append(sum(map(int, sizes)) / 1e6)
    per_image = (totals[1] - totals[0]) / args.batch
    return {"xla_megabytes_per_image": per_image, "xla_megabytes_at_batch": totals[0],
            **{f"largest_batch_in_{gb}_gb": int((0.9 * gb * 1e3 - totals[0]) / per_image + args.batch)
               for gb in (8, 15, 24, 40, 80)}}


def compile_one_step(args):
    trainer = make_trainer(args)
    step = tf.function(trainer.update, jit_compile=True, autograph=False)
    step(tf.zeros([args.batch, args.size, args.size, 1]))


def seconds_to_first_step(args):
    """Return {name: median seconds} from the command `python train.py --demo` to the end of its first training step."""
    times = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), "--demo", *shape_flags(args),
                       "--image-size", str(args.size), "--batch-size", str(args.batch), "--ckpt-path", folder,
                       "--precision", args.precision]
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                for line in process.stderr:
                    if "loss" in line:  # the bar's first line, which follows the first step
                        break
                else:
                    raise OasisError("train.py failed")
                times.append(time.perf_counter() - began)
                process.kill()
    return {"seconds_to_first_step": float(np.median(times))}


def measure_loading(args):
    """Seconds to load 2000 and all training slices, without a cache and with a cache."""
    result = {}
    for limit in (2000, None):
        times = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as cache:
                os.environ["OASIS_CACHE"] = cache
                times.append([seconds(lambda: load_slices(args.path, "train", args.size, limit)) for _ in range(2)])
        first, second = np.median(times, axis=0)
        result.update({f"seconds_to_load_{limit or 'all'}_first": first,
                       f"seconds_to_load_{limit or 'all'}_again": second})
    return result


def measure_predict(args):
    """Seconds of a whole process of predict.py: 1 and 16 images, T steps of ddpm and 20 of dpm, untrained network.

    The result also has the network's share of the time of the longest job, 16 images with T steps. The network alone
    is timed before and after each of these jobs.
    """
    result = {}
    network = make_network(args)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        diffusion = modules.GaussianDiffusion(args.timesteps)
        modules.save_model(model, network, {**network.settings, **diffusion.settings})
        step = {"step": denoising_call(frozen(network), args, 16)}

        def run(sampler, count):
            command = [sys.executable, str(ROOT / "predict.py"), "--model", str(model), "--gif-path", folder,
                       "--sampler", sampler, "--number-of-images", str(count), "--precision", args.precision]
            return seconds(lambda: subprocess.run(command, check=True, capture_output=True))

        for sampler, count in (("dpm", 1), ("dpm", 16), ("ddpm", 1)):
            times = [run(sampler, count) for _ in range(args.rounds)]
            result[f"seconds_of_predict_{sampler}_{count}"] = float(np.median(times))
        longest = [(medians(step, 5)["step"], run("ddpm", 16), medians(step, 5)["step"]) for _ in range(args.rounds)]
    result["seconds_of_predict_ddpm_16"] = float(np.median([took for _, took, _ in longest]))
    shares = [args.timesteps * (before + after) / 2 / took for before, took, after in longest]
    return {**result, "share_of_predict_ddpm_16_in_the_network": float(np.median(shares))}


def main():
    parser = make_parser(__doc__, {})
    parser.add_argument("--size", type=int, default=64, help="pixels a side (64)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (16)")
    parser.add_argument("--dim", type=int, default=64, help="as in train.py (64: 32,294,837 parameters)")
    parser.add_argument("--patch-size", type=int, default=1, help="as in train.py (1)")
    parser.add_argument("--pixel-width", type=int, default=0, help="as in train.py (0)")
    parser.add_argument("--timesteps", type=int, default=1000, help="T of --scripts, the steps of ddpm (1000)")
    parser.add_argument("--plain", action="store_true", help="use the plain layers of modules.py, not the fused ones")
    parser.add_argument("--accumulate", type=int, default=1, help="as in train.py (1)")
    parser.add_argument("--precision", default="auto", help="as in train.py (auto)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken (5)")
    parser.add_argument("--path", help="the OASIS slices: also time the loading of these slices")
    parser.add_argument("--scripts", action="store_true",
                        help="also time train.py until its first step, and predict.py: an hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory", action="store_true",
                        help="measure only the memory, on this machine and of the step compiled by XLA")
    parser.add_argument("--only", choices=["peak", "compile"], help=argparse.SUPPRESS)  # for a process of its own
    args = parser.parse_args()
    if args.plain and args.scripts:
        parser.error("--plain is for the network alone: the scripts of --scripts have the fused layers")
    args.precision = resolve_precision(args.precision)
    if args.only:
        return {"peak": print_peak_of_one_step, "compile": compile_one_step}[args.only](args)
    # Memory comes first, because getrusage reports the peak of the parent process at the start if it was higher.
    parts = [peak_memory, xla_memory] if args.memory else [peak_memory, measure_network, measure_input]
    parts += [measure_loading] if args.path else []
    parts += [seconds_to_first_step, measure_predict] if args.scripts else []
    result = {}
    for part in parts:
        figures = part(args)
        result.update(figures)
        for name, value in figures.items() if not args.json else ():
            print(f"{name:40s} {value:,.3f}" if isinstance(value, float) else f"{name:40s} {value}", flush=True)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
