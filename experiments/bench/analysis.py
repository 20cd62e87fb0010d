"""How long does it take to find what moves together in a network, beside Torch-Pruning's dependency graph?

    pip install torch-pruning && python experiments/bench/analysis.py

"spaces" traces, "with trial" also cuts a random float64 copy and proves the cut; Torch-Pruning builds its graph, and
proves nothing.
"""

from functools import partial

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary
from torchvision import models

import csgd

NETWORKS = ("resnet18", "mobilenet_v2", "vgg16_bn", "resnet50", "densenet121", "efficientnet_b0", "convnext_tiny")


def dependency_graph(torch_pruning, model: torch.nn.Module, example: torch.Tensor):
    return torch_pruning.DependencyGraph().build_dependency(model, example[:1])


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(max(given.threads))
    try:
        import torch_pruning
    except ImportError:
        torch_pruning = None
        print("Torch-Pruning is not installed: pip install torch-pruning")
    rows, numbers, example = [], [], torch.randn(2, 3, 64, 64)
    for network in NETWORKS[: 3 if given.quick else None]:
        model = models.get_model(network, weights=None)
        contenders = {
            "spaces": partial(csgd.find_spaces, model, example, trial=False),
            "with trial": partial(csgd.find_spaces, model, example),
        }
        if torch_pruning:
            contenders["Torch-Pruning"] = partial(dependency_graph, torch_pruning, model, example)
        seconds = in_turns(contenders, 3 if given.quick else 7, warmup=1)
        for name in contenders:
            relative = ratio(seconds[name], seconds["spaces"])
            rows.append((network, name, milliseconds(seconds[name]), f"{relative:.2f}"))
            numbers.append(
                {"network": network, "contender": name, "seconds": summary(seconds[name]), "to_spaces": relative}
            )
    leave("analysis", given, ("network", "", "ms (quartiles)", "to spaces"), rows, numbers)


if __name__ == "__main__":
    main()
