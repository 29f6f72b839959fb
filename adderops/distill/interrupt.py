"""SIGTERM, SIGHUP and Ctrl-C become a request to stop, which the training loop answers between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from adderops.distill.distributed import global_sum

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(Exception):
    """Training was stopped by the signal `signum`, after a checkpoint."""

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {checkpoint}")
        self.signum = signum


class StopRequest:
    """The signal that asked to stop: `signum`, or 0."""

    def __init__(self) -> None:
        self.signum = 0
        self.interrupt = signal.getsignal(signal.SIGINT)  # what Ctrl-C did before

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:  # a second Ctrl-C: at once
            if callable(self.interrupt):
                self.interrupt(signum, frame)
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self) -> int:
        """Returns the signal as soon as any process got one, so that all stop after the same step."""
        [anyone] = global_sum([float(self.signum)])
        return (self.signum or signal.SIGTERM) if anyone else 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGHUP and SIGINT while it is entered; in any thread but the main one it catches nothing.

    An ignored SIGHUP, as under nohup, stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, request.handle) for signum in caught}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks these signals while it is entered; a process started meanwhile never receives them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once(signum: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C where nothing needs to be saved; a KeyboardInterrupt could surface anywhere."""
    os.write(2, b"\nadderops.distill: interrupted\n")
    os._exit(128 + signum)
