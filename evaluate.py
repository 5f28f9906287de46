"""How good are the pictures? KID, FID, precision, recall, spectrum, memorisation: each beside what real slices score.

    python evaluate.py                          makes 1000 pictures with the newest run's model and judges them
    python evaluate.py --model oasis64          with a bundled model, a model file or a run's folder
    python evaluate.py --samples pictures.npy   judges pictures that are there: an .npy or a folder of PNGs

A number without its floor is noise: the floor is what real slices of other subjects score, as many, with the same code.
evaluation.png shows real slices. Under the OASIS data use agreement it must not be published.
"""
import hashlib
import json
from pathlib import Path

import common

common.quiet_tensorflow()  # before anything imports it

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import distribute
import features
import modules
import predict
from common import OasisError, auto_or, flags_from_constants, image_grid, integer, number, replacing, run_script
from dataset import decode, load_slices, naming, side_of, slice_subjects

MODEL = ""                  # a run's folder, a model file or a bundled model's name; else the newest run, else oasis64
CKPT_PATH = "./checkpoint"  # the folder that holds the runs
SAMPLES = ""                # pictures to judge instead of a model: an .npy uint8 (N, S, S, 1) or a folder of PNGs
PATH = "./dataset/keras_png_slices_data.zip"  # the OASIS slices: the zip, or the folder unpacked from it
SPLIT = "validate"          # the real slices to compare with: validate or test
NUMBER_OF_IMAGES = 1000     # pictures to judge, at most, and as many training slices for the floor
FEATURES = "efficientnet"   # what looks at the pictures: efficientnet, or inception, which it has to download
SAMPLER = "dpm"             # ddpm as in the paper; ddim and dpm need far fewer steps
STEPS = 0                   # sampling steps; 0 takes all for ddpm, 50 for ddim, 20 for dpm
ETA = "auto"                # noise that ddim and dpm draw anew in every step: 0 none, 1 as much as ddpm; auto takes 1 for dpm, 0 for ddim
NOISE_SCALE = "auto"        # multiplies the noise drawn while coarse shapes are decided; auto takes 1.1 for dpm from 256 pixels on, else 1
BATCH_SIZE = 50             # images generated at a time
PRECISION = "auto"          # of the arithmetic that generates; auto takes the fastest that is safe on this machine
DEVICES = "auto"            # auto takes all GPUs, else the CPU; or cpu, a number of GPUs, a list: GPU:0,GPU:2 or CPU:0,CPU:1
SEED = 0                    # of the first image; the next one has the next seed
OUTPUT = "./evaluation/"    # the folder for evaluation.json, evaluation.png and the generated pictures

FLAG_TYPES = {
    "SPLIT": ("validate", "test"), "FEATURES": features.KINDS, "SAMPLER": modules.SAMPLERS, "STEPS": integer(0), "ETA": auto_or(number(0, 1)),
    "NOISE_SCALE": auto_or(number(0.5, 2)), "PRECISION": ("auto", *modules.PRECISIONS), "SEED": integer(-2**63),
    "NUMBER_OF_IMAGES": integer(20, 10**6), "BATCH_SIZE": integer(1, 2**16), "DEVICES": distribute.devices,
}
# Not flags: a number made with other ones would be another number.
NEIGHBOURS = 5
PAIRS = 500
CROWD = 50
# Of 500 copies, slightly blurred, 85 % stand out at 32 pixels and 39 % at 64; at 16 pixels copies 10 % darker escape.
THUMBNAIL = 32
MINIMUM = 20


# ------------------------------------------------------------------------------- how far apart are two sets of features

