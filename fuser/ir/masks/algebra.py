"""The algebra of masks: ``& | ~``, one for each head, and queries that are shifted."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from fuser.ir.errors import MaskError
from fuser.ir.masks.base import Algebra, Mask
from fuser.ir.masks.columns import Bools, Columns, Ints, Progressions, indptr_of, integer, row_of, spans
from fuser.ir.masks.structure import Part, meet, minus, union, whole


@dataclass(frozen=True)
class Derived(Mask):
    """A mask made from one other, ``operand``, with as many heads."""

    operand: Mask

    @property
    def heads(self) -> int | None:
        return self.operand.heads

    @property
    def structured(self) -> bool:
        return self.operand.structured

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return (self.operand,)

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return replace(self, operand=operands[0])


@dataclass(frozen=True)
class Not(Derived):
    """Pairs that the operand does not allow."""

    @property
    def structured(self) -> bool:
        return False

    @property
    def allows_none(self) -> bool:
        return self.operand.allows_all

    @property
    def name(self) -> str:
        inner = self.operand.name
        return f"~({inner})" if isinstance(self.operand, _Composed) else f"~{inner}"

    def __invert__(self) -> Mask:
        return self.operand

    def count(self, q_len: int, kv_len: int | None = None) -> int:
        n, m = self._lengths(q_len, kv_len)
        return n * m * (self.heads or 1) - self.operand.count(n, m)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return ~self.operand._allowed(i, j, n, m)

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return ~self.operand._block(i, n, m)

    def _parts(self, rows: Ints, n: int, m: int) -> list[Part]:
        return minus(whole(len(rows), m), self.operand._parts(rows, n, m))

    def _check(self, n: int, m: int) -> None:
        self.operand._check(n, m)

    def _head(self, index: int) -> Mask:
        return ~self.operand.head(index)

    def _key(self) -> Any:
        return ["not", self.operand._key()]

    def _shape_key(self, n: int, m: int) -> Any:
        return ["not", self.operand._shape_key(n, m)]


@dataclass(frozen=True, eq=False)
class _Composed(Mask):
    """An associative, commutative, idempotent combination; equal whatever the order of its operands."""

    operands: tuple[Mask, ...]

    kind: ClassVar[str]
    sign: ClassVar[str]

    def __post_init__(self) -> None:
        if len(self.operands) < 2:
            raise MaskError(f"`{self.sign}` combines two masks or more, got {len(self.operands)}")
        sizes = {mask.heads for mask in self.operands if mask.heads is not None}
        if len(sizes) > 1:
            raise MaskError(f"cannot combine masks with different numbers of heads: {sorted(sizes)} in {self.name}")

    @classmethod
    def of(cls, masks: tuple[Mask, ...]) -> Mask:
        """The combination, flattened, without repeated or neutral operands; absorbed where heads do not differ."""
        flat = [part for mask in masks for part in (mask.operands if isinstance(mask, cls) else (mask,))]
        kept = tuple(dict.fromkeys(mask for mask in flat if not cls._is_neutral(mask)))
        absorbing = next(filter(cls._is_absorbing, kept), None)
        if absorbing is not None and all(mask.heads is None for mask in kept):
            return absorbing
        if len(kept) < 2:
            return (*kept, *flat)[0]
        return cls(kept)

    @staticmethod
    @abstractmethod
    def _is_neutral(mask: Mask) -> bool:
        """Whether combining with ``mask`` changes nothing."""

    @staticmethod
    @abstractmethod
    def _is_absorbing(mask: Mask) -> bool:
        """Whether combining with ``mask`` gives ``mask``."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Composed)
            and self.kind == other.kind
            and frozenset(self.operands) == frozenset(other.operands)
        )

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self.operands)))

    @property
    def heads(self) -> int | None:
        return next((mask.heads for mask in self.operands if mask.heads is not None), None)

    @property
    def name(self) -> str:
        parts = (f"({mask.name})" if isinstance(mask, _Composed) else mask.name for mask in self.operands)
        return f" {self.sign} ".join(parts)

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return self.operands

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return self.of(operands)

    def _check(self, n: int, m: int) -> None:
        for mask in self.operands:
            mask._check(n, m)

    def _head(self, index: int) -> Mask:
        return self.of(tuple(mask.head(index) for mask in self.operands))

    def _key(self) -> Any:
        return [self.kind, sorted((mask._key() for mask in self.operands), key=json.dumps)]

    def _shape_key(self, n: int, m: int) -> Any:
        return [self.kind, sorted((mask._shape_key(n, m) for mask in self.operands), key=json.dumps)]


