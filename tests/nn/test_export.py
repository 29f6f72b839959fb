"""An exported model computes what the model computes: with the operator, decomposed for torch alone, and as ONNX."""

import copy
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, quarters
from slow import slow_except
from tolerances import gamma
from torch import nn

import adderops
from adderops import AdderConv2d, AdderLinear
from adderops.export import export_onnx, export_program
from adderops.models import create_model

FORMS = ("operator", "decomposed", "onnx")
CHANNELS = {"lenet5": 1, "resnet20": 3}


def exported(form: str, model: nn.Module, example: torch.Tensor, folder: Path, **options):
    """Returns the exported model as a function from a tensor to a list of tensors."""
    if form == "onnx":
        return load_onnx(model, example, folder, **options)
    run = export_program(model, example, decompose=form == "decomposed").module()

    def outputs(x: torch.Tensor) -> list[torch.Tensor]:
        y = run(x)
        return [y] if isinstance(y, torch.Tensor) else list(y)

    return outputs


def load_onnx(model: nn.Module, example: torch.Tensor, folder: Path, **options):
    """Runs in ONNX Runtime on one thread of the CPU; the file holds standard operators only."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = folder / "model.onnx"
    export_onnx(model, example, path, **options)
    loaded = onnx.load(path)
    opsets = {opset.domain: opset.version for opset in loaded.opset_import}
    assert opsets == {"": options.get("opset", 20)} and not loaded.functions
    assert str(Path(adderops.__file__).parent).encode() not in path.read_bytes(), "a stack trace of this machine"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    assert value.name == "input" and value.shape == ["batch", *example.shape[1:]]
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"input": x.numpy()})]


class Geometries(nn.Module):
    """Layers of all geometries in parallel, each on the first channels of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                AdderConv2d(3, 5, 3, padding=1, bias=True),
                AdderConv2d(12, 6, 1),
                AdderConv2d(2, 3, 2, stride=2, padding=1, bias=True),
                AdderConv2d(4, 6, 3, stride=(3, 2), padding=(0, 2), dilation=(2, 3), groups=2),
                AdderConv2d(3, 4, (2, 5), stride=(1, 3)),
                AdderConv2d(2, 3, (4, 2), padding="same", dilation=(1, 3)),  # odd pixels at the bottom and right
                AdderConv2d(12, 12, 3, padding=2, dilation=2, groups=12),
                AdderConv2d(6, 12, (3, 2), groups=6, bias=True),
                AdderConv2d(9, 6, 2, groups=3, stride=5, bias=True),
                AdderConv2d(2, 2, 3, padding=1, padding_mode="reflect"),
                AdderConv2d(1, 2, (9, 7), bias=True),  # one window
            ]
        )
        self.linear = AdderLinear(7, 5, bias=True)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = [layer(x[:, : layer.in_channels]) for layer in self.layers]
        return [*outputs, self.linear(x[:, :3, 4])]


@pytest.mark.parametrize("form", slow_except(("onnx",), FORMS))
def test_every_geometry(form, tmp_path):
    """Exact for any order of the sums, and for other batch sizes than the example's."""
    torch.manual_seed(0)
    model = Geometries()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(quarters(*parameter.shape))
    run = exported(form, model, quarters(1, 12, 9, 7), tmp_path)
    for size in (1, 2, 3):
        x = quarters(size, 12, 9, 7)
        with torch.no_grad():
            want = model(x)
        for got, y, layer in zip(run(x), want, [*model.layers, model.linear], strict=True):
            assert_same(got, y, f"{form}, batch {size}: {layer}")


