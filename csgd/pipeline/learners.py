"""The optimizers of a run, and the learners that they make of its network."""

from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csgd.carry_over import scale_gradients
from csgd.clusters import Clusters, clustered_tensors, keep_buffers
from csgd.collapse import Collapse
from csgd.graph import ChannelSpace
from csgd.optim import CSGD, param_groups
from csgd.pipeline.device import as_trained
from csgd.pipeline.setup import Setup
from csgd.pipeline.spec import RunSpec
from csgd.pipeline.ways import WAYS
from csgd.train import Learner

Groups = list[list[str]]  # the names of the parameters of each group of an optimizer


def base_learner(setup: Setup) -> Learner:
    sgd, base = setup.spec.sgd, setup.spec.base
    vectors = sgd.weight_decay if sgd.weight_decay_vectors is None else sgd.weight_decay_vectors
    how = dict(weight_decay=sgd.weight_decay, weight_decay_vectors=vectors, bias_lr_factor=sgd.bias_lr_factor)
    groups = param_groups(setup.model, [], {}, centri_strength=0.0, **how)
    # Without clusters it is SGD, also for parameters whose first gradient comes later than that of others.
    optimizer = CSGD(groups, base.rates.lr, sgd.momentum, sgd.nesterov)
    return _learner(setup, _adamw(optimizer, setup.spec) if base.optimizer == "adamw" else optimizer)


def pulled_learner(setup: Setup, spaces: list[ChannelSpace], clusters: Clusters) -> Learner:
    """The wide network at the start of a stage."""
    spec, model = setup.spec, setup.model
    keep_buffers(model, clustered_tensors(model, spaces, clusters))  # in the average of the weights too
    if spec.pull.published:
        return _learner(setup, csgd_optimizer(spec, model, spaces, clusters), averages=True)
    return _collapsing(setup, free_learner(setup), spaces, clusters)


def uncalled_learner(setup: Setup) -> Learner:
    """The network of a stage that is cut before its first step: nothing calls it the way it is trained."""
    return Learner.of(setup.model, csgd_optimizer(setup.spec, setup.model, [], {}))


def free_learner(setup: Setup) -> Learner:
    """The network as it is, wide or narrow, by an optimizer that pulls nothing."""
    optimizer = csgd_optimizer(setup.spec, setup.model, [], {})
    if setup.spec.pull.optimizer == "adamw":
        optimizer = _adamw(optimizer, setup.spec)
    return _learner(setup, optimizer, averages=True)


def saved_learner(
    setup: Setup, groups: Groups, state: dict[str, Any], spaces: list[ChannelSpace] | None, clusters: Clusters
) -> Learner:
    """That of a checkpoint of a stage; spaces  None where the network has been cut"""
    spec, named = setup.spec, dict(setup.model.named_parameters())
    held = [{"params": [named[name] for name in names]} for names in groups]
    if spaces is not None:
        keep_buffers(setup.model, clustered_tensors(setup.model, spaces, clusters))
    adamw = spec.pull.optimizer == "adamw"
    learner = _learner(setup, torch.optim.AdamW(held) if adamw else CSGD(held, lr=0.0), averages=True)
    if spaces is not None and spec.pull.published is None:
        learner = _collapsing(setup, learner, spaces, clusters)
    learner.load_state_dict(state)
    if spaces is None and adamw and WAYS[spec.cut.way].pulls:
        scale_gradients(learner.optimizer)
    return learner


def csgd_optimizer(spec: RunSpec, model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> CSGD:
    """CSGD as the configuration says; without a strength where there is none, or where that is to be solved."""
    sgd, pull, published = spec.sgd, spec.pull, spec.pull.published
    groups = param_groups(
        model,
        spaces,
        clusters,
        centri_strength=(published.strength if published else None) or 0.0,
        vector_ratio=published.vector_ratio if published else 1.0,
        weight_decay=sgd.weight_decay,
        weight_decay_vectors=sgd.weight_decay_vectors or 0.0,
        bias_lr_factor=sgd.bias_lr_factor,
    )
    return CSGD(groups, pull.rates.lr, sgd.momentum, sgd.nesterov)


def stop_of(setup: Setup) -> int:
    """The number of steps of a stage after which a Collapse has made the filters equal."""
    return max(1, round(setup.spec.pull.collapse_by * setup.csgd.steps))


def groups_of(learner: Learner) -> Groups:
    names = {p: name for name, p in learner.model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in learner.optimizer.param_groups]


def _collapsing(setup: Setup, learner: Learner, spaces: list[ChannelSpace], clusters: Clusters) -> Learner:
    stop, curve = stop_of(setup), setup.spec.pull.curve
    learner.collapse = Collapse(learner.optimizer, setup.model, spaces, clusters, stop=stop, curve=curve)
    return learner


def _adamw(of: CSGD, spec: RunSpec) -> torch.optim.AdamW:
    """AdamW with the groups of a CSGD; it is torch's fused one, with which a scaler does not go."""
    keys = ("params", "name", "lr", "weight_decay", "lr_factor")
    groups = [{key: group[key] for key in keys} for group in of.param_groups]
    return torch.optim.AdamW(groups, fused=spec.machine.precision != torch.float16)


def _learner(setup: Setup, optimizer: torch.optim.Optimizer, averages: bool = False) -> Learner:
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
