"""A network of Hugging Face's timm, its pretrained weights included.

python experiments/examples/timm_network.py resnet18 300      (name, steps)
"""

import sys

import timm
import torch
from torch import nn

import csgd
from csgd.verify import relative_change


def main(name: str, steps: int, pretrained: bool = False) -> float:
    model = timm.create_model(name, pretrained=pretrained, num_classes=10)
    data = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 64, 64, generator=data)  # in place of your data
    labels = torch.randint(10, (64,), generator=data)

    spaces = csgd.find_spaces(model, images[:2])
    for space in spaces:
        if space.pinned:
            print(f"{space.name} stays whole: {'; '.join(space.pinned)}")
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.75), method="even")
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=40.0, vector_ratio=1.0)
    optimizer = csgd.CSGD(groups, lr=0.01)

    model.train()
    for step in range(steps):
        part = torch.arange(8 * step, 8 * step + 8) % 64
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"relative deviation {csgd.relative_deviation(model, spaces, clusters):.1e} after {steps} steps")

    model.eval()
    with torch.no_grad():
        before, params = model(images), sum(p.numel() for p in model.parameters())
        csgd.trim(model, spaces, clusters)
        change = float(relative_change(before, model(images)).max())
    print(f"{params:,} parameters, {sum(p.numel() for p in model.parameters()):,} after the cut")
    print(f"the logits changed by at most {change:.1e} of an image's spread")
    return change


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), pretrained=True) if len(sys.argv) == 3 else main("resnet18", 300)
