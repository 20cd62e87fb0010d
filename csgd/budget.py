"""Target widths from a budget: how narrow a network must be to cost a given fraction of what it costs."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from csgd.clusters import ClusteredTensor, cluster
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Inputs, conditions
from csgd.graph.twin import run, twin_of
from csgd.trim import cut
from csgd.widths import fitting_widths

Sensitivity = Mapping[str, Sequence[Sequence[float]]]
Price = Callable[[Mapping[str, int]], float]
WITHIN = 0.01  # of the dense network's cost
LEAST = 1e-9  # a fraction with which every space has its least width
HALVINGS = 12  # of the interval of fractions
ROUNDS = 15  # of a latency


@dataclass(frozen=True)
class Budget:
    """Widths that cost `cost` of the dense network's, where `least` is the lowest that can be reached.

    threshold  the change of the loss up to which spaces were narrowed, where they were by their sensitivity
    """

    widths: dict[str, int]
    cost: float
    least: float
    threshold: float | None = None


def budget_widths(
    model: nn.Module,
    spaces: list[ChannelSpace],
    example: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    sensitivity: Sensitivity | None = None,
    min_width: int = 2,
    round_to: int = 1,
    keep: Sequence[str] = (),
) -> Budget:
    """Target widths for `cluster` with which the network costs at most the given fraction of what it costs now.

    Every space gets one fraction of its width, the largest that fits.  By their `sensitivity` each is narrowed up to
    one change of the loss, the smallest that fits; below the narrowest widths that were measured, fractions are one
    again.  Then single spaces are widened where that still fits, so that multiply-accumulates and parameters come
    within a hundredth of the dense network's cost below the budget, where the network's widths allow it.

    macs, params, latency  the budget, one of them, above 0 and at most 1; latency is that of this machine in eval mode,
                           on `example`, and only as exact as its measurement
    sensitivity            as `csgd.sensitivity` measures it
    min_width, round_to, keep  as for `target_widths`

    InputError for none or several budgets, and for one that cannot be met, with the least that can.
    """
    given = {
        key: value for key, value in (("macs", macs), ("params", params), ("latency", latency)) if value is not None
    }
    if len(given) != 1:
        raise InputError(f"a budget is one of macs, params and latency, got {', '.join(given) or 'none'}")
    (what, wish) = next(iter(given.items()))
    if not 0 < wish <= 1:
        raise InputError(f"a budget of {what} must be above 0 and at most 1, got {wish:g}")
    price = PRICES[what](model, spaces, example)

    def widths_at(fraction: float) -> dict[str, int]:
        return fitting_widths(spaces, fraction, min_width=min_width, round_to=round_to, keep=keep)[0]

    def fits(widths: Mapping[str, int]) -> bool:
        return price(widths) <= wish

    narrowest = widths_at(LEAST)
    least = price(narrowest)
    if least > wish:
        raise InputError(
            f"a budget of {wish:g} of the {what} cannot be met: the least that can be reached is {least:.3f}"
        )
    steps = [] if sensitivity is None else steps_by(sensitivity, spaces, narrowest, round_to)
    dense, threshold = {space.name: space.size for space in spaces if space.name in narrowest}, None
    if steps and fits(_after(dense, steps)):
        taken = len(steps) - _most(len(steps), lambda undone: fits(_after(dense, steps[: len(steps) - undone])))
        widths, threshold = _after(dense, steps[:taken]), steps[taken - 1].change if taken else 0.0
        lacking = [space for step in reversed(steps[:taken]) for space in spaces if step.narrows(space, widths)]
    else:
        widths, lacking = _of_one_fraction(spaces, widths_at, fits, what != "latency")
    if what != "latency":
        widths = _widened(lacking, widths, round_to, price, wish)
    return Budget(widths, price(widths), least, threshold)


def least_cost(model: nn.Module, spaces: list[ChannelSpace], example: Any, what: str, **options: Any) -> float:
    """The least that a budget of macs, params or latency can be met with; options as for `budget_widths`."""
    return PRICES[what](model, spaces, example)(fitting_widths(spaces, LEAST, **options)[0])


@dataclass(frozen=True)
class Step:
    """One space, or those that are tied, narrower: {space name: width}, for a change of the loss.

    lost  the fraction of its channels that it then lacks
    """

    change: float
    lost: float
    widths: dict[str, int]

    def narrows(self, space: ChannelSpace, widths: Mapping[str, int]) -> bool:
        """Whether it is what made a space as narrow as `widths` say."""
        return self.widths.get(space.name) == widths.get(space.name)


def steps_by(
    sensitivity: Sensitivity, spaces: list[ChannelSpace], narrowest: Mapping[str, int], round_to: int
) -> list[Step]:
    """Every step that a space can be narrowed by, those of the smallest change of the loss first; of those of one
    change, those of the least fraction of its channels.

    Between two widths that were measured the change is on a straight line, and a narrower width never costs less.
    InputError where nothing is known of a space.
    """
    steps = []
    for together in conditions.tied(spaces):
        first = together[0]
        if first.name not in sensitivity:
            raise InputError(f"sensitivity: nothing is known of the space '{first.name}'")
        known = sorted([(first.size, 0.0), *map(tuple, sensitivity[first.name])], reverse=True)
        at, changes = [width for width, _ in known], np.maximum.accumulate([change for _, change in known])
        for widths in _narrowings(together, narrowest, round_to):
            width = widths[first.name]
            if width >= at[-1]:
                change = float(np.interp(width, at[::-1], changes[::-1]))
                steps.append(Step(change, 1 - width / first.size, widths))
    return sorted(steps, key=lambda step: (step.change, step.lost))


def _narrowings(together: list[ChannelSpace], narrowest: Mapping[str, int], round_to: int) -> Iterator[dict[str, int]]:
    """The widths that spaces which are tied can have, wider ones first, but for the whole."""
    condition = conditions.one_size(together[0])
    if condition is None:
        (space,) = together
        widths = range(space.size - 1, narrowest[space.name] - 1, -1)
        yield from ({space.name: width} for width in widths if width % round_to == 0)
        return
    for size in sorted(condition.sizes):
        widths = {space.name: space.size // size for space in together}
        if all(width >= narrowest[name] for name, width in widths.items()):
            yield widths


def _after(dense: Mapping[str, int], steps: Sequence[Step]) -> dict[str, int]:
    widths = dict(dense)
    for step in steps:
        widths |= step.widths
    return widths


def _of_one_fraction(
    spaces: list[ChannelSpace],
    widths_at: Callable[[float], dict[str, int]],
    fits: Callable[[Mapping[str, int]], bool],
    exact: bool,
) -> tuple[dict[str, int], list[ChannelSpace]]:
    """The widths at the largest fraction that fits, and the spaces, those first that lack most of it.

    exact  whether prices are, so that spaces of few widths, whose clusters must have one size, hold no others back
    """
    fraction, over = _largest(lambda one: fits(widths_at(one)), LEAST)
    widths = widths_at(fraction)
    if exact:
        stiff = {
            space.name: widths[space.name] for space in spaces if space.name in widths and conditions.one_size(space)
        }
        fraction, over = _largest(lambda one: fits(widths_at(one) | stiff), fraction)
        widths = widths_at(fraction) | stiff
    return widths, sorted(spaces, key=lambda space: widths.get(space.name, space.size) - over * space.size)


def _largest(fits: Callable[[float], bool], low: float) -> tuple[float, float]:
    """The largest fraction that fits, of which `low` is known to, and one just above it that does not, by halving."""
    if fits(1.0):
        return 1.0, 1.0
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def _widened(
    spaces: list[ChannelSpace], widths: dict[str, int], step: int, price: Price, wish: float
) -> dict[str, int]:
    """Spaces one step wider, the first ones first, as long as that fits.

    Then one space after the other as wide as that fits, those of most channels first, whose steps are the smallest.
    """

    def fits(wider: Mapping[str, int], now: Mapping[str, int]) -> bool:
        return price({**now, **wider}) <= wish

    free = [space for space in spaces if widths.get(space.name, space.size) + step <= space.size]
    left = free = [space for space in free if conditions.one_size(space) is None]
    while left and wish - price(widths) > WITHIN:
        wider = [(space.name, widths[space.name] + step) for space in left]
        most = _most(len(left), lambda count, wider=wider, now=widths: fits(dict(wider[:count]), now))
        widths = widths | dict(wider[:most])
        left = left[most + 1 :]  # the next one is too dear
    for space in sorted(free, key=lambda space: -space.size):
        if wish - price(widths) <= WITHIN:
            break
        wider = [{space.name: width} for width in range(widths[space.name], space.size + 1, step)]
        most = _most(len(wider) - 1, lambda count, wider=wider, now=widths: fits(wider[count], now))
        widths = widths | wider[most]
    return widths


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest of 0 … count that fits, by halving; 0 does."""
    low, high = 0, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _narrow(model: nn.Module, spaces: list[ChannelSpace], widths: Mapping[str, int]) -> nn.Module:
    """A copy of these widths; which channels are left does not matter for its cost."""
    twin = copy.deepcopy(model)
    cut(twin, spaces, cluster(twin, spaces, widths, "even"), narrowed=ClusteredTensor.kept)
    return twin


