"""How a command that fails ends: its exit status, and one line instead of a traceback.

1          a run failed: out of memory, a process was lost, a loss became infinite
2          refused: options, a damaged file, a folder in use
128 + n    stopped by signal n
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from adderops.distill import distributed
from adderops.distill.interrupt import Interrupted

FAILED, REFUSED = 1, 2
# Texts of torch's RuntimeErrors that have no class of their own.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "Cannot allocate memory",
)
LOST_PROCESS = ("DataLoader worker", "Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")


@dataclass
class Ending:
    """The end of a command.

    Attributes:
        status: exit status of the process; 0 without an error.
        folder: run folder that the message names for --resume; None where there is none.
    """

    status: int = 0
    folder: Path | None = None


@contextmanager
def ending(command: str) -> Iterator[Ending]:
    """Prints an expected error as one line and sets the exit status.

    Any other error is a bug and keeps its traceback.
    """
    end = Ending()
    try:
        yield end
        sys.stdout.flush()
    except distributed.FailedOnFirst:
        end.status = FAILED  # process 0 has said why
    except Interrupted as stopped:
        end.status = 128 + stopped.signum
        print(f"\n{command}: {stopped}{_remedy(end)}", file=sys.stderr)
    except KeyboardInterrupt:
        end.status = 130
        print(f"\n{command}: interrupted{_remedy(end)}", file=sys.stderr)
    except BrokenPipeError:  # `| head` has seen enough
        end.status = FAILED
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        text, remedy = re.sub(r"\s*\n\s*", " ", str(error)), ""
        if reason := _failure(error, text):
            end.status, text, remedy = FAILED, f"{reason}: {text[:300]}", _remedy(end)
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            end.status, remedy = FAILED, _remedy(end)
        elif isinstance(error, FloatingPointError):
            end.status = FAILED
        elif isinstance(error, (ValueError, OSError, ImportError)):
            end.status = REFUSED
        else:
            raise
        print(f"{command}: error: {text}{remedy}", file=sys.stderr)


def _failure(error: Exception, text: str) -> str | None:
    """Returns what failed outside the program; None where nothing did."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RuntimeError):
        if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY):
            return "out of memory"
        if "DistBackendError" in type(error).__name__ or any(words in text for words in LOST_PROCESS):
            return "a process was lost"
    return None


def _remedy(end: Ending) -> str:
    known = end.folder is not None and (end.folder / "config.json").is_file()
    return f"; continue with --resume {end.folder}" if known else ""
