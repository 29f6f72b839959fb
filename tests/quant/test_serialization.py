"""Integer networks as files and objects: the same bits everywhere, and no content of a file does harm.

ADDEROPS_FUZZ=500 tries that many damaged files per kind instead of a few.
"""

import copy
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from slow import slow_except
from torch import nn

from adderops import AdderConv2d, AdderLinear
from adderops import convert as convert_to_adder
from adderops.export import export_program
from adderops.models import ARCHITECTURES, create_model, lenet5
from adderops.quant import IntegerNetwork, Scheme, calibrate, convert, load, reestimate_batchnorm, save, serialization

FUZZ = int(os.environ.get("ADDEROPS_FUZZ", 30))


def integer_of(model: nn.Module, images: torch.Tensor, scheme: Scheme | None = None) -> IntegerNetwork:
    reestimate_batchnorm(model, [images])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibrate: ")
        return convert(calibrate(model.eval(), [images], scheme), images)


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def integer(images):
    torch.manual_seed(0)
    return integer_of(lenet5(), images)


@pytest.fixture
def path(integer, images, tmp_path):
    save(integer, images, tmp_path / "int8.safetensors", {"classes": ["no", "yes"], "mean": [0.5]})
    return tmp_path / "int8.safetensors"


def assert_round_trip(integer, images, tmp_path):
    save(integer, images, tmp_path / "int8.safetensors")
    loaded, known = load(tmp_path / "int8.safetensors")
    want, got = integer(images), loaded(images)
    assert all(torch.equal(a, b) for a, b in zip(torch.utils._pytree.tree_leaves(want), leaves(got), strict=True))
    calls = [[str(n.target) for n in network.graph.nodes if n.op == "call_function"] for network in (integer, loaded)]
    assert calls[0] == calls[1]
    for name, tensor in integer.state_dict().items():
        assert loaded.state_dict()[name].stride() == tensor.stride()
    save(loaded, images, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "int8.safetensors").read_bytes()
    return known


leaves = torch.utils._pytree.tree_leaves


# --- the same network ---


