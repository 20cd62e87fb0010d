"""Whatever a dataset or a network draws from, a run repeats it: in another process, and where it goes on."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_config import composed
from torch import nn

import csgd.data
from csgd.checkpoint import load_checkpoint, load_weights, save_checkpoint
from csgd.pipeline import run
from csgd.pipeline.progress import Part, Progress
from csgd.ranks import Share
from csgd.seeds import random_state, seed_all, set_random_state

SPLITS = []


def drawn():
    return torch.rand(3).tolist() + np.random.rand(3).tolist() + np.random.randn(1).tolist() + [random.random()]


def split_by_chance(batch_size, seed, device):
    """A dataset of the user's that splits and augments by each of the global generators."""
    SPLITS.append((torch.randperm(8).tolist(), np.random.permutation(8).tolist(), random.sample(range(8), 8)))
    made = csgd.data.synthetic(num_classes=5, image_size=8, train_size=64, test_size=16, batch_size=batch_size,
                               seed=seed, device=device)  # fmt: skip

    def noisy(epoch):
        for images, labels in made.train_batches(epoch):
            yield images + float(np.random.rand()) + random.random(), labels

    return replace(made, train_batches=noisy)


class Drops(nn.Module):
    """Leaves out channels as numpy and Python say."""

    def __init__(self, num_classes):
        super().__init__()
        self.inner, self.outer, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.inner(images).relu()
        if self.training:
            x = x * (1 + np.random.rand()) * (1 + random.random())
        return self.fc(self.outer(x).mean((2, 3)))


@pytest.mark.parametrize("seed", [0, 7 + (3 << 40), -1])
def test_a_state_is_saved_and_restored(tmp_path, seed):
    seed_all(seed)
    first = drawn()
    save_checkpoint(tmp_path / "last.pt", random_state())
    more = drawn()
    seed_all(seed)
    assert drawn() == first
    set_random_state(load_checkpoint(tmp_path / "last.pt"))
    assert drawn() == more
    torch.manual_seed(seed)
    assert torch.rand(3).tolist() == first[:3]


def test_seeds_of_ranks_differ_in_every_generator():
    states = []
    for rank in range(2):
        seed_all(7 + Share(rank, 2).offset)
        states.append(drawn())
    assert all(one != other for one, other in zip(*states, strict=True))


def test_a_dataset_of_chance_is_the_same_in_each_process_and_on_resume(tmp_path, monkeypatch):
    cfg = composed("experiment=smoke", "wandb=disabled", "report=false", "model._target_=test_seeds.Drops",
                   "dataset._target_=test_seeds.split_by_chance", "~dataset.image_size", "~dataset.shift",
                   "checkpoint_every=3", "schedule.batch_size=16", "schedule.csgd={epochs: 3, lr: 0.05, max_steps: 4}",
                   "resume=auto", f"base.cache={tmp_path / 'base'}")  # fmt: skip
    SPLITS.clear()
    seed_all(1)
    run(cfg, tmp_path / "whole")
    save = Progress.save

    def killed(self, setup):
        save(self, setup)
        if self.part is Part.WIDE and self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    seed_all(2)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    seed_all(3)
    run(cfg, tmp_path / "killed")
    assert len(SPLITS) == 3
    assert SPLITS[0] == SPLITS[1] == SPLITS[2]
    states = [load_weights(tmp_path / name / "pruned.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
