"""Gradients accumulated over micro-batches and clipped: CSGD reads p.grad as it finds it, and leaves it so.

python experiments/examples/accumulate_and_clip.py 300
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import csgd
from csgd.verify import relative_change

ACCUMULATE = 4  # micro-batches a step


def main(steps: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    dataset = TensorDataset(images, torch.tensor(labels))
    sampler = RandomSampler(dataset, replacement=True, num_samples=16 * ACCUMULATE * steps)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )

    spaces = csgd.find_spaces(model, images[:2])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 2))
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=8.0, vector_ratio=1.0)
    optimizer = csgd.CSGD(groups, lr=0.05)

    for number, (batch, target) in enumerate(DataLoader(dataset, batch_size=16, sampler=sampler), 1):
        loss = nn.functional.cross_entropy(model(batch), target) / ACCUMULATE
        loss.backward()
        if number % ACCUMULATE == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"relative deviation {csgd.relative_deviation(model, spaces, clusters):.1e} after {steps} steps")

    with torch.no_grad():
        before = model(images)
        csgd.trim(model, spaces, clusters)
        change = float(relative_change(before, model(images)).max())
    print(f"{model[0]}, {model[2]}: the logits changed by at most {change:.1e} of an image's spread")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
