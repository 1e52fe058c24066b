"""Row expressions as C++: the statements that templates place in their loops."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fuser.ir.expression import REDUCTIONS, Expression, Op
from fuser.kernels.base import Access, DType, Operand

C_TYPES = {
    DType.F32: "float",
    DType.BF16: "simd::bf16",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.I8: "int8_t",
    DType.U8: "uint8_t",
    DType.BOOL: "uint8_t",
}

INFIX = {Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.DIV: "/"}
_IDENTITY = {Op.ROW_SUM: "0.0f", Op.ROW_MEAN: "0.0f", Op.ROW_MAX: "-__builtin_inff()"}
_UNROLL = 4
_POSITIVE = frozenset({Op.EXP, Op.SIGMOID})
_ROUGH = _POSITIVE | {Op.SILU, Op.GELU, Op.GELU_TANH}
"""Functions that ``simd::rough`` has."""
_KEEP_ERRORS = frozenset(
    {Op.MUL, Op.DIV, Op.NEG, Op.ABS, Op.RECIPROCAL, Op.SQRT, Op.RSQRT, Op.MAXIMUM, Op.MINIMUM, Op.WHERE, Op.TO_BF16}
)
"""What has no larger relative error than its operands; sums of positive numbers have none either."""


def literal(value: float) -> str:
    """A float as a C++ literal that reads back as the same fp32 number."""
    if value != value:
        return '__builtin_nanf("")'
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "__builtin_inff()"
    return f"{value!r}f"


def _statement(expression: Expression, position: int, rough: Collection[int] = ()) -> str:
    i = expression.instructions[position]
    args = [f"v{a}" for a in i.args]
    if i.op is Op.INPUT:
        body = f"x{i.index}"
    elif i.op is Op.CONSTANT:
        body = f"simd::set1({literal(i.value)})"
    elif i.op is Op.MUL and expression.rounds:
        body = f"simd::mul_rounded({', '.join(args)})"
    elif i.op in INFIX:
        body = f" {INFIX[i.op]} ".join(args)
    else:
        body = f"simd::{'rough::' if position in rough else ''}{i.op.value}({', '.join(args)})"
    return f"const simd::vf v{position} = {body};"


def rough_calls(expression: Expression, outputs: Sequence[DType]) -> frozenset[int]:
    """Instructions whose functions may be as rough as the rounding of outputs to bf16: what these have of them went
    through nothing that makes relative errors larger, as differences do."""
    instructions = expression.instructions
    if set(outputs) != {DType.BF16}:
        return frozenset()
    exact: set[int] = set()
    for at in range(len(instructions) - 1, -1, -1):
        keeps = _KEEP_ERRORS | (REDUCTIONS if instructions[at].op in _POSITIVE else set())
        readers = [(n, i) for n, i in enumerate(instructions) if at in i.args]
        if any(n in exact or i.op not in keeps for n, i in readers):
            exact.add(at)
    return frozenset(at for at, i in enumerate(instructions) if at not in exact and i.op in _ROUGH)


def needed(expression: Expression, roots: Sequence[int], leaves: Collection[int] = ()) -> list[int]:
    """Instructions that ``roots`` need in one pass; finished reductions and ``leaves`` need nothing."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if expression.instructions[at].op not in REDUCTIONS and at not in leaves:
            todo.extend(expression.instructions[at].args)
    return sorted(seen)


def statements(expression: Expression) -> list[str]:
    """The expression on one vector, for expressions without reductions.

    Reads ``x0``, ``x1``, … (``simd::vf``); output ``j`` is the variable ``v{expression.outputs[j]}``.
    """
    return [_statement(expression, at) for at in needed(expression, expression.outputs)]


def row_function(
    name: str,
    expression: Expression,
    operands: Sequence[Operand],
    outputs: Sequence[DType],
    *,
    scratch: bool = False,
) -> str:
    """A C++ function that evaluates the expression for one row. With ``scratch``, the row of the first input, in fp32,
    may be overwritten: from pass to pass it keeps what later ones need, if that is one value.

    Signature: ``name(int64_t columns, const T0* p0, …, U0* q0, …)``; a pointer for every input (for a COLUMN operand
    to its one number), then for every output. An output may be the same row as an input.
    Outputs that are ``narrow`` get one number.
    Functions are those of :func:`rough_calls` where these may be.
    """
    depths = expression.depths()
    reductions = [i for i, ins in enumerate(expression.instructions) if ins.op in REDUCTIONS]
    parameters = [f"{'' if scratch and i == 0 else 'const '}{C_TYPES[o.dtype]}* p{i}" for i, o in enumerate(operands)]
    parameters += [f"{C_TYPES[o]}* q{i}" for i, o in enumerate(outputs)]
    columns = {i for i, o in enumerate(operands) if o.access is Access.COLUMN}
    rough = rough_calls(expression, outputs)
    lines = [f"const simd::vf x{i} = simd::set1(simd::to_float(*p{i}));" for i in sorted(columns)]
    held: _Row | None = None
    for depth in sorted({depths[r] for r in reductions}):
        kept = _lasting(expression, depth, outputs, scratch)
        roots = [r for r in reductions if depths[r] == depth]
        lines += _reduce_pass(expression, roots, columns, rough, held, kept)
        # What was kept is overwritten, or still what later passes start from.
        held = held if kept is None else kept
    lines += _map_pass(expression, columns, rough, held, paired=DType.BF16 in outputs)
    used = {i.index for i in expression.instructions if i.op is Op.INPUT}
    unused = [f"(void)p{i};" for i in range(len(operands)) if i not in used]
    body = textwrap.indent("\n".join(unused + lines), "  ")
    return f"FUSER_INLINE void {name}(int64_t columns, {', '.join(parameters)}) {{\n{body}\n}}"


