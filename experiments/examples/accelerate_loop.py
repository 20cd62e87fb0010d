"""accelerate: gradients are accumulated, and a loop that was interrupted goes on from its checkpoint.

python experiments/examples/accelerate_loop.py 6      (epochs; after `pip install . accelerate`)
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import csgd
from csgd.verify import relative_change


# [start]
def train(net: nn.Module, batches: DataLoader, epochs: int, folder: str, stop: int):
    """Goes on from the folder if it holds a checkpoint; the filters of a cluster are equal after `stop` steps."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, batches = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=3e-3), batches)

    spaces, kept = csgd.find_spaces(net, next(iter(batches))[0][:2]), Path(folder, "clusters.json")
    if accelerator.is_main_process and not kept.exists():
        kept.write_text(json.dumps(csgd.cluster(net, spaces, csgd.target_widths(spaces, 1 / 2))))
    accelerator.wait_for_everyone()
    clusters = json.loads(kept.read_text())  # the same on every rank, and after an interruption
    inside = optimizer.optimizer  # of accelerate's wrapper, which calls no hooks
    collapse = csgd.Collapse(inside, net, spaces, clusters, stop=stop)
    accelerator.register_for_checkpointing(collapse)
    if (saved := Path(folder, "state")).exists():
        accelerator.load_state(saved)

    for _ in range(epochs):
        for images, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(saved)
        if collapse.done:  # counted in steps of the optimizer, of which each takes two batches here
            return spaces, clusters, inside


# [end]
def main(epochs: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    batches = DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=32, shuffle=True, drop_last=True)
    stop = epochs * len(batches) // 2
    with TemporaryDirectory() as folder:
        for until in (1, epochs - 1):  # the second resumes the first
            net = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
            )  # fmt: skip
            pulled = train(net, batches, until, folder, stop)
    with torch.no_grad():
        before = net.eval()(images)
        csgd.trim(net, *pulled)
        change = float(relative_change(before, net(images)).max())
    assert change < 1e-5
    print(f"{net[0]}, cut at step {stop}: logits changed by {change:.1e} of their spread at most")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 6)
