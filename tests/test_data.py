from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from csgd import InputError, data
from csgd.ranks import Share

CPU = torch.device("cpu")


def digits(seed=0, shift=2, batch_size=64):
    return data.digits(image_size=32, batch_size=batch_size, shift=shift, seed=seed, device=CPU)


def test_digits_are_split_once_and_stratified():
    one, other = digits(seed=0), digits(seed=1)
    ((images, labels),) = [tuple(map(torch.cat, zip(*one.test_batches(), strict=True)))]
    assert images.shape == (360, 3, 32, 32)
    assert one.train_size + one.test_size == 1797
    assert labels.bincount().min() >= 34
    assert torch.equal(images, torch.cat([batch for batch, _ in other.test_batches()])), "whatever the seed"
    assert images.mean().abs() < 0.05
    assert images.std() == pytest.approx(1, abs=0.05)


def test_batches_are_a_function_of_seed_and_epoch():
    def epoch(d, n):
        return [images for images, _ in d.train_batches(n)]

    one, again, other = digits(), digits(), digits(seed=1)
    for a, b in zip(epoch(one, 3), epoch(again, 3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(epoch(one, 3)[0], epoch(one, 4)[0])
    assert not torch.equal(epoch(one, 3)[0], epoch(other, 3)[0])
    assert len(epoch(one, 0)) == one.steps_per_epoch == 23
    assert sum(map(len, epoch(one, 0))) == one.train_size


def test_shifts_move_images_by_whole_pixels_and_bring_in_zeros():
    images = torch.arange(1.0, 26.0).view(1, 1, 5, 5).repeat(64, 1, 1, 1)
    moved = data.Augmentation(shift=1)(images, torch.Generator().manual_seed(0))
    expected = [
        torch.nn.functional.pad(images[:1], [1] * 4)[:, :, dy : dy + 5, dx : dx + 5]
        for dy in range(3)
        for dx in range(3)
    ]
    seen = {next(i for i, e in enumerate(expected) if torch.equal(m[None], e)) for m in moved}
    assert seen == set(range(9))


def test_flips_mirror_about_half_of_the_images():
    images = torch.arange(1.0, 6.0).repeat(400, 1, 5, 1)
    flipped = data.Augmentation(flip=True)(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(3)).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_synthetic():
    made = data.synthetic(num_classes=4, image_size=16, train_size=64, test_size=32, batch_size=16, seed=0, device=CPU)
    images, labels = next(made.train_batches(0))
    assert images.shape == (16, 3, 16, 16)
    assert set(labels.tolist()) <= set(range(4))


def folder(root, splits, per_class=5):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            path = root / split / name
            path.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path / f"{i}.png")


def image_folder(root, **options):
    options = dict(image_size=32, batch_size=4, workers=0, test_fraction=0.2, seed=0, device=CPU) | options
    return data.image_folder(root=str(root), **options)


def test_image_folders_with_and_without_a_split(tmp_path):
    folder(tmp_path / "split", ["train", "val"])
    folder(tmp_path / "whole", ["."])
    split, whole = image_folder(tmp_path / "split"), image_folder(tmp_path / "whole")
    assert (split.train_size, split.test_size, split.num_classes) == (10, 10, 2)
    assert (whole.train_size, whole.test_size, whole.num_classes) == (8, 2, 2)
    images, labels = next(split.test_batches())
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_image_folders_repeat_by_seed_and_epoch_whoever_makes_them(tmp_path):
    folder(tmp_path, ["train", "val"], per_class=9)
    ways = [
        [image_folder(tmp_path)],
        [image_folder(tmp_path, workers=2)],  # the same workers for all epochs
        [image_folder(tmp_path, share=Share(rank, 2)) for rank in range(2)],
    ]

    def epoch(n, ranks):
        batches = zip(*(rank.train_batches(n) for rank in ranks), strict=True)
        return torch.cat([images for shares in batches for images, _ in shares])

    state = torch.get_rng_state()
    first, second = epoch(1, ways[0]), epoch(2, ways[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    deque(islice(ways[1][0].train_batches(0), 2), maxlen=0)  # an epoch that is left in its middle
    for way in ways:
        assert torch.equal(epoch(1, way), first)
        assert torch.equal(epoch(2, way), second)
    assert not torch.equal(epoch(1, [image_folder(tmp_path, seed=1)]), first)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(InputError, match="dataset.root '.*/nowhere' is not a folder"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="dataset.root: no folders of images in"):
        image_folder(tmp_path / "empty")
    with pytest.raises(InputError, match="CIFAR-10 in '.*' is not there; dataset.download=true fetches it"):
        data.cifar(classes=10, root=str(tmp_path), download=False, batch_size=4, seed=0, device=CPU)
