"""Names of classes travel with a run and decide, not their order; images are read by their type."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adderops.distill import load_data
from adderops.distill.__main__ import main, run
from adderops.distill.data import IDX_FILES, load_test_images
from adderops.distill.run_folder import RunFolder
from distill.runs import write_bars

TINY = "--arch lenet5 --side 32 --method plain --epochs 2 --batch-size 8 --threads 1".split()


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def write_pictures(folder: Path, classes: dict[str, int], train: int = 12, val: int = 4) -> Path:
    """Noise about a grey level for each class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, level in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 50, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("names")
    write_pictures(root / "set", {"dark": 10, "light": 200})
    assert main([*TINY, "--data", str(root / "set"), "--output", str(root / "run")]) == 0
    return root / "run"


def accuracy(capsys) -> float:
    return float(capsys.readouterr().out.split("student")[-1].split("%")[0])


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
    assert run(["eval", str(trained), "--data", str(other)]) == 2
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


@pytest.mark.parametrize("change", [rename, add_class, remove_image, move_images])
def test_a_changed_folder_is_not_resumed(trained, tmp_path, capsys, change):
    folder = Path(shutil.copytree(trained.parent / "set", tmp_path / "set"))
    arguments = [*TINY, "--data", str(folder), "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    expected = change(folder)
    capsys.readouterr()
    assert run(["--resume", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "expected the images that the run began with, got others: " in message and expected in message


def test_other_pixels_are_not_resumed(options, tmp_path, capsys):
    write_bars(tmp_path)
    arguments = ["--data", str(tmp_path), "--method", "cnn", "--output", str(tmp_path / "run")]
    assert main([*options, *arguments]) == 0
    path = tmp_path / IDX_FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert run(["--resume", str(tmp_path / "run")]) == 2
    assert "got others: other training pixels" in capsys.readouterr().err
    assert run(["eval", str(tmp_path / "run"), "--reestimate-batchnorm", "20"]) == 2  # of those very images
    assert run(["eval", str(tmp_path / "run")]) == 0


def test_a_run_of_an_older_version_has_no_data_json(trained, tmp_path, capsys):
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    (old / "data.json").unlink()
    content = torch.load(old / "checkpoint.pt", weights_only=True)
    torch.save({name: value for name, value in content.items() if name != "data"}, old / "checkpoint.pt")
    assert RunFolder.load(old).data == RunFolder.load(trained).data
    for command in (["eval", str(old)], ["export", str(old), "--format", "state_dict"], ["--resume", str(old)]):
        assert run(command) == 0
    assert (old / "data.json").read_bytes() == (trained / "data.json").read_bytes()


def test_exports_carry_names_and_normalization_without_the_images(trained, tmp_path):
    moved = Path(shutil.copytree(trained, tmp_path / "run"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    for format in ("state_dict", "torch", "onnx"):
        if format == "onnx":
            pytest.importorskip("onnx")
            pytest.importorskip("onnxscript")
        assert main(["export", str(moved), "--format", format]) == 0
    assert main(["report", str(moved)]) == 0
    stored = {"preprocessing.json": ""}
    torch.export.load(moved / "export" / "student.pt2", extra_files=stored)
    beside = json.loads((moved / "export" / "student.json").read_text())
    import onnx

    model = onnx.load(moved / "export" / "student.onnx")
    for facts in (beside, json.loads(stored["preprocessing.json"]), {p.key: p.value for p in model.metadata_props}):
        assert json.loads(facts["classes"]) == ["dark", "light"]
        assert json.loads(facts["mean"]) == pytest.approx([0.485, 0.456, 0.406])


def test_the_int8_file_carries_names(tmp_path):
    from adderops.quant import load

    options = "--data digits --method plain --epochs 4 --train-images 400 --threads 1 --lr 0.05".split()
    assert main([*options, "--output", str(tmp_path / "run")]) == 0
    assert main(["quantize", str(tmp_path / "run"), "--batch-size", "4", "--images", "100"]) == 0
    [file] = (tmp_path / "run" / "export").iterdir()
    facts = load(file)[1]["facts"]
    assert facts["classes"] == list("0123456789") and (facts["channels"], facts["side"]) == (1, 32)


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


# --- what a pixel means ---


def levels(tmp_path: Path, image: Image.Image, suffix: str, **options) -> torch.Tensor:
    """The (3, 16, 16) grey levels that a file of this image is trained on."""
    folder = tmp_path / "set"
    for part in ("train", "val"):
        (folder / part / "a").mkdir(parents=True, exist_ok=True)
        image.save(folder / part / "a" / f"0.{suffix}", **options)
    test = load_data(str(folder), side=16).test
    return test.transform(test.source[0][0]).float()


RAMP = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    expected = levels(tmp_path / "8", Image.fromarray(RAMP), "png")
    image = Image.fromarray(np.minimum(RAMP.astype(np.uint16) * 257.0 + 100, 65535).astype(np.uint16))
    torch.testing.assert_close(levels(tmp_path / "16", image, suffix), expected, rtol=0, atol=1)
    assert expected.min() < 30 and expected.max() > 220


def test_float_grey_is_scaled_or_refused(tmp_path):
    expected = levels(tmp_path / "8", Image.fromarray(RAMP), "png")
    share = RAMP.astype(np.float32) / 255
    torch.testing.assert_close(levels(tmp_path / "f", Image.fromarray(share), "tiff"), expected, rtol=0, atol=1)
    for i, wrong in enumerate((share * 255, share - 0.5, np.where(share > 0.5, np.nan, share).astype(np.float32))):
        with pytest.raises(ValueError, match=r"0\.tiff: expected a whole image file.*expected 0 to 1"):
            levels(tmp_path / str(i), Image.fromarray(wrong), "tiff")
    with pytest.raises(ValueError, match=r"0\.tiff: .*32-bit integers, whose range is not known"):
        levels(tmp_path / "i", Image.fromarray(RAMP.astype(np.int32) * 1000), "tiff")


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg")])
def test_other_modes_are_as_pil_converts_them(tmp_path, mode, suffix):
    """Also torchvision's way: alpha is dropped."""
    image = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], 2)).convert(mode)
    if "A" in mode:
        image.putalpha(100)
    image.save(tmp_path / f"x.{suffix}")
    expected = Image.open(tmp_path / f"x.{suffix}").convert("RGB")
    found = levels(tmp_path / "a", image, suffix)
    torch.testing.assert_close(found, levels(tmp_path / "b", expected, "png"), rtol=0, atol=0)


def test_an_animation_gives_its_first_frame_and_exif_does_not_turn(tmp_path):
    frames = [Image.fromarray(frame) for frame in (RAMP, 255 - RAMP)]
    expected = levels(tmp_path / "a", frames[0], "png")
    found = levels(tmp_path / "b", frames[0], "png", save_all=True, append_images=frames[1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    exif = Image.Exif()
    exif[0x0112] = 3
    torch.testing.assert_close(levels(tmp_path / "c", frames[0], "png", exif=exif), expected, rtol=0, atol=0)


# --- compare ---


def test_compare_of_one_run_twice_prints_no_half_result(trained, capsys):
    capsys.readouterr()
    assert run(["compare", str(trained), str(trained)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "expected each run once, got" in printed.err
