"""Image sets: idx files in their true format, digits, and the order of images as a function of seed and epoch."""

import gzip
from pathlib import Path

import pytest
import torch
from idx_files import idx_bytes

from adderops.distill import data as data_module
from adderops.distill import load_dataset
from adderops.distill.data import FASHION_MNIST, IDX_FILES, epoch_batches, read_idx

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX_FILES


def make_folder(folder: Path, side: int = 28, compress: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    arrays = {
        TRAIN_IMAGES: torch.randint(0, 256, (12, side, side), generator=generator),
        TRAIN_LABELS: torch.arange(12) % 3,
        TEST_IMAGES: torch.randint(0, 256, (5, side, side), generator=generator),
        TEST_LABELS: torch.arange(5) % 3,
    }
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder(tmp_path, compress):
    arrays = make_folder(tmp_path / "tiny", compress=compress)
    dataset = load_dataset(str(tmp_path / "tiny"))
    assert dataset.name == "tiny" and dataset.num_classes == 3
    for images, labels, part in (
        (dataset.train_images, dataset.train_labels, (TRAIN_IMAGES, TRAIN_LABELS)),
        (dataset.test_images, dataset.test_labels, (TEST_IMAGES, TEST_LABELS)),
    ):
        expected = torch.zeros(len(images), 1, 32, 32, dtype=torch.uint8)
        expected[:, 0, 2:30, 2:30] = arrays[part[0]]
        assert torch.equal(images, expected)
        assert torch.equal(labels, arrays[part[1]]) and labels.dtype == torch.int64


def test_normalized_training_images_have_mean_0_and_deviation_1(tmp_path):
    make_folder(tmp_path)
    dataset = load_dataset(str(tmp_path))
    normalized = dataset.normalize(dataset.train_images)
    assert normalized.dtype == torch.float32
    assert normalized.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert normalized.double().var(correction=0).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("side", [20, 31, 32])
def test_images_are_centred_on_32x32(tmp_path, side):
    arrays = make_folder(tmp_path, side)
    begin = (32 - side) // 2
    images = load_dataset(str(tmp_path)).train_images
    assert images.shape == (12, 1, 32, 32)
    assert torch.equal(images[:, 0, begin : begin + side, begin : begin + side].long(), arrays[TRAIN_IMAGES])


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: expected digits, fashion-mnist or a folder"):
        load_dataset(str(tmp_path / "nowhere"))
    make_folder(tmp_path)
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {TEST_LABELS} or {TEST_LABELS}\.gz in "):
        load_dataset(str(tmp_path))


def test_missing_fashion_mnist_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_dataset("fashion-mnist")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    dataset = load_dataset("fashion-mnist")
    assert dataset.train_images.shape == (60_000, 1, 32, 32)
    assert torch.equal(dataset.test_labels.bincount(), torch.full((10,), 1000))
    # 0.2860 and 0.3530 are the published mean and deviation of the 28x28 images
    inner = dataset.train_images[:, :, 2:30, 2:30].double() / 255
    assert inner.mean().item() == pytest.approx(0.2860, abs=5e-5)
    assert inner.std().item() == pytest.approx(0.3530, abs=5e-5)


GOOD = idx_bytes(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected an idx file of unsigned bytes"),
        (b"\x00\x00\x0d" + GOOD[3:], r"expected an idx file of unsigned bytes .*got '00 00 0d 02'"),
        (b"<html>not found</html>", "expected an idx file of unsigned bytes"),
        (GOOD[:9], "expected 2 sizes behind the magic number"),
        (GOOD[:-1], r"expected 6 bytes for shape \(2, 3\), got 5"),
        (GOOD + b"\x00", r"expected 6 bytes for shape \(2, 3\), got 7"),
        (gzip.compress(GOOD)[:-9], "expected a whole gzip file"),
        (gzip.compress(GOOD)[:15] + b"\xff" + gzip.compress(GOOD)[16:], "expected a whole gzip file"),
    ],
    ids=["empty", "type", "html", "header", "short", "long", "gzip cut", "gzip damaged"],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(GOOD)
    assert torch.equal(read_idx(path), torch.zeros(2, 3, dtype=torch.uint8))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name, array, message",
    [
        (
            TRAIN_IMAGES,
            torch.zeros(12, 33, 28),
            r"expected images \(N, H, W\) of at most 32x32, got shape \(12, 33, 28\)",
        ),
        (TRAIN_IMAGES, torch.zeros(12, 28), r"expected images \(N, H, W\)"),
        (TRAIN_LABELS, torch.zeros(11), r"expected 12 labels, got shape \(11,\)"),
        (TEST_LABELS, torch.full((5,), 3), "expected labels up to 2 as in training, got 3"),
    ],
    ids=["too large", "not images", "count", "unknown label"],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, name, array, message):
    make_folder(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(array.long()))
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path))


def test_digits():
    dataset = load_dataset("digits")
    assert dataset.train_images.shape == (1297, 1, 32, 32) and dataset.test_images.shape == (500, 1, 32, 32)
    assert dataset.num_classes == 10 and dataset.train_images.max() == 255
    everything = torch.cat([dataset.train_images, dataset.test_images])
    assert torch.equal(everything[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), everything)
    assert torch.equal(load_dataset("digits").test_images, dataset.test_images)


@pytest.mark.parametrize("count, batch_size", [(1297, 64), (60_000, 256), (10, 4), (5, 5)])
def test_every_image_once_in_even_batches(count, batch_size):
    batches = epoch_batches(count, batch_size, seed=3, epoch=4)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(count))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat(epoch_batches(100, 10, seed, epoch))

    first = order(0, 0)
    torch.manual_seed(99)  # the global random state takes no part
    assert torch.equal(order(0, 0), first)
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        assert not torch.equal(order(seed, epoch), first)
    assert not torch.equal(order(0, 1), order(1, 0))
