"""oasis/metrics.py: every metric against a closed form, and the damage that it must and must not detect."""
import numpy as np
import pytest

from helpers import flat_images, make_heads
from oasis import features, metrics

pytest.importorskip(features.PARAMETERS_PACKAGE, reason="pip install -r requirements-evaluate.txt")
pytest.importorskip("sklearn", reason="pip install -r requirements-evaluate.txt")


def gaussian(count, mean, std, seed):
    """float64 (count, D) of independent Gaussian features. mean: (D,). std: (D,) or a number."""
    return mean + std * np.random.default_rng(seed).standard_normal((count, len(mean)))


def whitened(count, dimensions, seed):
    """float64 (count, D) whose own mean is exactly 0 and whose own covariance is exactly 1."""
    points = np.random.default_rng(seed).standard_normal((count, dimensions))
    left, _, right = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    return left @ right * np.sqrt(count - 1)


# ------------------------------------------------------------------------------------------------------- KID and FID

def expected_kernel(mean_a, std_a, mean_b, std_b):
    """E (a·b / D + 1)³ for independent a ~ N(mean_a, std_a²), b likewise. std_a, std_b: numbers."""
    d, m = len(mean_a), mean_a @ mean_b
    a2, b2, s2, r2 = mean_a @ mean_a, mean_b @ mean_b, std_a**2, std_b**2
    second = m**2 + s2 * b2 + r2 * a2 + d * s2 * r2
    third = m**3 + 3 * m * r2 * a2 + 3 * s2 * m * (b2 + r2 * (d + 2))
    return third / d**3 + 3 * second / d**2 + 3 * m / d + 1


def test_kid_is_the_closed_form_for_gaussians():
    d = 16
    a, b = (np.full(d, 0.5), 1.0), (np.linspace(-0.5, 1, d), 1.5)
    exact = expected_kernel(*a, *a) + expected_kernel(*b, *b) - 2 * expected_kernel(*a, *b)
    value, error = metrics.kid(gaussian(2000, *a, seed=1), gaussian(1500, *b, seed=2))
    assert exact > 20 * error                       # so the test would notice 0 or a wrong factor of 2
    assert value == pytest.approx(exact, abs=4 * error)


def test_kid_does_not_depend_on_how_many_rows_are_in_memory(monkeypatch):
    samples, real = gaussian(53, np.zeros(8), 1, 1), gaussian(40, np.ones(8), 1, 2)
    whole = metrics.kid(samples, real)
    monkeypatch.setattr(metrics, "ROWS", 10)
    assert metrics.kid(samples, real) == pytest.approx(whole, rel=1e-12)


def test_the_error_of_subjects_is_the_deviation_over_other_subjects():
    """The 16 slices of a subject are alike. The error that takes them for independent is too small."""
    rng = np.random.default_rng(0)

    def slices_of_subjects():
        return np.repeat(rng.standard_normal((35, 8)), 16, axis=0) + 0.3 * rng.standard_normal((35 * 16, 8))
    samples, subjects = rng.standard_normal((300, 8)) + 0.5, np.repeat(np.arange(35), 16)
    draws = [slices_of_subjects() for _ in range(40)]
    values = [metrics.kid(samples, real)[0] for real in draws]
    errors = [metrics.kid_subject_error(samples, real, subjects) for real in draws]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)
    assert np.std(values) > 1.4 * metrics.kid(samples, slices_of_subjects())[1]


@pytest.mark.parametrize("count", [5, 9])
def test_the_error_of_a_few_subjects_is_at_most_two_fifths_too_large(count):
    """With an odd number of subjects, fewer are kept than left out."""
    rng = np.random.default_rng(0)
    samples, subjects = rng.standard_normal((60, 8)) + 1, np.repeat(np.arange(count), 4)
    draws = [np.repeat(rng.standard_normal((count, 8)), 4, axis=0) + 0.3 * rng.standard_normal((count * 4, 8))
             for _ in range(200)]
    values = [metrics.kid(samples, real, subsets=2)[0] for real in draws]
    errors = [metrics.kid_subject_error(samples, real, subjects) for real in draws]
    assert 0.9 < np.mean(errors) / np.std(values) < 1.4


