"""oasis/recipes.py: what a recipe sets, and recipes that train in phases."""
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from helpers import same_state
from modules import UNet
from oasis import recipes
from oasis.files import OasisError
from oasis.modelfile import read_model
from oasis.parameters import named_variables

CONDITION = "slice,neighbour,mirror"
PHASES = [dict(recipes.RECOMMENDED, image_size=8, max_steps=4, learning_rate=1e-2, condition=CONDITION),
          dict(recipes.RECOMMENDED, image_size=16, max_steps=5, condition=CONDITION, loss_weight="learned")]


pytestmark = pytest.mark.usefixtures("shared_trainers")


@pytest.fixture
def flags(unet, fast_loop, monkeypatch):
    """The flags of a run of a recipe with PHASES, without those flags of the fixture that the phases set."""
    monkeypatch.setitem(recipes.RECIPES, "oasis64", PHASES)
    i = unet.index("--image-size")
    return [*unet[:i], *unet[i + 2:], "--recipe", "oasis64"]


def test_the_settings_of_a_phase_are_those_in_its_row(flags):
    """Flags on the command line hold in all phases."""
    first, last = train.parse_phases([*flags, "--seed", "3"])
    assert (first.image_size, first.max_steps, first.learning_rate, first.seed) == (8, 4, 1e-2, 3)
    assert (last.image_size, last.max_steps, last.learning_rate, last.seed) == (16, 5, 1e-4, 3)


def test_phases_of_the_same_size_draw_other_noise_with_any_seed():
    for given in [], ["--seed", "3"]:
        phases = train.parse_phases(["--recipe", "oasis256", *given])
        drawn = [(phase.image_size, phase.seed) for phase in phases]
        assert len(set(drawn)) == len(drawn) and phases[0].seed == int(given[-1] if given else 0)


@pytest.mark.parametrize("given, expected", [
    (["--max-steps", "3"], [(4, 30), (3, 30)]), (["--epochs", "3"], [(4, 30), (0, 3)]),
    (["--epochs", "3", "--max-steps", "9"], [(4, 30), (9, 3)])])
def test_the_length_that_is_given_is_that_of_the_last_phase(flags, given, expected):
    assert [(phase.max_steps, phase.epochs) for phase in train.parse_phases([*flags, *given])] == expected


def test_epochs_that_are_given_take_the_place_of_the_steps_of_a_recipe():
    assert train.parse_flags(["--demo", "--epochs", "3"]).max_steps == 0
    both = train.parse_flags(["--demo", "--epochs", "3", "--max-steps", "7"])
    assert (both.epochs, both.max_steps) == (3, 7) and train.parse_flags(["--demo"]).max_steps == 900


def test_the_initial_model_of_the_first_phase_is_looked_up_among_the_runs(flags, tmp_path, monkeypatch):
    def find(model, folder):
        raise OasisError(f"{model} in {folder}")
    monkeypatch.setattr(train, "find_model", find)
    with pytest.raises(OasisError, match=f"^start in {tmp_path / 'runs'}$"):
        train.main([*flags, "--initial-model", "start", "--ckpt-path", str(tmp_path / "runs")])


def test_a_later_phase_can_be_the_first(flags, tmp_path):
    """It starts from --initial-model, and its run has the name that it has among all phases."""
    train.main([*flags, "--ckpt-path", str(tmp_path / "whole")])
    model = tmp_path / "whole" / "oasis64-phase1" / "oasis8" / "model.safetensors"
    train.main([*flags, "--ckpt-path", str(tmp_path / "part"), "--first-phase", "2", "--initial-model", str(model)])
    same_state(tmp_path / "whole" / "oasis16", tmp_path / "part" / "oasis16")
    assert not (tmp_path / "part" / "oasis64-phase1").exists()


@pytest.mark.parametrize("more, message", [
    (["--first-phase", "2"], "--first-phase needs --initial-model"),
    (["--first-phase", "3", "--initial-model", "oasis64"], "--recipe oasis64 has no such phase, only 2")])
def test_a_first_phase_that_cannot_start_is_refused(flags, more, message):
    with pytest.raises(OasisError, match=message):
        train.parse_phases([*flags, *more])


def test_restart_discards_the_runs_of_all_phases_at_once(flags, tmp_path, monkeypatch, capsys):
    """If a restarted recipe is interrupted in its first phase, the last phase is trained anew from it afterwards."""
    flags = [*flags, "--ckpt-path", str(tmp_path)]
    train.main(flags)
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_phase", lambda *_: 143)
        assert train.main([*flags, "--seed", "1", "--restart"]) == 143
    assert (tmp_path / "oasis16.old-1" / "model.safetensors").exists()
    assert not (tmp_path / "oasis16" / "model.safetensors").exists()


@pytest.mark.parametrize("more, message", [(["--learning-rate", "0.5"], "oasis16 was started with --learning-rate"),
                                           (["--accumulate", "8"], "must be a multiple of 8")])
