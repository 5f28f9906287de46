"""Run scripts one after another in one process, each as `python SCRIPT ARGUMENT…` would run it.

Reads a JSON list of [SCRIPT, ARGUMENT, …] from stdin. Prints a JSON list of [exit status, end of the output].
"""
import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

results = []
for script, *arguments in json.load(sys.stdin):
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    results.append([status, output.getvalue()[-2000:]])
print(json.dumps(results))
