"""docs/extend.md: each diff is short and can be applied, and the changed code trains."""
import re
import subprocess
import sys

import numpy as np
import pytest

from helpers import ROOT, copy_repository, state_of
from oasis.modelfile import read_model

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
DIFFS = dict(zip(("schedule", "condition", "attention"), re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)))
FLAGS = {"schedule": ["--schedule", "sigmoid"], "condition": [], "attention": []}


def train_with(diffs, folder, *flags):
    """Apply diffs to a copy of the repository, train a U-Net of one level for 3 steps, and return the run's folder."""
    copy = copy_repository(folder / "copy")
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True)
    command = [sys.executable, "tests/programs/small_train.py", "--demo", "--max-steps", "3", "--dim", "16",
               "--batch-size", "4", "--ckpt-path", str(folder / "runs"), "--precision", "float32", *flags]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "demo64"


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_has_at_most_15_lines(name):
    changed = [line for line in DIFFS[name].splitlines() if re.match(r"[+-](?!--|\+\+)", line)]
    assert 0 < len(changed) <= 15


def test_there_is_one_diff_for_each_change_and_the_readme_shows_the_first():
    assert set(DIFFS) == set(FLAGS)
    assert DIFFS["schedule"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [tuple(DIFFS), *(pytest.param((name,), marks=pytest.mark.slow) for name in DIFFS)])
def test_the_diffs_train_together_and_each_alone(names, tmp_path):
    run = train_with([DIFFS[name] for name in names], tmp_path, *(flag for name in names for flag in FLAGS[name]))
    parameters, settings = read_model(run / "model.safetensors")
    assert settings["step"] == 3 and all(np.isfinite(array).all() for array in parameters.values())
    assert settings["schedule"] == ("sigmoid" if "schedule" in names else "linear")
    assert any(key.startswith("grey_embedding") for key in parameters) == ("condition" in names)
    assert any("out_norm" in key for key in parameters) == ("attention" not in names)
    if "condition" in names:
        means = [value for key, value in state_of(run).items() if "means" in key and value.shape == (16, 64)]
        assert len(means) == 2 and all(np.any(mean != 0) for mean in means)  # the kernels of t and of the grey value
