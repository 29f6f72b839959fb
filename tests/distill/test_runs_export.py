"""`export`: each format gives the network's logits, and holds what its user must know."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adderops.distill import load_data, main
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.spike import FACTS, NETWORK
from adderops.models import lenet5
from adderops.spiking.calibration import converted
from distill.runs import error_of, written_run

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


@pytest.fixture
def spiking_run(folder_of_bars, tmp_path) -> Path:
    """A run of dsr with its initial weights."""
    options = {"method": "dsr", "arch": "lenet5", "data": str(folder_of_bars), "steps": 4, "threshold": 0.5}
    run = RunFolder.load(written_run(tmp_path / "dsr", [0.5], **options))
    torch.manual_seed(0)
    torch.save(run.task.network(run.config, "student", 1, 4).state_dict(), run.path / "student.pt")
    return run.path


def test_export_of_a_spiking_network_as_a_program(spiking_run, images):
    assert main(["export", str(spiking_run), "--format", "torch"]) == 0
    program = torch.export.load(spiking_run / "export" / "student.pt2")
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("adderops.integrate_and_fire.default") == 4
    assert torch.allclose(program.module()(images), logits_of(spiking_run, "student", images), atol=1e-5)


def test_export_of_a_spiking_network_as_nir(spiking_run):
    nir = pytest.importorskip("nir")
    assert main(["export", str(spiking_run), "--format", "nir"]) == 0
    graph = nir.read(spiking_run / "export" / "student.nir")
    assert {"conv1", "spikes.3.membrane", "fc"} < graph.nodes.keys()
    data = RunFolder.load(spiking_run).data
    assert (json.loads(graph.metadata["mean"]), json.loads(graph.metadata["std"])) == (data["mean"], data["std"])
    assert graph.metadata["steps"] == 4 and graph.metadata["output"] == "logits (N, 4)"


def test_export_of_a_network_that_spike_wrote(run, tmp_path, capsys):
    folder, network = tmp_path / "4-none", converted(lenet5("cnn", num_classes=4), steps=4)
    folder.mkdir()
    torch.save(network.state_dict(), folder / NETWORK)
    title = RunFolder.load(run).title
    facts = {"arch": "lenet5", "shape": [1, 32, 32], "num_classes": 4, "steps": 4}
    facts |= {"calibrate": "none", "spiking_accuracy": 0.5, "test_images": 8}
    (folder / FACTS).write_text(json.dumps({**facts, "network": f"teacher of {title}"}))
    command = ["export", str(run), "--format", "state_dict", "--spiking", str(folder)]
    assert main(command) == 0
    state = torch.load(run / "export" / "4-none.pt", weights_only=True)
    assert (
        torch.equal(state["conv2.weight"], network.state_dict()["conv2.weight"]) and "spikes.0.neuron.initial" in state
    )
    assert "without --weights, got teacher" in error_of(capsys, *command, "--weights", "teacher")
    (folder / FACTS).write_text(json.dumps({**facts, "network": "teacher of another run"}))
    assert f"expected a network of {title}" in error_of(capsys, *command)


def test_export_refuses_formats_that_do_not_fit_the_network(run, spiking_run, capsys):
    assert "ONNX has no spiking neurons" in error_of(capsys, "export", spiking_run, "--format", "onnx")
    assert "--format nir: expected a spiking network, got student of" in error_of(
        capsys, "export", run, "--format", "nir"
    )


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
