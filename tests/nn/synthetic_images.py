"""Images that a small network learns within seconds, and an ordinary training loop."""

import torch
import torch.nn.functional as F
from torch import nn

import adderops


def bars(count: int, seed: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright horizontal bar at one of four heights, the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, side, side, generator=generator) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, side // 4 * label : side // 4 * (label + 1)] += 1
    return images, labels


def masks(labels: torch.Tensor, side: int) -> torch.Tensor:
    """The class of each pixel: 1 in the bar, else 0."""
    rows = torch.arange(side) // (side // 4)
    return (rows == labels[:, None]).long()[:, :, None].expand(-1, -1, side)


def train(model: nn.Module, loss_of, images: torch.Tensor, steps: int, lr: float, batch: int = 32) -> list[float]:
    """Trains by SGD with a decaying learning rate, re-estimates BatchNorm, and returns the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        part = torch.randperm(len(images))[:batch]
        loss = loss_of(model, part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def train_classifier(
    model: nn.Module, steps: int, lr: float = 0.05, side: int = 32
) -> tuple[list[float], float, float]:
    """Returns the losses, the accuracy on other images, and the part of the logits that depends on the image."""
    (images, labels), (others, other_labels) = bars(256, 1, side), bars(64, 2, side)
    losses = train(model, lambda m, part: F.cross_entropy(m(images[part]), labels[part]), images, steps, lr)
    adderops.reestimate_batchnorm(model, images.split(64))
    with torch.no_grad():
        logits = model.eval()(others)
    accuracy = (logits.argmax(1) == other_labels).float().mean().item()
    return losses, accuracy, ((logits - logits.mean(0)).norm() / logits.norm()).item()
