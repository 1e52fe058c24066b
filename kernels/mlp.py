"""The `mlp` family on CUDA: two products with an elementwise function between them, whose intermediate result stays in
shared memory.

A block holds its rows of the input and of the result, and goes through the hidden layer a few columns at a time. So
every block reads both weights: that pays for narrow models, where rows fit into a block and weights into L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuser.ir.expression import Expression
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup
from fuser.ir.operators import Gemm
from fuser.ir.target import TF32, Target
from fuser.kernels import gemm_cuda
from fuser.kernels.base import (
    STORAGE,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Operand,
    TensorRef,
    floating,
)
from fuser.kernels.compose import RowProgram, compose, same_matrix
from fuser.kernels.operands import OperandExtents, row_stride, rows_and_columns

_MAX_OPERANDS = 16
_MAX_WIDTH = 512
# (rows of a block, warps along rows, warps along columns).
_BLOCKS = ((64, 2, 4), (32, 2, 4), (16, 1, 4))
_TURN = 64  # hidden columns of one turn
_CHUNK_BYTES = 128
_MAX_SUMS = 128  # accumulators of a thread, beyond which registers spill


@dataclass(frozen=True)
class MlpExtents(Extents):
    """Rows of X, elements between the rows of X, of W1 and of W2, operands of the hidden expression and of the
    epilogue, and elements between the rows of every output."""

    rows: int
    x_stride: int
    w1_stride: int
    w2_stride: int
    hidden_operands: tuple[OperandExtents, ...]
    operands: tuple[OperandExtents, ...]
    output_strides: tuple[int, ...]


@dataclass(frozen=True)
class MlpParameters:
    """What the template ``cuda/mlp.cu.j2`` is rendered from.

    ``k``, ``hidden`` and ``n`` are the columns of the input, of the hidden layer and of the result, ``dtype`` the type
    of the input and of both weights. ``activation`` has the sum of the first product as input 0 and ``hidden_operands``
    as inputs 1, 2, …; ``epilogue``, ``operands`` and ``out_dtypes`` are the same for the second. A block has ``bm``
    rows and ``warps_m`` × ``warps_n`` warps, and computes ``bh`` hidden columns in one turn.
    """

    k: int
    hidden: int
    n: int
    dtype: DType
    activation: Expression
    hidden_operands: tuple[Operand, ...]
    epilogue: Expression
    operands: tuple[Operand, ...]
    out_dtypes: tuple[DType, ...]
    bm: int
    bh: int
    warps_m: int
    warps_n: int

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return MlpExtents.declaration(
            hidden_operands=len(self.hidden_operands),
            operands=len(self.operands),
            output_strides=len(self.out_dtypes),
        )

    @property
    def reduces(self) -> bool:
        """Whether the epilogue needs whole rows."""
        return self.epilogue.has_reduction

    @property
    def items(self) -> int:
        """Groups of four elements of a reduced row that a lane keeps in registers from pass to pass."""
        return -(-self.n // 128)

    @property
    def padded_k(self) -> int:
        """K in whole groups of banks."""
        step = _CHUNK_BYTES // self.dtype.bytes
        return -(-self.k // step) * step

    @property
    def padded_n(self) -> int:
        """N in pairs of fragments for every warp."""
        step = 16 * self.warps_n
        return -(-self.n // step) * step

    @property
    def turns(self) -> int:
        return -(-self.hidden // self.bh)

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.bm * (self.padded_n + self.bh) // self.threads

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows of X, a part of W1 and of W2, the hidden rows; at the end, accumulators."""
        elements = (self.bm + self.bh) * self.padded_k + (self.padded_n + self.bm) * self.bh
        return max(elements * self.dtype.bytes, 4 * self.bm * (self.padded_n + 8))


@dataclass(frozen=True)
class MlpMatch:
    """Two GEMM operators, the row program between them (its one output is the hidden layer) and the one behind them;
    ``row_stride`` is that of the input in elements."""

    group: OperatorGroup
    first: Operator[Gemm]
    second: Operator[Gemm]
    between: RowProgram
    after: RowProgram
    k: int
    hidden: int
    n: int
    row_stride: int

    @property
    def dtype(self) -> DType:
        return STORAGE[self.group.graph.values[self.first.inputs[0]].dtype]


