"""Converted networks of torchvision, timm and segmentation_models_pytorch learn, with their gates and heads."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops import AdderConv2d, convert, reestimate_batchnorm
from nn.synthetic_images import bars, masks, train, train_classifier


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def converted(model: nn.Module, adder_layers: int) -> nn.Module:
    convert(model, verbose=False)
    assert sum(isinstance(m, AdderConv2d) for m in model.modules()) == adder_layers
    return model


def se_resnet() -> nn.Module:
    timm = pytest.importorskip("timm")
    block = timm.models.resnet.BasicBlock
    widths = dict(channels=(16, 24, 32, 48), stem_width=16, block_args=dict(attn_layer="se"))
    return converted(timm.models.ResNet(block, (1, 1, 1, 1), num_classes=4, **widths), 12)


def efficientnet() -> nn.Module:
    return converted(pytest.importorskip("timm").create_model("test_efficientnet", num_classes=4), 12)


def mobilenetv3() -> nn.Module:
    mobilenet = pytest.importorskip("torchvision").models.mobilenetv3
    row = partial(mobilenet.InvertedResidualConfig, width_mult=1.0, dilation=1)
    rows = [
        row(16, 3, 16, 16, use_se=True, activation="RE", stride=2),
        row(16, 3, 48, 24, use_se=False, activation="RE", stride=2),
        row(24, 5, 64, 32, use_se=True, activation="HS", stride=2),
    ]
    return converted(mobilenet.MobileNetV3(rows, last_channel=64, num_classes=4), 9)


@pytest.mark.slow
@pytest.mark.parametrize("make, steps, lr", [(se_resnet, 60, 0.05), (efficientnet, 60, 0.05), (mobilenetv3, 100, 0.1)])
def test_classifiers_with_gates_learn(make, steps, lr):
    losses, accuracy, spread = train_classifier(make(), steps, lr)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert accuracy > 0.8
    assert spread > 0.1  # with closed gates every image would have the same logits


def intersection_over_union(logits: torch.Tensor, target: torch.Tensor) -> float:
    found, wanted = logits.argmax(1) == 1, target == 1
    return ((found & wanted).sum() / (found | wanted).sum()).item()


def fcn_with_auxiliary_head() -> nn.Module:
    """As torchvision's fcn_resnet50, with a ResNet of one block per stage; the heads read the first two stages."""
    torchvision = pytest.importorskip("torchvision")
    resnet, segmentation = torchvision.models.resnet, torchvision.models.segmentation
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    features = torchvision.models._utils.IntermediateLayerGetter(body, {"layer2": "out", "layer1": "aux"})
    heads = segmentation.fcn.FCNHead(128, 2), segmentation.fcn.FCNHead(64, 2)
    return converted(segmentation.FCN(features, *heads), 7)


def unet() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    shape = dict(encoder_depth=3, decoder_channels=(32, 16, 8), classes=2)
    return converted(smp.Unet("resnet18", encoder_weights=None, **shape), 15)


@pytest.mark.slow
@pytest.mark.parametrize("make, heads", [(fcn_with_auxiliary_head, ("out", "aux")), (unet, (None,))])
def test_segmentation_learns(make, heads):
    model, side = make(), 32
    (images, labels), (others, other_labels) = bars(64, 1, side), bars(16, 2, side)
    targets = masks(labels, side)

    def outputs(m: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        y = m(x)
        return [y if head is None else y[head] for head in heads]

    def loss_of(m: nn.Module, part: torch.Tensor) -> torch.Tensor:
        return sum(F.cross_entropy(y, targets[part]) for y in outputs(m, images[part]))

    losses = train(model, loss_of, images, steps=40, lr=0.05, batch=8)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    reestimate_batchnorm(model, images.split(16))
    with torch.no_grad():
        for y in outputs(model.eval(), others):
            assert intersection_over_union(y, masks(other_labels, side)) > 0.5  # all in the bar: 0.25


@pytest.mark.slow
def test_the_loss_of_a_detector_falls():
    """RetinaNet on three stages of a ResNet; its forward cannot be traced as a whole."""
    torchvision = pytest.importorskip("torchvision")
    detection, resnet = torchvision.models.detection, torchvision.models.resnet
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    backbone = detection.backbone_utils._resnet_fpn_extractor(body, 5, returned_layers=[2, 3])
    side = 64
    anchors = detection.anchor_utils.AnchorGenerator(((32,),) * 3, ((0.25, 1.0),) * 3)
    model = detection.RetinaNet(
        backbone, 2, min_size=side, max_size=side, anchor_generator=anchors, image_mean=[0] * 3, image_std=[1] * 3
    )
    converted(model, 8)
    assert not any(isinstance(m, AdderConv2d) for part in (model.head, backbone.fpn) for m in part.modules())
    images, labels = bars(32, 1, side)

    def box(label: int) -> torch.Tensor:
        return torch.tensor([[0.0, side // 4 * label, side, side // 4 * (label + 1)]])

    def loss_of(m: nn.Module, part: torch.Tensor) -> torch.Tensor:
        targets = [{"boxes": box(i), "labels": torch.tensor([1])} for i in labels[part].tolist()]
        return sum(m(list(images[part]), targets).values())

    losses = train(model, loss_of, images, steps=120, lr=0.005, batch=4)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_heads_of_the_networks_of_torchvision_stay():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
        retinanet = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    converted(fcn, 54)
    for head in (fcn.classifier, fcn.aux_classifier):
        assert [type(m) for m in head if isinstance(m, nn.modules.conv._ConvNd)] == [AdderConv2d, nn.Conv2d]
    converted(retinanet, 52)
    assert not any(isinstance(m, AdderConv2d) for m in retinanet.head.modules())
