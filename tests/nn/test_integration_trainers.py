"""Popular trainers, unmodified, step adder layers by lr·eta, also with clipping, scaling and accumulation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from adderops import AdderConv2d, convert
from nn.synthetic_images import bars

LR, ETA = 0.1, 0.2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network() -> nn.Module:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(32, 4)),
    )
    convert(model, eta=ETA, verbose=False)
    assert [name for name, m in model.named_modules() if isinstance(m, AdderConv2d)] == ["3", "6"]
    return model


class Steps:
    """Measures the step of each layer in each optimizer step from outside: by the weights before and after."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, AdderConv2d)]
        self.rms: list[float] = []
        self.note()

    def note(self, *_) -> None:
        """To be called after each step."""
        now = [layer.weight.detach().float().cpu().clone() for layer in self.layers]
        if hasattr(self, "before"):
            self.rms += [(a - b).square().mean().sqrt().item() for a, b in zip(now, self.before, strict=True)]
        self.before = now

    def check(self, steps: int) -> None:
        assert self.rms == pytest.approx([LR * ETA] * steps * 2, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.01},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_lightning(options, tmp_path):
    L = pytest.importorskip("lightning.pytorch")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR)

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.fit_loop._should_accumulate() is False:
                steps.note()

    module = Module()
    steps = Steps(module)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Note()],
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(*bars(64, 1)), batch_size=8))
    steps.check(8 // options.get("accumulate_grad_batches", 1))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.filterwarnings("ignore")
def test_accelerate(accumulate, clip):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), LR), DataLoader(TensorDataset(*bars(64, 1)), batch_size=8)
    )
    steps = Steps(model)
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                steps.note()
            optimizer.zero_grad()
    steps.check(8 // accumulate)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_scaler_of_accelerate(fused, clip):
    """What mixed_precision="fp16" does on a GPU: accelerate's optimizer around torch's, with a GradScaler."""
    optimizers = pytest.importorskip("accelerate.optimizer")
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model = network()
    optimizer = optimizers.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), LR, fused=fused), scaler=scaler)
    steps = Steps(model)
    images, labels = bars(32, 1)
    for part in torch.arange(32).split(8):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images[part]), labels[part])).backward()
        if clip:
            scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        steps.note()
    steps.check(4)


class Images(Dataset):
    def __init__(self, count: int) -> None:
        self.images, self.labels = bars(count, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_hugging_face(accumulate, tmp_path):
    """With its default clipping, max_grad_norm=1.0, and a network of transformers."""
    transformers = pytest.importorskip("transformers")
    shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    model = convert(transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)), verbose=False)
    steps = Steps(model)
    assert len(steps.layers) == 5

    class Note(transformers.TrainerCallback):
        on_step_end = staticmethod(lambda *args, **kwargs: steps.note())

    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    assert arguments.max_grad_norm == 1.0
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Images(32), callbacks=[Note()])
    trainer.train()
    assert steps.rms == pytest.approx([LR * ETA] * (4 // accumulate) * 5, rel=1e-4)
    trainer.save_model(tmp_path / "saved")  # safetensors
    read = type(model)(model.config)
    convert(read, verbose=False)
    from safetensors.torch import load_file

    read.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))


def test_a_converted_network_trains_like_its_copy():
    """There is no state besides the weights: another trainer continues with them to the same bits."""
    images, labels = bars(16, 1)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    whole = network()
    halves = copy.deepcopy(whole)
    steps(whole, torch.optim.SGD(whole.parameters(), LR), 4)
    steps(halves, torch.optim.SGD(halves.parameters(), LR), 2)
    resumed = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(halves.state_dict())
        steps(resumed, torch.optim.SGD(resumed.parameters(), LR), 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
