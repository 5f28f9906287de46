"""Comparisons of two sets of images: KID, FID, precision, recall, MS-SSIM, spectrum, histogram, seams, memorization."""
import numpy as np
import tensorflow as tf

from oasis import features
from oasis.files import OasisError

# These are not flags, because results that were computed with different values cannot be compared.
NEIGHBOURS = 5      # k of precision, recall, density and coverage
ROWS = 2000         # of the matrix of N × N kernel values, in memory at a time
PAIRS = 500         # random pairs of images whose MS-SSIM is averaged
NEAREST = 50        # training images whose mean distance memorization() divides by
THUMBNAIL = 32      # pixels a side at which images are compared with training images. Of 500 slightly blurred copies,
                    # 85 % stand out at 32 pixels and 39 % at 64. At 16 pixels, copies 10 % darker do not stand out.


def import_sklearn():
    """Import scikit-learn, which only the evaluation needs. Raises OasisError if it is not installed."""
    try:
        import sklearn.metrics
        import sklearn.neighbors
        return sklearn
    except ImportError:
        raise OasisError("evaluation needs scikit-learn: pip install -r requirements-evaluate.txt") from None


# ------------------------------------------------------------------------------------------------ distances of features

def kernel(x, y):
    """The kernel of the KID, (x·y / D + 1)³, of float64 (N, D) and (M, D): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def random_halves(count, subsets, rng):
    """Bool (subsets, count): random halves of `count` items."""
    return rng.permuted(np.tile(np.arange(count) < count // 2, (subsets, 1)), axis=1)


def mean_within(features, chosen):
    """The mean kernel value over pairs of different rows of features (N, D), for each subset in chosen (K, N): (K,)."""
    sums, count = 0, chosen.sum(axis=1)
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // ROWS)):
        pairs = kernel(features[rows], features)
        pairs[np.arange(len(rows)), rows] = 0
        sums += np.sum(chosen[:, rows] @ pairs * chosen, axis=1)
    return sums / (count * (count - 1))


def kid(samples, real, subsets=100):
    """Return the kernel inception distance of two sets of features, and an estimate of its standard error.

    samples: float64 (N, D). real: float64 (M, D). The KID is the unbiased estimate of the squared MMD with the kernel
    (x·y / D + 1)³. For two sets from the same distribution its mean is 0 at any N (Bińkowski 2018, arXiv 1801.01401).

    The standard error is that of the delete-half jackknife: the standard deviation of the KID over random halves of
    both sets, drawn as often as `subsets` says. This error is too large for a KID near 0. It takes all slices for
    independent, which those of one head are not: see kid_subject_error.
    """
    rng = np.random.default_rng(0)
    a, b = (np.vstack([np.ones(count), random_halves(count, subsets, rng)]) for count in (len(samples), len(real)))
    mean_across = np.sum(a @ kernel(samples, real) * b, axis=1) / (a.sum(axis=1) * b.sum(axis=1))
    estimates = mean_within(samples, a) + mean_within(real, b) - 2 * mean_across
    return estimates[0], estimates[1:].std()


def kid_subject_error(samples, real, subjects, subsets=100):
    """Return the standard error of the KID due to the choice of the subjects of real; None for fewer than 4 subjects.

    subjects: the subject of each row of real. subsets: the number of random halves of the subjects. The error is that
    of the delete-half jackknife: the standard deviation over the halves of the terms of the KID that depend on real,
    times √(kept / left out). With 5 subjects this error is about a fifth too large.
    """
    names, which = np.unique(subjects, return_inverse=True)
    if len(names) < 4:
        return None
    kept = len(names) // 2
    halves = random_halves(len(names), subsets, np.random.default_rng(0))[:, which].astype(float)
    mean_across = halves @ kernel(real, samples).mean(axis=1) / halves.sum(axis=1)
    return (mean_within(real, halves) - 2 * mean_across).std() * np.sqrt(kept / (len(names) - kept))


def fid(samples, real):
    """The Fréchet inception distance |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of float64 (N, D) and (M, D).

    The estimate is too large for small N and M, so compare it only at equal N and M (Heusel 2017, arXiv 1706.08500).
    With Σ = AᵀA, the trace of the root is the sum of the singular values of A₁ A₂ᵀ. This sum is exact for N < D too,
    where the root of the product Σ₁ Σ₂ is not.
    """
    def root_of_covariance(features):
        return np.linalg.qr(features - features.mean(axis=0), mode="r") / np.sqrt(len(features) - 1)

    a, b = root_of_covariance(samples), root_of_covariance(real)
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((samples.mean(axis=0) - real.mean(axis=0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * shared


def precision_recall_density_coverage(samples, real, k=NEIGHBOURS):
    """Return {name: value} of the four metrics in the function's name, for float64 (N, D) and (M, D).

    The ball around a point reaches to its k-th neighbour in its own set. Precision is the share of samples that lie in
    a real ball, and density is the mean number of real balls around a sample, divided by k. Recall is the share of real
    points that lie in a sample's ball, and coverage is the share of real balls that contain a sample. Slices of other
    subjects do not score 1, but precision 0.7, density 0.5, recall 0.9 and coverage 0.9, because the nearest neighbours
    of a slice are other slices of the same head. Precision and recall: Kynkäänniemi 2019, arXiv 1904.06991; density and
    coverage: Naeem 2020, arXiv 2002.09797.
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


