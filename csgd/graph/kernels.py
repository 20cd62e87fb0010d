"""Where the kernel of a layer is, also where its weight is computed with weight norm, w = g · v / ‖v‖."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


def kernel_of(layer: nn.Module) -> Tensor | None:
    """Its weight, or the v of its weight norm (torch's parametrization, or the older hook); None for a weight that is
    computed in another way."""
    parameters = dict(layer._parameters.items())  # scripted modules have no dict
    own = parameters.get("weight", parameters.get("weight_v"))
    if own is not None or not parametrize.is_parametrized(layer, "weight"):
        return own
    steps = layer.parametrizations["weight"]
    return steps._parameters["original1"] if isinstance(steps[0], _WeightNorm) else None


def layer_of(path: str) -> str:
    """The path of the layer that a tensor belongs to, which lies in a module of its own where it is parametrized."""
    return f".{path}".partition(".parametrizations.")[0][1:]


def norms(v: Tensor, g: Tensor) -> Tensor:
    """‖v‖ in the shape of g: over all dims but that along which g has lengths."""
    return torch.linalg.vector_norm(v, dim=[dim for dim in range(v.dim()) if g.size(dim) == 1], keepdim=True)
