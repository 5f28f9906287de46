"""The devices of this process: their selection, their precision and their compilers."""
import argparse
import contextlib
import re

import tensorflow as tf

from oasis.files import OasisError

PRECISIONS = ("float32", "bfloat16", "float16")


def use_xla():
    """Return whether to compile whole steps with XLA: only on a GPU. On the CPUs measured, XLA halves the speed."""
    return bool(tf.config.get_visible_devices("GPU"))


@contextlib.contextmanager
def without_grappler(strategy=None):
    """A context that switches off Grappler, TensorFlow's graph optimizer, if the training runs on a single CPU.

    Grappler takes 5 of the 13 seconds of the first training step. The later steps are as fast without Grappler, because
    oasis/fused.py leaves nothing to fuse. strategy: a tf.distribute.Strategy or None. With a strategy, Grappler stays
    on, because the all-reduce fails without it.
    """
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": strategy is None and not use_xla()})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def resolve_precision(precision):
    """The precision of convolutions and matrix products: `precision` itself, or the fastest here if it is "auto".

    With "auto", a GPU uses bfloat16 from compute capability 8 on (Ampere), and float16 with 7.x (Volta, Turing),
    because it has fast units for these types. A CPU uses bfloat16 if its instruction set has it. All others use
    float32.
    """
    if precision != "auto":
        return precision
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details
        capability = min(details(gpu).get("compute_capability", (0, 0)) for gpu in gpus)
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(file.read().split()) else "float32"
    except OSError:
        return "float32"


# ----------------------------------------------------------------------------------------------------------- selection

def devices(text):
    """Check the value of --devices and return it: "auto" and "cpu" in lower case, a list of devices in upper case.

    It is "auto", "cpu", a number of GPUs, or a list such as "GPU:0,GPU:2". Raises argparse.ArgumentTypeError for
    another text.
    """
    listed = re.fullmatch(r"(GPU|CPU):\d+(,\1:\d+)*", text.upper())
    if text.lower() in ("auto", "cpu") or re.fullmatch(r"[1-9]\d*", text):
        return text.lower()
    if not listed or len(set(text.upper().split(","))) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, a number of GPUs, or a list such as GPU:0,GPU:2")
    return text.upper()


def prepare_devices(choice="auto"):
    """Make only the chosen GPUs visible to TensorFlow, or none. Return TensorFlow's new names of the chosen devices.

    choice: see devices(). "GPU:2,GPU:3" gives ["GPU:0", "GPU:1"]. Call prepare_devices before anything else uses a
    device. GPU memory is allocated as it is needed. Apple's GPUs, for which XLA cannot compile, are hidden. Raises
    OasisError for GPUs that do not exist, and for CPU numbers with gaps.
    """
    found = tf.config.list_physical_devices("GPU")
    gpus = found if tf.test.is_built_with_gpu_support() else []
    kind, numbers = "GPU", list(range(len(gpus)))
    if choice == "cpu":
        kind, numbers = "CPU", [0]
    elif choice.isdigit():
        numbers = list(range(int(choice)))
    elif choice != "auto":
        kind, numbers = choice[:3], [int(number) for number in re.findall(r"\d+", choice)]
    if kind == "CPU" and sorted(numbers) != list(range(len(numbers))):
        raise OasisError(f"--devices {choice}: CPU devices are logical devices. Number them from CPU:0 "
                         "without gaps, such as CPU:0,CPU:1.")
    if kind == "GPU" and not set(numbers) <= set(range(len(gpus))):
        advice = "Choose among these, numbered from 0, or --devices cpu." if gpus else "Give --devices cpu."
        raise OasisError(f"--devices {choice}: TensorFlow sees {len(gpus)} GPU{'s' if len(gpus) != 1 else ''} here. "
                         f"{advice}")
    chosen = [gpus[number] for number in numbers] if kind == "GPU" else []
    if chosen != found:
        tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    if kind == "CPU" and len(numbers) > 1:
        cpu, = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * len(numbers))
    return [f"{kind}:{i}" for i in range(len(numbers))] or ["CPU:0"]
