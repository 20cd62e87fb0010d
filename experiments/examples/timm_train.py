"""timm's train.py in its parts: a line after its optimizer, a cut of network and moving average, and training goes on.

python experiments/examples/timm_train.py 120      (steps; after `pip install . timm`)
"""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import nn

import csgd
from csgd.verify import relative_change


def main(steps: int) -> float:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    images, labels = images.repeat_interleave(4, 2).repeat_interleave(4, 3), torch.tensor(labels)
    model = timm.create_model("test_resnet", num_classes=10)

    # [start]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    spaces = csgd.find_spaces(model, images[:2])  # these lines stand before DDP and the average in train.py
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 2))
    collapse = csgd.Collapse(optimizer, model, spaces, clusters, stop=steps // 2)
    average = ModelEmaV3(model, decay=0.9)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=1, updates_per_epoch=steps, step_on_epochs=False)

    cut_at = None
    for step in range(steps):
        rows = torch.randint(len(images), (32,))
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        schedule.step_update(step + 1)
        if collapse.done and cut_at is None:
            before = model.eval()(images).detach()
            csgd.trim(model, spaces, clusters, optimizer)  # which goes on, and the schedule with it
            csgd.merge_equal(average.module, spaces, clusters)  # its members lag behind those of the model
            csgd.trim(average.module, spaces, clusters)
            cut_at, change = step + 1, float(relative_change(before, model(images).detach()).max())
            model.train()
    # [end]

    assert change < 1e-5
    with torch.no_grad():
        (hits,) = accuracy(average.module.eval()(images), labels)
    print(f"{model.conv1[0]}, cut at step {cut_at}: logits changed by {change:.1e} of their spread at most")
    print(f"the average of the weights, cut too, is right for {hits:.1f} % of the digits")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 120)
