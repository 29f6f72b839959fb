"""`RunFolder`: networks, shapes and normalization of a run, with data.json and without."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adderops.distill import main
from adderops.distill.data import IDX_FILES, read_idx
from adderops.distill.runs.folder import RunFolder
from adderops.models import resnet20
from distill.runs import assert_same_state, error_of, saved, written_run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_normalization_is_that_of_the_training(run, tmp_path):
    config = RunFolder.load(run).config
    images = read_idx(Path(config.data) / IDX_FILES[0])
    pixels = F.pad(images, (2, 2, 2, 2)).double() / 255
    [mean], [std] = (RunFolder.load(run).data[name] for name in ("mean", "std"))
    assert (mean, std) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()), rel=1e-6)
    # published numbers need no images
    cifar = written_run(tmp_path / "cifar", [0.5], method="plain", data="cifar10", arch="resnet20", root=str(tmp_path))
    (cifar / "student.pt").write_bytes(saved(resnet20("adder").state_dict()))
    data = RunFolder.load(cifar).data
    assert (data["mean"], data["std"]) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    assert (data["num_classes"], data["classes"]) == (10, None)


def test_a_network_has_the_sizes_of_its_weights_and_of_the_images(tmp_path):
    saved_network = resnet20("adder", in_channels=3, num_classes=7)
    (tmp_path / "images" / "train").mkdir(parents=True)
    for name, options, side in (
        ("cifar", {"data": "cifar10", "root": str(tmp_path)}, 32),
        ("files", {"data": str(tmp_path / "images"), "side": 48}, 48),
    ):
        folder = written_run(tmp_path / name, [0.5], method="plain", arch="resnet20", **options)
        (folder / "student.pt").write_bytes(saved(saved_network.state_dict()))
        network = RunFolder.load(folder).network("student")  # without the images
        assert_same_state(dict(network.state_dict()), dict(saved_network.state_dict()))
        run = RunFolder.load(folder)
        assert (run.input_shape(), run.num_classes()) == ((3, side, side), 7)
        # images in memory have their size whatever the network is made for
        run = replace(run, config=run.config.changed(arch="resnet18"))
        assert run.input_shape() == (3, side, side)


def test_a_run_of_an_older_version_has_no_data_json(trained_on_pictures, tmp_path):
    trained = trained_on_pictures
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    (old / "data.json").unlink()
    content = torch.load(old / "checkpoint.pt", weights_only=True)
    torch.save({name: value for name, value in content.items() if name != "data"}, old / "checkpoint.pt")
    assert RunFolder.load(old).data == RunFolder.load(trained).data
    assert main(["export", str(old), "--format", "state_dict"]) == 0
    assert "classes" not in json.loads((old / "export" / "student.json").read_text())  # they may have changed since
    for command in (["eval", str(old)], ["export", str(old), "--format", "state_dict"], ["--resume", str(old)]):
        assert main(command) == 0
    assert (old / "data.json").read_bytes() == (trained / "data.json").read_bytes()


def test_an_older_run_refuses_images_of_other_classes(trained_on_pictures, tmp_path, capsys):
    folder = Path(shutil.copytree(trained_on_pictures.parent, tmp_path / "moved"))
    (folder / "run" / "data.json").unlink()
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "run" / "config.json").write_text(json.dumps({**config, "data": str(folder / "set")}))
    for part in ("train", "val"):
        shutil.copytree(folder / "set" / part / "dark", folder / "set" / part / "grey")
    expected = "expected the images of the run, of 3 channels and 2 classes, got 3 and 3"
    assert expected in error_of(capsys, "export", folder / "run", "--format", "state_dict")


@pytest.mark.parametrize("command", ["eval", "export --format torch", "report"])
def test_commands_read_no_training_image(trained_on_pictures, tmp_path, command):
    folder = Path(shutil.copytree(trained_on_pictures.parent, tmp_path / "moved"))
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "run" / "config.json").write_text(json.dumps({**config, "data": str(folder / "set")}))
    shutil.rmtree(folder / "set" / "train")
    name, *options = command.split()
    assert main([name, str(folder / "run"), *options]) == 0
