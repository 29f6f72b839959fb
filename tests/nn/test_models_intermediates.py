"""Raw outputs of the matched layers of any network, recorded in an ordinary forward pass."""

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops import AdderConv2d, convert
from adderops.models import ARCHITECTURES, IntermediateOutputs, ResNetCIFAR, create_model, lenet5, matched_layers


def small_net() -> nn.Sequential:
    """The second convolution is overwritten in place by the ReLU after it, the third is not."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Calls(nn.Module):
    """Two matched layers, which `calls` runs."""

    def __init__(self, calls) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Conv2d(4, 4, 1), AdderConv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)
        self.calls = calls

    def forward(self, x):
        return self.fc(self.calls(self, self.stem(x)).mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8)


def test_inputs_are_recorded_instead():
    model = small_net()
    inputs = IntermediateOutputs(model, ["3", "6"], inputs=True)
    model(IMAGES)
    first, second = inputs.take()
    assert torch.equal(first, model[:3](IMAGES)) and torch.equal(second, model[3:6](first))


def test_which_layers_match():
    model = nn.Sequential(
        nn.Linear(3, 3),  # before the first convolution: neither
        nn.Conv1d(3, 4, 1),  # the first convolution
        nn.Sequential(nn.Conv2d(4, 4, 1), AdderConv2d(4, 4, 1)),
        nn.ConvTranspose2d(4, 4, 1),
        nn.Conv2d(4, 4, 1),  # not the classifier: a linear layer follows
        nn.Linear(4, 4),
    )
    assert matched_layers(model) == {"2.0": model[2][0], "2.1": model[2][1], "4": model[4]}
    assert list(matched_layers(model[:5])) == ["2.0", "2.1"]
    assert list(matched_layers(nn.Sequential(model[1], model[2], model[2]))) == ["1.0"]
    for model in (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(3, 3)), nn.Linear(3, 3), nn.ReLU()):
        assert matched_layers(model) == {}
        with pytest.raises(ValueError, match="model: expected a convolution between the first and the classifier"):
            IntermediateOutputs(model)


@pytest.mark.parametrize("arch", ["lenet5", "vgg_small", "resnet20", "mobilenet", "resnet8", "ds_cnn", "resnet18"])
def test_matched_layers_are_those_that_convert_replaces(arch):
    with torch.device("meta"):
        model = create_model(arch, "cnn")
    names = list(matched_layers(model))
    convert(model, verbose=False)
    assert [name for name, m in model.named_modules() if isinstance(m, AdderConv2d)] == names
    assert list(matched_layers(model)) == names


@pytest.mark.parametrize("arch", ["lenet5", "vgg_small", "resnet20", "mobilenet", "resnet8", "ds_cnn", "resnet18"])
@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_outputs_are_those_of_the_layers(arch, kind):
    model = create_model(arch, kind, in_channels=1)
    matched = matched_layers(model)
    seen = {}
    for name, layer in matched.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.clone()}))
    outputs = IntermediateOutputs(model)
    assert outputs.names == list(matched)
    assert outputs.layers == list(matched.values())
    model(torch.randn(2, 1, 32, 32))
    taken = outputs.take()
    assert len(taken) == len(seen) == len(matched)
    for name, output in zip(outputs.names, taken, strict=True):
        assert torch.equal(output, seen[name]), name


def test_activations_in_place_do_not_reach_the_outputs():
    model = small_net()
    expected = [model[:2](IMAGES), model[:4](IMAGES)]
    logits = copy.deepcopy(model)(IMAGES)
    outputs = IntermediateOutputs(model)
    assert torch.equal(model(IMAGES), logits)
    for output, value in zip(outputs.take(), expected, strict=True):
        assert output.min() < 0
        assert torch.equal(output, value)


def test_other_changes_in_place_are_refused():
    outputs = IntermediateOutputs(model := Calls(lambda m, x: m.b(F.relu(m.a(x), inplace=True))))
    model(IMAGES)
    with pytest.raises(RuntimeError, match="the output of layer 'a' was changed in place"):
        outputs.take()
    with torch.inference_mode():  # where tensors have no version
        model(IMAGES)
        assert len(outputs.take()) == 2


def test_the_graph_reaches_the_layers():
    model = small_net()
    outputs = IntermediateOutputs(model)
    model(IMAGES)
    outputs.take()[1].sum().backward()
    assert all(model[i].weight.grad is not None for i in (0, 1, 3))
    assert model[6].weight.grad is None


@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_the_model_stays_as_it_is(arch):
    model = create_model(arch).eval()
    x = torch.randn(2, 3, 32, 32)
    keys, logits = list(model.state_dict()), model(x)
    outputs = IntermediateOutputs(model)
    assert torch.equal(model(x), logits)
    assert list(model.state_dict()) == keys
    assert len(outputs.take()) == len(outputs.names)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_remove_takes_the_hooks_away():
    model = small_net()
    outputs = IntermediateOutputs(model)
    model(IMAGES)
    outputs.remove()
    outputs.remove()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="layer '1' was not run"):
        outputs.take()


def test_outputs_are_forgotten():
    """By take(), by the next forward pass and by remove(); otherwise graph and memory would stay alive."""
    model = small_net()
    outputs = IntermediateOutputs(model)

    def alive(forget) -> bool:
        model(IMAGES)
        output = weakref.ref(outputs._outputs[0])
        assert output() is not None
        forget()
        return output() is not None

    assert not alive(lambda: outputs.take() and None)
    assert not alive(lambda: model[0](IMAGES) is None or outputs._forget())
    assert not alive(lambda: model(IMAGES) is None)
    outputs.take()
    with pytest.raises(RuntimeError, match="layer '1' was not run"):
        outputs.take()
    assert not alive(outputs.remove)


def test_forwards_without_take():
    model = small_net()
    outputs = IntermediateOutputs(model)
    for images in (IMAGES, IMAGES.flip(0)):
        model(images)
    assert torch.equal(outputs.take()[0], model[:2](IMAGES.flip(0)))
    outputs.enabled = False
    model(IMAGES)
    assert outputs._outputs == [None, None]
    outputs.enabled = True
    model(IMAGES)
    assert len(outputs.take()) == 2


def test_a_layer_that_was_not_run_is_named():
    outputs = IntermediateOutputs(model := Calls(lambda m, x: m.a(x)))
    model(IMAGES)
    with pytest.raises(RuntimeError, match="layer 'b' was not run"):
        outputs.take()
    model.calls = lambda m, x: m.b(m.a(x))
    model(IMAGES)
    assert len(outputs.take()) == 2


def test_a_layer_run_twice_is_refused():
    outputs = IntermediateOutputs(model := Calls(lambda m, x: m.b(m.a(m.a(x)))))
    with pytest.raises(RuntimeError, match="layer 'a' was run twice in one forward"):
        model(IMAGES)
    model.calls = lambda m, x: m.b(m.a(x))  # the next forward pass does not continue the refused one
    model(IMAGES)
    assert len(outputs.take()) == 2


def test_compiled_without_a_graph_break():
    model = ResNetCIFAR("adder", blocks=(1, 1, 1), in_channels=1).eval()
    x = torch.randn(2, 1, 8, 8)
    outputs = IntermediateOutputs(model)
    logits, expected = model(x), outputs.take()
    model.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(model(x), logits)
        for output, value in zip(outputs.take(), expected, strict=True):
            assert torch.equal(output, value)
            assert output.requires_grad


class Task(nn.Module):
    """Holds both, as a distillation task does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = lenet5("cnn")
        self.outputs = IntermediateOutputs(self.network)

    def forward(self, x):
        return self.network(x), self.outputs.take()


def test_take_in_a_compiled_region():
    task, x = Task().eval(), torch.randn(2, 1, 32, 32)
    expected = task(x)[1]
    task.compile(backend="eager", fullgraph=True)
    for output, value in zip(task(x)[1], expected, strict=True):
        assert torch.equal(output, value)


def pickled(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_keep_outputs_of_their_own(duplicate):
    task, x = Task().eval(), torch.randn(2, 1, 32, 32)
    task.network(x)  # outputs with a graph, which cannot be copied, are pending
    other = duplicate(task)
    assert other.outputs.layers == list(matched_layers(other.network).values())
    with pytest.raises(RuntimeError, match="'conv2' was not run"):
        other.outputs.take()
    logits, outputs = other(x)
    assert len(outputs) == 3
    assert len(task.outputs.take()) == 3, "the copy wrote into the original"
    other.outputs.remove()
    assert (hooks(other), hooks(task)) == (0, 4)


def test_every_architecture_has_matched_layers():
    for arch, build in ARCHITECTURES.items():
        if arch == "mlp":  # has no convolutions
            continue
        with torch.device("meta"):
            assert IntermediateOutputs(build("adder")).names == IntermediateOutputs(build("cnn")).names
