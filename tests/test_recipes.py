"""oasis/recipes.py: what a recipe sets, and recipes that train in phases."""
import pytest

import train
from helpers import same_state
from oasis import recipes
from oasis.files import OasisError
from oasis.modelfile import read_model

PHASES = [dict(recipes.RECOMMENDED, image_size=8, max_steps=4, learning_rate=1e-2),
          dict(recipes.RECOMMENDED, image_size=16, max_steps=5, loss_weight="learned")]


@pytest.fixture
def flags(unet, monkeypatch):
    """The flags of a run of a recipe with PHASES, without those flags of the fixture that the phases set."""
    monkeypatch.setitem(recipes.RECIPES, "oasis64", PHASES)
    i = unet.index("--image-size")
    return [*unet[:i], *unet[i + 2:], "--recipe", "oasis64"]


def test_each_phase_starts_from_the_ema_of_the_one_before(flags, tmp_path, monkeypatch):
    """The settings of a phase are those in its row of PHASES. Flags on the command line hold in all phases."""
    first, last = train.parse_phases([*flags, "--seed", "3"])
    assert (first.image_size, first.max_steps, first.learning_rate, first.seed) == (8, 4, 1e-2, 3)
    assert (last.image_size, last.max_steps, last.learning_rate, last.seed) == (16, 5, 1e-4, 3)
    starts = []
    start_from_model = train.start_from_model
    monkeypatch.setattr(train, "start_from_model", lambda network, path, *others: (
        starts.append(read_model(path)[1]["step"]) or start_from_model(network, path, *others)))
    train.main(flags)
    folder = tmp_path / "checkpoint"
    steps = {path.relative_to(folder).parent.as_posix(): read_model(path)[1]["step"]
             for path in folder.rglob("model.safetensors")}
    assert steps == {"oasis64-phase1/oasis8": 4, "oasis16": 5} and starts == [4]
    assert read_model(folder / "oasis16" / "model.safetensors")[1]["images"] == (4 + 5) * first.batch_size


def test_the_image_size_of_phases_cannot_be_changed(flags):
    with pytest.raises(OasisError, match="--recipe oasis64 has an image size for each phase"):
        train.parse_phases([*flags, "--image-size", "16"])


def test_a_recipe_that_was_interrupted_goes_on_bit_for_bit(flags, tmp_path):
    """The interruption is in the middle of the first phase, or in the middle of the last one."""
    train.main([*flags, "--ckpt-path", str(tmp_path / "whole")])
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
    assert [recipes.RECIPES[f"oasis{size}"] for size in (64, 128)] == [whole[:1], whole[:2]]


def test_the_recipe_of_the_largest_model_runs_all_of_its_phases(unet, tmp_path, monkeypatch):
    """The phases have 1/100 of their steps, smaller images and batches and a smaller network."""
    small = [dict(phase, max_steps=phase["max_steps"] // 100, image_size=phase["image_size"] // 4, batch_size=4, dim=16)
             for phase in recipes.RECIPES["oasis256"]]
    monkeypatch.setitem(recipes.RECIPES, "oasis256", small)
    train.main([*unet[:4], "--precision", "float32", "--recipe", "oasis256"])
    folders = [*(f"oasis256-phase{i}" for i in range(1, len(small))), ""]
    for folder, phase in zip(folders, small):
        run = tmp_path / "checkpoint" / folder / f"oasis{phase['image_size']}"
        settings = read_model(run / "model.safetensors")[1]
        assert settings["step"] == phase["max_steps"]
        asked = {key: value for key, value in phase.items() if key in settings and key != "flips"}
        assert {key: settings[key] for key in asked} == asked
