"""What does k-means cost for a whole network, beside a plain loop over scikit-learn's, and how good is it?

    python experiments/bench/clusters.py

"inertia" is the sum of squared distances of all filters to their cluster's mean, relative to the plain loop's with the
same seed: the largest of any layer and seed.  "seeds" is the largest relative spread of a layer's inertia over seeds.
"""

import time
from itertools import chain

import torch
from common import arguments, leave, milliseconds, ratio, summary
from sklearn.cluster import KMeans

import csgd
from csgd.clusters import filters
from csgd.models import resnet50, vgg16

NETWORKS = {"VGG-16": lambda: vgg16(10, 32), "ResNet-50": lambda: resnet50(1000)}


def plain(rows: dict[str, torch.Tensor], widths: dict[str, int], seed: int) -> dict[str, list[list[int]]]:
    found = {}
    for name, width in widths.items():
        labels = KMeans(width, n_init=1, random_state=seed).fit(rows[name].numpy()).labels_
        found[name] = [(labels == label).nonzero()[0].tolist() for label in range(width)]
    return found


def inertia(rows: torch.Tensor, parts: list[list[int]]) -> float:
    return sum(float((rows[part] - rows[part].mean(0)).square().sum()) for part in parts)


def main() -> None:
    given = arguments(__doc__)
    rows, numbers = [], []
    for network, make in list(NETWORKS.items())[: 1 if given.quick else None]:
        torch.manual_seed(0)
        model = make()
        spaces = csgd.find_spaces(model, torch.randn(2, 3, 64, 64), trial=False)
        spaces = [space for space in spaces if space.trimmable]
        widths = csgd.target_widths(spaces, 5 / 8)
        kernels = {space.name: filters(model, space) for space in spaces}
        for threads in given.threads:
            torch.set_num_threads(threads)
            seconds, sums = {"csgd": [], "plain": []}, {"csgd": [], "plain": []}
            for seed in range(2 if given.quick else 5):
                for name in seconds:
                    started = time.perf_counter()
                    if name == "csgd":
                        found = csgd.cluster(model, spaces, widths, seed=seed)
                    else:
                        found = plain(kernels, widths, seed)
                    seconds[name].append(time.perf_counter() - started)
                    sums[name].append([inertia(kernels[layer], parts) for layer, parts in found.items()])
            for name in seconds:
                both = zip(chain.from_iterable(sums[name]), chain.from_iterable(sums["plain"]), strict=True)
                worst = max(a / b for a, b in both)
                spread = max(max(layer) / min(layer) - 1 for layer in zip(*sums[name], strict=True))
                faster = ratio(seconds["plain"], seconds[name])
                rows.append(
                    (network, threads, name, milliseconds(seconds[name]), f"{faster:.1f}", f"{worst:.3f}",
                     f"{spread:.1%}")
                )  # fmt: skip
                numbers.append(
                    {"network": network, "threads": threads, "contender": name, "seconds": summary(seconds[name]),
                     "faster": faster, "inertia": worst, "seeds": spread}
                )  # fmt: skip
    leave("clusters", given, ("network", "threads", "", "ms (quartiles)", "faster", "inertia", "seeds"), rows, numbers)


if __name__ == "__main__":
    main()
