"""The networks: sizes, checkpoints of the reference code, which layers are adder layers, building by name."""

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.models import (
    ARCHITECTURES,
    DSCNN,
    ResNet8,
    classifier,
    create_model,
    input_size,
    load_reference_checkpoint,
    matched_layers,
    mobilenet,
    resnet20,
    resnet50,
)

# state entries, parameters, matched layers, multiply-accumulates per image: all layers, matched layers.
# ResNet-20 and -50: entries, parameters and layers of the reference code; ResNet-18 and -50: torchvision's parameters
# and multiply-accumulates plus the 2000 parameters of `bn2`; the others: summed by hand.
SIZES = {
    "lenet5": (26, 61_932, 3, 416_520, 298_080),
    "vgg_small": (38, 4_660_106, 5, 607_600_640, 603_979_776),
    "resnet20": (132, 272_484, 20, 40_813_184, 40_370_176),
    "resnet32": (204, 466_916, 32, 69_124_736, 68_681_728),
    "mobilenet": (164, 3_217_226, 26, 46_354_432, 45_459_456),
    "resnet8": (56, 78_042, 8, 12_501_632, 12_058_624),
    "resnet8_x0_5": (56, 19_954, 8, 3_236_160, 3_014_656),
    "resnet8_x1_5": (56, 174_274, 8, 27_796_416, 27_131_904),
    "resnet8_x2_0": (56, 308_650, 8, 49_120_512, 48_234_496),
    "ds_cnn": (56, 22_218, 8, 5_227_136, 4_784_128),
    "ds_cnn_x0_5": (56, 7_018, 8, 1_564_992, 1_343_488),
    "ds_cnn_x1_5": (56, 45_610, 8, 10_986_432, 10_321_920),
    "ds_cnn_x2_0": (56, 77_194, 8, 18_842_880, 17_956_864),
    "resnet18": (127, 11_689_512 + 2000, 19, 1_814_073_344, 1_695_547_392),
    "resnet50": (325, 25_557_032 + 2000, 52, 4_089_184_256, 3_969_122_304),
}


def build_on_meta(arch: str, kind: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return ARCHITECTURES[arch](kind, **kwargs)


def multiply_accumulates(model: nn.Module, x: torch.Tensor) -> dict[nn.Module, int]:
    """Returns output elements times the elements of a filter, per layer."""
    counts = {}

    def count(layer, inputs, output):
        counts[layer] = output.numel() * layer.weight[0].numel() // len(output)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, AdderConv2d)):
            module.register_forward_hook(count)
    model.eval()(x)
    return counts


def test_every_architecture_has_its_size_listed():
    assert {*SIZES, "mlp"} == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", SIZES)
@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_size(arch, kind):
    model = build_on_meta(arch, kind)
    entries, parameters, layers, all_macs, matched_macs = SIZES[arch]
    assert sum(not name.endswith("._extra_state") for name in model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, AdderConv2d) for m in model.modules()) == (layers if kind == "adder" else 0)
    size = input_size(arch)
    macs = multiply_accumulates(model, torch.empty(2, model.conv1.in_channels, size, size, device="meta"))
    assert sum(macs.values()) == all_macs
    assert sum(macs[layer] for layer in matched_layers(model).values()) == matched_macs


def test_mlp_reads_the_middle_pixels_and_has_no_adder_layers():
    model = build_on_meta("mlp", "cnn")
    assert sum(p.numel() for p in model.parameters()) == 784 * 1000 + 1000 * 100 + 100 * 10
    model = create_model("mlp", "cnn", in_channels=2, num_classes=7).eval()
    x = torch.randn(3, 2, 32, 32)
    logits = model(x)
    assert logits.shape == (3, 7) and classifier(model) == ("fc", model.fc)
    framed = x.clone()
    framed[..., :2, :] = framed[..., -2:] = 9
    assert torch.equal(model(framed), logits)
    framed[..., 2, 2] += 1
    assert not torch.equal(model(framed), logits)
    with pytest.raises(ValueError, match="kind: expected 'cnn' for mlp, which has no BatchNorm, got 'adder'"):
        create_model("mlp", "adder")


def test_width_of_mobilenet():
    with torch.device("meta"):
        model = mobilenet("cnn", width=0.5)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs[:5]] == [16, 16, 32, 32, 64]
    assert all(conv.groups == conv.in_channels == conv.out_channels for conv in convs[1::2])
    assert model.fc.in_features == 512
    # the published count of 0.5 MobileNet-224 with its 1000 classes
    with torch.device("meta"):
        assert sum(p.numel() for p in mobilenet(width=0.5, num_classes=1000).parameters()) == 1_331_592


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5, 2.0])
def test_widths_of_the_small_networks(width):
    """Every layer has the factor, and a multiple of 8 channels, as kernels of four bytes a word like it."""
    suffix = "" if width == 1 else f"_x{width}".replace(".", "_")
    for arch, full in (("resnet8", [16] * 3 + [32] * 3 + [64] * 3), ("ds_cnn", [64] * 9)):
        for kind in ("adder", "cnn"):
            model = build_on_meta(arch + suffix, kind)
            layers = [model.conv1, *matched_layers(model).values()]
            assert [layer.out_channels for layer in layers] == [int(width * channels) for channels in full]
            assert all(layer.out_channels % 8 == 0 for layer in layers)


