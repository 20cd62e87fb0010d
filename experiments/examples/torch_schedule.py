"""A schedule of torch.optim.lr_scheduler, a forecast from the same learning rates, and training on after the cut.

python experiments/examples/torch_schedule.py 300
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import csgd
from csgd.verify import relative_change

STRENGTH, PEAK = 8.0, 0.05


def main(steps: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    spaces = csgd.find_spaces(model, images[:2])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 4))
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=STRENGTH, vector_ratio=1.0, weight_decay=0.0)
    optimizer = csgd.CSGD(groups, lr=PEAK)  # strength and learning rate are checked against each other here
    scheduler = OneCycleLR(optimizer, PEAK, total_steps=steps, cycle_momentum=False)

    start, rates, change = float(optimizer.deviation()), [], None
    for step in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        part = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[part]), labels[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == steps // 4:
            left, expected = float(optimizer.deviation()) / start, csgd.forecast(rates, STRENGTH)[-1] ** 2
            print(f"step {step}: {left:.4e} of the deviation is left, {expected:.4e} by the forecast")
        if change is None and csgd.relative_deviation(model, spaces, clusters) < 1e-6:
            before = model(images)
            csgd.trim(model, spaces, clusters, optimizer)  # the optimizer, and so the scheduler, go on
            change = float(relative_change(before, model(images)).max())
            print(f"step {step}: cut to {model[0]}; the logits changed by at most {change:.1e} of an image's spread")
    print(f"loss {loss:.3f} at the end")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
