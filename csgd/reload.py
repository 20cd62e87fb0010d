"""The narrow network again: a wide one takes the widths of a trimmed state_dict, once they are seen to fit."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from csgd.clusters import counted_channels, is_slot
from csgd.errors import InputError, line_of
from csgd.graph import ChannelSpace, Inputs, trace_spaces
from csgd.graph.integers import Integers, at_place, integers_of, replaced
from csgd.graph.kernels import kernel_of
from csgd.graph.twin import dotted, keep_random_state, tensors_in
from csgd.trial import pin_failures
from csgd.trim import depthwise_multipliers, fit_attributes, replace_data

SIZES = (8, 16, 28, 32, 64, 96, 128, 224, 256, 299)  # of images that networks are made for

Shapes = Mapping[str, torch.Size]


@torch.no_grad()
def load_trimmed(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, example=None, widths: Mapping[str, int] | None = None
) -> nn.Module:
    """Gives a freshly built wide `model` the widths of a trimmed state_dict, and loads it.

    The shapes in the state_dict are the table of widths: no plan file is needed.  They are checked against each other
    before anything of the model changes: within each layer, and between layers by the channel spaces of the wide
    network on an `example` (as `find_spaces` takes it, on the model's device).  Without one, copies of both networks
    are run without data, on inputs that fit a layer of the wide one, as far as it takes any; not where it has hooks.

    Integers that modules hold to say where parts of the channels lie follow.  Where shapes alone do not say how many
    are left of each part, or whether of an attention there are fewer heads or smaller ones, `widths` does, {space name:
    width} as `target_widths` returns them.

    Parameters and buffers stay the objects that they are.  A buffer that the network leaves out of its state_dict, and
    this one holds since a cut has changed it, is in it from then on.

    InputError if keys are missing, left over, of another kind or number of dims or wider than the model's, or if the
    shapes do not fit together.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(f"a state_dict maps names to tensors, got a {type(state_dict).__name__}")
    _check_widths(widths)
    with _saving(model, state_dict):
        return _load_trimmed(model, state_dict, example, widths)


@contextmanager
def _saving(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the state_dict of a network hold the buffers that it leaves out and this one does not, as after a cut; not
    where that raises."""
    held = [
        (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and dotted(path, name) in state_dict
    ]
    for module, name in held:
        module._non_persistent_buffers_set.discard(name)
    try:
        yield
    except BaseException:
        for module, name in held:
            module._non_persistent_buffers_set.add(name)
        raise


def _load_trimmed(
    model: nn.Module, state_dict: Mapping[str, Tensor], example: Any, widths: Mapping[str, int] | None
) -> nn.Module:
    own = model.state_dict(keep_vars=True)
    _check_keys(model, own, state_dict)
    versioned = OrderedDict(state_dict)  # some modules ask for their version, which files of safetensors do not hold
    versioned._metadata = getattr(state_dict, "_metadata", own._metadata)
    tensors = {key: old for key, old in own.items() if isinstance(old, Tensor)}
    shapes = {key: state_dict[key].shape for key in tensors}
    narrowed = {id(old): shapes[key] for key, old in tensors.items() if shapes[key] != old.shape}
    if narrowed:
        for path, module in model.named_modules():
            _check_layer(path, module, narrowed)
        if example is not None:
            spaces = _check_spaces(model, shapes, example)
        if example is None and not (spaces := _spaces_on_any(model)):
            _refuse_integers(model, narrowed)
    counted = _counted_in(model, shapes, spaces, widths) if narrowed else {}
    if narrowed:
        more = partial(_counted_by_trial, model, shapes, spaces, widths)
        followed = _check_run(model, versioned, narrowed, shapes, example, counted, more)
        if example is not None and not followed and _holds_widths(model, narrowed, counted):
            with suppress(InputError):  # on inputs of odd sizes, of which `view(-1, int(self.dim))` makes no whole
                followed = _check_run(model, versioned, narrowed, shapes, None, counted, more)
        counted |= followed

    changed = list(_touched(model.modules(), narrowed))
    multipliers = depthwise_multipliers(model)
    for old in {id(old): old for old in tensors.values() if id(old) in narrowed}.values():
        # In the layout of a cut in place: another one would round otherwise (fact F10).
        form = torch.contiguous_format if old.is_contiguous() or old.dim() != 4 else torch.channels_last
        empty = torch.empty(narrowed[id(old)], dtype=old.dtype, device=old.device, memory_format=form)
        replace_data(old, empty)
    fit_attributes(changed, multipliers)
    for (path, attribute), value in counted.items():
        setattr(model.get_submodule(path), attribute, value)
    model.load_state_dict(versioned)
    return model


def _check_widths(widths: Mapping[str, int] | None) -> None:
    if not isinstance(widths, Mapping | None):
        raise InputError(f"widths must be a mapping {{space name: width}}, got {type(widths).__name__}")
    for name, width in (widths or {}).items():
        if not is_slot(width) or width < 1:
            raise InputError(f"widths.{name} must be a whole number of 1 or more, got {width!r}")


def _touched(modules: Iterable[nn.Module], narrowed: Mapping[int, torch.Size]) -> Iterator[nn.Module]:
    """The modules that own a tensor which is narrowed."""
    for module in modules:
        own = (*module._parameters.values(), *module._buffers.values(), kernel_of(module))
        if any(id(tensor) in narrowed for tensor in own):
            yield module


def _check_keys(model: nn.Module, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Each tensor by itself, and tied ones by pairs."""
    other = "weights of another architecture"
    if own.keys() != state_dict.keys():
        missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        raise InputError(f"{other}: missing {missing[:3]}, left over {extra[:3]}")
    held = {id(tensor) for module in model.modules() for tensor in _tensors_of(module).values()}
    first: dict[int, str] = {}
    for key, old in own.items():
        new = state_dict[key]
        if not isinstance(old, Tensor):  # what a module's get_extra_state returns
            continue
        if is_lazy(old):
            raise InputError(f"{key} of the model has no shape yet; call the model once on an example")
        if old.is_meta:
            raise InputError(f"{key} of the model is on the meta device and takes no values; make the model on the CPU")
        if not isinstance(new, Tensor):
            raise InputError(f"{other}: {key} is a {type(new).__name__}, a tensor of {list(old.shape)} is wanted")
        if new.is_meta or new.is_quantized or new.layout is not torch.strided:
            kind = "on the meta device" if new.is_meta else "quantised" if new.is_quantized else "sparse"
            raise InputError(f"{other}: {key} is {kind}, a dense tensor with values is wanted")
        fits = old.dim() == new.dim() and all(0 < b <= a or a == b for a, b in zip(old.shape, new.shape, strict=True))
        if not fits:
            raise InputError(f"{other}: {key} is {list(new.shape)}, at most {list(old.shape)} fit")
        if (old.is_floating_point(), old.is_complex()) != (new.is_floating_point(), new.is_complex()):
            raise InputError(f"{other}: {key} is of {new.dtype}, {old.dtype} is wanted")
        if new.shape != old.shape and id(old) not in held:
            raise InputError(f"{key} is computed by the model and cannot be narrowed to {list(new.shape)}")
        tied = first.setdefault(id(old), key)
        if tied != key and not _equal(state_dict[tied], new):
            raise InputError(f"{other}: {tied} and {key} are one tensor in the model, and two different ones here")


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in {**module._buffers, **module._parameters}.items() if tensor is not None}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b.to(a.device), 0, 0, equal_nan=True)