def test_shapes_inside_the_small_networks():
    resnet8, ds_cnn = build_on_meta("resnet8", "adder"), build_on_meta("ds_cnn", "adder")
    blocks = [resnet8.block1, resnet8.block2, resnet8.block3]
    assert [block.conv1.stride[0] for block in blocks] == [1, 2, 2]
    assert [block.downsample is not None for block in blocks] == [False, True, True]
    assert [block.downsample[0].kernel_size for block in blocks[1:]] == [(1, 1), (1, 1)]
    assert ds_cnn.conv1.stride == (2, 2) and len(ds_cnn.blocks) == 4
    assert all(block.depthwise.groups == block.depthwise.in_channels for block in ds_cnn.blocks)


@pytest.mark.parametrize("arch", SIZES)
def test_first_and_classifier_are_ordinary_and_all_others_match_the_kind(arch):
    names = {}
    for kind, layer in (("adder", AdderConv2d), ("cnn", nn.Conv2d)):
        model = build_on_meta(arch, kind)
        weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, AdderConv2d))]
        assert weighted[0] is model.conv1 and type(model.conv1) is nn.Conv2d
        assert weighted[-1] is model.fc and type(model.fc) in (nn.Conv2d, nn.Linear)
        assert all(type(m) is layer for m in weighted[1:-1])
        assert list(matched_layers(model).values()) == weighted[1:-1]
        assert classifier(model) == ("fc", model.fc)
        names[kind] = list(matched_layers(model))
    assert names["adder"] == names["cnn"]


