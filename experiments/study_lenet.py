"""LeNet-300-100 on Fashion-MNIST, cut in one stroke without any training behind it, beside the table of Neuron Merging.

    OMP_NUM_THREADS=1 python experiments/study_lenet.py run       adds what is missing to study_lenet.jsonl
    OMP_NUM_THREADS=1 python experiments/study_lenet.py report    the table

Kim et al., NeurIPS 2020, publish 88.69, 86.92, 82.75 and 80.02 % with 50, 60, 70 and 80 % of the neurons of both hidden
layers removed, of one network of 89.80 % (its best epoch on the test set), by the L1 norm of a neuron's weights and
bias; what is removed is added to the most similar neuron that stays, times the quotient of their norms, where their
cosine is 0.45 or more.  Our networks are others, of the last epoch; so theirs is repeated on them.
"""

import argparse
import copy
import json
import subprocess
import time
from itertools import islice
from pathlib import Path
from statistics import mean

import sklearn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csgd
from csgd.data import Data, fashion_mnist
from csgd.models import lenet300
from csgd.train import accuracy, predict

RESULTS = Path(__file__).with_suffix(".jsonl")
COMMAND = "OMP_NUM_THREADS=1 python experiments/study_lenet.py run"
SEEDS, REMOVED = range(5), (0.5, 0.6, 0.7, 0.8)
EPOCHS, LR, FALLS, WEIGHT_DECAY = 20, 0.1, (10, 16), 5e-4
SIMILAR = 0.45
PUBLISHED = {"deleted": (88.40, 85.17, 71.26, 66.76), "neuron merging": (88.69, 86.92, 82.75, 80.02)}
NAMES = {
    "deleted": "deleted by L1",
    "neuron merging": "Neuron Merging, repeated",
    "kernels": "ours, clusters of kernels",
    "outputs": "ours, clusters of outputs",
}


def images(seed: int) -> Data:
    how = dict(batch_size=128, seed=seed, device=torch.device("cpu"))
    return fashion_mnist(root="data", download=False, image_size=28, train_size=None, shift=0, flip=False, **how)


def base(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = lenet300(num_classes=10, image_size=28)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, FALLS)
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


def most(layer: nn.Linear, width: int) -> Tensor:
    """The neurons whose weights and bias have the largest L1 norm."""
    return with_bias(layer).abs().sum(1).topk(width).indices.sort().values


def with_bias(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], 1)


@torch.no_grad()
def neuron_merging(model: nn.Module, widths: dict[str, int]) -> None:
    """Section 3 of Kim et al. for linear layers, in place; neurons are compared as they were before any cut."""
    layers = [model.fc1, model.fc2, model.fc3]
    rows = [with_bias(layer) for layer in layers[:2]]
    for layer, reader, of, width in zip(layers, layers[1:], rows, widths.values(), strict=False):
        kept, scales = most(layer, width), torch.zeros(len(of), width)
        alike, nearest = F.cosine_similarity(of[:, None], of[kept][None], dim=2).max(1)
        quotient = of.norm(dim=1) / of[kept][nearest].norm(dim=1)
        scales[torch.arange(len(of)), nearest] = torch.where(alike >= SIMILAR, quotient, 0.0)
        scales[kept] = torch.eye(width)
        layer.weight, layer.bias = nn.Parameter(layer.weight[kept]), nn.Parameter(layer.bias[kept])
        reader.weight = nn.Parameter(reader.weight @ scales)


def narrowed(way: str, model: nn.Module, data: Data, widths: dict[str, int], seed: int) -> nn.Module:
    narrow = copy.deepcopy(model)
    if way == "neuron merging":
        neuron_merging(narrow, widths)
        return narrow
    spaces = csgd.find_spaces(narrow, data.example)
    if way == "deleted":
        csgd.drop(narrow, spaces, {name: most(narrow.get_submodule(name), width) for name, width in widths.items()})
        return narrow
    of = {"kernels": "pacesetter", "outputs": "outputs"}[way]
    batches = [batch for batch, _ in islice(data.train_batches(0), 16)]
    clusters = csgd.cluster(narrow, spaces, widths, of=of, data=batches, seed=seed)
    csgd.merge_equal(narrow, spaces, clusters)
    csgd.trim(narrow, spaces, clusters)
    return narrow


def run() -> None:
    done = {row["seed"] for row in rows()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "sklearn": sklearn.__version__}
    for seed in (seed for seed in SEEDS if seed not in done):
        started, data = time.perf_counter(), images(seed)
        model = base(data, seed)
        row = {"seed": seed, "base": judged(model, data), "after": []}
        for removed in REMOVED:
            widths = {"fc1": round(300 * (1 - removed)), "fc2": round(100 * (1 - removed))}
            for way in NAMES:
                narrow = narrowed(way, model, data, widths, seed)
                row["after"].append({"removed": removed, "way": way, "accuracy": judged(narrow, data)})
        row |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit, "command": COMMAND} | versions
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row)


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> str:
    found = rows()
    lines = [f"| neurons removed | {' | '.join(f'{removed:.0%}' for removed in REMOVED)} |", "|---|" + "---:|" * 4]
    for way, name in NAMES.items():
        cells = []
        for removed in REMOVED:
            of = [c["accuracy"] for row in found for c in row["after"] if (c["removed"], c["way"]) == (removed, way)]
            cells.append(f"{mean(of):.2%} ({min(of):.2%} … {max(of):.2%})".replace("%", ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for way, published in PUBLISHED.items():
        lines.append(f"| published, {way} (one network, 89.80) | {' | '.join(f'{value:.2f}' for value in published)} |")
    bases = [row["base"] for row in found]
    told = f"{mean(bases):.2%} ({min(bases):.2%} … {max(bases):.2%})".replace("%", "")
    return "\n".join([*lines, f"\nTest accuracy in %, mean (least … most) of {len(bases)} seeds; before: {told}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    run() if parser.parse_args().what == "run" else print(report())
