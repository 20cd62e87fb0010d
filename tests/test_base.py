"""The training of the base network."""

import pytest
from test_config import composed
from test_sweep import TINY

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
