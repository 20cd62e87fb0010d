"""Data: batches of (images, targets) as pure functions of (seed, epoch), so that a run can be repeated from any epoch.

Small datasets live on the device as tensors and are augmented there, batch by batch; image folders come through
workers.  Of several ranks each makes its own share of every batch, and together they make the batches that one would.
"""

import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from csgd import folders
from csgd.errors import InputError
from csgd.ranks import Share

Batches = Iterator[tuple[Tensor, Tensor]]
Criterion = Callable[[Any, Tensor], Tensor]
Score = Callable[[Any, Tensor], float]
WHOLE = Share()


@dataclass(frozen=True)
class Data:
    """A dataset with its split, as one rank sees it, and what a network is to learn of it.

    train_batches(epoch)  shuffled and augmented, the order and the augmentation fixed by (seed, epoch)
    test_batches()        the whole test set, in order
    example               [2, 3, h, w] images to trace a network with
    num_classes           outputs of the network; 0 where there are no classes
    criterion             (outputs, targets) of a batch → its mean loss; None: cross entropy
    score                 (outputs, targets) of the whole test set → a number, the larger the better; None: the fraction
                          of labels that the largest logit hits
    class_names           in the order of the labels, where they are known
    mean, std             of each channel, where they are known: the network sees (image − mean) / std
    held_out(fraction)    the same data, with that part of the training set in the place of the test set, and trained
                          on the rest; None where it cannot be told
    """

    train_batches: Callable[[int], Batches]
    test_batches: Callable[[], Batches]
    example: Tensor
    num_classes: int
    steps_per_epoch: int
    train_size: int
    test_size: int
    criterion: Criterion | None = None
    score: Score | None = None
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    held_out: "Callable[[float], Data] | None" = None

    @property
    def task(self) -> dict[str, str]:
        """The names of its criterion and its score, as plain JSON."""
        return {"criterion": _name(self.criterion, "cross_entropy"), "score": _name(self.score, "accuracy")}

    @classmethod
    def of(
        cls,
        train: Dataset,
        test: Dataset,
        *,
        classes: int | Sequence[str] = 0,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: Share = WHOLE,
        mean: Sequence[float] | float = 0.0,
        std: Sequence[float] | float = 1.0,
        workers: int = 0,
        criterion: Criterion | None = None,
        score: Score | None = None,
        plain: Dataset | None = None,
    ) -> "Data":
        """Of two map-style datasets of pairs (image, target), read by `workers` processes, or by this one.

        image      a PIL image, taken as RGB between 0 and 1, or a tensor [c, h, w]; all of one size
        target     of cross entropy one of 0 … classes − 1, or a map of them; of another `criterion` what that takes
        classes    their names, or their number
        mean, std  a number for each channel, or one: the network sees (image − mean) / std
        plain      the training images as the test set's are: what is held out of them is judged by these; None: `train`

        What the transforms of `train` draw from torch's generator is fixed by (seed, epoch, position).  InputError for
        datasets that cannot be used so.
        """
        how = dict(classes=classes, batch_size=batch_size, seed=seed, device=device, share=share, mean=mean, std=std)
        how |= dict(workers=workers, criterion=criterion, score=score)

        def held_out(fraction: float) -> Data:
            rest, part = (rows.tolist() for rows in _split(len(train), fraction))
            return cls.of(Subset(train, rest), Subset(train if plain is None else plain, part), **how)

        for name, dataset, least in (("training", train, 2), ("test", test, 1)):
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise InputError(f"dataset: the {name} set must be map-style, with __getitem__ and __len__")
            if len(dataset) < least:
                raise InputError(f"dataset: the {name} set holds {len(dataset)} images, {least} are the least")
        mean, std = _per_channel(mean), _per_channel(std)
        names, classes = ((), classes) if isinstance(classes, int) else (tuple(classes), len(classes))
        if criterion is None and classes < 1:
            raise InputError("dataset: cross entropy needs classes=…, their number; criterion=… is another loss")
        if not (std > 0).all():
            raise InputError(f"dataset: std must be above 0, got {std.flatten().tolist()}")
        labels = classes if criterion is None else None
        trained_on, tested_on = (Normalised(part, labels, mean, std) for part in (train, test))
        loading = dict(
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_one_thread,
            collate_fn=_batch_of,
            generator=torch.Generator(),  # of seeds for the workers, which draw from their own: torch's stays untouched
        )
        shares = Shares(len(train), batch_size, share, seed)
        train_loader = DataLoader(Drawn(trained_on, seed), batch_sampler=shares, **loading)
        test_loader = DataLoader(tested_on, batch_sampler=Shares(len(test), batch_size, share), **loading)

        def train_batches(epoch: int) -> Batches:
            shares.epoch = epoch
            yield from on_device(train_loader)

        def test_batches() -> Batches:
            yield from on_device(test_loader)

        def on_device(batches: Iterable) -> Batches:
            for batch in batches:
                if isinstance(batch, InputError):
                    raise batch
                images, targets = batch
                yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)

        ((example, _),) = on_device([_batch_of([tested_on[i % len(test)] for i in range(2)])])
        sizes = len(train_loader), len(train), len(test)
        told = names, *(tuple(values.flatten().tolist()) for values in (mean, std))
        return cls(train_batches, test_batches, example, classes, *sizes, criterion, score, *told, held_out)

    def of_classes(self, names: Sequence[str]) -> "Data":
        """The same test set with labels of a network of the classes `names`; InputError for a class that it lacks."""
        if not names or not self.class_names or tuple(names) == self.class_names:
            return self
        if lacking := sorted(set(self.class_names) - set(names)):
            told = f"{folders.listed(lacking)}; it knows {folders.listed(names)}"
            raise InputError(f"dataset: the network was not trained on the classes {told}")
        number = torch.tensor([list(names).index(name) for name in self.class_names])

        def test_batches() -> Batches:
            for images, labels in self.test_batches():
                yield images, number.to(labels.device)[labels]

        return replace(self, test_batches=test_batches, num_classes=len(names), class_names=tuple(names))


