"""Row expressions as CUDA C++: functions on a few neighbouring elements, and on a row that a group of threads shares.

Generated functions read the struct ``Operands`` that ``templates/cuda/operands.j2`` declares, and call
``templates/cuda/row.cuh``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

from fuser.codegen.expressions import INFIX, literal, needed
from fuser.ir.expression import REDUCTIONS, Expression, Instruction, Op
from fuser.kernels.base import Access, DType, Operand

C_TYPES = {
    DType.F32: "float",
    DType.F16: "device::half",
    DType.BF16: "device::bf16",
    DType.E4M3: "device::e4m3",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.I8: "int8_t",
    DType.U8: "uint8_t",
    DType.BOOL: "uint8_t",
}
_IDENTITY = {Op.ROW_SUM: "0.0f", Op.ROW_MEAN: "0.0f", Op.ROW_MAX: "__int_as_float(0xff800000)"}


def _statement(expression: Expression, position: int) -> str:
    i = expression.instructions[position]
    args = [f"v{a}" for a in i.args]
    if i.op is Op.INPUT:
        body = f"x{i.index}"
    elif i.op is Op.CONSTANT:
        body = _number(i.value)
    elif i.op is Op.MUL and expression.rounds:
        body = f"__fmul_rn({', '.join(args)})"
    elif i.op in INFIX:
        body = f" {INFIX[i.op]} ".join(args)
    else:
        body = f"device::math::{i.op.value}({', '.join(args)})"
    return f"const float v{position} = {body};"


def _number(value: float) -> str:
    if value != value:
        return "__int_as_float(0x7fc00000)"
    if value in (float("inf"), float("-inf")):
        return f"__int_as_float({'0xff800000' if value < 0 else '0x7f800000'})"
    return literal(value)


def statements(expression: Expression) -> list[str]:
    """The expression on one element, for expressions without reductions.

    Reads ``x0``, ``x1``, … (``float``); output ``j`` is the variable ``v{expression.outputs[j]}``.
    """
    return [_statement(expression, at) for at in needed(expression, expression.outputs)]


def element_function(
    name: str,
    expression: Expression,
    operands: Sequence[Operand],
    outputs: Sequence[DType],
    seeds: int = 0,
    width: int = 1,
) -> str:
    """A CUDA function that evaluates an expression without reductions for ``width`` neighbouring elements of a row.

    Signature: ``name(const Operands& o, int64_t r, int64_t c, int64_t columns, const float (&x0)[width], …)`` with an
    array for each of the ``seeds`` first inputs; ``c`` is a multiple of ``width``. Elements at and beyond ``columns``
    are neither read nor written.
    """
    parameters = "".join(f", const float (&a{i})[{width}]" for i in range(seeds))
    writer = _Writer(expression, operands, outputs, seeds, width)
    body = [*writer.rows(), *writer.element()]
    return (
        f"__device__ __forceinline__ void {name}(const Operands& o, int64_t r, int64_t c, int64_t columns{parameters}) "
        + _block(body)
    )


def row_function(
    name: str,
    expression: Expression,
    operands: Sequence[Operand],
    outputs: Sequence[DType],
    seeds: int = 0,
    width: int = 4,
    items: int = 0,
) -> str:
    """A CUDA function that evaluates an expression for one row, which a group of threads shares.

    Signature: ``template <class Group> name(const Group& g, const Operands& o, int64_t r, int64_t columns, const float*
    x0, …)`` with a pointer for each of the ``seeds`` first inputs to a row in shared memory, 16-byte aligned and
    readable up to the next multiple of ``width``. With ``items``, a thread keeps what later passes need of its
    ``items`` times ``width`` elements in registers, and ``columns`` is at most ``g.size() * items * width``; without,
    every pass reads its operands again. All threads of the group must call it.
    """
    parameters = "".join(f", const float* s{i}" for i in range(seeds))
    writer = _Writer(expression, operands, outputs, seeds, width)
    return (
        f"template <class Group>\n__device__ __forceinline__ void {name}(const Group& g, const Operands& o, int64_t r, "
        f"int64_t columns{parameters}) " + _block([*writer.rows(), *writer.passes(items)])
    )


def cached_values(expression: Expression) -> tuple[int, ...]:
    """The instructions whose values a row function with ``items`` keeps in registers: computed in the first pass, and
    read by a later one."""
    sources = [expression.instructions[r].args[0] for r in _roots(expression, 0)]
    return tuple(sorted(_later(expression).intersection(needed(expression, sources))))


def _varies(i: Instruction) -> bool:
    return i.op is not Op.CONSTANT and i.op not in REDUCTIONS


def _reductions(expression: Expression) -> list[int]:
    return [at for at, i in enumerate(expression.instructions) if i.op in REDUCTIONS]


def _roots(expression: Expression, depth: int) -> list[int]:
    """The reductions that pass ``depth`` over the row completes."""
    depths = expression.depths()
    return [r for r in _reductions(expression) if depths[r] == depth]


def _later(expression: Expression) -> set[int]:
    """Instructions without a reduction before them that something with one, or an output, reads."""
    depths, instructions = expression.depths(), expression.instructions
    read = {o for o in expression.outputs if depths[o] == 0}
    for at, i in enumerate(instructions):
        if depths[at] > 0:
            read.update(a for a in i.args if depths[a] == 0)
    return {at for at in read if _varies(instructions[at])}


class _Writer:
    """Writes the loops of one function."""

    def __init__(
        self, expression: Expression, operands: Sequence[Operand], outputs: Sequence[DType], seeds: int, width: int
    ) -> None:
        self.expression = expression
        self.operands = {seeds + i: o for i, o in enumerate(operands)}
        self.outputs = outputs
        self.seeds = seeds
        self.width = width
        self.used = {i.index for i in expression.instructions if i.op is Op.INPUT}

    def rows(self) -> list[str]:
        """Where the row of every operand and output starts."""
        lines = [f"const bool vector = o.vector >= {self.width};"]
        for i, operand in self.operands.items():
            if i in self.used and operand.access is Access.COLUMN:
                lines.append(f"const float x{i} = float(*o.row{i}(r));")
            elif i in self.used:
                lines.append(f"const {C_TYPES[operand.dtype]}* const p{i} = o.row{i}(r);")
        lines += [f"{C_TYPES[t]}* const q{j} = o.y{j} + r * o.out{j};" for j, t in enumerate(self.outputs)]
        return lines

    def element(self) -> list[str]:
        return [*self._loads(needed(self.expression, self.expression.outputs), ()), *self._results(())]

    def passes(self, items: int) -> list[str]:
        depths = self.expression.depths()
        kept = [at for at in cached_values(self.expression) if not self._is_column(at)] if items else []
        lines = [f"float k{at}[{items}][{self.width}];" for at in kept]
        for depth in sorted({depths[r] for r in _reductions(self.expression)}):
            lines += self._reduce(_roots(self.expression, depth), items, kept, depth == 0)
        wanted = needed(self.expression, self.expression.outputs, kept)
        body = [*self._seeds(wanted, kept), *self._loads(wanted, kept), *self._results(kept)]
        return [*lines, *self._columns(body, items)]

    def _is_column(self, at: int) -> bool:
        """Whether an instruction reads the one number that an operand has for a row."""
        i = self.expression.instructions[at]
        return i.op is Op.INPUT and i.index >= self.seeds and self.operands[i.index].access is Access.COLUMN

    def _columns(self, body: list[str], items: int) -> list[str]:
        step = f"g.size() * {self.width}"
        if not items:
            head = f"for (int64_t c = int64_t(g.rank()) * {self.width}; c < columns; c += {step}) "
            return [head + _block(body)]
        first = f"const int64_t c = (int64_t(k) * g.size() + g.rank()) * {self.width};"
        inner = _block([first, "if (c < columns) " + _block(body)])
        return ["#pragma unroll", f"for (int k = 0; k < {items}; ++k) " + inner]

    def _inputs(self, wanted: Sequence[int], kept: Collection[int]) -> list[int]:
        """Numbers of the inputs that ``wanted`` instructions read one element after the other."""
        instructions = self.expression.instructions
        found = {at for at in wanted if instructions[at].op is Op.INPUT and at not in kept and not self._is_column(at)}
        return sorted({instructions[at].index for at in found})

    def _seeds(self, wanted: Sequence[int], kept: Collection[int]) -> list[str]:
        lines = []
        for i in self._inputs(wanted, kept):
            if i < self.seeds:
                lines += [f"float a{i}[{self.width}];", f"device::load_row(s{i}, c, c + {self.width}, true, a{i});"]
        return lines

    def _loads(self, wanted: Sequence[int], kept: Collection[int]) -> list[str]:
        lines = []
        for i in self._inputs(wanted, kept):
            if i >= self.seeds:
                lines += [f"float a{i}[{self.width}];", f"device::load_row(p{i}, c, columns, vector, a{i});"]
        return lines

    def _compute(self, wanted: Sequence[int], kept: Collection[int]) -> list[str]:
        """Statements for element ``e`` of a vector."""
        instructions = self.expression.instructions
        lines = []
        for at in wanted:
            i = instructions[at]
            if i.op in REDUCTIONS:
                continue
            if at in kept:
                lines.append(f"const float v{at} = k{at}[k][e];")
                continue
            if i.op is Op.INPUT and not self._is_column(at):
                lines.append(f"const float v{at} = a{i.index}[e];")
            else:
                lines.append(_statement(self.expression, at))
        return lines

    def _elements(self, body: list[str]) -> list[str]:
        return ["#pragma unroll", f"for (int e = 0; e < {self.width}; ++e) " + _block(body)]

    def _results(self, kept: Collection[int]) -> list[str]:
        outputs, narrow = self.expression.outputs, self.expression.narrow
        lines = [f"float b{j}[{self.width}];" for j in range(len(outputs))]
        body = self._compute(needed(self.expression, outputs, kept), kept)
        lines += self._elements([*body, *(f"b{j}[e] = v{o};" for j, o in enumerate(outputs))])
        stores = [
            f"if (c == 0) device::store_row(q{j}, 0, 1, false, b{j});"
            if j in narrow
            else f"device::store_row(q{j}, c, columns, vector, b{j});"
            for j in range(len(outputs))
        ]
        return lines + stores

    def _reduce(self, roots: Sequence[int], items: int, kept: Collection[int], fills: bool) -> list[str]:
        instructions = self.expression.instructions
        sources = [instructions[r].args[0] for r in roots]
        leaves = () if fills else kept
        wanted = needed(self.expression, sources, leaves)
        lines = [f"float r{r} = {_IDENTITY[instructions[r].op]};" for r in roots]
        add = []
        for r, s in zip(roots, sources, strict=True):
            total = f"device::math::maximum(r{r}, v{s})" if instructions[r].op is Op.ROW_MAX else f"r{r} + v{s}"
            add.append(f"if (c + e < columns) r{r} = {total};")
        keep = [f"k{at}[k][e] = v{at};" for at in kept] if fills else []
        loads = [*self._seeds(wanted, leaves), *self._loads(wanted, leaves)]
        body = [*loads, *self._elements([*self._compute(wanted, leaves), *keep, *add])]
        lines += self._columns(body, items)
        for r in roots:
            total = f"g.{'maximum' if instructions[r].op is Op.ROW_MAX else 'sum'}(r{r})"
            mean = " / float(columns)" if instructions[r].op is Op.ROW_MEAN else ""
            lines.append(f"const float v{r} = {total}{mean};")
        return lines


def _block(lines: Sequence[str]) -> str:
    return "{\n" + textwrap.indent("\n".join(lines), "  ", lambda line: not line.startswith("#")) + "\n}"