def _check_layer(path: str, module: nn.Module, narrowed: Mapping[int, torch.Size]) -> None:
    """The tensors of one layer fit each other, if they did so before."""
    if not any(_touched([module], narrowed)) or _misfit(module) or parametrize.is_parametrized(module):
        return
    layer = type(module).__new__(type(module))
    layer.__dict__ = {**module.__dict__, "_parameters": {}, "_buffers": {}}
    for name, tensor in _tensors_of(module).items():
        store = layer._parameters if name in module._parameters else layer._buffers
        store[name] = torch.empty(narrowed.get(id(tensor), tensor.shape), device="meta")
    fit_attributes([layer], depthwise_multipliers(layer))
    if misfit := _misfit(layer):
        name, wanted = misfit
        dot = f"{path}." if path else ""
        beside = [
            f"{dot}{other} is {list(tensor.shape)}" for other, tensor in _tensors_of(layer).items() if other != name
        ]
        raise InputError(
            f"weights that do not fit together: {dot}{name} is {list(_tensors_of(layer)[name].shape)}, its layer "
            f"takes {list(wanted)}{f' where {beside[-1]}' if beside else ''}"
        )


def _misfit(layer: nn.Module) -> tuple[str, tuple[int, ...]] | None:
    """The first tensor of a layer that has another shape than the layer's attributes ask for, and that shape."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        groups = max(layer.groups, 1)
        outer, inner = layer.out_channels // groups, layer.in_channels // groups
        rows, columns = (inner, outer) if layer.transposed else (outer, inner)
        asked = {"weight": (rows * groups, columns, *layer.kernel_size), "bias": (outer * groups,)}
    elif isinstance(layer, nn.Linear):
        asked = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        asked = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (layer.num_features,))
    elif isinstance(layer, nn.GroupNorm):
        asked = dict.fromkeys(("weight", "bias"), (layer.num_channels // layer.num_groups * layer.num_groups,))
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        asked = dict.fromkeys(("weight", "bias"), tuple(layer.normalized_shape))
    elif isinstance(layer, nn.MultiheadAttention):
        width, own = layer.embed_dim, (layer.embed_dim, layer.kdim, layer.vdim)
        asked = {f"{one}_proj_weight": (width, reads) for one, reads in zip("qkv", own, strict=True)}
        asked |= {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    elif isinstance(layer, nn.Embedding):
        asked = {"weight": (layer.num_embeddings, layer.weight.size(1))}
    else:
        return None
    tensors = _tensors_of(layer)
    odd = (name for name, shape in asked.items() if name in tensors and tensors[name].shape != shape)
    return next(((name, asked[name]) for name in odd), None)


def _check_spaces(model: nn.Module, shapes: Shapes, example) -> list[ChannelSpace]:
    """Every channel space of the wide network keeps as many slots in each tensor that its slots index.

    A dim that several spaces share, as of a concatenation, keeps the sum; one that no space indexes keeps its size.
    Returns the spaces.
    """
    try:
        spaces = trace_spaces(model, example)
    except InputError as error:
        taken = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(example))
        raise InputError(f"the wide network cannot take the example of {taken}: {error}") from None
    names, slots, parts = {}, defaultdict(int), defaultdict(dict)
    in_heads = {(dotted(*owner), ref.dim) for s in spaces if s.of_heads for ref in s.refs for owner in ref.owners}
    for space in spaces:
        rows = defaultdict(list)  # one head's qkv has some as keys, others as values
        for ref in space.refs:
            for key in (dotted(*owner) for owner in ref.owners):
                if key in shapes and (key, ref.dim) not in in_heads:  # of these `_of_attention` tells what is left
                    rows[key, ref.dim].append(ref.index)
        uses = [(*use, torch.cat(some, 1).unique().numel() // space.size) for use, some in rows.items()]
        alike = tuple(uses)  # a space of which some slots are pinned is listed in two parts
        names.setdefault(alike, space.name)
        slots[alike] += space.size
        for key, dim, lanes in uses:
            parts[key, dim][alike] = lanes
    own = model.state_dict()
    kept: dict[tuple, tuple[int, str]] = {}
    left = {(key, dim): parts[key, dim] for key, shape in shapes.items() for dim in range(len(shape))}
    left = {use: lanes for use, lanes in left.items() if use not in in_heads}
    while left:
        ready = [use for use, lanes in left.items() if sum(alike not in kept for alike in lanes) <= 1]
        if not ready:  # dims of several spaces each: their sums alone say no more
            return spaces
        for key, dim in ready:
            lanes = left.pop((key, dim))
            before, size = own[key].size(dim), shapes[key][dim]
            if not lanes:
                if size != before:
                    raise InputError(
                        f"weights that do not fit together: {key} is {list(shapes[key])}, its dim {dim} stays {before}"
                    )
                continue
            last = next((alike for alike in lanes if alike not in kept), next(reversed(lanes)))
            others = {alike: n for alike, n in lanes.items() if alike != last}
            rest = before - sum(slots[alike] * n for alike, n in lanes.items())
            width = (size - rest - sum(kept[alike][0] * n for alike, n in others.items())) / lanes[last]
            says = f"{key} of {list(shapes[key])} keeps {width:g} of the {slots[last]} channels of '{names[last]}'"
            if last in kept and width != kept[last][0]:
                known, by = kept[last]
                raise InputError(f"weights that do not fit together: {by} of {list(shapes[by])} keeps {known}, {says}")
            if not (width.is_integer() and 1 <= width <= slots[last]):
                among = "".join(f", {kept[alike][1]} of {list(shapes[kept[alike][1]])} others" for alike in others)
                raise InputError(f"weights that do not fit together: {says}{among}")
            kept.setdefault(last, (int(width), key))
    return spaces


def _counted(
    model: nn.Module, shapes: Shapes, spaces: list[ChannelSpace], widths: Mapping[str, int]
) -> dict[tuple[str, str], Integers]:
    """{(module path, attribute): value} of the integers that count channels in these spaces of the wide network, as
    they are in one of these shapes."""
    if not any(ref.role == "size" for space in spaces for ref in space.refs):
        return {}
    kept = {space.name: space.size if space.pinned else widths.get(space.name) for space in spaces}
    sums, own = defaultdict(list), model.state_dict()
    for space in spaces:
        for ref in space.refs:
            for key in (dotted(*owner) for owner in ref.owners if ref.role != "size"):
                if key in shapes:
                    sums[key, ref.dim].append((space, ref.index.size(1)))
    before = None
    while before != kept:
        before = dict(kept)
        for (key, dim), terms in sums.items():
            left = [(space, lanes) for space, lanes in terms if kept[space.name] is None]
            lost = own[key].size(dim) - shapes[key][dim]
            lost -= sum(
                (space.size - kept[space.name]) * lanes for space, lanes in terms if kept[space.name] is not None
            )
            for space, lanes in left if len(left) == 1 or not lost else ():
                kept[space.name] = space.size - lost // lanes
            counted = any(ref.role == "size" for space, _ in terms for ref in space.refs)
            if lost and not left and counted:
                told = f"{abs(lost)} {'more' if lost > 0 else 'fewer'} channel{'s' if abs(lost) > 1 else ''}"
                raise InputError(f"widths that do not fit: {key} of {list(shapes[key])} has lost {told} than they say")
    counts: dict[tuple[str, str], Integers] = {}
    for space in spaces:
        for ref in (ref for ref in space.refs if ref.role == "size"):
            ((path, attribute),) = ref.owners
            if kept[space.name] is None and model.get_submodule(path) not in _own_code(model):
                continue
            if kept[space.name] is None:
                name = dotted(path, attribute)
                raise InputError(
                    f"{name} counts channels of '{space.name}', and shapes alone do not say how many are left: "
                    "give widths"
                )
            said = counts.get((path, attribute), getattr(model.get_submodule(path), attribute))
            now = at_place(said, ref.dim) - (space.size - kept[space.name]) * ref.index.size(1)
            counts[path, attribute] = replaced(said, ref.dim, now)
    return counts


def _spaces_on_any(model: nn.Module) -> list[ChannelSpace]:
    """The spaces of a wide network, whose modules hold integers, on the first input that it takes."""
    holds = any(True for module in _own_code(model) for _ in integers_of(module))
    holds |= any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    hooked = any(_has_hooks(module) for module in model.modules())  # which may reach what is the user's
    for inputs in _inputs_for(model) if holds and not hooked else ():
        with suppress(InputError):
            return trace_spaces(model, _zeros(inputs, model), itself=False)
    return []


def _refuse_integers(model: nn.Module, narrowed: Mapping[int, torch.Size]) -> None:
    """InputError if a module holds an integer that may say where channels lie, on which no input could shed light."""
    pairs = [
        (tensor.shape, narrowed[id(tensor)])
        for tensor in model.state_dict(keep_vars=True).values()
        if id(tensor) in narrowed
    ]
    widest = max(old for wide, narrow in pairs for old, new in zip(wide, narrow, strict=True) if old != new)
    paths = {id(module): path for path, module in model.named_modules()}
    for module in _own_code(model):
        for attribute, _, value in integers_of(module):
            if 1 < value <= widest:
                raise InputError(
                    f"{dotted(paths[id(module)], attribute)} = {value} may count channels that the cut has left fewer "
                    "of, and no input was found that the network takes: give an example"
                )


def _holds_widths(
    model: nn.Module, narrowed: Mapping[int, torch.Size], counted: Mapping[tuple[str, str], Integers]
) -> bool:
    """Whether a module of the network's own holds an integer that is a width which is no more, and that stays."""
    tensors = (
        tensor for module in model.modules() for tensor in _tensors_of(module).values() if id(tensor) in narrowed
    )
    gone = {old for t in tensors for old, new in zip(t.shape, narrowed[id(t)], strict=True) if old != new}
    paths = {id(module): path for path, module in model.named_modules()}
    held = ((paths[id(module)], *one) for module in _own_code(model) for one in integers_of(module))
    return any(value in gone and (path, attribute) not in counted for path, attribute, _, value in held)


