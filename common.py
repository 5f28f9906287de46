"""What the scripts share: the error a user sees, flags made from constants, files that are never half written."""
import argparse
import contextlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image


class OasisError(Exception):
    """Something the user can mend: the message names the file, what is wrong and what to do, in one line."""


def run_script(main):
    """Run a script's main(); an OasisError becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        sys.exit(main())
    except OasisError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Unfailing:
    """A stream that goes on where a write fails: a log on a full disk or a closed terminal may not end a night of training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def quiet_tensorflow():
    """Import TensorFlow without the notices that it writes to stderr at start-up: the messages of a script would drown.

    Since 2.18 they come before any setting is read, so file descriptor 2 is turned away meanwhile. Where the import
    fails, what was written is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except BaseException:
            notices.seek(0)
            os.write(stderr, notices.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


# ------------------------------------------------------------------------------------------------------------ flags

def integer(minimum=1, maximum=2**63 - 1):
    """An argparse type: an integer in [minimum, maximum]."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not in {minimum} … {maximum}")
        return value
    return parse


def number(minimum=0.0, maximum=math.inf, above=False):
    """An argparse type: a finite float of at least minimum (or above it) and at most maximum."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not minimum <= value <= maximum or above and value == minimum:
            bound = f"above {minimum:g}" if above else f"at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}" + (f" and at most {maximum:g}" if maximum < math.inf else ""))
        return value
    return parse


def auto_or(parse):
    """An argparse type: the word auto, or what `parse` takes."""
    return lambda text: text if text == "auto" else parse(text)


def nearest_multiples(value, unit):
    """The one or two positive multiples of unit that are nearest to an integer, rising: what to take instead of it."""
    return sorted({max(value // unit, 1) * unit, -(-value // unit) * unit})


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are OasisErrors: one line, exit status 2."""

    def error(self, message):
        raise OasisError(f"{message} (see --help)")


def flags_from_constants(script, constants, types=()):
    """A parser with one flag for each constant in the first block of them in a script: CKPT_PATH becomes --ckpt-path.

    script: the path of the script; the comment beside a constant is the help text of its flag.
    constants: the script's globals(), where the defaults are.
    types: {"CKPT_PATH": type or tuple of choices}; otherwise the type of the default is used, integers from 1 and
    floats above 0. A constant that is False becomes a switch.
    """
    block = re.search(r"(?:^[A-Z][A-Z_]* = .*\n)+", Path(script).read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    parser = FlagParser(description=constants["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    types = dict(types)
    for name, comment in re.findall(r"^([A-Z][A-Z_]*) = .*?  # (.+)$", block, flags=re.MULTILINE):
        default, flag = constants[name], "--" + name.lower().replace("_", "-")
        kind = types.get(name, {int: integer(), float: number(above=True)}.get(type(default), str))
        comment = comment.replace("%", "%%")
        if default is False:
            parser.add_argument(flag, action="store_true", help=comment)
        elif isinstance(kind, tuple):
            parser.add_argument(flag, choices=kind, default=default, help=f"{comment} ({default})")
        else:
            metavar = {int: "N", float: "X"}.get(type(default), "TEXT")
            parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{comment} ({default})")
    return parser


# ------------------------------------------------------------------------------------------------------------ files

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; when the block ends well it is flushed to disk and renamed to `path`.

    A reader, or a crash at any moment, finds the old file or the new one, never half of one. The temporary path
    keeps the ending of the name. Raises OasisError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OasisError(f"cannot write {path.absolute()}: {error.strerror or error}. "
                         "Free some space or choose a folder that can be written.") from error


def make_folder(path):
    """The folder, made if it was not there; raises OasisError where it cannot be written, before any work is lost on it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OasisError(f"cannot write {path.absolute()}: {error.strerror}. Choose another folder.") from error
    return path


def write_png(path, image):
    """Write uint8 (H, W) grey or (H, W, 3) colour as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary)


def image_grid(images, columns=None):
    """uint8 (N, H, W, 1) as one picture (rows·H, columns·W), row by row, black where there are none; nearly square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = np.zeros((rows * columns - len(images), *images.shape[1:]), np.uint8)
    return rearrange(np.concatenate([images, blank]), "(rows columns) h w 1 -> (rows h) (columns w)", columns=columns)