class Dtypes(nn.Module):
    """Sums of 3000 terms of 1 in several dtypes."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdderConv2d(3000, 2, 1, bias=True, dtype=dtype) for dtype in dtypes)
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x.to(layer.weight.dtype)) for layer in self.layers]


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, dtypes",
    [
        ("decomposed", (torch.float64, torch.float16, torch.bfloat16)),
        ("onnx", (torch.float64, torch.float16)),  # ONNX Runtime has no bfloat16 on the CPU
    ],
    ids=("decomposed", "onnx"),
)
def test_dtypes(form, dtypes, tmp_path):
    """float16 and bfloat16 are summed in float32: in their own dtype the sums would stop at 2048 and 256."""
    x = torch.ones(3, 3000, 1, 1)
    for got, dtype in zip(exported(form, Dtypes(*dtypes), x, tmp_path)(x), dtypes, strict=True):
        assert_same(got, torch.full((3, 2, 1, 1), -3000.0).to(dtype), f"{form}, {dtype}")


@dataclass(frozen=True)
class Network:
    """An adder network in training mode, images, and its outputs for them in evaluation mode."""

    model: nn.Module
    images: torch.Tensor
    logits: torch.Tensor
    bound: float


@cache
def network(arch: str) -> Network:
    """The statistics of its BatchNorms fit their inputs; otherwise the logits would not depend on the images."""
    torch.manual_seed(1)
    model = create_model(arch, "adder", in_channels=CHANNELS[arch], num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        model(torch.randn(16, CHANNELS[arch], 32, 32))
    images = torch.randn(3, CHANNELS[arch], 32, 32)
    logits, bound = logits_and_bound(model, images)
    assert bound < 0.01 * logits.std(), "the bound tells nothing"
    return Network(model, images, logits, bound)


def logits_and_bound(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns logits in float64, and a bound on the error of float32: that of every sum, propagated to the logits.

    Each output of a layer gets an error of the size that tolerances.py allows a sum of n terms (those of the
    operator's least favourable form, and 5 more roundings for BatchNorm and sums behind it), of random sign.  The
    roundings of a real run are smaller by an order of magnitude (LAMBDA = 9 standard deviations) and equally
    independent, so that the network carries them less far.
    """
    model = copy.deepcopy(model).double().eval()
    signs = torch.Generator().manual_seed(0)

    def disturb(layer: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        x, w = inputs[0].abs(), layer.weight.abs()
        if isinstance(layer, AdderConv2d):
            sums = F.conv2d(x, torch.ones_like(w), None, layer.stride, layer.padding) + w.sum((1, 2, 3))[:, None, None]
            sums = 2 * sums + y.abs()
        elif isinstance(layer, nn.Conv2d):
            sums = F.conv2d(x, w, None, layer.stride, layer.padding)
        else:
            sums = F.linear(x, w, layer.bias.abs())
        sign = torch.randint(0, 2, y.shape, generator=signs) * 2 - 1
        return y + sign * gamma(w[0].numel() + 5, torch.float32) * sums

    with torch.no_grad():
        logits = model(x.double())
        for layer in model.modules():
            if isinstance(layer, (AdderConv2d, nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(disturb)
        bound = (model(x.double()) - logits).abs().max().item()
    return logits, bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, form, options",
    [
        ("lenet5", "onnx", {"opset": 18}),
        *(pytest.param("resnet20", form, {}, marks=pytest.mark.slow) for form in FORMS),
    ],
    ids=("lenet5-onnx18", *(f"resnet20-{form}" for form in FORMS)),
)
def test_networks(arch, form, options, tmp_path):
    """In evaluation mode, for any batch size; the model stays in training mode and does not share its weights."""
    want = network(arch)
    model = copy.deepcopy(want.model)
    run = exported(form, model, want.images[:2], tmp_path, **options)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for images in (slice(0, 3), slice(1, 2)):
        (got,) = run(want.images[images])
        assert_close(got, want, images, f"{arch}, {form}")


def assert_close(got: torch.Tensor, want: Network, images: slice, what: str) -> None:
    logits = want.logits[images]
    assert got.shape == logits.shape and got.dtype == torch.float32 and not got.requires_grad
    error = (got.double() - logits).abs().max().item()
    assert error <= want.bound, f"{what}: off by {error:.3g}, allowed are {want.bound:.3g}"


TORCH_ALONE = """
import sys, torch
torch.set_num_threads(1)
x = torch.load("x.pt")
y = torch.export.load("decomposed.pt2").module()(x)
assert "adderops" not in sys.modules
torch.save(y, "decomposed.pt")
"""


@pytest.mark.slow
def test_saved_programs(tmp_path):
    """The decomposed program runs with torch alone, in a process that never imports adderops; the other one here."""
    want = network("lenet5")
    torch.save(want.images, tmp_path / "x.pt")
    for form in ("decomposed", "operator"):
        export_program(want.model, want.images[:1], tmp_path / f"{form}.pt2", decompose=form == "decomposed")
    command = [sys.executable, "-c", TORCH_ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(torch.load(tmp_path / "decomposed.pt"), want, slice(0, 3), "decomposed")
    got = torch.export.load(tmp_path / "operator.pt2").module()(want.images)
    assert_close(got, want, slice(0, 3), "operator")


def small_model() -> nn.Module:
    return nn.Sequential(AdderConv2d(1, 2, 3), nn.BatchNorm2d(2))


EXAMPLE = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize("export", (export_program, export_onnx))
def test_an_interrupted_write_leaves_the_old_file(export, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(small_model(), EXAMPLE, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("export", (export_program, export_onnx))
def test_bad_arguments(export, tmp_path):
    name, path = export.__name__, tmp_path / "model.pt2"
    with pytest.raises(TypeError, match=f"{name}: example: expected a tensor, got tuple"):
        export(small_model(), (1, 1, 4, 4), path)
    for example in (EXAMPLE[:0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"{name}: example: expected \(N, ...\) with N >= 1, got shape"):
            export(small_model(), example, path)
    with pytest.raises(FileNotFoundError, match=f"{name}: path: expected a file in an existing folder, got '.*nowhere"):
        export(small_model(), EXAMPLE, tmp_path / "nowhere" / "model.pt2")
    assert not any(tmp_path.iterdir())


def test_bad_opsets(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(TypeError, match="export_onnx: opset: expected an integer, got str"):
        export_onnx(small_model(), EXAMPLE, tmp_path / "model.onnx", opset="20")
    for opset in (17, 999):
        with pytest.raises(ValueError, match=rf"export_onnx: opset: expected 18 to \d+, got {opset}"):
            export_onnx(small_model(), EXAMPLE, tmp_path / "model.onnx", opset=opset)


@pytest.mark.parametrize("package", ("onnx", "onnxscript"))
def test_without_onnx(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    remedy = rf"export_onnx: {package} is missing: install the extra adderops\[export\]"
    with pytest.raises(ModuleNotFoundError, match=remedy):
        export_onnx(small_model(), EXAMPLE, tmp_path / "model.onnx")
