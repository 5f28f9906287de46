"""A run's folder: its lock, settings, states, model file, log and samples. Only Run writes there.

A state holds everything that training needs to continue: the parameters, their EMA, the optimizer, the step, the run's
settings and the rows of the log. Each of its tensors has a checksum, so a damaged state is noticed, and the state
before it is used. A lost or damaged model file is written again when training continues, and the log at the next save.
Only --restart starts a run over.
"""
import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from filelock import FileLock, Timeout
from tqdm import tqdm

from modules import save_model
from oasis.conditions import random_indices, with_indices
from oasis.files import (OasisError, command_line, first_line, flush_file, flush_folder, image_grid, make_folder,
                         replacing, write_png)
from oasis.log import LOSSES, StepStats, plot_losses, write_log
from oasis.modelfile import read_model
from oasis.settings import as_flag
from oasis.states import find_states, read_record, remove_partial_files, write_state_list

# Without this, newer versions of filelock use a marker file on a drive without locks. It outlives a killed training.
LOCK_OPTIONS = {name: False for name in ("fallback_to_soft",) if name in inspect.signature(FileLock).parameters}
MAX_FAILED_SAVES = 3       # in a row, after which the training stops: a full disk may soon have space again
DIVERGED = ("Continue from the last save with --precision float32. If this was the precision, give --restart and a "
            "lower --learning-rate; to keep the phases before, also --first-phase and --initial-model.")
STATES = 2                 # that are kept: if the newest is damaged, the one before it is used


class FolderTaken(OasisError):
    """Another training uses the run's folder, so nothing may be written there."""


def run_folder(flags):
    """Return the Path of the run's folder, such as checkpoint/oasis128."""
    return Path(flags.ckpt_path) / f"{'demo' if flags.demo else 'oasis'}{flags.image_size}"


