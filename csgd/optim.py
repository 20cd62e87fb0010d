"""CSGD: stochastic gradient descent that pulls the filters of a cluster together."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from csgd.centripetal import (
    RowOrder,
    Segments,
    laid_out_like,
    memory_order,
    permuted,
    scale_along,
    segment_mean,
    stability_limit,
)
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors
from csgd.errors import InputError, RateError
from csgd.graph import ChannelSpace
from csgd.graph.twin import dotted
from csgd.stacks import STACKED, Latest, Stack, stacks_of

log = logging.getLogger("csgd.optim")

LINE = 64  # bytes, a line of the cache
CONSTANTS = ("lr", "momentum", "nesterov", "weight_decay")  # of a group, those that torch.optim.SGD has too
CUT_WITHOUT = "a parameter of this optimizer was cut without it: trim(…, optimizer) takes it along, or make it anew"
SGD_ALONE = ("dampening", "maximize", "foreach", "differentiable", "fused")  # of a group, those that CSGD has not


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
        positions        place of each parameter among model.parameters(), the order of a state_dict of SGD

    InputError where τ(η+ε) is beyond the stability limit (fact F6), also in the step before which a rate or strength
    has become too large.
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
            positions=None,
        )
        self._stable: dict[int, tuple] = {}
        self._stacks: Latest[tuple[list[Stack], list[int]]] = Latest()
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """One more group; InputError if its deviation would grow (fact F6)."""
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def _check_stability(self) -> None:
        """Raises InputError where a deviation would grow in the coming step: strengths and rates have schedules."""
        for number, group in enumerate(self.param_groups):
            now = tuple([float(group[key]) for key in (*CONSTANTS, "lr_factor", "centri_strength", "ramp")])
            if self._stable.get(number) != now:
                _check_group(group)
                self._stable[number] = now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state_dict of CSGD, or of torch.optim.SGD with its momentum, learning rate and constants.

        That of SGD has groups like these, or one of all parameters (or all trained ones) in the order of
        model.parameters(); what SGD does not know, clusters and strengths, stays as it is here.  Its momentum is
        averaged over rows that become equal: means go on as they would have (F3), and the forecast holds (F2).
        InputError where it is another optimizer's or another network's, or has `dampening` or `maximize`.
        """
        if not all("segments" in group for group in state_dict["param_groups"]):
            state_dict = self._from_sgd(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for p, one in zip(params, ids, strict=False):  # torch's own check is that of the lengths
            buffer = state_dict["state"].get(one, {}).get("momentum_buffer")
            if buffer is not None and buffer.shape != p.shape:
                raise InputError(
                    f"a state_dict of another network: parameter {one} is {list(p.shape)}, its momentum "
                    f"{list(buffer.shape)}"
                )
        super().load_state_dict(state_dict)

    def _from_sgd(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state_dict of torch.optim.SGD, as one of this optimizer."""
        theirs, own, state = state_dict["param_groups"], self.param_groups, {}
        keys = set(chain.from_iterable(state_dict["state"].values()))
        for group in theirs:
            if not group.keys() >= set(CONSTANTS) or keys - {"momentum_buffer"}:
                raise InputError("CSGD goes on from a state_dict of CSGD or of torch.optim.SGD, this is another one's")
            if wrong := [f"{key}={group[key]}" for key in ("dampening", "maximize") if group.get(key)]:
                raise InputError(f"CSGD has no {wrong[0]}, which this state_dict of torch.optim.SGD was trained with")
        counts = [[len(group["params"]) for group in groups] for groups in (theirs, own)]
        if counts[0] == counts[1]:
            sources = [(group, group["params"]) for group in theirs]
        elif len(theirs) == 1 and (places := self._places(*counts[0])):
            sources = [(theirs[0], [theirs[0]["params"][i] for i in part]) for part in places]
        else:
            raise InputError(
                f"a state_dict with groups of {counts[0]} parameters does not fit groups of {counts[1]}: "
                "SGD must have groups like these, or one of all parameters of the model"
            )
        groups = []
        for mine, (group, ids) in zip(own, sources, strict=True):
            more = {key: value for key, value in group.items() if key not in SGD_ALONE}
            groups.append(more | mine | {key: group[key] for key in CONSTANTS} | {"params": ids})
            for one, p, segments in zip(ids, mine["params"], mine["segments"] or [None] * len(ids), strict=True):
                buffer = state_dict["state"].get(one, {}).get("momentum_buffer")
                if buffer is not None:
                    fits = segments is not None and buffer.shape == p.shape
                    state[one] = {"momentum_buffer": segment_mean(buffer, *segments) if fits else buffer}
        return state_dict | {"param_groups": groups, "state": state}

    def _places(self, count: int) -> list[list[int]] | None:
        """Where those of each group are among `count` in the order of model.parameters(): all, or the trained ones."""
        positions = [group["positions"] for group in self.param_groups]
        if None in positions:
            return None
        ordered = sorted(chain.from_iterable(positions))
        if count == len(ordered):
            rank = {position: place for place, position in enumerate(ordered)}
            return [[rank[position] for position in part] for part in positions]
        return positions if count > ordered[-1] else None

    def __setstate__(self, state):
        super().__setstate__(state)
        self._stacks, self._scratch, self._stable = Latest(), {}, {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for group in self.param_groups:  # torch moves the state of a parameter to its device, not what groups hold
            if scales := group.get("gradient_scales"):
                group["gradient_scales"] = [
                    factors and [(dim, vector.to(p.device, p.dtype)) for dim, vector in factors]
                    for p, factors in zip(group["params"], scales, strict=True)
                ]

    def _stacked(self, group: dict, params: Sequence[Tensor]) -> tuple[list[Stack], list[int]]:
        """Some parameters of a group: those with rows that become equal, in stacks, and the positions of the others."""
        key = tuple((id(p), p.shape, p.stride()) for p in params)
        return self._stacks.of(key, partial(self._stack, group, params))

    def _stack(self, group: dict, params: Sequence[Tensor]) -> tuple[list[Stack], list[int]]:
        segments = dict(zip(group["params"], group["segments"] or [None] * len(group["params"]), strict=True))
        alike, others = {True: [], False: []}, []
        for i, p in enumerate(params):
            if segments[p] is None or not Segments.of(segments[p][1]).shared:
                others.append(i)
            else:
                dim, vector = segments[p]
                if p.size(dim) != len(vector):
                    raise InputError(CUT_WITHOUT)
                alike[_suits_fused(p, RowOrder.of(p, dim))].append((p, dim, vector))
        # Of the same size one after the other: each thread finds its share of the scratch in its own cache.
        return sorted(chain(*map(stacks_of, alike.values())), key=lambda stack: stack.size), others

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` re-evaluates the model and returns the loss."""
        self._check_stability()
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
            rest = []
            for p, factors in (present[i] for i in others):
                if p.grad.layout is not torch.strided or p.is_complex():
                    self._descend_as_torch(group, p, factors)
                else:
                    rest.append((p, factors))
            # A large copy is best used while it is in the cache, and its memory is then there for the next one.
            alone = [factors is not None and p.numel() > STACKED for p, factors in rest]
            together = [pair for pair, one in zip(rest, alone, strict=True) if not one]
            for pairs in (together, *([pair] for pair, one in zip(rest, alone, strict=True) if one)):
                self._descend(group, pairs)
        return loss

    def _pull(self, group: dict, stack: Stack) -> None:
        strength = group["centri_strength"] * group["ramp"]
        merged = stack.merged_gradients(strength, self._scratch_for(stack))
        fused = _suits_fused(stack.tensors[0], stack.orders[0])  # all of a stack, or none
        self._update(group, stack.tensors, [order.dims for order in stack.orders], merged, fused, strength)

    def _scratch_for(self, stack: Stack) -> Tensor:
        """Memory for the gradients of a stack, the same for all stacks: a fresh allocation costs more than the sums."""
        where = stack.tensors[0].device, stack.tensors[0].dtype
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

    def _descend_as_torch(self, group: dict, p: Tensor, factors: list | None) -> None:
        """Plain SGD as torch.optim.SGD takes it, for complex parameters and sparse gradients."""
        gradient = scale_along(p.grad.to_dense(), factors) if factors else p.grad
        if gradient.layout is not torch.strided and group["weight_decay"]:
            raise InputError(
                f"a parameter of shape {list(p.shape)} has a sparse gradient, which cannot be decayed: "
                "its group needs weight_decay=0"
            )
        state = self.state[p] if group["momentum"] else {}
        momenta = [state.get("momentum_buffer")]
        sgd([p], [gradient], momenta, **self._constants(group), foreach=False, fused=False)
        if momenta[0] is not None:
            state["momentum_buffer"] = momenta[0]

    def _constants(self, group: dict, centri_strength: float = 0.0) -> dict[str, Any]:
        return dict(
            weight_decay=group["weight_decay"] + centri_strength,
            momentum=group["momentum"],
            lr=group["lr"] * group["lr_factor"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )

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
            **self._constants(group, centri_strength),
            foreach=False,
            fused=fused,
        )

    def _momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, with its strides; zero before the first step, which then sets it to D."""
        state = self.state[p]
        buffer = state.get("momentum_buffer")
        if buffer is None:  # SGD without momentum has stored that
            state["momentum_buffer"] = torch.zeros_like(p)
        elif buffer.shape != p.shape:
            raise InputError(CUT_WITHOUT)
        elif buffer.stride() != p.stride():
            state["momentum_buffer"] = laid_out_like(buffer, p)
        return state["momentum_buffer"]

    @torch.no_grad()
    def carry_over(self, touched: Sequence[ClusteredTensor]) -> None:
        """Goes on with parameters that are cut, which stay the same objects (fact F7); `trim` calls it before the cut.

        Momentum is averaged over the rows that become one and summed over the input slices that do.  From here on the
        gradient of a row counts 1/|H_out| and that of an input slice |H_in|: with the members of every cluster equal,
        the steps are those of C-SGD on the wide network.  Not so under a penalty that the loss itself holds (L1, a
        distance to the start): the cut network has one copy of what the wide one was penalised for several times.
        InputError at a second cut, which needs a new optimizer, and where none of these parameters is trained here.
        """
        if any(group["gradient_scales"] for group in self.param_groups):
            raise InputError("this optimizer has gone through a cut already; the next one needs a new CSGD")
        cut = {t.tensor: t for t in touched}
        if cut and not any(p in cut for group in self.param_groups for p in group["params"]):
            raise InputError("this optimizer trains none of the parameters that are cut: it is another network's")
        for group in self.param_groups:
            count = len(group["params"])
            segments, scales = group["segments"] or [None] * count, [None] * count
            for i, p in enumerate(group["params"]):
                if p not in cut:
                    continue
                buffer = self.state.get(p, {}).get("momentum_buffer")
                if buffer is not None:
                    self.state[p]["momentum_buffer"] = cut[p].narrowed(buffer)
                segments[i], scales[i] = None, cut[p].gradient_scales(p.device, p.dtype)
            group["segments"], group["gradient_scales"] = segments, scales
        self._stacks, self._scratch = Latest(), {}

    @torch.no_grad()
    def unscale(self) -> None:
        """Leaves the trajectory of the wide network after a cut: gradients of the trimmed one count once, momentum goes
        over into their units, and what follows is plain SGD."""
        for group in self.param_groups:
            for p, factors in zip(group["params"], group["gradient_scales"] or [], strict=False):
                buffer = self.state.get(p, {}).get("momentum_buffer")
                if factors is not None and buffer is not None:
                    inverse = [(dim, 1 / vector) for dim, vector in factors]
                    self.state[p]["momentum_buffer"] = scale_along(buffer, inverse)
            group["gradient_scales"] = None

    def clustered_groups(self) -> list[dict]:
        """The groups that hold rows which become equal."""
        return [group for group in self.param_groups if self._stacked(group, group["params"])[0]]

    @torch.no_grad()
    def relative_deviation(self) -> float:
        """‖W − ΓW‖ / ‖W‖, the largest of any clustered parameter; InputError where there is none.

        Cheap, and of what this optimizer trains alone: whether a network may be cut, with its running statistics and
        frozen tensors, `csgd.relative_deviation` says.
        """
        ratios = []
        for group in self.param_groups:
            for stack in self._stacked(group, group["params"])[0]:
                rows = stack.matrices(stack.tensors)
                joint = torch.cat(rows)
                away = stack.segments.merge(joint).sub_(joint).split([len(part) for part in rows])
                for deviation, part in zip(away, rows, strict=True):
                    ratios.append(deviation.norm() / part.norm().clamp(min=torch.finfo(part.dtype).tiny))
        if not ratios:
            raise InputError("no parameter of this optimizer becomes equal, so there is no deviation")
        largest = float(torch.stack([ratio.float() for ratio in ratios]).max())
        return math.inf if math.isnan(largest) else largest

    @torch.no_grad()
    def deviation(self, group: dict | None = None) -> Tensor:
        """Σ‖W − ΓW‖² over the clustered tensors (of one group), a scalar tensor that stays on the device."""
        terms = [
            stack.deviation(stack.tensors)
            for one in (self.param_groups if group is None else [group])
            for stack in self._stacked(one, one["params"])[0]
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
    form a group of their own where that is not 1, and so do embeddings with sparse gradients, which cannot be decayed.
    Groups carry a `name`: kernels, vectors, biases, sparse.

    InputError where a cluster asks for what no step brings about: rows of tensors that differ and that training does
    not change (frozen parameters, and the buffers that a condition of their space names), of complex ones, or of
    embeddings with sparse gradients.  A warning where parameters have 16 bits, in which rows stay a little apart.
    """
    for key, value in (("centri_strength", centri_strength), ("vector_ratio", vector_ratio)):
        if not value >= 0:
            raise InputError(f"{key} must be 0 or more, got {value}")
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse}
    constants = {name for space in spaces for condition in space.conditions for name in condition.tensors}
    merged, still, odd, coarse = {}, [], [], []
    for t in clustered_tensors(model, spaces, clusters):
        if t.merged:
            merged[id(t.tensor)] = t.merged
        if not t.becomes_equal:
            continue
        if not t.tensor.requires_grad if isinstance(t.tensor, nn.Parameter) else t.name in constants:
            still += [t.name] if t.relative_deviation() > 0 else []
        elif t.tensor.is_complex() or id(t.tensor) in sparse:
            odd.append(t.name)
        elif t.tensor.is_floating_point() and t.tensor.element_size() < 4 and isinstance(t.tensor, nn.Parameter):
            coarse.append(t.name)
    if still:
        of_space = {space.name: {dotted(*ref.owners[0]) for ref in space.refs if ref.role != "in"} for space in spaces}
        touched = [name for name in clusters if not of_space[name].isdisjoint(still)]
        raise InputError(
            f"{', '.join(still)}: not trained, so their rows cannot become equal under CSGD: csgd.Collapse makes them "
            f"so, or leave {', '.join(touched)} out of the clusters"
        )
    if odd:
        raise InputError(
            f"{', '.join(odd)}: complex, or have sparse gradients, so their rows cannot become equal: keep these "
            "layers whole"
        )
    if coarse:
        log.warning(
            "%s and %d more tensors have 16 bits, which round the pull away before rows are equal: keep parameters in "
            "float32 (autocast computes in 16 bits all the same), or use csgd.Collapse",
            coarse[0],
            len(coarse) - 1,
        )
    biases = {id(module.bias) for module in model.modules() if isinstance(getattr(module, "bias", None), nn.Parameter)}
    vectors = dict(weight_decay=weight_decay_vectors, centri_strength=vector_ratio * centri_strength)
    groups = {
        "kernels": dict(weight_decay=weight_decay, centri_strength=centri_strength),
        "vectors": dict(vectors),
        "biases": dict(vectors, lr_factor=bias_lr_factor),
        "sparse": dict(weight_decay=0.0),
    }
    for name, group in groups.items():
        group.update(name=name, params=[], segments=[], positions=[])
    for position, p in enumerate(model.parameters()):
        if not p.requires_grad:
            continue
        segments = merged.get(id(p))
        vector = p.dim() <= 1 or (segments is not None and p.numel() == p.size(segments[0]))
        if id(p) in sparse:
            name = "sparse"
        else:
            name = "kernels" if not vector else "biases" if id(p) in biases and bias_lr_factor != 1 else "vectors"
        groups[name]["params"].append(p)
        groups[name]["segments"].append(segments)
        groups[name]["positions"].append(position)
    return [group for group in groups.values() if group["params"]]


def _suits_fused(p: Tensor, order: RowOrder) -> bool:
    """Whether torch's fused SGD keeps equal rows equal (fact F10).

    It rounds the odd entries behind its last whole vector in another way than the rest.
    """
    return permuted(p, order.dims).is_contiguous() and p.numel() * p.element_size() % LINE == 0


def _check_group(group: dict) -> None:
    if any(group["segments"] or ()):
        lr, strength = group["lr"] * group["lr_factor"], group["centri_strength"] * group["ramp"]
        check_stability(lr, strength, group["weight_decay"], group["momentum"], group["nesterov"])


def check_stability(lr: float, centri_strength: float, weight_decay: float, momentum: float, nesterov: bool) -> None:
    """Raises RateError if a deviation would grow: τ(η+ε) beyond the stability limit (fact F6)."""
    limit = stability_limit(momentum, nesterov)
    if not lr * (weight_decay + centri_strength) < limit:
        raise RateError(
            f"centri_strength {centri_strength:g} diverges at learning rate {lr:g}: "
            f"lr × (weight_decay + centri_strength) must stay below {limit:.3g}, "
            f"so centri_strength below {limit / lr - weight_decay:.4g}"
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """τ of the next step; of a group with an `lr_factor` times that, which CSGD does itself."""
    for group in optimizer.param_groups:
        group["lr"] = lr if isinstance(optimizer, CSGD) else lr * group.get("lr_factor", 1.0)


def set_ramp(optimizer: CSGD, factor: float) -> None:
    for group in optimizer.param_groups:
        group["ramp"] = factor