@pytest.mark.parametrize("scheme", (Scheme(), Scheme(bits=5, ends="int8"), Scheme(filter_groups=3, rank=1.0)), ids=str)
@pytest.mark.parametrize("arch", slow_except(("lenet5",), [arch for arch in ARCHITECTURES if arch != "mlp"]))
def test_every_network_of_ours_is_the_same_from_its_file(arch, scheme, tmp_path):
    torch.manual_seed(0)
    channels, side = (1, 32) if arch == "lenet5" else (3, 64 if arch in ("resnet18", "resnet50") else 32)
    images = torch.randn(2, channels, side, side)
    known = assert_round_trip(integer_of(create_model(arch, "adder", channels, 10), images, scheme), images, tmp_path)
    assert known["input"]["shape"] == [-1, channels, side, side] and known["scheme"]["bits"] == scheme.bits


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    slow_except(("shufflenet_v2_x0_5",), ("densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet")),
)
def test_networks_of_torchvision_are_the_same_from_their_file(arch, tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(arch, weights=None, **{"init_weights": False} if arch == "googlenet" else {})
    images = torch.randn(2, 3, 64, 64)
    assert_round_trip(integer_of(convert_to_adder(model, verbose=False), images), images, tmp_path)


class Pieces(nn.Module):
    """Several outputs, names of module attributes, an unquantized part, operations of every form."""

    def __init__(self):
        super().__init__()
        self.meta = nn.Conv2d(3, 8, 3, padding="same")
        self.graph = AdderConv2d(8, 8, 2, padding="same", groups=2, bias=True)
        self.norm = nn.BatchNorm2d(8)
        self.forward_ = AdderConv2d(8, 8, 3, padding=1)
        self.head = AdderLinear(8, 5)

    def forward(self, x):
        a = self.norm(self.graph(self.meta(x[:, :3]).sigmoid()))
        left, right = a.chunk(2, 1)
        a = self.forward_(torch.cat((right, nn.functional.hardswish(left)), 1).clamp(min=-3))
        mean = a.view(a.size(0), 8, -1).mean(-1)
        return {
            "logits": self.head(mean),
            "maps": [a.flatten(2)[..., :4], nn.functional.interpolate(a, scale_factor=2)],
        }


def test_outputs_names_and_operations_of_every_form(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 12, 12)
    integer = integer_of(Pieces(), images, Scheme(ends="int8"))
    known = assert_round_trip(integer, images, tmp_path)
    assert set(known["layers"]) == {"meta_", "graph_", "forward_"}
    assert [tuple(t.shape) for t in leaves(integer(images[:2]))] == [(2, 5), (2, 8, 4), (2, 8, 24, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_inputs_of_other_dtypes(images, dtype, tmp_path):
    integer = integer_of(lenet5().to(dtype), images.to(dtype))
    assert str(dtype).endswith(assert_round_trip(integer, images.to(dtype), tmp_path)["input"]["dtype"])


def test_the_network_is_an_object_like_others(integer, images, path):
    loaded, known = load(path)
    assert known["facts"] == {"classes": ["no", "yes"], "mean": [0.5]} and list(known["layers"]) == [
        "conv2",
        "conv3",
        "conv4",
    ]
    want = integer(images)
    for network in (integer, loaded):
        assert network.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # read without a copy
        buffer = io.BytesIO()
        torch.save(network, buffer)
        buffer.seek(0)
        of_torch = torch.load(buffer, weights_only=True)  # data, and one function that checks it
        for other in (of_torch, pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
            assert isinstance(other, IntegerNetwork) and torch.equal(other(images), want)
            assert torch.equal(other.train()(images), want) and torch.equal(other.eval()(images), want)
            save(other, images, path)
        assert torch.equal(copy.deepcopy(network).to(memory_format=torch.channels_last)(images), want)
        assert network.to("cpu")(images[:0]).shape == (0, 10)
        assert copy.deepcopy(network).to("meta")(images.to("meta")).shape == (8, 10)
    for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        with pytest.raises(TypeError, match="IntegerNetwork: expected to keep its dtypes"):
            change(copy.deepcopy(loaded))
    export_program(loaded, images, path.with_suffix(".pt2"))
    program = torch.export.load(path.with_suffix(".pt2")).module()
    assert torch.equal(program(images[:3]), loaded(images[:3]))


@pytest.mark.slow
def test_autocast_leaves_bytes_alone(images):
    torch.manual_seed(0)
    coloured = torch.randn(4, 3, 32, 32)
    integer = integer_of(create_model("resnet20", "adder", 3, 10), coloured)  # with float residuals
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = integer(coloured).float()
    want = integer(coloured)
    assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.9


# --- what is refused at saving ---


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(AdderConv2d(3, 4, 3))

    def forward(self, x):
        return self.inner(x).roll(1, 2)


def test_what_is_refused_at_saving(integer, images, tmp_path):
    path = tmp_path / "int8.safetensors"
    rolled = integer_of(Rolled(), torch.randn(2, 3, 8, 8))
    assert rolled(torch.randn(5, 3, 8, 8)).shape == (5, 4, 6, 6)
    with pytest.raises(ValueError, match="node 'roll': expected an operation of the closed list .*, got aten.roll"):
        save(rolled, torch.randn(2, 3, 8, 8), path)
    with pytest.raises(ValueError, match="integer: expected what adderops.quant.convert returned"):
        save(nn.ReLU(), images, path)
    with pytest.raises(FileNotFoundError, match="path: expected a file in an existing folder"):
        save(integer, images, tmp_path / "nowhere" / "int8.safetensors")
    with pytest.raises(ValueError, match=r"save: example: expected \(N, ...\) of \[1, 32, 32\], float32, got"):
        save(integer, images[:, :, 1:], path)
    with pytest.raises(TypeError, match="save: example: expected a tensor, got list"):
        save(integer, [images], path)
    for facts in ({"x": float("nan")}, {"x": {1, 2}}, {1: "x"}, ["x"]):
        with pytest.raises(ValueError, match="save: facts: expected"):
            save(integer, images, path, facts)
    broken = copy.deepcopy(integer)
    broken.conv2.scale[1] = float("inf")
    with pytest.raises(ValueError, match="conv2.scale: expected finite numbers"):
        save(broken, images, path)
    assert list(tmp_path.iterdir()) == []


# --- what is refused at loading ---


def parts(path):
    """The document and the tensors of a file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = json.loads(raw[8 : 8 + length])["__metadata__"]["adderops.quant"]
    return json.loads(text), safetensors.torch.load(raw)


def written(path, document, tensors):
    """Writes a forged file: any content with the right checksum."""
    document = {key: value for key, value in document.items() if key != "sha256"}
    try:
        document["sha256"] = serialization._checksum(document, tensors)
        path.write_bytes(safetensors.torch.save(tensors, {"adderops.quant": serialization._json(document)}))
    except (ValueError, UnicodeEncodeError):  # of NaN
        text = json.dumps(document | {"sha256": "0"})
        path.write_bytes(safetensors.torch.save(tensors, {"adderops.quant": text}))
    return path


def of_header(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def assert_refused(path, message=""):
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 600
    assert message in text, text


def node(document, op):
    return next(entry for entry in document["nodes"] if entry["op"] == op)


def _set(op, key, name, value):
    def change(document, tensors):
        node(document, op)[key][name] = value

    return change


def _cycle(document, tensors):
    document["nodes"][0]["inputs"]["input"] = document["nodes"][-1]["name"]


def _beyond_grid(document, tensors):
    document["layers"]["conv2"][0] |= {"bits": 4, "zero_point": 0}


def _tensor(name, value):
    return lambda document, tensors: tensors.__setitem__(name, value)


MADE_UP = {
    "unknown operation": (lambda d, t: d["nodes"][0].update(op="system"), "expected an operation of the closed list"),
    "operation that is no word": (lambda d, t: d["nodes"][0].update(op=["relu"]), "expected an operation"),
    "cycle": (_cycle, "expected the name of an earlier value"),
    "undefined": (_set("linear", "inputs", "weight", "nowhere"), "expected the name of an earlier value"),
    "twice": (lambda d, t: d["nodes"].append(d["nodes"][0]), "expected a name that nothing else has"),
    "no identifier": (lambda d, t: d["nodes"][0].update(name="x; import os"), "expected an identifier"),
    "stride 0": (_set("adder_conv2d_int8", "attributes", "stride", [0, 1]), "stride: expected at least 1, got [0, 1]"),
    "huge padding": (
        _set("adder_conv2d_int8", "attributes", "padding", [2**30] * 4),
        "no larger than the padded input",
    ),
    "large padding": (_set("adder_conv2d_int8", "attributes", "padding", [2**20] * 4), "values per image"),
    "more than 32 bits": (_set("adder_conv2d_int8", "attributes", "dilation", [2**40, 1]), "expected an integer"),
    "negative": (_set("conv2d", "attributes", "padding", [-1, 0]), "padding: expected at least 0, got [-1, 0]"),
    "three numbers": (_set("conv2d", "attributes", "padding", [0, 0, 0]), "expected lists of 2 numbers"),
    "beyond float32": (_set("quantize", "attributes", "scale", 1e308), "scale: expected a number of float32"),
    "word": (_set("adder_conv2d_int8", "attributes", "groups", "1"), "groups: expected an integer, got 1"),
    "boolean": (_set("adder_conv2d_int8", "attributes", "groups", True), "groups: expected an integer, got True"),
    "scale 0": (_set("quantize", "attributes", "scale", 0.0), "scale: expected a positive number"),
    "largest byte": (_set("quantize", "attributes", "quant_max", 256), "quant_max: expected 1 to 255, got 256"),
    "zero point": (_set("quantize", "attributes", "zero_point", 300), "zero_point: expected 0 to 255, got 300"),
    "unknown attribute": (_set("relu", "attributes", "inplace", True), "expected inputs and attributes of relu"),
    "beyond the grid": (_beyond_grid, "layers: conv2: expected bytes up to 15, got"),
    "nowhere": (lambda d, t: d["layers"].update(x=d["layers"]["conv2"]), "layers: x: expected the weights of 'x'"),
    "bits": (lambda d, t: d["scheme"].update(bits=12), "Scheme: bits: expected an integer from 2 to 8, got 12"),
    "format": (lambda d, t: d.update(format=99), "format: expected 2, got 99"),
    "extra": (lambda d, t: d.update(code="x"), "graph: expected the keys"),
    "shape": (lambda d, t: d["nodes"][1].update(shape=[-1, 2]), "shape: expected"),
    "fixed batch": (lambda d, t: d["input"].update(shape=[1, 1, 32, 32]), "input: shape: expected [-1, C, ...]"),
    "huge input": (lambda d, t: d["input"].update(shape=[-1, 1, 2**20, 2**20]), "values per image"),
    "dtype of input": (lambda d, t: d["input"].update(dtype="int8"), "input: dtype: expected one of float32"),
    "output": (lambda d, t: d.update(output="nowhere"), "output: expected the name of a value, got nowhere"),
    "no output": (lambda d, t: d.update(output=None), "output: expected tensors"),
    "nodes": (lambda d, t: d.update(nodes={}), "nodes: expected a list"),
    "facts": (lambda d, t: d.update(facts=[]), "facts: expected an object"),
    "NaN": (_tensor("conv2.scale", torch.full((16,), float("nan"))), "conv2.scale: expected finite numbers"),
    "wrong length": (_tensor("conv2.scale", torch.ones(15)), "scale: expected float32 of shape (C_out), got [15]"),
    "bytes as floats": (_tensor("conv2.weight", torch.ones(16, 6, 5, 5)), "expected bytes"),
    "unused": (_tensor("more", torch.ones(1)), "expected no more than the nodes read, got more"),
    "attribute of a module": (_tensor("forward.__class__", torch.ones(1)), "no attribute of a module"),
    "quotes": (_tensor('a").system("x', torch.ones(1)), "expected names joined by dots"),
    "other dtype": (_tensor("conv2.scale", torch.ones(16, dtype=torch.float64)), "expected one of F32"),
}


@pytest.mark.parametrize("kind", MADE_UP)
def test_what_somebody_could_make_up(path, kind):
    change, message = MADE_UP[kind]
    document, tensors = parts(path)
    change(document, tensors)
    assert_refused(written(path, document, tensors), message)


def test_headers_that_lie(path, tmp_path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length], raw[8 + length :]
    for claimed in (0, 2**63, 2**62, length - 1, length + 1, len(raw)):
        path.write_bytes(struct.pack("<Q", claimed) + raw[8:])
        assert_refused(path)
    entry = json.loads(header)
    weight = entry["conv2.weight"]
    for change in (
        {"shape": [2**40, 2**40]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-1, 4]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [weight["data_offsets"][0] + 1, weight["data_offsets"][1] + 1]},
        {"dtype": "F64"},
        {"dtype": ["U8"]},
        {"shape": "16"},
        {"more": 1},
    ):
        assert_refused(of_header(path, entry | {"conv2.weight": weight | change}, data))
    overlapping = {"conv3.weight": entry["conv3.weight"] | {"data_offsets": weight["data_offsets"]}}
    assert_refused(of_header(path, entry | overlapping, data))
    assert_refused(
        of_header(path, header.rstrip()[:-1] + b',"conv2.scale":' + json.dumps(weight).encode() + b"}", data), "once"
    )
    assert_refused(of_header(path, b"[" * 100_000, data), "depth")
    assert_refused(of_header(path, b'{"__metadata__":' * 50_000, data))
    assert_refused(of_header(path, b"\xff\xfe{}", data))
    assert_refused(of_header(path, entry | {"__metadata__": {"adderops.quant": "[" * 100_000}}, data))
    deep = {"__metadata__": {"adderops.quant": '{"facts":' * 900 + "1" + "}" * 900}}
    assert_refused(of_header(path, {**entry, **deep}, data))
    assert_refused(of_header(path, {}), "metadata")
    path.write_bytes(raw + b"\0")
    assert_refused(path)
    path.write_bytes(b"")
    assert_refused(path, "header: expected")
    with open(path, "wb") as file:  # claims 100 TB, has none
        file.write(struct.pack("<Q", 2**23 + 1))
        file.truncate(2**33)
    assert_refused(path, "header: expected 1 to 8388608 bytes")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.safetensors")
    assert_refused(tmp_path, "file: expected a regular one")
    os.mkfifo(tmp_path / "fifo")
    assert_refused(tmp_path / "fifo", "file: expected a regular one")


def test_archives_are_not_opened(tmp_path):
    """A .pt2, whatever is in it: the loader of torch.export would run code from it."""
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / "int8.pt2"
    for content in (pickle.dumps(Evil()), b"text"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data/constants/opaque_obj_0", content)
        assert_refused(path, "quantize the trained network again")
    torch.save(Evil(), path)
    assert_refused(path, "got a zip archive")
    assert not marker.exists()


# --- fuzz ---


def _flip(raw, dice):
    damaged = bytearray(raw)
    for _ in range(dice.randint(1, 8)):
        damaged[dice.randrange(len(raw)) if dice.random() < 0.5 else dice.randrange(4096)] ^= 1 << dice.randrange(8)
    return bytes(damaged) if bytes(damaged) != raw else raw[:-1]


def _cut(raw, dice):
    begin = dice.randrange(len(raw)) if dice.random() < 0.5 else dice.randrange(2048)
    return dice.choice(
        (raw[:begin], raw[begin:], raw[:begin] + raw[begin + 1 + dice.randrange(9) :], raw + raw[: begin + 1])
    )


@pytest.mark.parametrize("damage", (_flip, _cut))
def test_damaged_files_are_refused(path, damage):
    raw, dice = path.read_bytes(), random.Random(damage.__name__)
    for _ in range(FUZZ):
        damaged = damage(raw, dice)
        if damaged != raw:
            path.write_bytes(damaged)
            assert_refused(path)


VALUES = (None, True, False, 0, -1, 1, 2, 3, 7, 255, 256, 2**20, 2**31 - 1, 2**31, -(2**63), 10**400, 0.0, -0.5, 1e-320)
VALUES += (1e308, float("inf"), float("nan"), "", "x", "relu", "input_1", "conv2.weight", "float32", "int64", "\ud800")
VALUES += ([], {}, [0], [1, 1], [-1, -1], [2**31 - 1] * 2, [[1]], {"input": "x"}, ["conv2.weight"], "a" * 5000)


def _mutated(value, dice):
    """The same JSON with one thing changed somewhere."""
    if isinstance(value, dict) and value and dice.random() < 0.95:
        key = dice.choice(sorted(value))
        if dice.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _mutated(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        i = dice.randrange(len(value))
        if dice.random() < 0.15:
            return dice.choice((value[:i] + value[i + 1 :], value[: i + 1] + value[i:], value[::-1]))
        return [*value[:i], _mutated(value[i], dice), *value[i + 1 :]]
    if isinstance(value, int) and dice.random() < 0.3:
        return value + dice.choice((-1, 1, 2))
    return dice.choice(VALUES)


def test_made_up_files_are_refused_or_run(path, images):
    """A forged file is refused, or it is a network that runs."""
    document, tensors = parts(path)
    dice, refused = random.Random(0), 0
    for _ in range(FUZZ):
        changed, others = document, dict(tensors)
        for _ in range(dice.randint(1, 2)):
            key = "nodes" if dice.random() < 0.7 and "nodes" in changed else dice.choice(sorted(changed))
            changed = changed | {key: _mutated(changed[key], dice)}
        if dice.random() < 0.2:
            name = dice.choice(sorted(others))
            others[name] = dice.choice(
                (others[name][:-1], others[name].flatten(), others[name].to(torch.int64), others[name].float() * 1e30)
            ).contiguous()
        try:
            network, known = load(written(path, changed, others))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            continue
        shape = known["input"]["shape"]
        values = [torch.Size(entry["shape"][1:]).numel() for entry in changed["nodes"]]
        if max(values) < 2**22:
            network(torch.randn(2, *shape[1:], dtype=getattr(torch, known["input"]["dtype"])))
    assert refused > FUZZ // 2


def test_no_key_twice(path):
    document, _ = parts(path)
    with pytest.raises(ValueError, match="each key once"):
        serialization._parsed('{"a": {"b": 1, "b": 2}}', "graph")
