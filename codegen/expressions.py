"""Row expressions as C++: the statements that templates place in their loops."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

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
    narrow: Collection[int] = (),
) -> str:
    """A C++ function that evaluates the expression for one row. Outputs at the positions ``narrow`` are one number.

    Signature: ``name(int64_t columns, const T0* p0, …, U0* q0, …)``; a pointer for every input (for a COLUMN operand
    to its one number), then for every output. An output may be the same row as an input.
    Functions are those of :func:`rough_calls` where these may be.
    """
    depths = expression.depths()
    reductions = [i for i, ins in enumerate(expression.instructions) if ins.op in REDUCTIONS]
    parameters = [f"const {C_TYPES[o.dtype]}* p{i}" for i, o in enumerate(operands)]
    parameters += [f"{C_TYPES[o]}* q{i}" for i, o in enumerate(outputs)]
    columns = {i for i, o in enumerate(operands) if o.access is Access.COLUMN}
    rough = rough_calls(expression, outputs)
    lines = [f"const simd::vf x{i} = simd::set1(simd::to_float(*p{i}));" for i in sorted(columns)]
    for depth in sorted({depths[r] for r in reductions}):
        lines += _reduce_pass(expression, [r for r in reductions if depths[r] == depth], columns, rough)
    lines += _map_pass(expression, columns, narrow, rough, paired=DType.BF16 in outputs)
    used = {i.index for i in expression.instructions if i.op is Op.INPUT}
    unused = [f"(void)p{i};" for i in range(len(operands)) if i not in used]
    body = textwrap.indent("\n".join(unused + lines), "  ")
    return f"FUSER_INLINE void {name}(int64_t columns, {', '.join(parameters)}) {{\n{body}\n}}"


def _loads(expression: Expression, steps: Sequence[int], columns: set[int], load: str) -> list[str]:
    inputs = sorted({expression.instructions[n].index for n in steps if expression.instructions[n].op is Op.INPUT})
    return [f"const simd::vf x{i} = {load.format(p=f'p{i}')};" for i in inputs if i not in columns]


def _body(
    expression: Expression, roots: Sequence[int], columns: set[int], load: str, rough: Collection[int]
) -> list[str]:
    steps = needed(expression, roots)
    lines = _loads(expression, steps, columns, load)
    return lines + [
        _statement(expression, at, rough) for at in steps if expression.instructions[at].op not in REDUCTIONS
    ]


def _accumulate(op: Op, into: str, value: str) -> str:
    return f"{into} = simd::maximum({into}, {value});" if op is Op.ROW_MAX else f"{into} += {value};"


def _loop(header: str, body: Sequence[str]) -> list[str]:
    return [f"{header} {{", *(f"  {line}" for line in body), "}"]


def _reduce_pass(expression: Expression, roots: Sequence[int], columns: set[int], rough: Collection[int]) -> list[str]:
    lines = []
    instructions = expression.instructions
    sources = [instructions[r].args[0] for r in roots]
    for r in roots:
        identity = _IDENTITY[instructions[r].op]
        fill = ", ".join(f"simd::set1({identity})" for _ in range(_UNROLL))
        lines.append(f"simd::vf a{r}[{_UNROLL}] = {{{fill}}};")
    pairs = list(zip(roots, sources, strict=True))
    unrolled = _body(expression, sources, columns, "simd::load({p} + c + u * simd::kLanes)", rough)
    unrolled += [_accumulate(instructions[r].op, f"a{r}[u]", f"v{s}") for r, s in pairs]
    single = _body(expression, sources, columns, "simd::load({p} + c)", rough)
    single += [_accumulate(instructions[r].op, f"a{r}[0]", f"v{s}") for r, s in pairs]
    tail = _body(expression, sources, columns, "simd::load_n({p} + c, columns - c)", rough)
    tail += [
        _accumulate(
            instructions[r].op,
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
        lines += _loop(f"for (int u = 1; u < {_UNROLL}; ++u)", [_accumulate(op, f"a{r}[0]", f"a{r}[u]")])
        total = f"simd::reduce_{'max' if op is Op.ROW_MAX else 'add'}(a{r}[0])"
        if op is Op.ROW_MEAN:
            total += " / float(columns)"
        lines.append(f"const simd::vf v{r} = simd::set1({total});")
    return lines


def _map_pass(
    expression: Expression, columns: set[int], narrow: Collection[int], rough: Collection[int], paired: bool
) -> list[str]:
    """With ``paired``, vectors are stored two at a time, as bf16 numbers are rounded."""
    wide = [(j, o) for j, o in enumerate(expression.outputs) if j not in narrow]
    lines = []
    if narrow:
        once = [(j, o) for j, o in enumerate(expression.outputs) if j in narrow]
        body = _body(expression, [o for _, o in once], columns, "", rough)
        lines += ["{", *(f"  {line}" for line in body)]
        lines += [*(f"  simd::store_n(q{j}, v{o}, 1);" for j, o in once), "}"]
    if not wide:
        return lines
    roots = [o for _, o in wide]
    full = _body(expression, roots, columns, "simd::load({p} + c)", rough)
    full += [f"simd::store(q{j} + c, v{o});" for j, o in wide]
    tail = _body(expression, roots, columns, "simd::load_n({p} + c, columns - c)", rough)
    tail += [f"simd::store_n(q{j} + c, v{o}, columns - c);" for j, o in wide]
    pairs = []
    if paired:
        both = _body(expression, roots, columns, "simd::load({p} + c + u * simd::kLanes)", rough)
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
