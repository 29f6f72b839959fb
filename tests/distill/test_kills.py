"""Signals at any moment of any command: no traceback, no lost work, no folder that is stuck.

`ADDEROPS_KILLS=30 pytest -m slow tests/distill/test_kills.py` sends 30 signals.  Every command has its own process
group, and the signal goes to the whole group or to the main process alone.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from adderops.distill import load_data
from distill.runs import assert_same_state, write_bars

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("ADDEROPS_KILLS", "3"))
COMMAND = [sys.executable, "-W", "ignore", "-m", "adderops.distill"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRAINING = "--epochs 6 --batch-size 10 --threads 1 --device cpu --method pkkd --checkpoint-minutes 0".split()


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(*arguments: object) -> str:
    process = start(*arguments)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text
    return text


def stop(process: subprocess.Popen, signum: signal.Signals, group: bool) -> str:
    """Sends a signal, waits for the end, and returns what was printed."""
    if process.poll() is None:
        os.killpg(process.pid, signum) if group else process.send_signal(signum)
    try:
        # workers hold the pipe, too, and notice within seconds that their parent is gone
        text = process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert "Traceback" not in text, text
    assert process.returncode in (0, -signum, 128 + signum), (process.returncode, text)
    return text


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, list[str]]:
    """Options of two data sets: in memory, and of image files that two workers load."""
    root = tmp_path_factory.mktemp("sets")
    (root / "bars").mkdir()
    write_bars(root / "bars", train=60, test=20)
    for part in ("train", "val"):
        for k, name in enumerate(("dark", "light")):
            (root / "files" / part / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (36, 36), (i, 200 * k, i)).save(root / "files" / part / name / f"{i}.png")
    files = f"--data {root / 'files'} --arch lenet5 --workers 2"
    return {"bars": f"--data {root / 'bars'}".split(), "files": files.split()}


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """Undisturbed runs of both, and the seconds that each took."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for name, options in sets.items():
        begin = time.monotonic()
        finished(*TRAINING, *options, "--output", folder / name)
        found[name] = folder / name, time.monotonic() - begin
    return found


def assert_same_networks(ours: Path, theirs: Path) -> None:
    for name in ("student.pt", "teacher.pt"):
        a, b = (dict(torch.load(folder / name, weights_only=True)) for folder in (ours, theirs))
        assert_same_state(a, b, name)


def test_a_series_of_kills(sets, whole, tmp_path):
    rng = random.Random(int(os.environ.get("ADDEROPS_KILLS_SEED", "0")))
    kinds = ("training", "training", "eval", "export", "quantize", "report")
    for i in range(COUNT):
        name, kind = rng.choice(sorted(sets)), kinds[i % len(kinds)]
        complete, seconds = whole[name]
        if kind == "training":
            run = tmp_path / f"run{i}"
            process = start(*TRAINING, *sets[name], "--output", run)
            for _ in range(rng.randint(1, 3)):  # killed, continued, killed again
                time.sleep(rng.uniform(0.05, seconds))
                signum, group = rng.choice(SIGNALS), rng.random() < 0.5
                text = stop(process, signum, group)
                if "are saved in" in text:
                    assert (run / "checkpoint.pt").is_file(), text
                resumed = (run / "config.json").is_file()
                process = start(*(["--resume", run] if resumed else [*TRAINING, *sets[name], "--output", run]))
            text = process.communicate(timeout=600)[0]
            assert process.returncode == 0, text
            assert_same_networks(run, complete)
        else:
            run = Path(shutil.copytree(complete, tmp_path / f"run{i}"))
            more = {"export": ["--format", rng.choice(["state_dict", "torch"])]}.get(kind, [])
            process = start(kind, run, *more)
            time.sleep(rng.uniform(0.05, 0.6 * seconds))
            stop(process, rng.choice(SIGNALS), rng.random() < 0.5)
            assert_same_networks(run, complete)
            finished(kind, run, *more)
        assert not list(run.rglob("*.tmp")), "what a killed writer left is still there"


def test_signals_that_reach_a_worker_do_not_end_it(sets):
    data = load_data(sets["files"][1], side=16)
    others = set(multiprocessing.active_children())  # of the tests before
    batches = iter(data.train.batches([torch.tensor([i]) for i in range(40)], workers=2))
    next(batches)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for worker in workers:
            os.kill(worker.pid, signum)
    assert sum(1 for _ in batches) == 39
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0, "it did not leave by the queue"


def test_sigterm_to_the_group_reaches_no_worker(sets, tmp_path):
    """As docker, systemd and SLURM send it: the workers stay, and the promised checkpoint is written."""
    run = tmp_path / "run"
    process = start(*TRAINING, *sets["files"], "--epochs", 1000, "--output", run)
    while process.poll() is None and not (run / "log.csv").exists():
        time.sleep(0.02)
    text = stop(process, signal.SIGTERM, group=True)
    assert process.returncode == 128 + signal.SIGTERM
    assert "are saved in" in text and f"continue with --resume {run}" in text


def test_a_killed_worker_is_one_line_with_a_remedy(sets, tmp_path):
    """As the kernel does when memory runs out."""
    run = tmp_path / "run"
    process = start(*TRAINING, *sets["files"], "--epochs", 1000, "--output", run)
    while process.poll() is None and not (run / "log.csv").exists():
        time.sleep(0.02)
    # until the run ends: a worker that has done its work is not missed
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.1)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert "error: a process was lost: DataLoader worker" in last and f"continue with --resume {run}" in last


def test_out_of_memory_is_one_line_with_a_remedy(sets, whole, tmp_path):
    """In the second epoch; once there is memory, the run resumes, to the same end."""
    run = tmp_path / "run"
    arguments = [*TRAINING, *sets["bars"], "--output", str(run)]
    program = f"""
import sys, torch
from adderops.distill import main
from adderops.distill.loop import Loop
step, steps = Loop._step, []
def hungry(self, *arguments, **options):
    steps.append(torch.empty(2**50 if len(steps) == 9 else 1, dtype=torch.uint8))
    return step(self, *arguments, **options)
Loop._step = hungry
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "adderops.distill: error: out of memory: " in done.stderr
    assert done.stderr.endswith(f"; continue with --resume {run}\n")
    finished("--resume", run)
    assert_same_networks(run, whole["bars"][0])


def test_ctrl_c_while_it_imports_is_no_traceback():
    for delay in (0.3, 0.8):
        process = start("eval", "nothing")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
        assert "Traceback" not in text, text
