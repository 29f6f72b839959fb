"""Named sets and image folders: where they are looked for, what is downloaded, and what damaged files lead to."""

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from adderops.distill.data import load_data, sources
from distill.idx_files import IDX_NAMES, write_idx_set

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


class Network:
    """What `urlopen` reaches: files by the last part of their address; nothing at first."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def urlopen(self, request: urllib.request.Request):
        name = request.full_url.rsplit("/", 1)[-1]
        self.requests.append(name)
        if name not in self.files:
            raise URLError("no network")
        response = io.BytesIO(self.files[name])
        response.url, response.length = request.full_url, len(self.files[name])
        return response


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path) -> Network:
    network = Network()
    monkeypatch.setattr(urllib.request, "urlopen", network.urlopen)
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    return network


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def cifar_rows(count: int, seed: int) -> np.ndarray:
    """As the archives have them: 1024 bytes of red, 1024 of green, 1024 of blue, each row by row."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def cifar(monkeypatch):
    """cifar(name, root) writes a small set into the folder of the true one and makes its checksums the right ones."""

    def write(name: str, root: Path) -> dict[str, np.ndarray]:
        kind = KINDS[name]
        classes, key, names = (
            (10, "labels", "label_names") if name == "cifar10" else (100, "fine_labels", "fine_label_names")
        )
        folder = root / kind.base_folder
        folder.mkdir(parents=True)
        rows, sums = {}, {}
        for file, _ in (*kind.train_list, *kind.test_list):
            rows[file] = cifar_rows(2 * classes, seed=len(rows))
            content = pickle.dumps({"data": rows[file], key: list(range(classes)) * 2}, protocol=2)
            (folder / file).write_bytes(content)
            sums[file] = md5(content)
        meta = pickle.dumps({names: [f"class {i}" for i in range(classes)]}, protocol=2)
        (folder / kind.meta["filename"]).write_bytes(meta)
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(kind, files, [[file, sums[file]] for file, _ in getattr(kind, files)])
        return rows

    return write


@pytest.fixture
def packed_cifar(cifar, monkeypatch):
    """packed_cifar(name, root): as `cifar`, but the archive alone; returns its path."""

    def write(name: str, root: Path) -> Path:
        kind = KINDS[name]
        cifar(name, root / "unpacked")
        archive = root / kind.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(root / "unpacked" / kind.base_folder, kind.base_folder)
        monkeypatch.setattr(kind, "tgz_md5", md5(archive.read_bytes()))
        return archive

    return write


def first_batch(images, count: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(images.batches([torch.arange(count)], **options)))


