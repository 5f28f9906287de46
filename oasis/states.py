"""The states in the folder state/ of a run: files of tf.train.Checkpoint, such as ckpt-300.index and ckpt-300.data-….

Training may be killed while TensorFlow writes them, so what lies there may be incomplete.
"""
import json
import re
import shutil
from pathlib import Path

import tensorflow as tf

from oasis.files import replacing


def find_states(folder):
    """The states in a folder, that of the lowest step first, each as its checkpoint prefix, such as …/ckpt-300.

    A state has an index file and data files. A state that lacks some of them is in the list, too.
    """
    names = {re.match(r"ckpt-([0-9]+)\.(?:index|data-)", path.name) for path in folder.glob("ckpt-*")} - {None}
    return [str(folder / f"ckpt-{step}") for step in sorted({int(name[1]) for name in names})]


def write_state_list(folder, states):
    """Write the file `checkpoint`, which tells CheckpointManager the states and their order. Without states, delete it.

    states: checkpoint prefixes, as find_states returns them.
    A killed training may have left this file outdated. When there are too many states, CheckpointManager deletes the
    first of the list.
    """
    lines = [f"model_checkpoint_path: {json.dumps(Path(states[-1]).name)}"] if states else []
    for i, path in enumerate(states):
        lines += [f"all_model_checkpoint_paths: {json.dumps(Path(path).name)}",
                  f"all_model_checkpoint_timestamps: {i + 1}"]
    if not lines:
        (folder / "checkpoint").unlink(missing_ok=True)
        return
    with replacing(folder / "checkpoint") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def read_record(path):
    """Read the record of a state, which Run.write_state stored in it: a dict of the settings, the log rows and more."""
    return json.loads(tf.train.load_checkpoint(path).get_tensor("record/.ATTRIBUTES/VARIABLE_VALUE"))


def remove_partial_files(folder, states):
    """Delete what a killed training leaves in a run's folder: temporary files and unfinished states.

    states: the states to keep, see find_states.
    """
    patterns = [".settings.*.json", ".model.*.safetensors", ".log.*.csv", ".loss.*.png", "samples/.step_*.*.png",
                "state/.checkpoint.*", "state/checkpoint.tmp*", "state/ckpt-*"]
    kept = {Path(state).name for state in states}
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.parent.name == "state" and path.name.split(".")[0] in kept:
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
