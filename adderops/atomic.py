"""Atomic writing of files: if the process is killed at any moment, the file is whole, either the old or the new one."""

import fcntl
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file through a temporary one in the same folder, so that readers see the old content or the new one.

    This holds after a crash too. The file keeps its mode. Of a symbolic link the target is written. Several writers of
    one path do not disturb each other: the last to finish wins. What is not a regular file (a device, a pipe) is
    written in place.

    Args:
        path: the file to write, in an existing folder.
        content: its new content.

    Raises:
        OSError: the file cannot be written; the error has its name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "text"), b"content")
    ...     Path(folder, "text").read_bytes()
    b'content'
    """
    try:
        old = path.stat() if path.exists() else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            with open(path, "wb") as file:
                file.write(content)
        else:
            _replace(Path(os.path.realpath(path)), content, None if old is None else stat.S_IMODE(old.st_mode))
    except OSError as error:
        if error.errno is None:  # not from the system: it has its own text
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, content: bytes | memoryview, mode: int | None) -> None:
    _remove_abandoned(path)
    temporary, descriptor = _open_temporary(path)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C: leave no part of a file behind
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name reaches the disk, too
    finally:
        os.close(folder)


def _prefix(path: Path) -> str:
    return f".{path.name[:200]}."  # a name has at most 255 bytes


def _open_temporary(path: Path) -> tuple[Path, int]:
    """Opens a new temporary file; it is locked while it is written, which tells it from an abandoned one."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of writers that were killed."""
    prefix = _prefix(path)
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and is_temporary(name):
            with suppress(OSError), open(path.with_name(name), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(name).unlink()


def is_temporary(name: str) -> bool:
    """Returns whether a file of this name is a temporary file, possibly left by a killed writer."""
    return name.endswith(".tmp")
