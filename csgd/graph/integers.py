"""Integers that modules hold, which may count channels."""

from collections.abc import Iterator, Sequence

from torch import nn

Integers = int | Sequence[int]


def integers_of(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(attribute, place, value) of each integer, and of those in tuples and lists of integers, that a module holds."""
    for attribute, value in vars(module).items():
        values = value if isinstance(value, tuple | list) else [value]
        if all(type(one) is int for one in values):
            yield from ((attribute, place, one) for place, one in enumerate(values))


def at_place(said: Integers, place: int) -> int:
    return said if isinstance(said, int) else said[place]


def replaced(said: Integers, place: int, value: int) -> Integers:
    """`said` with another value in one place; a single integer has one."""
    return value if isinstance(said, int) else type(said)([*said[:place], value, *said[place + 1 :]])


def like(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the class of the one at `path`, or of the module around it that is not torch's own."""
    while path and _is_torchs(type(model.get_submodule(path))):
        path = path.rpartition(".")[0]
    kind = type(model.get_submodule(path))
    if not _is_torchs(kind):
        yield from ((where, one) for where, one in model.named_modules() if type(one) is kind)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.")