class _Row(NamedTuple):
    """A row of fp32 in memory, by the name of the pointer to it, that has the values of an instruction."""

    at: int
    pointer: str


def _lasting(expression: Expression, depth: int, outputs: Sequence[DType], scratch: bool) -> _Row | None:
    """The one instruction that a pass can compute and later passes read, if all of these follow from it, from operands
    and from what is one number a row, and where it is kept; None where there are several, an operand itself, or no
    place."""
    instructions, depths = expression.instructions, expression.depths()
    read = {o for j, o in enumerate(expression.outputs) if depths[o] <= depth and j not in expression.narrow}
    read |= {a for at, i in enumerate(instructions) if depths[at] > depth for a in i.args if depths[a] <= depth}
    varying = _varying(expression)
    read = {at for at in read if at in varying and (instructions[at].op is not Op.INPUT or instructions[at].index == 0)}
    (only,) = read if len(read) == 1 else (None,)
    if only is None or instructions[only].op is Op.INPUT:
        return None
    if only in expression.outputs and depth + 1 == max(depths):
        # Its place may be that of an operand, which nothing may read from then on.
        rest = needed(expression, expression.outputs, (only,))
        output = expression.outputs.index(only)
        if outputs[output] is DType.F32 and not any(instructions[at].op is Op.INPUT for at in rest):
            return _Row(only, f"q{output}")
    return _Row(only, "p0") if scratch else None


def _varying(expression: Expression) -> set[int]:
    """Instructions that differ from column to column, as far as operands do."""
    found: set[int] = set()
    for at, i in enumerate(expression.instructions):
        if i.op is Op.INPUT or (i.op not in REDUCTIONS and any(a in found for a in i.args)):
            found.add(at)
    return found


def _loads(expression: Expression, steps: Sequence[int], columns: set[int], load: str) -> list[str]:
    inputs = sorted({expression.instructions[n].index for n in steps if expression.instructions[n].op is Op.INPUT})
    return [f"const simd::vf x{i} = {load.format(p=f'p{i}')};" for i in inputs if i not in columns]


def _body(
    expression: Expression,
    roots: Sequence[int],
    columns: set[int],
    load: str,
    rough: Collection[int],
    held: _Row | None = None,
) -> list[str]:
    """Statements for ``roots``, of which ``held`` is in memory."""
    leaves = () if held is None else (held.at,)
    steps = needed(expression, roots, leaves)
    computed = [at for at in steps if expression.instructions[at].op not in REDUCTIONS and at not in leaves]
    lines = _loads(expression, computed, columns, load)
    if held is not None and held.at in steps:
        lines.append(f"const simd::vf v{held.at} = {load.format(p=held.pointer)};")
    return lines + [_statement(expression, at, rough) for at in computed]


def _accumulate(expression: Expression, reduction: int, into: str, value: str) -> str:
    instruction = expression.instructions[reduction]
    if instruction.op is not Op.ROW_MAX:
        return f"{into} += {value};"
    return f"{into} = simd::{'larger_bits' if _of_magnitudes(expression, reduction) else 'maximum'}({into}, {value});"


def _of_magnitudes(expression: Expression, reduction: int) -> bool:
    """Whether a maximum is that of magnitudes, of which the order of bits is that of numbers, with NaN above them."""
    return expression.instructions[expression.instructions[reduction].args[0]].op is Op.ABS


def _loop(header: str, body: Sequence[str]) -> list[str]:
    return [f"{header} {{", *(f"  {line}" for line in body), "}"]


