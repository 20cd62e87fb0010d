"""The verdict: what a run proves about its cut, and what it saved."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csgd.clusters import Clusters, clustered_tensors
from csgd.graph import ChannelSpace
from csgd.train import accuracy


@dataclass(frozen=True)
class Verdict:
    """What is measured at the cut, over the whole test set.

    deviation                Σ‖W − ΓW‖² over all clustered tensors just before the cut
    relative_deviation       ‖W − ΓW‖ / ‖W‖, the larger of kernels' and vectors'
    max_logit_change         largest |Δ| of any logit by the cut
    relative_logit_change    the same divided by the largest |logit| before it
    statistics_spread        largest relative spread of BN running statistics within a cluster (fact F8)
    accuracy_before_trim, accuracy_after_trim, accuracy   fractions of the test set; the last is the pruned network's
    collapsed, lossless      whether both numbers are within their tolerance
    """

    lossless: bool
    collapsed: bool
    deviation: float
    relative_deviation: float
    max_logit_change: float
    relative_logit_change: float
    statistics_spread: float
    accuracy_before_trim: float
    accuracy_after_trim: float
    accuracy: float


def verdict(
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    *,
    deviation: float,
    relative_deviation: float,
    statistics_spread: float,
    deviation_tolerance: float,
    logit_tolerance: float,
) -> Verdict:
    """Judges a cut from the logits [n, classes] before and after it.  NaN anywhere is never lossless."""
    change = (before - after).abs().max().item()
    relative = change / max(before.abs().max().item(), 1e-30)
    collapsed = relative_deviation <= deviation_tolerance
    return Verdict(
        lossless=collapsed and relative <= logit_tolerance,
        collapsed=collapsed,
        deviation=deviation,
        relative_deviation=relative_deviation,
        max_logit_change=change,
        relative_logit_change=relative,
        statistics_spread=statistics_spread,
        accuracy_before_trim=accuracy(before, labels),
        accuracy_after_trim=accuracy(after, labels),
        accuracy=accuracy(after, labels),
    )


def statistics_spread(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> float:
    """Largest ‖S − ΓS‖ / ‖S‖ of any vector S of running statistics: they lag the filters (fact F8)."""
    touched = clustered_tensors(model, spaces, clusters)
    return max((t.relative_deviation() for t in touched if t.is_statistic), default=0.0)


@torch.no_grad()
def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image: what papers call FLOPs."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(example[:1])
    for module, training in modes:
        module.training = training
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
