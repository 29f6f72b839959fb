"""`spike`: from the CNN of a run to a spiking network in one command."""

import json
import re

import pytest
import torch

from adderops.distill import load_data, main
from adderops.distill.evaluate import evaluate
from adderops.distill.runs import spike
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.spike import load_spiking, spiking_facts
from distill.runs import error_of, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--steps 4 --images 16".split()


def test_from_run_to_spiking_network(runs, folder_of_bars, tmp_path, capsys):
    folder, path = tmp_path / "spiking", runs["cnn"].path
    assert main(["spike", str(path), *SMALL, "--output", str(folder)]) == 0
    title, header, *rows, last = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert title[0].endswith("cnn, seed 0: 40 test images") and last == [str(folder)]
    assert header == ["network", "accuracy, %", "loss"]
    assert [row[0] for row in rows] == ["CNN", "spiking, 4 steps, advanced"]
    facts, network = spiking_facts(folder), load_spiking(folder)
    assert facts["cnn_accuracy"] == float(rows_of(path / "log.csv")[-1]["teacher_test_accuracy"])
    tested = evaluate({"it": network}, load_data(str(folder_of_bars)).test, torch.device("cpu"))
    assert facts["spiking_accuracy"] == tested["it_test_accuracy"]
    assert facts["spiking_loss"] == pytest.approx(tested["it_test_loss"])  # in other batches
    assert [float(row[1]) for row in rows] == pytest.approx(
        [100 * facts[f"{kind}_accuracy"] for kind in ("cnn", "spiking")], abs=0.01
    )
    assert (facts["images"], facts["steps"], facts["shape"]) == (16, 4, [1, 32, 32])
    assert facts["command"].endswith(f"spike {path} --steps 4 --calibrate advanced --images 16 --output {folder}")


def test_a_second_call_writes_the_same_bytes(run, capsys):
    written = []
    for _ in range(2):
        assert main(["spike", str(run), *SMALL, "--calibrate", "light", "--test-images", "7"]) == 0
        folder = run / "spiking" / "teacher-4-light"
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"network.pt", "spiking.json"}
    facts = spiking_facts(folder)
    assert facts["network"].startswith("teacher of ")  # of a run about an adder network
    assert facts["test_images"] == 7
    assert 7 * facts["spiking_accuracy"] == pytest.approx(round(7 * facts["spiking_accuracy"]))


def test_facts_never_describe_another_network(run, monkeypatch, capsys):
    folder = run / "spiking" / "teacher-4-none"
    assert main(["spike", str(run), *SMALL, "--calibrate", "none"]) == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spike, "write_json", killed)
    assert main(["spike", str(run), *SMALL, "--calibrate", "none", "--images", "2"]) == 130
    with pytest.raises(FileNotFoundError, match="expected a folder that `spike` wrote, got one without spiking.json"):
        load_spiking(folder)


def test_damaged_files(run, capsys):
    folder = run / "spiking" / "teacher-4-none"
    assert main(["spike", str(run), *SMALL, "--calibrate", "none"]) == 0
    facts = json.loads((folder / "spiking.json").read_text())
    (folder / "spiking.json").write_text(json.dumps(facts | {"num_classes": 7}))
    with pytest.raises(ValueError, match="network.pt: expected a state_dict of a spiking lenet5, got another"):
        load_spiking(folder)
    (folder / "spiking.json").write_text("{}")
    with pytest.raises(ValueError, match="spiking.json: expected a spiking.json as this program writes it, got a dam"):
        load_spiking(folder)


def test_refusals(runs, run, tmp_path, capsys):
    said = error_of(capsys, "spike", runs["plain"].path)
    assert "expected a run with a CNN, got plain; no adder network becomes spiking without training: the " in said
    said = error_of(capsys, "spike", runs["cnn"].path, "--steps", "0")
    assert "--steps: expected a finite number of at least 1 and at most 4096, got 0" in said
    said = error_of(capsys, "spike", runs["cnn"].path, "--output", tmp_path / "no" / "folder")
    assert f"--output: expected a folder in an existing one, got {tmp_path / 'no' / 'folder'}" in said
    (run / "summary.json").unlink()
    assert "expected a finished run, got one after epoch 3 of 3" in error_of(capsys, "spike", run)
    assert not (run / "spiking").exists()


@pytest.mark.slow
def test_calibrations_bring_the_network_closer_to_the_cnn(tmp_path, capsys):
    """Both do; that 'advanced' gains more than 'light' shows on larger images than the digits: docs/spiking.md."""
    run = tmp_path / "run"
    assert main(["--data", "digits", "--method", "cnn", "--epochs", "4", "--threads", "1", "--output", str(run)]) == 0
    [(images, _)] = load_data("digits").test.batches([torch.arange(300)])
    wanted, errors = RunFolder.load(run).network("teacher")(images), []
    for calibration in ("none", "light", "advanced"):
        assert main(["spike", str(run), "--steps", "4", "--images", "200", "--calibrate", calibration]) == 0
        network = load_spiking(run / "spiking" / f"teacher-4-{calibration}")
        errors.append((network(images) - wanted).square().mean().item())
    assert max(errors[1:]) < 0.9 * errors[0]  # .74 to .81 over five seeds
    assert main(["spike", str(run), "--steps", "8", "--images", "200", "--calibrate", "advanced"]) == 0
    facts = spiking_facts(run / "spiking" / "teacher-8-advanced")
    assert abs(facts["spiking_accuracy"] - facts["cnn_accuracy"]) <= 0.01
