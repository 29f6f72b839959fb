"""Python in a child process, for tests that need a fresh process or may end theirs."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_python(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments...`; the child finds the modules that its parent finds, `cases` included."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=timeout)
