"""Can the data keep up with the training step?

    python experiments/bench/loader.py

Images a second of an epoch's batches alone, augmentation included, beside those of the whole training step.
"""

import time

import torch
from common import arguments, leave

from csgd.data import digits
from csgd.models import resnet20, vgg16
from csgd.train import train

BATCH = 32


def main() -> None:
    given = arguments(__doc__)
    data = digits(image_size=32, batch_size=BATCH, shift=2, seed=0, device=torch.device("cpu"))
    rows, numbers = [], []
    for network, make in {"ResNet-20": resnet20, "VGG-16": lambda classes: vgg16(classes, 32)}.items():
        for threads in given.threads:
            torch.set_num_threads(threads)
            model = make(10).to(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
            steps = 5 if given.quick else 45
            (epoch,) = train(
                model, optimizer, data, steps=range(steps), steps_per_epoch=steps, lr_at=lambda step: 0.01, seed=0
            )
            started = time.perf_counter()
            loaded = sum(len(labels) for _, labels in data.train_batches(0))
            alone, step = loaded / (time.perf_counter() - started), BATCH * epoch.steps / epoch.seconds
            rows.append((network, threads, f"{alone:,.0f}", f"{step:,.0f}", f"{step / alone:.2%}"))
            numbers.append({"network": network, "threads": threads, "loader": alone, "step": step})
    header = ("network", "threads", "images/s, loader alone", "images/s, training", "share of the loader")
    leave("loader", given, header, rows, numbers)


if __name__ == "__main__":
    main()
