"""What a network costs layer by layer, and how far the members of each channel space are apart."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from csgd.clusters import Clusters, clustered_tensors
from csgd.graph import ChannelSpace, Ref
from csgd.graph.kernels import kernel_of, layer_of

ROUNDS, LEAST_ROUNDS, SECONDS = 31, 3, 1.0  # of a latency: at most, at least, and after which it is enough
IMAGES = 8


def relations(spaces: Sequence[ChannelSpace]) -> Iterator[dict[str, list[str]]]:
    """Of each space the layers whose filters move together with its pacesetter's, and the spaces that are made of it:
    those with the filters of a layer that reads it."""
    written = {space.name: dict.fromkeys(_layers(space, "out")) for space in spaces}
    for space in spaces:
        readers = set(_layers(space, "in"))
        yield {
            "together": [layer for layer in written[space.name] if layer != space.name],
            "read_by": [name for name, layers in written.items() if not readers.isdisjoint(layers)],
        }


def _layers(space: ChannelSpace, role: str) -> list[str]:
    """Paths of modules; a parameter of the network itself has its own name."""
    return [layer_of(path) or attribute for ref in space.refs if ref.role == role for path, attribute in ref.owners]


def params_by_space(model: nn.Module, spaces: Sequence[ChannelSpace], widths: Mapping[str, int]) -> dict[str, int]:
    """The parameters of the filters and vectors of each space; widths  {space name: now}."""
    counts = defaultdict(float)
    for space, ref, share in _shares(model, spaces, widths):
        tensor = _tensor(model, ref)
        counts[space.name] += share * tensor.numel() * isinstance(tensor, nn.Parameter)
    return {space.name: round(counts[space.name]) for space in spaces}


def of_modules(
    model: nn.Module, spaces: Sequence[ChannelSpace], widths: Mapping[str, int], values: Mapping[str, float]
) -> dict[str, float]:
    """What spaces cost, where modules cost {path: value}: a module's is that of the space of its filters, or parted
    among several by the number of theirs."""
    parts: dict[str, dict[tuple, list[tuple[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for space, ref, share in _shares(model, spaces, widths):
        parts[layer_of(ref.owners[0][0])][ref.owners[0][1], ref.dim].append((space.name, share))
    costs = dict.fromkeys((space.name for space in spaces), 0.0)
    for path, tensors in parts.items():
        for name, share in tensors.get(("weight", 0)) or next(iter(tensors.values())):
            costs[name] += share * values.get(path, 0.0)
    return costs


def _shares(
    model: nn.Module, spaces: Sequence[ChannelSpace], widths: Mapping[str, int]
) -> Iterator[tuple[ChannelSpace, Ref, float]]:
    """The tensors with a row for each channel of a space, and which part of their rows these are."""
    for space in spaces:
        for ref in space.refs:
            if ref.role in ("out", "follow"):
                rows = widths.get(space.name, space.size) * ref.index.size(1)
                yield space, ref, rows / _tensor(model, ref).size(ref.dim)


def _tensor(model: nn.Module, ref: Ref) -> Tensor:
    """As it is now, also after a cut."""
    path, attribute = ref.owners[0]
    return getattr(model.get_submodule(path), attribute)


def deviations(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> dict[str, float]:
    """‖W − ΓW‖ / ‖W‖ of each space that is cut: the largest of its tensors, running statistics included."""
    of_tensor = {tuple(t.owners): t for t in clustered_tensors(model, spaces, clusters)}
    found = {}
    for space in spaces:
        if space.name in clusters:
            held = [of_tensor[tuple(ref.owners)] for ref in space.refs if ref.role in ("out", "follow")]
            found[space.name] = max((t.relative_deviation() for t in held if t.tensor.is_floating_point()), default=0.0)
    return found


def latencies(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Any]:
    """Milliseconds of the modules with parameters of their own, and of the whole, in eval mode: medians of rounds in
    which the models take turns, for about a second.

    images  [n, …];  returns {model: {module path: milliseconds}}, the whole under ''
    """
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in models}
    started = time.perf_counter()
    with torch.inference_mode():
        for number in range(-1, ROUNDS):  # one round to warm up
            if number >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
                break
            for name, model in models.items():
                with _timed(model.eval(), images.is_cuda, parts=False) as whole:  # as hooks take time too
                    model(images)
                with _timed(model, images.is_cuda, parts=True) as found:
                    model(images)
                found |= whole
                for path, milliseconds in found.items() if number >= 0 else ():
                    times[name][path].append(milliseconds)
    return {name: {path: statistics.median(one) for path, one in paths.items()} for name, paths in times.items()}


@contextmanager
def _timed(model: nn.Module, is_cuda: bool, parts: bool) -> Iterator[dict[str, float]]:
    """What the model takes within, or each of its modules with parameters, all its calls together."""
    spent, began, hooks = defaultdict(float), {}, []

    def now() -> float:
        if is_cuda:
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def watch(path: str, module: nn.Module) -> None:
        def starts(*_) -> None:
            began[path] = now()

        def ends(*_) -> None:
            spent[path] += now() - began[path]

        hooks.extend((module.register_forward_pre_hook(starts), module.register_forward_hook(ends)))

    for path, module in model.named_modules():
        owns = next(module.parameters(recurse=False), None) is not None or kernel_of(module) is not None
        if (owns and layer_of(path) == path) if parts else path == "":
            watch(path, module)
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
