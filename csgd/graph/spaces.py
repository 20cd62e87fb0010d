"""Channel spaces: sets of slots that occur alike in the same tensors, so that any two of them may merge."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from csgd.graph.ledger import Ledger


@dataclass
class Ref:
    """One dim of one parameter or buffer that the slots of a space index.

    owners  [(module path, attribute)], several where the tensor is shared
    dim     the indexed dim
    role    'out' filters of a producer | 'follow' one entry per channel | 'in' input slices of a consumer
    index   [slots, lanes] positions along `dim`
    extent  size of `dim` when the spaces were found: a tensor of another size has been cut since
    order   rank of this use in the forward pass
    """

    owners: list[tuple[str, str]]
    dim: int
    role: str
    index: Tensor
    extent: int
    order: int = 0


@dataclass
class ChannelSpace:
    """Channels that are clustered together.

    name    module path of the pacesetter (first producer), '#2', '#3' … where its channels fall into several spaces
    size    number of slots
    refs    every tensor dim that the slots index
    pinned  reasons why nothing of it may be trimmed; empty if it may
    """

    name: str
    size: int
    refs: list[Ref] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)

    @property
    def trimmable(self) -> bool:
        return not self.pinned and self.size > 1

    @property
    def producers(self) -> list[Ref]:
        """The pacesetter, and the followers that have filters of their own."""
        return [ref for ref in self.refs if ref.role == "out"]


def spaces_of(ledger: Ledger, model: nn.Module) -> list[ChannelSpace]:
    """Groups the slots of a ledger into spaces, in the order in which the network first produces them."""
    reasons = _reasons(ledger)
    where = defaultdict(lambda: defaultdict(list))  # slot -> use -> [(position, channel)]
    for use, (atoms, _) in ledger.uses.items():
        slots, channels = ledger.slot.find(atoms).tolist(), ledger.channel.find(atoms).tolist()
        for position, (slot, channel) in enumerate(zip(slots, channels, strict=True)):
            where[slot][use].append((position, channel))

    order = {use: rank for rank, use in enumerate(ledger.uses)}
    alike = defaultdict(list)
    for slot, uses in where.items():
        lane = {}  # the slot's channels, numbered by first occurrence: lanes must match from use to use
        signature = tuple((use, *(lane.setdefault(c, len(lane)) for _, c in at)) for use, at in uses.items())
        alike[signature, slot in reasons].append(slot)

    spaces, count = [], defaultdict(int)
    for (signature, _), slots in alike.items():
        refs = [
            Ref(
                ledger.owners[use[0]],
                use[1],
                ledger.uses[use][1],
                torch.tensor([[position for position, _ in where[slot][use]] for slot in slots]),
                ledger.tensors[use[0]].size(use[1]),
                order[use],
            )
            for use, *_ in signature
        ]
        pacesetter = next((ref for ref in refs if ref.role == "out"), None)
        if pacesetter is None:
            continue
        pinned = sorted(set().union(*(reasons.get(slot, ()) for slot in slots)))
        if not pinned and len(slots) == 1 and pacesetter.index.numel() > 1:
            pinned = ["all its channels are tied together"]
        if not pinned and not any(ref.role == "in" for ref in refs):
            pinned = ["no layer is seen to read its channels"]
        name = pacesetter.owners[0][0]
        count[name] += 1
        spaces.append(ChannelSpace(f"{name}#{count[name]}" if count[name] > 1 else name, len(slots), refs, pinned))
    return spaces + _uncovered(ledger, model, spaces)


def _reasons(ledger: Ledger) -> dict[int, set[str]]:
    """Slot -> why it must stay."""
    pins = list(ledger.pins)
    pins += [(atoms, ledger.frozen[key]) for (key, _), (atoms, _) in ledger.uses.items() if key in ledger.frozen]
    reasons = defaultdict(set)
    for atoms, reason in pins:
        for slot in ledger.slot.find(atoms).unique().tolist():
            reasons[slot].add(reason)
    return reasons


def _uncovered(ledger: Ledger, model: nn.Module, spaces: list[ChannelSpace]) -> list[ChannelSpace]:
    """A pinned space without refs for every conv and linear layer that no space knows, and why."""
    covered = {path for space in spaces for ref in space.refs if ref.role != "in" for path, _ in ref.owners}
    missing = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            size = module.out_channels
        elif isinstance(module, nn.Linear):
            size = module.out_features
        else:
            continue
        if path in covered:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reason = "its weight is computed, not a plain parameter"
        else:
            reason = ledger.frozen.get(id(weight), "not called as a layer in the forward pass")
        missing.append(ChannelSpace(path, size, pinned=[reason]))
    return missing
