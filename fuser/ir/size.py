"""Sizes that are known late: polynomials of named sizes, with integer coefficients, and quotients of them.

Everything that has sizes (specs, extents, slots, plans) holds plain integers where they are known, and a
:class:`Size` where they depend on a named one. Arithmetic with both gives an integer again where it can.
:mod:`fuser.ir.binding` puts numbers in their place.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fuser.ir.errors import FuserError

if TYPE_CHECKING:
    _Base = int  # so that a size may stand wherever an integer may
else:
    _Base = object


class UndecidedSizeError(FuserError):
    """A decision was asked for that depends on what a named size will be."""


@dataclass(frozen=True)
class Name:
    """A named size between ``low`` and ``high``, both included; None: without an end.

    Sizes of one are other programs, since they broadcast: ``low`` is two unless it is known that nothing does.
    """

    name: str
    low: int = 2
    high: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Quotient:
    """``numerator`` over ``denominator``, rounded down."""

    numerator: Size | int
    denominator: Size | int

    @property
    def low(self) -> int | None:
        return self._ends[0]

    @property
    def high(self) -> int | None:
        return self._ends[1]

    @functools.cached_property
    def _ends(self) -> Bounds:
        (a, b), (c, d) = bounds(self.numerator), bounds(self.denominator)
        if c is None or c <= 0:
            return None, None
        low = None if a is None else a // c if a < 0 else 0 if d is None else a // d
        high = None if b is None else b // c if b >= 0 else -1 if d is None else b // d
        return low, high

    def __str__(self) -> str:
        return f"({self.numerator} // {_factor(self.denominator)})"


@dataclass(frozen=True)
class Maximum:
    """The largest of ``sizes``."""

    sizes: tuple[Size | int, ...]

    @property
    def low(self) -> int | None:
        return max((low for size in self.sizes if (low := bounds(size)[0]) is not None), default=None)

    @property
    def high(self) -> int | None:
        highs = [bounds(size)[1] for size in self.sizes]
        return None if None in highs else max(high for high in highs if high is not None)

    def __str__(self) -> str:
        return f"max({', '.join(map(str, self.sizes))})"


@dataclass(frozen=True)
class Result:
    """What ``function`` of the bound ``arguments`` is: a number that is not negative."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]
    low = 0
    high = None

    def __str__(self) -> str:
        return called(self.function, self.arguments)


def called(function: Callable[..., Any], arguments: Iterable[Any]) -> str:
    """A call as text, in which only sizes, numbers and other calls are written out."""
    texts = (str(a) if isinstance(a, (Size, int)) or hasattr(a, "arguments") else "…" for a in arguments)
    return f"{getattr(function, '__name__', str(function))}({', '.join(k for k, _ in itertools.groupby(texts))})"


Atom = Name | Quotient | Maximum | Result
Monomial = tuple[Atom, ...]
"""A product of atoms; the empty one is 1."""
Bounds = tuple[int | None, int | None]
_KEPT = 4096
"""Sizes whose bounds and order are remembered: programs ask for those of the same few again and again."""


