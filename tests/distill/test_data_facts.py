"""What a run records about its image set: class names decide, not their order, and a changed set is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adderops.distill import load_data, main
from adderops.distill.data import IDX_FILES, load_test_images
from distill.runs import TINY, write_bars, write_pictures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(trained_on_pictures) -> Path:
    return trained_on_pictures


def accuracy(capsys) -> float:
    """Of the student, in percent, as `eval` prints it."""
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("student ")]
    return float(line.split()[1])


def test_a_run_keeps_what_its_set_was(trained):
    facts = json.loads((trained / "data.json").read_text())
    assert (facts["name"], facts["channels"], facts["side"]) == ("set", 3, 32)
    assert (facts["num_classes"], facts["classes"]) == (2, ["dark", "light"])
    assert (facts["train_images"], facts["test_images"], facts["held_out"]) == (24, 8, False)
    assert facts["mean"] == pytest.approx([0.485, 0.456, 0.406]) and len(facts["std"]) == 3
    assert set(facts["checksums"]) == {f"{p} {w}" for p in ("training", "test") for w in ("labels", "file names")}
    assert torch.load(trained / "checkpoint.pt", weights_only=True)["data"] == facts


def test_classes_are_found_by_name(trained, tmp_path, capsys):
    """The folder has one class more before the others, so every number is another; without training images."""
    other = write_pictures(tmp_path / "other", {"light": 200, "dark": 10})
    shutil.rmtree(other / "train")
    capsys.readouterr()
    assert main(["eval", str(trained)]) == 0
    expected = accuracy(capsys)
    assert main(["eval", str(trained), "--data", str(other)]) == 0
    assert accuracy(capsys) == expected
    facts = json.loads((trained / "data.json").read_text())
    swapped = Path(shutil.copytree(trained, tmp_path / "swapped"))
    (swapped / "data.json").write_text(json.dumps({**facts, "classes": ["light", "dark"]}))
    assert main(["eval", str(swapped), "--data", str(other)]) == 0
    assert accuracy(capsys) == pytest.approx(100 - expected)


def test_labels_are_numbered_by_the_names_of_the_run(trained, tmp_path):
    facts = {**json.loads((trained / "data.json").read_text()), "classes": ["light", "dark"]}
    images, _ = load_test_images(str(trained.parent / "set"), facts)
    [(batch, labels)] = images.batches([torch.arange(8)])
    assert torch.equal(labels, (batch.mean((1, 2, 3)) < 0).long())  # dark is 1
    digits = load_data("digits")
    images, _ = load_test_images("digits", {**digits.facts(), "classes": list("9876543210")})
    assert torch.equal(images.source.tensors[1], 9 - digits.test.source.tensors[1])


def test_unknown_classes_are_listed(trained, tmp_path, capsys):
    other = write_pictures(tmp_path / "other", {"night": 10, "dark": 10, "day": 200})
    assert main(["eval", str(trained), "--data", str(other)]) == 2
    assert "expected classes among dark, light, got unknown ones: day, night" in capsys.readouterr().err


def test_numbers_are_the_names_of_digits_only(tmp_path):
    assert load_data("digits").classes == tuple("0123456789")
    write_bars(tmp_path)
    assert load_data(str(tmp_path)).classes is None


def rename(folder: Path) -> str:
    for part in ("train", "val"):
        (folder / part / "dark").rename(folder / part / "sombre")
    return "classes dark, light -> light, sombre"


def add_class(folder: Path) -> str:
    for part in ("train", "val"):
        shutil.copytree(folder / part / "dark", folder / part / "grey")
    return "num classes 2 -> 3"


def remove_image(folder: Path) -> str:
    (folder / "train" / "dark" / "0.png").unlink()
    return "train images 24 -> 23; other training labels"


def move_images(folder: Path) -> str:
    for part in ("train", "val"):
        (folder / part / "dark" / "0.png").rename(folder / part / "light" / "x.png")
    return "other training labels; other training file names"


@pytest.mark.slow
@pytest.mark.parametrize("change", [rename, add_class, remove_image, move_images])
def test_a_changed_folder_is_not_resumed(trained, tmp_path, capsys, change):
    folder = Path(shutil.copytree(trained.parent / "set", tmp_path / "set"))
    arguments = [*TINY, "--data", str(folder), "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    expected = change(folder)
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "expected the images that the run began with, got others: " in message and expected in message


def test_other_pixels_are_not_resumed(options, tmp_path, capsys):
    write_bars(tmp_path)
    arguments = ["--data", str(tmp_path), "--method", "cnn", "--output", str(tmp_path / "run")]
    assert main([*options, *arguments]) == 0
    path = tmp_path / IDX_FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "got others: other training pixels" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--reestimate-batchnorm", "20"]) == 2  # of those very images
    assert main(["eval", str(tmp_path / "run")]) == 0


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(trained, tmp_path):
    folder = Path(shutil.copytree(trained.parent / "set", tmp_path / ".hidden" / "set"))
    for part in ("train", "val"):
        shutil.copytree(folder / part / "dark", folder / part / ".ipynb_checkpoints")
        shutil.copytree(folder / part / "dark", folder / part / "light" / ".ipynb_checkpoints")
        (folder / part / ".DS_Store").write_bytes(b"\0")
        (folder / part / "dark" / "._0.png").write_bytes(b"\0")
    data = load_data(str(folder), side=8)
    assert data.classes == ("dark", "light") and (len(data.train), len(data.test)) == (24, 8)
    (folder / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train: expected images \(.*\) in empty, got none"):
        load_data(str(folder), side=8)