@dataclass(frozen=True)
class Augmentation:
    """Random shifts by up to `shift` pixels (zeros come in), and a horizontal flip for half of the images."""

    shift: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.shift < 0:
            raise InputError(f"dataset.shift must be 0 pixels or more, got {self.shift}")

    def __call__(
        self, images: Tensor, generator: torch.Generator, share: Share = WHOLE, of: int | None = None
    ) -> Tensor:
        """images [n, c, h, w], a share of a batch of `of` → the same shape."""
        n, _, height, width = images.shape
        device, of = images.device, of or n
        if self.shift:
            drawn = torch.randint(0, 2 * self.shift + 1, (2, of), generator=generator)
            down, right = (share.of(offsets).to(device) for offsets in drawn)
            padded = F.pad(images, [self.shift] * 4)
            rows = down[:, None] + torch.arange(height, device=device)
            columns = right[:, None] + torch.arange(width, device=device)
            which = torch.arange(n, device=device)[:, None, None]
            images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            flipped = share.of(torch.rand(of, generator=generator) < 0.5).to(device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return images


def _split(size: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Positions of a training set that are left, and those of the `fraction` that is held out, one at least: drawn the
    same way for every seed, each in ascending order."""
    count = min(max(1, round(fraction * size)), size - 1)
    order = torch.randperm(size, generator=_generator(0, 0))
    return order[count:].sort().values, order[:count].sort().values


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _in_memory(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    device: torch.device,
    share: Share,
    names: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Data:
    """Normalised float images [n, 3, h, w] and labels [n], kept on the device."""
    how = dict(num_classes=num_classes, batch_size=batch_size, augmentation=augmentation, seed=seed, device=device)
    how |= dict(share=share, names=names, mean=mean, std=std)
    images, labels = (t.to(device) for t in train)
    test_images, test_labels = (t.to(device) for t in test)
    if device.type == "cpu":  # the layout in which convs run fastest on a CPU
        images, test_images = (t.contiguous(memory_format=torch.channels_last) for t in (images, test_images))

    def train_batches(epoch: int) -> Batches:
        generator = _generator(seed, epoch)
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            own = share.of(rows).to(device)
            yield augmentation(images[own], generator, share, len(rows)), labels[own]

    def test_batches() -> Batches:
        for images, labels in zip(test_images.split(256), test_labels.split(256), strict=True):
            yield share.of(images), share.of(labels)

    def held_out(fraction: float) -> Data:
        parts = ((images[rows], labels[rows]) for rows in _split(len(images), fraction))
        return _in_memory(*parts, **how)

    steps = -(-len(images) // batch_size)
    sizes = steps, len(images), len(test_images)
    told = dict(class_names=tuple(names), mean=tuple(mean), std=tuple(std), held_out=held_out)
    return Data(train_batches, test_batches, images[:2].clone(), num_classes, *sizes, **told)


def digits(
    *, image_size: int, batch_size: int, shift: int, seed: int, device: torch.device, share: Share = WHOLE
) -> Data:
    """scikit-learn's 1,797 real handwritten digits (8×8), up-sampled; one fifth, stratified, is the test set.

    The split is the same for every seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    mean, std = images[train].mean(), images[train].std()
    images = ((images - mean) / std).expand(-1, 3, -1, -1)
    return _in_memory(
        (images[train], labels[train]),
        (images[test], labels[test]),
        num_classes=10,
        batch_size=batch_size,
        augmentation=Augmentation(shift=shift),
        seed=seed,
        device=device,
        share=share,
        names=[str(name) for name in bunch.target_names],
        mean=[mean.item()] * 3,
        std=[std.item()] * 3,
    )


def synthetic(
    *,
    num_classes: int,
    image_size: int,
    train_size: int,
    test_size: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
) -> Data:
    """Smooth random patterns, one per class, under as much noise: for timing and for tests, the same for every seed."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(num_classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(image_size, image_size), mode="bilinear", align_corners=False)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % num_classes
        return patterns[labels] + torch.randn(n, 3, image_size, image_size, generator=generator), labels

    return _in_memory(
        draw(train_size),
        draw(test_size),
        num_classes=num_classes,
        batch_size=batch_size,
        augmentation=Augmentation(),
        seed=seed,
        device=device,
        share=share,
    )


def _of_torchvision(dataset: Callable, name: str, root: str, train: bool, download: bool) -> Dataset:
    """One part of a dataset of torchvision, fetched into root where it is not there and `download` says so.

    InputError if it is not there, or could not be fetched.
    """
    try:
        try:
            return dataset(root, train=train)
        except RuntimeError:
            if not download:
                raise
            Path(root).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(root) / ".lock"):  # of ranks, and of jobs side by side
                return dataset(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        advice = "could not be downloaded" if download else "is not there; dataset.download=true fetches it"
        raise InputError(f"dataset.root: {name} in '{root}' {advice} ({error})") from None


CIFAR_STATISTICS = {  # per-channel mean and standard deviation of the training images
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(
    *,
    classes: int,
    root: str,
    download: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
) -> Data:
    """CIFAR-10 or CIFAR-100 through torchvision; shifts by up to 4 pixels and flips, as in the paper."""
    from torchvision import datasets

    if classes not in CIFAR_STATISTICS:
        raise InputError(f"dataset.classes must be 10 or 100, got {classes!r}")
    dataset = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in CIFAR_STATISTICS[classes])

    def split(train: bool) -> tuple[Tensor, Tensor, list[str]]:
        part = _of_torchvision(dataset, f"CIFAR-{classes}", root, train, download)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255
        return (images - mean) / std, torch.tensor(part.targets), part.classes

    *train, names = split(True)
    return _in_memory(
        train,
        split(False)[:2],
        num_classes=classes,
        batch_size=batch_size,
        augmentation=Augmentation(shift=4, flip=True),
        seed=seed,
        device=device,
        share=share,
        names=names,
        mean=CIFAR_STATISTICS[classes][0],
        std=CIFAR_STATISTICS[classes][1],
    )


FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_STATISTICS = 0.2860, 0.3530  # mean and standard deviation of the training images
FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def fashion_mnist(
    *,
    root: str,
    download: bool,
    image_size: int,
    train_size: int | None,
    shift: int,
    flip: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
) -> Data:
    """Fashion-MNIST, 60,000 and 10,000 grey images (28×28) of ten kinds of clothes.

    Through torchvision, or else from the files of Debian's package dataset-fashion-mnist.  image_size below 28 takes
    means of areas; train_size only so many of the training images, as many of each class, the same for every seed.
    InputError where there are no files.
    """

    def split(train: bool) -> tuple[Tensor, Tensor]:
        images, labels = _fashion_images(root, train, download)
        images = images.unsqueeze(1).float() / 255
        if image_size != 28:
            how = {"mode": "area"} if image_size < 28 else {"mode": "bilinear", "align_corners": False}
            images = F.interpolate(images, size=(image_size, image_size), **how)
        return ((images - FASHION_STATISTICS[0]) / FASHION_STATISTICS[1]).expand(-1, 3, -1, -1), labels.long()

    images, labels = split(True)
    if train_size is not None:
        if type(train_size) is not int or not 0 < train_size <= len(labels):
            raise InputError(f"dataset.train_size must lie between 1 and {len(labels)}, or be null, got {train_size!r}")
        rows = _of_each_class(labels, train_size)
        images, labels = images[rows], labels[rows]
    return _in_memory(
        (images, labels),
        split(False),
        num_classes=10,
        batch_size=batch_size,
        augmentation=Augmentation(shift=shift, flip=flip),
        seed=seed,
        device=device,
        share=share,
        names=FASHION_CLASSES,
        mean=[FASHION_STATISTICS[0]] * 3,
        std=[FASHION_STATISTICS[1]] * 3,
    )


def _fashion_images(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Images [n, 28, 28] and labels [n] of one part, in bytes."""
    from torchvision.datasets import FashionMNIST

    try:
        part = _of_torchvision(FashionMNIST, "Fashion-MNIST", root, train, download)
        return part.data, part.targets
    except InputError as error:
        if not FASHION_PACKAGE.is_dir():
            raise InputError(f"{error}; Debian's package dataset-fashion-mnist has it too") from None
    name = FASHION_PACKAGE / ("train" if train else "t10k")
    images, labels = (
        np.frombuffer(bytearray(gzip.decompress(Path(f"{name}-{kind}-ubyte.gz").read_bytes())), np.uint8, offset=header)
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return torch.from_numpy(images).view(-1, 28, 28), torch.from_numpy(labels)


def _of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions of `count` labels, as many of each class as can be, drawn the same way for every seed."""
    order = torch.randperm(len(labels), generator=_generator(0, 0))
    nth = torch.empty_like(order)  # how many of its class came before
    for name in labels.unique():
        of_class = order[labels[order] == name]
        nth[of_class] = torch.arange(len(of_class))
    return order[nth[order].argsort(stable=True)][:count]


IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    *,
    root: str,
    image_size: int,
    batch_size: int,
    workers: int,
    test_fraction: float,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
) -> Data:
    """Images in one folder per class, below root/train and root/val, or with a part of each class held back.

    Random resized crops and flips; for the test a resize to 8/7 of the size and a centre crop.  Every file is looked
    at first: InputError names those that cannot be used.
    """
    from torchvision.transforms import v2

    classes, trained_on, held_back = folders.labelled(Path(root), test_fraction)
    if len(trained_on) < 2:
        raise InputError(f"dataset.root: '{root}' holds {len(trained_on)} training images, 2 are the least")
    folders.check_images([path for path, _ in trained_on + held_back], share)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    augmented = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *finish])
    centred = v2.Compose([v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size), *finish])
    return Data.of(
        folders.Images(trained_on, augmented),
        folders.Images(held_back, centred),
        classes=classes,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        device=device,
        share=share,
        mean=IMAGENET_STATISTICS[0],
        std=IMAGENET_STATISTICS[1],
        plain=folders.Images(trained_on, centred),
    )


@dataclass(frozen=True)
class Normalised(Dataset):
    """Pairs (image, target) of any dataset of images, the image as a float tensor [c, h, w], less `mean`, by `std`.

    In place of a pair it has the InputError of one that cannot be used.

    classes    how many labels there may be; None: targets are no labels, and stay what they are
    mean, std  [c, 1, 1]
    """

    items: Dataset
    classes: int | None
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor, Any] | InputError:
        item = self.items[position]
        if isinstance(item, InputError):
            return item
        if not isinstance(item, tuple | list) or len(item) != 2:
            return InputError(f"dataset: item {position} is a {type(item).__name__}, and no pair (image, target)")
        image, target = item
        if hasattr(image, "convert"):
            image = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)
        if not isinstance(image, Tensor) or image.dim() != 3:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            return InputError(f"dataset: image {position} must be a PIL image or a tensor [c, h, w], got {found}")
        if {len(self.mean), len(self.std)} - {1, len(image)}:
            told = f"{len(self.mean)} and {len(self.std)} numbers for images of {len(image)} channels"
            return InputError(f"dataset: mean and std must be one number, or one for each channel, got {told}")
        image = image / 255 if image.dtype == torch.uint8 else image.float()
        image = (image - self.mean) / self.std
        if self.classes is None:
            return image, target
        whole = isinstance(target, int | np.integer) or (isinstance(target, Tensor) and not target.is_floating_point())
        if not whole or not 0 <= (label := torch.as_tensor(target).long()).min() <= label.max() < self.classes:
            return InputError(f"dataset: label {position} must be one of 0 … {self.classes - 1}, got {target!r}")
        return image, label


@dataclass
class Shares:
    """A batch sampler: one rank's share of every batch of `size` items, as their positions.

    With a seed it is shuffled anew for every `epoch`, and yields pairs (epoch, position).
    """

    size: int
    batch_size: int
    share: Share
    seed: int | None = None
    epoch: int = 0

    def __iter__(self) -> Iterator[list]:
        if self.seed is None:
            batches = torch.arange(self.size).split(self.batch_size)
        else:
            batches = torch.randperm(self.size, generator=_generator(self.seed, self.epoch)).split(self.batch_size)
        for batch in batches:
            own = self.share.of(batch).tolist()
            if own:
                yield own if self.seed is None else [(self.epoch, position) for position in own]

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)


@dataclass(frozen=True)
class Drawn(Dataset):
    """Items whose transforms draw what (seed, epoch, position) fixes, whichever worker or rank makes them."""

    items: Dataset
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | InputError:
        epoch, position = key
        (drawn,) = np.random.SeedSequence((self.seed, epoch, position)).generate_state(1, np.uint64).tolist()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(drawn)
            return self.items[position]


def _batch_of(items: Sequence[tuple[Tensor, Any] | InputError]) -> tuple[Tensor, Tensor] | InputError:
    """(images [n, c, h, w], targets [n, …]) of items of `Normalised`, or the first InputError.

    It is handed on and not raised, since a worker of a DataLoader would hand on its trace as the message.
    """
    if fault := next((item for item in items if isinstance(item, InputError)), None):
        return fault
    if len(sizes := {tuple(image.shape) for image, _ in items}) > 1:
        told = " and ".join(str(list(size)) for size in sorted(sizes)[:2])
        return InputError(f"dataset: images must be of one size, got {told}; a transform of the dataset can see to it")
    return default_collate(items)


def _name(function: Callable | None, default: str) -> str:
    if function is None:
        return default
    function = getattr(function, "func", function)  # of a partial
    return getattr(function, "__name__", type(function).__name__)


def _per_channel(values: Sequence[float] | float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
