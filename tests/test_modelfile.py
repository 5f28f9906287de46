"""Model files: saving, loading, export, damaged and foreign files, and the start of another model from a file."""
import collections
import hashlib
import importlib.util
import json
import os
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import modules
import predict
from helpers import ROOT, awake, mutate, outcome, write_small_model
from modules import GaussianDiffusion, UNet, load_model, save_model
from oasis import modelfile
from oasis.conditions import embedded_keys
from oasis.files import OasisError, check_image_size, make_folder
from oasis.modelfile import FORMAT, find_model, model_digest, read_model, write_model
from oasis.parameters import named_variables, start_from_model
from oasis.recipes import RECIPES

RNG = np.random.default_rng(0)
SMALL = dict(image_size=16, dim=16, dim_mults=(1, 2))
SETTINGS = dict(image_size=16, dim=16, dim_mults=[1, 2], channels=1, patch_size=1, pixel_width=0, timesteps=1000,
                objective="v", schedule="cosine", note="größer")
DIFFUSION = GaussianDiffusion(1000, "v", "cosine")
X, TIME = RNG.standard_normal([2, 16, 16, 1]).astype(np.float32), np.array([3, 700], np.int32)


@pytest.fixture(scope="module")
def network():
    return awake(UNet(**SMALL))


@pytest.fixture(scope="module")
def export():
    """tools/export_model.py as a module."""
    spec = importlib.util.spec_from_file_location("export_model", ROOT / "tools" / "export_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, network, SETTINGS)
    return path


def test_a_model_comes_back_as_it_was_saved(network, saved):
    again, diffusion, settings = load_model(saved)
    np.testing.assert_array_equal(again(X, TIME), network(X, TIME))
    assert settings == {**network.settings, **SETTINGS}
    assert (diffusion.timesteps, diffusion.objective, diffusion.schedule) == (1000, "v", "cosine")
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # nothing temporary is left


def test_every_argument_of_the_network_travels_in_the_file(tmp_path):
    network = awake(UNet(24, dim=8, dim_mults=(1, 3), channels=2, patch_size=2, pixel_width=16))
    settings = dict(network.settings, timesteps=50, objective="x_start", schedule="shifted")
    save_model(tmp_path / "a.safetensors", network, settings)
    again, diffusion, _ = load_model(tmp_path / "a.safetensors")
    x = tf.random.stateless_normal([1, 24, 24, 2], [1, 2])
    np.testing.assert_array_equal(again(x, TIME[:1]), network(x, TIME[:1]))
    assert (again.image_size, again.channels, again.patch_size, again.pixel_width) == (24, 2, 2, 16)
    assert diffusion.settings == dict(timesteps=50, objective="x_start", schedule="shifted")
    assert diffusion.image_size == 24


def test_a_network_setting_that_a_file_lacks_has_its_default(network, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "pixel_width"}
    save_model(tmp_path / "a.safetensors", network, settings)
    again, _, _ = load_model(tmp_path / "a.safetensors")
    assert again.pixel_width == 0


@pytest.mark.parametrize("ratio, patch_size, pixel_width", [(4, 1, 8), (2, 2, 0)])
def test_a_larger_network_starts_as_the_smaller_one_on_block_means(tmp_path, ratio, patch_size, pixel_width):
    channels = 2 if patch_size == 1 else 1
    options = dict(dim=16, dim_mults=(1, 2), channels=channels)
    theirs = awake(UNet(8, patch_size=patch_size, **options))
    save_model(tmp_path / "small.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(8 * ratio, patch_size=patch_size * ratio, pixel_width=pixel_width, seed=1, **options)
    start_from_model(mine, tmp_path / "small.safetensors", DIFFUSION)
    x = RNG.standard_normal([2, 8 * ratio, 8 * ratio, channels]).astype(np.float32)
    means = x.reshape(2, 8, ratio, 8, ratio, channels).mean(axis=(2, 4))
    expected = theirs(means, TIME).numpy().repeat(ratio, axis=1).repeat(ratio, axis=2)
    np.testing.assert_allclose(mine(x, TIME), expected, atol=2e-6 * np.abs(expected).max())


def test_a_full_resolution_level_of_another_patch_size_starts_anew(tmp_path):
    theirs = awake(UNet(8, dim=16, dim_mults=(1, 2), pixel_width=8))
    save_model(tmp_path / "theirs.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(16, dim=16, dim_mults=(1, 2), patch_size=2, pixel_width=8, seed=1)
    initial = {name: variable.numpy() for name, variable in named_variables(mine)}
    start_from_model(mine, tmp_path / "theirs.safetensors", DIFFUSION)
    parameters, old = dict(named_variables(mine)), dict(named_variables(theirs))
    for name, value in initial.items():
        if name.startswith("pixels"):
            np.testing.assert_array_equal(parameters[name], value)
        elif name.startswith(("down", "middle", "up")):
            np.testing.assert_array_equal(parameters[name], old[name])


@pytest.mark.parametrize("width, taken_over", [(8, True), (0, False), (16, False)])
def test_a_full_resolution_level_of_another_width_starts_anew(tmp_path, width, taken_over):
    theirs = awake(UNet(**SMALL, patch_size=2, pixel_width=8))
    save_model(tmp_path / "theirs.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(**SMALL, patch_size=2, pixel_width=width)
    start_from_model(mine, tmp_path / "theirs.safetensors", DIFFUSION)
    expected = theirs
    if not taken_over:
        expected = UNet(**SMALL, patch_size=2)
        weights = dict(named_variables(theirs))
        for name, variable in named_variables(expected):
            variable.assign(weights[name])
        assert np.std(theirs(X, TIME) - expected(X, TIME)) > 0.1
    np.testing.assert_array_equal(mine(X, TIME), expected(X, TIME))


@pytest.mark.parametrize("other", [dict(dim=32), dict(dim_mults=(1, 1)), dict(channels=3), dict(patch_size=4)])
def test_a_network_of_another_shape_is_no_start(tmp_path, other):
    theirs = UNet(16, **{**dict(dim=16, dim_mults=(1, 2), patch_size=2), **other})
    save_model(tmp_path / "other.safetensors", theirs, {**SETTINGS, **theirs.settings})
    mine = UNet(16, dim=16, dim_mults=(1, 2), patch_size=2)
    before = [variable.numpy() for variable in mine.weights]
    with pytest.raises(OasisError, match="other.safetensors.* has .*instead of.*Only pixel_width"):
        start_from_model(mine, tmp_path / "other.safetensors", DIFFUSION)
    for old, variable in zip(before, mine.weights):
        np.testing.assert_array_equal(old, variable)


@pytest.mark.parametrize("diffusion, words", [
    (GaussianDiffusion(objective="x_start"), "was trained with --objective v, .* --objective x_start"),
    (GaussianDiffusion(500, "v"), "was trained with --timesteps 1000, .* --timesteps 500")])
def test_a_model_of_another_objective_or_number_of_timesteps_is_no_start(saved, diffusion, words):
    is_refused_as_start(UNet(**SMALL), saved, diffusion, words)


def test_the_runs_in_a_folder_that_is_no_run_are_named(tmp_path):
    for name in "oasis64", "oasis32":
        write_small_model(make_folder(tmp_path / "mine" / name) / "model.safetensors", (1,))
    with pytest.raises(OasisError, match=r"mine: no model there. Name a run's folder \(.*oasis32, .*oasis64\), a"):
        find_model(str(tmp_path / "mine"), str(tmp_path))


def test_a_name_too_long_for_a_file_is_no_model():
    with pytest.raises(OasisError, match="aaa: no model there"):
        find_model("a" * 300)


def test_a_run_with_the_name_of_a_bundled_model_is_used_and_both_files_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modelfile, "BUNDLED", tmp_path)
    run = make_folder(tmp_path / "runs" / "oasis64") / "model.safetensors"
    write_small_model(run, (1,))
    assert find_model("oasis64", tmp_path / "runs") == ("oasis64", run)
    assert capsys.readouterr().out == ""
    bundled = shutil.copy(run, tmp_path / "oasis64.safetensors")
    assert find_model("oasis64", tmp_path / "runs") == ("oasis64", run)
    assert capsys.readouterr().out == f"oasis64 is a run: the bundled model of this name is {bundled}\n"


def test_a_model_of_another_condition_is_no_start(tmp_path):
    """The parameters of the two embeddings have the same names and shapes."""
    theirs = UNet(**SMALL, condition="mirror")
    save_model(tmp_path / "other.safetensors", theirs, {**SETTINGS, **theirs.settings})
    is_refused_as_start(UNet(**SMALL, condition="slice"), tmp_path / "other.safetensors", DIFFUSION,
                        "was trained with --condition mirror, .* --condition slice: give --condition mirror")


def is_refused_as_start(mine, file, diffusion, words):
    """Assert that start_from_model raises an OasisError that matches `words`, and leaves the network as it was."""
    before = [variable.numpy() for variable in mine.weights]
    with pytest.raises(OasisError, match=words):
        start_from_model(mine, file, diffusion)
    for old, variable in zip(before, mine.weights):
        np.testing.assert_array_equal(old, variable)


def test_an_exported_file_is_half_the_size_and_nearly_the_same(network, saved, tmp_path, export):
    export.main([str(saved), str(tmp_path / "half.safetensors")])
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * saved.stat().st_size
    again, _, settings = load_model(tmp_path / "half.safetensors")
    exact = network(X, TIME)
    assert settings == {**network.settings, **SETTINGS}
    assert all(variable.dtype == "float32" for variable in again.weights)
    for mine, theirs in zip(again.weights, network.weights):
        np.testing.assert_array_equal(mine, np.float32(np.float16(theirs)))
    assert np.sqrt(np.mean((again(X, TIME) - exact)**2)) < 0.004 * np.std(exact)


def test_exporting_a_bundled_model_gives_the_same_bytes(tmp_path, export):
    export.main(["oasis64", str(tmp_path / "again.safetensors")])
    assert (tmp_path / "again.safetensors").read_bytes() == (ROOT / "checkpoint" / "oasis64.safetensors").read_bytes()


def test_a_parameter_beyond_the_range_of_float16_is_refused(tmp_path, export):
    write_model(tmp_path / "big.safetensors", {"kernel": np.array([7e4], np.float32)}, SETTINGS)
    with pytest.raises(OasisError, match="big.safetensors.*65504"):
        export.main([str(tmp_path / "big.safetensors"), str(tmp_path / "half.safetensors")])
    assert not (tmp_path / "half.safetensors").exists()


@pytest.mark.parametrize("name", ["oasis64", "oasis128", "oasis256"])
def test_a_bundled_model_is_what_its_recipe_trained(name):
    log = (ROOT / "docs" / "training-log.md").read_text(encoding="utf-8")
    section = log.split(f"\n## {name}\n")[1].split("\n## ")[0]
    file, phases = ROOT / "checkpoint" / f"{name}.safetensors", RECIPES[name]
    settings = read_model(file)[1]
    asked = {name: value for name, value in phases[-1].items() if value != "auto" and not callable(value)}
    assert settings["recipe"] == name and {name: settings[name] for name in asked} == asked
    assert settings["step"] == phases[-1]["max_steps"] and f"{settings['images']:,} images" in section
    assert settings["images"] == sum(phase["max_steps"] * phase["batch_size"] for phase in phases)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in section


def test_a_model_computes_in_the_precision_asked_for(network, saved):
    half, _, _ = load_model(saved, precision="bfloat16")
    np.testing.assert_array_equal(half.stem.kernel, network.stem.kernel)
    assert half.stem.compute_dtype == "bfloat16" and np.any(half(X, TIME) != network(X, TIME))


def refused(path, content=None):
    """The message with which load_model refuses that file."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OasisError) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    return str(refusal.value)


def refused_with_one_bit_flipped(path, content, positions):
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(OasisError, match=str(path)):
            read_model(path)


def test_a_damaged_byte_of_the_parameters_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    names = 8 + content[8:].index(b"}") + 2  # after the metadata
    header = 8 + int.from_bytes(content[:8], "little")
    end = len(content)
    for positions in ([*range(8), *range(names, header, 97), header - 1], [*range(header, end, 99_991), end - 1]):
        refused_with_one_bit_flipped(tmp_path / "a.safetensors", content, positions)


def test_a_damaged_byte_of_the_settings_is_noticed(saved, tmp_path):
    """A changed digit is noticed too: otherwise 1000 timesteps could become 1001."""
    content = saved.read_bytes()
    start = content.index(b'"settings":"') + 12
    refused_with_one_bit_flipped(tmp_path / "a.safetensors", content, range(start, content.index(b'}"', start)))


def test_truncated_files_are_refused(saved, tmp_path):
    content = saved.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        refused(tmp_path / "short.safetensors", content[:length])
    refused(tmp_path / "long.safetensors", content + b"\0")


def test_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "a.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(1000))
    for metadata in (None, {"format": "pt"}):
        foreign = safetensors.numpy.save({"kernel": np.zeros(3, np.float32)}, metadata)
        assert "train.py" in refused(tmp_path / "b.safetensors", foreign)
    assert "no such" in refused(tmp_path / "missing.safetensors")
    refused(tmp_path)


@pytest.mark.parametrize("change", [dict(image_size=17), dict(dim=32), dict(dim_mults=[1, 2, 4]), dict(objective="s"),
                                    dict(timesteps=0), dict(dim=None), dict(channels=0)])
def test_settings_that_do_not_fit_the_weights_are_refused(network, tmp_path, change):
    save_model(tmp_path / "a.safetensors", network, {**SETTINGS, **change})
    refused(tmp_path / "a.safetensors")


def test_settings_that_are_not_there_are_refused(network, tmp_path):
    for settings in ({}, [], None, {name: value for name, value in SETTINGS.items() if name != "timesteps"}):
        save_model(tmp_path / "a.safetensors", network, settings)
        refused(tmp_path / "a.safetensors")


def test_a_save_that_fails_leaves_the_old_file(network, saved, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())
    with pytest.raises(TypeError):
        save_model(path, network, {"settings": object()})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert read_model(path)[1] == SETTINGS


# --------------------------------------------------------------------------------------------------------- nonsense

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = UNet(16, dim=16, dim_mults=(1,))
    kernel = network.last_conv.kernel  # initially zero
    kernel.assign(tf.random.stateless_normal(kernel.shape, [3, 4]))
    path = tmp_path_factory.mktemp("run") / "oasis16" / "model.safetensors"
    diffusion = GaussianDiffusion(50, "x_start")
    save_model(path, network, {**network.settings, **diffusion.settings, "images": 320, "seed": 0})
    return path


NONSENSE = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf"), True, None, "16", "", [],
            [1], {}, "v", "noise", [2**40],
            [1] * 1000, [[1]], ["1"], [0], [-1], [1, 2, 4, 8]]


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_load_the_same_model_or_are_refused(count, model, tmp_path, monkeypatch):
    """A third of the files are damaged anywhere, a third in the header, and a third have wrong settings with a correct
    checksum."""
    rng, outcomes, intact = np.random.default_rng(0), collections.Counter(), model.read_bytes()
    parameters, settings = read_model(model)
    header = 8 + int.from_bytes(intact[:8], "little")
    network = UNet(16, dim=16, dim_mults=(1,))
    built = []

    def build(image_size, dim, dim_mults, channels, patch_size, pixel_width=0, condition="", precision="float32"):
        """Build the U-Net of the original file. For all others, only assert that their size is bounded, because
        tracing is slow."""
        built.append((image_size, dim, dim_mults, channels, patch_size, pixel_width))
        check_image_size(image_size, patch_size, len(dim_mults))
        if (dim, dim_mults, channels, patch_size, pixel_width, embedded_keys(condition)) == (16, [1], 1, 1, 0, ()):
            return network
        assert 16 * dim * dim <= network.count_params() and 9 * (dim * max(dim_mults))**2 <= network.count_params()
        raise ValueError("another network")
    monkeypatch.setattr(modules, "UNet", build)
    file = tmp_path / "model.safetensors"
    for i in range(count):
        if i % 3 == 0:
            kind, data = "anywhere", mutate(intact, rng)
        elif i % 3 == 1:
            kind, data = "header", mutate(intact[:header], rng) + intact[header:]
        else:
            changed = dict(settings)
            for name in rng.choice(sorted(settings), rng.integers(1, 3), replace=False):
                changed[name] = NONSENSE[rng.integers(len(NONSENSE))]
                if rng.integers(8) == 0:
                    del changed[name]
            broken = ["[" * 100_000, "[]", "[[1, 2]]", "7", "null", "", "{"]
            text = json.dumps(changed) if rng.integers(10) else broken[rng.integers(7)]
            metadata = {"format": FORMAT, "settings": text, "sha256": model_digest(parameters, text)}
            kind, data = "settings", safetensors.numpy.save(parameters, metadata)
        file.write_bytes(data)

        def load():
            _, _, loaded = load_model(file)
            assert i % 3 == 2 or loaded == settings or data == intact
        outcomes[kind, outcome(load)] += 1
    print(outcomes)
    assert os.listdir(tmp_path) == ["model.safetensors"] and len(built) > count // 40
    assert outcomes["settings", "ok"] > 0
    assert outcomes["anywhere", "refused"] > count // 4


def test_a_file_that_claims_to_be_huge_costs_no_memory(model, tmp_path):
    parameters, settings = read_model(model)
    for change in ({"dim": 4096}, {"dim_mults": [1, 4096]}, {"channels": 4096}, {"patch_size": 4096},
                   {"pixel_width": 4096}, {"pixel_width": 1024},
                   {"image_size": 2**20}, {"timesteps": 2**40}, {"dim_mults": [1] * 10**6}):
        text = json.dumps({**settings, **change})
        metadata = {"format": FORMAT, "settings": text, "sha256": model_digest(parameters, text)}
        (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(parameters, metadata))
        began = time.process_time()
        assert outcome(lambda: load_model(tmp_path / "model.safetensors"), memory=2**28) == "refused", change
        assert time.process_time() - began < 1


def test_a_model_of_another_run_in_a_folder_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "generate", lambda *_, **options: [])
    for name, seed in (("one", 1), ("two", 2)):
        network = UNet(16, dim=16, dim_mults=(1,), seed=seed)
        settings = {**network.settings, **GaussianDiffusion(5, "x_start").settings, "seed": seed}
        save_model(tmp_path / name / "model.safetensors", network, settings)
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    arguments = ["--gif-path", str(tmp_path / "gif"), "--frames", "0", "--model", str(tmp_path / "two")]
    predict.main(arguments)
    assert "warning" not in capsys.readouterr().err
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "two")
    predict.main(arguments)
    message = "two/model.safetensors is not from the run in its folder: it has seed 1, not 2"
    assert message in capsys.readouterr().err
