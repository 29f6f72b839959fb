"""Exported networks of the zoo: the C code of every compiler computes the bits of the integer network."""

import re
import subprocess

import numpy as np
import pytest
import torch

from adderops.edge import bytes_of, export_c, program_of, run
from adderops.edge.interpreter import trace
from adderops.models import create_model
from adderops.quant import load, save

from .exported import (
    BUILDS,
    check_export,
    compiled,
    exported,
    integer_network,
    outputs,
    pixels,
    some_images,
)

NETWORKS = {"lenet5": 1, "resnet8": 3, "ds_cnn": 1, "resnet20": 3}
LARGE = {"resnet32": 3, "mobilenet": 3, "vgg_small": 3, "resnet8_x2_0": 3, "ds_cnn_x2_0": 3}


@pytest.fixture(scope="session")
def network():
    """Returns (integer network, images) of an architecture; made once."""
    made = {}

    def get(name, channels, bits=8):
        if (name, bits) not in made:
            torch.manual_seed(1)
            x = some_images((6, channels, 32, 32))
            made[name, bits] = integer_network(create_model(name, in_channels=channels), x[:4], bits=bits), x
        return made[name, bits]

    return get


@pytest.mark.parametrize("build", BUILDS)
def test_every_compiler_computes_the_bits_of_the_network(network, tmp_path, build):
    check_export(*network("lenet5", 1), tmp_path, [build])


@pytest.mark.parametrize("build", ["clang-sanitized", "gcc-c99-contract"])
@pytest.mark.parametrize("name", ["resnet8", "ds_cnn"])
def test_networks_of_the_zoo(network, tmp_path, name, build):
    check_export(*network(name, NETWORKS[name]), tmp_path, [build])


def test_a_network_of_20_layers(network, tmp_path):
    report = check_export(*network("resnet20", 3), tmp_path, ["gcc"])
    assert report.terms == 40_813_184


@pytest.mark.slow
@pytest.mark.parametrize("build", ["gcc", "clang-sanitized", "clang-contract", "gcc-c99-contract"])
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_of_the_zoo(network, tmp_path, name, build):
    check_export(*network(name, LARGE[name]), tmp_path, [build])


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits(network, tmp_path, bits):
    check_export(*network("lenet5", 1, bits), tmp_path, ["gcc"])


@pytest.mark.parametrize(
    ("name", "build"), [("lenet5", "clang-contract"), ("resnet8", "gcc-c99-sanitized"), ("ds_cnn", "gcc")]
)
def test_integer_epilogue(network, tmp_path, name, build):
    check_export(*network(name, NETWORKS[name]), tmp_path, [build], epilogue="integer")


def test_integer_epilogue_is_close_to_the_network(network):
    integer, x = network("resnet8", 3)
    floats, fixed = (program_of(integer, x, epilogue) for epilogue in ("float32", "integer"))
    one, other = (trace(program, bytes_of(program, x[:4])) for program in (floats, fixed))
    pairs = [(one[name].int(), other[name].int()) for name in one if one[name].dtype == torch.uint8]
    differ = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert 0 < differ < 0.01 and max(int((a - b).abs().max()) for a, b in pairs) <= 3
    assert (run(fixed, bytes_of(fixed, x[:4])) - integer(x[:4])).abs().max() < 0.1 * integer(x[:4]).std()


@pytest.mark.parametrize("name", ["lenet5", "resnet8"])
def test_bytes_of_images(network, tmp_path, name):
    integer, x = network(name, NETWORKS[name])
    channels = NETWORKS[name]
    images = torch.randint(0, 256, (5, channels, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    images[3], images[4] = 0, 255
    exported(integer, x, tmp_path)
    mean, std = (torch.tensor([value] * channels)[:, None, None] for value in (0.45, 0.25))
    expected = integer((images.float() / 255 - mean) / std)
    got = outputs(compiled(tmp_path, "network", "gcc", images=True), pixels(images), len(images), image=True)
    assert np.array_equal(got, expected.numpy())


def test_text_is_the_same_each_time_and_after_loading(network, tmp_path):
    integer, x = network("resnet8", 3)
    save(integer, x, tmp_path / "model.safetensors")
    loaded, _ = load(tmp_path / "model.safetensors")
    texts = []
    for i, one in enumerate((integer, integer, loaded)):
        export_c(one, x, tmp_path / str(i), "net", main=True, cmake=True, mean=[0.5] * 3, std=[0.2] * 3)
        files = ("net.c", "net.h", "main.c", "CMakeLists.txt")
        texts.append({file: (tmp_path / str(i) / file).read_bytes() for file in files})
    assert texts[0] == texts[1] == texts[2]


def test_only_the_kernels_in_use_are_written(network, tmp_path):
    export_c(*network("lenet5", 1), tmp_path, "lenet")
    text = (tmp_path / "lenet.c").read_text()
    kernels = ("max_pool", "adder_conv", "multiply_conv", "adder_depthwise", "sum_pool", "lookup", "quantize")
    defined = [re.search(rf"^static (\w+ )?void {kernel}\(", text, re.MULTILINE) is not None for kernel in kernels]
    assert defined == [True] * 3 + [False] * 4
    assert "run_image" not in (tmp_path / "lenet.h").read_text()


def test_header_states_shapes_terms_and_sizes(network, tmp_path):
    report = export_c(*network("resnet8", 3), tmp_path, "keyword")
    text = (tmp_path / "keyword.h").read_text()
    assert f"#define KEYWORD_ARENA_SIZE {report.arena}\n" in text
    assert "#define KEYWORD_INPUT_SIZE 3072 " in text and "#define KEYWORD_OUTPUT_SIZE 10 " in text
    assert 'extern "C" {' in text
    row = next(line for line in text.splitlines() if "block2.conv1" in line)
    assert "adder 3x3 stride 2 padding 1" in row and "16x16x32 uint8" in row and "1179648" in row
    assert str(report.bound) in text and report.bound <= report.arena <= report.bound * 1.05 + 8


def test_two_networks_in_one_program(network, tmp_path):
    for name in ("lenet5", "ds_cnn"):
        export_c(*network(name, NETWORKS[name]), tmp_path, name)
    (tmp_path / "main.cpp").write_text('#include "lenet5.h"\n#include "ds_cnn.h"\nint main() { return !lenet5_run; }\n')
    for file in ("lenet5", "ds_cnn"):
        subprocess.run(["gcc", "-std=c99", "-c", f"{file}.c"], cwd=tmp_path, check=True, timeout=60)
    subprocess.run(["g++", "main.cpp", "lenet5.o", "ds_cnn.o"], cwd=tmp_path, check=True, timeout=60)


def test_cycles_of_a_target_are_a_column(network, tmp_path, monkeypatch):
    monkeypatch.setattr("adderops.edge.export.call_cycles", lambda *arguments: 1000.4)
    report = exported(*network("lenet5", 1), tmp_path, target="cortex-m4")
    assert report.cycles == 7000 and "7 000" in str(report) and "modelled, cortex-m4" in str(report)
    assert exported(*network("lenet5", 1), tmp_path).cycles is None


def test_a_report_is_a_table(network, tmp_path):
    report = exported(*network("lenet5", 1), tmp_path, main=True, cmake=True)
    text = str(report)
    assert "416 520" in text and f"{report.arena} bytes of arena" in text
    assert [path.rsplit("/", 1)[1] for path in report.files] == ["network.h", "network.c", "main.c", "CMakeLists.txt"]
    assert report.constants == sum(row.weights for row in report.rows) + 256
