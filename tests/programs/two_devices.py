"""What two CPU devices do together: images, with frozen networks too, and a training step that is skipped.

    python two_devices.py FOLDER TRAIN_FLAG…

FOLDER holds model.safetensors; the images go there as two.npy and frozen.npy. The last line is "well".
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import predict
import train
import numpy as np
import tensorflow as tf
from oasis import generate
from helpers import OneConvolution, a_batch, trainer_of

folder, train_flags = Path(sys.argv[1]), sys.argv[2:]
predict_flags = ["--model", str(folder / "model.safetensors"), "--precision", "float32", "--sampler", "dpm",
                 "--steps", "4", "--number-of-images", "5", "--devices", "CPU:0,CPU:1", "--batch-size", "3"]
predict.main([*predict_flags, "--samples", str(folder / "two.npy")])
generate.FREEZE_FROM = 1
predict.main([*predict_flags, "--samples", str(folder / "frozen.npy")])

train.UNet = OneConvolution
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    trainer = trainer_of(train_flags)


def copies():
    """The values of every variable but the step, [on the first device, on the second]."""
    mirrored = [variable if hasattr(variable, "values") else variable.value for variable in trainer.variables[:-1]]
    return [[copy.numpy() for copy in variable.values] for variable in mirrored]


def skipped_steps(batch):
    batches = iter(tf.data.Dataset.from_tensors(batch))
    _, counts, _, skipped, _ = trainer.train_steps(batches, tf.constant(1), tf.constant(0))
    assert sum(counts.numpy()) == 8 * (1 - int(skipped))
    return int(skipped)


good, bad = a_batch().numpy(), a_batch().numpy()
bad[6, 5, 5] = np.nan                                   # in the second device's part
initial = copies()
assert skipped_steps(good) == 0
before = copies()
assert any(np.any(old[0] != new[0]) for old, new in zip(initial, before))
assert skipped_steps(bad) == 1
for old, new in zip(before, copies()):
    assert len(old) == len(new) == 2
    for copy in (old[1], *new):
        np.testing.assert_array_equal(copy, old[0])
print("well")
