"""torch.export and torch.onnx.export themselves, without adderops.export: dynamic sizes, wrapped and changed models."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from cases import assert_same, one_thread, quarters
from slow import slow_except
from torch import nn
from torch.export import Dim
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from adderops import AdderConv2d, AdderLinear
from adderops.export import export_onnx, export_program
from adderops.models import lenet5
from adderops.quant import calibrate

GEOMETRIES = {
    "plain": dict(),
    "bias": dict(padding=1, bias=True),
    "stride": dict(stride=(2, 1), padding=(0, 2)),
    "groups": dict(stride=2, padding=1, groups=3, bias=True),
    "same": dict(padding="same", dilation=(1, 2)),
    "reflect": dict(padding=2, padding_mode="reflect"),
}


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def network(**geometry) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        AdderConv2d(6, 9, (3, 2), **geometry),
        nn.ReLU(),
        AdderConv2d(9, 4, 3, bias=True),
        nn.AdaptiveMaxPool2d(1),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), AdderLinear(4, 5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(quarters(*parameter.shape))
        model[0].weight -= 40  # outputs of both signs
        if model[0].bias is not None:
            model[0].bias += 100
    return model


SIZES = ((1, 6, 12, 10), (2, 6, 16, 16), (5, 6, 9, 23))
DYNAMIC = ({0: Dim("batch"), 2: Dim("height", min=9), 3: Dim("width", min=9)},)


@pytest.mark.parametrize("strict", (False, True), ids=("not strict", "strict"))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_dynamic_batch_height_and_width(name, strict):
    model = network(**GEOMETRIES[name])
    run = torch.export.export(model, (quarters(2, 6, 16, 16),), dynamic_shapes=DYNAMIC, strict=strict).module()
    for size in SIZES:
        x = quarters(*size)
        assert_same(run(x).detach(), model(x).detach(), f"{size}")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(("stride", "groups"), GEOMETRIES))
def test_plain_onnx_export_with_dynamic_sizes(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = network(**GEOMETRIES[name]), tmp_path / "model.onnx"
    example = (quarters(2, 6, 16, 16),)
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    for size in SIZES:
        x = quarters(*size)
        (y,) = session.run(None, {value.name: x.numpy()})
        assert_same(torch.from_numpy(y), copy.deepcopy(model).double()(x.double()).detach().float(), f"{size}")


PLAIN_ONNX = """
import sys
{imports}
import torch
loaded = "onnxscript" in sys.modules
assert loaded == {early}
model = adderops.AdderConv2d(2, 3, 3).eval()
program = torch.onnx.export(model, (torch.ones(1, 2, 5, 5),), dynamo=True, verbose=False)
assert [node.op_type for node in program.model.graph].count("Scan") == 1
{again}
"""


@pytest.mark.slow
@pytest.mark.parametrize("early", (False, True), ids=("onnxscript later", "onnxscript first"))
def test_plain_onnx_export_whatever_is_imported_first(early):
    """`import adderops` does not import onnxscript, and still the plain call knows the operator."""
    pytest.importorskip("onnxscript")
    first = "import onnxscript.function_libs.torch_lib.ops" if early else ""
    again = "torch.onnx.export(torch.export.export(model, (torch.ones(1, 2, 5, 5),)), dynamo=True, verbose=False)"
    code = PLAIN_ONNX.format(imports=f"{first}\nimport adderops", early=early, again=again)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


class Tanh(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.tanh()


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    return model


def parametrized() -> nn.Module:
    model = network()
    parametrize.register_parametrization(model[0], "weight", Tanh())
    parametrizations.weight_norm(model[2])
    return model


def compiled_in_place() -> nn.Module:
    model = network()
    model.compile(backend="eager")
    return model


CHANGED = {
    "pruned": pruned,
    "parametrized": parametrized,
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "compiled in place": compiled_in_place,
    "DataParallel": lambda: nn.DataParallel(network()),
    "AveragedModel": lambda: AveragedModel(network()),
    "compiled DataParallel of a compiled model": lambda: torch.compile(
        nn.DataParallel(torch.compile(network(), backend="eager")), backend="eager"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(("parametrized", "AveragedModel"), CHANGED))
def test_changed_and_wrapped_models(name, tmp_path):
    model, example, x = CHANGED[name](), quarters(1, 6, 16, 16), quarters(3, 6, 16, 16)
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(export_program(model, example).module()(x), want)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(model, example, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), want)


def test_distributed_data_parallel(tmp_path):
    """Its forward cannot be traced; our functions unwrap it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = nn.parallel.DistributedDataParallel(network()), quarters(2, 6, 16, 16)
        torch.testing.assert_close(export_program(model, x).module()(x), model.module(x).detach())
    finally:
        torch.distributed.destroy_process_group()


def test_dtensors_are_refused(tmp_path):
    """By PyTorch: the operator has no sharding strategy."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = AdderConv2d(3, 4, 3, eta=None)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(NotImplementedError, match="adder_conv2d.default does not have a sharding strategy"):
            layer(distribute_tensor(torch.randn(2, 3, 5, 5), mesh, [Shard(0)]))
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            layer(torch.randn(2, 3, 5, 5))
    finally:
        torch.distributed.destroy_process_group()


def test_a_calibrated_model_says_what_to_export():
    torch.manual_seed(0)
    model, images = lenet5(), torch.randn(8, 1, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(images)
    calibrated = calibrate(model.eval(), [images])
    for export in (
        lambda: export_program(calibrated, images),
        lambda: torch.export.export(calibrated, (images,)),
    ):
        with pytest.raises(RuntimeError, match="QuantAdderConv2d: expected .* adderops.quant.convert makes"):
            export()


def test_program_keeps_its_operator_through_a_file():
    model, x = network(), quarters(2, 6, 16, 16)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=DYNAMIC), file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    for size in SIZES:
        x = quarters(*size)
        assert_same(loaded(x).detach(), model(x).detach(), f"{size}")
