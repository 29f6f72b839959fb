"""`eval`: it prints what the run holds, and wrong inputs end with a reason."""

import json

import pytest
import torch
import torch.nn.functional as F

from adderops.distill import Options, load_data, main, train
from adderops.distill.data import IDX_FILES, read_idx
from adderops.distill.runs.folder import RunFolder
from distill.idx_files import idx_bytes, write_idx_set
from distill.runs import error_of, lines_of, saved, write_bars, written_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("weights", [[], ["--weights", "teacher"]])
def test_eval_prints_what_the_summary_has(run, capsys, weights):
    summary = json.loads((run / "summary.json").read_text())
    row = RunFolder.load(run).rows[-1]
    assert main(["eval", str(run), *weights]) == 0
    title, header, *lines = lines_of(capsys)
    assert title[-3:] == ["40", "test", "images"] and header == ["network", "accuracy,", "%", "loss", "images/s"]
    assert [line[0] for line in lines] == (["teacher"] if weights else ["student", "student_ema", "teacher"])
    for name, accuracy, _, error, loss, speed in lines:
        expected = summary[f"{name}_test_accuracy"]
        assert float(accuracy) == pytest.approx(100 * expected)
        assert float(error) == pytest.approx(100 * (expected * (1 - expected) / 40) ** 0.5, abs=0.005)
        assert float(loss) == pytest.approx(row[f"{name}_test_loss"], abs=6e-5)
        assert float(speed) > 0


