"""The book that the rules write into while a network runs: atoms, what ties them, where they are used."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from csgd.graph.labels import UnionFind, along, compact, fold_constant_dims, wide_dims
from csgd.graph.twin import dotted, own_tensors


class Product(NamedTuple):
    """Σ over channels of a query's and a key's: atoms [heads, n] of both, in the same order, and what scales it.

    implied  the function divides by the root of the number of channels that it sees
    """

    queries: Tensor
    keys: Tensor
    implied: bool
    by: str


class Ledger:
    """Atoms of one network and everything the forward passes say about them.

    Three equivalences are kept, the others coarser than the first:
      * `channel`: atoms that are the same channel (residual sums, gates, batch norm statistics);
      * `slot`: atoms that must be clustered alike without being the same channel, the *lanes* of a slot
        (halves of a chunk, groups of a grouped conv, sub-pixels of a pixel shuffle);
      * `head`: the same for another way to cut: where channels are seen as [heads, dims], a slot is a dim with a lane
        in every head, and what `head` ties is a head with a lane for every dim.  Elsewhere the two are alike.
    """

    def __init__(self, model: nn.Module, maps: Mapping[int, int] = MappingProxyType({})):
        self.channel, self.slot, self.head = UnionFind(), UnionFind(), UnionFind()
        self.tensors: dict[int, Tensor] = {}  # keeps every tensor alive, so that its id stays its own
        self.owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self._registered: dict[tuple[str, str], Tensor] = {}
        for path, _, attribute, tensor in own_tensors(model):
            self.tensors[id(tensor)] = tensor
            self.owners[id(tensor)].append((path, attribute))
            self._registered[path, attribute] = tensor
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.uses: dict[tuple[int, int], tuple[Tensor, str]] = {}  # (id of tensor, dim) -> (atoms, role)
        self.outputs: dict[tuple[int, int], Tensor] = {}  # (id of weight, dim) -> atoms of the channels it produces
        self.frozen: dict[int, str] = {}  # id of parameter -> why nothing of it may change shape
        self.constants: set[int] = set()  # ids of buffers that training does not change
        self.sizes: dict[tuple[str, str, int], Tensor] = {}  # (module path, attribute that counts channels, its entry)
        self.maps = dict(maps)  # id of a tensor of several dims -> the one that lies along the channels (embeddings)
        self.met: dict[int, int] = {}  # the same, of what this ledger has seen to meet channels
        self._unplaced: list[tuple[Tensor, Tensor]] = []  # (atom, tensor of several dims)
        self.parts: dict[bytes, Tensor] = {}  # atoms that are picked, apart from others
        self.means: list[tuple[Tensor, str]] = []  # (atoms [groups, n] of each of which the mean is taken, by what)
        self.training = False  # whether the pass that runs is one of training
        self.seen: set[int] = set()  # ids of the tensors read since this was last emptied
        self.activations: list[Tensor] = []  # labels of all that was computed
        self._labels = WeakTensorKeyDictionary()
        self.lengths: dict[int, Tensor] = {}  # id of the v of a weight norm -> its g
        self._normed = WeakTensorKeyDictionary()  # weight g · v / ‖v‖ -> v
        self.pins: list[tuple[Tensor, str]] = []  # (atoms, why they must stay)
        self.pinned_dims: list[tuple[Tensor, str]] = []  # the same for slots, not for whole heads
        self.heads: list[Tensor] = []  # atoms [heads] of an attention, tied to all that is of each head
        self.products: list[Product] = []
        self.of_length_one: list[tuple[Tensor, str]] = []  # (atoms [groups, n], by what each group is made so long)
        self.scaled: list[tuple[Tensor, Tensor]] = []  # (atoms [heads, n], those of a weight and bias [n] of all heads)
        self.same_width: list[tuple[Tensor, Tensor]] = []  # (stream, channels that its width counts): as many after
        self.worked: list[Tensor] = []  # atoms of channels that are not only moved, scaled and multiplied in a product

    def tensor_of(self, owner: tuple[str, str]) -> Tensor | None:
        """The tensor that a module registers under a name; None for an attribute that is none."""
        return self._registered.get(owner)

    def owns(self, tensor: Tensor | None) -> bool:
        return tensor is not None and id(tensor) in self.owners

    def norm(self, weight: Tensor, v: Tensor, g: Tensor) -> bool:
        """Notes that a weight is g · v / ‖v‖; False where one of the two is in another pair too."""
        pairs = self.lengths.items()
        if any((id(v) == one) != (g is other) for one, other in pairs) or id(g) in self.lengths:
            return False
        self.lengths[id(v)], self._normed[weight] = g, v
        return True

    def kernel(self, weight: Tensor) -> Tensor:
        """What is cut of a layer's weight: the weight, or the v of its weight norm."""
        return weight if self.owns(weight) else self._normed.get(weight, weight)

    # atoms

    def fresh(self, n: int, reason: str | None = None) -> Tensor:
        """n new atoms, pinned when a reason is given."""
        atoms = torch.arange(len(self.channel), len(self.channel) + n, device="cpu")  # whatever the default is
        for ties in (self.channel, self.slot, self.head):
            ties.grow(n)
        if reason:
            self.pin(atoms, reason)
        return atoms

    def pin(self, labels: Tensor, reason: str) -> None:
        self.pins.append((compact(labels).reshape(-1).unique(), reason))

    def pin_picked(self, labels: Tensor, reason: str, picked: Tensor | None = None) -> None:
        """Pins some of these channels, or all: their dims alone where whole heads go as they are."""
        apart = self.apart(labels)
        within = apart and set(apart).isdisjoint(self.heads_apart(labels))
        pins = self.pinned_dims if within else self.pins
        pins.append((compact(labels if picked is None else picked).reshape(-1).unique(), reason))

    def freeze(self, parameter: Tensor, reason: str) -> None:
        self.frozen.setdefault(id(parameter), reason)

    def same_channel(self, a: Tensor, b: Tensor) -> None:
        self.channel.union(a, b)
        self.alike(a, b)

    def alike(self, a: Tensor, b: Tensor) -> None:
        """Ties a[i] and b[i] for every i, whatever is cut: lanes of one slot, and of one head."""
        self.slot.union(a, b)
        self.head.union(a, b)

    def clustered_alike(self, atoms: Tensor, dim: int = 0) -> None:
        """Ties everything that lies along `dim`: lanes of one slot."""
        self.alike(atoms.narrow(dim, 0, 1).expand_as(atoms), atoms)

    def split(self, atoms: Tensor) -> None:
        """Channels [..., heads, dims]: dims are cut alike in every head, or whole heads are cut."""
        for dim in (wide := wide_dims(atoms))[:-1]:
            self.slot.union(atoms.narrow(dim, 0, 1).expand_as(atoms), atoms)
        self.head.union(atoms.narrow(wide[-1], 0, 1).expand_as(atoms), atoms)

    def dims(self, labels: Tensor, dim: int) -> Tensor:
        """Atoms [n] for what has one entry for every dim of a head (a norm's weight, an integer): a lane of each slot,
        and nothing that whole heads cut."""
        lanes = self.lanes(labels, dim)
        if lanes.size(1) == 1:
            return lanes[:, 0]
        atoms = self.fresh(len(lanes))
        self.slot.union(atoms[:, None].expand_as(lanes), lanes)
        self.head.union(atoms[:1].expand_as(atoms), atoms)
        return atoms

    def heads_of(self, *parts: Tensor) -> Tensor:
        """Atoms [n] for what has one entry for every head (scores, an integer): of rows [n, …] of atoms, each a head.

        Nothing that a cut of dims cuts; where rows are of one head (its copies in a batch) they get one atom.
        """
        rows = [part.reshape(len(part), -1) for part in parts]
        for part in rows:
            self.head.union(part[:, :1].expand_as(part), part)
            self.head.union(rows[0][:, 0], part[:, 0])
        roots, which = self.head.find(rows[0][:, 0]).unique(return_inverse=True)
        atoms = self.fresh(len(roots))
        self.slot.union(atoms[:1].expand_as(atoms), atoms)
        self.head.union(atoms, roots)
        return atoms[which]

    # labels of tensors

    def canonical(self, labels: Tensor) -> Tensor:
        """Labels by representative of their channel, constant dims at stride 0."""
        return fold_constant_dims(self.channel.find(compact(labels)).expand(labels.shape))

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of an activation; a per-channel parameter becomes a follower by being asked for."""
        if self.owns(tensor):
            wide = [dim for dim in range(tensor.dim()) if tensor.size(dim) > 1]
            if id(tensor) in self.maps:
                wide = [self.maps[id(tensor)]]
            if len(wide) == 1 and tensor.is_floating_point():  # layer scale, a learned offset, a buffer of means
                use = self.uses.get((id(tensor), wide[0]))
                atoms = use[0] if use else self.fresh(tensor.size(wide[0]))
                self.record(tensor, wide[0], atoms, "follow")
                return along(atoms, wide[0], tensor.dim()).expand(tensor.shape)
            self.freeze(tensor, "parameter used outside conv, linear and norm layers")
            blank = self.blank(tensor, f"meets {self.name(tensor)}, which is not one value per channel")
            if wide and tensor.is_floating_point():
                self._unplaced.append((compact(blank).reshape(-1), tensor))
            return blank
        labels = self._labels.get(tensor)
        if (v := self._normed.get(tensor)) is not None:
            self.freeze(v, why := "a weight with weight norm is used outside conv and linear layers")
            return self.blank(tensor, why)
        if labels is None:
            return self.blank(tensor, "meets a constant of the network's code")
        if labels.shape == tensor.shape:
            return self.channel.find(compact(labels)).expand(tensor.shape)
        self.pin(labels, "its shape is changed in place")
        return self.blank(tensor, "its shape is changed in place")

    def known(self, tensor: Tensor) -> Tensor | None:
        """The labels of an activation; None where there are none that fit."""
        labels = self._labels.get(tensor)
        return self.canonical(labels) if labels is not None and labels.shape == tensor.shape else None

    def part(self, labels: Tensor) -> None:
        """Notes that some channels are picked: none of them becomes equal to another one."""
        atoms = compact(labels).reshape(-1).unique()
        self.parts[atoms.numpy().tobytes()] = atoms

    def learn(self, a: Tensor, b: Tensor, a_shape: Sequence[int], b_shape: Sequence[int]) -> None:
        """Learns along which dim of a map its channels lie, where what was made of it, b or a, meets channels."""
        for labels, other, shape in ((a, b, b_shape), (b, a, a_shape)) if self._unplaced else ():
            if other.numel() == 1 and len(dims := self.apart(labels)) == 1:
                from_end = dims[0] - labels.dim()
                if -from_end <= len(shape) and shape[from_end] == labels.size(from_end):
                    self.learned(other, from_end, shape[from_end])

    def learned(self, labels: Tensor, from_end: int, size: int) -> None:
        """Notes that the channels of what was made of a map lie along dim `from_end`: that of its own of this size."""
        labels = compact(labels)
        if not self._unplaced or labels.numel() != 1 or size < 2:
            return
        for atom, tensor in self._unplaced:
            dims = [dim for dim in range(tensor.dim()) if tensor.size(dim) == size]
            if dims and torch.equal(self.channel.find(atom), self.channel.find(labels.reshape(-1))):
                place = tensor.dim() + from_end
                self.met.setdefault(id(tensor), place if place in dims else dims[0])

    def blank(self, tensor: Tensor, reason: str) -> Tensor:
        """Labels of a tensor whose entries no rule tells apart: what meets them must stay."""
        return self.fresh(1, reason).view([1] * tensor.dim()).expand(tensor.shape)

    def label(self, tensor: Tensor, labels: Tensor) -> None:
        if not self.owns(tensor) and tensor.numel() > 1:
            self._labels[tensor] = labels = self.canonical(labels.expand(tensor.shape))
            self.activations.append(labels)

    def work(self, tensor: Tensor) -> None:
        """Notes that the channels of an activation are read or changed one by one: no sum of them goes through."""
        labels = None if self.owns(tensor) else self._labels.get(tensor)
        if labels is not None:
            self.work_on(labels)

    def work_on(self, labels: Tensor) -> None:
        self.worked.append(compact(labels).reshape(-1))

    def name(self, tensor: Tensor) -> str:
        return dotted(*self.owners[id(tensor)][0])

    def channels(self, labels: Tensor, dim: int) -> Tensor:
        """One atom per position along `dim`; what differs along other dims is clustered alike."""
        lanes = self.lanes(labels, dim)
        if lanes.size(1) > 1:
            self.clustered_alike(lanes, 1)
        return lanes[:, 0]

    def lanes(self, labels: Tensor, dim: int) -> Tensor:
        """[size of `dim`, whatever differs along other dims]"""
        size, lanes = labels.size(dim), compact(labels).movedim(dim, 0)
        return lanes.expand(size, *lanes.shape[1:]).reshape(size, -1)

    def record(self, tensor: Tensor | None, dim: int, atoms: Tensor, role: str) -> None:
        """Notes that `dim` of a parameter or buffer is indexed by `atoms`; a second use ties the two."""
        if tensor is None:
            return
        if not self.owns(tensor):
            self.pin(atoms, "meets an operand that is not a registered parameter")
            return
        g = self.lengths.get(id(tensor))
        if g is not None and g.size(dim) > 1:
            self.record(g, dim, atoms, "length" if role == "in" else "follow")
        earlier, earlier_role = self.uses.setdefault((id(tensor), dim), (atoms, role))
        self.same_channel(earlier, atoms)
        if earlier_role != role:
            self.pin(atoms, "parameter used in two roles: a weight of its own for each frees it")

    def count(self, module: nn.Module | None, attributes: tuple[str, ...], atoms: Tensor, entry: int = 0) -> None:
        """Notes that integers of a layer, or an entry of a tuple of them, say how many channels there are."""
        for attribute in attributes if module is not None and id(module) in self.paths else ():
            earlier = self.sizes.setdefault((self.paths[id(module)], attribute, entry), atoms)
            self.same_channel(earlier, atoms)

    def weigh(self, labels: Tensor, dims: Iterable[int], by: str) -> None:
        """Notes that the mean over `dims` is taken, which weighs a channel by the number of its copies (fact F12)."""
        labels, dims = compact(labels), sorted({dim % labels.dim() for dim in dims})
        rows = labels.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
        self.means.append((rows.reshape(-1, rows.size(-1)), by))

    def apart(self, labels: Tensor) -> list[int]:
        """The dims along which channels lie that need not be clustered alike: a cut makes these shorter, not others."""
        return self._apart(self.slot, labels)

    def heads_apart(self, labels: Tensor) -> list[int]:
        """The same for a cut of whole heads."""
        return self._apart(self.head, labels)

    def _apart(self, ties: UnionFind, labels: Tensor) -> list[int]:
        roots = ties.find(compact(self.canonical(labels)))
        return [dim for dim in wide_dims(roots) if not torch.equal(roots, roots.narrow(dim, 0, 1).expand_as(roots))]

    def mixed(self, labels: Tensor, dims: set[int]) -> Tensor | None:
        """Labels (dims kept, compact) after an operation that mixes values along `dims`.

        Along dims without channels nothing happens, across the branches of a stack it acts like a sum;
        None where it runs over the channels themselves.
        """
        labels = compact(self.canonical(labels))
        for dim in sorted(dims):
            wide = wide_dims(labels)
            if dim not in wide:
                continue
            if len(wide) == 1:
                return None
            self.same_channel(labels.narrow(dim, 0, 1).expand_as(labels), labels)
            labels = labels.narrow(dim, 0, 1)
        return labels
