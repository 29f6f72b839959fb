"""How gpu_day.py runs: each part in processes of its own, within a time, leaving NAME.log and NAME.json.

A part that runs out of time is interrupted, as Ctrl-C does, so that pytest still names its failures; then it is killed.
"""

import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, OUT_OF_TIME, SKIPPED = "passed", "failed", "out of time", "skipped"
STRETCH = 1.5  # a part may take this many times its share of the time that is left
# where toolkit and driver put programs that are not always on the PATH
USUAL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/nvidia/bin", "/opt/nvidia/nsight-compute/*")
FLOOR = 20.0  # and at least these seconds: importing torch and waking the GPU may take half of them
LEAST = 3.0  # seconds with which a part is started


class Skip(Exception):
    """Why a part has nothing to show on this machine."""


@dataclass(frozen=True)
class Day:
    """Where the results go, and whether a GPU is there."""

    output: Path
    dry_run: bool = False

    def file(self, name: str) -> Path:
        return self.output / name

    def result(self, part: str) -> dict[str, Any] | None:
        """What NAME.json holds; None if the part has not ended yet."""
        try:
            return json.loads(self.file(f"{part}.json").read_text())
        except (OSError, ValueError):
            return None

    def figures(self, part: str) -> dict[str, Any]:
        return (self.result(part) or {}).get("figures", {})

    @property
    def environ(self) -> dict[str, str]:
        """The checkout comes first, so that the libraries built in it are those that run."""
        rooms = [ROOT, ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "machine_code"]
        path = [*([str(self.output / "rehearsal")] if self.dry_run else []), os.environ.get("PATH", "")]
        path += [folder for place in USUAL_FOLDERS for folder in sorted(glob.glob(place), reverse=True)]
        return (
            os.environ
            | {
                "PYTHONPATH": os.pathsep.join([*map(str, rooms), os.environ.get("PYTHONPATH", "")]),
                "PATH": os.pathsep.join(path),
                "PYTHONUNBUFFERED": "1",
                "LC_ALL": "C",
            }
            | ({"OMP_NUM_THREADS": "1"} if self.dry_run else {})
        )


@dataclass(frozen=True)
class Part:
    """One line of the summary.

    Attributes:
        share: seconds of a day of nine minutes.
        command: of the day and the seconds that the part should take.
        read: the figures in the log and the files of a part; "headline" is the line of the summary.  Raises Skip.
        needs: parts that must have passed.
        tools, modules: programs and Python packages without which the part is skipped.
        environ: added to that of the day.
    """

    name: str
    share: int
    command: Callable[[Day, float], Sequence[str]]
    read: Callable[[Day, str], dict[str, Any]]
    needs: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()

    def obstacle(self, day: Day) -> str | None:
        """Why the part cannot run."""
        for name in self.needs:
            result = day.result(name)
            if result is None or result["status"] != PASSED:
                return f"needs {name}, which has not passed ({result['status'] if result else 'it has not run'})"
        for tool in self.tools:
            if shutil.which(tool, path=day.environ["PATH"]) is None:
                return f"no {tool} on the PATH"
        for module in self.modules:
            if find_spec(module) is None:
                return f"no Python package {module}"
        return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is either absent or complete."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def pending(day: Day, parts: Sequence[Part], named: Sequence[str] = ()) -> list[Part]:
    """The parts still to run, in order: those named, or all without a verdict: never run, out of time, or skipped."""
    if named:
        return [part for part in parts if part.name in named]
    verdicts = {part.name: (day.result(part.name) or {}).get("status") for part in parts}
    return [part for part in parts if verdicts[part.name] not in (PASSED, FAILED)]


def shares(parts: Sequence[Part], left: float) -> tuple[float, float]:
    """(seconds that the first of the parts should take, seconds after which it is killed), of `left` for all."""
    share = left * parts[0].share / sum(part.share for part in parts)
    return share, min(left, max(FLOOR, STRETCH * share))


def run_all(day: Day, parts: Sequence[Part], seconds: float, after: Callable[[], None]) -> None:
    """Runs the parts in order within the time, and calls `after` at the end of each."""
    deadline = time.monotonic() + seconds
    for i, part in enumerate(parts):
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"out of time before {', '.join(p.name for p in parts[i:])}", flush=True)
            break
        print(f"{part.name:<20}", end="", flush=True)
        result = run(day, part, *shares(parts[i:], left))
        print(f"{result['status']:<12}{result['seconds']:6.1f} s  {result['headline']}", flush=True)
        after()


def run(day: Day, part: Part, share: float, limit: float) -> dict[str, Any]:
    """Runs one part, writes its JSON file and returns what it holds."""
    for left_over in (*day.output.glob(f"{part.name}.json"), *day.output.glob(f"{part.name}.csv")):
        left_over.unlink()
    started, start = datetime.now(timezone.utc), time.monotonic()
    result = {"part": part.name, "started": started.isoformat(timespec="seconds"), "limit": round(limit, 1)}
    try:
        if reason := part.obstacle(day):
            raise Skip(reason)
        command = [str(word) for word in part.command(day, share)]
        result["command"] = command
        log = day.file(f"{part.name}.log")
        code = _call(command, day.environ | dict(part.environ), log, limit)
        result["status"] = OUT_OF_TIME if code is None else FAILED if code else PASSED
        result |= _figures(day, part, log.read_text(errors="replace"), result["status"])
    except Skip as reason:
        result |= {"status": SKIPPED, "headline": str(reason), "figures": {}}
    result["seconds"] = round(time.monotonic() - start, 1)
    write_whole(day.file(f"{part.name}.json"), json.dumps(result, indent=1) + "\n")
    return result


def _figures(day: Day, part: Part, text: str, status: str) -> dict[str, Any]:
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
    try:
        figures = part.read(day, text)
    except Skip:
        raise
    except Exception as error:  # an unknown format, or a part that ended too early to print what is read
        if status != PASSED:
            return {"headline": last[:200], "figures": {}}
        return {"status": FAILED, "headline": f"its output is not understood: {error!r}", "figures": {}}
    return {"headline": figures.get("headline", last[:200]), "figures": figures}


def _call(command: Sequence[str], environ: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit status; None after an interruption.  No process of the part outlives the call."""
    grace = min(8.0, limit / 5)
    with open(log, "w") as file:
        print("$", shlex.join(command), file=file, flush=True)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's & ignores, the part ignores
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            print(error, file=file)
            return 127
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            return process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            print(f"\nout of time after {limit - grace:.0f} s", file=file, flush=True)
            _signal(process.pid, signal.SIGINT)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            _signal(process.pid, signal.SIGKILL)
            process.wait()


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]