@dataclass(frozen=True)
class MlpFamily:
    """A GEMM, elementwise operators, a GEMM that reads them, and the elementwise operators and at most one norm that
    read its result."""

    name = "mlp"

    def match(self, group: OperatorGroup, target: Target) -> MlpMatch | None:
        """The group as two products with row programs between and behind them; None when it is something else, the
        target has no tensor cores for its type, or its rows are too wide for a block."""
        gemms = group.of(Gemm)
        if len(gemms) != 2:
            return None
        first, second = gemms
        graph = group.graph
        if any(len(op.inputs) != 2 or op.inputs[1] not in graph.constants for op in gemms):
            return None
        between = [op for op in group.operators if op not in gemms and _leads_to(group, op, second)]
        after = [op for op in group.operators if op not in gemms and op not in between]
        if any(op.expression is None for op in (*between, *after)):
            return None
        if group.produces(first.inputs[0]) or _reductions(between) or _reductions(after) > 1:
            return None
        x, hidden, w1, w2 = (
            graph.values[v] for v in (first.inputs[0], second.inputs[0], *(g.inputs[1] for g in gemms))
        )
        stride = row_stride(x)
        types = {x.dtype, hidden.dtype, w1.dtype, w2.dtype, *(graph.values[g.output].dtype for g in gemms)}
        if stride is None or len(types) != 1 or not types <= _multiplied(target) or len(w1.shape) != 2:
            return None
        (h, k), (n, depth) = (_columns(op, graph.values[op.inputs[1]].shape) for op in gemms)
        if depth != h or rows_and_columns(x.shape)[1] != k or not 0 < max(k, n) <= _MAX_WIDTH or 0 in (k, h, n):
            return None
        programs = self._programs(group, first, second, between, after, target)
        return MlpMatch(group, first, second, *programs, k, h, n, stride) if programs is not None else None

    @staticmethod
    def _programs(
        group: OperatorGroup,
        first: Operator,
        second: Operator,
        between: Sequence[Operator],
        after: Sequence[Operator],
        target: Target,
    ) -> tuple[RowProgram, RowProgram] | None:
        graph, storage = group.graph, floating(target)
        head = graph.group([first, *between])
        if head.outputs != (graph.base(second.inputs[0]),) or any(v in group.outputs for v in head.outputs):
            return None
        if not same_matrix(graph.values[second.inputs[0]], graph.values[head.outputs[0]]):
            return None
        one = compose(head, between, seeds=(first.output,), storage=storage)
        two = compose(graph.group([second, *after]), after, seeds=(second.output,), storage=storage)
        if one is None or two is None or one.gathers or two.gathers or set(two.outputs) != set(group.outputs):
            return None
        if len(one.bounds) + len(two.bounds) > _MAX_OPERANDS or one.rows != two.rows:
            return None
        return one, two


class CudaMlp(Implementation[MlpMatch, MlpParameters]):
    """Both products by tensor cores."""

    def space(self, match: MlpMatch, target: Target) -> Sequence[MlpParameters]:
        """Rows of a block that fit into shared memory and registers, the most first."""
        choices = [
            MlpParameters(
                match.k,
                match.hidden,
                match.n,
                match.dtype,
                match.between.expression,
                match.between.operands,
                match.after.expression,
                match.after.operands,
                match.after.output_dtypes,
                bm,
                _TURN,
                warps_m,
                warps_n,
            )
            for bm, warps_m, warps_n in _BLOCKS
        ]
        return [p for p in choices if p.shared_bytes <= target.shared_bytes and p.sums <= _MAX_SUMS]

    def cost(self, match: MlpMatch, parameters: MlpParameters, target: Target) -> Cost:
        """Roofline of whole blocks on whole SMs: their multiply-adds, and both weights' way from L2 to every block."""
        p, rows, values = parameters, match.after.rows, match.group.graph.values
        size = p.dtype.bytes
        blocks = -(-rows // p.bm)
        busiest = -(-blocks // target.cores)
        weights = p.turns * p.bh * (p.padded_k + p.padded_n) * size
        fragments = p.turns * size * (p.warps_n * p.bm * (p.padded_k + p.bh))
        fragments += p.turns * size * p.warps_m * p.bh * (p.padded_k + p.padded_n)
        each = gemm_cuda.block_seconds(
            2.0 * p.bm * p.turns * p.bh * (p.padded_k + p.padded_n), weights, fragments, p.dtype, True, target
        )
        # Loads of one weight hide behind the product with the other, as far as they do.
        seconds = busiest * each + p.turns * gemm_cuda.LATENCY
        flops = max(2.0 * rows * match.hidden * (match.k + match.n), 1.0)
        moved = values[match.first.inputs[0]].nbytes + match.hidden * (match.k + match.n) * size
        moved += match.after.bytes(match.group.graph)
        return Cost(flops, float(moved), 1, flops / (target.peak_flops * target.cores * seconds))

    def call(self, match: MlpMatch, parameters: MlpParameters, target: Target, threads: int) -> KernelCall:
        graph, dtype = match.group.graph, match.dtype
        refs: list[TensorRef] = []
        strides: list[int] = []
        for gemm in (match.first, match.second):
            ref, stride = gemm_cuda.rows_of(gemm.inputs[1], graph, gemm.semantics.transposed, dtype)
            refs.append(ref)
            strides.append(stride)
        return KernelCall(
            KernelSpec("mlp", "cuda/mlp.cu.j2", parameters),
            (match.first.inputs[0], *refs, *(b.value for b in match.between.bounds), *match.after.tensors),
            MlpExtents(
                match.after.rows,
                match.row_stride,
                strides[0],
                strides[1],
                match.between.operand_extents,
                match.after.operand_extents,
                match.after.output_strides,
            ),
            match.after.outputs,
        )


def _reductions(operators: Sequence[Operator]) -> int:
    return sum(op.expression is not None and op.expression.has_reduction for op in operators)


def _leads_to(group: OperatorGroup, op: Operator, second: Operator) -> bool:
    """Whether the second product needs ``op``."""
    pending, seen = [second.inputs[0]], set()
    while pending:
        source = group.produces(pending.pop())
        if source is not None and source.name not in seen:
            seen.add(source.name)
            pending.extend(source.inputs)
    return op.name in seen


def _columns(gemm: Operator[Gemm], shape: tuple[int, ...]) -> tuple[int, ...]:
    """(columns of the result, columns of the input) of a weight."""
    return shape if gemm.semantics.transposed else shape[::-1]


def _multiplied(target: Target) -> frozenset[torch.dtype]:
    """Types that the tensor cores of ``target`` multiply as asked for."""
    halves = frozenset({torch.float16, torch.bfloat16})
    return halves | {torch.float32} if TF32 in target.features else halves
