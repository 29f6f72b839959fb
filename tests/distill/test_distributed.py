"""Two real processes train as one would: gloo on the CPU, started by torchrun.

Bounds.  Both compute the same function of the same batch and differ in the order of float32 sums (over images, in
gradients, BatchNorm statistics and moments).  A loss of the first step is some 20 layers deep, each off by a few 2^-24,
and logged with six digits: 1e-5.  Errors below 1 are absolute: an error of a logit enters a cross entropy as it is,
also where that is small, and the imitation loss, a cross entropy less an entropy.  A step moves weights by lr = 0.1 of
gradients that are off by as much, and the adaptive rate keeps relative errors: over four steps an order of magnitude,
1e-4.  Without a BatchNorm over both processes the losses differ by 1e-3 and more, which is tested too.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from adderops.distill import distributed, main
from distill.runs import rows_of, write_bars

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")

LOSSES = ("teacher_ce", "student_ce", "imitation", "l_mid", "student_loss", "teacher_test_loss", "student_test_loss")


@pytest.fixture
def one_batch(tmp_path, set_threads) -> list[str]:
    """An epoch is one step on 15 images, 8 and 7 per process: the log has the losses of each step."""
    set_threads(1)
    write_bars(tmp_path, train=15)
    return f"--data {tmp_path} --method pkkd --epochs 4 --batch-size 15 --threads 1 --ema 0.9".split()


def torchrun(*arguments: str) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return subprocess.Popen(
        [*command, "-m", "adderops.distill", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def errors(ours, theirs) -> list[float]:
    """The largest difference of the losses, relative above 1 and absolute below, per epoch."""
    rows = zip(rows_of(ours / "log.csv"), rows_of(theirs / "log.csv"), strict=True)
    pairs = [[(float(a[name]), float(b[name])) for name in LOSSES] for a, b in rows]
    return [max(abs(a - b) / max(1, abs(b)) for a, b in losses) for losses in pairs]


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(one_batch, tmp_path):
    assert main([*one_batch, "--output", str(tmp_path / "one")]) == 0
    process = torchrun(*one_batch, "--sync-batchnorm", "--output", str(tmp_path / "two"))
    printed, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert printed.count("epoch 4: test accuracy") == 1, "one process prints and writes"
    found = errors(tmp_path / "two", tmp_path / "one")
    assert found[0] < 1e-5 and max(found) < 1e-4
    for name in ("teacher", "student", "student_ema"):
        ours, theirs = (torch.load(tmp_path / f / f"{name}.pt", weights_only=True) for f in ("two", "one"))
        for key, value in theirs.items():
            assert (ours[key] - value).float().norm() <= 1e-4 * value.float().norm(), (name, key)


@pytest.mark.slow
def test_without_a_common_batchnorm_they_are_not(one_batch, tmp_path):
    """The bounds above can tell; and parts of a batch give the same losses for any number of processes."""
    assert main([*one_batch, "--output", str(tmp_path / "one")]) == 0
    process = torchrun(*one_batch, "--output", str(tmp_path / "two"))
    messages = process.communicate(timeout=300)[1]
    assert process.returncode == 0, messages
    assert min(errors(tmp_path / "two", tmp_path / "one")) > 1e-3


@pytest.mark.slow
def test_a_signal_stops_both_and_one_continues(one_batch, tmp_path):
    """SIGTERM to torchrun, as a cluster sends it; the run resumes with one process, to the same end."""
    one_batch[one_batch.index("--epochs") + 1] = "40"
    assert main([*one_batch, "--output", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    process = torchrun(*one_batch, "--sync-batchnorm", "--output", str(run))
    while process.poll() is None and not (run / "log.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    messages = process.communicate(timeout=120)[1]
    assert "stopped by SIGTERM; " in messages and process.returncode != 0
    done = torch.load(run / "checkpoint.pt", weights_only=True)["epoch"]
    assert done in range(1, 40), "the signal came before the first epoch or after the last"
    assert len(rows_of(run / "log.csv")) == done
    assert main(["--resume", str(run)]) == 0
    found = errors(run, tmp_path / "whole")
    assert len(found) == 40 and found[0] < 1e-5 and max(found[:4]) < 1e-4


def test_alone_all_of_it_is_the_identity():
    x = torch.randn(3, requires_grad=True)
    assert distributed.world_size() == 1 and distributed.rank() == 0 and not distributed.in_use()
    assert distributed.global_mean(x, 5) is x and distributed.global_sum([1.0, 2.0]) == [1.0, 2.0]
    assert torch.equal(distributed.share(torch.arange(5)), torch.arange(5))
    norm, ours = torch.nn.BatchNorm2d(4), distributed.GlobalBatchNorm2d(4)
    images = torch.randn(2, 4, 3, 3)
    assert torch.equal(norm(images), ours(images))
