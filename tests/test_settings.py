"""oasis/settings.py: one annotated constant is one setting, with its flag, its help and its facts."""
import ast
import importlib.util
import inspect
import json
import shlex
import shutil
import subprocess
import sys

import pytest

import evaluate
import predict
import train
from helpers import PROGRAMS, ROOT
from modules import NETWORK_SETTINGS
from oasis.files import OasisError
from oasis.recipes import RECIPES, patch_size
from oasis.settings import (LOCAL, NETWORK, PRIVATE, RESUMABLE, TRAINER, as_flag, make_parser, read_settings,
                            values_with, values_without)

SOURCE = '''"""What it does."""
from oasis.settings import *

SIZE2: flag(integer(1, 9), NETWORK) = 2   # pixels a side, 100 %
NAME: flag(str, PRIVATE) = "a # b"        # of the run, which
                                          # goes on here
# a comment that belongs to nobody
KIND: flag(("x", "y")) = ("x"
                          )               # one of two

OTHER = 3                                 # no setting
OFF: flag(bool) = False                   # a switch
'''


def module_of(tmp_path, source):
    path = tmp_path / "script.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_defaults_facts_and_help_come_from_one_line(tmp_path):
    settings = read_settings(module_of(tmp_path, SOURCE))
    assert list(settings) == ["size2", "name", "kind", "off"]
    assert {name: setting.default for name, setting in settings.items()} == {
        "size2": 2, "name": "a # b", "kind": "x", "off": False}
    assert {name: setting.help for name, setting in settings.items()} == {
        "size2": "pixels a side, 100 %", "name": "of the run, which goes on here", "kind": "one of two",
        "off": "a switch"}
    assert settings["size2"].facts == (NETWORK,) and settings["kind"].facts == ()


def test_flags_parse_and_refuse_as_declared(tmp_path, capsys):
    settings = read_settings(module_of(tmp_path, SOURCE))
    parser = make_parser("what it does", settings)
    assert vars(parser.parse_args([])) == dict(size2=2, name="a # b", kind="x", off=False)
    assert vars(parser.parse_args(["--size2", "9", "--off", "--kind", "y"])) == dict(
        size2=9, name="a # b", kind="y", off=True)
    for wrong in (["--size2", "10"], ["--kind", "z"], ["--off", "1"], ["--unknown"]):
        with pytest.raises(OasisError, match="see --help"):
            parser.parse_args(wrong)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "pixels a side, 100 % (2)" in capsys.readouterr().out
    flags = parser.parse_args(["--size2", "9"])
    assert values_with(NETWORK, settings, flags) == {"size2": 9}
    assert set(values_without(PRIVATE, settings, flags)) == {"size2", "kind", "off"}


def test_words_that_give_a_setting_a_value_are_parsed_to_this_value():
    parser = make_parser("", train.SETTINGS)
    for name, value in {"slices": "", "path": "my images", "seed": -3, "dim": 32}.items():
        assert getattr(parser.parse_args(shlex.split(as_flag(name, value))), name) == value


def test_a_constant_without_a_comment_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="SIZE2 needs a comment"):
        read_settings(module_of(tmp_path, SOURCE.replace("# pixels a side, 100 %", "")))


@pytest.mark.parametrize("script", [train, predict, evaluate])
def test_every_constant_among_the_settings_has_a_flag(script):
    """Between the first and the last annotated constant no other constant is assigned."""
    body = ast.parse((ROOT / f"{script.__name__}.py").read_text(encoding="utf-8")).body
    rows = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    names = [node.target.id for node in body[rows[0]:rows[-1] + 1] if isinstance(node, ast.AnnAssign)]
    assert len(names) == rows[-1] + 1 - rows[0], "a constant without an annotation, so without a flag"
    flags = vars(script.parse_flags([]))
    for name in names:
        assert flags[name.lower()] == getattr(script, name), name
        assert name.lower() in script.SETTINGS


def test_the_settings_of_the_trainer_are_its_arguments():
    arguments = set(inspect.getfullargspec(train.Trainer.__init__).kwonlyargs) - {"loss_scale", "prepare"}
    assert {name for name, setting in train.SETTINGS.items() if TRAINER in setting.facts} == arguments


def test_the_network_settings_are_arguments_of_the_network():
    settings = {name for name, setting in train.SETTINGS.items() if NETWORK in setting.facts}
    assert settings == set(NETWORK_SETTINGS) - {"dim_mults", "channels"}


def test_facts_of_the_settings_of_training():
    """The expected names of all settings that may change on resume, stay private or may differ between workers."""
    def having(fact):
        return {name for name, setting in train.SETTINGS.items() if fact in setting.facts}
    places = {"path", "ckpt_path", "worker_timeout"}
    assert having(LOCAL) == places | {"initial_model", "devices"}
    assert having(PRIVATE) == having(LOCAL) | {"first_phase", "restart"}
    assert having(RESUMABLE) == having(PRIVATE) | {
        "epochs", "max_steps", "save_every", "accumulate", "precision", "demo", "recipe", "skip_unreadable"}
    assert set(train.SETTINGS) - having(RESUMABLE) == {
        "number_of_samples", "flips", "image_size", "batch_size", "learning_rate", "decay_after", "loss",
        "max_loss_weight", "timesteps", "dim", "patch_size", "pixel_width", "objective", "schedule", "times",
        "ema_decay", "seed", "slices", "axis", "condition", "condition_dropout", "loss_weight"}


def test_recipes_name_settings_only():
    for phases in RECIPES.values():
        assert set().union(*phases) <= set(train.SETTINGS)
    assert [patch_size(size) for size in (32, 64, 128, 256)] == [1, 1, 2, 4]


@pytest.mark.slow
def test_a_new_network_option_takes_three_lines(tmp_path):
    """A flag, an argument and an attribute are added in two files of a copy. The model file holds the new option."""
    changes = {"train.py": [("DIM: flag(", "WIDER: flag(number(0), NETWORK) = 0.0  # a trial option\nDIM: flag(")],
               "modules.py": [('condition="", *,', 'condition="", wider=0.0, *,'),
                              ("= patch_size, pixel_width, condition\n",
                               "= patch_size, pixel_width, condition\n        self.wider = wider\n")]}
    for name in ("dataset.py", "modules.py", "train.py", *(str(p.relative_to(ROOT)) for p in ROOT.glob("oasis/*.py"))):
        text = (ROOT / name).read_text(encoding="utf-8")
        for old, new in changes.get(name, []):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "dataset").symlink_to(ROOT / "dataset")
    shutil.copy(PROGRAMS / "trial_option.py", tmp_path)
    (tmp_path / "oasis64.safetensors").symlink_to(ROOT / "checkpoint" / "oasis64.safetensors")
    command = [sys.executable, "trial_option.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0.5, 0.5, 0.0]
