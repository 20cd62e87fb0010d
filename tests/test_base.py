"""The base network: trained, kept, or loaded."""

import errno
import logging
import os
import threading

import pytest
import torch
from filelock import FileLock
from test_config import composed
from test_sweep import TINY, UNDRAWN

from csgd import InputError
from csgd.checkpoint import save_weights
from csgd.models import resnet20, vgg16
from csgd.pipeline import base, run
from csgd.pipeline.learners import base_learner
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec


def groups_of(*overrides: str) -> dict[str, tuple[float, float]]:
    """The weight decay and the factor of the learning rate of each group of its optimizer."""
    learner = base_learner(prepare(RunSpec.of(composed(*TINY[:-1], *overrides))))
    return {group["name"]: (group["weight_decay"], group["lr_factor"]) for group in learner.optimizer.param_groups}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_base_network_learns_with_what_the_schedule_says_of_vectors_and_biases(optimizer):
    how = [f"schedule.base.optimizer={optimizer}", "schedule.weight_decay=0.1"]
    assert groups_of(*how) == {"kernels": (0.1, 1.0), "vectors": (0.1, 1.0)}
    said = groups_of(*how, "schedule.weight_decay_vectors=0.01", "schedule.bias_lr_factor=2")
    assert said == {"kernels": (0.1, 1.0), "vectors": (0.01, 1.0), "biases": (0.01, 2.0)}


def test_a_base_network_that_cannot_be_kept_costs_no_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(base, "save_weights", full)
    assert run(composed(*TINY[:-1], *UNDRAWN, f"base.cache={tmp_path}/base"), tmp_path / "out")
    assert "base network: could not be kept in base.cache: [Errno 28] No space left on device" in caplog.text


def test_a_run_that_waits_for_the_base_of_another_says_so_again_and_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(base, "SIGN_OF_LIFE", 0.05)
    lock = FileLock(tmp_path / "lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    with caplog.at_level(logging.INFO, "csgd"), base.locked(tmp_path / "lock", "another run is training it"):
        assert caplog.text.count("another run is training it") > 2
        assert not FileLock(tmp_path / "lock").is_locked
    FileLock(tmp_path / "lock").acquire(timeout=0)


def test_weights_that_are_no_numbers_are_told(tmp_path):
    model = resnet20(10)
    model.conv1.weight.data[0, 0, 0, 0] = torch.nan
    save_weights(tmp_path / "broken.safetensors", model.state_dict())
    with pytest.raises(InputError, match="broken.safetensors' hold NaN or infinity in 'conv1.weight'"):
        loaded(model, tmp_path / "broken.safetensors", 10)


def loaded(model, weights, num_classes):
    return base._load(RunSpec.of(composed("model=vgg16", f"base.weights={weights}")), model, num_classes)


def test_only_rows_of_classes_are_left_to_train(monkeypatch, caplog):
    monkeypatch.setattr(base, "published_weights", lambda *_: published.state_dict())
    published = vgg16(1000, 32)
    model = vgg16(7, 32)
    with caplog.at_level(logging.INFO, "csgd"):
        assert not loaded(model, "IMAGENET1K_V1", 7)
    assert "classifier.0.bias, classifier.0.weight of IMAGENET1K_V1 do not fit 7 classes, trained anew" in caplog.text
    assert torch.equal(model.features[0].weight, published.features[0].weight)
    published = torch.nn.ModuleDict({"classifier": vgg16(1000, 32)})
    model = torch.nn.ModuleDict({"classifier": vgg16(1000, 32)})
    model.classifier.features[3] = torch.nn.Conv2d(64, 32, 3)
    with pytest.raises(InputError, match="another architecture than the model: 'classifier.features.3.bias' does not"):
        loaded(model, "IMAGENET1K_V1", 1000)
