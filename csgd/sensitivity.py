"""How much a network's loss grows when one channel space alone is merged: what each space can spare."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from csgd.clusters import Clusters, cluster, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace, conditions
from csgd.graph.twin import twin_of
from csgd.trim import merge_equal
from csgd.widths import fitting_widths

FRACTIONS = tuple(eighths / 8 for eighths in range(7, 0, -1))


def sensitivity(
    model: nn.Module,
    spaces: list[ChannelSpace],
    loss_of: Callable[[nn.Module], float],
    *,
    fractions: Sequence[float] = FRACTIONS,
    of: str = "pacesetter",
    seed: int = 0,
    data: Iterable[Any] | None = None,
) -> dict[str, list[list[float]]]:
    """{space name: [[width, change of the loss], …]}, the widest first: what `budget_widths` allots by; plain JSON.

    Each trimmable space alone is put into the k-means clusters of a width and merged, W ← ΓW, without a step of
    training, on a copy; spaces whose clusters must have one size together.

    loss_of    a network in eval mode → its mean loss on a few batches, the same ones each time, not those of a test
    fractions  of the widths at which that is measured
    of, seed, data  as for `cluster`

    InputError where a loss is not a number.
    """
    twin = twin_of(model).eval()
    whole, batches = _finite(loss_of, twin, "the network"), None if data is None else list(data)
    found: dict[str, list[list[float]]] = {space.name: [] for space in spaces if space.trimmable}
    for fraction in sorted(fractions, reverse=True):
        widths = fitting_widths(spaces, fraction)[0]
        clusters = cluster(twin, spaces, widths, "kmeans", seed, of, data=batches)
        for together in conditions.tied(spaces):
            names = [space.name for space in together]
            narrower = (found[names[0]] or [[together[0].size]])[-1][0] > widths[names[0]]
            if narrower:
                merged = {name: clusters[name] for name in names}
                change = _merged_loss(loss_of, twin, spaces, merged) - whole
                for name in names:
                    found[name].append([widths[name], change])
    return found


def _merged_loss(
    loss_of: Callable[[nn.Module], float], model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters
) -> float:
    """The loss with these clusters merged; the network stays as it is."""
    touched = [t.tensor for t in clustered_tensors(model, spaces, clusters, for_cut=False) if t.becomes_equal]
    before = [tensor.detach().clone() for tensor in touched]
    merge_equal(model, spaces, clusters)
    loss = _finite(loss_of, model, f"the network with {', '.join(clusters)} merged")
    with torch.no_grad():
        for tensor, values in zip(touched, before, strict=True):
            tensor.copy_(values)
    return loss


@torch.no_grad()
def _finite(loss_of: Callable[[nn.Module], float], model: nn.Module, told: str) -> float:
    loss = float(loss_of(model))
    if not math.isfinite(loss):
        raise InputError(f"the loss of {told} is {loss}, so sensitivities cannot be told")
    return loss