class Size(_Base):
    """A number that depends on named sizes: a sum of products of atoms, each with an integer in front.

    Equal sizes are equal for all values of the names. Sizes that are not may still agree for some: such a coincidence
    counts as different. Orders are decided by the names' ranges; :class:`UndecidedSizeError` is raised where these do
    not decide, and where a plain number is asked for.
    """

    __slots__ = ("_hash", "terms")
    terms: tuple[tuple[Monomial, int], ...]
    _hash: int

    def __new__(cls, terms: Mapping[Monomial, int]) -> Size:
        made: Size = object.__new__(cls)
        made.terms = tuple(sorted(((m, c) for m, c in terms.items() if c), key=_order))
        made._hash = hash(made.terms)
        return made

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (dict(self.terms),)

    # ---- arithmetic

    def __add__(self, other: Any) -> Any:
        return _combined(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _combined(self, other, -1)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    def __neg__(self) -> Any:
        return self * -1

    def __pos__(self) -> Any:
        return self

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, (Size, int)):
            return NotImplemented
        total: collections.Counter[Monomial] = collections.Counter()
        for (left, a), (right, b) in itertools.product(self.terms, _terms(other)):
            total[tuple(sorted(left + right, key=str))] += a * b
        return _simple(total)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return _quotient(self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _quotient(other, self)

    def __mod__(self, other: Any) -> Any:
        return self - self // other * other

    def __rmod__(self, other: Any) -> Any:
        return other - other // self * self

    # ---- decisions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.terms == other.terms

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return self._hash

    def __lt__(self, other: Any) -> bool:
        return _is_positive(other - self, f"{self} < {other}")

    def __gt__(self, other: Any) -> bool:
        return _is_positive(self - other, f"{self} > {other}")

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __bool__(self) -> bool:
        low, high = bounds(self)
        if (low is not None and low > 0) or (high is not None and high < 0):
            return True
        raise UndecidedSizeError(f"whether {self} is zero depends on its sizes")

    def __int__(self) -> int:
        raise UndecidedSizeError(f"{self} is no number until its sizes are bound")

    __index__ = __int__

    def __float__(self) -> float:
        raise UndecidedSizeError(f"{self} is no number until its sizes are bound")

    # ---- looking

    def __str__(self) -> str:
        return " + ".join(_term(monomial, count) for monomial, count in self.terms).replace("+ -", "- ")

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def named(name: str, low: int = 2, high: int | None = None) -> Size:
    """The size that is called ``name``, from ``low`` to ``high``."""
    return Size({(Name(name, low, high),): 1})


def maximum(sizes: Iterable[int]) -> int:
    """The largest of ``sizes``, decided late where their ranges do not decide."""
    distinct = list(dict.fromkeys(sizes))
    left = [
        a for i, a in enumerate(distinct) if not any(_covers(b, a, j < i) for j, b in enumerate(distinct) if j != i)
    ]
    return left[0] if len(left) == 1 else Size({(Maximum(tuple(left)),): 1})


def minimum(sizes: Iterable[int]) -> int:
    """The smallest of ``sizes``, decided late where their ranges do not decide."""
    return -maximum(-size for size in sizes)


def result(function: Callable[..., int], *arguments: Any) -> Size:
    """``function`` of the arguments once these are bound: a size that is not negative."""
    return Size({(Result(function, arguments),): 1})


def bounds(size: int) -> Bounds:
    """The least and the greatest value of ``size``, as far as the ranges of its names tell; None: no end is known."""
    return _bounds(size) if isinstance(size, Size) else (size, size)


@functools.lru_cache(_KEPT)
def _bounds(size: Size) -> Bounds:
    low, high = _sum_of_bounds(size)
    # The bounds of a difference of terms are wide, or none; what every size is above its least may tell more.
    above = _above_lows(size)
    if above is None:
        return low, high
    least = dict(above).get((), 0)
    if all(count >= 0 for monomial, count in above if monomial):
        low = least if low is None else max(low, least)
    if all(count <= 0 for monomial, count in above if monomial):
        high = least if high is None else min(high, least)
    return low, high


def _sum_of_bounds(size: Size) -> Bounds:
    low: int | None = 0
    high: int | None = 0
    for monomial, count in size.terms:
        least, most = _product_of_bounds(monomial)
        if count < 0:
            least, most = most, least
        low = None if low is None or least is None else low + count * least
        high = None if high is None or most is None else high + count * most
    return low, high


def names(size: int) -> frozenset[str]:
    """The named sizes that ``size`` depends on; those in the arguments of a :func:`result` are not looked for."""
    if not isinstance(size, Size):
        return frozenset()
    found: set[str] = set()
    for atom in {atom for monomial, _ in size.terms for atom in monomial}:
        if isinstance(atom, Name):
            found.add(atom.name)
        elif isinstance(atom, Quotient):
            found |= names(atom.numerator) | names(atom.denominator)
        elif isinstance(atom, Maximum):
            found.update(*map(names, atom.sizes))
    return frozenset(found)


def _covers(size: int, other: int, before: bool) -> bool:
    """Whether ``size`` is never less than ``other``; of two that may be equal always, the one before."""
    low, high = bounds(size - other)
    return low is not None and low >= 0 and (before or low > 0 or high != 0)


def _product_of_bounds(monomial: Monomial) -> Bounds:
    if len(monomial) == 1:
        return monomial[0].low, monomial[0].high
    low: int | None
    high: int | None
    low, high = 1, 1
    sign = 1
    for atom in monomial:
        least, most = atom.low, atom.high
        if most is not None and most <= 0:
            sign, least, most = -sign, -most, None if least is None else -least
        if least is None or least < 0:
            return None, None
        low *= least
        high = None if high is None or most is None else high * most
    return (low, high) if sign > 0 else (None if high is None else -high, -low)


def _is_positive(difference: int, what: str) -> bool:
    low, high = bounds(difference)
    if low is not None and low > 0:
        return True
    if high is not None and high <= 0:
        return False
    raise UndecidedSizeError(f"whether {what} depends on what these sizes will be")


def _above_lows(size: Size) -> tuple[tuple[Monomial, int], ...] | None:
    """The terms of ``size`` with every atom standing for what it is above its least, which is zero or more."""
    total: int = 0
    for monomial, count in size.terms:
        if any(atom.low is None for atom in monomial):
            return None
        total += count * math.prod(Size({(atom,): 1}) + atom.low for atom in monomial)
    return _terms(total)


def _terms(size: int) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Size) else (((), size),)