def _own_code(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not type(module).__module__.startswith("torch.")]


def _counted_in(
    model: nn.Module, shapes: Shapes, spaces: list[ChannelSpace], widths: Mapping[str, int] | None
) -> dict[tuple[str, str], Integers]:
    """The same, of those that count heads and their dims too."""
    places = {(tuple(ref.owners), ref.dim) for s in spaces if s.of_heads for ref in s.refs if ref.role != "size"}
    inside = [s for s in spaces if any((tuple(r.owners), r.dim) in places for r in s.refs if r.role != "in")]
    others = [space for space in spaces if space not in inside]
    return _counted(model, shapes, others, widths or {}) | _of_attention(model, shapes, inside, widths)


def _of_attention(
    model: nn.Module, shapes: Shapes, spaces: list[ChannelSpace], widths: Mapping[str, int] | None
) -> dict[tuple[str, str], Integers]:
    """{(module path, attribute): value} of the integers that count heads and their dims.

    InputError where these have become fewer in a way that neither shapes nor `widths` tell.
    """
    clusters: dict[str, list[list[int]]] = {}
    of = {space.name: space for space in spaces}
    for heads in [space for space in spaces if space.of_heads]:
        places = {(tuple(ref.owners), ref.dim): ref for ref in heads.refs if ref.role != "size"}
        beside = [
            space
            for space in spaces
            if not space.of_heads and any((tuple(ref.owners), ref.dim) in places for ref in space.refs)
        ]
        left: dict[
            str, tuple[Fraction, str]
        ] = {}  # of the dims of each space: what share of all heads' is, by which tensor
        for dims in beside:
            shared = [ref for ref in dims.refs if (tuple(ref.owners), ref.dim) in places]
            shared = [ref for ref in shared if ref.index.numel() == ref.extent] or shared  # not beside others in a cat
            keeps = {
                dotted(*ref.owners[0]): Fraction(shapes[dotted(*ref.owners[0])][ref.dim], ref.extent) for ref in shared
            }
            first, part = next(iter(keeps.items()))
            if odd := next((key for key in keeps if keeps[key] != part), None):
                both = " and ".join(f"{key} of {list(shapes[key])}" for key in (first, odd))
                raise InputError(f"weights that do not fit together: {both} keep other shares of '{dims.name}'")
            left[dims.name] = part, first
        known = {s.name: s.size for s in (heads, *beside) if not s.trimmable or left.get(s.name, (0,))[0] == 1}
        if any(part == 1 for part, _ in left.values()):
            known[heads.name] = heads.size
        known |= {name: Fraction(width) for name, width in (widths or {}).items() if name in (heads.name, *left)}
        for dims in (*beside, *beside):  # what one tells of the heads another may need
            for one, other in ((heads, dims), (dims, heads)):
                if one.name in known and other.name not in known:
                    known[other.name] = left[dims.name][0] * other.size * one.size / known[one.name]
        for dims in beside:
            part, key = left[dims.name]
            of_both = [known.get(space.name) for space in (heads, dims)]
            if None in of_both or not all(Fraction(width).denominator == 1 for width in of_both):
                raise InputError(
                    f"{key} of {list(shapes[key])} may be of fewer heads or of smaller ones: "
                    f"widths={{'{heads.name}': …, '{dims.name}': …}} tells"
                )
            if of_both[0] * of_both[1] != part * heads.size * dims.size:
                told = f"widths '{heads.name}': {of_both[0]} and '{dims.name}': {of_both[1]}"
                raise InputError(f"{told} do not fit {key} of {list(shapes[key])}")
        clusters |= {name: _so_many(of[name].size, int(width)) for name, width in known.items()}
    free = {name: parts for name, parts in clusters.items() if of[name].trimmable}
    paths = {id(module): path for path, module in model.named_modules()}
    counts = counted_channels(model, spaces, free)
    return {(paths[id(module)], attribute): value for (module, attribute), value in counts.items()}


