"""How much memory does a training step take at its peak, wide and after the cut?

    python experiments/bench/memory.py

Bytes of all tensors that live during a step beyond the network itself, whose size is in the table too: activations,
gradients, momentum, and what the optimizer needs.  Counted, not timed: the same on every machine.
"""

import torch
from common import Peak, arguments, leave

import csgd
from csgd.models import resnet50, vgg16
from csgd.train import criterion

NETWORKS = {
    "VGG-16": (lambda: vgg16(10, 32), 32, 32),
    "ResNet-50": (lambda: resnet50(1000), 224, 8),
}


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(max(given.threads))
    rows, numbers = [], []
    for network, (make, size, batch) in list(NETWORKS.items())[: 1 if given.quick else None]:
        for way in ("SGD", "C-SGD, wide", "C-SGD, wide, in 4 parts", "C-SGD, cut to 5/8"):
            torch.manual_seed(0)
            model = make().to(memory_format=torch.channels_last).train()
            images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
            if way == "SGD":
                optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
            else:
                spaces = csgd.find_spaces(model, images[:2], trial=False)
                clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
                optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1), 0.01)
                if "cut" in way:
                    csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
            with Peak() as peak:
                for _ in range(2):
                    for part in images.chunk(4 if "parts" in way else 1):
                        criterion(model(part), torch.zeros(len(part), dtype=torch.long)).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            rows.append((network, batch, way, f"{weights / 1e6:.1f}", f"{peak.peak / 1e6:.1f}"))
            numbers.append({"network": network, "batch": batch, "way": way, "weights": weights, "peak": peak.peak})
    leave("memory", given, ("network", "batch", "", "weights, MB", "a step beyond them, MB"), rows, numbers)


if __name__ == "__main__":
    main()
