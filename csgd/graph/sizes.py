"""Integers that know what they were computed from: widths of activations, and integers that modules hold."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from csgd.graph.integers import integers_of, replaced
from csgd.graph.ledger import Ledger


@dataclass(frozen=True)
class Held:
    """An integer of a module, or an entry of a tuple of them."""

    path: str
    attribute: str
    place: int
    value: int


@dataclass(frozen=True, eq=False)
class Width:
    """The number of channels along a dim of an activation."""

    ledger: Ledger
    atoms: Tensor

    @property
    def value(self) -> int:
        return len(self.atoms)


Source = Held | Width


class Size(int):
    """An integer with the sum Σ factor · source + rest that it is; any other arithmetic gives a plain integer."""

    terms: dict[Source, Fraction]

    @classmethod
    def of(cls, value: int, terms: dict[Source, Fraction]) -> int:
        terms = {source: factor for source, factor in terms.items() if factor}
        if not terms:
            return int(value)
        size = cls(value)
        size.terms = terms
        return size

    @property
    def of_width(self) -> bool:
        return any(isinstance(source, Width) for source in self.terms)

    @property
    def is_held(self) -> bool:
        """Whether it is just what a module holds."""
        return any(isinstance(s, Held) and f == 1 and s.value == self for s, f in self.terms.items())

    def __reduce__(self):
        return int, (int(self),)

    def __add__(self, other):
        if not isinstance(other, int):
            return NotImplemented
        terms = dict(self.terms)
        for source, factor in terms_of(other).items():
            terms[source] = terms.get(source, 0) + factor
        return Size.of(int(self) + int(other), terms)

    __radd__ = __add__

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -other if isinstance(other, int) else NotImplemented

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        if not isinstance(other, int):
            return int(self) * other
        if isinstance(other, Size) and other > self:  # the smaller one counts how often
            return other * int(self)
        return Size.of(int(self) * int(other), {source: factor * int(other) for source, factor in self.terms.items()})

    __rmul__ = __mul__

    def __floordiv__(self, other):
        if not isinstance(other, int) or not other or int(self) % int(other):
            return int(self) // other
        return Size.of(int(self) // int(other), {source: factor / int(other) for source, factor in self.terms.items()})


def terms_of(number: int) -> dict[Source, Fraction]:
    return number.terms if isinstance(number, Size) else {}


def hold(model: nn.Module) -> None:
    """Lets the integers of a network's own modules (a copy's) know whose they are, in place."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule):
            continue
        for attribute, place, value in list(integers_of(module)):
            said = vars(module)[attribute]
            if value > 1 and not hasattr(said, "_fields"):
                size = Size.of(value, {Held(path, attribute, place, value): Fraction(1)})
                if isinstance(said, list):
                    said[place] = size
                else:
                    vars(module)[attribute] = size if isinstance(said, int) else replaced(said, place, size)


def measured(ledger: Ledger, tensor: Tensor, shape: torch.Size) -> torch.Size:
    """The shape of an activation, of which the numbers of channels know the channels."""
    labels = ledger.known(tensor)
    if labels is None:
        return shape
    sizes = list(shape)
    for dim in ledger.apart(labels):
        sizes[dim] = Size.of(shape[dim], {Width(ledger, row(labels, dim)): Fraction(1)})
    return torch.Size(sizes)


def row(labels: Tensor, dim: int) -> Tensor:
    """One atom for each position along a dim; those beside it, along other dims, are of the same slots."""
    return labels.movedim(dim, 0).reshape(labels.size(dim), -1)[:, 0] if labels.numel() else labels.reshape(-1)


def channels_of(ledger: Ledger, number: int) -> Tensor | None:
    """Atoms along a dim that is made so long: the channels whose width it is, or new ones that a module's integer
    counts, or those that one counts more than another; None for any other number."""
    terms = terms_of(number)
    if (parts := _whole_and_part(number)) is not None:
        atoms = ledger.fresh(parts[0].value)
        _follows(ledger, parts[0], Fraction(1), atoms)
        _follows(ledger, parts[1], Fraction(1), atoms[: parts[1].value])
        return atoms[parts[1].value :]
    if len(terms) != 1:
        return None
    ((source, factor),) = terms.items()
    if factor != 1 or source.value != number:
        return None
    if isinstance(source, Width):
        return source.atoms if source.ledger is ledger else None
    atoms = ledger.fresh(source.value)
    _follows(ledger, source, factor, atoms)
    return atoms


def _whole_and_part(number: int) -> tuple[Held, Held] | None:
    """The two integers of modules of which a number is the difference, the larger one first; None for any other."""
    of = {factor: source for source, factor in terms_of(number).items() if isinstance(source, Held)}
    if len(terms_of(number)) != 2 or of.keys() != {1, -1} or of[1].value - of[-1].value != number or number < 1:
        return None
    return of[Fraction(1)], of[Fraction(-1)]


def width_of(ledger: Ledger, number: int) -> Tensor | None:
    """The channels whose width a number is, or one of equal parts of it; None for any other number."""
    terms = terms_of(number)
    width = next(iter(terms), None) if len(terms) == 1 else None
    if not isinstance(width, Width) or width.ledger is not ledger:
        return None
    return width.atoms if terms[width].numerator == 1 and terms[width] * width.value == number else None


def count(ledger: Ledger, number: int, atoms: Tensor, whole: Tensor, by: str) -> None:
    """Notes that a number says how many channels `atoms` are, of those of `whole`, so that it still does when they are
    cut: integers of modules follow; what is computed from a width asks that its parts lose equally many.  Pins what
    the number cannot follow.
    """
    terms = terms_of(number) if len(atoms) else {}
    rest = int(number) - sum(factor * source.value for source, factor in terms.items())
    if any(isinstance(source, Width) and source.ledger is not ledger for source in terms):
        terms, rest = {}, int(number)
    full = next((source for source, f in terms.items() if f == 1 and source.value == len(whole)), None)
    if full is not None and len(terms) + bool(rest) > 1:  # all but some: these are counted by the others
        _follows(ledger, full, Fraction(1), whole)
        atoms = whole[~torch.isin(whole, atoms)]
        terms, rest = {source: -factor for source, factor in terms.items() if source is not full}, -rest
    for source, factor in terms.items():
        n = int(factor * source.value)
        if n <= 0 or n > len(atoms):
            break
        _follows(ledger, source, factor, atoms[:n])
        atoms = atoms[n:]
    if len(atoms):
        reason = "picks channels by a number that is typed in: an attribute or the width frees it"
        ledger.pin_picked(whole, f"{by}: {reason}", atoms)


def _follows(ledger: Ledger, source: Source, factor: Fraction, atoms: Tensor) -> None:
    """Ties a source and the channels of which there are factor × source."""
    equal = atoms.view(factor.numerator, -1)
    ledger.clustered_alike(equal)
    counted = equal[0].repeat(factor.denominator)
    if isinstance(source, Width):
        chunks = source.atoms.view(factor.denominator, -1)
        ledger.clustered_alike(chunks)
        earlier = chunks[0]
    else:
        earlier = ledger.sizes.setdefault((source.path, source.attribute, source.place), counted)
    ledger.alike(earlier, counted[: len(earlier)])
