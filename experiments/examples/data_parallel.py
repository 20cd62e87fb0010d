"""Data parallel, with a moving average of the weights: both go through the cut, and the loop goes on.

torchrun --nproc-per-node=2 experiments/examples/data_parallel.py 200
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import csgd
from csgd.verify import relative_change


def train(wrapped, optimizer, average, images, labels, steps):
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))  # each rank draws its own
        nn.functional.cross_entropy(wrapped(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(wrapped)


def main(steps: int) -> float:
    dist.init_process_group("gloo")
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)  # the same network on every rank; rank 0's clusters are the ones that count
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.Flatten(), nn.Linear(128, 10))
    # [start]
    spaces = csgd.find_spaces(model, images[:2])
    found = [csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 2))]
    dist.broadcast_object_list(found)
    (clusters,) = found
    optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=8.0, vector_ratio=1.0), lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))

    torch.manual_seed(dist.get_rank())
    train(DistributedDataParallel(model), optimizer, average, images, labels, steps)
    with torch.no_grad():
        before = model(images)
        csgd.trim(model, spaces, clusters, optimizer)
        change = float(relative_change(before, model(images)).max())
    csgd.merge_equal(average.module, spaces, clusters)  # its members lag behind those of the model
    csgd.trim(average.module, spaces, clusters)
    train(DistributedDataParallel(model), optimizer, average, images, labels, steps)
    # [end]

    hits = (average(images).argmax(1) == labels).double().mean()
    print(f"rank {dist.get_rank()}: changed by {change:.1e}, the average hits {hits:.1%} of the digits")
    dist.destroy_process_group()
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200)
