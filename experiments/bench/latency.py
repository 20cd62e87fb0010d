"""How much faster is the pruned network, beside what its multiply-accumulates promise?

    python experiments/bench/latency.py

Forward passes in eval mode; dense and pruned take turns.  round_to=8 keeps widths that the kernels of a CPU or GPU
like.
"""

import copy
from functools import partial

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary

import csgd
from csgd.models import resnet56, vgg16
from csgd.verify import count_macs

NETWORKS = {"VGG-16": lambda: vgg16(10, 32), "ResNet-56": lambda: resnet56(10)}
FRACTIONS = {"13/16": 13 / 16, "3/4": 3 / 4, "5/8": 5 / 8, "1/2": 1 / 2}


def main() -> None:
    given = arguments(__doc__)
    rows, numbers, example = [], [], torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for network, make in list(NETWORKS.items())[: 1 if given.quick else None]:
        torch.manual_seed(0)
        dense = make().to(memory_format=torch.channels_last).eval()
        spaces = csgd.find_spaces(dense, example)
        networks, macs = {"dense": dense}, {"dense": count_macs(dense, example)}
        for name, fraction in FRACTIONS.items():
            for round_to in (1, 8):
                label = name if round_to == 1 else f"{name}, round_to=8"
                networks[label] = copy.deepcopy(dense)
                widths = csgd.target_widths(spaces, fraction, round_to=round_to)
                clusters = csgd.cluster(dense, spaces, widths, "even")
                csgd.trim(networks[label], spaces, clusters, tolerance=None)
                macs[label] = count_macs(networks[label], example)
        for batch in (1, 32):
            images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            for threads in given.threads:
                torch.set_num_threads(threads)
                contenders = {name: partial(model, images) for name, model in networks.items()}
                with torch.no_grad():
                    seconds = in_turns(contenders, 10 if given.quick else 40)
                for name in networks:
                    faster, fewer = ratio(seconds["dense"], seconds[name]), macs["dense"] / macs[name]
                    rows.append(
                        (network, batch, threads, name, milliseconds(seconds[name]), f"{faster:.2f}", f"{fewer:.2f}")
                    )
                    numbers.append(
                        {"network": network, "batch": batch, "threads": threads, "contender": name,
                         "seconds": summary(seconds[name]), "faster": faster, "macs_ratio": fewer}
                    )  # fmt: skip
    header = ("network", "batch", "threads", "", "ms (quartiles)", "times faster", "times fewer MACs")
    leave("latency", given, header, rows, numbers)


if __name__ == "__main__":
    main()
