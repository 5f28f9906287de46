"""Judge a conditional model: do the images have the requested slice index, and do the slices of a head fit together?

    python tools/judge_heads.py --path ZIP --model RUN          20 images of each slice index, and 20 heads

The floors are the scores of 20 real heads of training subjects, and of as many slices of different subjects. Several
slices of one head raise the KID, so compare heads with the first floor, and single slices with the second. Scores close
to the floor are good:

    index error     mean absolute error of the slice index that a ridge regression predicts from an image. It is fitted
                    to the features of half of the training subjects; the floor comes from the other half
    KID × 1000      against validation slices of the same third of the head, with the standard error
    difference      mean absolute difference of each slice of a head and the one below, in grey levels; blur lowers it
    MS-SSIM         of each slice of a head and the one below
    jumps           mean absolute second difference of the area of the head along the slices, in per mille of an image
    copies          share of images that are nearer to one training slice, relative to the 50 nearest, than 99 % of the
                    validation slices are; by chance about 1 %
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oasis.files import OasisError, import_tensorflow, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np

import evaluate
import modules
from dataset import load_split
from oasis import features, sources
from oasis.devices import prepare_devices, resolve_precision
from oasis.generate import generate, load_on_devices, noise_options
from oasis.heads import chosen_indices, generate_heads
from oasis.metrics import import_sklearn, kid, memorization, ms_ssim
from oasis.modelfile import find_model
from oasis.settings import integer, make_parser

AIR = 16        # grey levels up to which a pixel is outside of the head


def find_heads(slices, chosen):
    """Return int (H, K): the place in slices, a list of Slice, of each chosen index of each subject that has them all.

    chosen: K slice indices. H: the number of those subjects.
    """
    rows = {one[:2]: row for row, one in enumerate(slices)}
    found = [[rows.get((subject, index), -1) for index in chosen]
             for subject in dict.fromkeys(one.subject for one in slices)]
    return np.array([head for head in found if min(head) >= 0], int).reshape(-1, len(chosen))


def fit_index(image_features, indices):
    """A ridge regression: a function that predicts slice indices from features."""
    import_sklearn()
    from sklearn import linear_model, pipeline, preprocessing
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(0, 5, 11)))
    return model.fit(image_features, indices).predict


def continuity(heads):
    """Return {metric: value} of the similarity of neighbouring slices of heads, uint8 (H, K, S, S, 1)."""
    below, above = (part.reshape(-1, *heads.shape[2:]) for part in (heads[:, :-1], heads[:, 1:]))
    area = (heads > AIR).mean(axis=(2, 3, 4))
    return {"difference": np.abs(below.astype(float) - above).mean(), "MS-SSIM": ms_ssim(below, above).mean(),
            "jumps": 1000 * np.abs(np.diff(area, 2, axis=1)).mean()}


def thirds(indices, chosen):
    """Return {name: rows of `indices` in a third of the ascending chosen indices}."""
    parts = np.array_split(chosen, 3)
    return {name: np.flatnonzero(np.isin(indices, part)) for name, part in zip(("lower", "middle", "upper"), parts)}


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("--path", default=evaluate.PATH, help="the slices: a zip or a folder")
    parser.add_argument("--model", required=True, help="a run's folder, a model file or a bundled model's name")
    parser.add_argument("--number-of-images", type=integer(2), default=20,
                        help="images of each index, and number of heads (20)")
    parser.add_argument("--steps", type=integer(), default=20, help="sampling steps of dpm (20)")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of classifier-free guidance (1)")
    flags = parser.parse_args(arguments)
    _, file = find_model(flags.model)
    networks, diffusion, settings = load_on_devices(
        lambda: modules.load_model(file, resolve_precision("auto")), prepare_devices("auto"))
    chosen = chosen_indices(settings, slices="", head=True)
    size, count = diffusion.image_size, flags.number_of_images
    reading = sources.reading_of_model(settings)
    training, validation = (load_split(flags.path, split, size, **reading) for split in ("train", "validate"))
    heads = np.random.default_rng(0).permutation(find_heads(training.slices, chosen))
    if len(heads) < 2 * count:
        raise OasisError(f"{flags.path}: only {len(heads)} training subjects have the slices {chosen}; "
                         f"{2 * count} are needed for --number-of-images {count}")
    numbers, real_numbers = (np.array([one.number for one in split.slices]) for split in (training, validation))

    extractor = features.load_features("efficientnet")
    known, real = (features.extract(extractor, split.images, f"features, {name}")
                   for name, split in {"training": training, "validation": validation}.items())
    fitted = heads[len(heads) // 2:].ravel()
    read_index = fit_index(known[fitted], numbers[fitted])
    indices = np.tile(chosen, count)
    either_way = np.concatenate([training.images, np.flip(training.images, training.mirror_axis)])

    def judge(name, images, image_features=None):
        """Return {column: text} of a row of the table. images: uint8 (N, S, S, 1); indices: their slice indices."""
        if image_features is None:
            image_features = features.extract(extractor, images, f"features, {name}")
        scores = {"index error": f"{np.abs(read_index(image_features) - indices).mean():.2f}"}
        theirs = thirds(real_numbers, chosen)
        for third, mine in thirds(indices, chosen).items():
            value, error = kid(image_features[mine], real[theirs[third]])
            scores[f"KID × 1000, {third}"] = f"{1000 * value:.1f} ± {1000 * error:.1f}"
        if "heads" in name:
            for metric, value in continuity(images.reshape(count, len(chosen), size, size, 1)).items():
                scores[metric] = f"{value:.2f}"
        if "floor" not in name:
            scores["copies"] = f"{100 * memorization(images, validation.images, either_way)['copies']:.1f} %"
        return scores

    options = dict(steps=flags.steps, batch_size=len(chosen), guidance=flags.guidance, **noise_options("dpm"))
    whole = heads[:count].ravel()
    places = np.arange(count * len(chosen))  # the first half of the heads, because the other was fitted
    single = heads[places % (len(heads) // 2), places % len(chosen)]
    drawn = generate(networks, diffusion, range(len(indices)), indices=indices, **options)
    slices = np.concatenate([images for _, images, _ in drawn])
    made = np.concatenate([batch for _, batch in generate_heads(networks, diffusion, range(count), chosen, **options)])
    rows = {**{name: judge(name, training.images[chosen_rows], known[chosen_rows])
               for name, chosen_rows in {"floor, heads": whole, "floor, slices": single}.items()},
            "slices": judge("slices", slices), "heads": judge("heads", made.reshape(-1, size, size, 1))}
    print(f"\n{count} images of each of {len(chosen)} slice indices, {count} heads, against {len(real)} real slices\n")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    for name, row in {"": dict(zip(columns, columns)), "---": dict.fromkeys(columns, "---"), **rows}.items():
        print("| " + " | ".join([name, *(row.get(column, "") for column in columns)]) + " |")


if __name__ == "__main__":
    run_script(main)
