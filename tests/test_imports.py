"""The source code itself: which module imports which, and how long functions are."""
import ast
import os
import subprocess
import sys

import pytest

from helpers import ROOT, imports_of

FILES = sorted(path.relative_to(ROOT).as_posix() for folder in ("", "oasis") for path in (ROOT / folder).glob("*.py"))
SCRIPTS = {"train.py", "predict.py", "evaluate.py"}


def reachable(path):
    """All of the repository's modules that a module imports, directly or through others."""
    found, new = set(), imports_of(path)
    while new:
        found |= new
        new = {file for path in new for file in imports_of(path)} - found
    return found


def test_imports_of_finds_every_kind_of_import():
    assert {"modules.py", "dataset.py", "oasis/files.py", "oasis/cluster.py"} <= imports_of("train.py")
    assert "oasis/workers.py" in imports_of("oasis/cluster.py")
    assert {"predict.py", "oasis/features.py"} <= imports_of("evaluate.py")
    assert SCRIPTS <= set(FILES) and len(FILES) > 15


def test_a_script_runs_with_a_closed_stderr():
    program = "from oasis.files import import_tensorflow; import_tensorflow(); print('imported')"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout == "imported\n"


def test_scripts_use_the_tensorflow_backend_and_any_encoding_of_the_terminal():
    """Latin-1 has no square root, which is in the help texts. Other programs of the user may need another backend."""
    program = ("from oasis.files import import_tensorflow, run_script; import_tensorflow(); import tensorflow as tf; "
               "run_script(lambda: print('√', tf.keras.backend.backend()))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1", "KERAS_BACKEND": "numpy"})
    assert done.returncode == 0 and done.stdout == "\\u221a tensorflow\n"


def test_ctrl_c_during_the_import_of_tensorflow_is_one_line(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise KeyboardInterrupt")
    program = "from oasis.files import import_tensorflow; import_tensorflow()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          text=True, stderr=subprocess.PIPE)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


@pytest.mark.parametrize("path", FILES)
def test_no_module_imports_itself_through_others(path):
    assert path not in reachable(path)


@pytest.mark.parametrize("name", ["files", "settings", "modelfile", "parameters", "noise", "loop", "fused", "devices",
                                  "replicas", "cluster", "workers", "log", "states", "signals"])
def test_the_lower_modules_know_neither_scripts_nor_modules(name):
    assert not reachable(f"oasis/{name}.py") & {*SCRIPTS, "modules.py", "dataset.py"}


def test_no_module_imports_at_its_top_what_windows_lacks():
    for path in [*FILES, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py"))]:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not names & {"fcntl", "resource", "pwd", "grp", "termios"}, path


def test_no_function_of_modules_is_longer_than_45_lines():
    tree = ast.parse((ROOT / "modules.py").read_text())
    lengths = {f"{node.name} in line {node.lineno}": node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert len(lengths) > 50 and {name: length for name, length in lengths.items() if length > 45} == {}
