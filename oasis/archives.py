"""The files of --path: a folder, a zip or a single file. They are read in place; nothing is ever unpacked."""
import contextlib
import os
import threading
import zipfile
from pathlib import Path

from oasis.files import OasisError
from oasis.subjects import split_of

MAX_NAME = 4096     # characters of a name in a zip; Python cannot convert a number of more than 4300 digits


@contextlib.contextmanager
def naming(file, advice):
    """Turn an exception of the block into an OasisError that names the file, the reason and the advice.

    Every Exception is caught, because a damaged file makes zipfile, Pillow and nibabel raise almost any class: OSError,
    SyntaxError, ValueError, EOFError, RuntimeError (an encrypted member), struct.error, zlib.error, BadZipFile, …
    """
    try:
        yield
    except Exception as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise OasisError(f"{file}: {reason.rstrip('.')}. {advice}".rstrip()) from error


def is_hidden(name):
    """Whether a file or folder is hidden, or is one of those that macOS adds to a folder or zip."""
    return name.startswith(".") and name not in (".", "..") or name == "__MACOSX"


def identity(name):
    """A value that is equal for all links to a file or folder; the name itself if the system has no such value."""
    with contextlib.suppress(OSError):      # a broken link: reading it raises the error
        status = os.stat(name)
        if status.st_ino:
            return status.st_dev, status.st_ino
    return name


def walk(folder, above=()):
    """Yield (folder, [its files]) for a folder and for all folders below it. Hidden ones and hidden files are left out.

    Links are followed, except links to a folder in which they lie. above: the identities of the folders above. Raises
    OasisError for a folder that cannot be listed.
    """
    above = (*above, identity(folder))
    if above[-1] in above[:-1]:
        return
    try:
        with os.scandir(folder) as entries:
            paths = sorted(entry.path for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise OasisError(f"{folder}: {error.strerror}") from error
    folders = list(filter(os.path.isdir, paths))
    yield folder, sorted({*paths} - {*folders})
    for path in folders:
        yield from walk(path, above)


class Folder:
    """The files below a folder, or only the files `names`. Hidden files and folders are left out.

    Of several links to a file, one is kept, if possible one in the folder of a split.
    """

    def __init__(self, path, names=None):
        self.path, self.names = path, names
        if names is None:
            found, links = [name for _, files in walk(path) for name in files], {}
            for name in sorted(found, key=lambda name: split_of(self.relative(name)) is None):
                links.setdefault(identity(name), name)
            self.names = list(links.values())

    def location(self, name):
        """The name of a file for messages."""
        return name

    def relative(self, name):
        """The path of a file relative to the folder, with slashes."""
        return Path(name).relative_to(self.path).as_posix()

    def read(self, name, limit):
        """Read at most the first `limit` bytes of a file. The method is thread-safe."""
        with open(name, "rb") as file:
            return file.read(limit)

    def stamp(self, names):
        """A value that changes when one of these files changes."""
        stamps = []
        for name in names:
            with contextlib.suppress(OSError):  # reading the file raises the error
                status = os.stat(name)
                stamps.append((status.st_size, status.st_mtime_ns))
        return stamps


class Zip:
    """The members of an open zip, with the methods of Folder. stack: the ExitStack that closes the zip."""

    def __init__(self, path, stack):
        self.path = path
        file = stack.enter_context(open(path, "rb"))
        status = os.fstat(file.fileno())        # not os.stat(path): another file may have replaced this one
        self.status = status.st_size, status.st_mtime_ns
        try:
            self.archive = stack.enter_context(zipfile.ZipFile(file))
        except zipfile.BadZipFile as error:
            file.seek(0)
            if file.read(4) == b"PK\x03\x04":   # the start of a zip, whose table of contents is at the end
                raise OasisError(f"is a zip whose end is missing ({error}): download it again") from error
            raise OasisError("is not a zip, nor an image, an .npy or a volume of a known kind") from error
        # Of two equal names the last one counts, as in unzip.
        self.names = [name for name in dict.fromkeys(self.archive.namelist())
                      if not any(map(is_hidden, self.relative(name).split("/")))]
        if any(len(name) > MAX_NAME for name in self.names):
            raise OasisError(f"holds a file name of more than {MAX_NAME} characters")
        self.lock = threading.Lock()            # zipfile does not promise thread safety

    def location(self, name):
        return f"{self.path}: {name}"

    def relative(self, name):
        return name.replace("\\", "/")          # some zips contain backslashes

    def read(self, name, limit):
        if self.archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OasisError("is not compressed with deflate: pack it again")  # LZMA can take unlimited memory
        with self.lock, self.archive.open(name) as member:
            return member.read(limit)

    def stamp(self, names):
        return self.status
