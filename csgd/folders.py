"""Folders of images: which files are images of which class, how they are split, and whether each of them can be read.

What is found here is found before training; hidden files and folders are none of it.
"""

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from csgd import ranks
from csgd.errors import InputError, line_of
from csgd.ranks import Share

log = logging.getLogger("csgd")

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # of 8 bits a number
NO_CLASSES = ("__MACOSX", "@eaDir")  # what archives and file servers leave between the images
TRAINING, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")
WORKERS = 8  # threads that look at images: they wait for the disk
SLICE = 64  # images that a thread looks at in one go
SHOWN = 5  # names in a line

Labelled = list[tuple[str, int]]  # files and the numbers of their classes


def labelled(root: Path, test_fraction: float) -> tuple[list[str], Labelled, Labelled]:
    """The classes below `root`, its training images and its test images.

    They are those of root/train and root/val (or valid, validation, test).  Without the second, `test_fraction` of
    each class of root/train, or else of root itself, is held back.  InputError for folders that tell no classes.
    """
    if not 0 <= test_fraction < 1:
        raise InputError(f"dataset.test_fraction must be at least 0 and below 1, got {test_fraction}")
    if not root.is_dir():
        raise InputError(f"dataset.root '{root}' is not a folder")
    train, test = _part(root, TRAINING), _part(root, TEST)
    if test and not train:
        raise InputError(f"dataset.root: '{test}' holds folders of classes, and '{root / TRAINING[0]}' does not")
    if train and test:
        if train.samefile(test):
            raise InputError(f"dataset.root: '{train}' and '{test}' are one folder; test images must be others")
        (classes, images), (others, held_back) = _classes(train), _classes(test)
        if classes != others:
            raise InputError(
                f"dataset.root: '{train}' and '{test}' do not hold the same classes; "
                f"only in one of them: {listed(sorted(set(classes) ^ set(others)))}"
            )
        log.info("dataset: '%s' is trained on, '%s' tested on", train, test)
    else:
        whole = train or root
        if train and (beside := [path.name for path in _visible(root) if path != train and _images(path)]):
            raise InputError(
                f"dataset.root: '{train}' holds folders of classes, and beside it there are images in "
                f"{listed(beside)}; dataset.root={train} takes it alone"
            )
        classes, found = _classes(whole)
        if all(name.lower() in TRAINING + TEST for name in classes):
            raise InputError(f"dataset.root: {listed(classes)} in '{whole}' hold images, but no folders of classes")
        if test_fraction == 0:
            raise InputError(f"dataset.test_fraction=0 holds nothing back for a test, and there is no '{root}/val'")
        log.info("dataset: %g of each class of '%s' is held back for the test", test_fraction, whole)
        images, held_back = split_by_class(found, test_fraction)
        if alone := [classes[label] for label, count in Counter(label for _, label in found).items() if count == 1]:
            log.warning("dataset: classes of one image, which are trained on and not tested: %s", listed(alone))
    if len(classes) < 2:
        raise InputError(f"dataset.root: '{train or root}' holds one class, {listed(classes)}; 2 are the least")
    if not held_back:
        raise InputError(f"dataset.root: no class in '{root}' has an image to spare for the test")
    told = len(classes), listed(classes), len(images), len(held_back)
    log.info("dataset: %d classes (%s), %d training and %d test images", *told)
    return classes, images, held_back


def split_by_class(files: Labelled, fraction: float) -> tuple[Labelled, Labelled]:
    """A part to train on, and about `fraction` of every class to test on, the same whatever the seed of a run.

    Of a class at least one image is trained on, and of two or more at least one is tested.
    """
    classes: dict[int, Labelled] = {}
    for file in files:
        classes.setdefault(file[1], []).append(file)
    train, test, generator = [], [], torch.Generator().manual_seed(0)
    for members in classes.values():
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        drawn = set(torch.randperm(len(members), generator=generator)[:count].tolist())
        for position, file in enumerate(members):
            (test if position in drawn else train).append(file)
    return train, test


def _part(root: Path, names: Sequence[str]) -> Path | None:
    """The folder of a split, by the first of its `names` that is there; without folders in it, it may be a class."""
    folders = {path.name.lower(): path for path in _visible(root)}
    parts = (folders[name] for name in names if name in folders)
    return next((part for part in parts if _visible(part)), None)


