"""SIGTERM, SIGHUP and Ctrl-C become a request that the training loop answers between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adderops.distill.distributed import global_sum

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(Exception):
    """Training has stopped at the user's request, after a checkpoint; `signum` is the signal."""

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {checkpoint}")
        self.signum = signum


class StopRequest:
    """Holds the number of the signal that asked to stop, or 0."""

    def __init__(self) -> None:
        self.signum = 0
        self.interrupt = signal.getsignal(signal.SIGINT)  # what Ctrl-C did before

    def handle(self, signum: int, frame: object) -> None:
        if self.signum and signum == signal.SIGINT:  # a second Ctrl-C: at once
            if callable(self.interrupt):
                self.interrupt(signum, frame)
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self) -> int:
        """Returns the signal once any process got one: all leave behind the same step."""
        [anyone] = global_sum([float(self.signum)])
        return (self.signum or signal.SIGTERM) if anyone else 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGHUP and SIGINT while it is entered; in a thread other than the main one it never sees any.

    A SIGHUP that is ignored, as nohup has it, stays ignored.
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
    """Holds back what would stop the process while it is entered; a process started in it is never reached by them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once(signum: int, frame: object) -> None:
    """A handler of Ctrl-C for a process in which nothing is to be saved; KeyboardInterrupt would surface anywhere."""
    os.write(2, b"\nadderops.distill: interrupted\n")
    os._exit(128 + signum)
