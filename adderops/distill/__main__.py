"""`python -m adderops.distill`."""

import signal
import sys

from adderops.distill.command_line import main
from adderops.distill.interrupt import end_at_once

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end_at_once)
    sys.exit(main())
