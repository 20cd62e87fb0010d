"""Can the data keep up with the training step?

    python experiments/bench/loader.py

Images a second of an epoch's batches alone, augmentation included, beside those of the training step: digits, which
live on the device, and JPEG files of 500×375 pixels in folders, which as many workers decode as there are threads.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import arguments, leave
from PIL import Image
from torchvision.models import resnet18

from csgd.data import Data, digits, image_folder
from csgd.models import resnet20, vgg16
from csgd.schedule import Timetable
from csgd.train import Learner, Sums, TrainSpec, train

BATCH = 32
FILES = 512


def main() -> None:
    given = arguments(__doc__)
    rows, numbers = [], []
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root))
        for network, make in {"ResNet-20": resnet20, "VGG-16": lambda classes: vgg16(classes, 32)}.items():
            for threads in given.threads:
                torch.set_num_threads(threads)
                data = digits(image_size=32, batch_size=BATCH, shift=2, seed=0, device=torch.device("cpu"))
                add(rows, numbers, "digits", network, threads, make(10), data, 5 if given.quick else 45)
        for threads in given.threads:
            torch.set_num_threads(threads)
            where = dict(root=root, image_size=224, test_fraction=0.1, seed=0, device=torch.device("cpu"))
            data = image_folder(batch_size=BATCH, workers=threads, **where)
            add(rows, numbers, "folders", "ResNet-18", threads, resnet18(num_classes=2), data, 2 if given.quick else 8)
    header = ("data", "network", "threads", "images/s, loader alone", "images/s, training", "share of the loader")
    leave("loader", given, header, rows, numbers)


def add(rows: list, numbers: list, source: str, network: str, threads: int, model, data: Data, steps: int) -> None:
    started = time.perf_counter()
    loaded = sum(len(labels) for _, labels in data.train_batches(0))
    alone = loaded / (time.perf_counter() - started)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    sums, timetable = Sums(), Timetable(steps, [0.01] * steps)
    for _ in train(Learner.of(model, optimizer), data, timetable, TrainSpec(seed=0), range(steps), sums):
        pass
    step = BATCH / sums.seconds_per_step
    rows.append((source, network, threads, f"{alone:,.0f}", f"{step:,.0f}", f"{step / alone:.2%}"))
    numbers.append({"data": source, "network": network, "threads": threads, "loader": alone, "step": step})


def write_images(root: Path) -> None:
    """Smooth random pictures of two classes, in files as large as those of ImageNet."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 255, (25, 33, 3), dtype=np.uint8))
        path = root / ("a", "b")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


if __name__ == "__main__":
    main()
