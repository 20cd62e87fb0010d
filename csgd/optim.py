"""CSGD: stochastic gradient descent that pulls the filters of a cluster together."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from csgd.centripetal import (
    RowOrder,
    Segments,
    laid_out_like,
    memory_order,
    merged_gradient,
    permuted,
    scale_along,
    squared_deviation,
    stability_limit,
)
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace

STACKED = 2**17  # entries: small parameters share an operation until it has as many, larger ones are worth one each
KEPT = 64  # sets of parameters that had a gradient together, the latest: blocks left out at random make many
LINE = 64  # bytes, a line of the cache


@dataclass(frozen=True)
class _Stack:
    """Parameters whose rows have the same length, seen as one matrix; `fused`: whether torch's fused SGD suits them."""

    params: list[Tensor]
    orders: list[RowOrder]
    segments: Segments
    fused: bool

    @classmethod
    def of(cls, clustered: Sequence[tuple[Tensor, RowOrder, Tensor]], fused: bool) -> "_Stack":
        params, orders, segments = zip(*clustered, strict=True)
        first = accumulate((order.shape[0] for order in orders), initial=0)
        joint = torch.cat([one.cpu() + rows for one, rows in zip(segments, first, strict=False)])
        return cls(list(params), list(orders), Segments.of(joint, params[0].device, params[0].dtype), fused)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    def rows(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """One tensor for each parameter → its rows [c, k]"""
        return [order.rows(tensor) for order, tensor in zip(self.orders, tensors, strict=True)]

    def merged_gradients(self, centri_strength: float, scratch: Tensor) -> list[Tensor]:
        """Γ(G − εW) of each parameter, its dims in the order of its RowOrder, in `scratch`."""
        gradients, weights = self.rows(p.grad for p in self.params), self.rows(self.params)
        out = scratch[: self.size].view(-1, weights[0].size(1))
        merged_gradient(gradients, weights, self.segments, centri_strength, out)
        parts = out.split([order.shape[0] for order in self.orders])
        return [part.view(order.shape) for part, order in zip(parts, self.orders, strict=True)]


def _split(clustered: Sequence[tuple[Tensor, RowOrder, Tensor]]) -> Iterator[list[tuple[Tensor, RowOrder, Tensor]]]:
    """In pieces of at most `STACKED` entries, or of one parameter."""
    piece, size = [], 0
    for one in clustered:
        if piece and size + one[0].numel() > STACKED:
            yield piece
            piece, size = [], 0
        piece.append(one)
        size += one[0].numel()
    yield piece


class CSGD(torch.optim.Optimizer):
    """SGD with momentum along D = ΓG + ΛW, for each clustered tensor W (eq. 7); plain SGD for every other one.

        D = Γ(G − εW) + (η+ε)W;   b ← μb + D;   W ← W − τ(D + μb) with Nesterov, W − τb without

    Differs from torch.optim.SGD in D alone, and hands momentum, Nesterov and the decay (η+ε)W to torch's own
    function.  `p.grad` is never written to.  Groups come from `param_groups`; each may hold, beside `lr`,
    `momentum`, `nesterov` and `weight_decay` (η):

        segments         one (dim, segments) or None per parameter: which of its rows become equal
        centri_strength  ε
        ramp             the strength of this step is centri_strength × ramp, as a schedule of ε sets it
        gradient_scales  one list of (dim, factors) or None per parameter: its gradient is scaled along those dims
        lr_factor        the group's learning rate is lr × lr_factor, so that schedulers see one lr

    InputError where τ(η+ε) is beyond the stability limit (fact F6).
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 0.0):
        for key, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{key} must be 0 or more, got {value}")
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must be at least 0 and below 1, got {momentum}")
        if nesterov and momentum == 0:
            raise InputError("nesterov needs a momentum above 0")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            centri_strength=0.0,
            ramp=1.0,
            segments=None,
            gradient_scales=None,
            lr_factor=1.0,
        )
        self._stacks: dict[tuple, tuple[list[_Stack], list[int]]] = {}
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """One more group; InputError if its deviation would grow (fact F6)."""
        group = self.defaults | param_group
        if any(group["segments"] or ()):
            lr = group["lr"] * group["lr_factor"]
            check_stability(lr, group["centri_strength"], group["weight_decay"], group["momentum"], group["nesterov"])
        super().add_param_group(param_group)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._stacks, self._scratch = {}, {}
        for group in self.param_groups:  # torch moves the state of a parameter to its device, not what groups hold
            if scales := group.get("gradient_scales"):
                group["gradient_scales"] = [
                    factors and [(dim, vector.to(p.device, p.dtype)) for dim, vector in factors]
                    for p, factors in zip(group["params"], scales, strict=True)
                ]

    def _stacked(self, group: dict, params: Sequence[Tensor]) -> tuple[list[_Stack], list[int]]:
        """Some parameters of a group: those with rows that become equal, in stacks, and the positions of the others."""
        key = tuple((id(p), p.stride()) for p in params)
        if key not in self._stacks:
            if len(self._stacks) >= KEPT:
                del self._stacks[next(iter(self._stacks))]
            segments = dict(zip(group["params"], group["segments"] or [None] * len(group["params"]), strict=True))
            alike, others = defaultdict(list), []
            for i, p in enumerate(params):
                if segments[p] is None or not Segments.of(segments[p][1]).shared:
                    others.append(i)
                else:
                    dim, vector = segments[p]
                    order = RowOrder.of(p, dim)
                    # torch's fused SGD rounds the odd entries behind its last whole vector in another way than the
                    # rest: rows of a tensor that has such entries would not stay equal (fact F10).
                    fused = permuted(p, order.dims).is_contiguous() and p.numel() * p.element_size() % LINE == 0
                    alike[fused, p.numel() // p.size(dim), p.device, p.dtype].append((p, order, vector))
            stacks = [_Stack.of(some, fused) for (fused, *_), all_of in alike.items() for some in _split(all_of)]
            # Of the same size one after the other: each thread finds its share of the scratch in its own cache.
            self._stacks[key] = sorted(stacks, key=lambda stack: stack.size), others
        self._stacks[key] = self._stacks.pop(key)  # the latest comes last
        return self._stacks[key]

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scales = group["gradient_scales"] or [None] * len(group["params"])
            present = [(p, factors) for p, factors in zip(group["params"], scales, strict=True) if p.grad is not None]
            stacks, others = self._stacked(group, [p for p, _ in present])
            for stack in stacks:
                self._pull(group, stack)
            rest = [present[i] for i in others]
            # A large copy is best used while it is in the cache, and its memory is then there for the next one.
            alone = [factors is not None and p.numel() > STACKED for p, factors in rest]
            together = [pair for pair, one in zip(rest, alone, strict=True) if not one]
            for pairs in (together, *([pair] for pair, one in zip(rest, alone, strict=True) if one)):
                self._descend(group, pairs)
        return loss

    def _pull(self, group: dict, stack: _Stack) -> None:
        strength = group["centri_strength"] * group["ramp"]
        merged = stack.merged_gradients(strength, self._scratch_for(stack))
        self._update(group, stack.params, [order.dims for order in stack.orders], merged, stack.fused, strength)

    def _scratch_for(self, stack: _Stack) -> Tensor:
        """Memory for the gradients of a stack, the same for all stacks: a fresh allocation costs more than the sums."""
        where = stack.params[0].device, stack.params[0].dtype
        if where not in self._scratch or self._scratch[where].numel() < stack.size:
            self._scratch[where] = torch.empty(stack.size, device=where[0], dtype=where[1])
        return self._scratch[where]

    def _descend(self, group: dict, pairs: Sequence[tuple[Tensor, list | None]]) -> None:
        """Plain SGD for parameters without rows that become equal, with the scales of their gradients."""
        params, dims = [p for p, _ in pairs], [memory_order(p) for p, _ in pairs]
        scaled = [scale_along(p.grad, factors) if factors else p.grad for p, factors in pairs]
        gradients = [permuted(laid_out_like(g, p), d) for g, p, d in zip(scaled, params, dims, strict=True)]
        # torch's fused SGD takes a tensor to be dense, and would write into the gaps of one that is not.
        fused = all(permuted(p, d).is_contiguous() for p, d in zip(params, dims, strict=True))
        self._update(group, params, dims, gradients, fused)

    def _update(
        self,
        group: dict,
        params: list[Tensor],
        dims: list[tuple[int, ...]],
        gradients: list[Tensor],
        fused: bool,
        centri_strength: float = 0.0,
    ) -> None:
        """torch's SGD with `group`'s constants and a weight decay of η+ε; the gradients have their dims in this order.

        All tensors are handed over in this order, in which they are contiguous where `fused`: torch's kernel copies
        those of another layout, and takes their entries one by one.
        """
        if not params:
            return
        momenta = [self._momentum(p) for p in params] if group["momentum"] else [None] * len(params)
        sgd(
            [permuted(p, d) for p, d in zip(params, dims, strict=True)],
            gradients,
            [m if m is None else permuted(m, d) for m, d in zip(momenta, dims, strict=True)],
            weight_decay=group["weight_decay"] + centri_strength,
            momentum=group["momentum"],
            lr=group["lr"] * group["lr_factor"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            foreach=False,
            fused=fused,
        )

    def _momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, with its strides; zero before the first step, which then sets it to D."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        elif state["momentum_buffer"].stride() != p.stride():
            state["momentum_buffer"] = laid_out_like(state["momentum_buffer"], p)
        return state["momentum_buffer"]

    @torch.no_grad()
    def carry_over(self, replaced: Mapping[Tensor, tuple[Tensor, ClusteredTensor]]) -> None:
        """Goes on with the parameters of a trimmed network: {old: (new, what was clustered of it)} (fact F7).

        Momentum is averaged over the rows that became one and summed over the input slices that did.  From here on the
        gradient of a row counts 1/|H_out| and that of an input slice |H_in|: with the members of every cluster equal,
        the steps are those of C-SGD on the wide network.  InputError at a second cut, which needs a new optimizer.
        """
        if any(group["gradient_scales"] for group in self.param_groups):
            raise InputError("this optimizer has gone through a cut already; the next one needs a new CSGD")
        for group in self.param_groups:
            count = len(group["params"])
            segments, scales = group["segments"] or [None] * count, [None] * count
            for i, old in enumerate(group["params"]):
                if old not in replaced:
                    continue
                new, touched = replaced[old]
                if "momentum_buffer" in (state := self.state.pop(old, {})):
                    self.state[new] = {"momentum_buffer": touched.narrowed(state["momentum_buffer"], mean=True)}
                group["params"][i], segments[i] = new, None
                scales[i] = touched.gradient_scales(new.device, new.dtype)
            group["segments"], group["gradient_scales"] = segments, scales
        self._stacks, self._scratch = {}, {}

    @torch.no_grad()
    def unscale(self) -> None:
        """Leaves the trajectory of the wide network after a cut: gradients of the trimmed one count once, momentum goes
        over into their units, and what follows is plain SGD."""
        for group in self.param_groups:
            for p, factors in zip(group["params"], group["gradient_scales"] or [], strict=False):
                if factors is not None and "momentum_buffer" in self.state[p]:
                    inverse = [(dim, 1 / vector) for dim, vector in factors]
                    self.state[p]["momentum_buffer"] = scale_along(self.state[p]["momentum_buffer"], inverse)
            group["gradient_scales"] = None

    def clustered_groups(self) -> list[dict]:
        """The groups that hold rows which become equal."""
        return [group for group in self.param_groups if self._stacked(group, group["params"])[0]]

    @torch.no_grad()
    def relative_deviation(self) -> float:
        """‖W − ΓW‖ / ‖W‖ over the clustered tensors of a group, the largest of any group."""
        ratios = [
            self.deviation(group) / sum(p.square().sum() for stack in stacks for p in stack.params).clamp(min=1e-30)
            for group in self.param_groups
            if (stacks := self._stacked(group, group["params"])[0])
        ]
        return float(torch.stack(ratios).max().sqrt()) if ratios else 0.0

    @torch.no_grad()
    def deviation(self, group: dict | None = None) -> Tensor:
        """Σ‖W − ΓW‖² over the clustered tensors (of one group), a scalar tensor that stays on the device."""
        terms = [
            squared_deviation(rows[0] if len(rows) == 1 else torch.cat(rows), stack.segments)
            for one in (self.param_groups if group is None else [group])
            for stack in self._stacked(one, one["params"])[0]
            for rows in [stack.rows(stack.params)]
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def param_groups(
    model: nn.Module,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    *,
    centri_strength: float,
    vector_ratio: float = 0.1,
    weight_decay: float = 1e-4,
    weight_decay_vectors: float = 0.0,
    bias_lr_factor: float = 1.0,
) -> list[dict]:
    """Parameter groups for `CSGD`: every trainable parameter of `model` once, kernels and vectors apart.

    Kernels use ε = centri_strength and η = weight_decay; vectors (bias, BN weight and bias, one entry per channel)
    use vector_ratio · ε and weight_decay_vectors.  Biases learn at lr × bias_lr_factor (2 in the official code) and
    form a group of their own where that is not 1.  Groups carry a `name`: kernels, vectors, biases.
    """
    for key, value in (("centri_strength", centri_strength), ("vector_ratio", vector_ratio)):
        if not value >= 0:
            raise InputError(f"{key} must be 0 or more, got {value}")
    merged = {}
    for t in clustered_tensors(model, spaces, clusters):
        if t.merged:
            merged[id(t.tensor)] = t.merged
            if isinstance(t.tensor, nn.Parameter) and not t.tensor.requires_grad and t.relative_deviation() > 0:
                raise InputError(
                    f"{'.'.join(t.owners[0])} is not trained, so its rows cannot become equal: keep its layer"
                )
    biases = {id(module.bias) for module in model.modules() if isinstance(getattr(module, "bias", None), nn.Parameter)}
    vectors = dict(weight_decay=weight_decay_vectors, centri_strength=vector_ratio * centri_strength)
    groups = {
        "kernels": dict(weight_decay=weight_decay, centri_strength=centri_strength),
        "vectors": dict(vectors),
        "biases": dict(vectors, lr_factor=bias_lr_factor),
    }
    for name, group in groups.items():
        group.update(name=name, params=[], segments=[])
    for p in model.parameters():
        if not p.requires_grad:
            continue
        segments = merged.get(id(p))
        vector = p.dim() <= 1 or (segments is not None and p.numel() == p.size(segments[0]))
        name = "kernels" if not vector else "biases" if id(p) in biases and bias_lr_factor != 1 else "vectors"
        groups[name]["params"].append(p)
        groups[name]["segments"].append(segments)
    return [group for group in groups.values() if group["params"]]


def check_stability(lr: float, centri_strength: float, weight_decay: float, momentum: float, nesterov: bool) -> None:
    """Raises InputError if a deviation would grow: τ(η+ε) beyond the stability limit (fact F6)."""
    limit = stability_limit(momentum, nesterov)
    if lr * (weight_decay + centri_strength) >= limit:
        raise InputError(
            f"centri_strength {centri_strength:g} diverges at learning rate {lr:g}: "
            f"lr × (weight_decay + centri_strength) must stay below {limit:.3g}, "
            f"so centri_strength below {limit / lr - weight_decay:.4g}"
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_ramp(optimizer: CSGD, factor: float) -> None:
    for group in optimizer.param_groups:
        group["ramp"] = factor