def test_a_phase_that_cannot_train_is_refused_before_the_first_one(flags, tmp_path, monkeypatch, more, message):
    monkeypatch.setitem(recipes.RECIPES, "oasis64", [PHASES[0], dict(PHASES[1], batch_size=4)])
    i = flags.index("--batch-size")
    flags = [*flags[:i], *flags[i + 2:], "--ckpt-path", str(tmp_path)]
    train.main([*flags, "--max-steps", "1"])
    shutil.rmtree(tmp_path / "oasis64-phase1")
    with pytest.raises(OasisError, match=message):
        train.main([*flags, *more])
    assert not (tmp_path / "oasis64-phase1").exists()


def test_the_image_size_of_phases_cannot_be_changed(flags):
    with pytest.raises(OasisError, match="--recipe oasis64 has an image size for each phase"):
        train.parse_phases([*flags, "--image-size", "16"])


def test_a_recipe_starts_each_phase_from_the_one_before_and_goes_on_bit_for_bit(flags, tmp_path, monkeypatch):
    """It is interrupted in the middle of the first or of the last phase. The condition, mirrored images and learned
    loss weights resume exactly too, and the embeddings are trained."""
    starts, start_from_model = [], train.start_from_model
    monkeypatch.setattr(train, "start_from_model", lambda network, path, *others: (
        starts.append(read_model(path)[1]["step"]) or start_from_model(network, path, *others)))
    train.main([*flags, "--ckpt-path", str(tmp_path / "whole")])
    models = {path.parent.relative_to(tmp_path).as_posix(): read_model(path)
              for path in tmp_path.rglob("model.safetensors")}
    assert {name: settings["step"] for name, (_, settings) in models.items()} == {
        "whole/oasis64-phase1/oasis8": 4, "whole/oasis16": 5} and starts == [4]
    parameters, settings = models["whole/oasis16"]
    assert settings["images"] == (4 + 5) * settings["batch_size"]
    assert (settings["condition"], settings["indices"], settings["slice_step"]) == (CONDITION, [0, 1, 2, 3], 1)
    for name, variable in named_variables(UNet(16, dim=16, dim_mults=(1,), condition=CONDITION)):
        if name.startswith("condition_embeddings") and name.endswith("kernel"):
            assert np.any(parameters[name] != variable.numpy()), name
    for stops in (2, 5), (4, 3):
        parts = tmp_path / f"stopped at {stops}"
        phases = train.parse_phases([*flags, "--ckpt-path", str(parts)])
        for phase, stop in zip(phases, stops):
            phase.max_steps = stop
        train.train(phases[:1] if stops[0] < 4 else phases)
        train.main([*flags, "--ckpt-path", str(parts)])
        for run in "oasis64-phase1/oasis8", "oasis16":
            same_state(tmp_path / "whole" / run, parts / run)


def test_the_recipes_of_the_smaller_models_are_the_first_phases_of_the_largest():
    whole = recipes.RECIPES["oasis256"]
    assert [recipes.RECIPES[f"oasis{size}"] for size in (64, 128)] == [whole[:1], whole[:3]]


def test_the_recipe_of_the_largest_model_runs_all_of_its_phases(unet, fast_loop, tmp_path, monkeypatch):
    """The phases have 1/1000 of their steps, smaller images and batches and a smaller network."""
    small = [dict(phase, max_steps=phase["max_steps"] // 1000, image_size=phase["image_size"] // 8, batch_size=4,
                  dim=16, save_every=2) for phase in recipes.RECIPES["oasis256"]]
    monkeypatch.setitem(recipes.RECIPES, "oasis256", small)
    train.main([*unet[:4], "--precision", "float32", "--recipe", "oasis256"])
    folders = [*(f"oasis256-phase{i}" for i in range(1, len(small))), ""]
    for folder, phase in zip(folders, small):
        run = tmp_path / "checkpoint" / folder / f"oasis{phase['image_size']}"
        settings = read_model(run / "model.safetensors")[1]
        assert settings["step"] == phase["max_steps"]
        asked = {key: value for key, value in phase.items() if key in settings and key != "flips"}
        assert {key: settings[key] for key in asked} == asked


def test_restart_never_takes_another_initial_model_of_the_same_name(tmp_path, monkeypatch):
    """--restart renames the run oasis128, and the bundled model has this name, too."""
    own, taken = tmp_path / "oasis128" / "model.safetensors", []
    own.parent.mkdir()
    own.write_text("own")
    monkeypatch.setattr(train, "train_phase", lambda flags, *_: taken.append(Path(flags.initial_model)))
    train.main(["--recipe", "oasis128", "--first-phase", "2", "--initial-model", "oasis128", "--restart",
                "--ckpt-path", str(tmp_path)])
    assert taken[0] == tmp_path / "oasis128.old-1" / "model.safetensors" and taken[0].read_text() == "own"
