"""Ownership of a run folder: one process at a time, by a lock that the system releases however the process ends."""

import errno
import fcntl
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adderops.atomic import is_temporary
from adderops.distill import distributed
from adderops.distill.config import Config

LOCK = ".lock"
# Files of a run that ended before its first checkpoint.
BEFORE_TRAINING = {"config.json", "data.json", "tensorboard"}


@dataclass
class _Held:
    descriptor: int
    thread: int
    depth: int = 1


_held: dict[Path, _Held] = {}


def _forget() -> None:
    """Runs in a forked process, a worker of a loader: the lock belongs to its parent and must end with it."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def own(folder: Path, made: bool = False) -> Iterator[Path]:
    """Creates a run folder if it is missing, and owns it while entered; the owner may enter again.

    After an error before the first checkpoint, the run's files are removed, and the folder if it was created here: the
    corrected command can use the same folder.  Under torchrun, process 0 owns it for all.

    Args:
        folder: of the run.
        made: whether the folder was just created for this run.

    Raises:
        BlockingIOError: another process or thread owns it; the message names process and host.
        OSError: it cannot be created.
    """
    path = folder.absolute()
    made = distributed.on_first(lambda: _acquire(path)) or made
    held = _held.get(path)  # of process 0
    try:
        yield folder
    except Exception:
        if held is not None and held.depth == 1 and not holds_work(path):
            _clear(path, made)
        raise
    finally:
        if held is not None:
            held.depth -= 1
            if held.depth == 0:
                os.close(_held.pop(path).descriptor)


@contextmanager
def own_new(output: Path | None, name: str) -> Iterator[Path]:
    """Creates the folder of a new run and owns it while entered; yields its path, the same on every process.

    Args:
        output: the folder; it may hold the files of a run that ended before its first checkpoint, and nothing else.
            None: runs/NAME, with a number appended where another run has that name.
        name: see output.

    Raises:
        FileExistsError: output holds something else.
        BlockingIOError, OSError: as `own`.
    """
    folder, made = distributed.on_first(lambda: _make(name) if output is None else _check_free(output))
    with own(folder, made):
        if output is not None:
            distributed.on_first(lambda: _check_free(folder))  # again: now no other process can change it
        yield folder


def _make(name: str) -> tuple[Path, bool]:
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder, True
        except FileExistsError:
            number += 1


def _check_free(folder: Path) -> tuple[Path, bool]:
    if folder.exists() and (not folder.is_dir() or holds_work(folder)):
        raise FileExistsError(f"--output: {folder} exists; continue it with --resume, or choose another folder")
    return folder, False


def holds_work(folder: Path) -> bool:
    """Returns whether a folder holds anything but the files of a run that ended before its first checkpoint."""
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" in names:
        try:
            Config.load(folder / "config.json")
            names -= BEFORE_TRAINING
        except (ValueError, OSError):  # not of a run
            return True
    left = [folder / name for name in names if name != LOCK and not is_temporary(name)]
    # a comparison has run folders in it
    return any(path.is_symlink() or not path.is_dir() or holds_work(path) for path in left)


def _clear(folder: Path, made: bool) -> None:
    """Removes what `holds_work` does not count as work; follows no link."""
    if made:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _acquire(folder: Path) -> bool:
    """Locks a folder; returns whether it was created."""
    held = _held.get(folder)
    if held is not None:
        if held.thread != threading.get_ident():
            raise BlockingIOError(f"{folder}: expected a free run folder, got one in use by another thread")
        held.depth += 1
        return False
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder)
    _held[folder] = _Held(descriptor, threading.get_ident())
    return made


def _lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return os.open(folder, os.O_RDONLY)  # a read-only file system needs no lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
            os.close(descriptor)
            who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
            raise BlockingIOError(f"{folder}: expected a free run folder, got one in use by {who}") from None
        except OSError as error:
            print(f"{folder}: not locked, because the file system has no locks: {error.strerror}", file=sys.stderr)
        if os.fstat(descriptor).st_nlink:
            with suppress(OSError):  # a full disk: the lock holds without the name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # its last owner has removed it