# -------------------------------------------------------------------------------------------------- distances of images

def ms_ssim(a, b):
    """The multi-scale structural similarity of images a[i] and b[i], uint8 (N, S, S, 1): float64 (N,), 1 if equal.

    Of the paper's five scales, it uses those into which the window of 11 pixels fits (three at 64 pixels). Their
    weights are divided by their sum (Wang 2003, "Multi-scale structural similarity for image quality assessment").
    """
    window = min(11, a.shape[1])
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    weights = weights[:1 + int(np.log2(a.shape[1] // window))]
    parts = [tf.image.ssim_multiscale(a[i:i + 50], b[i:i + 50], max_val=255, power_factors=weights / weights.sum(),
                                      filter_size=window) for i in range(0, len(a), 50)]
    return np.concatenate(parts).astype(np.float64)


def self_similarity(images):
    """The mean MS-SSIM of random pairs of different images. It is high if all images look the same."""
    rng = np.random.default_rng(0)
    first = rng.integers(len(images), size=PAIRS)
    second = (first + rng.integers(1, len(images), size=PAIRS)) % len(images)
    return ms_ssim(images[first], images[second]).mean()


def radial_spectrum(images):
    """The mean power of uint8 (N, S, S, 1) at 0 … S / 2 waves per side, over all directions: float64 (S / 2 + 1,).

    White noise of variance σ² has the power σ² everywhere.
    """
    size = images.shape[1]
    power = sum(np.abs(np.fft.fft2(image[:, :, 0])) ** 2 for image in images) / len(images) / size**2
    waves = np.fft.fftfreq(size, 1 / size)
    radius = np.rint(np.hypot(waves[:, None], waves)).astype(int)
    rings = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return rings[:size // 2 + 1]            # higher frequencies do not exist in all directions


def spectrum_distance(a, b):
    """The root mean square over all frequencies but 0 of 10·log10(a / b), in decibels. a, b: see radial_spectrum."""
    a, b = (np.maximum(spectrum[1:], 1 / 12) for spectrum in (a, b))    # 1/12: the noise of rounding to grey levels
    return np.sqrt(np.mean((10 * np.log10(a / b)) ** 2))


def histogram(images):
    """The share of pixels of every grey level: float64 (256,)."""
    return np.bincount(images.ravel(), minlength=256) / images.size


def histogram_distance(a, b):
    """The mean change of a pixel, in grey levels, that turns one histogram into the other (Wasserstein 1)."""
    return np.abs(np.cumsum(a) - np.cumsum(b)).sum()


def seams(images):
    """The mean difference of neighbouring pixels across the borders of blocks, divided by that inside of blocks.

    Both are means of absolute differences. The ratio is about 1 if no border is visible. It is set to 1 if all blocks
    are constant. images: uint8 (N, S, S, 1). A block has max(S // 64, 2) pixels a side: the patch size of --recipe
    recommended, but at least 2, because the network's upsampling can produce a checkerboard of 2×2.
    """
    block = max(images.shape[1] // 64, 2)
    sums, counts = np.zeros(2), np.zeros(2)     # inside, across
    for axis in (1, 2):
        steps = np.abs(np.diff(images.astype(np.int16), axis=axis)).mean(axis=(0, 3 - axis, 3))
        across = np.arange(1, len(steps) + 1) % block == 0
        sums += steps[~across].sum(), steps[across].sum()
        counts += np.sum(~across), np.sum(across)
    inside, across = sums / counts
    return across / inside if inside else 1.0


# --------------------------------------------------------------------------------------------------------- memorization

def nearest_neighbours(images, training):
    """The training images nearest to each image: distances (N, K), ascending, and indices into `training` (N, K).

    images, training: uint8 (N, S, S, 1) and (M, S, S, 1). K = min(NEAREST, M). The distance is the root mean square
    difference in grey levels at 32 pixels a side, where a blurred copy is still near.
    """
    size = min(THUMBNAIL, images.shape[1])
    queries, candidates = (features.resize(x, size).reshape(len(x), -1) for x in (images, training))
    search = import_sklearn().neighbors.NearestNeighbors(n_neighbors=min(NEAREST, len(training)), algorithm="brute")
    _, rows = search.fit(candidates).kneighbors(queries)
    squares = [np.mean((query - candidates[row].astype(np.float64)) ** 2, axis=1) for query, row in zip(queries, rows)]
    return np.sqrt(squares), rows


def memorization(samples, real, training):
    """Return {name: value} that say how many samples are copies of training images. All images are uint8 (N, S, S, 1).

    real: slices that are certainly no copies. The distance to the nearest training image is small for a blurred image
    too, because a blurred image is near to all images. It is therefore divided by the mean distance to the 50 nearest
    training images. This ratio is small only for copies (Carlini 2023, "Extracting training data from diffusion
    models", arXiv 2301.13188). copies is the share of samples whose ratio is below the 1 % quantile of the real
    slices' ratios (0.002 … 0.02 for real slices of 35 other subjects), and 1 if all are copies. copies_by_chance is its
    expectation for other real slices: 0.01, or more if there are few real slices. pairs are the 8 most suspicious
    samples, as (row of samples, row of training, distance, ratio). median_distance and median_distance_of_real are
    medians of the distance to the nearest training image, in grey levels.
    """
    distances, rows = nearest_neighbours(np.concatenate([samples, real]), training)
    ratios, real_ratios = np.split(distances[:, 0] / np.maximum(distances.mean(axis=1), 1e-9), [len(samples)])
    nearest, real_nearest = np.split(distances[:, 0], [len(samples)])
    order = np.argsort(ratios)[:8]
    return {"copies": np.mean(ratios < np.quantile(real_ratios, 0.01)),
            "copies_by_chance": (0.01 * (len(real) - 1) + 1) / (len(real) + 1),  # the rank of this quantile
            "median_distance": np.median(nearest), "median_distance_of_real": np.median(real_nearest),
            "pairs": [(int(i), int(rows[i, 0]), nearest[i], ratios[i]) for i in order]}


# --------------------------------------------------------------------------------------------------------- all together

def compare(images, image_features, real, real_features, subjects=None):
    """Return {metric: value} of a set of images against real slices. The set is samples, or other real slices.

    subjects: the subject of each real slice, for kid_subject_error().
    """
    value, error = kid(image_features, real_features)
    more = {} if subjects is None else {"kid_subject_error": kid_subject_error(image_features, real_features, subjects)}
    return {"kid": value, "kid_error": error, **more, "fid": fid(image_features, real_features),
            **precision_recall_density_coverage(image_features, real_features),
            "spectrum": spectrum_distance(radial_spectrum(images), radial_spectrum(real)),
            "histogram": histogram_distance(histogram(images), histogram(real)), **describe(images)}


def describe(images):
    """Return {metric: value} of a set of images by itself."""
    grey = images.mean(axis=(1, 2, 3))
    return {"count": len(images), "ms_ssim": self_similarity(images), "seams": seams(images), "grey": grey.mean(),
            "grey_spread": grey.std()}