def _of_params(model: nn.Module, spaces: list[ChannelSpace], _: Any) -> Price:
    bare = _bare(model)
    whole = sum(p.numel() for p in bare.parameters())
    return lambda widths: sum(p.numel() for p in _narrow(bare, spaces, widths).parameters()) / whole


def _of_macs(model: nn.Module, spaces: list[ChannelSpace], example: Any) -> Price:
    """Counted on the meta device, without an arithmetic operation, where the network runs there."""
    shapes, inputs = _bare(model), Inputs.of(example).copied(lambda t: t.to("meta"))
    try:
        whole = _macs(shapes, inputs)
    except Exception:  # a constant that the network makes lies elsewhere, or a branch asks for a value
        shapes, inputs = twin_of(model), Inputs.of(example)
        whole = _macs(shapes, inputs)
    return lambda widths: _macs(_narrow(shapes, spaces, widths), inputs) / whole


def _bare(model: nn.Module) -> nn.Module:
    return twin_of(model).to("meta")


@torch.no_grad()
def _macs(model: nn.Module, inputs: Inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model.eval(), inputs)
    return counter.get_total_flops() // 2


def _of_latency(model: nn.Module, spaces: list[ChannelSpace], example: Any) -> Price:
    dense, inputs = twin_of(model).eval(), Inputs.of(example)

    def price(widths: Mapping[str, int]) -> float:
        narrow = _narrow(dense, spaces, widths).eval()
        ratios = [_seconds(narrow, inputs) / _seconds(dense, inputs) for _ in range(ROUNDS)]
        return statistics.median(ratios)

    return price


@torch.inference_mode()
def _seconds(model: nn.Module, inputs: Inputs) -> float:
    started = time.perf_counter()
    run(model, inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


PRICES = {"macs": _of_macs, "params": _of_params, "latency": _of_latency}
