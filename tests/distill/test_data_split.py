"""`train_images` and `validation` choose fixed images, the same number of each class, and leave the rest alone."""

import pytest
import torch

from adderops.distill.data import load_data
from distill.idx_files import IDX_NAMES, idx_bytes, write_idx_set


def labels_of(images) -> torch.Tensor:
    return images.source[images.indices][1]


def chosen(images) -> set[int]:
    return set(images.indices.tolist())


@pytest.mark.parametrize("validation", [0, 200])
def test_subsets_are_balanced_nested_and_fixed(validation):
    subsets = {n: load_data("digits", train_images=n, validation=validation).train for n in (10, 105, 500)}
    for count, subset in subsets.items():
        of_class = labels_of(subset).bincount(minlength=10)
        assert len(subset) == count == len(chosen(subset))
        assert of_class.max() - of_class.min() <= 1
    assert chosen(subsets[10]) < chosen(subsets[105]) < chosen(subsets[500])
    torch.manual_seed(99)  # the global random state takes no part
    again = load_data("digits", train_images=105, validation=validation)
    assert torch.equal(again.train.indices, subsets[105].indices)
    # random, not the first of the file
    assert subsets[105].indices.float().mean() > 300


def test_all_images_are_the_same_set_as_no_choice():
    everything = load_data("digits").train
    assert torch.equal(everything.indices, torch.arange(1297))
    assert torch.equal(load_data("digits", train_images=1297).train.indices, everything.indices)


def test_validation_images_are_held_out_of_training():
    data = load_data("digits", validation=300)
    assert data.held_out and len(data.test) == 300 and len(data.train) == 997
    assert data.test.source is data.train.source
    assert chosen(data.test) | chosen(data.train) == set(range(1297))  # with the sizes: they share none
    assert torch.equal(labels_of(data.test).bincount(), torch.full((10,), 30))
    smaller = load_data("digits", validation=300, train_images=100)
    assert torch.equal(smaller.test.indices, data.test.indices)
    assert chosen(smaller.train) < chosen(data.train)


def test_validation_images_are_not_augmented():
    data = load_data("digits", validation=100, augment="crop")
    assert data.train.transform is not None and data.test.transform is None


def test_with_validation_the_test_images_are_not_read(tmp_path):
    write_idx_set(tmp_path)
    for name in IDX_NAMES[2:]:
        (tmp_path / name).unlink()
    assert len(load_data(str(tmp_path), validation=6).test) == 6
    with pytest.raises(FileNotFoundError, match=IDX_NAMES[2]):
        load_data(str(tmp_path))


def test_a_class_that_runs_out_leaves_its_turns_to_the_others(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / IDX_NAMES[1]).write_bytes(idx_bytes(torch.tensor([0] * 8 + [1] * 3 + [2])))
    data = load_data(str(tmp_path), train_images=8)
    assert labels_of(data.train).bincount().tolist() == [4, 3, 1]
    assert load_data(str(tmp_path), train_images=3).num_classes == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_images": 9}, r"train_images: expected 10 \(one a class\) to 1297, got 9"),
        ({"train_images": 1298}, r"train_images: expected 10 .* to 1297, got 1298"),
        ({"train_images": 1198, "validation": 100}, r"train_images: expected 10 .* to 1197, got 1198"),
        ({"validation": 9}, r"validation: expected 0 or 10 \(one a class\) to 1287, got 9"),
        ({"validation": -1}, r"validation: expected 0 or 10 .* got -1"),
        ({"validation": 1288}, r"validation: expected 0 or 10 .* to 1287, got 1288"),
        ({"augment": "imagenet"}, "augment: expected one of none, crop, crop-flip for digits, got 'imagenet'"),
        ({"side": 32}, "side: expected none for digits, whose images are 32x32, got 32"),
        ({"download": True}, "download: expected one of mnist, fashion-mnist, cifar10, cifar100, got digits"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_data("digits", **options)
