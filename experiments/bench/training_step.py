"""What does a whole training step of the main job cost with CSGD, beside the same step with torch's SGD?

    python experiments/bench/training_step.py

VGG-16 on the digits at 5/8: passes through the network, optimizer, gradients to none.  The two take turns on copies of
one network; the ratio is the median within turns.
"""

import copy

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary
from optimizer_step import contender

import csgd
from csgd.data import digits
from csgd.models import vgg16
from csgd.train import criterion


def main() -> None:
    given = arguments(__doc__)
    data = digits(image_size=32, batch_size=32, shift=2, seed=0, device=given.device)
    images, labels = next(iter(data.train_batches(0)))
    torch.manual_seed(0)
    model = vgg16(10, 32).to(given.device, memory_format=torch.channels_last).train()
    spaces = csgd.find_spaces(model, data.example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
    rows, numbers = [], []
    for threads in given.threads:
        torch.set_num_threads(threads)
        steps = {}
        for kind in ("SGD", "CSGD"):
            twin = copy.deepcopy(model)
            optimizer = contender(kind, twin, spaces, clusters)

            def step(twin=twin, optimizer=optimizer):
                criterion(twin(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            steps[kind] = step
        seconds = in_turns(steps, 10 if given.quick else 60, warmup=3)
        for kind, times in seconds.items():
            relative = ratio(times, seconds["SGD"])
            rows.append((threads, kind, milliseconds(times), f"{relative:.3f}"))
            numbers.append({"threads": threads, "contender": kind, "seconds": summary(times), "to_sgd": relative})
    leave("training_step", given, ("threads", "", "ms (quartiles)", "to SGD"), rows, numbers)


if __name__ == "__main__":
    main()
