"""The hidden widths of a multi-layer perceptron and of a vision transformer; the residual stream stays whole.

python experiments/examples/hidden_widths.py 300
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import csgd
from csgd.verify import relative_change


def train_and_trim(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> float:
    spaces = csgd.find_spaces(model, images[:2])
    widths = csgd.target_widths(spaces, 1 / 2)
    clusters = csgd.cluster(model, spaces, widths)
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=8.0, vector_ratio=1.0)
    optimizer = csgd.CSGD(groups, lr=0.05)
    model.train()
    for _ in range(steps):
        part = torch.randint(len(images), (32,))
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        before = model(images[:256])
        csgd.trim(model, spaces, clusters)
        change = float(relative_change(before, model(images[:256])).max())
    print(f"{type(model).__name__}: {widths}; the logits changed by at most {change:.1e} of an image's spread")
    return change


def main(steps: int) -> list[float]:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 10))
    vit = VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    pictures = images.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return [train_and_trim(mlp, images, labels, steps), train_and_trim(vit, pictures, labels, steps)]


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