def test_three_subjects_have_no_error():
    features = gaussian(12, np.zeros(8), 1, 1)
    assert metrics.kid_subject_error(features, features, np.repeat(np.arange(3), 4)) is None


def kids(mean):
    """The KIDs and their errors of 40 pairs of small sets whose means differ by the given amount."""
    draws = [metrics.kid(gaussian(50, np.full(8, mean), 1, 2 * k), gaussian(70, np.zeros(8), 1, 2 * k + 1))
             for k in range(40)]
    return np.transpose(draws)


def test_kid_is_unbiased_and_its_error_is_honest():
    """For two sets of the same distribution, the biased estimate would be 10 errors above 0."""
    values, errors = kids(0)
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(40)
    assert 0.7 < errors.mean() / values.std() < 2.5  # too large, as at KID 0 the U-statistic is degenerate
    values, errors = kids(1)
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_fid_is_the_closed_form_for_gaussians():
    d = 6
    means, stds = (np.arange(d), np.ones(d) * 2), (np.linspace(0.5, 2, d), np.linspace(2, 1, d))
    a, b = (whitened(500, d, seed) * stds[seed] + means[seed] for seed in (0, 1))
    exact = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
    assert metrics.fid(a, b) == pytest.approx(exact, rel=1e-10)
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))  # full covariances, the same FID
    assert metrics.fid(a @ turn, b @ turn) == pytest.approx(exact, rel=1e-10)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_needs_no_more_images_than_features():
    """With 30 images in 40 dimensions the covariances are singular. All images lie in 6 dimensions."""
    a, b = whitened(30, 6, 0), whitened(30, 6, 1) * 2 + 1
    embed = np.linalg.qr(np.random.default_rng(2).standard_normal((40, 6)))[0].T
    assert metrics.fid(a @ embed, b @ embed) == pytest.approx(6 * 1 + 6 * 1, rel=1e-10)


# ----------------------------------------------------------------------------------------------- precision and recall

def test_precision_recall_density_coverage_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])         # with k = 1 the balls reach 1, 1, 1 and 8
    samples = np.array([[0.5], [1.5], [30.0]])             # reach 1, 1 and 28.5
    assert metrics.precision_recall_density_coverage(samples, real, k=1) == pytest.approx(
        {"precision": 2 / 3, "recall": 4 / 4, "density": (2 + 2 + 0) / 3, "coverage": 3 / 4})


def test_equals_score_high_and_mode_collapse_lowers_recall():
    real, samples = gaussian(500, np.zeros(4), 1, 1), gaussian(500, np.zeros(4), 1, 2)
    equals = metrics.precision_recall_density_coverage(samples, real)
    assert all(value > 0.85 for value in equals.values()) and equals["density"] == pytest.approx(1, abs=0.1)
    collapsed = metrics.precision_recall_density_coverage(gaussian(500, np.full(4, 0.2), 0.1, 3), real)
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.1
    scattered = metrics.precision_recall_density_coverage(gaussian(500, np.zeros(4), 5, 4), real)
    assert scattered["precision"] < 0.2 and scattered["recall"] > 0.9


# ------------------------------------------------------------------------------------------------------------- images

@pytest.mark.parametrize("size, scales", [(8, 1), (32, 2), (64, 3), (128, 4), (256, 5)])
def test_ms_ssim_of_flat_images_is_their_luminance(size, scales):
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    a, b = (np.full((2, size, size, 1), grey, np.uint8) for grey in (100, 150))
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    np.testing.assert_allclose(metrics.ms_ssim(a, b), luminance ** (weights[-1] / weights.sum()), atol=3e-4)
    np.testing.assert_allclose(metrics.ms_ssim(a, a), 1, atol=1e-6)


