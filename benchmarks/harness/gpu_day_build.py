"""Builds the libraries in the checkout for one GPU, unless they are there and have machine code for it."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def archs_of_library() -> list[str]:
    """The architectures of the CUDA library in the checkout; none if it is absent or does not load.

    A process of its own asks, because this one could not load the library that is built afterwards.
    """
    command = [sys.executable, "-m", "adderops.info"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout + run.stderr, flush=True)
    line = re.search(r"^CUDA kernels\s+for (.+)$", run.stdout, re.M)
    return [arch.strip().removesuffix("+PTX") for arch in line[1].split(",")] if line else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", help="compute capability, such as 9.0")
    parser.add_argument("--dry-run", action="store_true", help="build the kernels for the host instead (tests/simt)")
    arguments = parser.parse_args()
    archs = archs_of_library()
    if arguments.capability in archs:
        print(f"built before, for {', '.join(archs)}")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    settings = {"ADDEROPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arguments.capability, "MAX_JOBS": str(os.cpu_count())}
    print(*(f"{name}={value}" for name, value in settings.items()), *command, flush=True)
    if arguments.dry_run:
        from simt import host

        host.build("plain", host.PASSES)
        print("built for the host")
        return
    subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True)
    archs = archs_of_library()
    if arguments.capability not in archs:
        raise SystemExit(f"the library has no code for {arguments.capability}: it has {', '.join(archs) or 'none'}")
    print(f"built for {', '.join(archs)}")


if __name__ == "__main__":
    main()
