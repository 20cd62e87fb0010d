"""AdamW, and no strength to choose: filters are equal to the bit at a step that is named beforehand.

python experiments/examples/any_optimizer.py 300      (steps; after `pip install .`)
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import csgd
from csgd.verify import relative_change


def main(steps: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip
    # [start]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    spaces = csgd.find_spaces(model, images[:2])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 2))
    print(csgd.prove(model, spaces, clusters, images[:2]))
    collapse = csgd.Collapse(optimizer, model, spaces, clusters, start=steps // 10, stop=steps // 2)

    for step in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0:
            print(f"step {step}: loss {loss:.3f}, {collapse.left(step + 1):.0%} of the deviation is left")
        if collapse.done and model[0].out_channels == 16:  # the optimizer goes on with the narrow network
            before = model.eval()(images).detach()
            csgd.trim(model, spaces, clusters, optimizer)
            change = float(relative_change(before, model(images).detach()).max())
            model.train()
    # [end]

    hits = (model.eval()(images).argmax(1) == labels).double().mean()
    print(f"{model[0]}: cut, the logits changed by at most {change:.1e} of an image's spread; {hits:.1%} are right")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
