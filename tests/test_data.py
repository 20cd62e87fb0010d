import gzip
from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from csgd import InputError, data
from csgd.data import Data
from csgd.pipeline.device import check_fit, check_task
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


def test_a_shift_below_0_is_refused():
    with pytest.raises(InputError, match="dataset.shift must be 0 pixels or more, got -1"):
        digits(shift=-1)


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


def fashion(root, **changes):
    how = dict(image_size=28, train_size=None, shift=2, flip=True, batch_size=64, seed=0, device=CPU) | changes
    return data.fashion_mnist(root=str(root), download=False, **how)


def write_idx(folder, name, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The four files of the package, with ten images of each class to train on and three to test on."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 30)):
        write_idx(tmp_path, f"{part}-images-idx3-ubyte", drawn.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    monkeypatch.setattr(data, "FASHION_PACKAGE", tmp_path)
    return tmp_path


def test_fashion_mnist_is_read_from_the_files_of_the_package_as_torchvision_reads_its_own(package, tmp_path):
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    of_package = fashion(tmp_path / "nowhere")
    for file in package.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    of_torchvision = fashion(tmp_path / "mine")
    for one, other in zip(of_package.test_batches(), of_torchvision.test_batches(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert of_package.class_names[9] == "Ankle boot"
    assert (of_package.train_size, of_package.test_size) == (100, 30)


def test_fashion_mnist_smaller_and_with_fewer_images(package, tmp_path):
    few = fashion(tmp_path, train_size=25, image_size=14, shift=0, flip=False)
    images, labels = map(torch.cat, zip(*few.train_batches(0), strict=True))
    assert sorted(labels.bincount().tolist()) == [2] * 5 + [3] * 5
    again, _ = map(
        torch.cat, zip(*fashion(tmp_path, train_size=25, shift=0, flip=False, seed=1).train_batches(0), strict=True)
    )
    means = F.avg_pool2d(again, 2).flatten(1)
    nearest = (means[:, None] - images.flatten(1)).abs().amax(-1).amin(1)
    assert nearest.max() < 1e-5, "the same images for every seed, each pixel the mean of four"
    for wrong in (101, 0, 1.5, True, "few"):
        with pytest.raises(InputError, match=f"dataset.train_size must lie between 1 and 100, .* got {wrong!r}"):
            fashion(tmp_path, train_size=wrong)


def test_where_fashion_mnist_is_missing_both_ways_to_it_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FASHION_PACKAGE", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"Fashion-MNIST in .* dataset.download=true .*Debian's package dataset-fash"):
        fashion(tmp_path)


class Pictures(Dataset):
    """Gray pictures of `size`, labelled 0, 1, 2, 0, …, whose transform draws."""

    def __init__(self, count, size=(10, 8)):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, position):
        return Image.new("L", self.size, 51 + int(torch.randint(2, ()))), np.int64(position % 3)


def of(train, test, **options):
    return Data.of(train, test, **dict(classes=3, batch_size=4, seed=0, device=CPU) | options)


def test_data_of_any_two_datasets_are_normalised():
    made = of(Pictures(11), Pictures(5), mean=(0.1, 0.2, 0.3), std=0.5)
    assert (made.train_size, made.test_size, made.num_classes, made.steps_per_epoch) == (11, 5, 3, 3)
    assert made.example.shape == (2, 3, 8, 10), "of height and width, in colours"
    images, labels = next(made.test_batches())
    expected = (torch.tensor([51, 52]) / 255)[:, None] / 0.5 - torch.tensor([0.2, 0.4, 0.6])
    seen = images.unflatten(0, (4,)).amax((2, 3))
    assert (torch.isclose(seen[:, None], expected).all(2).sum(1) == 1).all()
    assert labels.tolist() == [0, 1, 2, 0]
    bytes_of, floats_of = (torch.arange(2 * 4).view(2, 1, 2, 2).to(kind) for kind in (torch.uint8, torch.float64))
    for images, factor in ((bytes_of, 255), (floats_of, 1)):
        made = of(TensorDataset(images, torch.tensor([0, 1])), TensorDataset(images, torch.tensor([0, 1])))
        torch.testing.assert_close(made.example, images.float() / factor)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_of_datasets_repeat_by_seed_and_epoch_whoever_makes_them():
    ways = [[of(Pictures(11), Pictures(3), workers=workers)] for workers in (0, 2)]
    ways.append([of(Pictures(11), Pictures(3), share=Share(rank, 2)) for rank in range(2)])

    def epoch(number, ranks):
        batches = zip(*(rank.train_batches(number) for rank in ranks), strict=True)
        return [torch.cat(parts) for shares in batches for parts in zip(*shares, strict=True)]

    first, second = epoch(0, ways[0]), epoch(1, ways[0])
    assert [len(part) for part in first] == [4, 4, 4, 4, 3, 3]
    assert not all(map(torch.equal, first, second))
    for way in ways[1:]:
        assert all(map(torch.equal, epoch(0, way), first))
        assert all(map(torch.equal, epoch(1, way), second))


def test_datasets_that_cannot_be_used_are_refused_in_one_line():
    images, labels = torch.zeros(6, 1, 8, 8), torch.arange(6) % 3

    good = TensorDataset(images, labels)

    def refused(message, train=good, test=good, **options):
        with pytest.raises(InputError, match=message):
            list(of(train, test, **options).train_batches(0))

    refused("the test set must be map-style, with __getitem__ and __len__", test=iter([]))
    refused("the training set holds 1 images, 2 are the least", Pictures(1))
    refused("image . must be a PIL image or a tensor .c, h, w., got .8, 8.", TensorDataset(images[:, 0], labels))
    refused("item . is a Tensor, and no pair", images)
    refused("label 3 must be one of 0 … 2, got 3", [*zip(images, [0, 1, 2, 3, 0, 1], strict=True)])
    refused("label . must be one of 0 … 2, got tensor", TensorDataset(images, labels.float()))
    refused("mean and std must be one number, or .*, got 3 and 1 numbers for images of 1", mean=(0.1, 0.2, 0.3))
    sizes = [(image[:, :side], 0) for image, side in zip(images, [8, 8, 8, 8, 8, 7], strict=True)]
    refused("images must be of one size, got .1, 7, 8. and .1, 8, 8.", sizes, batch_size=6)
    refused("std must be above 0", std=(0.0,))
    refused("cross entropy needs classes=…, their number; criterion=… is another loss", classes=0)


def test_targets_of_another_criterion_stay_what_they_are():
    images, targets = torch.zeros(6, 1, 8, 8), torch.arange(12.0).view(6, 2) - 7
    pairs = TensorDataset(images, targets)
    made = of(pairs, pairs, classes=0, criterion=torch.nn.functional.l1_loss, score=torch.nn.L1Loss())
    assert torch.equal(torch.cat([batch for _, batch in made.test_batches()]), targets)
    assert (made.num_classes, made.task) == (0, {"criterion": "l1_loss", "score": "L1Loss"})
    maps = TensorDataset(images, targets.long().remainder(3))
    assert next(of(maps, maps, score=torch.nn.L1Loss()).test_batches())[1].shape == (4, 2)
    assert of(maps, maps).task == {"criterion": "cross_entropy", "score": "accuracy"}


def test_a_criterion_or_a_score_that_does_not_fit_is_refused_in_one_line():
    net, loss, score = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.functional.mse_loss, torch.nn.MSELoss()
    images = TensorDataset(torch.zeros(6, 1, 8, 8), torch.zeros(6, 1, 8, 8))

    def refused(message, smoothing=0.0, **task):
        with pytest.raises(InputError, match=message):
            check_task(net, of(images, images, classes=0, **task), smoothing)

    good = of(images, images, classes=0, criterion=loss, score=score)
    check_fit(net, good)
    check_task(net, good)
    shapes = r"on outputs \[4, 1, 8, 8\] and targets \[4, 1, 8, 8\]"
    refused(f"criterion 'nll_loss' fails {shapes}: ", criterion=torch.nn.functional.nll_loss, score=score)
    refused(f"score 'accuracy' fails {shapes}: logits", criterion=loss)
    refused("criterion 'sub' must return a tensor of one number", criterion=torch.sub, score=score)
    refused("score '<lambda>' is not a number", criterion=loss, score=lambda *_: float("nan"))
    refused("label_smoothing must be 0 with a criterion of the data's own", 0.1, criterion=loss, score=score)
