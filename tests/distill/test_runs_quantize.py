"""`quantize`: from a run folder to an int8 network in one command, and fine-tuning at few bits by the trainer."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from adderops.distill import Options, load_data, main, train
from adderops.distill.data import calibration_batches
from adderops.distill.loop import Loop
from adderops.distill.runs import firmware
from adderops.distill.runs.folder import RunFolder
from adderops.edge import program_of
from adderops.edge.cost import network_cycles
from adderops.edge.export import source_of
from adderops.quant import load
from adderops.quant.calibration import quantized_layers
from distill.runs import assert_same_state, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(folder_of_bars, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pkkd"
    options = Options(data=str(folder_of_bars), method="pkkd", epochs=4, batch_size=16, lr=0.05, threads=1)
    train(options, load_data(options.data), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(trained, folder_of_bars) -> Path:
    """Two more epochs at 4 bits."""
    given = dict(method="plain", bits=4, initial=str(trained / "student.pt"))
    options = Options(data=str(folder_of_bars), epochs=2, batch_size=16, lr=0.01, threads=1, **given)
    train(options, load_data(options.data), trained.parent / "tuned")
    return trained.parent / "tuned"


def table(capsys) -> dict[str, tuple[float, float]]:
    """network -> accuracy in %, images/s"""
    rows = {}
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split() == ["network", "accuracy,", "%", "images/s"])
    for line in lines[header + 1 :]:
        if line.endswith(".safetensors"):
            break
        name, accuracy, speed = re.split("  +", line)
        rows[name] = float(accuracy), float("nan" if speed == "-" else speed)
    return rows


def test_one_command_from_run_to_bytes(trained, folder_of_bars, tmp_path, capsys):
    file = tmp_path / "bars.safetensors"
    assert main(["quantize", str(trained), "--batch-size", "8", "--output", str(file)]) == 0
    rows = table(capsys)
    assert list(rows) == ["CNN, float32", "adder, float32", "adder, 8 bits"]
    assert all(speed > 0 for _, speed in rows.values())
    last = rows_of(trained / "log.csv")[-1]
    assert rows["CNN, float32"][0] == pytest.approx(100 * float(last["teacher_test_accuracy"]), abs=0.01)
    assert rows["adder, float32"][0] == pytest.approx(100 * float(last["student_test_accuracy"]), abs=0.01)

    network, facts = load(file)
    data = load_data(str(folder_of_bars))
    [(images, labels)] = data.test.batches([torch.arange(len(data.test))])
    accuracy = (network(images).argmax(1) == labels).float().mean().item()
    assert rows["adder, 8 bits"][0] == pytest.approx(100 * accuracy, abs=0.01)
    assert facts["facts"]["mean"] == pytest.approx((data.train.mean / 255).flatten().tolist())
    assert facts["scheme"]["bits"] == 8 and facts["facts"]["side"] == images.shape[-1]


@pytest.mark.slow
def test_options_reach_the_scheme(trained, tmp_path, capsys):
    file = tmp_path / "int5.safetensors"
    options = "--bits 5 --method shared --ends int8 --images 40 --no-reestimate --weights student".split()
    assert main(["quantize", str(trained), *options, "--batch-size", "8", "--output", str(file)]) == 0
    assert "adder, 5 bits" in table(capsys)
    scheme = load(file)[1]["scheme"]
    assert scheme == {"bits": 5, "method": "shared", "rank": 0.9997, "filter_groups": 1, "ends": "int8"}


@pytest.mark.slow
def test_the_file_lies_in_the_run_by_default(trained, capsys):
    assert main(["quantize", str(trained), "--batch-size", "4"]) == 0
    assert (trained / "export" / "int8.safetensors").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--bits 9", "--bits: expected a finite number of at least 2 and at most 8, got 9"),
        ("--filter-groups 3 --method shared", "filter_groups: expected 1 with method 'shared', got 3"),
        ("--bits 0", "--bits: expected a finite number of at least 2 and at most 8, got 0"),
        ("--images 0", "--images: expected a finite number of at least 1, got 0"),
        ("--batch-size 2147483648", "--batch-size: expected a finite number of at least 1 and at most 65536"),
        ("--threads -1", "--threads: expected a finite number of at least 1 and at most 1024, got -1"),
        ("--threads 0", "--threads: expected a finite number of at least 1 and at most 1024, got 0"),
        ("--output /no/such/x.pt2", "--output: expected a file in an existing folder, got /no/such/x.pt2"),
        ("--main", "--main: expected --c with it, got none, so it has no effect"),
        ("--epilogue integer", "--epilogue: expected --c with it, got none, so it has no effect"),
        ("--target cortex-m4", "--target: expected --c with it, got none, so it has no effect"),
        ("--mhz 80", "--mhz: expected --c with it, got none, so it has no effect"),
        ("--c x --mhz 0", "--mhz: expected a finite number of at least 1 and at most 10000, got 0.0"),
        ("--c x --ends float", "--ends: expected int8 with --c, whose code has no convolution of floats, got float"),
        ("--c /no/such/x", "--c: expected a path in an existing folder, got /no/such/x"),
        ("--c /tmp/1x", "--c: name: expected an identifier of C that begins with a letter, got '1x'"),
    ],
)
def test_wrong_options(trained, options, message, capsys):
    assert main(["quantize", str(trained), *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_calibration_images_are_the_same_at_every_call(folder_of_bars):
    train_set = load_data(str(folder_of_bars)).train
    first, again = (list(calibration_batches(train_set, 110)) for _ in range(2))
    assert [len(batch) for batch in first] == [55, 55]  # BatchNorm could not use a batch of one
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(map(len, calibration_batches(train_set))) == 128


@pytest.mark.slow
def test_the_int8_file_carries_names(tmp_path):
    options = "--data digits --method plain --epochs 4 --train-images 400 --threads 1 --lr 0.05".split()
    assert main([*options, "--output", str(tmp_path / "run")]) == 0
    assert main(["quantize", str(tmp_path / "run"), "--batch-size", "4", "--images", "100"]) == 0
    [file] = (tmp_path / "run" / "export").iterdir()
    facts = load(file)[1]["facts"]
    assert facts["classes"] == list("0123456789") and (facts["channels"], facts["side"]) == (1, 32)


# --- C ---


def compiled(folder: Path, name: str) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no cc on the PATH: install a C compiler")
    command = ["cc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", f"{name}.c", "main.c", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True, timeout=100)
    return folder / "program"


def printed(program: Path, *arguments: str) -> list[list[str]]:
    command = [program, *arguments, "images.bin"]
    output = subprocess.run(command, cwd=program.parent, check=True, timeout=100, capture_output=True, text=True)
    return [line.split() for line in output.stdout.splitlines()]


def test_from_run_to_c(trained, folder_of_bars, tmp_path, capsys):
    """The C program prints the logits of the int8 network, all their bits, for the bytes of the test images."""
    arguments = ["--c", str(tmp_path / "bars"), "--main", "--batch-size", "4", "--output", str(tmp_path / "x")]
    assert main(["quantize", str(trained), *arguments, "--target", "cortex-m33", "--mhz", "160"]) == 0
    output = capsys.readouterr().out
    files = ("bars.h", "bars.c", "main.c", "CMakeLists.txt", "images.bin", "classes.txt")
    assert all(f"\n{tmp_path / file}" in output for file in files) and "images.bin: 40 test images" in output
    assert re.search(r"^conv3 +adder 5x5 ", output, re.MULTILINE) and "bytes of arena" in output
    [(cycles, ms)] = re.findall(
        r"^time: ([\d.]+) M cycles, ([\d.]+) ms on a cortex-m33 at 160 MHz: modelled", output, re.M
    )

    network, facts = load(tmp_path / "x")
    assert facts["scheme"]["ends"] == "int8"
    source = source_of(program_of(network, torch.zeros(1, 1, 32, 32)))
    modelled = network_cycles(source, "cortex-m33")
    assert float(cycles) == pytest.approx(modelled / 1e6, abs=0.006) and float(ms) == pytest.approx(
        modelled / 160e3, abs=0.006
    )
    data = load_data(str(folder_of_bars))
    [(images, _)] = data.test.batches([torch.arange(40)])
    pixels = torch.frombuffer(bytearray((tmp_path / "images.bin").read_bytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(40, 1, 32, 32), data.test.source.tensors[0])
    logits = network(images)
    classes = (tmp_path / "classes.txt").read_text().split()
    assert classes == [str(number) for number in logits.argmax(1).tolist()]
    rows = printed(compiled(tmp_path, "bars"), "--logits")
    assert [row[0] for row in rows] == classes
    assert torch.equal(torch.tensor([[float.fromhex(word) for word in row[1:]] for row in rows]), logits)


@pytest.mark.slow
def test_a_program_without_floats_has_an_accuracy_of_its_own(trained, tmp_path, capsys):
    arguments = ["--c", str(tmp_path / "bars"), "--main", "--epilogue", "integer", "--batch-size", "4"]
    assert main(["quantize", str(trained), *arguments]) == 0
    rows = table(capsys)
    assert list(rows)[2:] == ["adder, 8 bits", "adder, 8 bits, fixed point"]
    classes = [int(row[0]) for row in printed(compiled(tmp_path, "bars"))]
    assert classes == [int(word) for word in (tmp_path / "classes.txt").read_text().split()]
    [labels] = load_data(RunFolder.load(trained).config.data).test.labels[None]
    accuracy = (torch.tensor(classes) == labels).float().mean().item()
    assert rows["adder, 8 bits, fixed point"][0] == pytest.approx(100 * accuracy, abs=0.01)


def test_a_file_of_the_user_is_not_overwritten(trained, tmp_path, capsys):
    own = tmp_path / "main.c"
    own.write_text("int main(void) { return 0; }\n")
    assert main(["quantize", str(trained), "--c", str(tmp_path / "bars"), "--main"]) == 2
    assert f"--main: expected no {own} of your own, got one, which it would overwrite" in capsys.readouterr().err
    assert own.read_text() == "int main(void) { return 0; }\n" and list(tmp_path.iterdir()) == [own]


def test_only_so_many_images_are_written(monkeypatch, folder_of_bars, tmp_path):
    monkeypatch.setattr(firmware, "run", lambda program, x: torch.zeros(len(x), 3))
    monkeypatch.setattr(firmware, "bytes_of", lambda program, x: x)
    images = load_data(str(folder_of_bars)).train
    assert firmware.write_test_images(None, images, tmp_path) == 100
    monkeypatch.setattr(firmware, "MOST_BYTES", 3000)
    assert firmware.write_test_images(None, images, tmp_path) == 2
    assert (tmp_path / "images.bin").stat().st_size == 2048 and (tmp_path / "classes.txt").read_text() == "0\n0\n"


# --- fine-tuning ---


def test_fine_tuning_starts_at_the_grids_of_the_network(trained, tuned):
    run = RunFolder.load(tuned)
    network = run.network("student")
    layers = quantized_layers(network)
    assert list(layers) == ["conv2", "conv3", "conv4"]
    assert all(layer.scheme.bits == 4 and layer.calibrated for layer in layers.values())
    assert not torch.equal(network.conv2.weight, RunFolder.load(trained).network("student").conv2.weight)
    # the saved network is the one that was tested
    data = load_data(run.config.data)
    [(images, labels)] = data.test.batches([torch.arange(len(data.test))])
    accuracy = (network(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(run.rows[-1]["student_test_accuracy"])


def test_a_tuned_run_is_converted_as_it_was_trained(tuned, capsys):
    assert main(["quantize", str(tuned), "--batch-size", "8"]) == 0
    rows = table(capsys)
    assert list(rows) == ["adder, 4 bits"]
    assert rows["adder, 4 bits"][0] == pytest.approx(
        100 * RunFolder.load(tuned).rows[-1]["student_test_accuracy"], abs=100 * 2 / 40
    )
    file = tuned / "export" / "ends.safetensors"
    assert main(["quantize", str(tuned), "--batch-size", "8", "--ends", "int8", "--output", str(file)]) == 0
    assert table(capsys)["adder, 4 bits"][0] == pytest.approx(rows["adder, 4 bits"][0], abs=100 * 2 / 40)
    assert load(file)[1]["scheme"]["ends"] == "int8"
    assert main(["quantize", str(tuned), "--bits", "8"]) == 2
    assert "--bits: expected 4, which the run was trained with, got 8" in capsys.readouterr().err


def test_a_resumed_tuning_ends_with_the_same_bits(tuned, trained, tmp_path):
    config, half = RunFolder.load(tuned).config, tmp_path / "half"
    data = load_data(config.data)

    class Stop(Exception):
        pass

    step = Loop._step
    calls = []

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 10:
            raise Stop
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", counted)
        with pytest.raises(Stop):
            train(config, data, half)
    train(config, data, half)
    ours, theirs = (torch.load(folder / "student.pt", weights_only=True) for folder in (half, tuned))
    assert_same_state(ours, theirs)


def test_bits_need_a_network_to_start_from():
    with pytest.raises(ValueError, match="bits: expected a trained adder network to start from .initial., got none"):
        Options(method="plain", bits=4)
    with pytest.raises(ValueError, match="bits: expected a trained adder network"):
        Options(method="cnn", bits=4, initial="teacher.pt")
    with pytest.raises(ValueError, match="bits: expected a finite number of at least 2 and at most 8, got 9"):
        Options(method="plain", bits=9, initial="student.pt")