@pytest.mark.parametrize("name, classes, train", [("cifar10", 10, 100), ("cifar100", 100, 200)])
def test_cifar(cifar, tmp_path, name, classes, train):
    rows = cifar(name, tmp_path)
    data = load_data(name, root=tmp_path)
    assert (data.name, data.in_channels, data.num_classes) == (name, 3, classes)
    assert (len(data.train), len(data.test)) == (train, 2 * classes)
    images, labels = first_batch(data.test, 15)
    raw = torch.from_numpy(rows[KINDS[name].test_list[0][0]][:15]).view(15, 3, 32, 32).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    torch.testing.assert_close(images.double(), (raw - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, torch.arange(2 * classes)[:15] % classes)
    # training images are cropped and mirrored by default, and those of the first file come first
    expected = torch.from_numpy(rows[KINDS[name].train_list[0][0]]).view(-1, 3, 32, 32)
    assert torch.equal(data.train.source[0][0], expected[0])
    plain = load_data(name, root=tmp_path, augment="none").train
    assert not torch.equal(first_batch(data.train, 8)[0], first_batch(plain, 8)[0])


def test_cifar_in_its_archive_needs_no_network(packed_cifar, network, tmp_path):
    packed_cifar("cifar10", tmp_path)
    assert len(load_data("cifar10", root=tmp_path).train) == 100
    assert network.requests == []


def test_cifar_is_downloaded(packed_cifar, network, tmp_path):
    archive = packed_cifar("cifar100", tmp_path)
    network.files[archive.name] = archive.read_bytes()
    archive.unlink()
    assert len(load_data("cifar100", download=True).train) == 200  # into ./data
    assert (tmp_path / "data" / archive.name).is_file()
    network.requests.clear()
    load_data("cifar100", download=True)
    assert network.requests == []


def test_damaged_cifar_is_refused(cifar, packed_cifar, network, tmp_path):
    cifar("cifar10", tmp_path)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-batches-py: expected whole files with the checksums of .*CIFAR10"):
        load_data("cifar10", root=tmp_path)
    archive = packed_cifar("cifar100", tmp_path)
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{archive.name}: expected whole files with the checksums of .*CIFAR100"):
        load_data("cifar100", root=tmp_path)
    assert network.requests == []


@pytest.mark.parametrize("where", ["", "MNIST/raw", "FashionMNIST/raw", "debian"])
def test_places_of_mnist_and_fashion_mnist(where, tmp_path):
    places = {
        "mnist": ["", "MNIST/raw"],
        "fashion-mnist": ["", "FashionMNIST/raw", "debian"],
    }
    arrays = write_idx_set(tmp_path / where, compress=True)
    for name, known in places.items():
        if where in known:
            data = load_data(name, root=tmp_path)
            assert data.name == name
            assert torch.equal(data.train.source.tensors[0][:, 0, 2:30, 2:30].long(), arrays[0])
        else:
            with pytest.raises(FileNotFoundError):
                load_data(name, root=tmp_path)


@pytest.mark.parametrize("name, kind", [("mnist", datasets.MNIST), ("fashion-mnist", datasets.FashionMNIST)])
def test_mnist_is_downloaded(name, kind, monkeypatch, network, tmp_path):
    write_idx_set(tmp_path / "server", compress=True)
    network.files = {path.name: path.read_bytes() for path in (tmp_path / "server").iterdir()}
    monkeypatch.setattr(kind, "resources", [(f"{n}.gz", md5(network.files[f"{n}.gz"])) for n in IDX_NAMES])
    root = tmp_path / "root"
    assert len(load_data(name, root=root, download=True).train) == 12
    assert (root / kind.__name__ / "raw" / IDX_NAMES[0]).read_bytes() == gzip.decompress(
        network.files[f"{IDX_NAMES[0]}.gz"]
    )
    network.requests.clear()
    assert len(load_data(name, root=root, download=True).train) == 12
    assert network.requests == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("mnist", rf"no {IDX_NAMES[0]} or {IDX_NAMES[0]}\.gz in data or data/MNIST/raw: .* --download"),
        ("fashion-mnist", r"in data or data/FashionMNIST/raw or .*debian: .* --download"),
        ("cifar10", r"no data/cifar-10-batches-py and no data/cifar-10-python\.tar\.gz: .* --download"),
        ("cifar100", r"no data/cifar-100-python and no data/cifar-100-python\.tar\.gz: .* --download"),
        ("imagenet", r"no folder data/train: expected train/CLASS/IMAGE and val/CLASS/IMAGE in data$"),
    ],
)
def test_missing_sets_say_what_is_expected_where(network, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_data(name)
    assert network.requests == []


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_a_download_that_fails_is_an_error_of_the_system(network, name):
    with pytest.raises(OSError, match="download: expected to get .* into data, got: .*no network"):
        load_data(name, download=True)
    assert network.requests


@pytest.mark.parametrize("name", ["imagenet", "."])
def test_no_download_of_image_folders(network, name):
    with pytest.raises(ValueError, match="download: expected one of mnist, fashion-mnist, cifar10, cifar100, got"):
        load_data(name, download=True)


COLOURS = {"blue": (0, 40, 220), "red": (200, 30, 0)}


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes of JPEG files of different sizes, one of them grey."""
    folder = tmp_path / "pictures"
    for part, count in (("train", 4), ("val", 2)):
        for k, colour in enumerate(("blue", "red")):
            (folder / part / colour).mkdir(parents=True)
            for i in range(count):
                noise(90 + 10 * i, 70 + 30 * k, seed=10 * k + i).save(folder / part / colour / f"{i}.jpg")
    noise(80, 80, seed=99).convert("L").save(folder / "train" / "red" / "grey.jpg")
    return folder


def test_image_folder(image_folder):
    data = load_data(str(image_folder), side=56)
    assert (data.name, data.in_channels, data.num_classes) == ("pictures", 3, 2)
    assert (len(data.train), len(data.test)) == (9, 4)
    images, labels = first_batch(data.test, 4)
    assert images.shape == (4, 3, 56, 56) and images.dtype == torch.float32 and labels.tolist() == [0, 0, 1, 1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for i, path in enumerate(sorted((image_folder / "val").glob("*/*.jpg"))):
        # 56/224 of: the shorter edge to 256, then the middle 224x224
        picture = Image.open(path)
        size = [64 * edge // min(picture.size) for edge in picture.size]
        left, top = (round((edge - 56) / 2) for edge in size)
        picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 56, top + 56))
        expected = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(images[i], expected, rtol=0, atol=1e-5)
    assert load_data(str(image_folder)).test.transform(Image.open(path)).shape == (3, 224, 224)


def test_image_folder_by_the_name_of_imagenet(image_folder):
    data = load_data("imagenet", root=image_folder, side=16, validation=2)
    assert (data.name, data.num_classes, data.held_out) == ("imagenet", 2, True)
    assert first_batch(data.test, 2)[0].shape == (2, 3, 16, 16)


def test_random_parts_of_image_files(image_folder):
    images = load_data(str(image_folder), side=32).train
    batches = [torch.tensor([8, 0, 3]), torch.tensor([1, 5])]
    alone = list(images.batches(batches, epoch=1, seed=4))
    for (a, b), (c, d) in zip(alone, images.batches(batches, epoch=1, seed=4, workers=2), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(alone[0][0], next(iter(images.batches(batches, epoch=2, seed=4)))[0])
    still = load_data(str(image_folder), side=32, augment="none").train
    assert torch.equal(first_batch(still, 9, epoch=0)[0], first_batch(still, 9, epoch=1)[0])


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "huge"])
def test_damaged_image_files_are_named(image_folder, damage):
    path = image_folder / "val" / "red" / "1.jpg"
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>", "huge": b"P6 99999 99999 255 "}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"val/red/1\.jpg: expected a whole image file, got a damaged one"):
        first_batch(load_data(str(image_folder), side=16).test, 4)


def test_an_image_file_that_went_away_is_an_error_of_the_system(image_folder):
    data = load_data(str(image_folder), side=16)
    (image_folder / "val" / "red" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"val/red/1\.jpg"):
        first_batch(data.test, 4)


def test_image_folder_with_other_classes_for_testing(image_folder):
    (image_folder / "val" / "red").rename(image_folder / "val" / "green")
    with pytest.raises(ValueError, match=r"val: expected the classes of .*train, got a difference: \['green', 'red'\]"):
        load_data(str(image_folder))


def test_image_folder_without_val(image_folder):
    (image_folder / "val").rename(image_folder / "test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*pictures/val: expected train/CLASS/IMAGE and val/CLASS"):
        load_data(str(image_folder))
    assert len(load_data(str(image_folder), validation=4).test) == 4


@pytest.mark.parametrize(
    "options, message",
    [({"augment": "crop"}, "augment: expected one of none, imagenet for"), ({"side": 0}, "side: expected at least 1")],
)
def test_arguments_that_do_not_fit_an_image_folder_are_refused(image_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(str(image_folder), **options)


def test_missing_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "adderops.distill.data")
    with pytest.raises(ModuleNotFoundError, match=r"install the extra `adderops\[distill\]`"):
        import adderops.distill.data  # noqa: F401
