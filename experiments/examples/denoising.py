"""Another task than classification: a run prunes a network that takes noise off images, and its score is the PSNR.

PYTHONPATH=. python experiments/examples/denoising.py outputs/denoising     (the folder; conf/ lies in the checkout)
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from conf.schema import register
from csgd.data import Data
from csgd.pipeline import run
from csgd.verify import Verdict


class Denoiser(nn.Sequential):
    """A small DnCNN (Zhang et al., 2017): its layers find the noise."""

    def __init__(self, width: int = 24):
        inner = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - super().forward(noisy)


def psnr(images: Tensor, clean: Tensor) -> float:  # in decibels; the peak of the images is 1
    return float(-10 * nn.functional.mse_loss(images, clean).log10())


def noisy_digits(batch_size, seed, device, share) -> Data:
    clean = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    train, test = TensorDataset(noisy[:1400], clean[:1400]), TensorDataset(noisy[1400:], clean[1400:])
    how = dict(batch_size=batch_size, seed=seed, device=device, share=share)
    return Data.of(train, test, criterion=nn.functional.mse_loss, score=psnr, **how)


def main(folder: str, *overrides: str) -> Verdict:
    register()
    with initialize_config_module("conf", version_base="1.3"):
        targets = ["model._target_=denoising.Denoiser", "dataset._target_=denoising.noisy_digits"]
        unused = ["~dataset.image_size", "~dataset.shift"]  # of digits, the default
        short = ["schedule=smoke", "schedule.csgd.clip_norm=1", "schedule.base={epochs: 4, lr: 3e-3, optimizer: adamw}"]
        config = compose("config", [*targets, *unused, *short, "wandb=disabled", *overrides])
    return run(OmegaConf.to_object(config), Path(folder))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
