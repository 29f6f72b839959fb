"""The gain of PKKD on a few of scikit-learn's digits: the experiments behind the default job (docs/default_job.md).

    python experiments/few_digits.py --train-images 100 --epochs 100 --augment crop --seeds 10 19 plain logits pkkd

Each seed has its own random balanced training set and is tested on all other digits, with BatchNorm statistics of the
training images.  A method may set options: pkkd:beta=1.
"""

import argparse
import math
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from adderops import reestimate_batchnorm
from adderops.distill import METHODS, Config, Options
from adderops.distill.build import build_optimizer
from adderops.distill.data import epoch_batches
from adderops.distill.runs.paired import mean_and_deviation, paired_difference
from adderops.optim import AdaptiveRate

CONTESTANTS = {
    "cnn": {"method": "cnn"},
    "plain": {"method": "plain"},
    "logits": {"method": "pkkd", "features": "none"},
    "pkkd": {"method": "pkkd"},
}
CLASSES, BORDER = 10, 4
DIGITS = SimpleNamespace(in_channels=1, num_classes=CLASSES)  # of the data, all that the networks depend on


def all_digits() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, 32, 32), from 0 to 255, and labels, in scikit-learn's order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().unsqueeze(1).float()
    return images.repeat_interleave(4, 2).repeat_interleave(4, 3), torch.from_numpy(digits.target).long()


def split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the indices of a balanced random training set and of all other images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
    order = order[labels[order].argsort(stable=True)]
    counts, of_class = labels.bincount(), labels[order]
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[of_class]
    order = order[(turn * CLASSES + of_class).argsort()]
    return order[:count], order[count:]


def crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image, padded by BORDER pixels on every side."""
    side, padded = images.size(-1), F.pad(images, (BORDER,) * 4, value=float(images.min()))
    corners = torch.randint(0, 2 * BORDER + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, r : r + side, c : c + side] for image, (r, c) in zip(padded, corners, strict=True)])


def train(config: Config, images: Tensor, labels: Tensor, training: Tensor, test: Tensor) -> dict[str, float]:
    """Returns the test accuracy of each network, by role."""
    x = (images - images[training].mean()) / images[training].std()
    task = METHODS[config.method].build(config, DIGITS, torch.device("cpu")).train()
    optimizer = build_optimizer(config, task)
    if config.method != "cnn":
        AdaptiveRate(task, optimizer)
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        for part in epoch_batches(len(training), config.batch_size, config.seed, epoch):
            generator = torch.Generator().manual_seed(config.seed * 100003 + epoch * 1009 + int(part[0]))
            batch, target = x[training[part]], labels[training[part]]
            optimizer.zero_grad()
            task(crops(batch, generator) if config.augment == "crop" else batch, target).total.backward()
            optimizer.step()
    found = {}
    for role, network in task.networks.items():
        reestimate_batchnorm(network.eval(), [x[training]])
        with torch.no_grad():
            logits = torch.cat([network(part) for part in x[test].split(500)])
        found[role] = (logits.argmax(1) == labels[test]).double().mean().item()
    return found


def configuration(method: str, options: argparse.Namespace, seed: int) -> Config:
    name, *changes = method.split(":")
    values = {**CONTESTANTS[name], "data": "digits", "seed": seed, "threads": 1}
    values |= {key: getattr(options, key) for key in ("epochs", "batch_size", "lr", "augment")}
    types = {f.name: type(f.default) for f in fields(Options)}
    values |= {key: types[key](value) for key, value in (change.split("=") for change in changes)}
    return Options(**values).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods", nargs="+", help=f"{', '.join(CONTESTANTS)}, with options; the first is the reference"
    )
    parser.add_argument("--train-images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--augment", choices=("none", "crop"), default="crop")
    parser.add_argument("--seeds", type=int, nargs=2, default=(10, 19), metavar=("FIRST", "LAST"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = all_digits()
    reference: list[dict[str, float]] = []
    for method in options.methods:
        rows = []
        for seed in range(options.seeds[0], options.seeds[1] + 1):
            sets = split(labels, options.train_images, seed)
            found = train(configuration(method, options, seed), images, labels, *sets)
            rows.append({"seed": seed, "network": found.get("student", found.get("teacher")), **found})
        reference = reference or rows
        texts = []
        for role in ("student", "teacher"):
            if role in rows[0]:
                mean, deviation = mean_and_deviation([100 * row[role] for row in rows])
                texts.append(f"{role} {mean:.2f} +- {deviation:.2f}")
        if rows is not reference:
            found = paired_difference(rows, reference, "network")
            texts.append(
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * found[k] for k in ("difference", "low", "high")))
            )
        print(f"{method}: {', '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
