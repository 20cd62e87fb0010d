"""Weight norm at the cut: where v is cut along what ‖v‖ runs over, g follows, and w = g · v / ‖v‖ is the cut of w."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from csgd.centripetal import representatives, segment_mean
from csgd.clusters import ClusteredTensor, registered
from csgd.graph.kernels import norms


@torch.no_grad()
def cut_values(
    model: nn.Module, touched: Sequence[ClusteredTensor], narrowed: Callable[[ClusteredTensor, Tensor], Tensor]
) -> list[tuple[ClusteredTensor, Tensor]]:
    """Tensors that a cut changes, and what they become: the `touched` ones, and the g of each v of a weight norm.

    With v′ what is left of v, g′ = g ‖v′‖ / ‖v‖, a length for each filter (or input), which leaves g / ‖v‖, and so the
    size of a step, as it is.  Inputs that are summed have lengths of their own: there first v ← v · (g / ‖v‖) / f and
    g ← |g|, with f the mean of |g| / ‖v‖ in a cluster, which is the same w.
    """
    of, found = {id(t.tensor): t for t in touched}, {}
    for t in touched:
        pairs = _of_weight_norm(model, t, of, narrowed) if t.lengths else []
        for one, value in pairs or [(t, narrowed(t, t.tensor.detach()))]:
            if pairs or id(one.tensor) not in found:
                found[id(one.tensor)] = one, value
    return list(found.values())


def _of_weight_norm(
    model: nn.Module,
    t: ClusteredTensor,
    of: Mapping[int, ClusteredTensor],
    narrowed: Callable[[ClusteredTensor, Tensor], Tensor],
) -> list[tuple[ClusteredTensor, Tensor]]:
    """v and g of a weight norm and what they become; nothing where ‖v‖ stays as it is."""
    v, g = t.tensor.detach(), registered(model, *t.lengths[0])
    dim = max(range(g.dim()), key=g.size)
    value, before, of_inputs = g.detach(), norms(v, g), t.summed is not None and t.summed[0] == dim
    if of_inputs:
        share = value / before
        mean = segment_mean(share.abs(), *t.summed)
        v = v * torch.where(mean == 0, 1, share / mean)
        value, before = value.abs(), norms(v, g)
    data = narrowed(t, v)
    if not of_inputs and data.select(dim, 0).shape == v.select(dim, 0).shape:
        return []
    after = norms(data, g)
    data = torch.where(after == 0, 1, data)  # a sum that is zero has no direction; its length is 0
    plain = of.get(id(g)) or ClusteredTensor(list(t.lengths), g, None, None)
    _, segments = plain.cut_rows or (dim, torch.arange(g.size(dim), device="cpu"))
    factors = torch.ones(len(segments), dtype=torch.float64, device=v.device)
    plain = replace(plain, rows=(dim, segments, factors))
    ratio = after / narrowed(plain, before)
    factors = factors.index_copy(0, representatives(segments).to(v.device), ratio.flatten().double())
    return [(t, data), (replace(plain, rows=(dim, segments, factors)), narrowed(plain, value) * ratio)]