class Run:
    """A context manager that locks a run's folder, and reads and writes its files. Only the chief creates a Run.

    settings: {name: value} that must not differ when the run is resumed. metadata: {name: value} for the model file.
    restart: rename the existing run and start over. checksum: a checksum of the training images, which JSON can hold;
    None: unknown.
    """

    def __init__(self, folder, settings, metadata, restart=False, checksum=None):
        self.folder = Path(folder)
        self.settings, self.metadata, self.restart, self.checksum = settings, metadata, restart, checksum
        self.rows, self.initial_images = [], 0  # initial_images: those that --initial-model was trained on
        self.stats = StepStats()
        self.failed_saves = 0
        self.warned = set()
        self.events = None

    def __enter__(self):
        if found := set("*?[") & set(str(self.folder.absolute())):
            raise OasisError(f"{self.folder.absolute()}: TensorFlow finds no state in a folder with {min(found)} in "
                             "its name. Choose another --ckpt-path.")
        self.take_lock()
        return self

    def __exit__(self, *_):
        self.lock.release()

    # ---- lock

    def take_lock(self):
        """Create the folder if it is missing and lock it, so that no other process trains in it.

        The operating system releases the lock when this process ends, even if it is killed. self.locked is the os.stat
        of the lock file, by which reacquire_lock recognizes it. On a drive without locks, take_lock only prints a
        warning. Raises FolderTaken if another training holds the lock, and OasisError if the folder is not writable.
        """
        path = make_folder(self.folder) / "lock"
        lock = FileLock(path, timeout=0, **LOCK_OPTIONS)
        try:
            lock.acquire()
        except Timeout:
            raise FolderTaken(f"{self.folder.absolute()}: another training is running in this folder. "
                              "Wait for its end, or choose another --ckpt-path.") from None
        except (OSError, NotImplementedError) as error:
            try:
                path.touch()
            except OSError as reason:
                raise OasisError(f"cannot write {path.absolute()}: {reason.strerror}. "
                                 "Choose another --ckpt-path.") from error
            # Some network drives have no locks.
            self.warn("lock", f"{self.folder.absolute()} cannot be locked ({first_line(error)}): "
                              "do not run two trainings in it at a time")
        self.lock, self.locked = lock, path.stat()

    def reacquire_lock(self):
        """Create the folder and lock it again if the folder or its lock file was removed during training.

        Raises FolderTaken if another training has locked the folder since then.
        """
        try:
            if os.path.samestat(self.locked, os.stat(self.folder / "lock")):
                return
        except OSError:
            pass
        old = self.lock
        self.take_lock()
        old.release()
        self.events = None
        self.write_settings()
        tqdm.write(f"warning: {self.folder.absolute()} was removed during training: created again", sys.stderr)

    # ---- start and resume

    @property
    def is_new(self):
        """Whether start() will restore no state."""
        return self.restart or not find_states(self.folder / "state")

    def rename_existing(self):
        """Give the existing run, if there is one, another name, such as oasis128.old-1. Return its Path, or None."""
        if not {path.name for path in self.folder.iterdir()} - {"lock"}:
            return None
        kept = next(path for k in range(1, 10**6)
                    if not (path := self.folder.with_name(f"{self.folder.name}.old-{k}")).exists())
        self.lock.release()             # Windows does not rename a folder with an open file in it
        try:
            self.folder.rename(kept)
        except OSError as error:
            raise OasisError(f"cannot rename {self.folder.absolute()}: {error.strerror}. Close the programs that "
                             "use it, such as TensorBoard, or choose another --ckpt-path.") from error
        print(f"the existing run is kept as {kept.absolute()}")
        self.take_lock()
        return kept

    def start(self, trainer):
        """Restore the newest usable state into the trainer, or, with restart, rename the existing run.

        A state is usable if it is undamaged and has this run's settings. start also writes settings.json, and writes
        the model file again if it is missing, damaged, older than the state or of another run. Raises OasisError if no
        state is usable, or if the folder holds other files of a run but no state.
        """
        if self.restart:
            self.rename_existing()
        folder = make_folder(self.folder / "state")
        states = find_states(folder)
        left = [name for name in ("model.safetensors", "log.csv", "samples") if (self.folder / name).exists()]
        if states:
            record = self.restore(trainer, states)
            self.rows, self.initial_images = record["rows"], record["initial_images"]
            self.stats = StepStats(**record.get("stats", {}))  # states of older versions have none
            self.check_data(record)
        elif left:
            raise OasisError(f"{self.folder.absolute()}: holds {left[0]} but no state to continue from. "
                             "Give --restart to start over (this run is kept), or another --ckpt-path.")
        self.write_settings()
        states = states[-STATES:]  # a killed training may have left an older one
        remove_partial_files(self.folder, states)
        write_state_list(folder, states)
        self.record = tf.Variable("")
        checkpoint = tf.train.Checkpoint(root=trainer.checkpoint, record=self.record)
        self.manager = tf.train.CheckpointManager(checkpoint, str(folder), STATES)
        if states:
            self.repair_model_file(trainer)

    def changed_settings(self, old):
        """Return {name: value in old} of the settings that differ from this run's. old: the settings in a file.

        "auto", which load_data() has not resolved yet, equals any value.
        """
        return {name: old[name] for name, value in self.settings.items()
                if name in old and value not in (old[name], "auto")}

    def check_settings(self):
        """Raise OasisError if the newest state has other settings, as start() does later."""
        for path in find_states(self.folder / "state")[-1:]:
            try:
                changed = self.changed_settings(read_record(path)["settings"])
            except Exception:  # start() skips a damaged state
                continue
            if changed:
                raise self.other_settings(changed)

    def other_settings(self, changed):
        """The OasisError for a run with other settings. changed: changed_settings() of its newest state."""
        was = "; ".join(f"{as_flag(name, old)}, not {command_line(str(self.settings[name]))}"
                        for name, old in changed.items())
        give = " ".join(as_flag(name, old) for name, old in changed.items())
        return OasisError(f"{self.folder.absolute()} was started with {was}. Give {give} to continue it, "
                          "--restart to start over (this run is kept), or another --ckpt-path.")

    def check_data(self, record):
        """Raise OasisError if the images have another description than in a record, and warn of another checksum.

        With --skip-unreadable, which may be given later, the number of images may change: then it only warns.
        """
        old, new = record.get("data"), self.metadata.get("data")
        if not (old and new):
            return
        if old != new and self.metadata["skip_unreadable"]:
            self.warn("data", f"{self.folder.absolute()} was trained on {old} so far. It continues with {new}.")
        elif old != new:
            raise OasisError(f"{self.folder.absolute()} was trained on {old}, not on {new}. Give the same --path to "
                             "continue it, --restart to start over (this run is kept), or another --ckpt-path, perhaps "
                             f"with --initial-model {self.folder}.")
        elif self.checksum != record.get("checksum", self.checksum):
            self.warn("data", f"{self.folder.absolute()} was trained on other images so far: as many, with other "
                              "pixels or slice indices. It continues with those at --path.")

    def restore(self, trainer, states):
        """Restore the newest state that is undamaged and has this run's settings. Return its record.

        states: see find_states; the restored state moves to the end of this list. Raises OasisError if no state can be
        used.
        """
        changed, skipped = None, []
        for path in reversed(states):
            try:
                record = read_record(path)
                if self.changed_settings(record["settings"]):
                    changed = changed or record
                    raise OasisError("made with other settings")
                trainer.checkpoint.restore(path).assert_existing_objects_matched().expect_partial()
                if not is_finite(trainer):
                    raise OasisError("its parameters hold NaN or infinite values")
            except Exception as error:
                # each kind of damage raises another class: OpError, IndexError, AssertionError …
                reason = first_line(error)[:200]
                skipped.append(f"{Path(path).absolute()} is not used ({reason})")
                continue
            for line in skipped:
                print(line)
            states.append(states.pop(states.index(path)))
            return record
        if changed:
            self.check_data(changed)  # an error about the data says more: --flips auto depends on them
            raise self.other_settings(self.changed_settings(changed["settings"]))
        print(*skipped, sep="\n")
        raise OasisError(f"{self.folder.absolute()}/state: no state there can be used, for the reasons above. "
                         "Give --restart to start over (this run is kept), or another --ckpt-path.")

    def repair_model_file(self, trainer):
        """Write the model file again if it is missing, damaged, older than the state or of another run."""
        file, step = self.folder / "model.safetensors", int(trainer.step.numpy())
        try:
            settings = read_model(file)[1]
            if not self.changed_settings(settings) and settings.get("step", 0) >= step:
                if settings["step"] > step:
                    print(f"{file.absolute()} is of step {settings['step']:,}, "
                          f"but the newest state is of step {step:,}")
                return
        except OasisError:
            print(f"{file.absolute()} is written again from the state: it is missing or damaged")
        self.write_model(trainer)

    # ---- save

    def save(self, trainer, row=None, last=False):
        """Write the state, then the model file that predict.py reads. row: a new row of the log, or None.

        A failed save is reported, and the next save tries again. Raises OasisError for the third failure in a row, for
        a failure if this save is the `last`, and if the folder was removed and another training uses it now.
        """
        if row is not None:
            self.rows.append(row)
        if not is_finite(trainer):  # no such state may replace a good one
            raise OasisError(f"{self.folder.absolute()}: the parameters hold NaN or infinite values at step "
                             f"{int(trainer.step.numpy()):,} and are not saved. {DIVERGED}")
        errors = []
        for write in (self.reacquire_lock, lambda: self.write_state(trainer), lambda: self.write_model(trainer)):
            try:
                write()
            except FolderTaken:
                raise
            except (OasisError, OSError, tf.errors.OpError) as error:
                errors.append(first_line(error))
        self.failed_saves = self.failed_saves + 1 if errors else 0
        if errors and (last or self.failed_saves == MAX_FAILED_SAVES):
            raise OasisError(f"step {int(trainer.step.numpy()):,} could not be saved: {errors[0]} "
                             "The previous save is intact: the same command, without --restart, continues from there.")
        if errors:
            tqdm.write("warning: not saved. Training continues and tries again at the next save: "
                       f"{errors[0]}", sys.stderr)

    def write_settings(self):
        with replacing(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")

    def write_state(self, trainer):
        """Write everything that training changes, and a record of the settings, the data, the log, the statistics since
        its last row, and initial_images.

        The manager deletes the oldest state before the new one is flushed to the disk. It keeps two states, so the
        previous one survives a power cut in between.
        """
        self.record.assign(json.dumps({"settings": self.settings, "data": self.metadata.get("data"), "rows": self.rows,
                                       "stats": self.stats.as_dict(), "checksum": self.checksum,
                                       "initial_images": self.initial_images}))
        try:
            state = Path(self.manager.save(checkpoint_number=int(trainer.step.numpy())))
            for file in [*state.parent.glob(f"{state.name}.*"), state.with_name("checkpoint")]:
                flush_file(file)
            for folder in state.parent, self.folder, self.folder.parent:
                flush_folder(folder)
        except (tf.errors.OpError, OSError) as error:
            remove_partial_files(self.folder, self.manager.checkpoints)
            raise OasisError(f"cannot write {self.folder.absolute()}/state: {first_line(error).split('; ')[-1]}. "
                             "Free some space.") from error

    def write_model(self, trainer):
        step = int(trainer.step.numpy())
        settings = {**self.metadata, **trainer.network.settings, **trainer.diffusion.settings,
                    "step": step, "images": self.initial_images + step * self.metadata["batch_size"]}
        with trainer.using_ema():
            save_model(self.folder / "model.safetensors", trainer.network, settings)

    # ---- files that training does not need

    def attempt(self, name, write, *arguments):
        """Call write(path, *arguments) with the path of the file or folder `name`, which training does not need.

        If this fails, warn once and go on.
        """
        try:
            write(self.folder / name, *arguments)
        except Exception as error:  # no error in a plot may end the training
            self.warn(name, f"{self.folder.absolute()}/{name}: not written. Training continues without it "
                            f"({first_line(error)})")

    def warn(self, kind, message):
        """Print a warning on stderr. Only the first message of each kind is printed, not one at every save."""
        if kind not in self.warned:
            tqdm.write(f"warning: {message}", sys.stderr)
        self.warned.add(kind)

    def log(self):
        """Write log.csv and loss.png, with all rows, and TensorBoard events of the newest row. A failure only warns."""
        loss_name = f"loss ({self.settings['loss']}, {self.settings['objective']})"
        self.attempt("log.csv", write_log, self.rows)
        self.attempt("loss.png", plot_losses, self.rows, loss_name)
        self.attempt("events", self.write_events)

    def write_events(self, folder):
        row = self.rows[-1]
        with self.event_writer(folder, row["step"]):
            for name in (*LOSSES, "gradient_norm", "skipped", "images_per_second"):
                tf.summary.scalar(name, float(row[name]))
        self.events.flush()

    def event_writer(self, folder, step):
        self.events = self.events or tf.summary.create_file_writer(str(folder))
        return self.events.as_default(step=step)

    def write_samples(self, trainer, count):
        """Generate `count` images with the EMA. Write them as one grid, samples/step_NNNNNNN.png, and to TensorBoard.

        With the condition slice, each image gets an index drawn from its seed, the same at every save.
        """
        def write(folder):
            size, step = trainer.diffusion.image_size, int(trainer.step.numpy())
            shape, indices = (count, size, size, 1), random_indices(self.metadata, range(count))
            cond = with_indices(self.metadata["condition"], shape, indices) if indices else None
            grid = image_grid(trainer.sample(shape, cond), columns=4)
            write_png(folder / f"step_{step:07d}.png", grid)
            with self.event_writer(self.folder / "events", step):
                tf.summary.image("samples", grid[None, :, :, None])
        self.attempt("samples", write)


class Follower:
    """Takes the place of Run in all workers but the chief. The chief alone restores, sends and writes the state.

    MultiWorkerMirroredStrategy requires all workers to save. A Follower saves to a temporary folder and removes it.
    """
    is_new = False  # the chief sends its parameters

    def __init__(self, folder):
        self.folder, self.stats = Path(folder), StepStats()

    def __enter__(self):
        self.scratch = tempfile.mkdtemp(prefix="oasis-worker-")
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self, trainer):
        self.manager = tf.train.CheckpointManager(trainer.checkpoint, self.scratch, max_to_keep=1)

    def save(self, trainer, row=None, last=False):
        self.manager.save(checkpoint_number=int(trainer.step.numpy()))

    def log(self):
        """Do nothing: only the chief worker writes the log."""

    def write_samples(self, trainer, count):
        """Do nothing: only the chief worker writes the samples."""


def is_finite(trainer):
    """Whether all parameters and their EMA are finite numbers."""
    return all(np.isfinite(parameter.numpy()).all() for parameter in (*trainer.parameters, *trainer.ema_parameters))
