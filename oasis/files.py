"""Errors for the user, checks of values, and files that are written completely or not at all."""
import contextlib
import errno
import hashlib
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TRACEBACK = " ", "Graph execution error:", "Detected at node", "<stack traces"  # beginnings of TensorFlow's lines


def printable(text):
    """Return the text in one line. Line breaks, bytes that are not UTF-8 and the like become escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def first_line(error):
    """The first line of an exception's message, without what TensorFlow adds: headings, tracebacks, names of nodes."""
    text = re.sub(r"{{.*?}} ?|\[Op:\w+\]|\d+ root error\(s\) found\.\s+\(0\) ", "", str(error).strip())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(TRACEBACK)]
    return (lines or [type(error).__name__])[0].strip()[:1000]


class OasisError(Exception):
    """An error that the user can fix. The message is one line: it names the file, what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(printable(message))


def run_script(main):
    """Run a script's main() and exit with its result as the status, 2 after an OasisError or 130 after Ctrl-C.

    An OasisError becomes one line on stderr. Characters that the terminal's encoding lacks become escapes.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except OasisError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class FailSafeStream:
    """A text stream whose failed writes are ignored: a full disk or a closed terminal must not end a long training."""
    failures = OSError, ValueError  # a ValueError if the stream is closed

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(self.failures):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(self.failures):
            self.stream.flush()


def import_tensorflow():
    """Import TensorFlow with oneDNN and without the notices that would hide the messages of a script.

    By default, TensorFlow uses oneDNN only on CPUs with new instructions. With AVX2 alone, oneDNN trains 1.4 times as
    fast. Since TensorFlow 2.18 no log setting suppresses the first notices, so stderr is redirected during the import.
    If the import fails, the notices are printed after all.
    """
    if sys.stderr is None:  # the script was started with a closed stderr
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever other programs of this user need
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except KeyboardInterrupt:
            os.write(stderr, b"interrupted\n")
            raise SystemExit(130) from None
        except BaseException:
            notices.seek(0)
            os.write(stderr, notices.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def check_choice(name, value, choices):
    """Raise OasisError unless the value is one of the choices."""
    if value not in choices:
        raise OasisError(f"{name} {value!r} is not one of {', '.join(choices)}")


def check_range(name, value, minimum, maximum):
    """Raise OasisError unless minimum ≤ value ≤ maximum."""
    if not minimum <= value <= maximum:
        raise OasisError(f"{name} {value} is not between {minimum} and {maximum}")


def nearest_multiples(value, unit):
    """The one or two positive multiples of `unit` nearest to an integer, in rising order."""
    return sorted({max(value // unit, 1) * unit, max(-(-value // unit), 1) * unit})


def check_image_size(image_size, patch_size, levels):
    """Raise OasisError, naming the nearest sizes that work, unless patches and levels divide the image size."""
    unit = patch_size * 2**(levels - 1)
    if image_size % unit or image_size < unit:
        nearest = nearest_multiples(image_size, unit)
        raise OasisError(f"--image-size {image_size}: --patch-size {patch_size} and {levels} levels need a multiple of "
                         f"{unit}; the nearest {'is' if len(nearest) == 1 else 'are'} "
                         f"{' and '.join(map(str, nearest))}")


def command_line(*parts):
    """The words of a command as one line that can be pasted into a shell; a path in this folder is shortened."""
    words = [os.path.relpath(part) if isinstance(part, Path) and Path.cwd() in part.parents else str(part)
             for part in parts]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def code_digests(*patterns):
    """Return {path: first 12 hex digits of the SHA-256} of the repository's files that match the glob patterns."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


def flush_file(path):
    """Flush an existing file to the disk (fsync), so that it survives a power failure."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path):
    """Write to the disk which files a folder holds. Windows does this by itself."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no fsync for folders
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replacing(path):
    """Replace the file `path` by one that the block writes: a context that yields a temporary path in the same folder.

    If the block succeeds, the temporary file is flushed to disk and renamed to `path`. A reader, a crash or a power
    failure at any moment finds the old file or the new one, never half of one. The temporary path keeps the suffix of
    `path`. Raises OasisError if the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush_file(temporary)
            os.replace(temporary, path)
            flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OasisError(f"cannot write {path.absolute()}: {error.strerror or error}. "
                         "Free some space or choose a folder that can be written.") from error


def make_folder(path):
    """Create a folder if it is missing, and return its Path. Raises OasisError if the folder is not writable."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OasisError(f"cannot write {path.absolute()}: {error.strerror}. Choose another folder.") from error
    return path


def write_png(path, image):
    """Write uint8 (H, W) grey or (H, W, 3) colour as a PNG, completely or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary)


def image_grid(images, columns=None):
    """Put images, uint8 (N, H, W, 1), row by row into one, uint8 (rows·H, columns·W). Empty places are black.

    columns: by default ⌈√N⌉, for a grid that is nearly square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = np.zeros((rows * columns - len(images), *images.shape[1:]), np.uint8)
    return rearrange(np.concatenate([images, blank]), "(rows columns) h w 1 -> (rows h) (columns w)", columns=columns)
