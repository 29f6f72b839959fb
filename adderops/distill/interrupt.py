"""SIGTERM and Ctrl-C become a request that the training loop answers between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adderops.distill.distributed import global_sum


class Interrupted(Exception):
    """Training has stopped at the user's request, after a checkpoint; `signum` is the signal."""

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {checkpoint}")
        self.signum = signum


class StopRequest:
    """Holds the number of the signal that asked to stop, or 0."""

    def __init__(self) -> None:
        self.signum = 0

    def handle(self, signum: int, frame: object) -> None:
        if self.signum and signum == signal.SIGINT:  # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self) -> int:
        """Returns the signal once any process got one: all leave behind the same step."""
        [anyone] = global_sum([float(self.signum)])
        return (self.signum or signal.SIGTERM) if anyone else 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT while it is entered; in a thread other than the main one it never sees any."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {signum: signal.signal(signum, request.handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
