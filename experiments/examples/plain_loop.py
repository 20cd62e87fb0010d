"""A network and a loop of one's own: only the optimizer is another one, and the cut comes after.

python experiments/examples/plain_loop.py 10      (epochs; after `pip install .`)
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import csgd
from csgd.verify import relative_change


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


def main(epochs: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    batches = DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=64, shuffle=True, drop_last=True)
    model = Net()  # or a trained one

    # [start]
    spaces = csgd.find_spaces(model, images[:2])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8))
    print(csgd.prove(model, spaces, clusters, images[:2]))
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=8.0, vector_ratio=1.0)
    optimizer = csgd.CSGD(groups, lr=0.05, momentum=0.9, nesterov=True)

    for _ in range(epochs):
        for batch, target in batches:
            loss = nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"relative deviation {csgd.relative_deviation(model, spaces, clusters):.1e}, loss {loss:.3f}")

    model.eval()
    with torch.no_grad():
        before = model(images)
        csgd.trim(model, spaces, clusters)
        change = float(relative_change(before, model(images)).max())
    # [end]
    print(f"{model.stem[0]}: cut, and the logits changed by at most {change:.1e} of an image's spread")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10)