@pytest.mark.parametrize("arch", ["lenet5", "vgg_small", "resnet20", "mobilenet", "resnet8", "ds_cnn", "resnet18"])
def test_train_on_other_channels_and_classes(arch):
    model = create_model(arch, "adder", in_channels=2, num_classes=7)
    logits = model(torch.randn(2, 2, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_batchnorm_and_relu_follow_every_layer_but_the_classifier():
    """The outputs of BatchNorm have both signs: without the ReLU the inputs of a layer would be negative in part."""
    for arch in ("lenet5", "vgg_small", "resnet20", "mobilenet", "resnet8", "ds_cnn", "resnet50"):
        model, fed = ARCHITECTURES[arch]("cnn").train(), {}
        for name, layer in {**matched_layers(model), "fc": model.fc}.items():
            layer.register_forward_pre_hook(lambda _, x, name=name, fed=fed: fed.update({name: x[0]}))
        with torch.no_grad():
            model(torch.randn(2, model.conv1.in_channels, 32, 32))
        assert len(fed) == SIZES[arch][2] + 1
        for name, x in fed.items():
            assert x.min() >= 0, f"{arch}: {name}"


def test_convolutions_of_the_imagenet_form_start_as_in_the_reference():
    """He's normal distribution by the fan-out, for each convolution; adder layers from N(0, 1)."""
    for kind in ("adder", "cnn"):
        model = create_model("resnet18", kind)
        for name in ("conv1", "layer1.0.conv1", "layer3.0.downsample.0", "fc"):
            layer = model.get_submodule(name)
            fan_out = layer.weight[:, 0].numel()
            std = 1.0 if isinstance(layer, AdderConv2d) else (2 / fan_out) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1), name


class ReferenceState(dict[str, torch.Tensor]):
    """A state_dict as github.com/huawei-noah/AdderNet publishes it, transcribed from the files there."""

    def weight(self, name: str, *shape: int) -> None:
        self[f"module.{name}"] = torch.randn(shape)

    def norm(self, name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean"):
            self.weight(f"{name}.{key}", channels)
        self[f"module.{name}.running_var"] = torch.rand(channels) + 0.5
        self[f"module.{name}.num_batches_tracked"] = torch.tensor(7)


def reference_resnet20_state() -> ReferenceState:
    state = ReferenceState()
    state.weight("conv1.weight", 16, 3, 3, 3)
    state.norm("bn1", 16)
    channels_in = 16
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            name = f"layer{stage}.{block}"
            state.weight(f"{name}.conv1.adder", channels, channels_in, 3, 3)
            state.norm(f"{name}.bn1", channels)
            state.weight(f"{name}.conv2.adder", channels, channels, 3, 3)
            state.norm(f"{name}.bn2", channels)
            if channels_in != channels:
                state.weight(f"{name}.downsample.0.adder", channels, channels_in, 1, 1)
                state.norm(f"{name}.downsample.1", channels)
            channels_in = channels
    state.weight("fc.weight", 10, 64, 1, 1)
    state.norm("bn2", 10)
    return state


def reference_resnet50_state() -> ReferenceState:
    state = ReferenceState()
    state.weight("conv1.weight", 64, 3, 7, 7)
    state.norm("bn1", 64)
    channels_in = 64
    for stage, blocks, channels in ((1, 3, 64), (2, 4, 128), (3, 6, 256), (4, 3, 512)):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            state.weight(f"{name}.conv1.adder", channels, channels_in, 1, 1)
            state.norm(f"{name}.bn1", channels)
            state.weight(f"{name}.conv2.adder", channels, channels, 3, 3)
            state.norm(f"{name}.bn2", channels)
            state.weight(f"{name}.conv3.adder", 4 * channels, channels, 1, 1)
            state.norm(f"{name}.bn3", 4 * channels)
            if block == 0:
                state.weight(f"{name}.downsample.0.adder", 4 * channels, channels_in, 1, 1)
                state.norm(f"{name}.downsample.1", 4 * channels)
            channels_in = 4 * channels
    state.weight("fc.weight", 1000, 2048, 1, 1)
    state.weight("fc.bias", 1000)
    state.norm("bn2", 1000)
    return state


@pytest.mark.parametrize(
    ("build", "reference_state"), [(resnet20, reference_resnet20_state), (resnet50, reference_resnet50_state)]
)
def test_reference_checkpoint_loads_strictly(build, reference_state):
    state = reference_state()
    keys = list(state)
    model = build()
    load_reference_checkpoint(model, state)
    assert list(state) == keys, "the caller's mapping was changed"
    loaded = {name: value for name, value in model.state_dict().items() if not name.endswith("._extra_state")}
    assert list(loaded) == [key.removeprefix("module.").replace(".adder", ".weight") for key in keys]
    for key, value in zip(loaded, state.values(), strict=True):
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_reference_checkpoint_that_does_not_fit_is_refused(change):
    state = reference_resnet20_state()
    key = "module.layer3.2.conv2.adder"
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["module.layer3.3.conv1.adder"] = state[key]
    else:
        state[key] = state[key][:-1]
    with pytest.raises(RuntimeError, match=r"layer3\."):
        load_reference_checkpoint(resnet20(), state)


def test_stride_of_a_bottleneck_is_on_its_3x3_layer():
    for kind in ("adder", "cnn"):
        block = build_on_meta("resnet50", kind).layer2[0]
        strides = [layer.stride[0] for layer in (block.conv1, block.conv2, block.conv3, block.downsample[0])]
        assert strides == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("arch", "size"),
    [("lenet5", 32), ("vgg_small", 32), ("resnet20", 32), ("resnet32", 32), ("mobilenet", 32)]
    + [("resnet8", 32), ("resnet8_x0_5", 32), ("ds_cnn", 32), ("ds_cnn_x2_0", 32)]
    + [("resnet18", 224), ("resnet50", 224), ("torchvision/resnet18", 224), ("timm/resnet18", 224)],
)
def test_input_size(arch, size):
    assert input_size(arch) == size


@pytest.mark.parametrize("arch", ["alexnet", "timm", "keras/resnet50"])
@pytest.mark.parametrize("function", [create_model, input_size])
def test_unknown_architectures_are_refused_with_the_choices(arch, function):
    with pytest.raises(ValueError, match=f"arch: expected one of 'lenet5', .*'timm/NAME', got '{arch}'"):
        function(arch)


def test_wrong_arguments_are_named():
    for arch in ARCHITECTURES:
        with pytest.raises(ValueError, match="kind: expected one of 'adder', 'cnn', got 'shift'"):
            create_model(arch, "shift")
    for arch in ("lenet5", "vgg_small"):
        with pytest.raises(ValueError, match=r"expected images of 32x32, got shape \(2, 1, 28, 28\)"):
            create_model(arch, in_channels=1)(torch.zeros(2, 1, 28, 28))
    for width in (0.03, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"width: expected at least 1/32, got {width}"):
            mobilenet(width=width)
    with pytest.raises(ValueError, match="width: expected at least 1/16, got 0.06"):
        ResNet8(width=0.06)
    with pytest.raises(ValueError, match="width: expected at least 1/64, got nan"):
        DSCNN(width=float("nan"))
    with pytest.raises(ValueError, match="model: expected a convolution or a linear layer"):
        classifier(nn.ReLU())
