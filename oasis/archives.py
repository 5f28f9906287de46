"""The files below --path: in a folder, in a zip or a single one. They are read in place; nothing is ever unpacked."""
import contextlib
import os
import threading
import zipfile
from pathlib import Path

from oasis.files import OasisError


@contextlib.contextmanager
def naming(file, cure):
    """Turn an exception of the block into an OasisError that names the file, the reason and the cure.

    Every Exception is caught, because a damaged file makes zipfile, Pillow and nibabel raise almost any class: OSError,
    SyntaxError, ValueError, EOFError, RuntimeError (an encrypted member), struct.error, zlib.error, BadZipFile, …
    """
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OasisError(f"{file}: {' '.join(reason.split())}. {cure}") from error


class Folder:
    """The files of a folder, or the given ones of them."""

    def __init__(self, path, names=None):
        def fail(error):            # by default, os.walk ignores a folder that it may not read
            raise error

        self.path = path
        walk = os.walk(path, onerror=fail, followlinks=True)
        self.names = names or [os.path.join(folder, name) for folder, _, names in walk for name in names]

    def location(self, name):
        """The name of a file as messages show it."""
        return name

    def relative(self, name):
        """The name of a file without the folder's own path, with slashes."""
        return Path(name).relative_to(self.path).as_posix()

    def read(self, name, limit):
        """The first `limit` bytes of a file; from any thread."""
        with open(name, "rb") as file:
            return file.read(limit)

    def stamp(self, names):
        """A value that changes when one of these files changes."""
        status = []
        for name in names:
            with naming(name, "Remove this file, or take the published data again."):
                status.append(os.stat(name))
        return [(file.st_size, file.st_mtime_ns) for file in status]


class Zip:
    """The members of a zip that is open; `stack` closes it. The methods are those of Folder."""

    def __init__(self, path, stack):
        self.path = path
        file = stack.enter_context(open(path, "rb"))
        status = os.fstat(file.fileno())        # of the open file: another one may get its name meanwhile
        self.status = status.st_size, status.st_mtime_ns
        try:
            self.archive = stack.enter_context(zipfile.ZipFile(file))
        except zipfile.BadZipFile as error:
            file.seek(0)
            if file.read(4) == b"PK\x03\x04":   # the table of contents is at the end
                raise OasisError(f"is a zip with its end missing, as after a broken download ({error})") from error
            raise OasisError("is not a zip") from error
        self.names = list(dict.fromkeys(self.archive.namelist()))  # of two equal names the last one counts, as in unzip
        self.lock = threading.Lock()            # zipfile does not promise thread safety

    def location(self, name):
        return f"{self.path}: {name}"

    def relative(self, name):
        return name.replace("\\", "/")          # some zips contain backslashes

    def read(self, name, limit):
        if self.archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OasisError("is compressed in a way that can need any amount of memory")  # the dictionary of LZMA
        with self.lock, self.archive.open(name) as member:
            return member.read(limit)

    def stamp(self, names):
        return self.status
