"""eval, compare, export: they print what the runs hold, and wrong inputs end with a reason."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adderops.distill import Options, load_data, train
from adderops.distill.__main__ import main
from adderops.distill.checkpoint import write_csv, write_json
from adderops.distill.commands import COMMANDS
from adderops.distill.data import IDX_FILES, read_idx
from adderops.distill.run_folder import RunFolder
from adderops.models import lenet5, resnet20
from distill.idx_files import idx_bytes, write_idx_set
from distill.runs import assert_same_state, write_bars


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="module")
def trained(folder_of_bars, tmp_path_factory) -> Path:
    """A finished run of pkkd with all three networks; copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "pkkd"
    config = Options(data=str(folder_of_bars), method="pkkd", epochs=3, batch_size=16, lr=0.02, ema=0.5, threads=1)
    train(config, load_data(config.data), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def written_run(folder: Path, accuracies: list[float], **options) -> Path:
    """A run folder as the trainer leaves it, without networks; `accuracies` are the student's, one an epoch."""
    config = Options(**{"data": "digits", "epochs": len(accuracies), "threads": 1, **options}).resolve()
    name = "teacher" if config.method == "cnn" else "student"
    rows = [
        {
            "epoch": i + 1,
            f"{name}_train_accuracy": 1.0,
            f"{name}_test_accuracy": accuracy,
            "images_per_second": 100.0 + i,
            "seconds": 1800.0,
        }
        for i, accuracy in enumerate(accuracies)
    ]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.flat())
    write_csv(folder / "log.csv", rows)
    if len(rows) == config.epochs:
        write_json(folder / "summary.json", {})
    return folder


