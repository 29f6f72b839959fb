"""Nothing is lost: kill -9, SIGTERM, Ctrl-C, a full disk; the resumed run ends with the same bits."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from slow import slow_except
from torch.optim.optimizer import register_optimizer_step_post_hook

from adderops.atomic import write_atomically
from adderops.distill import log, main, train, trainer
from distill.runs import TIMING, assert_same_state, interrupted, rows_of

COMMAND = [sys.executable, "-m", "adderops.distill"]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def without_timing(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_same_run(ours, theirs) -> None:
    for name in ("checkpoint.pt", "student.pt", "teacher.pt"):
        assert_same_state(load(ours / name), load(theirs / name), name)
    for name in ("log.csv", "layers.csv"):
        assert without_timing(rows_of(ours / name)) == without_timing(rows_of(theirs / name))


@pytest.mark.slow
def test_resume_after_kill_9_ends_with_the_same_bits(options, tmp_path):
    epochs = 6
    options = [*options, "--method", "pkkd", "--epochs", str(epochs)]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*COMMAND, *options, "--output", str(killed)], stdout=subprocess.DEVNULL)
    log_file = killed / "log.csv"
    while process.poll() is None and not (log_file.exists() and len(rows_of(log_file)) >= 2):
        time.sleep(0.005)
    time.sleep(0.03)  # into the next epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    at_kill = rows_of(log_file)
    assert 2 <= len(at_kill) < epochs
    # whenever the kill comes, a partly written file and a log without its last row must do no harm
    (killed / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")

    subprocess.run([*COMMAND, "--resume", str(killed)], stdout=subprocess.DEVNULL, check=True)
    assert main([*options, "--output", str(whole)]) == 0
    assert_same_run(killed, whole)
    assert rows_of(killed / "log.csv")[: len(at_kill)] == at_kill


@pytest.mark.parametrize("signum", slow_except([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_saves_a_checkpoint_within_the_epoch_and_leaves(options, tmp_path, signum):
    """A real process; the signal comes at some time after the first of 40 epochs of 8 steps."""
    options = [*options, "--method", "pkkd", "--epochs", "40"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, *options, "--output", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (run / "log.csv").exists():
        time.sleep(0.005)
    process.send_signal(signum)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum
    assert f"stopped by {signal.Signals(signum).name}; " in message
    assert f"continue with --resume {run}" in message and "Traceback" not in message
    state = load(run / "checkpoint.pt")
    assert state["epoch"] >= 1 and not (run / "summary.json").exists()


@pytest.mark.parametrize("method", slow_except(["pkkd"], ["pkkd", "plain", "cnn"]))
@pytest.mark.parametrize("after", slow_except([3], [3, 8, 11]))
def test_stopped_within_an_epoch_and_continued_is_as_uninterrupted(config, data, tmp_path, method, after):
    """Eight steps per epoch: within the first, at its end, within the second."""
    config = replace(config, method=method)
    train(config, data, tmp_path / "whole")
    with interrupted(after):
        train(config, data, tmp_path / "stopped")
    state = load(tmp_path / "stopped" / "checkpoint.pt")
    assert 8 * state["epoch"] + state["step"] == after
    train(config, data, tmp_path / "stopped")
    for name in ("checkpoint.pt", f"{'teacher' if method == 'cnn' else 'student'}.pt"):
        assert_same_state(load(tmp_path / "stopped" / name), load(tmp_path / "whole" / name), name)
    rows = [without_timing(rows_of(tmp_path / f / "log.csv")) for f in ("stopped", "whole")]
    assert rows[0] == rows[1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers were not put back"


def test_a_checkpoint_is_saved_within_an_epoch_when_it_is_time(config, data, tmp_path, monkeypatch):
    saved = []
    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda path, c: saved.append((c["epoch"], c["step"])) or save(path, c)
    )
    train(replace(config, checkpoint_minutes=0.0), data, tmp_path / "often")
    assert saved == [*((0, s) for s in range(1, 8)), (1, 0), *((1, s) for s in range(1, 8)), (2, 0)]
    saved.clear()
    train(config, data, tmp_path / "seldom")
    assert saved == [(1, 0), (2, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["save_checkpoint", "write_csv"])
@pytest.mark.parametrize(
    "method, epoch", [("pkkd", 1), *(pytest.param(m, 2, marks=pytest.mark.slow) for m in ("pkkd", "plain", "cnn"))]
)
def test_interrupted_before_either_file_of_an_epoch(config, data, tmp_path, monkeypatch, writer, method, epoch):
    """Before the checkpoint, or between it and the log: the resumed run has each row once, and the same bits."""
    config = replace(config, method=method, epochs=3)
    train(config, data, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(path, content):
        rows = content if writer == "write_csv" else content["log"]
        if len(rows) == epoch:
            raise Stop
        return write(path, content)

    module = log if writer == "write_csv" else trainer
    write = getattr(module, writer)
    monkeypatch.setattr(module, writer, stop)
    with pytest.raises(Stop):
        train(config, data, tmp_path / "stopped")
    monkeypatch.undo()
    train(config, data, tmp_path / "stopped")
    assert [row["epoch"] for row in rows_of(tmp_path / "stopped" / "log.csv")] == ["1", "2", "3"]
    ours, theirs = (load(tmp_path / f / "checkpoint.pt") for f in ("stopped", "whole"))
    assert_same_state(ours, theirs)


def test_a_full_disk_is_said_and_the_last_checkpoint_is_intact(options, tmp_path, capsys, monkeypatch):
    """fsync fails in the second epoch's checkpoint; once there is room, the run ends like an uninterrupted one."""
    options = [*options, "--method", "pkkd"]
    assert main([*options, "--output", str(tmp_path / "sound")]) == 0
    run, save = tmp_path / "run", trainer.save_checkpoint

    def full(descriptor):
        raise OSError(28, "No space left on device")

    def fail_in_epoch_2(path, content):
        if content["epoch"] == 2:
            monkeypatch.setattr("os.fsync", full)
        save(path, content)

    monkeypatch.setattr(trainer, "save_checkpoint", fail_in_epoch_2)
    capsys.readouterr()
    assert main([*options, "--output", str(run)]) == 1
    message = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device" in message and "Traceback" not in message
    monkeypatch.undo()
    assert load(run / "checkpoint.pt")["epoch"] == 1 and not (run / "checkpoint.pt.tmp").exists()
    assert main(["--resume", str(run)]) == 0
    assert_same_run(run, tmp_path / "sound")


