"""The flags of the scripts: defaults, recipes, and what they refuse."""
import sys

import numpy as np
import pytest

import evaluate
import predict
import train
from helpers import ROOT, SAMPLE, run_in_new_process
from oasis.files import OasisError
from oasis.modelfile import read_model
from oasis.settings import flag_name, make_parser
from tools import make_flags

# ---------------------------------------------------------------------------------------------- defaults and recipes

def test_the_defaults_are_those_of_the_original():
    flags = train.parse_flags([])
    assert (flags.path, flags.ckpt_path) == ("./dataset/keras_png_slices_data.zip", "./checkpoint")
    assert (flags.number_of_samples, flags.image_size) == (2000, 128)
    assert (flags.epochs, flags.batch_size, flags.learning_rate) == (30, 16, 1e-4)


def test_a_given_flag_wins_over_recipe_and_demo():
    size = ["--recipe", "recommended", "--image-size", "256"]
    assert train.parse_flags(size).patch_size == 4
    assert train.parse_flags([*size, "--patch-size", "2"]).patch_size == 2
    recommended = train.parse_flags(["--recipe", "recommended"])
    assert (recommended.objective, recommended.times, recommended.flips) == ("x_start", "lognormal", "auto")
    assert train.parse_flags(["--recipe", "recommended", "--objective", "v"]).objective == "v"
    assert train.parse_flags(["--recipe", "recommended", "--flips", "0"]).flips == 0
    demo = train.parse_flags(["--demo", "--dim", "48"])
    assert demo.dim == 48 and demo.objective == "x_start" and demo.path.endswith("sample_slices.zip")


@pytest.mark.parametrize("size, patch", [(32, 1), (64, 1), (128, 2), (192, 3), (256, 4), (200, 1), (208, 2), (248, 1)])
def test_the_recommended_patches_fit_the_image(size, patch):
    flags = train.parse_flags(["--recipe", "recommended", "--image-size", str(size)])
    assert flags.patch_size == patch and size % (8 * patch) == 0


@pytest.mark.parametrize("more, words", [([], "turns patches of 2×2 pixels into channels: about 1/4"),
                                         (["--patch-size", "2"], "")])
def test_the_original_says_what_recommended_would_save(tiny, capsys, more, words):
    train.main([*tiny, "--image-size", "128", "--max-steps", "1", *more])
    out = capsys.readouterr().out
    assert words in out and ("--recipe recommended" in out) == bool(words)


@pytest.mark.parametrize("oasis, flags, expected", [
    (True, [], (0.5, 1)), (True, ["--flips", "0"], (0, 1)), (False, [], (0, 2)), (False, ["--flips", "0.3"], (0.3, 2))])
def test_the_recommended_recipe_mirrors_oasis_slices_only(quick, tmp_path, monkeypatch, oasis, flags, expected):
    """OASIS slices are mirrored top to bottom, since the head lies on its side; own images only with --flips."""
    seen, preparation = [], train.Preparation
    monkeypatch.setattr(train, "Preparation", lambda *args: seen.append(args[3:]) or preparation(*args))
    if not oasis:
        np.save(tmp_path / "images.npy", np.arange(20 * 16 * 16, dtype=np.uint32).reshape(20, 16, 16).astype(np.uint8))
        flags = [*flags, "--path", str(tmp_path / "images.npy")]
    settings = read_model(quick("--recipe", "recommended", "--max-steps", "1", *flags) / "model.safetensors")[1]
    assert seen == [expected]
    assert settings["flips"] == expected[0]
    assert settings["data"] == ("24 slices of 6 subjects" if oasis else "18 images of 18 subjects")


def test_the_page_of_flags_is_that_of_todays_settings():
    assert make_flags.PAGE.read_text(encoding="utf-8") == make_flags.page(), "run python tools/make_flags.py"


# ---------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("flag, value", [
    ("--learning-rate", "0"), ("--ema-decay", "1.5"), ("--batchsize", "4"), ("--dim", "8")])
def test_a_flag_out_of_range_is_refused_by_name(flag, value):
    with pytest.raises(OasisError, match=flag):
        train.parse_flags([flag, value])


NONSENSE = ["", "x", "nan", "-nan", "1,5", "0x10"]
NO_INTEGERS = [*NONSENSE, "1.5", "1e3", "inf", str(2**63), str(-2**63 - 1), str(10**30)]
NO_NUMBERS = [*NONSENSE, "inf", "-inf", "-1", "1e999"]
AT_LEAST_ONE = ("epochs", "batch_size", "image_size", "timesteps", "dim", "patch_size", "accumulate",
                "number_of_images")


def bad_values(setting):
    """Texts that are no value of a setting."""
    if isinstance(setting.kind, tuple):
        return ["", "x", setting.default.upper() + " "]
    if setting.name == "eta":  # a number or auto
        return [*NO_NUMBERS, "AUTO", "automatic"]
    bad = {bool: ["1"], int: NO_INTEGERS, float: NO_NUMBERS}.get(type(setting.default), [])
    more = ["-1"] if type(setting.default) is int and setting.name != "seed" else []
    return [*bad, *more, *(["0"] if setting.name in AT_LEAST_ONE else [])]


@pytest.mark.parametrize("script", [train, predict, evaluate], ids=lambda script: script.__name__)
def test_every_flag_refuses_nonsense_by_name(script):
    parser = make_parser(script.__doc__, script.SETTINGS)
    tried = 0
    for name, setting in script.SETTINGS.items():
        for text in bad_values(setting):
            with pytest.raises(OasisError, match=flag_name(name)):
                print("accepted:", parser.parse_args([f"{flag_name(name)}={text}"]))
            tried += 1
    assert tried > 50


@pytest.mark.parametrize("arguments, words", [
    (["--image-size", "100"], "96 and 104"),
    (["--image-size", "129", "--patch-size", "4"], "128 and 160"),
    (["--pixel-width", "12"], "--pixel-width 12 is not a multiple of 8, the number of groups in GroupNorm"),
    (["--dim", "20"], "--dim 20 is not a multiple of 8, the number of groups in GroupNorm"),
])
def test_a_size_that_does_not_fit_is_refused_before_a_run_is_made(tmp_path, arguments, words):
    with pytest.raises(OasisError, match=words):
        train.main([*arguments, "--path", str(SAMPLE), "--ckpt-path", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--path", "nowhere.zip", "--ckpt-path", str(tmp_path)]
    result = run_in_new_process(command, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert "nowhere.zip" in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