def lines_of(capsys) -> list[list[str]]:
    """The words of each line printed."""
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def error_of(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


# --- eval ---


@pytest.mark.parametrize("weights", [[], ["--weights", "teacher"]])
def test_eval_prints_what_the_summary_has(run, capsys, weights):
    summary = json.loads((run / "summary.json").read_text())
    row = RunFolder.load(run).rows[-1]
    assert main(["eval", str(run), *weights]) == 0
    title, *lines = lines_of(capsys)
    assert title[-3:] == ["40", "test", "images"]
    assert [line[0] for line in lines] == (["teacher"] if weights else ["student", "student_ema", "teacher"])
    for name, accuracy, _, _, error, _, loss, speed, unit in lines:
        expected = summary[f"{name}_test_accuracy"]
        assert float(accuracy) == pytest.approx(100 * expected)
        assert float(error) == pytest.approx(100 * (expected * (1 - expected) / 40) ** 0.5, abs=0.005)
        assert float(loss) == pytest.approx(row[f"{name}_test_loss"], abs=6e-5)
        assert float(speed) > 0 and unit == "images/s"


def test_eval_of_the_validation_images(folder_of_bars, tmp_path, capsys):
    config = Options(data=str(folder_of_bars), method="cnn", epochs=1, batch_size=16, validation=24, threads=1)
    summary = train(config, load_data(config.data, validation=24), tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    title, line = lines_of(capsys)
    assert title[-3:] == ["24", "validation", "images"]
    assert float(line[1]) == pytest.approx(100 * summary["teacher_test_accuracy"], abs=0.005)


def test_eval_tests_the_files_and_tells_a_difference(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    state = torch.load(run / "student.pt", weights_only=True)
    torch.save(state | {name: torch.zeros_like(state[name]) for name in ("fc.weight", "fc.bias")}, run / "student.pt")
    assert main(["eval", str(run), "--weights", "student"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    ended = 100 * summary["student_test_accuracy"]  # equal logits name the first of four equal classes
    assert "25.00 % +-" in line and f"(when the training ended: {ended:.2f} %)" in line


@pytest.mark.parametrize("count, taken", [(3, 3), (128, 128), (1000, 128)])  # the set has 128
def test_eval_with_other_batchnorm_statistics(run, folder_of_bars, capsys, count, taken):
    saved = (run / "student.pt").read_bytes()
    assert main(["eval", str(run), "--weights", "student", "--reestimate-batchnorm", str(count)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"BatchNorm statistics of {taken} training images" in line
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
    assert float(line.split("loss")[1].split()[0]) == pytest.approx(loss.item(), abs=6e-5)
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
    title, line = lines_of(capsys)
    assert title[-5:] == ["60", "test", "images", "of", str(tmp_path)]

    mean, std = (values[0] for values in RunFolder.load(run).preprocessing())
    pixels = F.pad(images // 2, (2, 2, 2, 2)).unsqueeze(1) / 255
    with torch.no_grad():
        logits = RunFolder.load(run).network("student")((pixels - mean) / std)
    assert float(line[6]) == pytest.approx(F.cross_entropy(logits, labels.long()).item(), abs=1e-3)
    assert float(line[1]) == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=0.005)


def cut(content: bytes) -> bytes:
    return content[:-1000]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


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
        ("layers.csv", b"epoch,layer\n1,a\n", "layers.csv: expected rows with epoch, layer, l_mid"),
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


# --- compare ---


def test_compare_has_a_line_for_each_network(trained, tmp_path, capsys):
    plain = written_run(tmp_path / "plain", [0.5, 0.75, 0.625], method="plain", data=str(tmp_path))
    run = RunFolder.load(trained)
    assert main(["compare", str(trained), str(plain)]) == 0
    header, *lines = [line for line in lines_of(capsys) if line][1:]
    by_network = {(line[0], line[header.index("network")]): dict(zip(header, line, strict=False)) for line in lines}
    assert [name for _, name in by_network] == ["student", "student_ema", "teacher", "student"]
    for name in run.networks:
        line = by_network[str(trained), name]
        assert float(line["last"]) == pytest.approx(100 * run.rows[-1][f"{name}_test_accuracy"], abs=0.005)
    assert by_network[str(trained), "student_ema"]["training"] == "-"


def test_compare_shows_only_the_options_that_differ(tmp_path, capsys):
    runs = [
        written_run(tmp_path / "a", [0.5], method="pkkd", beta=0.5, threads=1),
        written_run(tmp_path / "b", [0.5], method="pkkd", beta=0.25, threads=2, root="elsewhere"),
        written_run(tmp_path / "c", [0.5], method="plain", beta=0.125, alpha=3.0),
    ]
    assert main(["compare", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    header = text.splitlines()[2].split()
    # alpha means nothing to `plain`, where the data lie and the number of threads to no run
    assert header == "run method beta network epochs last best best_epoch training images/s hours".split()
    assert [line.split()[2] for line in text.splitlines()[3:6]] == ["0.5", "0.25", "-"]
    assert "confidence" not in text  # no two runs of a group


def test_compare_of_runs_by_hand(tmp_path, capsys):
    """Accuracies in percent 50, 60, 70 and 52, 64, 71: differences 2, 4, 1."""
    runs = [
        *(written_run(tmp_path / f"p{s}", [0.9, a], method="plain", seed=s) for s, a in enumerate((0.5, 0.6, 0.7))),
        *(written_run(tmp_path / f"k{s}", [0.1, a], method="pkkd", seed=s) for s, a in enumerate((0.52, 0.64, 0.71))),
        written_run(tmp_path / "running", [0.3], method="pkkd", seed=3, epochs=2),
    ]
    target, plot = tmp_path / "runs.csv", tmp_path / "curves.png"
    assert main(["compare", *map(str, runs), "--csv", str(target), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("digits, lenet5, test accuracy in %\n")
    lines = [line.split() for line in text.splitlines()]
    assert lines[3][1:] == "plain student 0 2 50.00 90.00 1 100.00 100 1".split()
    assert lines[9][1:] == "pkkd student 3 1/2 30.00 30.00 1 100.00 100 0.5".split()
    assert lines[-2] == "plain student 3 60.00 10.00 - - -".split()
    # deviation of 52, 64, 71: sqrt((10.333^2 + 1.667^2 + 8.667^2) / 2); of 2, 4, 1: 1.5275, times 4.3027 / sqrt 3
    assert lines[-1] == "pkkd student 3 62.33 9.61 3 +2.33 -1.46 to +6.13".split()

    with open(target) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [0.5, 0.6, 0.7, 0.52, 0.64, 0.71, 0.3]
    assert rows[0]["run"] == str(runs[0]) and rows[6]["finished"] == "False" and rows[3]["beta"] == "0.1"
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_compare_takes_the_folder_of_a_comparison(tmp_path, capsys):
    both = tmp_path / "both"
    for method in ("pkkd", "plain"):
        written_run(both / method, [0.5], method=method)
    write_json(both / "config.json", Options(data="digits", method="compare").resolve().flat())
    assert main(["compare", str(both)]) == 0
    assert [line[:2] for line in lines_of(capsys)[3:]] == [[str(both / m), m] for m in ("pkkd", "plain")]
    shutil.rmtree(both / "pkkd")
    shutil.rmtree(both / "plain")
    assert "expected run folders pkkd and plain" in error_of(capsys, "compare", both)


def test_compare_of_equal_runs_says_why_there_are_no_means(tmp_path, capsys):
    runs = [written_run(tmp_path / name, [0.5], method="plain") for name in "ab"]
    assert main(["compare", *map(str, runs)]) == 1
    printed = capsys.readouterr()
    assert str(runs[1]) in printed.out and "got seed 0 twice" in printed.err


# --- export ---


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
    mean, std = RunFolder.load(run).preprocessing()
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
    mean, std = RunFolder.load(run).preprocessing()
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
    mean, std = RunFolder.load(run).preprocessing()
    stored = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert (json.loads(stored["mean"]), json.loads(stored["std"])) == (mean, std)
    assert str(run) not in str(stored)


def test_preprocessing_is_that_of_the_training(run, tmp_path):
    config = RunFolder.load(run).config
    images = read_idx(Path(config.data) / IDX_FILES[0])
    pixels = F.pad(images, (2, 2, 2, 2)).double() / 255
    [mean], [std] = RunFolder.load(run).preprocessing()
    assert (mean, std) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()), rel=1e-6)
    # published numbers need no images
    cifar = written_run(tmp_path / "cifar", [0.5], method="plain", data="cifar10", arch="resnet20", root=str(tmp_path))
    assert RunFolder.load(cifar).preprocessing() == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


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
        assert run.input_shape(network) == (3, side, side)
        # images in memory have their size whatever the network is made for
        run = replace(run, config=replace(run.config, arch="resnet18"))
        assert run.input_shape(network) == (3, side, side)


def test_export_refuses_what_is_not_there(run, capsys):
    assert "expected student or student_ema or teacher" in error_of(
        capsys, "export", run, "--format", "torch", "--weights", "teacher_ema"
    )
    (run / "summary.json").unlink()
    assert "expected a finished run" in error_of(capsys, "export", run, "--format", "state_dict")
    assert not (run / "export").exists()


# --- command line ---


def test_the_command_line_dispatches(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: python -m adderops.distill {command} ")
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
