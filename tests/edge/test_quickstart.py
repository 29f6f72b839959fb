"""The commands of docs/edge.md: train, quantize, compile, run; the program's classes and logits are Python's."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from slow import slow_except

from adderops.distill import load_data, main
from adderops.quant import load

from .hosts import HOSTS

TRAIN = "--data digits --method plain --epochs 4 --train-images 400 --lr 0.05 --threads 1 --output run".split()
QUANTIZE = "quantize run --images 100 --batch-size 4 --c network --main".split()


@pytest.fixture(scope="module", params=slow_except({"float32"}, ["float32", "integer"]))
def folder(request, tmp_path_factory) -> Path:
    """What the commands leave in the folder in which they ran; trained only once."""
    folder, trained = tmp_path_factory.mktemp(f"quickstart-{request.param}"), tmp_path_factory.getbasetemp() / "digits"
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not trained.exists():
            assert main(TRAIN) == 0
            shutil.move("run", trained)
        shutil.copytree(trained, "run")
        assert main([*QUANTIZE, "--epilogue", request.param]) == 0
    torch.set_num_threads(before)
    return folder


@pytest.fixture(scope="module")
def outputs(folder) -> torch.Tensor:
    """The int8 network's, of the images that the program reads."""
    network, facts = load(folder / "run" / "export" / "int8.safetensors")
    test = load_data("digits").test
    [(images, _)] = test.batches([torch.arange(count(folder))])
    mean, std = (torch.tensor(facts["facts"][name])[:, None, None] for name in ("mean", "std"))
    raw = ((images * std + mean) * 255).round().to(torch.uint8)  # as bytes, channels last
    assert raw.permute(0, 2, 3, 1).contiguous().numpy().tobytes() == (folder / "images.bin").read_bytes()
    return network(images)


def count(folder: Path) -> int:
    return len((folder / "classes.txt").read_text().splitlines())


@pytest.mark.parametrize("host", slow_except({"gcc", "unicorn-zig", "qemu"}, HOSTS))
def test_the_program_prints_what_python_computes(host, folder, outputs):
    images = (folder / "images.bin").read_bytes()
    execute = HOSTS[host](folder)
    classes = execute(["images.bin"], {"images.bin": images})
    assert classes.succeeded
    assert classes.output == (folder / "classes.txt").read_text()
    logits = execute(["--logits", "images.bin"], {"images.bin": images})
    assert logits.succeeded
    lines = [line.split() for line in logits.output.splitlines()]
    assert [line[0] for line in lines] == classes.output.split()
    assert len({line[0] for line in lines}) > 5  # a network that always says the same would pass anything
    if "integer" in folder.name:  # another function, seldom another class
        agree = sum(int(line[0]) == y.argmax().item() for line, y in zip(lines, outputs, strict=True))
        assert agree >= 0.9 * len(lines)
    else:
        found = [struct.pack("<10f", *map(float.fromhex, line[1:])) for line in lines]
        assert found == [y.numpy().tobytes() for y in outputs]
