"""Deletion: which channels matter least, and a network without them; its function changes, unlike that of `trim`."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from csgd.clusters import ClusteredTensor, Clusters, check_width, is_slot, parts_of, tensor_of, weight_of
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Ref
from csgd.graph.twin import dotted
from csgd.trim import cut

Kept = Mapping[str, Sequence[int]]
# What counts in each: filters, entries of vectors, input slices.  Taylor's are the slices: before a batch norm in train
# mode, which takes the scale of a filter away, w · ∂L/∂w is 0 for every filter.
COUNTED = {"l1": ("out",), "l2": ("out", "follow", "in"), "taylor": ("in",)}
BY = tuple(COUNTED)


@torch.no_grad()
def importance(model: nn.Module, spaces: Sequence[ChannelSpace], by: str = "l1") -> dict[str, Tensor]:
    """How much each channel of the trimmable spaces matters, {space name: [slots]}, in float64 on the CPU.

    l1      Σ |w| over its filters, one of each producer (Li et al., ICLR 2017)
    l2      √Σ w² over everything that would go with it: filters, entries of vectors, input slices (Fang et al., CVPR
            2023, without the normalisation)
    taylor  |Σ w ∂L/∂w| over the input slices that read it: what the loss would change by to first order without it, and
            the same as Σ a ∂L/∂a over its activations (Molchanov et al., ICLR 2017); of the gradients that the
            parameters hold, as `backward` over some batches leaves them

    InputError for another criterion, and for taylor where a layer that reads the channels has no gradient.
    """
    if by not in BY:
        raise InputError(f"importance must be by one of {', '.join(BY)}, got {by!r}")
    return {space.name: _importance(model, space, by) for space in spaces if space.trimmable}


def _importance(model: nn.Module, space: ChannelSpace, by: str) -> Tensor:
    def rows(tensor: Tensor, ref: Ref) -> Tensor:
        index = ref.index.reshape(-1).to(tensor.device)
        of_slots = tensor.detach().index_select(ref.dim, index).movedim(ref.dim, 0).reshape(space.size, -1)
        return of_slots.to("cpu", torch.float64)

    total = torch.zeros(space.size, dtype=torch.float64)
    for ref in (ref for ref in space.refs if ref.role in COUNTED[by]):
        tensor, weight = tensor_of(model, ref), weight_of(model, ref)
        if by == "l1":
            total += rows(weight, ref).abs().sum(1)
        elif by == "l2":
            total += rows(weight, ref).square().sum(1) * isinstance(tensor, nn.Parameter)
        elif tensor.grad is None:
            raise InputError(f"importance by taylor needs gradients: {dotted(*ref.owners[0])} has none")
        else:
            total += (rows(tensor, ref) * rows(tensor.grad, ref)).sum(1)
    return total.sqrt() if by == "l2" else total.abs()


def most_important(
    spaces: Sequence[ChannelSpace], scores: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, list[int]]:
    """The `widths[name]` slots of each space that score highest, in ascending order; of equal scores the first.

    Where a condition asks for clusters of one size within groups, as many of each group.  InputError where a space has
    no score for each slot, or its width cannot be kept to.
    """
    by_name, kept = {space.name: space for space in spaces}, {}
    for name, width in widths.items():
        if name not in by_name or name not in scores:
            raise InputError(f"widths.{name}: there is no space, or no score, of this name")
        space, of_slots = by_name[name], torch.as_tensor(scores[name])
        if of_slots.shape != (space.size,) or of_slots.isnan().any():
            raise InputError(f"scores.{name} must be {space.size} numbers, one for each slot")
        check_width(space, width)
        kept[name] = []
        for part in map(torch.from_numpy, parts_of(space)):
            best = of_slots[part].argsort(descending=True, stable=True)
            kept[name] += part[best[: len(part) * width // space.size]].tolist()
        kept[name].sort()
    return kept


def drop(model: nn.Module, spaces: list[ChannelSpace], kept: Kept) -> None:
    """Deletes every channel that is not `kept` {space name: slots}, in place: its filters, its entries of vectors and
    statistics, and the input slices of the layers that read it; spaces that `kept` does not name stay whole.

    The same surgery as `trim`, without its sums: each output changes by what the channel gave to it.  Parameters stay
    the objects that they are; optimizers must be made anew.  InputError as for clusters, and where a condition of a
    space is not kept to.
    """
    cut(model, spaces, _dealt(spaces, kept), narrowed=ClusteredTensor.kept)


def _dealt(spaces: Sequence[ChannelSpace], kept: Kept) -> Clusters:
    """Clusters whose first members are the slots that are kept, with the deleted ones of their group dealt out."""
    if not isinstance(kept, Mapping):
        raise InputError(f"kept must be a mapping {{space name: [slot, …]}}, got {type(kept).__name__}")
    by_name, clusters = {space.name: space for space in spaces}, {}
    for name, slots in kept.items():
        if name not in by_name:
            raise InputError(f"kept: there is no channel space '{name}'")
        slots = slots.tolist() if isinstance(slots, Tensor) else slots
        listed = isinstance(slots, Iterable) and all(map(is_slot, slots))
        chosen = set(slots if listed else ())
        if not chosen or len(chosen) < len(slots) or not chosen <= set(range(by_name[name].size)):
            raise InputError(f"kept.{name} must name some of the slots 0 … {by_name[name].size - 1}, each once")
        clusters[name] = []
        for part in (part.tolist() for part in parts_of(by_name[name])):
            stay = [slot for slot in part if slot in chosen]
            if not stay:
                raise InputError(f"kept.{name} leaves none of slots {part[0]} … {part[-1]}, which are a group")
            members = [[slot] for slot in stay]
            for turn, slot in enumerate(slot for slot in part if slot not in chosen):
                members[turn % len(stay)].append(slot)
            clusters[name] += members
    return clusters