def _reduce_pass(
    expression: Expression,
    roots: Sequence[int],
    columns: set[int],
    rough: Collection[int],
    held: _Row | None,
    kept: _Row | None,
) -> list[str]:
    """A pass that completes the reductions ``roots``. It finds ``held`` in memory, and leaves ``kept`` there."""
    lines = []
    instructions = expression.instructions
    sources = [instructions[r].args[0] for r in roots]
    for r in roots:
        identity = _IDENTITY[instructions[r].op]
        fill = ", ".join(f"simd::set1({identity})" for _ in range(_UNROLL))
        lines.append(f"simd::vf a{r}[{_UNROLL}] = {{{fill}}};")
    pairs = list(zip(roots, sources, strict=True))
    wanted = sources if kept is None else [*sources, kept.at]
    unrolled = _body(expression, wanted, columns, "simd::load({p} + c + u * simd::kLanes)", rough, held)
    unrolled += [_accumulate(expression, r, f"a{r}[u]", f"v{s}") for r, s in pairs]
    single = _body(expression, wanted, columns, "simd::load({p} + c)", rough, held)
    single += [_accumulate(expression, r, f"a{r}[0]", f"v{s}") for r, s in pairs]
    tail = _body(expression, wanted, columns, "simd::load_n({p} + c, columns - c)", rough, held)
    if kept is not None:
        unrolled.append(f"simd::store({kept.pointer} + c + u * simd::kLanes, v{kept.at});")
        single.append(f"simd::store({kept.pointer} + c, v{kept.at});")
        tail.append(f"simd::store_n({kept.pointer} + c, v{kept.at}, columns - c);")
    tail += [
        _accumulate(
            expression,
            r,
            f"a{r}[0]",
            f"simd::select(simd::first(columns - c), v{s}, simd::set1({_IDENTITY[instructions[r].op]}))",
        )
        for r, s in pairs
    ]
    lines.append("{")
    inner = ["int64_t c = 0;"]
    inner += _loop(
        f"for (; c + {_UNROLL} * simd::kLanes <= columns; c += {_UNROLL} * simd::kLanes)",
        _loop(f"for (int u = 0; u < {_UNROLL}; ++u)", unrolled),
    )
    inner += _loop("for (; c + simd::kLanes <= columns; c += simd::kLanes)", single)
    inner += _loop("if (c < columns)", tail)
    lines += [f"  {line}" for line in inner] + ["}"]
    for r in roots:
        op = instructions[r].op
        lines += _loop(f"for (int u = 1; u < {_UNROLL}; ++u)", [_accumulate(expression, r, f"a{r}[0]", f"a{r}[u]")])
        largest = "larger_bits" if _of_magnitudes(expression, r) else "max"
        total = f"simd::reduce_{largest if op is Op.ROW_MAX else 'add'}(a{r}[0])"
        if op is Op.ROW_MEAN:
            total += " / float(columns)"
        lines.append(f"const simd::vf v{r} = simd::set1({total});")
    return lines


def _map_pass(
    expression: Expression, columns: set[int], rough: Collection[int], held: _Row | None, paired: bool
) -> list[str]:
    """With ``paired``, vectors are stored two at a time, as bf16 numbers are rounded."""
    narrow = expression.narrow
    there = None if held is None else held.pointer
    wide = [(j, o) for j, o in enumerate(expression.outputs) if j not in narrow and there != f"q{j}"]
    lines = []
    if narrow:
        once = [(j, o) for j, o in enumerate(expression.outputs) if j in narrow]
        body = _body(expression, [o for _, o in once], columns, "", rough, held)
        lines += ["{", *(f"  {line}" for line in body)]
        lines += [*(f"  simd::store_n(q{j}, v{o}, 1);" for j, o in once), "}"]
    if not wide:
        return lines
    roots = [o for _, o in wide]
    full = _body(expression, roots, columns, "simd::load({p} + c)", rough, held)
    full += [f"simd::store(q{j} + c, v{o});" for j, o in wide]
    tail = _body(expression, roots, columns, "simd::load_n({p} + c, columns - c)", rough, held)
    tail += [f"simd::store_n(q{j} + c, v{o}, columns - c);" for j, o in wide]
    pairs = []
    if paired:
        both = _body(expression, roots, columns, "simd::load({p} + c + u * simd::kLanes)", rough, held)
        both += [f"y{j}[u] = v{o};" for j, o in wide]
        loop = [f"simd::vf y{j}[2];" for j, _ in wide]
        loop += ["#pragma GCC unroll 2", *_loop("for (int u = 0; u < 2; ++u)", both)]
        loop += [f"simd::store(q{j} + c, y{j}[0], y{j}[1]);" for j, _ in wide]
        pairs = _loop("for (; c + 2 * simd::kLanes <= columns; c += 2 * simd::kLanes)", loop)
    return [
        *lines,
        "int64_t c = 0;",
        *pairs,
        *_loop("for (; c + simd::kLanes <= columns; c += simd::kLanes)", full),
        *_loop("if (c < columns)", tail),
    ]