def _classes(root: Path) -> tuple[list[str], Labelled]:
    """The names of the folders in `root`, sorted, and the images of each, at any depth, with its number."""
    folders, files, others = _visible(root), [], Counter()
    others.update("beside the folders" for _ in _images(root, deep=False))
    empty = []
    for label, folder in enumerate(folders):
        own = _images(folder, others)
        files += [(path, label) for path in own]
        if not own:
            empty.append(folder.name)
    if not files:
        raise InputError(f"dataset.root: no folders of images in '{root}'; images are {', '.join(SUFFIXES)}")
    if empty:
        raise InputError(
            f"dataset.root: no images in {len(empty)} of {len(folders)} classes of '{root}': {listed(empty)}; "
            f"images are {', '.join(SUFFIXES)}"
        )
    if others:
        told = listed([f"{count} {kind}" for kind, count in others.most_common()])
        log.warning("dataset: files in '%s' that are left out: %s", root, told)
    return [folder.name for folder in folders], files


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _images(folder: Path, others: Counter | None = None, *, deep: bool = True) -> list[str]:
    """The images in `folder`, sorted; what else lies there is counted in `others`, by its suffix."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        where = os.stat(parent)
        if (where.st_dev, where.st_ino) in seen:  # by a link: an image twice could be trained on and tested
            folders.clear()
            continue
        seen.add((where.st_dev, where.st_ino))
        folders[:] = sorted(name for name in folders if deep and not _is_hidden(name))
        for name in sorted(names):
            if not _is_hidden(name):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES:
                    found.append(os.path.join(parent, name))
                elif others is not None:
                    others[suffix or "without a suffix"] += 1
    return found


def stamp_of(root: Path) -> list[tuple[str, int, int]]:
    """Of each image below `root` its path, its size and the time of its last change, which tell it from another."""
    found = []
    for path in _images(root):
        told = os.stat(path)
        found.append((os.path.relpath(path, root), told.st_size, told.st_mtime_ns))
    return found


def _refuse(error: OSError) -> None:
    raise InputError(f"dataset.root: '{error.filename}' cannot be read: {error.strerror}")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_CLASSES


def listed(names: Sequence[str]) -> str:
    """a, b, c and 12 more"""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass(frozen=True)
class Images(Dataset):
    """Pairs (image, label), the image as `transform` makes it; in place of a pair the InputError of a broken file.

    It is an item and not raised, since a worker of a DataLoader would hand on its trace as the message.
    """

    files: Labelled
    transform: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Any, int] | InputError:
        from PIL import Image

        path, label = self.files[position]
        try:
            with Image.open(path) as image:
                opened = image.convert("RGB")
        except Exception as error:  # as the damage falls
            return InputError(f"dataset.root: '{path}' could be read before training, and now cannot: {line_of(error)}")
        return self.transform(opened), label


def check_images(files: Sequence[str], share: Share) -> None:
    """InputError with the names of those images that cannot be read or would be read wrong; a rank looks at its share.

    Headers are read, and the ends of files, in which a copy that was cut short shows; pixels are decoded only where
    that leaves a doubt.  From memory it is 5,000 to 10,000 JPEGs of 500 × 375 pixels a second on two cores, and 3,000
    PNGs: a few minutes for ImageNet, where decoding each file takes as long as an epoch of loading.
    """
    from PIL import Image

    Image.init()  # of plugins, before there are threads
    started, own = time.perf_counter(), files[share.rank :: share.ranks]
    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as threads:
        warnings.simplefilter("ignore")  # of large images, which are refused below, and of odd metadata
        slices = (own[first : first + SLICE] for first in range(0, len(own), SLICE))
        found = list(threads.map(_faults, slices))
    faults = [fault for of_rank in ranks.gathered(found) for some in of_rank for fault in some]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        told = "; ".join(faults[:SHOWN]) + more
        raise InputError(f"dataset.root: {len(faults)} of {len(files)} images cannot be used: {told}")
    log.info("dataset: %d images looked at in %.1f s", len(files), time.perf_counter() - started)


def _faults(paths: Sequence[str]) -> list[str]:
    return [f"{path!r} {fault}" for path in paths if (fault := _fault(path))]


def _fault(path: str) -> str | None:
    """What keeps an image from being read as it is."""
    from PIL import Image, UnidentifiedImageError

    most = Image.MAX_IMAGE_PIXELS  # twice as many, and PIL raises what says the same
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                return f"is of mode {image.mode}; it must be gray, palette, RGB or CMYK of 8 bits"
            if most and image.width * image.height > most:
                return f"has {image.width * image.height // 10**6} megapixels, {most // 10**6} are the most"
            if image.format == "PNG":
                image.verify()  # its checksums
            elif not _has_end(image):
                image.load()
    except Image.DecompressionBombError:
        return f"has more than {2 * most // 10**6} megapixels, {most // 10**6} are the most"
    except FileNotFoundError:
        return "is a link to nothing"
    except UnidentifiedImageError:
        return "is not an image" if os.path.getsize(path) else "is empty"
    except Exception as error:  # of each format its own
        return f"cannot be read: {line_of(error)}"
    return None


def _has_end(image: Any) -> bool:
    """Whether a JPEG ends as it should, or in zeros behind that; a WebP that was cut short could not be opened."""
    if image.format not in ("JPEG", "MPO"):
        return image.format == "WEBP"
    image.fp.seek(0, os.SEEK_END)
    image.fp.seek(-min(4096, image.fp.tell()), os.SEEK_END)
    return image.fp.read().rstrip(b"\0").endswith(b"\xff\xd9")