class And(_Composed):
    """Pairs that every operand allows. Listing costs what its cheapest operand costs; the others only filter."""

    kind = "and"
    sign = "&"

    @staticmethod
    def _is_neutral(mask: Mask) -> bool:
        return mask.allows_all

    @staticmethod
    def _is_absorbing(mask: Mask) -> bool:
        return mask.allows_none

    @property
    def structured(self) -> bool:
        return any(mask.structured for mask in self.operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_and, (mask._allowed(i, j, n, m) for mask in self.operands))

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_and, (mask._block(i, n, m) for mask in self.operands))

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        """Closed form where all operands have one and all but one of them are intervals, which then clip that one."""
        low, high, rest = np.zeros(len(i), np.int64), np.full(len(i), m - 1), None
        for mask in self.operands:
            part = mask._progressions(i, n, m)
            if part is None:
                return None
            if part.start.shape[1] == 1 and (part.step == 1).all():
                low = np.maximum(low, part.start[:, 0])
                high = np.minimum(high, part.start[:, 0] + part.count[:, 0] - 1)
            elif rest is None:
                rest = part
            else:
                return None
        if rest is None:
            return spans(len(i), m, (low, high, 1))
        skipped = np.maximum(0, -((rest.start - low[:, None]) // rest.step))
        start = rest.start + skipped * rest.step
        last = np.minimum(rest.start + (rest.count - 1) * rest.step, high[:, None])
        return Progressions(start, np.maximum(0, (last - start) // rest.step + 1), rest.step)

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        closed = [(part, mask) for mask in self.operands if (part := mask._progressions(i, n, m)) is not None]
        if (whole := self._progressions(i, n, m)) is not None:
            return whole.columns()
        if closed:
            part, base = min(closed, key=lambda pair: int(pair[0].count.sum()))
            found = part.columns()
        else:
            base = next((mask for mask in self.operands if mask.structured), self.operands[0])
            found = base._columns(i, n, m)
        row, col = row_of(found), found.indices
        for mask in self.operands:
            if mask is not base:
                keep = np.broadcast_to(mask._allowed(i[row], col, n, m), col.shape)
                row, col = row[keep], col[keep]
        return Columns(indptr_of(np.bincount(row, minlength=len(i))), col)

    def _parts(self, rows: Ints, n: int, m: int) -> list[Part]:
        kept = [mask._parts(rows, n, m) for mask in self.operands if not isinstance(mask, Not)]
        holes = [mask.operand._parts(rows, n, m) for mask in self.operands if isinstance(mask, Not)]
        return reduce(minus, holes, reduce(meet, kept) if kept else whole(len(rows), m))


class Or(_Composed):
    """Pairs that at least one operand allows."""

    kind = "or"
    sign = "|"

    @staticmethod
    def _is_neutral(mask: Mask) -> bool:
        return mask.allows_none

    @staticmethod
    def _is_absorbing(mask: Mask) -> bool:
        return mask.allows_all

    @property
    def structured(self) -> bool:
        return all(mask.structured for mask in self.operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_or, (mask._allowed(i, j, n, m) for mask in self.operands))

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_or, (mask._block(i, n, m) for mask in self.operands))

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        if not self.structured:
            return super()._columns(i, n, m)
        parts = [mask._columns(i, n, m) for mask in self.operands]
        pairs = np.unique(np.concatenate([row_of(part) * m + part.indices for part in parts]))
        row, col = np.divmod(pairs, max(1, m))
        return Columns(indptr_of(np.bincount(row, minlength=len(i))), col)

    def _parts(self, rows: Ints, n: int, m: int) -> list[Part]:
        return union([part for mask in self.operands for part in mask._parts(rows, n, m)])


@dataclass(frozen=True)
class PerHead(Mask):
    """Head ``h`` uses ``masks[h]``, each one matrix. Masks without heads combine with it by applying to every head."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        if not self.masks:
            raise MaskError("a per-head mask needs at least one head")
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise MaskError(f"a per-head mask is made of masks, got {mask!r}")
            if mask.heads is not None:
                raise MaskError(f"{mask.name} already has {mask.heads} heads: pass mask.head(h) for each head")

    @property
    def heads(self) -> int | None:
        return len(self.masks)

    @property
    def structured(self) -> bool:
        return all(mask.structured for mask in self.masks)

    @property
    def name(self) -> str:
        times = Counter(mask.name for mask in self.masks)
        if len(times) < len(self.masks):
            return f"per_head({', '.join(f'{count} x {name}' for name, count in times.items())})"
        return f"per_head({', '.join(times)})"

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return self.masks

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return PerHead(operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        shape = np.broadcast_shapes(i.shape, j.shape)
        once = {mask: np.broadcast_to(mask._allowed(i, j, n, m), shape) for mask in set(self.masks)}
        return np.stack([once[mask] for mask in self.masks])

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        once = {mask: mask._block(i, n, m) for mask in set(self.masks)}
        return np.stack([once[mask] for mask in self.masks])

    def _check(self, n: int, m: int) -> None:
        for mask in set(self.masks):
            mask._check(n, m)

    def _head(self, index: int) -> Mask:
        return self.masks[index]

    def _key(self) -> Any:
        return ["per_head", [mask._key() for mask in self.masks]]

    def _shape_key(self, n: int, m: int) -> Any:
        once = {mask: mask._shape_key(n, m) for mask in set(self.masks)}
        return ["per_head", [once[mask] for mask in self.masks]]


def per_head(masks: Sequence[Mask]) -> PerHead:
    """One mask for each head, in order. MaskError if there is none or one of them has heads of its own."""
    return PerHead(tuple(masks))


@dataclass(frozen=True)
class Shifted(Derived):
    """Query ``i`` sees what query ``i + offset`` of the operand sees; made by ``Mask.shift``."""

    offset: int

    @property
    def name(self) -> str:
        inner = self.operand.name
        return f"{f'({inner})' if isinstance(self.operand, (_Composed, Not)) else inner}.shift({self.offset})"

    def shift(self, offset: int) -> Mask:
        return self.operand.shift(self.offset + integer("offset", offset, 0))

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return self.operand._allowed(i + self.offset, j, n + self.offset, m)

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return self.operand._block(i + self.offset, n + self.offset, m)

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return self.operand._progressions(i + self.offset, n + self.offset, m)

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        return self.operand._columns(i + self.offset, n + self.offset, m)

    def _parts(self, rows: Ints, n: int, m: int) -> list[Part]:
        return self.operand._parts(rows + self.offset, n + self.offset, m)

    def _check(self, n: int, m: int) -> None:
        self.operand._check(n + self.offset, m)

    def _head(self, index: int) -> Mask:
        return self.operand.head(index).shift(self.offset)

    def _key(self) -> Any:
        return ["shifted", self.offset, self.operand._key()]

    def _shape_key(self, n: int, m: int) -> Any:
        return ["shifted", self.offset, self.operand._shape_key(n + self.offset, m)]


Mask._algebra = Algebra(both=And.of, either=Or.of, complement=Not, shifted=Shifted)
