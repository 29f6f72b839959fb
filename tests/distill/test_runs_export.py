"""`export`: each format gives the network's logits, and holds what its user must know."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adderops.distill import load_data, main
from adderops.distill.runs.folder import RunFolder
from adderops.models import lenet5
from distill.runs import error_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(run) -> torch.Tensor:
    [(images, _)] = load_data(RunFolder.load(run).config.data).test.batches([torch.arange(5)])
    return images


def logits_of(run: Path, name: str, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return RunFolder.load(run).network(name)(images)


def test_export_of_a_state_dict(run, images, capsys):
    assert main(["export", str(run), "--format", "state_dict"]) == 0
    network = lenet5("adder", num_classes=4).eval()
    network.load_state_dict(torch.load(run / "export" / "student.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(network(images), logits_of(run, "student", images))
    mean, std = (RunFolder.load(run).data[name] for name in ("mean", "std"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run / "export" / "student.pt")
    assert f"mean      {mean}" in lines and f"std       {std}" in lines


def test_export_of_a_program(run, images, tmp_path):
    target = tmp_path / "network.pt2"
    options = ["--format", "torch", "--weights", "student_ema", "--output", str(target)]
    assert main(["export", str(run), *options]) == 0
    stored = {"preprocessing.json": ""}
    program = torch.export.load(target, extra_files=stored)
    assert torch.allclose(program.module()(images), logits_of(run, "student_ema", images), atol=1e-4)
    mean, std = (RunFolder.load(run).data[name] for name in ("mean", "std"))
    facts = json.loads(stored["preprocessing.json"])
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (mean, std)
    assert facts["input"].startswith("float32 (N, 1, 32, 32)") and facts["output"] == "logits (N, 4)"


def test_export_of_onnx(run, images):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--format", "onnx", "--weights", "student"]) == 0
    target = run / "export" / "student.onnx"
    [logits] = onnxruntime.InferenceSession(target).run(None, {"input": images.numpy()})
    # float32 sums of some hundred terms, in another order
    assert torch.allclose(torch.from_numpy(logits), logits_of(run, "student", images), atol=1e-3)
    mean, std = (RunFolder.load(run).data[name] for name in ("mean", "std"))
    stored = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert (json.loads(stored["mean"]), json.loads(stored["std"])) == (mean, std)
    assert str(run) not in str(stored)


def test_export_refuses_what_is_not_there(run, capsys):
    assert "expected student or student_ema or teacher" in error_of(
        capsys, "export", run, "--format", "torch", "--weights", "teacher_ema"
    )
    (run / "summary.json").unlink()
    assert "expected a finished run" in error_of(capsys, "export", run, "--format", "state_dict")
    assert not (run / "export").exists()


@pytest.mark.slow
def test_exports_carry_names_and_normalization_without_the_images(trained_on_pictures, tmp_path):
    moved = Path(shutil.copytree(trained_on_pictures, tmp_path / "run"))
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
    next_to_it = json.loads((moved / "export" / "student.json").read_text())
    import onnx

    model = onnx.load(moved / "export" / "student.onnx")
    for facts in (next_to_it, json.loads(stored["preprocessing.json"]), {p.key: p.value for p in model.metadata_props}):
        assert json.loads(facts["classes"]) == ["dark", "light"]
        assert json.loads(facts["mean"]) == pytest.approx([0.485, 0.456, 0.406])
