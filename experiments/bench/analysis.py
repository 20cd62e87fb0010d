"""How long does it take to find what moves together in a network and to prove a cut, beside Torch-Pruning?

    pip install torch-pruning && python experiments/bench/analysis.py --before ../checkout-of-an-older-commit

"spaces" traces, "with trial" also cuts a random float64 copy, "prove" is the proof of one clustering; Torch-Pruning
builds its dependency graph, and proves nothing.  An older commit is measured in its own process, in the same turns.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary
from torchvision import models

import csgd
from csgd.trial import random_clusters

NETWORKS = {  # name: image size
    "resnet18": 64,
    "mobilenet_v2": 64,
    "vgg16_bn": 64,
    "resnet50": 224,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
}
OLDER = """
import sys, torch, csgd
from torchvision import models
torch.set_num_threads(int(sys.argv[1]))
built = {}
for line in sys.stdin:
    network, size, trial = line.split()
    if network not in built:
        built = {network: (models.get_model(network, weights=None), torch.randn(2, 3, int(size), int(size)))}
    csgd.find_spaces(*built[network], trial=trial == "True")
    print("done", flush=True)
"""


class Older:
    """An older commit of this project at work in a process of its own; its network is built in the warm-up."""

    def __init__(self, folder: Path, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OLDER, str(threads)],
            env=os.environ | {"PYTHONPATH": str(folder.resolve())}, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def find_spaces(self, network: str, size: int, trial: bool) -> None:
        self.process.stdin.write(f"{network} {size} {trial}\n")
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError(f"the older commit failed on {network}")


def dependency_graph(torch_pruning, model: torch.nn.Module, example: torch.Tensor):
    return torch_pruning.DependencyGraph().build_dependency(model, example[:1])


def main() -> None:
    given = arguments(__doc__, before="a checkout of an older commit, to be measured in the same turns")
    threads = max(given.threads)
    torch.set_num_threads(threads)
    try:
        import torch_pruning
    except ImportError:
        torch_pruning = None
        print("Torch-Pruning is not installed: pip install torch-pruning")
    older = Older(given.before, threads) if given.before else None
    rows, numbers = [], []
    for network, size in list(NETWORKS.items())[: 3 if given.quick else None]:
        model, example = models.get_model(network, weights=None), torch.randn(2, 3, size, size)
        spaces = csgd.find_spaces(model, example, trial=False)
        clusters = random_clusters(spaces)
        contenders = {
            "spaces": partial(csgd.find_spaces, model, example, trial=False),
            "with trial": partial(csgd.find_spaces, model, example),
            "prove": partial(csgd.prove, model, spaces, clusters, example),
        }
        if torch_pruning:
            contenders["Torch-Pruning"] = partial(dependency_graph, torch_pruning, model, example)
        if older:
            contenders["spaces, before"] = partial(older.find_spaces, network, size, False)
            contenders["with trial, before"] = partial(older.find_spaces, network, size, True)
        seconds = in_turns(contenders, 3 if given.quick else 5, warmup=1)
        for name in contenders:
            relative = ratio(seconds[name], seconds["spaces"])
            rows.append((f"{network} at {size}", name, milliseconds(seconds[name]), f"{relative:.2f}"))
            numbers.append(
                {"network": network, "size": size, "threads": threads, "contender": name}
                | {"seconds": summary(seconds[name]), "to_spaces": relative}
            )  # fmt: skip
    leave("analysis", given, ("network", "", "ms (quartiles)", "to spaces"), rows, numbers)


if __name__ == "__main__":
    main()
