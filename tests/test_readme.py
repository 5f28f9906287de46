"""Every command of the README and of docs works: its flags exist, and it runs to its end on a few made-up slices.

To save time, some flags get smaller values, and commands that are equal then run once. Commands for GPUs, for several
machines, for JAX and for PyTorch are only parsed; test_devices.py, test_workers.py and test_stablehlo.py test what the
first three do.
"""
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import evaluate
import predict
import train
from helpers import (ROOT, copy_repository, slice_pixels, write_image, write_session, write_slices, write_volume,
                     zip_folder)
from modules import NETWORK_SETTINGS, UNet, save_model
from oasis.files import make_folder
from oasis.modelfile import read_model

PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
CARDS = "checkpoint/README.md"
SHORTER = {
    "train.py": "--max-steps 1 --save-every 1 --batch-size 2",
    "predict.py": "--number-of-images 2 --steps 2 --frames 2",
    "evaluate.py": "--number-of-images 20 --batch-size 20 --steps 1",
    "tools/make_flags.py": "",
    "tools/make_figures.py": "--model oasis64",
    "tools/judge_heads.py": "--number-of-images 2 --steps 1",
    "tools/noise_levels.py": "--number-of-images 20 --steps 2",
    "tools/benchmark.py": "--size 64 --dim 16 --batch 2 --rounds 1 --timesteps 20",
    "dataset/make_oasis_zip.py": "--output made.zip",
    "tools/scaling.py": "--dim 16 --batches 1 --steps 1 --port 23789",
    "tools/export_stablehlo.py": "",
    "tools/run_stablehlo.py": "",
    "tools/gpu_table.py": "",
    "tools/equal_minutes.py": "",
}
ELSEWHERE = ("GPU:", "TF_CONFIG", "srun", "with JAX", "with PyTorch")


def commands(*files):
    """Return [(words after `python`, whether the command is for GPUs or several machines)] of all commands in files."""
    found = []
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += re.findall(r"`(python [^`\n]*\.py[^`\n]*)`", prose)
        for line in lines:
            for part in line.split("&&"):
                if match := re.search(r"python (\S+\.py.*)", part):
                    words = tuple(shlex.split(match[1], comments=True))
                    found.append((words, any(word in part for word in ELSEWHERE)))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository without data and runs, with made-up slices in place of the real slices.

    To save time its networks have two levels instead of four, train.py validates with 8 images and samples in 2 steps,
    each phase of a recipe has one step, and the bundled models are untrained and have T = 50.
    """
    folder = tmp_path_factory.mktemp("readme")
    copy_repository(folder / "copy")
    for name, old, new in (("modules.py", "DIM_MULTS = (1, 2, 4, 8)", "DIM_MULTS = (1, 2)"),
                           ("train.py", "VALIDATION_SLICES = 128", "VALIDATION_SLICES = 8"),
                           ("train.py", "SAMPLE_STEPS = 20", "SAMPLE_STEPS = 2")):
        before, after = (folder / "copy" / name).read_text(encoding="utf-8").split(old)
        (folder / "copy" / name).write_text(before + new + after, encoding="utf-8")
    recipes = folder / "copy" / "oasis" / "recipes.py"
    short = re.sub("max_steps=[0-9]+", "max_steps=1", recipes.read_text(encoding="utf-8"))
    recipes.write_text(short, encoding="utf-8")
    for model in (folder / "copy" / "checkpoint").glob("*.safetensors"):
        settings = {**read_model(model)[1], "dim_mults": (1, 2)}
        network = UNet(**{name: settings[name] for name in NETWORK_SETTINGS if name in settings})
        save_model(model, network, {**settings, **network.settings, "timesteps": 50})
    for split, subjects in {"train": range(1, 5), "validate": range(101, 105)}.items():
        write_slices(folder / "unpacked" / "keras_png_slices_data", subjects, range(0, 32, 2), 256, split)
    for place in ("dataset", "drive"):
        zip_folder(folder / "unpacked", make_folder(folder / "copy" / place) / "keras_png_slices_data.zip")
    for k in range(12):
        write_image(folder / "copy" / "my_images" / f"patient{k}.jpg", slice_pixels(k, 0, 64))
        write_volume(folder / "copy" / "my_volumes" / f"patient{k}.nii.gz", np.stack([slice_pixels(k, 0, 64)] * 70, -1))
    write_session(folder / "copy" / "discs", 1)
    return folder / "copy"


def test_the_pages_have_the_commands_that_a_reader_needs():
    assert {words[0] for words, _ in commands("README.md")} >= {"train.py", "predict.py", "evaluate.py"}
    scripts = [words[0] for words, _ in commands(*PAGES)]
    assert set(scripts) == set(SHORTER) and len(scripts) > 20


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220


def test_links_and_images_of_the_pages_exist():
    for page in (*PAGES, CARDS):
        text = (ROOT / page).read_text(encoding="utf-8")
        links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', text)
        for target in (link or source for link, source in links):
            assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), (page, target)


@pytest.mark.parametrize("words", [words for words, _ in commands(*PAGES, CARDS) if "/" not in words[0]], ids=" ".join)
def test_the_flags_of_a_command_are_those_of_its_script(words):
    script, *arguments = words
    if arguments != ["--help"]:
        {"train.py": train, "predict.py": predict, "evaluate.py": evaluate}[script].parse_flags(arguments)


def shortened(words):
    """The words of a command with the flags of SHORTER in place of its own values of them."""
    script, *arguments = words
    shorter = SHORTER[script].split()
    if script == "train.py":  # a bundled model of the copy has T = 50
        shorter += ["--timesteps", "50"] if "--initial-model" in arguments else ["--dim", "16"]
    for flag in shorter:
        if flag.startswith("--") and flag in arguments:
            place = arguments.index(flag)
            del arguments[place:place + 2]
    return script, *arguments, *shorter


@pytest.mark.slow
@pytest.mark.parametrize("words", dict.fromkeys(shortened(words) for words, elsewhere in commands(*PAGES)
                                                if not elsewhere), ids=" ".join)
def test_a_command_runs_to_its_end(words, copy):
    words = [word.replace("/content/drive/MyDrive", "drive") for word in words]
    if words[0] == "train.py" and "--demo" not in words:  # a new run, since an existing run refuses other settings
        words += ["--ckpt-path", "runs/" + "".join(words).replace("/", "")]
    done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_python_of_the_readme_makes_pictures():
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    more = "\nx = images.numpy()\nassert x.shape == (4, 64, 64, 1) and x.std() > 0.1 and abs(x).max() <= 1"
    subprocess.run([sys.executable, "-c", block + more], cwd=ROOT, check=True, timeout=300)
