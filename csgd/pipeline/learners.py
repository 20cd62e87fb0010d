"""The optimizers of a run, and the learners that they make of its network."""

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csgd.clusters import Clusters
from csgd.graph import ChannelSpace
from csgd.optim import CSGD, param_groups
from csgd.pipeline.device import as_trained
from csgd.pipeline.setup import Setup
from csgd.pipeline.spec import RunSpec
from csgd.train import Learner

Groups = list[list[str]]  # the names of the parameters of each group of an optimizer


def base_optimizer(setup: Setup) -> torch.optim.Optimizer:
    sgd, base, params = setup.spec.sgd, setup.spec.base, setup.model.parameters()
    if base.optimizer == "adamw":
        fused = setup.spec.machine.precision != torch.float16  # a scaler does not go with it
        return torch.optim.AdamW(params, base.rates.lr, weight_decay=sgd.weight_decay, fused=fused)
    # Without clusters it is SGD, also for parameters whose first gradient comes later than that of others.
    return CSGD(params, base.rates.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay)


def csgd_optimizer(spec: RunSpec, model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> CSGD:
    """CSGD as the configuration says; without a strength where that is to be solved."""
    sgd, pull = spec.sgd, spec.pull
    groups = param_groups(
        model,
        spaces,
        clusters,
        centri_strength=pull.strength or 0.0,
        vector_ratio=pull.vector_ratio,
        weight_decay=sgd.weight_decay,
        weight_decay_vectors=sgd.weight_decay_vectors,
        bias_lr_factor=sgd.bias_lr_factor,
    )
    return CSGD(groups, pull.rates.lr, sgd.momentum, sgd.nesterov)


def saved_optimizer(model: nn.Module, groups: Groups) -> CSGD:
    """A CSGD for the state of a checkpoint."""
    named = dict(model.named_parameters())
    return CSGD([{"params": [named[name] for name in names]} for names in groups], lr=0.0)


def groups_of(learner: Learner) -> Groups:
    names = {p: name for name, p in learner.model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in learner.optimizer.param_groups]


def learner_of(setup: Setup, optimizer: torch.optim.Optimizer, averages: bool) -> Learner:
    """averages  whether the moving average of the weights, if there is to be one, follows them"""
    spec, model = setup.spec, setup.model
    fp16, decay = spec.machine.precision == torch.float16, spec.pull.average if averages else None
    return Learner(
        model,
        optimizer,
        network=as_trained(model, spec.machine.compile),
        scaler=GradScaler(setup.data.example.device.type) if fp16 else None,
        average=AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None,
    )
