"""What should filters be clustered by, if they are merged in one stroke?  Accuracy right after the cut.

    OMP_NUM_THREADS=1 python experiments/study_one_shot.py run       adds what is missing to study_one_shot.jsonl
    OMP_NUM_THREADS=1 python experiments/study_one_shot.py report    the table

ResNet-20 on Fashion-MNIST (60,000 images, 14×14), trained for three epochs, AdamW at 0.003, cosine.  Every space is
merged to a fraction of its width without any training behind it: by k-means on the kernels of the first producer, on
those of all producers, or on what channels put out on 2,048 training images.
"""

import argparse
import copy
import json
import subprocess
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import mean

import sklearn
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd.data import Data, fashion_mnist
from csgd.models import resnet20
from csgd.train import accuracy, predict

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS, FRACTIONS, EPOCHS = range(3), (0.875, 0.75, 0.625), 3
OF = {"pacesetter": "kernels of the first producer", "producers": "kernels of all", "outputs": "outputs"}


def images(seed: int) -> Data:
    how = dict(batch_size=128, seed=seed, device=torch.device("cpu"))
    return fashion_mnist(root="data", download=False, image_size=14, train_size=None, shift=1, flip=True, **how)


def base(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = resnet20(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * data.steps_per_epoch)
    for epoch in range(EPOCHS):
        for batch, labels in data.train_batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
            schedule.step()
    return model


def judged(model: nn.Module, data: Data) -> float:
    outputs, labels = predict(model, data)
    return accuracy(outputs, labels)


def run() -> None:
    done = {row["seed"] for row in rows()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for seed in (seed for seed in SEEDS if seed not in done):
        data = images(seed)
        model = base(data, seed)
        spaces = csgd.find_spaces(model, data.example)
        batches = [batch for batch, _ in islice(data.train_batches(0), 16)]
        row = {"seed": seed, "base": judged(model, data), "commit": commit, "after": []}
        for fraction in FRACTIONS:
            for of in OF:
                started, narrow = time.perf_counter(), copy.deepcopy(model)
                widths = csgd.target_widths(spaces, fraction)
                clusters = csgd.cluster(model, spaces, widths, of=of, data=batches, seed=seed)
                seconds = time.perf_counter() - started
                csgd.merge_equal(narrow, spaces, clusters)
                csgd.trim(narrow, spaces, clusters)
                after = {"fraction": fraction, "of": of, "accuracy": judged(narrow, data), "seconds": round(seconds, 2)}
                row["after"].append(after)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row | {"torch": torch.__version__, "sklearn": sklearn.__version__}) + "\n")
        print(row)


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> str:
    found, bases = defaultdict(list), [row["base"] for row in rows()]
    for row in rows():
        for cut in row["after"]:
            found[cut["of"], cut["fraction"]].append(cut["accuracy"])
    lines = [f"| clustered by | {' | '.join(f'{f:g} of the widths' for f in FRACTIONS)} |", "|---|" + "---:|" * 3]
    for of, name in OF.items():
        cells = [found[of, fraction] for fraction in FRACTIONS]
        lines.append(f"| {name} | {' | '.join(f'{mean(c):.3f} ({min(c):.3f} … {max(c):.3f})' for c in cells)} |")
    return "\n".join([*lines, f"\nMean (least … most) of {len(bases)} seeds; the networks before: {mean(bases):.3f}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    run() if parser.parse_args().what == "run" else print(report())
