"""Options of training: each has its effect, and a run with it resumes like any other."""

from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adderops import AdderConv2d
from adderops.distill import METHODS, Interrupted, train, trainer
from adderops.distill.schedule import cosine
from adderops.models import create_model, lenet5
from distill.runs import assert_same_state, build_task, keep_tasks, rows_of


def load(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture
def steps(monkeypatch):
    """{"gradients": one dict by name per optimizer step, "tasks": the tasks built}."""
    seen = {"gradients": [], "tasks": keep_tasks(monkeypatch)}

    def record(*_):
        named = seen["tasks"][-1].named_parameters()
        seen["gradients"].append({name: p.grad.clone() for name, p in named if p.grad is not None})

    hook = register_optimizer_step_pre_hook(record)
    yield seen
    hook.remove()


# --- accumulation ---


def test_accumulated_gradient_is_the_mean_over_the_batch(config, data, tmp_path, steps, monkeypatch):
    """With BatchNorms on running statistics, the parts of a batch are independent: the same gradient.

    Batches of 15 in 4 parts, so that the parts are uneven: 4, 4, 4, 3.
    """
    monkeypatch.setattr(
        torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False), raising=False
    )
    for parts in (1, 4):
        train(replace(config, method="cnn", batch_size=15, epochs=1, accumulate=parts), data, tmp_path / str(parts))
    whole, accumulated = steps["gradients"][0], steps["gradients"][len(steps["gradients"]) // 2]
    for name, expected in whole.items():
        # sums of float32 in another order
        error = (accumulated[name] - expected).norm() / expected.norm()
        assert error < 1e-5, name


# --- clipping ---


def test_clipping_sets_the_norm_of_all_but_the_adder_layers(config, data, tmp_path, steps):
    train(replace(config, clip=1e-3), data, tmp_path)
    adders = {f"networks.student.{n}.weight" for n in ("conv2", "conv3", "conv4")}
    for gradients in steps["gradients"]:
        others = torch.stack([g.norm() for name, g in gradients.items() if name not in adders])
        assert others.norm().item() == pytest.approx(1e-3, rel=1e-3)  # torch divides by norm + 1e-6
    # and those take steps of their own size
    assert len(steps["gradients"]) == 16 and adders <= steps["gradients"][0].keys()


def test_clipping_leaves_the_adder_layers_alone(config, data, tmp_path, steps):
    for clip in (None, 1e-3):
        train(replace(config, epochs=1, clip=clip), data, tmp_path / str(clip))
    free, clipped = steps["gradients"][0], steps["gradients"][8]
    adders = [name for name in free if name.startswith("networks.student.conv") and "conv1" not in name]
    assert len(adders) == 3 and all(torch.equal(free[name], clipped[name]) for name in adders)
    assert free["networks.student.conv1.weight"].norm() > 10 * clipped["networks.student.conv1.weight"].norm()


# --- the moving average ---


@pytest.mark.slow
@pytest.mark.parametrize("method, role", [("pkkd", "student"), ("cnn", "teacher")])
def test_ema_is_the_moving_average_of_the_weights(config, data, tmp_path, monkeypatch, method, role):
    """Written out: a' = decay a + (1 - decay) w after each step, from the initial weights; BatchNorm's too."""
    decay, tasks, average = 0.9, keep_tasks(monkeypatch), {}
    config = replace(config, method=method, ema=decay, reestimate_batchnorm=0)

    def follow(*_):
        for name, value in tasks[-1].networks[role].state_dict().items():
            if name not in average or not value.is_floating_point():
                average[name] = value.clone()  # the first step's weights start it
            else:
                average[name] = decay * average[name] + (1 - decay) * value

    hook = register_optimizer_step_post_hook(follow)
    summary = train(config, data, tmp_path)
    hook.remove()
    saved = load(tmp_path / f"{role}_ema.pt")
    assert saved.keys() == average.keys()
    for name, value in average.items():
        if not value.is_floating_point():  # BatchNorm's count of batches
            continue
        torch.testing.assert_close(saved[name].float(), value.float(), rtol=1e-5, atol=1e-6)
    assert f"{role}_ema_test_accuracy" in rows_of(tmp_path / "log.csv")[-1]
    network = create_model("lenet5", "cnn" if method == "cnn" else "adder", 1, 4).eval()
    network.load_state_dict(saved)
    [(images, labels)] = data.test.batches([torch.arange(len(data.test))])
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == labels).double().mean().item()
    assert summary[f"{role}_ema_test_accuracy"] == pytest.approx(accuracy)