def kid(samples, real, subsets=100, seed=0):
    """The kernel inception distance of float64 (N, D) and (M, D), and its standard error.

    It is the unbiased estimate of the squared MMD with kernel (x·y / D + 1)³: 0 on average for two sets of the same
    kind, at any N (Bińkowski 2018, arXiv 1801.01401). The error is the deviation over random halves of both sets, which
    is that of the whole if pictures are independent (the delete-half jackknife). Slices of one head are not: another
    35 subjects move the floor by 0.0004, twice the error.
    """
    rng = np.random.default_rng(seed)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def whole_and_halves(count):
        halves = rng.permuted(np.tile(np.arange(count) < count // 2, (subsets, 1)), axis=1)
        return np.vstack([np.ones(count), halves])

    def mean_within(features, chosen):      # over pairs of different rows
        pairs = kernel(features, features)
        np.fill_diagonal(pairs, 0)
        count = chosen.sum(axis=1)
        return np.sum(chosen @ pairs * chosen, axis=1) / (count * (count - 1))

    a, b = whole_and_halves(len(samples)), whole_and_halves(len(real))
    mean_across = np.sum(a @ kernel(samples, real) * b, axis=1) / (a.sum(axis=1) * b.sum(axis=1))
    estimates = mean_within(samples, a) + mean_within(real, b) - 2 * mean_across
    return estimates[0], estimates[1:].std()


def fid(samples, real):
    """The Fréchet inception distance |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of float64 (N, D) and (M, D).

    Biased: it falls with N and M, so compare it at the same ones only (Heusel 2017, arXiv 1706.08500). With Σ = AᵀA the
    trace of the root is the sum of the singular values of A₁ A₂ᵀ: exact where N < D and the root of a product is not.
    """
    def root_of_covariance(features):
        return np.linalg.qr(features - features.mean(axis=0), mode="r") / np.sqrt(len(features) - 1)

    a, b = root_of_covariance(samples), root_of_covariance(real)
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((samples.mean(axis=0) - real.mean(axis=0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * shared


def precision_recall_density_coverage(samples, real, k=NEIGHBOURS):
    """{name: value} for float64 (N, D) and (M, D): precision and recall (Kynkäänniemi 2019, arXiv 1904.06991), density
    and coverage (Naeem 2020, arXiv 2002.09797).

    Around every point lies a ball that reaches to its k-th neighbour in its own set. precision: the share of samples in
    a real ball; density: in how many, over k; recall: the share of real points in a sample's ball; coverage: the share
    of real balls with a sample in them. Other people's brains score 0.7, 0.6, 0.8 and 0.9, not 1: the nearest
    neighbours of a slice are other slices of its head.
    """
    sklearn = import_sklearn()

    def radii(points):
        distances, _ = sklearn.neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()
        return distances[:, -1]             # without an argument, kneighbors() leaves out the point itself

    distances = sklearn.metrics.pairwise_distances(samples, real)
    in_real_ball = distances <= radii(real)
    in_sample_ball = distances <= radii(samples)[:, None]
    return {"precision": in_real_ball.any(axis=1).mean(), "recall": in_sample_ball.any(axis=0).mean(),
            "density": in_real_ball.sum(axis=1).mean() / k, "coverage": in_real_ball.any(axis=0).mean()}


# ------------------------------------------------------------------------------- how far apart are two sets of pictures

def ms_ssim(a, b):
    """The multi-scale structural similarity of pictures a[i] and b[i], uint8 (N, S, S, 1): float64 (N,), 1 if equal.

    As many of the paper's five scales as there are with room for the window of 11 pixels (three at 64 pixels), their
    weights made to add up to 1 (Wang 2003, "Multi-scale structural similarity for image quality assessment").
    """
    window = min(11, a.shape[1])
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    weights = weights[:1 + int(np.log2(a.shape[1] // window))]
    parts = [tf.image.ssim_multiscale(a[i:i + 50], b[i:i + 50], max_val=255, power_factors=weights / weights.sum(),
                                      filter_size=window) for i in range(0, len(a), 50)]
    return np.concatenate(parts).astype(np.float64)


def self_similarity(pictures, seed=0):
    """The mean MS-SSIM of random pairs of different pictures: high if they all look the same."""
    rng = np.random.default_rng(seed)
    first = rng.integers(len(pictures), size=PAIRS)
    second = (first + rng.integers(1, len(pictures), size=PAIRS)) % len(pictures)
    return ms_ssim(pictures[first], pictures[second]).mean()


def radial_spectrum(pictures):
    """The mean power at 0 … S / 2 waves a side, in all directions, of uint8 (N, S, S, 1): float64 (S / 2 + 1,).

    White noise of variance σ² has the power σ² everywhere.
    """
    size = pictures.shape[1]
    power = sum(np.abs(np.fft.fft2(picture[:, :, 0])) ** 2 for picture in pictures) / len(pictures) / size**2
    waves = np.fft.fftfreq(size, 1 / size)
    radius = np.rint(np.hypot(waves[:, None], waves)).astype(int)
    rings = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return rings[:size // 2 + 1]            # beyond lie corners, that not all directions reach


def spectrum_distance(a, b):
    """The root mean square difference of two radial spectra in decibels, without the mean grey at 0 waves."""
    a, b = (np.maximum(spectrum[1:], 1 / 12) for spectrum in (a, b))    # below lies the noise of whole grey levels
    return np.sqrt(np.mean((10 * np.log10(a / b)) ** 2))


def histogram(pictures):
    """The share of pixels of every grey level: float64 (256,)."""
    return np.bincount(pictures.ravel(), minlength=256) / pictures.size


def histogram_distance(a, b):
    """How many grey levels the average pixel has to change to turn one histogram into the other (Wasserstein 1)."""
    return np.abs(np.cumsum(a) - np.cumsum(b)).sum()


def seams(pictures):
    """The mean absolute difference of neighbours across the borders of blocks over that inside blocks, of uint8 (N, S, S, 1).

    1 if no border shows. The blocks are the patches that --recipe recommended folds at this size, S/64 pixels a side; at
    least 2, where a checkerboard of the network's own upsampling would show.
    """
    block = max(pictures.shape[1] // 64, 2)
    sums, counts = np.zeros(2), np.zeros(2)     # inside, across
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures.astype(np.int16), axis=axis)).mean(axis=(0, 3 - axis, 3))
        across = np.arange(1, len(steps) + 1) % block == 0
        sums += steps[~across].sum(), steps[across].sum()
        counts += np.sum(~across), np.sum(across)
    inside, across = sums / counts
    return across / inside if inside else 1.0


# --------------------------------------------------------------------------------------------------------- memorisation

def nearest_neighbours(pictures, training, k=CROWD):
    """The k training pictures nearest to each picture: distances (N, k), rising, and rows of `training` (N, k).

    The distance is the root mean square difference in grey levels at 32 pixels, where a copy stays one if it is blurred.
    """
    size = min(THUMBNAIL, pictures.shape[1])
    queries, candidates = (features.resize(x, size).reshape(len(x), -1) for x in (pictures, training))
    search = import_sklearn().neighbors.NearestNeighbors(n_neighbors=min(k, len(training)), algorithm="brute")
    _, rows = search.fit(candidates).kneighbors(queries)
    squares = [np.mean((query - candidates[row].astype(np.float64)) ** 2, axis=1) for query, row in zip(queries, rows)]
    return np.sqrt(squares), rows


def memorisation(samples, real, training):
    """Whether the samples are copies of training slices, all uint8 (·, S, S, 1). `real` are slices that are surely not.

    The plain distance to the nearest training slice would accuse blurred pictures: they are near to everything. So it
    is compared with the mean distance to the 50 nearest ones: that ratio is small for a copy alone (Carlini 2023,
    "Extracting training data from diffusion models", arXiv 2301.13188). copies is the share of samples whose ratio is
    below that of 99 % of the real slices: 0.01 by chance (0.002 … 0.02 for other sets of 35 heads), 1 for copies. pairs
    are (row of samples, row of training, distance, ratio), the most suspicious ones first.
    """
    distances, rows = nearest_neighbours(samples, training)
    real_distances, _ = nearest_neighbours(real, training)
    ratios, real_ratios = (d[:, 0] / np.maximum(d.mean(axis=1), 1e-9) for d in (distances, real_distances))
    order = np.argsort(ratios)[:8]
    return {"copies": np.mean(ratios < np.quantile(real_ratios, 0.01)),
            "median_distance": np.median(distances[:, 0]), "median_distance_of_real": np.median(real_distances[:, 0]),
            "pairs": [(int(i), int(rows[i, 0]), distances[i, 0], ratios[i]) for i in order]}


def check_subjects(training, evaluation):
    """Raise OasisError if a subject (case number) is in both arrays: the floor would be too low, a copy look honest."""
    shared = np.intersect1d(training, evaluation)
    if len(shared):
        names = ", ".join(f"{subject:03d}" for subject in shared[:5]) + (", …" if len(shared) > 5 else "")
        raise OasisError(f"{len(shared)} of the subjects to compare with are also in the training split (case {names}). "
                         "Take another --split, or the published zip: its splits share no subject.")


# ------------------------------------------------------------------------------------------------------------- pictures

def get_samples(flags, names):
    """(uint8 (N, S, S, 1), label, what made them): the pictures to judge, flags.number_of_images or as many as there are."""
    if flags.samples:
        return load_samples(flags.samples, flags.number_of_images), Path(flags.samples).name, {}
    _, file = predict.find_model(flags.model, flags.ckpt_path)
    return generate_samples(file, flags, names)


def generate_samples(file, flags, names=("the only one",)):
    """The same for pictures that are yet to be made, by the model in that file.

    Every batch is kept in a folder in flags.output, so that another call goes on where this one was stopped. The folder
    is named after all that the pictures depend on, the code included: they are never those of another model or sampler.
    The weights count as they were loaded, for a training that still runs may have replaced the file since.
    """
    precision = modules.best_precision() if flags.precision == "auto" else flags.precision
    network, diffusion, settings = distribute.load_on_devices(lambda: modules.load_model(file, precision), names)
    steps = len(diffusion.sampler_table(flags.sampler, flags.steps or None)[0])
    noise = predict.noise_options(flags, diffusion.image_size)
    weights = {name: variable.numpy() for name, variable in modules.named_variables(network)}
    code = b"".join(Path(module.__file__).read_bytes() for module in (modules, predict))
    origin = {"sampler": flags.sampler, "steps": steps, **noise, "first_seed": flags.seed, "precision": precision,
              "model_sha256": modules.model_digest(weights, json.dumps(settings)),
              "code_sha256": hashlib.sha256(code).hexdigest()}
    folder = Path(flags.output) / f"samples_{hashlib.sha256(repr(origin).encode()).hexdigest()[:16]}"

    done, batches = 0, []
    while done < flags.number_of_images and (path := folder / f"from_{done:06d}.npy").exists():
        batches.append(read_pictures(path))
        done += len(batches[-1])
    missing = range(flags.seed + done, flags.seed + flags.number_of_images)
    if missing:
        for seeds, images, _ in predict.generate(network, diffusion, missing, flags.sampler, steps, flags.batch_size, **noise):
            with replacing(folder / f"from_{seeds[0] - flags.seed:06d}.npy") as temporary:
                np.save(temporary, images)
            batches.append(images)
    samples = np.concatenate(batches)[:flags.number_of_images]
    label = f"{flags.sampler} {steps}{predict.noise_label(flags.sampler, diffusion.image_size, noise)}"
    return samples, label, {"model": str(file.absolute()), "settings": settings, **origin}


def load_samples(path, limit):
    """At most `limit` pictures from an .npy uint8 (N, S, S, 1) or a folder of grey PNGs, by name: uint8 (N, S, S, 1)."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return read_pictures(path)[:limit]
    pictures = []
    for file in sorted(path.glob("*.png"))[:limit]:
        with naming(file, "Name a folder with grey, square PNGs of one size and nothing else."):
            png = file.read_bytes()
            pictures.append(decode(png, side_of(png))[:, :, None])
            if pictures[-1].shape != pictures[0].shape:
                raise OasisError(f"is of another size than the first one, {pictures[0].shape[0]} pixels")
    if not pictures:
        raise OasisError(f"{path.absolute()}: holds no .png. Name a folder with pictures, or an .npy.")
    return np.stack(pictures)


def read_pictures(path):
    """uint8 (N, S, S, 1) from an .npy."""
    with naming(path, "Name an .npy with pictures uint8 (N, S, S, 1), or a folder of PNGs."):
        pictures = np.load(path, allow_pickle=False)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[2:] != (pictures.shape[1], 1):
            raise OasisError(f"holds {pictures.dtype} {pictures.shape}")
    return pictures


# --------------------------------------------------------------------------------------------------------------- report

def compare(pictures, pictures_features, real, real_features):
    """{metric: value} of one set of pictures against the real ones; the samples and the floor both come through here."""
    value, error = kid(pictures_features, real_features)
    return {"kid": value, "kid_error": error, "fid": fid(pictures_features, real_features),
            **precision_recall_density_coverage(pictures_features, real_features),
            "spectrum": spectrum_distance(radial_spectrum(pictures), radial_spectrum(real)),
            "histogram": histogram_distance(histogram(pictures), histogram(real)), **describe(pictures)}


def describe(pictures):
    """{metric: value} of a set of pictures by itself."""
    grey = pictures.mean(axis=(1, 2, 3))
    return {"count": len(pictures), "ms_ssim": self_similarity(pictures), "seams": seams(pictures), "grey": grey.mean(),
            "grey_spread": grey.std()}


def table(corner, rows):
    """The rows {name: metrics} as text that is a Markdown table too; what a row lacks stays empty."""
    columns = {"N": "{count}", "KID × 1000": "{kid:.2f} ± {kid_error:.2f}", "FID": "{fid:.2f}",
               "precision": "{precision:.3f}", "recall": "{recall:.3f}", "density": "{density:.3f}",
               "coverage": "{coverage:.3f}", "MS-SSIM": "{ms_ssim:.3f}", "spectrum, dB": "{spectrum:.2f}",
               "histogram": "{histogram:.2f}", "seams": "{seams:.3f}", "grey": "{grey:.1f} ± {grey_spread:.1f}"}

    def cell(form, metrics):
        try:
            return form.format(**metrics)
        except KeyError:
            return ""

    lines = [[corner, *columns]]
    for name, metrics in rows.items():
        thousandfold = {key: 1000 * value for key, value in metrics.items() if key.startswith("kid")}
        lines.append([name, *(cell(form, {**metrics, **thousandfold}) for form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths)) + " |" for line in lines)


def figure(samples, real, training, pairs, title):
    """A matplotlib Figure to look at: samples, real slices, the most suspicious pairs, spectra and histograms.

    pairs: those of memorisation().
    """
    page = Figure(figsize=(12, 14), layout="constrained")
    page.suptitle(title)
    axes = page.subplot_mosaic([["samples", "real"], ["pairs", "pairs"], ["spectrum", "histogram"]],
                               height_ratios=(6, 3, 4))

    def show(name, pictures, columns, **labels):
        axes[name].imshow(image_grid(pictures, columns), cmap="gray", vmin=0, vmax=255)
        axes[name].set(xticks=[], yticks=[], **labels)

    for name, pictures in {"samples": samples, "real": real}.items():
        show(name, pictures[np.linspace(0, len(pictures) - 1, 36).astype(int)], 6, title=name)
        axes["spectrum"].semilogy(radial_spectrum(pictures), label=name)
        axes["histogram"].semilogy(np.maximum(histogram(pictures), 1e-7), label=name)
    axes["real"].set_title("real (not to be published)")
    axes["spectrum"].set(title="power spectrum", xlabel="waves a side", ylabel="power")
    axes["histogram"].set(title="histogram", xlabel="grey level", ylabel="share of pixels")
    axes["spectrum"].legend()

    rows, training_rows, distances, ratios = zip(*pairs)
    show("pairs", np.concatenate([samples[list(rows)], training[list(training_rows)]]), len(pairs),
         title="the most suspicious samples, above the nearest training slice (not to be published)")
    axes["pairs"].set_xticks((np.arange(len(pairs)) + 0.5) * samples.shape[1],
                             [f"{distance:.1f} greys\nratio {ratio:.2f}" for distance, ratio in zip(distances, ratios)])
    return page


def import_sklearn():
    """The package, or an OasisError that says how to get it: only evaluation needs it."""
    try:
        import sklearn.metrics
        import sklearn.neighbors
        return sklearn
    except ImportError:
        raise OasisError("evaluation needs scikit-learn: pip install -r requirements-evaluate.txt") from None


def main(arguments=None):
    flags = parse_flags(arguments)
    names = distribute.prepare_devices(flags.devices)
    import_sklearn()                    # what is missing shows before the work, not after it
    extractor = features.load_features(flags.features)
    subjects = slice_subjects(flags.path, flags.split)
    check_subjects(slice_subjects(flags.path, "train"), subjects)

    samples, label, origin = get_samples(flags, names)
    size = samples.shape[1]
    real, training = (load_slices(flags.path, split, size) for split in (flags.split, "train"))
    # At random: load_slices' own limit would take the same few places of every head, and the floor would be too high.
    floor = np.random.default_rng(0).permutation(training)[:len(samples)]
    for name, pictures in {"pictures": samples, f"slices of {flags.split}": real, "training slices": floor}.items():
        if len(pictures) < MINIMUM:
            raise OasisError(f"{len(pictures)} {name} are too few to compare: at least {MINIMUM} are needed")

    real_features = features.extract(extractor, real, f"features, {flags.split}")
    metrics = {name: compare(pictures, features.extract(extractor, pictures, f"features, {name}"), real, real_features)
               for name, pictures in {"samples": samples, "floor": floor}.items()}
    metrics["real"] = describe(real)
    either_way = np.concatenate([training, training[:, ::-1]])     # --flips shows slices mirrored: such copies count too
    copies = memorisation(samples, real, either_way)

    title = (f"{label}: {size}×{size} pixels, {extractor.name}, against {len(real)} real slices of "
             f"{len(np.unique(subjects))} subjects ({flags.split})")
    rows = {label: metrics["samples"], "floor: training slices": metrics["floor"], f"real: {flags.split}": metrics["real"]}
    print(f"\n{title}\n\n{table(extractor.name, rows)}\n\n{100 * copies['copies']:.1f} % of the pictures are closer to "
          f"one training slice than 99 % of the {flags.split} slices are (by chance: 1 %)\n")
    report = {"features": extractor.name, "image_size": size, "metrics": metrics, "memorisation": copies,
              "origin": origin, "flags": vars(flags)}
    write_report(Path(flags.output).absolute(), report, figure(samples, real, either_way, copies["pairs"], title))


def write_report(folder, report, page):
    with replacing(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, default=float), encoding="utf-8")
    with replacing(folder / "evaluation.png") as temporary:
        page.savefig(temporary, dpi=100)
    print(f"{folder / 'evaluation.json'}\n{folder / 'evaluation.png'}\n"
          "The picture shows real slices: the OASIS data use agreement forbids to publish it.")


def parse_flags(arguments=None):
    parser = flags_from_constants(__file__, globals(), FLAG_TYPES)
    flags = parser.parse_args(arguments)
    if flags.model and flags.samples:
        parser.error("--model makes the pictures, --samples says where they are: name one of the two")
    return flags


if __name__ == "__main__":
    run_script(main)