def _simple(terms: Mapping[Monomial, int]) -> int:
    """A size, or the integer that it is."""
    left = {m: c for m, c in terms.items() if c}
    return left.get((), 0) if left.keys() <= {()} else Size(left)


def _combined(left: Any, right: Any, sign: int) -> Any:
    if not isinstance(right, (Size, int)):
        return NotImplemented
    total = collections.Counter(dict(left.terms))
    for monomial, count in _terms(right):
        total[monomial] += sign * count
    return _simple(total)


def _is_proper(numerator: int, denominator: int) -> bool:
    """Whether a quotient is never negative, and always less than one."""
    (low, high), (least, _) = bounds(numerator), bounds(denominator)
    return low is not None and low >= 0 and high is not None and least is not None and high < least


def _quotient(numerator: Any, denominator: Any) -> Any:
    """Exact where every term can be divided, else an atom."""
    if not isinstance(numerator, (Size, int)) or not isinstance(denominator, (Size, int)):
        return NotImplemented
    if _is_proper(numerator, denominator):
        return 0
    divisor = _terms(denominator)
    if len(divisor) == 1 and divisor[0][1]:
        ((monomial, count),) = divisor
        whole: dict[Monomial, int] = {}
        for product, factor in _terms(numerator):
            rest = collections.Counter(product)
            rest.subtract(collections.Counter(monomial))
            if factor % count or any(n < 0 for n in rest.values()):
                break
            whole[tuple(sorted(rest.elements(), key=str))] = factor // count
        else:
            return _simple(whole)
    elif len(divisor) > 1 and (exact := _exact(numerator, denominator)) is not None:
        return exact
    return Size({(Quotient(numerator, denominator),): 1})


def _exact(numerator: int, denominator: int) -> int | None:
    """The polynomial that times ``denominator`` is ``numerator``; None where there is none."""
    (leading, count), *_ = sorted(_terms(denominator), key=_order)
    found: int = 0
    for _ in range(len(_terms(numerator))):
        (monomial, factor), *_ = sorted(_terms(numerator), key=_order)
        rest = collections.Counter(monomial)
        rest.subtract(collections.Counter(leading))
        if factor % count or any(n < 0 for n in rest.values()):
            return None
        step = _simple({tuple(sorted(rest.elements(), key=str)): factor // count})
        found, numerator = found + step, numerator - step * denominator
        if isinstance(numerator, int) and numerator == 0:
            return found
    return None


def _order(term: tuple[Monomial, int]) -> tuple[int, str]:
    return _place(term[0])


@functools.lru_cache(_KEPT)
def _place(monomial: Monomial) -> tuple[int, str]:
    return -len(monomial), "*".join(map(str, monomial))


def _term(monomial: Monomial, count: int) -> str:
    product = "*".join(map(str, monomial))
    if not product:
        return str(count)
    return product if count == 1 else f"-{product}" if count == -1 else f"{count}*{product}"


def _factor(size: int) -> str:
    text = str(size)
    return f"({text})" if " " in text else text
