"""Networks of torchvision and timm as CNNs and as adder networks."""

import sys

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.models import IntermediateOutputs, classifier, create_model, matched_layers


def need(arch: str) -> None:
    pytest.importorskip(arch.partition("/")[0])


GATES = [f"blocks.{stage}.0.se.conv_{name}" for stage in (3, 4) for name in ("reduce", "expand")]


@pytest.mark.parametrize(
    ("arch", "channels", "layers", "gates", "head"),
    [("torchvision/resnet18", 3, 19, [], "fc"), ("timm/test_efficientnet", 1, 16, GATES, "classifier")],
)
@pytest.mark.filterwarnings("ignore:.*convolutions stay ordinary")
def test_both_kinds_train_and_match(arch, channels, layers, gates, head):
    """Gates of squeeze-and-excitation stay convolutions: as adder layers they would be closed and pass no gradient."""
    need(arch)
    names = {}
    for kind, layer in (("cnn", nn.Conv2d), ("adder", AdderConv2d)):
        model = create_model(arch, kind, in_channels=channels, num_classes=7)
        outputs = IntermediateOutputs(model)
        for name, m in zip(outputs.names, outputs.layers, strict=True):
            assert isinstance(m, nn.Conv2d if name in gates else layer), name
        adder_layers = sum(isinstance(m, AdderConv2d) for m in model.modules())  # first and classifier are none
        assert adder_layers == (0 if kind == "cnn" else layers - len(gates))
        logits = model(torch.randn(2, channels, 64, 64))
        assert logits.shape == (2, 7)
        for output, m in zip(outputs.take(), outputs.layers, strict=True):
            assert output.shape[:2] == (2, m.out_channels)
        logits.square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and p.grad.any(), name
        names[kind] = outputs.names
        assert classifier(model) == (head, model.get_submodule(head))
    assert names["cnn"] == names["adder"]
    assert len(names["cnn"]) == layers
    assert set(gates) <= set(names["cnn"])


def test_depthwise_layers_of_timm_become_adder_layers():
    need("timm")
    model = create_model("timm/mobilenetv1_100", in_channels=1)
    layers = matched_layers(model).values()
    assert sum(m.groups == m.in_channels for m in layers) == 13
    assert all(isinstance(m, AdderConv2d) for m in layers)


@pytest.mark.parametrize("name", ["vgg11", "squeezenet1_1"])
def test_convolutions_overwritten_in_place_are_kept_raw(name):
    """No BatchNorm between convolution and in-place ReLU there."""
    need("torchvision")
    with torch.device("meta"):
        cnn = create_model(f"torchvision/{name}", "cnn", num_classes=7).eval()
    outputs = IntermediateOutputs(cnn)
    cnn(torch.empty(1, 3, 64, 64, device="meta"))
    assert len(outputs.take()) == len(outputs.names)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_forward_gives_logits_alone(name, monkeypatch):
    need("torchvision")
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda *args, **kwargs: None)  # seconds for values that do not matter
    with torch.device("meta"):
        model = create_model(f"torchvision/{name}", "adder", num_classes=7).train()
    outputs = IntermediateOutputs(model)
    assert model(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 7)
    assert len(outputs.take()) == len(outputs.names)


def test_a_classifier_that_is_a_convolution():
    need("torchvision")
    with torch.device("meta"):
        model = create_model("torchvision/squeezenet1_1", "cnn", num_classes=7)
    assert classifier(model) == ("classifier.1", model.classifier[1])
    assert "classifier.1" not in matched_layers(model)


def test_what_stays_a_convolution_is_reported():
    need("timm")
    # one of five has a custom forward there (its padding depends on the image), the others are gates
    kept = r"tf_mobilenetv3_small_100: \d+ of \d+ convolutions stay ordinary, .*: blocks.0.0.conv_dw, .*se.*, \.\.\."
    with torch.device("meta"):
        with pytest.warns(UserWarning, match=kept) as warned:
            create_model("timm/tf_mobilenetv3_small_100")
        assert warned[0].filename == __file__
        create_model("timm/vit_tiny_patch16_224", "cnn")
        with pytest.raises(ValueError, match="convolutions followed by normalisation, got 'timm/vit_tiny_patch16_224'"):
            create_model("timm/vit_tiny_patch16_224")


def test_networks_without_normalisation_have_no_adder_form():
    need("torchvision")
    with torch.device("meta"):
        with pytest.raises(ValueError, match="convolutions followed by normalisation, got 'torchvision/vgg11'"):
            create_model("torchvision/vgg11")
        model = create_model("torchvision/vgg11_bn")
    assert all(isinstance(m, AdderConv2d) for m in matched_layers(model).values())


def test_names_of_timm_with_a_tag():
    need("timm")
    with torch.device("meta"):
        tagged, plain = (create_model(f"timm/{name}", "cnn") for name in ("resnet18.a1_in1k", "resnet18"))
    assert str(tagged) == str(plain)
    for wrong in ("resnet17.a1_in1k", "resnet18.a7_in7k"):
        with pytest.raises(ValueError, match=f"arch: expected one of .* got 'timm/{wrong}'"):
            create_model(f"timm/{wrong}")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_package_is_named_with_the_remedy(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"arch '{library}/resnet18' needs {library}: pip install {library}"):
        create_model(f"{library}/resnet18")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_wrong_arguments_are_named(library):
    need(library)
    with pytest.raises(ValueError, match=f"expected one of .*'{library}/resnet50'.* got '{library}/resnet51'"):
        create_model(f"{library}/resnet51")
    with pytest.raises(ValueError, match=f"such as '{library}/.* got '{library}/'"):
        create_model(f"{library}/")
    with pytest.raises(ValueError, match="kind: expected one of 'adder', 'cnn', got 'shift'"):
        create_model(f"{library}/resnet18", "shift")


def test_torchvision_takes_three_channels_only():
    need("torchvision")
    with pytest.raises(ValueError, match="in_channels: expected 3 for 'torchvision/resnet18', got 1"):
        create_model("torchvision/resnet18", in_channels=1)
