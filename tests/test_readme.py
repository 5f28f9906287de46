"""Every command of the README works: its flags exist, and it runs to its end in a copy of the repository, on a few made-up slices.

What takes long is cut short by further flags, for the last one counts. Commands for GPUs and for several machines are parsed
only: what they do without either is in test_distribute.py.
"""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import predict
import train
from common import make_folder
from conftest import write_slices, zip_folder

ROOT = Path(train.__file__).resolve().parent
SHORTER = {
    "train.py": "--max-steps 1 --save-every 1 --batch-size 2 --number-of-samples 8",
    "predict.py": "--number-of-images 2 --steps 2 --frames 2",
    "evaluate.py": "--number-of-images 20 --batch-size 20 --steps 1",
    "imgs/make_figures.py": "--model oasis64",
    "tests/noise_levels.py": "--number-of-images 20 --steps 2",
    "tests/benchmark.py": "--size 64 --dim 16 --batch 2 --rounds 1",
    "tests/scaling.py": "--dim 16 --batches 1 --steps 1 --port 23789",
}
ELSEWHERE = ("GPU:", "TF_CONFIG", "srun")


def commands(*files):
    """[(the words after `python`, whether it is for GPUs or several machines)] of every such command in the files, once each."""
    found = []
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(python [^`\n]*\.py[^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            for part in line.split("&&"):
                if match := re.search(r"python (\S+\.py.*)", part):
                    found.append((tuple(shlex.split(match[1], comments=True)), any(word in part for word in ELSEWHERE)))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository without anybody's data and runs, and with made-up slices at the place of the real ones."""
    folder = tmp_path_factory.mktemp("readme")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    for split, subjects in {"train": range(1, 5), "validate": range(101, 105)}.items():
        write_slices(folder / "unpacked" / "keras_png_slices_data", subjects, range(6), 256, split)
    for place in ("dataset", "drive"):
        zip_folder(folder / "unpacked", make_folder(folder / "copy" / place) / "keras_png_slices_data.zip")
    return folder / "copy"


def test_the_readme_has_the_commands_that_a_reader_needs():
    scripts = [words[0] for words, _ in commands("README.md")]
    assert set(scripts) == set(SHORTER) and len(scripts) > 20


@pytest.mark.parametrize("words", [words for words, _ in commands("README.md", "checkpoint/README.md") if "/" not in words[0]], ids=" ".join)
def test_the_flags_of_a_command_are_those_of_its_script(words):
    script, *arguments = words
    if arguments != ["--help"]:
        {"train.py": train, "predict.py": predict, "evaluate.py": evaluate}[script].parse_flags(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words, elsewhere in commands("README.md") if not elsewhere], ids=" ".join)
def test_a_command_runs_to_its_end(words, copy):
    script, *arguments = words
    shorter = SHORTER[script].split()
    if script == "train.py" and "--initial-model" not in arguments:
        shorter += ["--dim", "16"]
    if script == "train.py" and "--demo" not in arguments:  # for itself: other settings would not go on from an earlier command's run
        shorter += ["--ckpt-path", "runs/" + "".join(arguments).replace("/", "")]
    arguments = [word.replace("/content/drive/MyDrive", "drive") for word in arguments]
    done = subprocess.run([sys.executable, script, *arguments, *shorter], cwd=copy, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_python_of_the_readme_makes_pictures(copy):
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    more = "\nassert images.shape == (4, 64, 64, 1) and images.numpy().std() > 0.1 and abs(images.numpy()).max() <= 1"
    subprocess.run([sys.executable, "-c", block + more], cwd=copy, check=True, timeout=300)
