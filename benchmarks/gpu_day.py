"""All that is to be learnt from a GPU, in minutes: builds for it, tests, sanitizers, benchmarks, counters, one page.

    python benchmarks/gpu_day.py --minutes 9 --output FOLDER
    python benchmarks/gpu_day.py --minutes 9 --output FOLDER                the same again: the parts that are missing
    python benchmarks/gpu_day.py --minutes 3 --output FOLDER --parts counters
    python benchmarks/gpu_day.py --dry-run --output FOLDER                  a rehearsal, without a GPU

The parts run in order of what matters most.  Each has a share of the time that is left, is interrupted after half as
much again, and leaves FOLDER/PART.json and PART.log when it ends; FOLDER/summary.md is written anew after each.  A
failure stops no other part, unless that needs what failed.  Whatever a part lacks, such as a tool or a package, skips
it with the reason.  Nothing is downloaded, and no setting of the GPU is changed.

Without options for it, a second run takes up the parts that have not run, were skipped or ran out of time.  Needs
torch, numpy, pytest, setuptools and ninja, and nvcc unless the library is built already for this GPU.

In a dry run the CUDA kernels are executed on the host by tests/simt, the benchmarks run small on the CPU, and stand-ins
take the place of nvidia-smi, ncu and compute-sanitizer.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import gpu_day_rehearsal, gpu_day_summary
from harness.gpu_day_parts import PARTS
from harness.gpu_day_runner import Day, pending, run_all


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    title, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=text, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for all parts together (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for the results; made if it is not there")
    add("--parts", nargs="+", metavar="PART", default=[], help=f"run only these: {', '.join(p.name for p in PARTS)}")
    add("--dry-run", action="store_true", help="rehearse without a GPU")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parts if name not in {part.name for part in PARTS}]
    if unknown:
        parser.error(f"--parts: expected some of {', '.join(p.name for p in PARTS)}, got {', '.join(unknown)}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {arguments.minutes}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    day = Day(arguments.output.resolve(), arguments.dry_run)
    day.output.mkdir(parents=True, exist_ok=True)
    if day.dry_run:
        gpu_day_rehearsal.install(day.file("rehearsal"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the running part is ended, too
    run_all(
        day,
        pending(day, PARTS, arguments.parts),
        60 * arguments.minutes,
        lambda: gpu_day_summary.write(day, PARTS),
    )
    gpu_day_summary.write(day, PARTS)
    print(f"\n{day.file('summary.md').read_text()}")


if __name__ == "__main__":
    main()