def test_self_similarity_tells_one_image_from_many(monkeypatch):
    monkeypatch.setattr(metrics, "PAIRS", 100)
    heads = make_heads(40, seed=0)
    assert metrics.self_similarity(heads[:1].repeat(40, axis=0)) == pytest.approx(1, abs=1e-5)
    assert metrics.self_similarity(heads) < 0.9
    of_two = metrics.ms_ssim(heads[:1], heads[1:2])[0]     # which shows that no image is paired with itself
    assert metrics.self_similarity(heads[:2]) == pytest.approx(of_two, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 1)).astype(np.uint8)
    assert metrics.self_similarity(noise) < 0.05


def test_spectrum_of_noise_is_flat_and_of_a_wave_a_peak():
    noise = np.rint(np.random.default_rng(0).normal(128, 20, (200, 64, 64, 1))).astype(np.uint8)
    spectrum = metrics.radial_spectrum(noise)
    assert spectrum.shape == (33,)
    np.testing.assert_allclose(spectrum[1:], 20**2 + 1 / 12, rtol=0.1)      # 1/12 is from rounding
    wave = 128 + 100 * np.cos(2 * np.pi * 5 * np.arange(64) / 64)
    wave = np.broadcast_to(np.rint(wave).astype(np.uint8)[None, :, None, None], (1, 64, 64, 1))
    assert metrics.radial_spectrum(wave)[1:].argmax() + 1 == 5


def test_distances_of_spectra_and_histograms_have_their_units():
    heads = make_heads(20, seed=1) // 2
    a, b = (metrics.radial_spectrum(images) for images in (heads, heads * 2))
    assert metrics.spectrum_distance(a, b) == pytest.approx(20 * np.log10(2))   # twice the amplitude: 6.02 dB
    assert metrics.spectrum_distance(a, a) == 0
    a, b = (metrics.histogram(images) for images in (heads, heads + 7))
    assert a.sum() == pytest.approx(1)
    assert metrics.histogram_distance(a, b) == pytest.approx(7)
    assert metrics.histogram_distance(a, a) == 0


@pytest.mark.parametrize("size, block", [(64, 2), (128, 2), (256, 4)])
def test_seams_compares_steps_across_borders_with_those_inside(size, block):
    inside, across = 3, 4
    up_and_down = (-1) ** np.arange(size - 1)               # alternating signs avoid an overflow
    steps = np.where(np.arange(1, size) % block == 0, across, inside) * up_and_down
    ramp = 100 + np.append(0, np.cumsum(steps))
    columns = np.broadcast_to(ramp[None, None, :, None], (3, size, size, 1)).astype(np.uint8)
    rows_and_columns = np.concatenate([columns, columns.transpose(0, 2, 1, 3)])
    assert metrics.seams(rows_and_columns) == pytest.approx(across / inside)
    assert metrics.seams(np.roll(rows_and_columns, 1, axis=(1, 2))) < 1.01     # not at borders of blocks


