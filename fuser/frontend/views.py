"""Strided views as values: chains of reshapes and transposes composed without touching memory.

Every logical dimension is a list of (size, stride) *factors*. Merging two dimensions concatenates their factors and
splitting one divides them, so a chain that goes through a layout no strides can describe (as in
``nn.MultiheadAttention``) still ends in the plain strided view that it means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size

Factor = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A view of the value ``base``: for every logical dimension its factors, outermost first; ``offset`` in
    elements."""

    base: str
    dims: tuple[tuple[Factor, ...], ...]
    offset: int = 0

    @classmethod
    def of(cls, base: str, spec: TensorSpec) -> View:
        """The whole of ``base``."""
        return cls(base, tuple(((size, stride),) for size, stride in zip(spec.shape, spec.strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in factors) for factors in self.dims)

    def strides(self) -> tuple[int, ...] | None:
        """One stride a dimension, or None when some dimension has no single stride."""
        found: list[int] = []
        following = 1
        for factors in reversed(self.dims):
            merged = collapsed(factors)
            if len(merged) > 1:
                return None
            # A dimension of size one may have any stride; this one looks contiguous.
            size, stride = merged[0] if merged else (1, following)
            found.append(stride)
            following = size * stride
        return tuple(reversed(found))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The view with another shape of the same number of elements; None when a factor would have to be cut where
        its size does not divide. A named size may not say that it is divided, but that follows from the number of
        elements."""
        if 0 in shape or 0 in self.shape:
            return None
        pending = collapsed([f for factors in self.dims for f in factors])
        dims = []
        for d, size in enumerate(shape):
            taken: list[Factor] = []
            while size != 1:
                if not pending:
                    return None
                extent, stride = pending.pop(0)
                if size % extent == 0:
                    taken.append((extent, stride))
                    size //= extent
                elif not pending and isinstance(extent * size, Size) and set(shape[d + 1 :]) <= {1}:
                    taken.append((size, stride))
                    size = 1
                elif extent % size == 0 or (isinstance(extent, Size) and not isinstance(size, Size)):
                    taken.append((size, stride * (extent // size)))
                    pending.insert(0, (extent // size, stride))
                    size = 1
                elif isinstance(size, Size) and not isinstance(extent, Size):
                    taken.append((extent, stride))
                    size //= extent
                else:
                    return None
            dims.append(tuple(taken) or ((1, 0),))
        return None if pending else replace(self, dims=tuple(dims))

    def permute(self, order: Sequence[int]) -> View:
        return replace(self, dims=tuple(self.dims[d] for d in order))

    def select(self, dim: int, index: int) -> View | None:
        """Index ``index`` of dimension ``dim``, which disappears."""
        narrowed = self.slice(dim, index, 1, 1)
        return narrowed and replace(narrowed, dims=narrowed.dims[:dim] + narrowed.dims[dim + 1 :])

    def slice(self, dim: int, start: int, count: int, step: int) -> View | None:
        """``count`` indices of ``dim`` from ``start`` in steps; None for a dimension without a single stride."""
        factors = collapsed(self.dims[dim])
        if len(factors) > 1:
            return None
        stride = factors[0][1] if factors else 0
        dims = (*self.dims[:dim], ((count, stride * step),), *self.dims[dim + 1 :])
        return replace(self, dims=dims, offset=self.offset + start * stride)

    def diagonal(self, dim: int, other: int, offset: int) -> View | None:
        """Elements of two dimensions whose second index is ``offset`` more than the first, as the last dimension; None
        where there are none, or for dimensions without single strides."""
        first, second = self.shape[dim], self.shape[other]
        count = min(first + min(offset, 0), second - max(offset, 0))
        steps = [collapsed(self.dims[d]) or [(1, 0)] for d in (dim, other)]
        if count <= 0 or max(map(len, steps)) > 1:
            return None
        down, right = (factors[0][1] for factors in steps)
        start = offset * right if offset > 0 else -offset * down
        rest = (factors for d, factors in enumerate(self.dims) if d not in (dim, other))
        return replace(self, dims=(*rest, ((count, down + right),)), offset=self.offset + start)

    def expand(self, shape: Sequence[int]) -> View:
        """Broadcast to ``shape`` with strides of zero. Raises ValueError for shapes that do not broadcast."""
        pad = len(shape) - len(self.dims)
        if pad < 0 or any(size not in (1, full) for size, full in zip(self.shape, shape[pad:], strict=True)):
            raise ValueError(f"{self.shape} does not broadcast to {tuple(shape)}")
        sizes = (1,) * pad + self.shape
        dims = (((1, 0),),) * pad + self.dims
        return replace(
            self,
            dims=tuple(
                factors if size == full else ((full, 0),)
                for factors, size, full in zip(dims, sizes, shape, strict=True)
            ),
        )

    def repeat(self, dim: int, count: int) -> View:
        """Every index of ``dim`` ``count`` times in a row."""
        return replace(self, dims=(*self.dims[:dim], (*self.dims[dim], (count, 0)), *self.dims[dim + 1 :]))

    def repeats(self, dim: int) -> int:
        """How many indices of ``dim`` in a row are the same, as far as the view itself says it."""
        factors = collapsed(self.dims[dim])
        return factors[-1][0] if factors and factors[-1][1] == 0 else 1

    def without_repeats(self, dim: int, count: int) -> View:
        """Every ``count``-th index of ``dim``, where ``count`` divides :meth:`repeats`."""
        *factors, (size, stride) = collapsed(self.dims[dim]) or [(1, 0)]
        return replace(self, dims=(*self.dims[:dim], (*factors, (size // count, stride)), *self.dims[dim + 1 :]))

    def memory_order(self, rows: bool = True) -> tuple[int, ...]:
        """Dimensions but the last, by falling stride, then the last: the order in which rows lie in memory. Without
        ``rows``, all by falling stride, as elements lie.

        The identity when they cannot be walked evenly anyway.
        """
        strides = self.strides()
        identity = tuple(range(len(self.dims)))
        if strides is None or len(identity) < 3:
            return identity
        moved = [d for d in (identity[:-1] if rows else identity) if self.shape[d] != 1]
        if any(strides[d] == 0 for d in moved):
            return identity
        ordered = iter(sorted(moved, key=lambda d: -strides[d]))
        return tuple(next(ordered) if d in moved else d for d in identity)

    def lies_in(self, order: Sequence[int]) -> bool:
        """Whether elements lie in this order of dimensions, of which those of one element may be anywhere."""
        mine = self.memory_order(rows=False)
        return [d for d in order if self.shape[d] != 1] == [d for d in mine if self.shape[d] != 1]

    def copied(self) -> TorchCall:
        """The call that makes a contiguous tensor of this view from the base."""
        flat = [factor for factors in self.dims for factor in factors]
        sizes, strides = tuple(size for size, _ in flat), tuple(stride for _, stride in flat)
        return TorchCall(_strided_copy, (Ref(0), sizes, strides, self.offset, self.shape))


def _strided_copy(
    base: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, shape: tuple[int, ...]
) -> Tensor:
    return base.as_strided(sizes, strides, base.storage_offset() + offset).reshape(shape)


def collapsed(factors: Sequence[Factor]) -> list[Factor]:
    """The fewest factors that address the same elements in the same order."""
    merged: list[Factor] = []
    for size, stride in factors:
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


@dataclass(frozen=True)
class Conjunction:
    """A boolean mask that is the conjunction of a constant and a run-time one, kept apart until somebody needs it."""

    constant: View
    attn_mask: View

    def expand(self, shape: Sequence[int]) -> Conjunction:
        return Conjunction(self.constant.expand(shape), self.attn_mask.expand(shape))


Value = View | Conjunction | tuple[View, ...]
