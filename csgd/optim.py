"""CSGD: stochastic gradient descent that pulls the filters of a cluster together."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from csgd.centripetal import SharedRows, centripetal_direction, scale_along, squared_deviation, stability_limit
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace


class CSGD(torch.optim.Optimizer):
    """SGD with momentum along D = ΓG + ΛW, for each clustered tensor W (eq. 7); plain SGD for every other one.

        D = Γ(G − εW) + (η+ε)W;   b ← μb + D;   W ← W − τ(D + μb) with Nesterov, W − τb without

    Differs from torch.optim.SGD in D alone, and hands momentum, Nesterov and weight decay ηW to torch's own
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
        self._shared: dict[Tensor, SharedRows | None] = {}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_stability(
                group["lr"] * group["lr_factor"],
                group["centri_strength"],
                group["weight_decay"],
                group["momentum"],
                group["nesterov"],
            )

    def __setstate__(self, state):
        super().__setstate__(state)
        self._shared = {}

    def _clustered(self, group: dict) -> list[tuple[Tensor, SharedRows | None]]:
        """The parameters of a group, each with its shared rows, kept on the parameter's device."""
        pairs = []
        for p, segments in zip(group["params"], group["segments"] or [None] * len(group["params"]), strict=True):
            if p not in self._shared:
                shared = segments and SharedRows.of(*segments, p.device)
                self._shared[p] = shared if shared and len(shared.rows) else None
            pairs.append((p, self._shared[p]))
        return pairs

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, directions, buffers = [], [], []
            scales = group["gradient_scales"] or [None] * len(group["params"])
            for (p, shared), factors in zip(self._clustered(group), scales, strict=True):
                if p.grad is None:
                    continue
                direction = p.grad
                if factors is not None:
                    direction = scale_along(direction, factors)
                if shared is not None:
                    direction = centripetal_direction(direction, p, shared, group["centri_strength"] * group["ramp"])
                params.append(p)
                directions.append(direction)
                buffers.append(self.state[p].get("momentum_buffer"))
            if not params:
                continue
            sgd(
                params,
                directions,
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"] * group["lr_factor"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,  # fused=True rounds by position on the CPU: equal rows would drift apart (fact F10)
            )
            if group["momentum"]:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer
        return loss

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
                self._shared.pop(old, None)
            group["segments"], group["gradient_scales"] = segments, scales

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
        return [group for group in self.param_groups if any(shared for _, shared in self._clustered(group))]

    @torch.no_grad()
    def relative_deviation(self) -> float:
        """‖W − ΓW‖ / ‖W‖ over the clustered tensors of a group, the largest of any group."""
        ratios = [
            self.deviation(group)
            / sum(p.square().sum() for p, shared in self._clustered(group) if shared).clamp(min=1e-30)
            for group in self.clustered_groups()
        ]
        return float(torch.stack(ratios).max().sqrt()) if ratios else 0.0

    @torch.no_grad()
    def deviation(self, group: dict | None = None) -> Tensor:
        """Σ‖W − ΓW‖² over the clustered tensors (of one group), a scalar tensor that stays on the device."""
        terms = [
            squared_deviation(p, shared)
            for one in (self.param_groups if group is None else [group])
            for p, shared in self._clustered(one)
            if shared is not None
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
