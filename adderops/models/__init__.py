"""Networks, each defined once and built as an adder network or as a CNN: the student and the teacher of PKKD.

They are plain modules: `network(x)` returns logits. `register_model` adds a network of your own. `IntermediateOutputs`
collects the raw outputs of the layers between the first convolution and the classifier, in these networks and in those
of torchvision and timm.
"""

from adderops.models.checkpoints import load_reference_checkpoint, mark_adder_weights, unwrap_state_dict
from adderops.models.intermediates import IntermediateOutputs, classifier, matched_layers
from adderops.models.kinds import layer_of_kind
from adderops.models.lenet import LeNet5BN, lenet5
from adderops.models.mlp import MLP, mlp
from adderops.models.mobilenet import (
    DSCNN,
    MobileNet,
    ds_cnn,
    ds_cnn_x0_5,
    ds_cnn_x1_5,
    ds_cnn_x2_0,
    mobilenet,
)
from adderops.models.registry import ARCHITECTURES, create_model, input_size, register_model
from adderops.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNetCIFAR,
    ResNetImageNet,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
)
from adderops.models.resnet8 import ResNet8, resnet8, resnet8_x0_5, resnet8_x1_5, resnet8_x2_0
from adderops.models.vgg import VGGSmall, vgg_small

__all__ = [
    "ARCHITECTURES",
    "DSCNN",
    "MLP",
    "BasicBlock",
    "Bottleneck",
    "IntermediateOutputs",
    "LeNet5BN",
    "MobileNet",
    "ResNet8",
    "ResNetCIFAR",
    "ResNetImageNet",
    "VGGSmall",
    "classifier",
    "create_model",
    "ds_cnn",
    "ds_cnn_x0_5",
    "ds_cnn_x1_5",
    "ds_cnn_x2_0",
    "input_size",
    "layer_of_kind",
    "lenet5",
    "load_reference_checkpoint",
    "mark_adder_weights",
    "matched_layers",
    "mlp",
    "mobilenet",
    "register_model",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet8",
    "resnet8_x0_5",
    "resnet8_x1_5",
    "resnet8_x2_0",
    "unwrap_state_dict",
    "vgg_small",
]