# --- fine-tuning and RIFLE ---


def test_initial_weights_are_those_of_the_file(config, data, tmp_path):
    state = lenet5("adder", 1, 4).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    task = build_task(replace(config, initial=str(tmp_path / "w.pt")))
    assert_same_state(dict(task.networks["student"].state_dict()), dict(state))


@pytest.mark.parametrize("method, arch", [("dsr", "lenet5"), ("desire", "mlp")])
def test_a_spiking_network_begins_with_another_or_with_a_cnn(config, tmp_path, method, arch):
    config, path = replace(config, method=method, arch=arch, steps=6, threshold=1.0).resolve(), tmp_path / "w.pt"

    def state(initial=None):
        return METHODS[method].network(config, "student", 1, 4, initial).state_dict()

    spiking = {name: value + 1 for name, value in state().items()}
    torch.save(spiking, path)
    assert_same_state(dict(state(path)), spiking)

    cnn = create_model(arch, "cnn", 1, 4).state_dict()
    torch.save(cnn, path)
    started = state(path)
    assert all(torch.equal(started[name], value) for name, value in cnn.items())
    assert started["spikes.1.neuron.threshold"] == 1

    torch.save({name: value for name, value in cnn.items() if name != "fc.weight"}, path)
    with pytest.raises(ValueError, match='Missing key.*"fc.weight"'):
        state(path)


@pytest.mark.parametrize(
    "arch, head", [("lenet5", ["fc.weight", "fc.bias"]), ("resnet20", ["fc.weight", "bn2.weight"])]
)
def test_a_classifier_of_other_classes_keeps_its_initial_weights(config, tmp_path, capsys, arch, head):
    state = create_model(arch, "adder", 1, 7).state_dict()
    torch.save(state, tmp_path / "w.pt")
    config = replace(config, arch=arch, initial=str(tmp_path / "w.pt"))
    student = build_task(config).networks["student"].state_dict()
    assert "another number of classes" in capsys.readouterr().out
    for name, value in student.items():
        if name in head:
            assert value.shape[0] == 4
        elif not name.startswith(("fc", "bn2") if arch == "resnet20" else "fc"):
            assert torch.equal(value, state[name]), name


@pytest.mark.slow
def test_rifle_redraws_the_classifier_after_every_period_but_the_last(config, data, tmp_path, monkeypatch):
    """Six epochs in periods of two: new weights before epochs 3 and 5, its learning rate 1, .5, 1, .5, 1, .5 of lr."""
    tasks, rates, heads, momentum = keep_tasks(monkeypatch), [], [], []

    def record(optimizer, *_):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        weight = tasks[-1].networks["student"].fc.weight
        heads.append(weight.detach().clone())
        momentum.append(any(bool(of_weight.any()) for of_weight in optimizer.state.get(weight, {}).values()))

    hook = register_optimizer_step_pre_hook(record)
    config = replace(config, method="plain", epochs=6, rifle=2)
    train(config, data, tmp_path)
    hook.remove()
    first_steps = range(0, 48, 8)
    assert [rates[i]["classifier"] for i in first_steps] == pytest.approx([0.1, 0.05] * 3)
    assert [rates[i]["all"] for i in first_steps] == pytest.approx([0.1 * cosine(epoch, 6) for epoch in range(6)])
    moved = [(heads[i] - heads[i - 1]).norm().item() for i in range(1, 48)]
    drawn = sorted(range(47), key=lambda i: -moved[i])[:2]
    assert sorted(i + 1 for i in drawn) == [16, 32]
    bound = 84**-0.5  # of nn.Linear's initialisation
    for i in (16, 32):
        assert heads[i].abs().max() <= bound
    assert not torch.equal(heads[16], heads[32])
    assert [i for i, has in enumerate(momentum) if not has] == [0, 16, 32]
    initial = build_task(config).networks["student"]
    assert torch.equal(heads[0], initial.fc.weight), "re-drawn at the start: fine-tuning would lose its classifier"


