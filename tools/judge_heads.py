"""Judge what a conditional model draws: is it the slice that was asked for, and do the slices of a head fit together?

    python tools/judge_heads.py --path ZIP --model RUN          20 images of each slice index, 20 heads

Each number stands beside its floor, the score of real slices of the validation subjects:

    index error     mean absolute error of the index that a ridge regression reads off an image. It is fitted to the
                    features of the training slices
    KID × 1000      against validation slices of the same third of the head; the floor is as many training slices
    neighbours      mean absolute difference, in grey levels, and SSIM of each slice of a head and the one below
    jumps           mean absolute second difference of the area of the head along the slices, in per mille of an image
    copies          share of images nearer to one training slice than 99 % of the validation slices are
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oasis.files import quiet_tensorflow, run_script

quiet_tensorflow()  # before anything imports TensorFlow

import numpy as np

import evaluate
import modules
import predict
from dataset import load_split
from oasis import features
from oasis.devices import load_on_devices, prepare_devices, resolve_precision
from oasis.generate import generate
from oasis.heads import chosen_indices, generate_heads, slice_condition
from oasis.metrics import import_sklearn, kid, memorization, ms_ssim

AIR = 16        # grey levels up to which a pixel is outside of the head


def heads_of(split):
    """The complete heads of a Split: uint8 (H, K, S, S, 1). All have the slice indices of the first subject."""
    subjects = np.array([one.subject for one in split.slices])
    heads = [split.images[subjects == subject] for subject in dict.fromkeys(subjects)]
    return np.stack([head for head in heads if len(head) == len(heads[0])])


def fit_index(image_features, indices):
    """A function that reads slice indices off features, a ridge regression."""
    sklearn = import_sklearn()
    from sklearn import linear_model, pipeline, preprocessing
    assert sklearn
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(0, 5, 11)))
    return model.fit(image_features, indices).predict


def continuity(heads):
    """{name: value} of how the slices of heads, uint8 (H, K, S, S, 1), follow each other."""
    below, above = (part.reshape(-1, *heads.shape[2:]) for part in (heads[:, :-1], heads[:, 1:]))
    area = (heads > AIR).mean(axis=(2, 3, 4))
    return {"difference": np.abs(below.astype(float) - above).mean(), "SSIM": ms_ssim(below, above).mean(),
            "jumps": 1000 * np.abs(np.diff(area, 2, axis=1)).mean()}


def thirds(indices, chosen):
    """[rows of `indices` in each third of the sorted list of `chosen` indices]."""
    return [np.flatnonzero(np.isin(indices, part)) for part in np.array_split(sorted(chosen), 3)]


def judge(images, indices, image_features, read_index, real, real_features, real_indices, chosen):
    """{name: value} of images with these slice indices."""
    scores = {"index error": np.abs(read_index(image_features) - indices).mean()}
    for name, mine, theirs in zip(("lower", "middle", "upper"), thirds(indices, chosen), thirds(real_indices, chosen)):
        scores[f"KID, {name} third"] = 1000 * kid(image_features[mine], real_features[theirs])[0]
    return scores


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=evaluate.PATH, help="the slices: a zip or a folder")
    parser.add_argument("--model", default="oasis64", help="a run's folder, a model file or a bundled model's name")
    parser.add_argument("--number-of-images", type=int, default=20, help="images of each index, and heads (20)")
    parser.add_argument("--steps", type=int, default=20, help="of dpm (20)")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of classifier-free guidance (1)")
    flags = parser.parse_args(arguments)
    _, file = predict.find_model(flags.model, predict.CKPT_PATH)
    networks, diffusion, settings = load_on_devices(
        lambda: modules.load_model(file, resolve_precision("auto")), prepare_devices("auto"))
    chosen = chosen_indices(settings, "", True, flags.guidance)
    size, seeds = diffusion.image_size, range(flags.number_of_images)
    options = dict(steps=flags.steps, batch_size=len(chosen), guidance=flags.guidance,
                   **predict.default_stochasticity("dpm", size))
    training, validation = (load_split(flags.path, split, size) for split in ("train", "validate"))
    known, real_indices = (np.array([one.number for one in split.slices]) for split in (training, validation))

    extractor = features.load_features("efficientnet")
    training_features = features.extract(extractor, training.images, "features, training")
    real_features = features.extract(extractor, validation.images, "features, validation")
    read_index = fit_index(training_features, known)
    both = validation.images, real_features, real_indices, chosen
    floor = np.random.default_rng(0).permutation(len(known))[:len(seeds) * len(chosen)]
    rows = {"floor": {**judge(training.images[floor], known[floor], training_features[floor], read_index, *both),
                      **continuity(heads_of(validation))}}
    rows["floor"]["index error"] = np.abs(read_index(real_features) - real_indices).mean()

    either_way = np.concatenate([training.images, np.flip(training.images, training.mirror_axis)])
    indices = np.array(chosen * len(seeds))
    if "slice" in settings["condition"]:
        cond = slice_condition(settings["condition"], (len(indices), size, size, 1), indices)
        drawn = [seed for seed in seeds for _ in chosen]
        images = np.concatenate([batch for _, batch, _ in generate(networks, diffusion, drawn, cond=cond, **options)])
        found = features.extract(extractor, images, "features, slices")
        rows["slices"] = judge(images, indices, found, read_index, *both)
        rows["slices"]["copies"] = 100 * memorization(images, validation.images, either_way)["copies"]
    heads = np.concatenate([batch for _, batch in generate_heads(networks, diffusion, seeds, chosen, **options)])
    images = heads.reshape(-1, size, size, 1)
    found = features.extract(extractor, images, "features, heads")
    rows["heads"] = {**judge(images, indices, found, read_index, *both), **continuity(heads),
                     "copies": 100 * memorization(images, validation.images, either_way)["copies"]}

    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n{len(seeds)} images of each of {len(chosen)} indices, {len(seeds)} heads, against {len(real_indices)} "
          f"real slices\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.2f}" if column in row else "" for column in columns) + " |")


if __name__ == "__main__":
    run_script(main)
