"""Find the noise levels at which a model loses quality.

    python tools/noise_levels.py --path ZIP                  the bundled oasis64, 20 steps of dpm, 300 slices: 3 minutes
    python tools/noise_levels.py --path ZIP --model RUN      a run's folder, a model file or a bundled model

Each row of the table adds noise of one level to real training slices, and the model removes the noise. The difference
of its score and that of the row without noise is the quality that is lost at this level and below. The difference of
two rows is lost between their levels. The row at t = T-1 is generation from pure noise. A model with conditions gets
the null condition.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oasis.files import import_tensorflow, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
import tensorflow as tf

import evaluate
import modules
import predict
from dataset import from_uint8, load_slices, to_uint8
from oasis import features, sources
from oasis.devices import prepare_devices, resolve_precision
from oasis.generate import noise_options
from oasis.metrics import compare
from oasis.modelfile import find_model
from oasis.settings import integer, make_parser


def denoise(predict_x_start, diffusion, slices, times, table, seed):
    """Add noise to slices, uint8 (B, S, S, 1), and return what the last steps of a sampler make of them, as uint8.

    predict_x_start(x, t): a tf.function of x, float32 (B, S, S, 1), and t, int (B,), that returns the clean image, like
    x. Pass the same one to every call, because each new tf.function is traced. times, table: the last rows of
    sampler_table(). The noise level is that of timestep times[0]. seed: the seed of all noise.
    """
    rng = np.random.default_rng(seed)

    def noise():
        return rng.standard_normal(slices.shape, np.float32)

    x = diffusion.q_sample(from_uint8(slices), np.full(len(slices), times[0]), noise())
    previous = tf.zeros_like(x)
    table = table.copy()
    table[0, 1:3] = table[0, 1:3].sum(), 0      # the first step has no previous prediction
    for t, row in zip(times, table.astype(np.float32)):
        x_start = predict_x_start(x, tf.fill([len(slices)], tf.constant(t, tf.int32)))
        x = row[0] * x + row[1] * x_start + row[2] * previous + row[3] * noise()
        previous = x_start
    return to_uint8(x)


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("--path", default=evaluate.PATH, help="the OASIS slices: a zip or a folder")
    parser.add_argument("--model", default="oasis64", help="a run's folder, a model file or a bundled model's name")
    parser.add_argument("--number-of-images", type=integer(evaluate.MINIMUM), default=300)
    parser.add_argument("--steps", type=integer(), default=20)
    parser.add_argument("--eta", type=predict.SETTINGS["eta"].kind, default=predict.ETA)
    parser.add_argument("--noise-scale", type=predict.SETTINGS["noise_scale"].kind, default=predict.NOISE_SCALE)
    parser.add_argument("--every", type=integer(), default=4, help="sampling steps from one row to the next")
    flags = parser.parse_args(arguments)
    prepare_devices()
    _, file = find_model(flags.model)
    network, diffusion, settings = modules.load_model(file, resolve_precision("auto"))
    extractor = features.load_features("efficientnet")
    reading = sources.reading_of_model(settings)
    real, training = (load_slices(flags.path, split, network.image_size, **reading) for split in ("validate", "train"))
    slices = training[np.random.default_rng(1).permutation(len(training))[:flags.number_of_images]]
    real_features = features.extract(extractor, real, "features, validate")
    times, table = diffusion.sampler_table("dpm", flags.steps, **noise_options("dpm", flags.eta, flags.noise_scale))
    batches = np.array_split(slices, -(-len(slices) // 100))

    @tf.function(autograph=False)
    def predict_x_start(x, t):
        output = tf.cast(network(x, t), tf.float32)
        return tf.clip_by_value(diffusion.x_start_from_output(x, t, output), -1.0, 1.0)

    rows = {"no noise": slices}
    for start in reversed(range(0, flags.steps, flags.every)):
        rows[f"t = {times[start]}, σ {diffusion.sigmas[times[start]]:.3f}"] = np.concatenate(
            [denoise(predict_x_start, diffusion, batch, times[start:], table[start:], seed)
             for seed, batch in enumerate(batches)])
    rows = {name: compare(images, features.extract(extractor, images, name), real, real_features)
            for name, images in rows.items()}
    print(f"\n{evaluate.table('from', rows)}")


if __name__ == "__main__":
    run_script(main)
