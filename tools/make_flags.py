"""Write docs/flags.md: every flag of the three scripts, from the constants that define them.

    python tools/make_flags.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oasis.files import ROOT, import_tensorflow

import_tensorflow()  # before anything imports TensorFlow

import evaluate
import predict
import train
from oasis import recipes
from oasis.settings import NETWORK, RESUMABLE, flag_name

PAGE = ROOT / "docs" / "flags.md"
HEAD = """# All flags

Every flag of the three scripts, its default and what it does. `python tools/make_flags.py` makes this page from the
constants at the top of the scripts and of `oasis/sources.py`. A run may be resumed with other values of the flags
marked ↻; `--path` must still hold as many images and subjects. The flags marked ◆ shape the network.
"""
RECIPES = """
## The recipes

What `--recipe` sets in place of the defaults above. `original` sets nothing. `oasis64` is phase 1 of the table,
`oasis128` has phases 1 to 3, and `oasis256` has all four: a phase starts from the model of the phase before it.
`--first-phase 4 --initial-model oasis128` begins with the last phase of `oasis256`. A given `--seed` is added to the
seed of each phase. The patch size S / 64 is rounded down to one that fits the image.
No phase reaches the EMA decay of 0.9999: (1 + step)/(10 + step) is smaller in all of its steps.

"""


def table(settings, marked):
    """A Markdown table of {name: Setting}. marked: whether it marks the flags that shape the network or may change."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for name, default, kind, facts, text in settings.values():
        marks = " ↻" * (marked and RESUMABLE in facts) + " ◆" * (marked and NETWORK in facts)
        choices = f" ({', '.join(kind)})" if isinstance(kind, tuple) else ""
        shown = "" if default == "" or kind is bool else f"`{default}`"
        rows.append(f"| `{flag_name(name)}`{marks} | {shown} | {text}{choices} |".replace(str(ROOT) + "/", ""))
    return "\n".join(rows)


def recipe_table():
    """A Markdown table: a row for each flag that recipes set, a column for `recommended` and each phase of oasis256."""
    columns = {"`recommended`": recipes.RECOMMENDED,
               **{f"phase {i}": phase for i, phase in enumerate(recipes.RECIPES["oasis256"], 1)}}
    lines = [["flag", *columns], ["---"] * (len(columns) + 1)]
    for name in train.SETTINGS:
        found = [phase.get(name, "") for phase in columns.values()]
        values = ["S / 64" if callable(value) else str(value) for value in found]
        if any(values):
            lines.append([f"`{flag_name(name)}`", *values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page():
    """The text of docs/flags.md."""
    scripts = train, predict, evaluate
    return HEAD + "".join(f"\n## {script.__name__}.py\n\n{table(script.SETTINGS, script is train)}\n"
                          for script in scripts) + RECIPES + recipe_table()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