@pytest.mark.slow
def test_rifle_continues_as_uninterrupted(config, data, tmp_path):
    config = replace(config, epochs=4, rifle=2, ema=0.9)
    train(config, data, tmp_path / "whole")
    steps = []

    def stop(*_):
        steps.append(1)
        if len(steps) == 19:
            import signal

            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    with pytest.raises(Interrupted):
        train(config, data, tmp_path / "stopped")
    hook.remove()
    train(config, data, tmp_path / "stopped")
    for name in ("checkpoint.pt", "student.pt", "student_ema.pt"):
        assert_same_state(load(tmp_path / "stopped" / name), load(tmp_path / "whole" / name), name)


# --- how it is computed ---


def test_channels_last_reaches_images_and_weights(config, data, tmp_path, monkeypatch):
    formats = []
    forward = AdderConv2d.forward

    def record(self, x):
        if x.size(2) > 1:
            formats.append((x.is_contiguous(memory_format=torch.channels_last), self.weight.stride(1) == 1))
        return forward(self, x)

    monkeypatch.setattr(AdderConv2d, "forward", record)
    plain = train(replace(config, epochs=1), data, tmp_path / "contiguous")
    assert not any(x or w for x, w in formats)
    formats.clear()
    summary = train(replace(config, epochs=1, channels_last=True), data, tmp_path / "channels_last")
    assert formats and all(x and w for x, w in formats)
    assert summary["command"].endswith("--channels-last") and plain["test_images"] == summary["test_images"]


def test_amp_computes_convolutions_in_bfloat16_and_adder_layers_in_float32(config, data, tmp_path, monkeypatch):
    dtypes = {torch.nn.Conv2d: set(), AdderConv2d: set()}
    for layer in dtypes:
        monkeypatch.setattr(layer, "forward", lambda self, x, f=layer.forward, k=layer: _record(dtypes[k], f(self, x)))
    summary = train(replace(config, amp="bfloat16", epochs=4), data, tmp_path)
    assert dtypes == {torch.nn.Conv2d: {torch.bfloat16}, AdderConv2d: {torch.float32}}
    assert summary["student_train_accuracy"] > 0.5  # four classes
    assert all(value.dtype != torch.bfloat16 for value in load(tmp_path / "student.pt").values())


def _record(dtypes: set, output: torch.Tensor) -> torch.Tensor:
    dtypes.add(output.dtype)
    return output


@pytest.mark.slow
def test_compile_compiles_both_networks(config, data, tmp_path, monkeypatch):
    """With a backend that counts graphs; other tests compile adder layers with inductor."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_network = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_network(self, backend=count, fullgraph=True))
    torch.compiler.reset()
    train(replace(config, epochs=1), data, tmp_path / "eager")
    assert not graphs
    train(replace(config, epochs=1, compile=True), data, tmp_path / "compiled")
    assert len(graphs) >= 2
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("adder_conv2d" in name for name in called)
    assert_same_state(dict(load(tmp_path / "compiled" / "student.pt")), dict(load(tmp_path / "eager" / "student.pt")))


@pytest.mark.slow
def test_workers_change_nothing(config, data, tmp_path):
    for workers in (0, 1):
        train(replace(config, epochs=1, workers=workers), data, tmp_path / str(workers))
    ours, theirs = (load(tmp_path / w / "student.pt") for w in "01")
    assert_same_state(dict(ours), dict(theirs))


@pytest.mark.slow
def test_tensorboard_gets_every_row_once(config, data, tmp_path, monkeypatch):
    """Also after a run died between TensorBoard's row of an epoch and the checkpoint."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    config = replace(config, tensorboard=True)

    class Died(Exception):
        pass

    def die_in_epoch_2(path, content):
        if content["epoch"] == 2:
            raise Died
        save(path, content)

    save = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", die_in_epoch_2)
    with pytest.raises(Died):
        train(config, data, tmp_path)
    monkeypatch.undo()
    train(config, data, tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("student_test_accuracy")
    expected = [float(row["student_test_accuracy"]) for row in rows_of(tmp_path / "log.csv")]
    assert [s.step for s in scalars] == [1, 2] and [s.value for s in scalars] == pytest.approx(expected)
    assert "l_mid/conv3" in events.Tags()["scalars"] and "gradient_ratio/conv4" in events.Tags()["scalars"]
