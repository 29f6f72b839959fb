"""Images in memory: idx files in their true format, and digits."""

import gzip

import pytest
import torch

from adderops.distill.data import IDX_FILES, ImageSet, load_data, read_idx
from adderops.distill.data.sources import FASHION_MNIST
from distill.idx_files import IDX_NAMES, idx_bytes, write_idx_set

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX_NAMES


def pixels(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as they are in memory."""
    return images.source[images.indices]


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder(tmp_path, compress):
    assert IDX_FILES == IDX_NAMES
    arrays = write_idx_set(tmp_path / "tiny", compress=compress)
    data = load_data(str(tmp_path / "tiny"))
    assert (data.name, data.in_channels, data.num_classes, data.held_out) == ("tiny", 1, 3, False)
    for part, expected_images, expected_labels in ((data.train, *arrays[:2]), (data.test, *arrays[2:])):
        images, labels = pixels(part)
        expected = torch.zeros(len(part), 1, 32, 32, dtype=torch.uint8)
        expected[:, 0, 2:30, 2:30] = expected_images
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels) and labels.dtype == torch.int64


@pytest.mark.parametrize("side", [20, 31, 32])
def test_images_are_centred_on_32x32(tmp_path, side):
    arrays = write_idx_set(tmp_path, side)
    begin = (32 - side) // 2
    images, _ = pixels(load_data(str(tmp_path)).train)
    assert images.shape == (12, 1, 32, 32)
    assert torch.equal(images[:, 0, begin : begin + side, begin : begin + side].long(), arrays[0])


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: expected digits, mnist, .* or a folder of idx"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=rf"no {TRAIN_IMAGES} or .* expected a folder of .* or of train/CLASS"):
        load_data(str(tmp_path))
    write_idx_set(tmp_path)
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {TEST_LABELS} or {TEST_LABELS}\.gz in "):
        load_data(str(tmp_path))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    data = load_data("fashion-mnist")
    images, _ = pixels(data.train)
    assert images.shape == (60_000, 1, 32, 32)
    assert torch.equal(pixels(data.test)[1].bincount(), torch.full((10,), 1000))
    # 0.2860 and 0.3530 are the published mean and deviation of the 28x28 images
    inner = images[:, :, 2:30, 2:30].double() / 255
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
        (TEST_LABELS, torch.full((5,), 3), "expected test labels up to 2 as in training, got 3"),
    ],
    ids=["too large", "not images", "count", "unknown label"],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, name, array, message):
    write_idx_set(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(array.long()))
    with pytest.raises(ValueError, match=message) as caught:
        load_data(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_digits():
    data = load_data("digits")
    assert (data.name, data.in_channels, data.num_classes, data.held_out) == ("digits", 1, 10, False)
    images = torch.cat([pixels(data.train)[0], pixels(data.test)[0]])
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert images.shape == (1797, 1, 32, 32) and images.max() == 255
    assert torch.equal(images[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), images)
    assert torch.equal(pixels(load_data("digits").test)[0], pixels(data.test)[0])
