"""Batches: normalized, in an order and with random crops that follow from seed, epoch and image alone."""

import pytest
import torch
from torch.utils.data import TensorDataset

from adderops.distill.data import ImageSet, epoch_batches, load_data
from distill.idx_files import IDX_NAMES, idx_bytes, write_idx_set

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_data("digits", augment="crop-flip").train


def run(images: ImageSet, batches, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(batch) for batch in images.batches(batches, **options)]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


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
    assert first[:5].tolist() == [67, 34, 61, 88, 31]  # runs of earlier versions keep their order
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        assert not torch.equal(order(seed, epoch), first)
    assert not torch.equal(order(0, 1), order(1, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_images_asked_for(workers):
    data = load_data("digits", validation=100)
    order = torch.arange(100).flip(0).split(30)
    for images in (data.train, data.test):
        batches = run(images, order, workers=workers)
        for wanted, (pixels, labels) in zip(order, batches, strict=True):
            raw, expected = images.source[images.indices[wanted]]
            assert torch.equal(labels, expected) and labels.dtype == torch.int64
            assert torch.equal(pixels, (raw - images.mean) / images.std) and pixels.dtype == torch.float32


def test_normalized_training_images_have_mean_0_and_deviation_1(tmp_path):
    write_idx_set(tmp_path)
    data = load_data(str(tmp_path), train_images=9)
    [(pixels, _)] = run(data.train, [torch.arange(9)])
    assert pixels.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert pixels.double().var(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert torch.equal(data.test.mean, data.train.mean) and torch.equal(data.test.std, data.train.std)


def test_blank_images_stay_finite(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / IDX_NAMES[0]).write_bytes(idx_bytes(torch.zeros(12, 32, 32, dtype=torch.int64)))
    [(pixels, _)] = run(load_data(str(tmp_path)).train, [torch.arange(12)])
    assert torch.equal(pixels, torch.zeros(12, 1, 32, 32))


def test_crops_do_not_depend_on_workers_or_on_who_shares_the_batch(digits):
    order = epoch_batches(200, 32, seed=5, epoch=1)
    alone = run(digits, order, epoch=1, seed=5)
    assert equal(alone, run(digits, order, epoch=1, seed=5, workers=2))
    assert equal(alone[3:], run(digits, order[3:], epoch=1, seed=5))  # continued within an epoch
    one_by_one = run(digits, torch.cat(order).split(1), epoch=1, seed=5)
    assert torch.equal(torch.cat([x for x, _ in alone]), torch.cat([x for x, _ in one_by_one]))


def test_crops_do_not_depend_on_which_other_images_were_chosen(digits):
    few = load_data("digits", augment="crop-flip", train_images=50).train
    [(of_few, _)] = run(few, [torch.arange(50)], seed=3)
    [(of_all, _)] = run(digits, [few.indices], seed=3)
    levels = of_few * few.std + few.mean, of_all * digits.std + digits.mean  # normalized by the images chosen
    torch.testing.assert_close(*levels, rtol=0, atol=1e-3)


def test_crops_follow_from_seed_and_epoch_and_leave_the_global_random_state_alone(digits):
    order = [torch.arange(64)]
    first = run(digits, order, epoch=2, seed=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert equal(first, run(digits, order, epoch=2, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    for epoch, seed in ((3, 7), (2, 8), (7, 2)):
        assert not equal(first, run(digits, order, epoch=epoch, seed=seed))


@pytest.mark.parametrize("augment, mirrored", [("crop", {False}), ("crop-flip", {False, True})])
def test_each_image_gets_its_own_crop(tmp_path, augment, mirrored):
    """One dot in every image shows the shift; a second one to the right of it shows whether the image is mirrored."""
    write_idx_set(tmp_path, train=300)
    dots = torch.zeros(300, 32, 32, dtype=torch.int64)
    dots[:, 16, 15], dots[:, 16, 16] = 100, 200
    (tmp_path / IDX_NAMES[0]).write_bytes(idx_bytes(dots))
    images = load_data(str(tmp_path), augment=augment).train
    [(pixels, _)] = run(images, [torch.arange(300)])
    levels = (pixels * images.std + images.mean).round().long()
    assert torch.equal(levels.flatten(1).sum(1), torch.full((300,), 300))
    places = set()
    for level in levels[:, 0]:
        row, column = (level == 100).nonzero()[0].tolist()
        flip = bool(column > 0 and level[row, column - 1] == 200)
        places.add((row - 16, (31 - column if flip else column) - 15, flip))
    rows, columns, flips = map(set, zip(*places, strict=True))
    assert rows == columns == set(range(-4, 5)) and flips == mirrored
    assert len(places) > 75  # of 81 or 162


def test_augmentation_is_off_for_grey_images_and_for_testing(tmp_path):
    write_idx_set(tmp_path)
    for name in ("digits", str(tmp_path)):
        data = load_data(name)
        assert data.train.transform is None and data.test.transform is None
    assert load_data("digits", augment="crop-flip").test.transform is None


def test_channels_are_normalized_each_by_its_own():
    source = TensorDataset(torch.full((2, 3, 1, 1), 90, dtype=torch.uint8), torch.arange(2))
    images = ImageSet(source, torch.arange(2), mean=torch.tensor([0.0, 80, 90]), std=torch.tensor([1.0, 2, 4]))
    [(pixels, _)] = run(images, [torch.arange(2)])
    assert pixels.flatten(1).tolist() == [[90, 5, 0]] * 2


def test_pinning_is_handed_on(digits):
    assert digits.batches([torch.arange(4)], pin_memory=True).pin_memory
