"""Damaged files end a command with one line that names the file; never a traceback, a crash, or no end.

ADDEROPS_FUZZ=500 tries so many random damages per kind of file.
"""

import gzip
import json
import os
import random
import shutil
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adderops.distill import main
from adderops.distill.data import IDX_FILES, load_data, read_idx
from distill.runs import write_bars

COUNT = int(os.environ.get("ADDEROPS_FUZZ", "8"))
TINY = "--epochs 1 --batch-size 10 --threads 1 --device cpu".split()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of pkkd on a few images; copy it before changing it."""
    root = tmp_path_factory.mktemp("damage")
    (root / "bars").mkdir()
    write_bars(root / "bars", train=40, test=8)
    options = ["--data", root / "bars", "--method", "pkkd", "--output", root / "run"]
    assert main([*TINY, *map(str, options)]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "set"
    for part in ("train", "val"):
        for k, name in enumerate(("a", "b")):
            (folder / part / name).mkdir(parents=True)
            for i, suffix in enumerate(("png", "jpg", "bmp", "gif", "tiff", "webp", "ppm")):
                image = Image.effect_noise((24, 20), 60).convert("RGB")
                image.putpixel((0, 0), (9 * i, 200 * k, 3))
                if suffix == "gif":
                    image = image.quantize(16)
                image.save(folder / part / name / f"{i}.{'png' if suffix == 'gif' else suffix}", suffix_of(suffix))
    return folder


def suffix_of(suffix: str) -> str:
    return {"jpg": "JPEG", "tiff": "TIFF"}.get(suffix, suffix.upper())


def ends_well(capsys, arguments: list[object], limit: int = 60) -> tuple[int, str]:
    """Runs a command: an exception or no end in time fails the test; returns status and message."""
    capsys.readouterr()
    signal.alarm(limit)  # its default action ends the process: only a hang gets there
    try:
        status = main([str(a) for a in arguments])
    finally:
        signal.alarm(0)
    message = capsys.readouterr().err
    assert status in (0, 1, 2) and "Traceback" not in message
    assert status == 0 or message.count("\n") == 1, message
    return status, message


def refused(capsys, arguments: list[object], *expected: object) -> None:
    status, message = ends_well(capsys, arguments)
    assert status == 2, (status, message)
    for text in expected:
        assert str(text) in message, message


# --- random damage ---


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, lengthened, zeroed, doubled, or replaced in part."""
    data, at = bytearray(content), rng.randrange(max(1, len(content)))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + rng.randint(1, 200)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randint(1, 64))
    elif kind == 4:
        data[at : at + rng.randint(1, 512)] = bytes(rng.randint(1, 512))
    elif kind == 5:
        data = data[at:] + data[:at]
    else:
        data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
    return bytes(data)


ODD = (None, -1, 0, 1, 3, 2**31, 2**70, -(2**63), 1e308, float("nan"), float("inf"), 1.5, True, "", "x", "a\0b")
ODD += ("../x", "ä" * 300, [], [1], {}, {"a": 1}, [[[]]], torch.zeros(2), torch.tensor(3), torch.zeros(0, 3))


