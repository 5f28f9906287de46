"""At which noise levels does a model lose quality? Real training slices noised that far, denoised again, and judged.

    python tests/noise_levels.py --path ZIP                  the bundled oasis64, 20 steps of dpm, 300 slices: 3 minutes
    python tests/noise_levels.py --path ZIP --model RUN      a run's folder, a model file or a bundled model

A model that were perfect below a level would score like the floor from there, for the noised slices are just what the sampler
should have come to. So what a row scores is lost below its level; what is lost above adds up from row to row. The row at t = T-1
is generation from pure noise. Not collected by pytest.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

common.quiet_tensorflow()  # before anything imports it

import numpy as np
import tensorflow as tf

import evaluate
import features
import modules
import predict
from dataset import load_slices, to_uint8


def denoise(predict_x_start, diffusion, slices, times, table, seed):
    """uint8 (B, S, S, 1) slices noised to where the last steps of a sampler, times and table, begin, and denoised by them: the same.

    predict_x_start: of x float32 (B, S, S, 1) at t int (B,), a tf.function made once: each new one would be traced anew.
    """
    rng = np.random.default_rng(seed)

    def noise():
        return rng.standard_normal(slices.shape, np.float32)

    x = diffusion.q_sample(slices.astype(np.float32) / 127.5 - 1, np.full(len(slices), times[0]), noise())
    previous = tf.zeros_like(x)
    table = table.copy()
    table[0, 1:3] = table[0, 1:3].sum(), 0      # there is no prediction before the first one
    for t, row in zip(times, table.astype(np.float32)):
        x_start = predict_x_start(x, tf.fill([len(slices)], tf.constant(t, tf.int32)))
        x = row[0] * x + row[1] * x_start + row[2] * previous + row[3] * noise()
        previous = x_start
    return to_uint8(x)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=evaluate.PATH, help="the OASIS slices: the zip, or the folder unpacked from it")
    parser.add_argument("--model", default="oasis64", help="a run's folder, a model file or a bundled model's name")
    parser.add_argument("--number-of-images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=predict.FLAG_TYPES["ETA"], default=predict.ETA)
    parser.add_argument("--noise-scale", type=predict.FLAG_TYPES["NOISE_SCALE"], default=predict.NOISE_SCALE)
    parser.set_defaults(sampler="dpm")
    parser.add_argument("--every", type=int, default=4, help="sampling steps from one row to the next")
    flags = parser.parse_args(arguments)
    network, diffusion, _ = modules.load_model(predict.find_model(flags.model, evaluate.CKPT_PATH)[1], modules.best_precision())
    extractor = features.load_features("efficientnet")
    real, training = (load_slices(flags.path, split, network.image_size) for split in ("validate", "train"))
    slices = np.random.default_rng(1).permutation(training)[:flags.number_of_images]
    real_features = features.extract(extractor, real, "features, validate")
    noise_levels = diffusion.noise_rates / diffusion.signal_rates
    times, table = diffusion.sampler_table("dpm", flags.steps, **predict.noise_options(flags, network.image_size))
    batches = np.array_split(slices, -(-len(slices) // 100))

    @tf.function(autograph=False)
    def predict_x_start(x, t):
        output = tf.cast(network(x, t), tf.float32)
        return tf.clip_by_value(diffusion.x_start_of_output(x, t, output), -1.0, 1.0)

    rows = {"no noise": slices}
    for start in reversed(range(0, flags.steps, flags.every)):
        rows[f"t = {times[start]}, noise {noise_levels[times[start]]:.3f}"] = np.concatenate(
            [denoise(predict_x_start, diffusion, batch, times[start:], table[start:], seed) for seed, batch in enumerate(batches)])
    rows = {name: evaluate.compare(pictures, features.extract(extractor, pictures, name), real, real_features)
            for name, pictures in rows.items()}
    print(f"\n{evaluate.table('from', rows)}")


if __name__ == "__main__":
    common.run_script(main)