def test_noise_has_no_seams_and_blocks_have_nothing_else():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 1)).astype(np.uint8)
    assert metrics.seams(noise) == pytest.approx(1, abs=0.01)
    assert metrics.seams(np.zeros_like(noise)) == 1
    of_single_pixels = add_checkerboard(make_heads(5, seed=0))
    assert metrics.seams(of_single_pixels) == pytest.approx(1, abs=0.05)
    assert metrics.seams(noise[:, :32, :32].repeat(2, axis=1).repeat(2, axis=2) // 2 + noise // 2) > 1.2


# ------------------------------------------------------------------------------------------------- what they must see

def blur(images):
    neighbours = [np.roll(images.astype(float), shift, axis=axis) for shift in (-1, 1) for axis in (1, 2)]
    return np.rint((images + sum(neighbours)) / 5).astype(np.uint8)


def add_noise(images):
    return np.clip(images + np.random.default_rng(0).normal(0, 15, images.shape), 0, 255).astype(np.uint8)


def add_checkerboard(images):
    board = 8.0 * (-1) ** np.indices(images.shape[1:3]).sum(axis=0)[:, :, None]
    return np.clip(images + board, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def heads():
    """Return {name: (images, features)}: heads, other heads of the same kind, and these with three kinds of damage."""
    real, floor = make_heads(50, seed=0), make_heads(50, seed=1)
    images = {"real": real, "floor": floor, "blur": blur(floor), "noise": add_noise(floor),
              "checkerboard": add_checkerboard(floor)}
    extractor = features.load_features("efficientnet")
    return {name: (x, features.extract(extractor, x)) for name, x in images.items()}


@pytest.mark.parametrize("damage", ["blur", "noise", "checkerboard"])
def test_kid_and_fid_see_the_damage(heads, damage):
    real, floor, damaged = (heads[name][1] for name in ("real", "floor", damage))
    value, error = metrics.kid(floor, real)
    assert abs(value) < 4 * error                   # heads of the same kind
    assert metrics.kid(damaged, real)[0] > value + 10 * error
    assert metrics.fid(damaged, real) > 2 * metrics.fid(floor, real)


def test_numbers_are_the_same_on_every_stack(heads):
    assert metrics.compare(*heads["blur"], *heads["real"]) == pytest.approx({
        "kid": 0.16259799, "kid_error": 0.01483393, "fid": 93.66088209, "precision": 0.04, "recall": 0.08,
        "density": 0.008, "coverage": 0.04, "spectrum": 9.39594162, "histogram": 5.84006348, "count": 50,
        "ms_ssim": 0.59913761, "seams": 1.02492859, "grey": 46.07553223, "grey_spread": 6.03560668}, rel=1e-6, abs=1e-6)


def test_a_model_that_makes_black_images_gets_numbers_too(heads):
    black, real = np.zeros((30, 64, 64, 1), np.uint8), heads["real"]
    values = metrics.compare(black, np.zeros((30, 1280)), *real)
    assert all(np.isfinite(value) for value in values.values()) and values["ms_ssim"] == pytest.approx(1)
    assert np.isfinite(metrics.memorization(black, real[0], make_heads(60, seed=2))["copies"])


# -------------------------------------------------------------------------------------------------------- memorization

def copies_among(images):
    """The result of memorization() for images(training, others), where others are heads outside of the training set."""
    training, real, others = make_heads(300, seed=0), make_heads(200, seed=1), make_heads(200, seed=2)
    return metrics.memorization(images(training, others), real, training)


def test_copies_of_training_slices_are_caught():
    assert copies_among(lambda training, others: others)["copies"] < 0.1
    assert copies_among(lambda training, others: add_noise(training[50:150]))["copies"] == 1
    found = copies_among(lambda training, others: np.concatenate([others[:100], add_noise(training[50:150])]))
    assert found["copies"] == pytest.approx(0.5, abs=0.06)
    assert all(row - 100 == training_row - 50 for row, training_row, *_ in found["pairs"])


def test_blurred_images_are_not_accused():
    assert copies_among(lambda training, others: blur(blur(others)))["copies"] < 0.1


def test_the_nearest_slice_is_compared_with_all_that_are_near():
    training = flat_images(0, 50, 200)
    distances, rows = metrics.nearest_neighbours(flat_images(60), training)
    np.testing.assert_array_equal(rows, [[1, 0, 2]])
    np.testing.assert_allclose(distances, [[10, 60, 140]], rtol=1e-6)
    found = metrics.memorization(flat_images(110, 60, 49), flat_images(40, 70, 130), training)
    assert found["pairs"] == [(2, 1, pytest.approx(1), pytest.approx(1 / (201 / 3))),
                              (1, 1, pytest.approx(10), pytest.approx(10 / 70)),
                              (0, 1, pytest.approx(60), pytest.approx(60 / (260 / 3)))]
    assert found["median_distance"] == pytest.approx(10) and found["median_distance_of_real"] == pytest.approx(20)
    assert found["copies_by_chance"] == pytest.approx((0.01 * 2 + 1) / 4)
    assert found["copies"] == pytest.approx(2 / 3)      # the ratios of the real images are 0.14, 0.27 and 0.75