def test_eval_of_the_validation_images(folder_of_bars, tmp_path, capsys):
    options = Options(data=str(folder_of_bars), method="cnn", epochs=1, batch_size=16, validation=24, threads=1)
    summary = train(options, load_data(options.data, validation=24), tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    title, _, line = lines_of(capsys)
    assert title[-3:] == ["24", "validation", "images"]
    assert float(line[1]) == pytest.approx(100 * summary["teacher_test_accuracy"], abs=0.005)


def test_eval_tests_the_files_and_tells_a_difference(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    state = torch.load(run / "student.pt", weights_only=True)
    torch.save(state | {name: torch.zeros_like(state[name]) for name in ("fc.weight", "fc.bias")}, run / "student.pt")
    assert main(["eval", str(run), "--weights", "student"]) == 0
    *_, line, note = capsys.readouterr().out.splitlines()
    ended = 100 * summary["student_test_accuracy"]  # equal logits name the first of four equal classes
    assert "25.00 +-" in line and note == f"student: {ended:.2f} % when the training ended"


@pytest.mark.parametrize("count, taken", [(3, 3), (128, 128), (1000, 128)])  # the set has 128
def test_eval_with_other_batchnorm_statistics(run, folder_of_bars, capsys, count, taken):
    saved = (run / "student.pt").read_bytes()
    assert main(["eval", str(run), "--weights", "student", "--reestimate-batchnorm", str(count)]) == 0
    _, statistics, _, line, *_ = capsys.readouterr().out.splitlines()
    assert statistics == f"BatchNorm statistics of {taken} training images"
    data, network = load_data(str(folder_of_bars)), RunFolder.load(run).network("student")
    chosen = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:taken]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over the batches
    with torch.no_grad():
        for batch in chosen.tensor_split(1 if taken <= 100 else 2):
            [(images, _)] = data.train.batches([batch])
            network.train()(images)
        [(images, labels)] = data.test.batches([torch.arange(40)])
        loss = F.cross_entropy(network.eval()(images), labels)
    assert float(line.split()[4]) == pytest.approx(loss.item(), abs=6e-5)
    assert (run / "student.pt").read_bytes() == saved


def test_eval_refuses_statistics_of_one_image(run, capsys):
    expected = "--reestimate-batchnorm: expected a finite number of at least 2, got 1"
    assert expected in error_of(capsys, "eval", run, "--reestimate-batchnorm", 1)


def test_eval_of_another_set_normalizes_as_in_training(run, folder_of_bars, tmp_path, capsys):
    write_bars(tmp_path, test=60)
    images, labels = (read_idx(tmp_path / name) for name in IDX_FILES[2:])
    for name, array in zip(IDX_FILES, (read_idx(tmp_path / IDX_FILES[0]) // 2, None, images // 2, None), strict=True):
        if array is not None:  # half as bright: its own normalization would make up for it
            (tmp_path / name).write_bytes(idx_bytes(array))
    assert main(["eval", str(run), "--data", str(tmp_path), "--weights", "student"]) == 0
    title, _, line = lines_of(capsys)
    assert title[-5:] == ["60", "test", "images", "of", str(tmp_path)]

    mean, std = (RunFolder.load(run).data[name][0] for name in ("mean", "std"))
    pixels = F.pad(images // 2, (2, 2, 2, 2)).unsqueeze(1) / 255
    with torch.no_grad():
        logits = RunFolder.load(run).network("student")((pixels - mean) / std)
    assert float(line[4]) == pytest.approx(F.cross_entropy(logits, labels.long()).item(), abs=1e-3)
    assert float(line[1]) == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=0.005)


def cut(content: bytes) -> bytes:
    return content[:-1000]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("summary.json", None, "expected a finished run, got one after epoch 3 of 3"),
        ("student.pt", None, "student.pt: no state_dict"),
        ("student.pt", cut, "student.pt: expected a whole state_dict, got a damaged file"),
        ("student.pt", flip, "student.pt: expected a whole state_dict, got a damaged file (wrong checksum of"),
        ("student.pt", saved([1]), "student.pt: expected a state_dict, got something else"),
        ("student.pt", saved({}), "student.pt: expected a state_dict of lenet5, got another"),
        ("config.json", None, "expected a run folder, got one without a config.json"),
        ("config.json", cut, "config.json: expected a configuration"),
        ("log.csv", None, "expected a run of at least one epoch, got a folder without a log.csv"),
        ("log.csv", b"", "log.csv: expected rows with epoch, images_per_second, seconds, got no rows"),
        (
            "log.csv",
            b"epoch,seconds\n1,2\n",
            "log.csv: expected rows with epoch, images_per_second, seconds, got epoch",
        ),
        ("log.csv", b"epoch,seconds\n1\n", "log.csv: expected a number in each column, got a damaged file"),
        ("log.csv", b"epoch,seconds\n1,x\n", "log.csv: expected a number in each column, got a damaged file"),
        ("log.csv", b"\xff\x00\n", "log.csv: expected a number in each column, got a damaged file"),
        ("log.csv", b"epoch,images_per_second,seconds\n1,2,3\n", "log.csv: expected a column with a test accuracy"),
        ("layers.csv", b"epoch,l_mid\n1,2\n", "layers.csv: expected rows with epoch, layer, got epoch, l_mid"),
        ("layers.csv", b"epoch,layer\n1,a\n", "layers.csv: expected columns besides epoch and layer, got none"),
    ],
)
def test_eval_of_a_damaged_run(run, capsys, file, change, message):
    if change is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(change if isinstance(change, bytes) else change((run / file).read_bytes()))
    error = error_of(capsys, "eval", run)
    assert error.startswith("adderops.distill eval: error: ") and message in error and str(run) in error


def test_eval_refuses_what_does_not_fit(run, tmp_path, capsys):
    assert "expected student or student_ema or teacher" in error_of(capsys, "eval", run, "--weights", "teacher_ema")
    write_idx_set(tmp_path / "other")  # of three classes
    error = error_of(capsys, "eval", run, "--data", tmp_path / "other")
    assert "data: expected 4 classes for this network, got 3" in error
    assert f"data: no folder {tmp_path}/none" in error_of(capsys, "eval", run, "--data", tmp_path / "none")
    assert "threads: expected" in error_of(capsys, "eval", run, "--threads", 0)
    comparison = written_run(tmp_path / "both", [0.5], method="compare")
    assert f"{comparison}/pkkd: expected a run folder" in error_of(capsys, "eval", comparison)