def _so_many(size: int, width: int) -> list[list[int]]:
    """Any clusters, of that number."""
    return [[*range(size - width + 1)], *([slot] for slot in range(size - width + 1, size))]


def _check_run(
    model: nn.Module,
    state_dict: OrderedDict,
    narrowed: Mapping[int, torch.Size],
    shapes: Shapes,
    example,
    counted: Mapping[tuple[str, str], Integers],
    more: Callable[[Any], dict[tuple[str, str], Integers]],
) -> dict[tuple[str, str], Integers]:
    """The narrow network takes what the wide one takes: both are run without data, as far as they can be.

    {(module path, attribute): value} of the integers that must follow the cut for that: `more` of an example.
    """
    followed: dict[tuple[str, str], Integers] = {}
    try:
        wide, narrow = _without_data(model, {}), _without_data(model, narrowed)
    except Exception:  # a model that cannot be copied
        return followed
    for (path, attribute), value in counted.items():
        setattr(narrow.get_submodule(path), attribute, value)
    weights, held = copy.copy(state_dict), narrow.state_dict()  # scripted modules keep their tensors where they are
    weights.update((key, value.to(held[key].device)) for key, value in state_dict.items() if isinstance(value, Tensor))
    try:
        narrow.load_state_dict(weights)
    except Exception as error:  # whatever a module of the user's raises when it is loaded
        raise InputError(f"the weights cannot be loaded: {line_of(error)}") from None
    if any(_has_hooks(module) for module in model.modules()):  # they may reach what is the user's
        return followed
    for inputs in _inputs_for(model) if example is None else [example]:
        try:
            _run(wide, inputs)
        except Exception:  # not an input of this network
            continue
        while True:
            try:
                _run(narrow, inputs)
            except Exception as error:  # whatever a network raises whose layers do not fit together
                if not followed and (followed := more(_zeros(inputs, model) if example is None else inputs)):
                    for (path, attribute), value in followed.items():
                        setattr(narrow.get_submodule(path), attribute, value)
                    continue
                if example is None:
                    _check_spaces(model, shapes, _zeros(inputs, model))  # names the tensors
                raise InputError(f"weights that do not fit together: {line_of(error)}") from None
            if example is None and _may_broadcast(model, shapes):
                _check_spaces(model, shapes, _zeros(inputs, model))
            return followed
    return followed


