"""Run a notebook top to bottom as Jupyter does, with other values for the constants of its first code cell.

    python tools/run_notebook.py colab.ipynb RUNS=/tmp/runs MAX_STEPS=4
    python tools/run_notebook.py colab.ipynb RUNS=runs --save    # also write the outputs to the notebook

It needs nbclient and ipykernel. Without --save it does not change the notebook. .ci/run calls it.
"""
import ast
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def without_progress(text):
    """The text without the lines of progress bars and without empty lines."""
    return "".join(f"{line}\n" for line in re.split(r"[\r\n]+", text) if "%|" not in line and line.strip())


def main(path, *arguments):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source = first.source
    for name, value in (argument.split("=", 1) for argument in arguments if argument != "--save"):
        default = ast.literal_eval(re.search(rf"^{name} = (\S+)", first.source, flags=re.MULTILINE)[1])
        line = f"{name} = {type(default)(value)!r}"
        first.source = re.sub(rf"^{name} = \S+", lambda _: line, first.source, flags=re.MULTILINE)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": Path(path).resolve().parent}},
                   record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = without_progress(output.text)
            print(output.get("text", output.get("data", {}).get("text/plain", "")))
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "image")]
    if "--save" in arguments:
        first.source = source
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