def changed(content: Any, rng: random.Random, odd: tuple = ODD) -> Any:
    """The same structure with one value replaced or removed."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        if rng.random() < 0.15:
            return {name: value for name, value in content.items() if name != key}
        return {**content, key: changed(content[key], rng, odd)}
    if isinstance(content, list) and content and rng.random() < 0.9:
        i = rng.randrange(len(content))
        return [*content[:i], changed(content[i], rng, odd), *content[i + 1 :]]
    return rng.choice(odd)


def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    "name, command",
    [
        ("config.json", "eval"),
        ("data.json", "eval"),
        ("data.json", "export"),
        ("student.pt", "eval"),
        ("checkpoint.pt", "--resume"),
        ("config.json", "--resume"),
        ("log.csv", "compare"),
        ("log.csv", "report"),
        ("layers.csv", "report"),
    ],
)
def test_random_damage_of_a_run(trained, tmp_path, capsys, name, command):
    original, rng = (trained / name).read_bytes(), random.Random(f"{name} {command}")
    more = {"export": ["--format", "state_dict"]}.get(command, [])
    folder = copied(trained, tmp_path)
    for i in range(COUNT):
        content = damaged(original, rng)
        if i % 2 and name.endswith(".json"):
            odd = tuple(value for value in ODD if not isinstance(value, torch.Tensor))
            content = json.dumps(changed(json.loads(original), rng, odd)).encode()
        if i % 2 and name.endswith(".pt"):
            torch.save(changed(torch.load(trained / name, weights_only=True), rng), folder / name)
            content = (folder / name).read_bytes()
        if command == "--resume":
            folder = copied(trained, tmp_path)
        (folder / name).write_bytes(content)
        try:
            ends_well(capsys, [command, folder, *more])
        except BaseException:
            shutil.copy(folder / name, tmp_path / "failed")
            print(f"damage {i} of {name}, kept as {tmp_path / 'failed'}")
            raise


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_random_damage_of_idx_files(tmp_path, capsys, which, compress):
    write_bars(tmp_path, train=12, test=8)
    rng, path = random.Random(10 * which + compress), tmp_path / IDX_FILES[which]
    original = path.read_bytes()
    if compress:
        original = gzip.compress(original)
    for _ in range(COUNT):
        path.write_bytes(damaged(original, rng))
        try:
            load_data(str(tmp_path))
        except ValueError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize("kind", range(7))
def test_random_damage_of_images(pictures, kind):
    """Without workers, which a test of its own has: the same function reads."""
    data = load_data(str(pictures), side=8)
    path, label = data.test.source.samples[kind]
    original, rng = Path(path).read_bytes(), random.Random(kind)
    try:
        for _ in range(COUNT):
            Path(path).write_bytes(damaged(original, rng))
            try:
                next(iter(data.test.batches([torch.tensor([kind])])))
            except ValueError as error:
                assert path in str(error)
    finally:
        Path(path).write_bytes(original)


# --- crafted damage ---


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_files_that_promise_more_than_they_hold(trained, tmp_path, capsys):
    """A compressed record, a directory that names one record a thousand times, a tensor of one number for 10^12."""
    initial = [*TINY, "--data", trained.parent / "bars", "--method", "plain", "--output", tmp_path / "o", "--initial"]
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    refused(capsys, [*initial, path], path, "expected a whole state_dict, got a damaged file (a compressed record)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    content = path.read_bytes()
    end = content.rfind(b"PK\x05\x06")
    size, begin = struct.unpack("<II", content[end + 12 : end + 20])
    records = content[begin : begin + size] * 1000
    count = 1000 * struct.unpack("<H", content[end + 10 : end + 12])[0]
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(records), begin, 0)
    path.write_bytes(content[:begin] + records + tail)
    refused(capsys, [*initial, path], path, "got a damaged file (records larger than the file)")
    torch_file(path, {"a": torch.zeros(1).expand(10**6, 10**6)})
    refused(capsys, [*initial, path], path, "a: expected a number for each element")
    path.write_bytes(b"\x80\x02.")
    refused(capsys, [*initial, path], path, "expected a whole state_dict")
    torch_file(path, {1: torch.zeros(1)})
    refused(capsys, [*initial, path], path, "expected a state_dict, got something else")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("declared", [2**31, 3])
def test_a_gzip_file_is_read_as_far_as_its_header_goes(tmp_path, declared):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(struct.pack(">4B3I", 0, 0, 8, 3, declared, 28, 28))]
    parts += [packer.compress(bytes(2**24)) for _ in range(20)]
    path = tmp_path / "images"
    path.write_bytes(b"".join(parts) + packer.flush())
    expected = "memory, got shape" if declared == 2**31 else r"expected 2352 bytes for shape \(3, 28, 28\), got 2353 or"
    with pytest.raises(ValueError, match=expected):
        read_idx(path)


@pytest.mark.parametrize("key", ["config", "epoch", "step", "sums", "log", "layers", "task", "optimizer"])
def test_a_checkpoint_without_one_of_its_parts(trained, tmp_path, capsys, key):
    folder, content = copied(trained, tmp_path), torch.load(trained / "checkpoint.pt", weights_only=True)
    torch_file(folder / "checkpoint.pt", {name: value for name, value in content.items() if name != key})
    refused(capsys, ["--resume", folder], folder / "checkpoint.pt", f"{key}: expected", "got NoneType")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda c: {"epoch": "x"}, "epoch: expected int, got str"),
        (lambda c: {"epoch": 0, "step": 10**9, "log": [], "layers": []}, "step: expected fewer than the steps"),
        (lambda c: {"log": []}, "expected a row of the log for each epoch done, got 0 for 1"),
        (lambda c: {"task": {}}, "expected a checkpoint of this run, got a damaged file"),
        (lambda c: {"optimizer": {}}, "expected a checkpoint of this run, got a damaged file"),
        (lambda c: {"optimizer": {**c["optimizer"], "param_groups": []}}, "expected the parameter groups"),
        (
            lambda c: {"optimizer": {**c["optimizer"], "state": {0: {"momentum_buffer": torch.zeros(7)}}}},
            "momentum_buffer of parameter 0: expected shape",
        ),
        (lambda c: {"config": []}, "config: expected dict, got list"),
        (lambda c: {"data": {"classes": 3}}, "expected the data set of a run"),
    ],
)
def test_a_checkpoint_of_another_form(trained, tmp_path, capsys, change: Callable, expected):
    folder, content = copied(trained, tmp_path), torch.load(trained / "checkpoint.pt", weights_only=True)
    torch_file(folder / "checkpoint.pt", {**content, **change(content)})
    refused(capsys, ["--resume", folder], folder / "checkpoint.pt", expected)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("[" * 100_000, "maximum recursion depth"),
        ("[]", "got list instead of names and values"),
        ("{}", "data: expected a value, got none"),
        ({"arch": None}, "arch: expected a value, got none"),
        ({"threads": None}, "threads: expected a value, got none"),
        ({"data": 5}, "data: expected a string, got 5"),
        ({"amp": 1.5}, "amp: expected a string, got 1.5"),
        ({"weight_decay": 1e308}, "weight_decay: expected a finite number of at least 0 and at most 3.4e+38"),
        ({"batch_size": True}, "batch_size: expected an integer, got True"),
    ],
)
def test_a_configuration_of_another_form(trained, tmp_path, capsys, content, expected):
    folder = copied(trained, tmp_path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / "config.json").read_text()), **content})
    (folder / "config.json").write_text(content)
    refused(capsys, ["eval", folder], folder / "config.json", "expected a configuration", expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_whoever_reads_it(pictures, tmp_path, capsys, workers):
    folder = Path(shutil.copytree(pictures, tmp_path / "set"))
    broken = folder / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = [*TINY, "--data", folder, "--arch", "lenet5", "--side", 32, "--method", "cnn", "--workers", workers]
    refused(capsys, [*options, "--output", tmp_path / "o"], broken, "expected a whole image file, got a damaged one")
    assert not (tmp_path / "o").exists()


def test_a_picture_of_a_format_that_starts_programs_is_none(pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "set"))
    Image.new("RGB", (8, 8)).save(folder / "val" / "a" / "0.png", "EPS")
    with pytest.raises(ValueError, match=r"val/a/0\.png: expected a whole image file"):
        next(iter(load_data(str(folder), side=8).test.batches([torch.tensor([0])])))
