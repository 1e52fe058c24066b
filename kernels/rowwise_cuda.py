"""Row expressions on a GPU: how many threads share a row, and what a thread keeps in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.expression import Expression
from fuser.ir.target import Target
from fuser.kernels.base import Access, Cost, DType, Implementation, KernelCall, Operand
from fuser.kernels.compose import RowProgram
from fuser.kernels.rowwise import RowwiseExtents, RowwiseMatch

TEMPLATE = "cuda/rowwise.cu.j2"
_WARP = 32
_WARPS_OF_A_BLOCK = 4
_ELEMENT_THREADS = 256
_ACCESS_BYTES = 16
_MOST_THREADS = 1024
# Registers of a thread for elements of its row; the rest is for addresses and the expression.
_KEPT = 64


@dataclass(frozen=True)
class CudaRowwiseParameters:
    """What ``cuda/rowwise.cu.j2`` is rendered from.

    Blocks have ``threads`` threads. ``group`` of them share a row: 32, or all of the block; 0 for elementwise
    expressions, whose elements are independent. A thread handles ``width`` neighbouring elements at a time, and keeps
    ``items`` times as many in registers; 0 for rows of any length, which every pass reads again.
    """

    expression: Expression
    operands: tuple[Operand, ...]
    outputs: tuple[DType, ...]
    width: int
    threads: int
    group: int
    items: int

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return RowwiseExtents.declaration(operands=len(self.operands), output_strides=len(self.outputs))

    @property
    def capacity(self) -> int:
        """The longest row, in elements, when ``items`` is not 0."""
        return self.group * self.items * self.width

    @property
    def gathers(self) -> bool:
        return any(o.access is Access.GATHER for o in self.operands)


def space(program: RowProgram, target: Target) -> Sequence[CudaRowwiseParameters]:
    """Legal choices, the best guess first: a warp for a row where the rows fill the GPU, else a block."""
    widest = max((d.bytes for d in _vectors(program)), default=4)
    width = max(_ACCESS_BYTES // widest, 1)
    by_row = program.expression.has_reduction or bool(program.gathers)

    def choice(threads: int, group: int, items: int) -> CudaRowwiseParameters:
        operands, outputs = program.operands, program.output_dtypes
        return CudaRowwiseParameters(program.expression, operands, outputs, width, threads, group, items)

    if not by_row:
        return [choice(_ELEMENT_THREADS, 0, 0)]
    chunks = -(-program.columns // width)
    warp = choice(_WARP * _WARPS_OF_A_BLOCK, _WARP, _items(chunks, _WARP, width))
    # Two to four accesses of a thread in flight hide the latency of memory.
    threads = _WARP
    while threads < _MOST_THREADS and threads * 2 < chunks:
        threads *= 2
    block = choice(threads, threads, _items(chunks, threads, width))
    if threads == _WARP:
        return [warp]
    few = program.rows < target.cores * _WARPS_OF_A_BLOCK
    if warp.items == 0 or few:
        return [block, warp]
    return [warp, block]


class CudaRowwise(Implementation[RowwiseMatch, CudaRowwiseParameters]):
    """Row expressions of either family on GPUs."""

    def space(self, match: RowwiseMatch, target: Target) -> Sequence[CudaRowwiseParameters]:
        return space(match.program, target)

    def cost(self, match: RowwiseMatch, parameters: CudaRowwiseParameters, target: Target) -> Cost:
        return match.cost()

    def call(self, match: RowwiseMatch, parameters: CudaRowwiseParameters, target: Target, threads: int) -> KernelCall:
        return match.call(TEMPLATE, parameters, elementwise=parameters.group == 0)


def _vectors(program: RowProgram) -> Sequence[DType]:
    """Storage types that are read or written along rows."""
    read = [o.dtype for o in program.operands if o.access is not Access.COLUMN]
    narrow = program.expression.narrow
    return [*read, *(dtype for i, dtype in enumerate(program.output_dtypes) if i not in narrow)]


def _items(chunks: int, group: int, width: int) -> int:
    """Vectors of a row that each of ``group`` threads keeps, a power of two so that few kernels serve all lengths; 0 if
    that is too many."""
    items = 1
    while items * group < chunks:
        items *= 2
    return items if items * width <= _KEPT else 0
