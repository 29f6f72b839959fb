"""Atomic writes: concurrent writers do not interfere, links and devices stay what they are, errors name the file."""

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adderops.atomic import write_atomically

WRITER = """
import sys
from pathlib import Path
from adderops.atomic import write_atomically
for i in range(150):
    write_atomically(Path(sys.argv[1]), sys.argv[2].encode() * 200_000)
"""


@pytest.mark.slow
def test_two_writers_of_one_path(tmp_path):
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 200_000 and content == content[:1] * len(content)
        time.sleep(0.002)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_the_next_write_removes_the_remains_of_a_killed_writer(tmp_path):
    path, program = tmp_path / "file", WRITER.replace("150", "10**9").replace("200_000", "20_000_000")
    writer = subprocess.Popen([sys.executable, "-c", program, str(path), "a"])
    while not any(name.endswith(".tmp") for name in os.listdir(tmp_path)):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    (tmp_path / ".file.0123456789abcdef.tmp").write_bytes(b"of another")
    write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"new"


def test_a_link_keeps_its_target_and_a_file_its_mode(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to("target")
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to("later")
    write_atomically(dangling, b"new")
    assert dangling.is_symlink() and (tmp_path / "later").read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_pipes_and_devices_are_written_in_place(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"content")
    reader.join()
    assert read == [b"content"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write_atomically(tmp_path / "null", b"content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_errors_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no/such/file"):
        write_atomically(tmp_path / "no" / "such" / "file", b"")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_atomically(tmp_path, b"")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            write_atomically(Path("/dev/full"), b"x")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"):
        write_atomically(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == []


def test_names_of_any_length(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