def _zeros(inputs: Tensor, model: nn.Module) -> Tensor:
    return torch.zeros_like(inputs, device=next((tensor.device for tensor in model.parameters()), None))


def _may_broadcast(model: nn.Module, shapes: Shapes) -> bool:
    """Whether one channel is left of several: torch adds it to any number of others, which means something else."""
    own = model.state_dict()
    pairs = (pair for key, shape in shapes.items() for pair in zip(own[key].shape, shape, strict=True))
    return any(new == 1 < old for old, new in pairs)


def _counted_by_trial(
    model: nn.Module, shapes: Shapes, spaces: list[ChannelSpace], widths: Mapping[str, int] | None, example: Any
) -> dict[tuple[str, str], Integers]:
    """The same, of those too that are taken to be widths since a cut makes their modules raise, as by `find_spaces`."""
    tried, pinned = copy.deepcopy(spaces), {space.name: space.pinned for space in spaces}
    with suppress(InputError):  # what cannot be tried
        pin_failures(model, tried, example)
    for space in tried:  # by another example, or for other outputs, it may have been free
        space.pinned = pinned[space.name]
    return _counted_in(model, shapes, tried, widths)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _without_data(model: nn.Module, narrowed: Mapping[int, torch.Size]) -> nn.Module:
    """A copy of shapes alone, of these where they are given."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(narrowed.get(id(tensor), tensor.shape), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(model, memo)
    pairs = zip(model.modules(), copied.modules(), strict=True)
    changed = [twin for module, twin in pairs if any(_touched([module], narrowed))]
    fit_attributes(changed, depthwise_multipliers(copied))
    return copied.eval()


def _run(model: nn.Module, inputs) -> None:
    given = Inputs.of(inputs).copied(lambda t: torch.empty_like(t, device="meta"))
    with torch.device("meta"), keep_random_state(model):
        model(*given.args, **given.kwargs)


def _inputs_for(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that one of the layers takes, without data, beginning with the first layer; of odd numbers, of which a
    view of half as many channels makes no whole."""
    tried = set()
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            dims = len(layer.kernel_size)
            shapes = [(3, layer.in_channels, *[size] * dims) for size in SIZES]
        elif isinstance(layer, nn.Linear):
            shapes = [(3, layer.in_features), (3, 7, layer.in_features)]
        elif isinstance(layer, nn.Embedding):
            shapes = [(3, 7)]
        else:
            continue
        dtype = torch.long if isinstance(layer, nn.Embedding) else layer.weight.dtype
        for shape in shapes:
            if (shape, dtype) not in tried:
                tried.add((shape, dtype))
                yield torch.empty(shape, dtype=dtype, device="meta")
