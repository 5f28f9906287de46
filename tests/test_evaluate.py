"""evaluate.py as a whole: what it writes, what it refuses, and which generated images it may use again."""
import functools
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import evaluate
import modules
from dataset import load_slices
from helpers import flat_images, imports_of, make_heads, png, write_image
from oasis import features, modelfile
from oasis.files import OasisError, image_grid

pytest.importorskip(features.PARAMETERS_PACKAGE, reason="pip install -r requirements-evaluate.txt")
pytest.importorskip("sklearn", reason="pip install -r requirements-evaluate.txt")


load_features = functools.cache(features.load_features)


def write_zip(path, train, validate):
    """A zip in the layout of OASIS; train and validate are {subject: images}."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, subjects in {"train": train, "validate": validate}.items():
            for subject, images in subjects.items():
                for number, image in enumerate(images):
                    name = f"keras_png_slices_{split}/case_{subject:03d}_slice_{number}.nii.png"
                    archive.writestr(name, png(image[:, :, 0]))
    return path


@pytest.fixture
def small_features(monkeypatch):
    """Images of 4×4 pixels instead of the features of a classifier."""
    monkeypatch.setattr(features, "extract", lambda extractor, images, label="": (
        features.resize(images, 4).reshape(len(images), -1).astype(float)))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder: slices.zip (20 + 10 subjects of 3 slices), samples.npy (25 others), no bundled model."""
    heads = make_heads(90, seed=3).reshape(30, 3, 64, 64, 1)
    write_zip(tmp_path / "slices.zip", dict(enumerate(heads[:20])), dict(enumerate(heads[20:], 20)))
    np.save(tmp_path / "samples.npy", make_heads(25, seed=4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modelfile, "BUNDLED", tmp_path)
    monkeypatch.setattr(features, "load_features", load_features)
    return tmp_path


def run(*flags):
    evaluate.main(["--path", "slices.zip", "--output", "out", *map(str, flags)])
    return json.loads(Path("out/evaluation.json").read_text())


def test_existing_images_are_judged(work, capsys):
    report = run("--samples", "samples.npy")
    shown, errors = capsys.readouterr()
    assert "warning" not in errors
    assert report["features"] == "EfficientNet-Lite0@224" and report["features"] in shown
    assert {name: row["count"] for name, row in report["metrics"].items()} == {"samples": 25, "floor": 25, "real": 30}
    assert set(report["metrics"]["samples"]) == set(report["metrics"]["floor"]) > {"kid", "fid", "recall", "ms_ssim"}
    for name in ("evaluation.json", "evaluation.png"):
        assert str(work / "out" / name) in shown
    assert "forbids publishing" in shown
    subject_error = 1000 * report["metrics"]["samples"]["kid_subject_error"]
    assert subject_error > 0 and f"KID × 1000 would differ by about {subject_error:.1f}." in shown
    with Image.open("out/evaluation.png") as page:
        assert min(page.size) > 1000


def test_a_report_that_is_replaced_is_a_warning(work, small_features, capsys):
    Path("out").mkdir()
    Path("out/evaluation.json").write_text("{}")
    run("--samples", "samples.npy")
    assert "evaluation.json is replaced. Give another --output" in capsys.readouterr().err


def test_the_figure_shows_suspicious_images_above_their_training_images():
    samples, training = (np.random.default_rng(seed).integers(0, 256, (9, 8, 8, 1), np.uint8) for seed in (0, 1))
    page = evaluate.figure(samples, samples, training, [(4, 7, 1.0, 0.1), (2, 0, 2.0, 0.2)], "title")
    shown, = (axes.images[0].get_array() for axes in page.axes if axes.get_label() == "pairs")
    np.testing.assert_array_equal(shown, image_grid(np.stack([samples[4], samples[2], training[7], training[0]]), 2))


def test_a_copy_may_be_mirrored_left_for_right(work, small_features):
    """OASIS heads lie on their side: left and right are rows."""
    copied = load_slices("slices.zip", "train", 64)[::2]
    np.save("samples.npy", np.concatenate([copied[::2], copied[1::2, ::-1]]))
    assert run("--samples", "samples.npy")["memorization"]["copies"] == 1
    np.save("samples.npy", copied[:, :, ::-1])
    assert run("--samples", "samples.npy")["memorization"]["copies"] < 0.9


def test_own_images_are_judged_as_slices_are(work, small_features, capsys):
    """A copy may be mirrored as --flips mirrors these images: left to right, not top to bottom."""
    heads = make_heads(240, seed=3)
    for k, head in enumerate(heads):
        write_image(work / "own" / f"patient{k // 3:02}_{k % 3}.png", head[:, :, 0])
    copied = load_slices("own", "train", 64)[::2]
    for turned, known in (copied[:, :, ::-1], True), (copied[:, ::-1], False):
        np.save("samples.npy", turned)
        report = run("--samples", "samples.npy", "--path", "own")
        assert {name: row["count"] for name, row in report["metrics"].items()} == {
            "samples": 108, "floor": 108, "real": 24}
        assert all((distance == 0) == known for _, _, distance, _ in report["memorization"]["pairs"])
    shown = capsys.readouterr().out
    assert "240 images of 80 subjects" in shown and "against 24 images of 8 subjects (validate)" in shown


def test_other_slices_than_those_of_the_training_are_a_warning(capsys):
    reading = {"slices": "", "axis": "axial", "skip_unreadable": False}
    for settings, words in [({}, ""), ({"slices": "", "axis": "axial"}, ""),
                            ({"slices": "1:9", "axis": "coronal"}, "trained with --slices 1:9 --axis coronal: give")]:
        evaluate.check_reading(reading, settings)
        warning = capsys.readouterr().err
        assert words in warning and bool(words) == bool(warning)


def test_a_folder_of_pngs_is_loaded_like_the_same_npy(work):
    (work / "pngs").mkdir()
    for k, image in enumerate(np.load("samples.npy")):
        Image.fromarray(image[:, :, 0]).save(f"pngs/{k:03d}.png")
    np.testing.assert_array_equal(evaluate.load_samples("pngs", 1000), np.load("samples.npy"))
    np.testing.assert_array_equal(evaluate.load_samples("pngs", 7), evaluate.load_samples("samples.npy", 7))


def test_a_subject_in_both_sets_is_an_error(work):
    heads = make_heads(60, seed=5).reshape(-1, 3, 64, 64, 1)
    write_zip(work / "slices.zip", {k: heads[k] for k in range(10)}, {k: heads[k] for k in range(9, 19)})
    with pytest.raises(OasisError, match=r"\(9\)"):
        run("--samples", "samples.npy")


def test_folders_of_classes_in_both_splits_are_a_warning(work, small_features, capsys):
    for k, head in enumerate(make_heads(60, seed=5)):
        write_image(work / "own" / ("train", "val")[k % 2] / str(k % 3) / f"{k}.png", head[:, :, 0])
    assert run("--samples", "samples.npy", "--path", "own")["metrics"]["samples"]["kid_subject_error"] is None
    shown = capsys.readouterr()
    assert "3 of the subjects to compare with are also in the training split (0, 1, 2)" in shown.err
    assert "KID × 1000 may differ much: few subjects" in shown.out


@pytest.mark.parametrize("flags, message", [
    ([], "checkpoint: no trained model there"),
    (["--model", "m", "--samples", "s"], "give only one of the two"),
    (["--samples", "samples.npy", "--guidance", "2"], "--guidance is for generating images"),
    (["--samples", "missing.npy"], "missing.npy: No such file"),
    (["--samples", "float.npy"], r"float.npy: holds float64 \(25, 64, 64, 1\)"),
    (["--samples", "slices.zip"], "slices.zip: .*Name an .npy"),
    (["--samples", "few.npy"], "5 images are too few"),
    (["--sampler", "ddpm", "--eta", "1"], "--eta is for --sampler ddim and dpm"),
    (["--samples", "empty"], "empty: holds no .png"),
    (["--samples", "colour"], "a.png: is 8-bit RGB"),
    (["--samples", "sizes"], "b.png: has 32 pixels a side, but the first image has 64"),
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


# --------------------------------------------------------------------------------------------------------- generation

def test_too_few_real_images_are_refused_before_images_are_generated(work, monkeypatch):
    heads = make_heads(60, seed=5).reshape(-1, 3, 64, 64, 1)
    write_zip(work / "slices.zip", {k: heads[k] for k in range(10)}, {k: heads[k] for k in range(10, 12)})
    monkeypatch.setattr(evaluate, "get_samples", None)
    with pytest.raises(OasisError, match="6 images of validate are too few"):
        run()


def test_a_model_is_judged(work, capsys):
    settings = dict(timesteps=10, objective="noise", schedule="linear")
    network = modules.UNet(16, dim=16, dim_mults=(1, 2))
    modules.save_model(work / "run" / "model.safetensors", network, {**network.settings, **settings})
    report = run("--model", "run", "--steps", 2, "--number-of-images", 20, "--batch-size", 10)
    assert report["image_size"] == 16 and report["metrics"]["samples"]["count"] == 20
    assert report["origin"]["sampler"] == "dpm" and report["origin"]["steps"] == 2
    assert re.search(r"\| +dpm 2 \|", capsys.readouterr().out)


@pytest.fixture
def model(work, monkeypatch):
    """A model file whose images are constant, with the seed as grey level. model.made lists all generated seeds."""
    class Model:
        file, made, patience = work / "model.safetensors", [], 10**9

    def generate(networks, diffusion, seeds, batch_size, indices, sampler, steps, eta, noise_scale, guidance):
        assert not indices and guidance == 1 and seeds and list(networks.values()) == [Model.file.read_bytes()]
        for start in range(0, len(seeds), batch_size):
            batch = list(seeds[start:start + batch_size])
            if len(Model.made) + len(batch) > Model.patience:
                raise KeyboardInterrupt
            Model.made.extend(batch)
            yield batch, flat_images(*batch), None

    Model.file.write_bytes(b"parameters")
    diffusion = modules.GaussianDiffusion()
    monkeypatch.setattr(modules, "load_model",
                        lambda file, precision: (file.read_bytes(), diffusion, {"condition": ""}))
    monkeypatch.setattr(evaluate, "named_variables", lambda content: [("w", tf.constant(list(content)))])
    monkeypatch.setattr(evaluate, "generate", generate)
    return Model


def generate_samples(model, *flags):
    flags = ["--number-of-images", "20", "--batch-size", "8", "--output", "out", *map(str, flags)]
    return evaluate.generate_samples(model.file, evaluate.parse_flags(flags), ["CPU:0"])


def greys(model, *flags):
    return list(generate_samples(model, *flags)[0][:, 0, 0, 0])


def test_generation_goes_on_where_it_was_stopped(model):
    model.patience = 17
    with pytest.raises(KeyboardInterrupt):
        greys(model)
    assert model.made == list(range(16))
    model.patience = 10**9
    assert greys(model, "--batch-size", 3) == list(range(20))
    assert model.made == list(range(20))                    # no seed twice, for any batch size
    assert greys(model, "--number-of-images", 30) == list(range(30)) and model.made == list(range(30))
    assert greys(model, "--number-of-images", 20) == list(range(20)) and model.made == list(range(30))


@pytest.mark.parametrize("change", [["--sampler", "ddim"], ["--steps", 10], ["--eta", 0.5], ["--noise-scale", 1.5],
                                    ["--seed", 100], ["--precision", "float16"]])
def test_images_of_other_settings_are_never_reused(model, change):
    greys(model)
    model.made.clear()
    first = 100 if "--seed" in change else 0
    assert greys(model, *change) == list(range(first, first + 20)) == model.made
    assert greys(model) == list(range(20)) and len(model.made) == 20       # the first images are used again


def test_images_of_another_model_are_never_used(model):
    greys(model)
    model.file.write_bytes(b"other parameters")
    model.made.clear()
    assert greys(model) == model.made == list(range(20))


def test_explicit_default_values_reuse_the_images(model):
    greys(model)
    model.made.clear()
    greys(model, "--steps", 20, "--eta", 1, "--noise-scale", 1)
    assert not model.made


# ------------------------------------------------------------------------------------- the code that makes the images

def test_images_made_by_other_code_are_never_used(model, monkeypatch):
    origin, digests = generate_samples(model)[2], evaluate.code_digests
    assert list(origin["code"]) == sorted(evaluate.CODE)
    model.made.clear()
    greys(model)
    assert not model.made
    changed = {evaluate.CODE[0]: "of another content"}
    monkeypatch.setattr(evaluate, "code_digests", lambda *files: {**digests(*files), **changed})
    assert greys(model) == model.made == list(range(20))


# Generation imports these, but images depend on them only through other parts of the key.
NO_IMAGE_DEPENDS_ON = {"oasis/files.py": "errors, checks and files that are written",
                       **{f"oasis/{name}.py": "the key holds the parameters and settings that were read"
                          for name in ("modelfile", "modelbytes")},
                       "oasis/progress.py": "what is shown meanwhile", "oasis/signals.py": "what Ctrl-C does",
                       "oasis/settings.py": "the flags themselves",
                       **{f"oasis/{name}.py": "the training data"
                          for name in ("sources", "archives", "pixels", "subjects")}}


def test_the_key_holds_all_code_that_images_depend_on():
    """The code is oasis/generate.py, modules.py and all of their imports."""
    found, new = set(), {"oasis/generate.py", "modules.py"}
    while new:
        found |= new
        new = {file for path in new for file in imports_of(path)} - found
    assert found == {*evaluate.CODE, *NO_IMAGE_DEPENDS_ON}
    assert not set(evaluate.CODE) & set(NO_IMAGE_DEPENDS_ON)
