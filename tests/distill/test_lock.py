"""One owner per run folder; what a killed or refused run leaves does not block the folder."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from adderops.distill import lock, main, train
from adderops.distill.loop import Loop

HOLDER = """
import os, sys, time
from pathlib import Path
from adderops.distill import lock
with lock.own(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader's worker: it must not keep the lock
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_in_use_is_refused_with_its_owner_and_free_once_that_is_dead(options, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*options, "--method", "cnn", "--output", str(folder)]) == 0
    holder = hold(folder)
    try:
        capsys.readouterr()
        assert main(["--resume", str(folder)]) == 2
        expected = f"{folder}: expected a free run folder, got one in use by process {holder.pid} on "
        assert capsys.readouterr().err == f"adderops.distill: error: {expected}{socket.gethostname()}\n"
        holder.kill()  # the child lives on
        holder.wait()
        assert main(["--resume", str(folder)]) == 0
    finally:
        os.killpg(holder.pid, 9)


@pytest.mark.slow
def test_output_to_an_owned_folder_is_refused(options, tmp_path, capsys):
    """The owner has not written anything yet."""
    holder = hold(tmp_path / "run")
    try:
        assert main([*options, "--method", "cnn", "--output", str(tmp_path / "run")]) == 2
        assert "in use by process" in capsys.readouterr().err
        assert (tmp_path / "run").is_dir()
    finally:
        os.killpg(holder.pid, 9)


def test_train_owns_its_folder(config, data, tmp_path, monkeypatch):
    seen = []

    def other(folder):
        with pytest.raises(BlockingIOError, match="in use by another thread"):
            with lock.own(folder):
                seen.append("entered")
        seen.append("refused")

    def step(self, *arguments, **options):
        if not seen:
            thread = threading.Thread(target=other, args=(tmp_path / "run",))
            thread.start()
            thread.join()
        return original(self, *arguments, **options)

    original = Loop._step
    monkeypatch.setattr(Loop, "_step", step)
    train(replace(config, method="cnn", epochs=1), data, tmp_path / "run")
    assert seen == ["refused"]
    with lock.own(tmp_path / "run"), lock.own(tmp_path / "run"):
        pass


def _in_a_process(names, barrier, folder):
    os.chdir(folder)
    barrier.wait()
    with lock.own_new(None, "digits-lenet5-cnn-20261129-120000") as made:
        names.put(str(made))
        barrier.wait()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    context = multiprocessing.get_context("fork")
    names, barrier = context.Queue(), context.Barrier(4)
    processes = [context.Process(target=_in_a_process, args=(names, barrier, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {names.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    stem = "runs/digits-lenet5-cnn-20261129-120000"
    assert found == {stem, f"{stem}-2", f"{stem}-3", f"{stem}-4"}


@pytest.mark.parametrize("left", ["", ".lock", "config.json.tmp", ".config.json.0123.tmp", "config.json", "data.json"])
def test_what_a_run_left_that_was_killed_before_its_first_checkpoint(options, tmp_path, capsys, left):
    folder, arguments = tmp_path / "run", [*options, "--method", "cnn", "--epochs", "1"]
    if left in ("config.json", "data.json"):
        assert main([*arguments, "--output", str(tmp_path / "other")]) == 0
    folder.mkdir()
    for name in {"data.json": ["config.json", "data.json"]}.get(left, [left] * bool(left)):
        other = tmp_path / "other" / name
        (folder / name).write_bytes(other.read_bytes() if other.exists() else b'{"recipe": "dig')
    if left != "config.json" and left != "data.json":
        assert main(["--resume", str(folder)]) == 2
        assert "without a config.json; start it again with --output" in capsys.readouterr().err
    else:
        assert main(["--resume", str(folder)]) == 0
        (folder / "log.csv").unlink()
        for name in ("checkpoint.pt", "teacher.pt", "teacher_best.pt", "summary.json"):
            (folder / name).unlink()
    assert main([*arguments, "--output", str(folder)]) == 0
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize(
    "refused", [["--arch", "torchvision/resnet99"], ["--batch-size", "4000"], ["--initial", "nothing.pt"]]
)
@pytest.mark.parametrize("method", ["plain", "compare"])
def test_a_refused_command_leaves_nothing(options, tmp_path, capsys, refused, method):
    folder = tmp_path / "runs" / "run"
    arguments = [*options, "--epochs", "1", "--method", method, "--output", str(folder)]
    assert main([*arguments, *refused]) == 2
    assert not folder.exists()
    folder.mkdir()  # of the user: it stays
    assert main([*arguments, *refused]) == 2
    assert list(folder.iterdir()) == []


def test_nothing_of_anyone_else_is_taken_for_a_start(options, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    content = json.dumps({"architectures": ["BertModel"]})
    (folder / "config.json").write_text(content)
    assert main([*options, "--output", str(folder)]) == 2
    assert f"{folder} exists" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["config.json"] and (folder / "config.json").read_text() == content
    (tmp_path / "file").write_text("mine")
    assert main([*options, "--output", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_fails_after_a_checkpoint_keeps_its_folder(config, data, tmp_path, monkeypatch):
    from adderops.distill import trainer

    def fail(*_):
        raise ValueError("late")

    monkeypatch.setattr(trainer.Run, "save_networks", fail)
    with pytest.raises(ValueError, match="late"):
        train(config, data, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


@pytest.mark.slow
def test_the_exit_status_of_the_process(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "adderops.distill"]
    missing, range, abbreviated = ["eval", tmp_path / "none"], ["--lr", "-1"], ["--batch", "3"]
    for arguments in (missing, range, abbreviated, ["quantize", tmp_path, "--bit", "8"]):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
