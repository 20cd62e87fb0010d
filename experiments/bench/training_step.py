"""What does a training step cost with CSGD, beside the same step with torch's SGD?

    python experiments/bench/training_step.py

Filters at 5/8 of their number.  Passes through the network, optimizer, gradients to none; "optimizer" is its part of
these steps, with caches and allocator as the passes leave them.  The two take turns on copies of one network; ratios
are medians within turns.
"""

import copy
import time
from functools import partial

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary, synchronise
from optimizer_step import contender

import csgd
from csgd.models import resnet50, vgg16
from csgd.train import criterion

NETWORKS = {
    "VGG-16, the main job": (lambda: vgg16(10, 32), 32, 32),
    "ResNet-50": (lambda: resnet50(1000), 64, 16),
}


def step(model, optimizer, images: torch.Tensor, labels: torch.Tensor, seconds: list[float]) -> None:
    """A step of training; adds what the optimizer took of it to `seconds`."""
    criterion(model(images), labels).backward()
    synchronise()
    started = time.perf_counter()
    optimizer.step()
    synchronise()
    seconds.append(time.perf_counter() - started)
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    given = arguments(__doc__)
    rows, numbers = [], []
    for network, (make, size, batch) in list(NETWORKS.items())[: 1 if given.quick else None]:
        torch.manual_seed(0)
        model = make().to(given.device, memory_format=torch.channels_last).train()
        images = torch.randn(batch, 3, size, size, device=given.device).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=given.device) % 10
        spaces = csgd.find_spaces(model, images[:2], trial=False)
        clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
        for threads in given.threads:
            torch.set_num_threads(threads)
            steps, inside = {}, {"SGD": [], "CSGD": []}
            for kind in inside:
                twin = copy.deepcopy(model)
                optimizer = contender(kind, twin, spaces, clusters)

                steps[kind] = partial(step, twin, optimizer, images, labels, inside[kind])
            turns = 10 if given.quick else 40
            seconds = in_turns(steps, turns, warmup=3)
            for kind, whole in seconds.items():
                part, of_sgd = inside[kind][-turns:], inside["SGD"][-turns:]
                relative, of_part = ratio(whole, seconds["SGD"]), ratio(part, of_sgd)
                rows.append(
                    (network, threads, kind, milliseconds(whole), f"{relative:.3f}", milliseconds(part),
                     f"{of_part:.2f}")
                )  # fmt: skip
                numbers.append(
                    {"network": network, "threads": threads, "contender": kind, "seconds": summary(whole),
                     "to_sgd": relative, "optimizer": summary(part), "optimizer_to_sgd": of_part}
                )  # fmt: skip
    header = ("network", "threads", "", "step, ms (quartiles)", "to SGD", "optimizer, ms", "to SGD")
    leave("training_step", given, header, rows, numbers)


if __name__ == "__main__":
    main()
