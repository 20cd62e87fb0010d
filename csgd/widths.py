"""Target widths: how many clusters each channel space gets."""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil, floor
from numbers import Integral, Real
from operator import itemgetter

from csgd.errors import InputError
from csgd.graph import ChannelSpace, conditions

log = logging.getLogger("csgd.widths")


def target_widths(
    spaces: list[ChannelSpace],
    deps: float | Sequence[int] | Mapping[str, float | int],
    *,
    min_width: int = 2,
    round_to: int = 1,
    keep: Sequence[str] = (),
    rest: float = 1.0,
    after: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Target width {space name: clusters} of every trimmable space.

    deps       a fraction in (0, 1] of every space, rounded down;
               a list of widths, one per layer (conv or linear that produces a trimmable space, in the order of the
               forward pass) or one per trimmable space;
               a mapping from layer-name patterns ('layer1.*.conv1') to a fraction (float) or a width (int), the last
               match wins, and spaces that no pattern matches get the fraction `rest`
    min_width  no width goes below it: a single channel breaks `squeeze()`
    round_to   fractions give the nearest multiple of it, the larger of two that are as near, the whole size at most
    keep       patterns of layers that stay whole
    after      the widths of an earlier cut of the same network, from which these are to be reached

    Where a condition of a space asks for clusters of one size, it gets the nearest width that these can have, the
    larger of two that are as near; of spaces that are tied the nearest together.  What so differs from `deps` is a
    warning in the log (csgd.widths).

    Widths count slots: in a grouped conv a slot holds one channel of each group.  InputError on a list of the wrong
    length, a width that is not in [min_width, size], layers of one space that disagree, a pattern that matches nothing.
    """
    how = dict(min_width=min_width, round_to=round_to, keep=keep, rest=rest, after=after)
    widths, told = fitting_widths(spaces, deps, **how)
    if told:
        more = f" and {len(told) - 4} more" if len(told) > 4 else ""
        log.warning("widths that clusters of one size can have: %s%s", ", ".join(told[:4]), more)
    return widths


def fitting_widths(
    spaces: list[ChannelSpace],
    deps: float | Sequence[int] | Mapping[str, float | int],
    *,
    min_width: int = 2,
    round_to: int = 1,
    keep: Sequence[str] = (),
    rest: float = 1.0,
    after: Mapping[str, int] | None = None,
) -> tuple[dict[str, int], list[str]]:
    """What `target_widths` returns, and what it tells of widths that differ from `deps`."""
    for name, value in (("min_width", min_width), ("round_to", round_to)):
        if not isinstance(value, Integral) or value < 1:
            raise InputError(f"deps.{name} must be a whole number of 1 or more, got {value!r}")
    live = [space for space in spaces if space.trimmable]
    if not live:
        why = "; ".join(f"{space.name}: {', '.join(space.pinned)}" for space in spaces[:5])
        none = "it calls no conv or linear function on a parameter of its own, as einsum and matmul are none"
        raise InputError(f"nothing in this network can be trimmed ({why or none})")
    if isinstance(keep, str):
        raise InputError(f"deps.keep must be a list of patterns, got the text {keep!r}")

    def fraction(space: ChannelSpace, value: float) -> int:
        if not 0 < value <= 1:
            raise InputError(f"a fraction of deps must be above 0 and at most 1, got {value:g}")
        if round_to > 1 and value < 1:
            nearest = floor(space.size * value / round_to + 0.5 + 1e-9) * round_to
            width = max(nearest, ceil(min_width / round_to) * round_to)
        else:
            width = max(floor(space.size * value + 1e-9), min_width)
        return min(space.size, width)

    if isinstance(deps, Mapping):
        widths = _by_pattern(spaces, live, deps, rest, fraction, min_width)
    elif isinstance(deps, Sequence) and not isinstance(deps, str):
        widths = _by_list(live, deps, min_width)
    elif isinstance(deps, Real) and not isinstance(deps, bool):
        widths = {space.name: fraction(space, float(deps)) for space in live}
    else:
        raise InputError(f"deps must be a fraction, a list of widths or a mapping, got {deps!r}")
    whole = [space for pattern in keep for space in _matching(spaces, pattern, "deps.keep")]
    widths |= {space.name: space.size for space in live if space in whole}
    return _of_one_size(live, widths, whole, min_width, after or {})


def _of_one_size(
    live: list[ChannelSpace],
    widths: dict[str, int],
    whole: list[ChannelSpace],
    min_width: int,
    after: Mapping[str, int],
) -> tuple[dict[str, int], list[str]]:
    """The widths, but the nearest that can be where clusters are to be of one size; says which are others."""
    told = []
    for together in conditions.tied(live):
        condition = conditions.one_size(together[0])
        if condition is None:
            continue
        made = together[0].size // after.get(together[0].name, together[0].size)  # size of the clusters so far
        narrowest = min(space.size for space in together if not space.of_heads)  # one head may be left
        sizes = [n for n in (1, *condition.sizes) if n % made == 0 and (n <= made or narrowest // n >= min_width)]
        if any(space in whole for space in together):
            sizes = sizes[:1]
        size = min(sizes, key=lambda n, tied=together: sum(abs(space.size / n - widths[space.name]) for space in tied))
        for space in together:
            width = space.size // size
            if width != widths[space.name]:
                told.append(f"{space.name} {width} of {space.size} ({widths[space.name]} asked for)")
            widths[space.name] = width
    return widths, told


def layers(space: ChannelSpace) -> list[str]:
    """Module paths of the layers that produce the channels of a space, the pacesetter first."""
    return list(dict.fromkeys(path for ref in space.producers for path, _ in ref.owners[:1]))


def _matching(spaces: list[ChannelSpace], pattern: str, key: str) -> list[ChannelSpace]:
    found = [space for space in spaces if any(fnmatchcase(name, pattern) for name in {space.name, *layers(space)})]
    if not found:
        names = ", ".join(dict.fromkeys(name for space in spaces[:4] for name in layers(space)[:1]))
        raise InputError(f"{key}: no layer matches '{pattern}' (layers are named like {names} …)")
    return found


def _width(space: ChannelSpace, value: int, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"deps: {where} must be a whole number, got {value!r}")
    least = min(least, space.size)
    if not least <= value <= space.size:
        raise InputError(
            f"deps: {where} must be between {least} (deps.min_width) and its {space.size} channels, got {value}"
        )
    return int(value)


def _by_list(live: list[ChannelSpace], deps: Sequence[int], min_width: int) -> dict[str, int]:
    producers = sorted(
        ((ref.order, ref.owners[0][0], space) for space in live for ref in space.producers), key=itemgetter(0)
    )
    if len(deps) == len(live):
        rows = [(space.name, space) for space in live]
    elif len(deps) == len(producers):
        rows = [(layer, space) for _, layer, space in producers]
    else:
        either = "" if len(producers) == len(live) else f" (in {len(live)} channel spaces)"
        raise InputError(
            f"deps.widths has {len(deps)} entries, the network has {len(producers)} trimmable layers{either}"
        )
    widths, first = {}, {}
    for value, (layer, space) in zip(deps, rows, strict=True):
        width = _width(space, value, f"the width of {layer}", min_width)
        if widths.setdefault(space.name, width) != width:
            raise InputError(
                f"deps: {first[space.name]} and {layer} share one channel space and must have one width, "
                f"got {widths[space.name]} and {width}"
            )
        first.setdefault(space.name, layer)
    return widths


def _by_pattern(spaces, live, deps: Mapping, rest: float, fraction, min_width: int) -> dict[str, int]:
    wanted: dict[str, dict[str, int]] = {space.name: {} for space in live}  # space -> layer -> width
    for pattern, value in deps.items():
        matched = _matching(spaces, pattern, "deps.layers")
        if not any(space.trimmable for space in matched):
            space = matched[0]
            raise InputError(f"deps.layers: '{pattern}' cannot be trimmed ({space.name}: {', '.join(space.pinned)})")
        for space in matched:
            if not space.trimmable:
                continue
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole and not isinstance(value, Real):
                raise InputError(f"deps.layers.{pattern} must be a fraction or a width, got {value!r}")
            width = _width(space, value, f"'{pattern}'", min_width) if whole else fraction(space, float(value))
            names = [name for name in layers(space) if fnmatchcase(name, pattern)] or layers(space)
            wanted[space.name] |= dict.fromkeys(names, width)
    widths = {}
    for space in live:
        if len(set(wanted[space.name].values())) > 1:
            pairs = ", ".join(f"{layer}: {width}" for layer, width in wanted[space.name].items())
            raise InputError(f"deps.layers: layers that share one channel space must have one width, got {pairs}")
        widths[space.name] = next(iter(wanted[space.name].values()), fraction(space, rest))
    return widths
