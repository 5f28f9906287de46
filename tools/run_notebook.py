"""Run a notebook top to bottom as Jupyter does, with other values for the constants of its first code cell.

    python tools/run_notebook.py colab.ipynb RUNS=/tmp/runs MAX_STEPS=4

It needs nbclient and ipykernel, and does not change the notebook itself. .ci/run calls it.
"""
import ast
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(path, *constants):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in (constant.split("=", 1) for constant in constants):
        default = ast.literal_eval(re.search(rf"^{name} = (\S+)", first.source, flags=re.MULTILINE)[1])
        line = f"{name} = {type(default)(value)!r}"
        first.source = re.sub(rf"^{name} = \S+", lambda _: line, first.source, flags=re.MULTILINE)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": Path(path).resolve().parent}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", output.get("data", {}).get("text/plain", ""))
            print("\n".join(line for line in text.splitlines() if "%|" not in line))  # without the progress bars


if __name__ == "__main__":
    main(*sys.argv[1:])
