"""Lightning: a callback pulls filters together, and a fit that was interrupted goes on from its checkpoint.

python experiments/examples/lightning_loop.py 100      (steps; after `pip install . lightning`)
"""

import logging
import sys
from tempfile import TemporaryDirectory

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import csgd
from csgd.verify import relative_change


# [start]
class PullTogether(lightning.Callback):
    """The filters of a cluster are equal after `stop` steps, and the fit ends there."""

    def __init__(self, example, fraction, stop):
        self.example, self.fraction, self.stop, self.saved = example, fraction, stop, None

    def on_train_start(self, trainer, module):  # the weights are loaded, and on their device
        self.spaces = csgd.find_spaces(module.net, self.example.to(module.device))
        found = csgd.cluster(module.net, self.spaces, csgd.target_widths(self.spaces, self.fraction))
        self.clusters = self.saved["clusters"] if self.saved else trainer.strategy.broadcast(found)
        self.collapse = csgd.Collapse(trainer.optimizers, module.net, self.spaces, self.clusters, stop=self.stop)
        if self.saved:
            self.collapse.load_state_dict(self.saved["collapse"])

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= self.collapse.done

    def state_dict(self):  # goes into every checkpoint
        return {"clusters": self.clusters, "collapse": self.collapse.state_dict()}

    def load_state_dict(self, state):
        self.saved = state


# [end]
class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int) -> float:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    batches = DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=64, shuffle=True)
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)

    with TemporaryDirectory() as folder:
        for epochs, checkpoint in ((1, None), (1000, f"{folder}/first.ckpt")):  # the second fit resumes the first
            module, pull = Digits(), PullTogether(images[:2], 1 / 2, stop=steps)
            trainer = lightning.Trainer(max_epochs=epochs, callbacks=pull, enable_checkpointing=False, **quiet)
            trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
            trainer.save_checkpoint(f"{folder}/first.ckpt")
    with torch.no_grad():
        before = module.net.eval()(images)
        csgd.trim(module.net, pull.spaces, pull.clusters, trainer.optimizers)
        change = float(relative_change(before, module.net(images)).max())
    assert change < 1e-5
    print(f"{module.net[0]}, cut at step {trainer.global_step}: logits changed by {change:.1e} of their spread at most")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
