"""oasis/recipes.py: what a recipe sets, and recipes that train in phases."""
import pytest

import train
from helpers import same_state
from oasis import recipes
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
        starts.append(read_model(path)[1]["step"]), start_from_model(network, path, *others)))
    train.main(flags)
    folder = tmp_path / "checkpoint"
    steps = {path.relative_to(folder).parent.as_posix(): read_model(path)[1]["step"]
             for path in folder.rglob("model.safetensors")}
    assert steps == {"oasis64-phase1/oasis8": 4, "oasis16": 5} and starts == [4]


@pytest.mark.parametrize("stops", [(2, 5), (4, 3)])
def test_a_recipe_that_was_interrupted_goes_on_bit_for_bit(flags, tmp_path, stops):
    """The interruption is in the middle of the first or of the last phase."""
    train.main([*flags, "--ckpt-path", str(tmp_path / "whole")])
    phases = train.parse_phases([*flags, "--ckpt-path", str(tmp_path / "parts")])
    for phase, stop in zip(phases, stops):
        phase.max_steps = stop
    train.train(phases[:1] if stops[0] < 4 else phases)
    train.main([*flags, "--ckpt-path", str(tmp_path / "parts")])
    for run in "oasis64-phase1/oasis8", "oasis16":
        same_state(tmp_path / "whole" / run, tmp_path / "parts" / run)


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.startswith("oasis")])
def test_a_recipe_of_a_bundled_model_runs_all_of_its_phases(unet, tmp_path, monkeypatch, name):
    """The phases have 1/100 of their steps, smaller batches of made-up slices and a smaller network."""
    small = [dict(phase, max_steps=phase["max_steps"] // 100, batch_size=4, dim=16) for phase in recipes.RECIPES[name]]
    monkeypatch.setitem(recipes.RECIPES, name, small)
    train.main([*unet[:4], "--precision", "float32", "--recipe", name])
    settings = read_model(tmp_path / "checkpoint" / name / "model.safetensors")[1]
    assert settings["step"] == small[-1]["max_steps"]
    assert {key: settings[key] for key in small[-1] if key in settings and key != "flips"} == {
        key: value for key, value in small[-1].items() if key in settings and key != "flips"}
