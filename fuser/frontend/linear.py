"""Linear layers as ``gemm`` and ``bias``, with rows in the order in which the operand lies in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import fx

from fuser.frontend.raising import Raiser
from fuser.frontend.views import View, collapsed
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec
from fuser.ir.linear_attention import FeatureMap


def linear(r: Raiser, node: fx.Node, x: View, weight: View, bias: View | None, transposed: bool) -> View | None:
    """x · Wᵀ (+ bias), W constant, as ``gemm`` and ``bias``; rows in the order in which x lies in memory."""
    if r.dtype(x) not in r.floating or r.dtype(weight) != r.dtype(x) or 0 in x.shape:
        return None
    columns = weight.shape[0] if transposed else weight.shape[1]
    return by_rows(r, x, lambda rows: _gemm(r, node, rows, weight, bias, transposed, columns))


def by_rows(r: Raiser, x: View, product: Callable[[View], View]) -> View:
    """``product`` of the rows of x in the order in which they lie in memory, seen in the order of x."""
    order = x.memory_order()
    inverse = tuple(order.index(d) for d in range(len(order)))
    rows = x.permute(order)
    if len(x.dims) > 2 and View(x.base, x.dims[-2:-1]).strides() is None and r.row_numbers(x) is not None:
        # No strides will describe what is made of them either, as q, k and v of windows.
        return product(x)
    if rows.strides() is None or rows.strides()[-1] != 1:  # type: ignore[index]
        rearranged = _rows_in_memory_order(x)
        if rearranged is not None:
            rows, restore = rearranged
            return restore(product(rows))
    elif not _are_even(rows) and (gathered := r.gathered(rows)) is not None:
        # Such as heads of q inside of a product for q, k and v: a kernel reads rows that are evenly spaced.
        rows = View.of(gathered, r.values[gathered])
    return product(rows).permute(inverse)


def _are_even(rows: View) -> bool:
    """Whether rows follow each other at one distance."""
    strides = rows.strides() or ()
    spaced = [(size, step) for size, step in zip(rows.shape[:-1], strides, strict=False) if size != 1]
    return all(step == size * inner for (_, step), (size, inner) in itertools.pairwise(spaced))


def product_of_heads(r: Raiser, node: fx.Node, x: View, matrices: View) -> View | None:
    """x (B · H, S, D) or (B, H, S, D) times a constant matrix (D, P) of each head, the same for all samples."""
    rank = len(x.dims)
    if r.is_constant(x) or not r.is_constant(matrices) or len(matrices.dims) > rank or rank not in (3, 4):
        return None
    matrices = matrices.expand((1,) * (rank - len(matrices.dims)) + matrices.shape)
    if {r.dtype(x), r.dtype(matrices)} != {torch.float32} or 0 in (*x.shape, *matrices.shape):
        return None
    outer = [factor for factors in matrices.dims[:-2] for factor in collapsed(factors)]
    each = [factor for factor in outer if factor[1] != 0]
    if len(each) != 1 or outer[-1:] != each or (rank == 4 and x.shape[1] != each[0][0]):
        return None
    heads, (rows, depth), columns = each[0][0], x.shape[-2:], matrices.shape[-1]
    batch = x.shape[0] // heads if rank == 3 else x.shape[0]
    directions = View(matrices.base, ((each[0],), matrices.dims[-1], matrices.dims[-2]), matrices.offset)
    inputs = r.realize(r.reshaped(x, (batch, heads, rows, depth))), r.realize(directions)
    spec = TensorSpec.contiguous((batch, heads, rows, columns), torch.float32)
    out = r.emit(kinds.Features(FeatureMap.PRODUCT), node.name, inputs, spec)
    return out.reshape((*x.shape[:-1], columns))


def _gemm(r: Raiser, node: fx.Node, x: View, weight: View, bias: View | None, transposed: bool, columns: int) -> View:
    spec = TensorSpec.contiguous((*x.shape[:-1], columns), r.dtype(x))
    inputs = (r.realize(x), r.realize(weight))
    name = node.name if bias is None else f"{node.name}_gemm"
    out = r.emit(kinds.Gemm(transposed), name, inputs, spec)
    if bias is not None:
        out = r.emit(kinds.Bias(), node.name, (out.base, r.realize(bias)), spec)
    return out


def _rows_in_memory_order(x: View) -> tuple[View, Callable[[View], View]] | None:
    """A view whose rows have several factors, as (memory order, N) rows, and how to lay the result out as x was."""
    last = View(x.base, (x.dims[-1],)).strides()
    factors = [(d, f) for d, dim in enumerate(x.dims[:-1]) for f in dim if f[0] > 1]
    if last is None or last[0] != 1 or any(stride == 0 for _, (_, stride) in factors):
        return None
    ordered = sorted(range(len(factors)), key=lambda i: -factors[i][1][1])
    rows = View(x.base, (*(((factors[i][1]),) for i in ordered), x.dims[-1]), x.offset)

    def restore(out: View) -> View:
        dims: list[tuple[tuple[int, int], ...]] = []
        for d in range(len(x.dims) - 1):
            mine = [ordered.index(i) for i, (dim, _) in enumerate(factors) if dim == d]
            dims.append(tuple(f for m in mine for f in out.dims[m]) or ((1, 0),))
        return View(out.base, (*dims, out.dims[-1]), out.offset)

    return rows, restore
