"""tools/make_figures.py: the figures of the README can be drawn again, and show the network as it is."""
import importlib.util

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT
from modules import GaussianDiffusion, UNet, save_model
from oasis.files import OasisError


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """The script as a module, which draws into tmp_path."""
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "tools" / "make_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMGS", tmp_path)
    return module


def test_all_figures_of_a_model_are_drawn(figures, tmp_path):
    network = UNet(16, dim=16, dim_mults=(1, 2))
    settings = dict(network.settings, timesteps=20, objective="x_start", schedule="shifted")
    save_model(tmp_path / "tiny.safetensors", network, settings)
    figures.main(["--model", str(tmp_path / "tiny.safetensors")])
    for name in ("unet.png", "tiny_forward.png", "tiny_reverse.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"), float)
        assert pixels.std() > 10, name  # neither black nor blank


def test_the_forward_strip_goes_from_the_clean_slice_to_noise(figures, monkeypatch):
    strips = {}
    monkeypatch.setattr(figures, "strips", lambda rows, labels, title: strips.update(rows=rows, labels=labels))
    network = UNet(16, dim=16, dim_mults=(1,))
    diffusion = GaussianDiffusion(20, "x_start")
    figures.forward_process(network, diffusion)
    (row,), labels = strips["rows"], strips["labels"]
    assert len(row) == len(labels) == figures.FRAMES and labels[0] == "clean"
    np.testing.assert_array_equal(row[0], 0)  # the image of an untrained network
    stds = [np.std(image) for image in row]
    assert np.all(np.diff(stds) > 0) and stds[-1] == pytest.approx(1, abs=0.2)


def test_the_diagram_names_every_resolution_and_width(figures):
    network = UNet(32, dim=16, dim_mults=(1, 2, 4))
    texts = [text.get_text() for text in figures.network_diagram(network).axes[0].texts]
    sizes = [text.splitlines()[0] for text in texts if "ResNet blocks +" in text or "full attention" in text]
    assert sizes == ["32×32×16", "16×16×32", "16×16×16", "8×8×64", "8×8×32", "8×8×64"]
    assert sum(text.startswith("skip") for text in texts) == 3


def test_the_quality_figure_shows_kid_by_steps_and_the_floor(figures):
    def report(sampler, steps, kid, eta=0.0):
        return {"origin": {"sampler": sampler, "steps": steps, "eta": eta, "noise_scale": 1.0}, "features": "eyes",
                "image_size": 64, "metrics": {"samples": {"kid": kid, "kid_error": 0.001}, "floor": {"kid": 0.002}}}

    reports = [report("dpm", 20, 0.04, 1.0), report("ddpm", 1000, 0.03), report("dpm", 10, 0.05, 1.0),
               report("dpm", 20, 0.06)]
    ax, = figures.quality_by_steps(reports).axes
    lines = {container.get_label(): np.transpose(container[0].get_data()).tolist() for container in ax.containers}
    assert lines == {"ddpm": [[1000, 30]], "dpm": [[10, 50], [20, 40]], "dpm, eta 0": [[20, 60]]}
    assert ax.lines[-1].get_ydata() == [2, 2] and ax.get_ylim()[0] == 0


def test_a_report_of_existing_images_is_refused(figures, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"origin": {}}')
    with pytest.raises(OasisError, match="evaluation.json: is of images that existed"):
        figures.main(["--evaluations", str(tmp_path / "evaluation.json")])