@pytest.mark.slow
def test_a_write_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    size = 20_000_000
    program = f"""
from pathlib import Path
from adderops.atomic import write_atomically
path, i = Path({str(tmp_path / "file")!r}), 0
while True:
    write_atomically(path, bytes([i % 256]) * {size})
    i += 1
"""
    path = tmp_path / "file"
    for delay in (0.01, 0.08):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", program])
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == size and content == content[:1] * size


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_resume_of_a_finished_run_changes_nothing(config, data, tmp_path):
    summary = train(config, data, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".pt"}
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(config, data, tmp_path) == summary
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".pt"} == before
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "missing"])
def test_damaged_checkpoint(options, tmp_path, capsys, damage):
    run = tmp_path / "run"
    assert main([*options, "--method", "plain", "--output", str(run)]) == 0
    checkpoint = run / "checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    expected = "expected a whole checkpoint, got a damaged file"
    if damage == "cut":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weight = torch.load(checkpoint, weights_only=True)["task"]["networks.student.conv3.weight"]
        content[content.index(weight.numpy().tobytes())] ^= 1  # in a tensor, not in what pads the records
        checkpoint.write_bytes(content)
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, checkpoint)
        expected = "expected a checkpoint of format 2"
    else:
        checkpoint.unlink()
        expected = "no checkpoint"
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("adderops.distill: error: ") and str(checkpoint) in message and expected in message


@pytest.mark.parametrize("where", slow_except(["last step"], ["step", "last step"]))
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(options, tmp_path, capsys, where):
    """Weights become infinite in epoch 3: in its first step, or in its last, after which only the weights show it."""
    options = [*options, "--method", "pkkd", "--epochs", "4"]
    assert main([*options, "--output", str(tmp_path / "sound")]) == 0
    run = tmp_path / "run"
    steps = []

    def explode(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == 2 * 8 + (1 if where == "step" else 8):
            next(iter(optimizer.param_groups[0]["params"])).data.fill_(float("inf"))

    handle = register_optimizer_step_post_hook(explode)
    capsys.readouterr()
    try:
        assert main([*options, "--output", str(run)]) == 1
    finally:
        handle.remove()
    message = capsys.readouterr().err
    what = "loss" if where == "step" else "weight"
    assert f"epoch 3: {what} is not finite: " in message and f"{run}: the last checkpoint is intact" in message
    assert len(steps) == 2 * 8 + (1 if where == "step" else 8), "it went on with weights that are lost"
    assert [row["epoch"] for row in rows_of(run / "log.csv")] == ["1", "2"]
    assert main(["--resume", str(run)]) == 0
    assert_same_state(dict(load(run / "student.pt")), dict(load(tmp_path / "sound" / "student.pt")), "student")
