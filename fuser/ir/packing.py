"""Leaving out padding: a graph over (batch, sequence) rewritten as one over the rows that are no padding.

Rows are what operators compute independently of each other: one for each position of each batch entry. Attention alone
lets rows of one entry meet, and a mask says which of them are keys. A row that is no key of any attention influences
nothing but itself, so the model's other rows are the same without it. :func:`pack` shows that all of a graph is made of
such operators, and writes it down for ``tokens`` rows, one entry behind the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuser.ir.binding import Binder
from fuser.ir.errors import PackingError
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.masks import Mask
from fuser.ir.operators import (
    PV,
    QK,
    AdditiveMask,
    BiasByDistance,
    BooleanMask,
    ChangeScores,
    DocumentMask,
    Embedding,
    Extern,
    PatternMask,
    PredictedAttention,
    Product,
    Ref,
    Scale,
    Softmax,
    TorchCall,
    View,
)
from fuser.ir.size import Size, named, names

TOKENS = "tokens"
"""The name of the number of packed rows."""
_SCORES = (Scale, ChangeScores, PatternMask, BiasByDistance, BooleanMask, AdditiveMask, Softmax)


@dataclass(frozen=True)
class RowAxes:
    """Which dimensions of a value count its rows: positions, and batch entries, where it has any. With ``merged``, one
    dimension counts both, entry by entry."""

    sequence: int
    batch: int | None = None
    merged: bool = False

    def gather(self, value: Tensor, rows: Tensor, length: int) -> Tensor:
        """``rows`` of (B, S, …), numbered entry by entry, as (1, T, …), wherever these dimensions are; rows of a value
        that all entries share are its positions. ``length`` is S."""
        if self.merged:
            return value.index_select(self.sequence, rows)
        if self.batch is None:
            return value.index_select(self.sequence, rows % length)
        by_rows = value.movedim((self.batch, self.sequence), (0, 1)).flatten(0, 1)
        return by_rows.index_select(0, rows)[None].movedim((0, 1), (self.batch, self.sequence)).contiguous()

    def scatter(self, packed: Tensor, rows: Tensor, into: Tensor) -> None:
        """The inverse: (1, T, …) in the places ``rows`` (T,) of ``into`` (B, S, …), which is contiguous."""
        if self.merged or self.batch is None:
            into.index_copy_(self.sequence, rows, packed)
        elif (self.batch, self.sequence) == (0, 1):
            into.flatten(0, 1).index_copy_(0, rows, packed[0])
        else:
            places = into.movedim((self.batch, self.sequence), (0, 1))
            length = places.shape[1]
            places[rows // length, rows % length] = packed.movedim((self.batch, self.sequence), (0, 1))[0]


@dataclass(frozen=True)
class Pattern:
    """What constants allow in an attention: keys up to the query where it is ``causal``, of those of ``mask``."""

    causal: bool
    mask: Mask | None


@dataclass(frozen=True)
class PackedLayout:
    """What running the two parts of a :class:`PackedGraph` needs to know of them.

    ``masks`` is how many results of ``before`` are masks, ``mask_inputs`` which of the model's inputs, by position,
    these follow from, ``gathered`` where the rows of the next ones are.
    """

    masks: int
    mask_inputs: tuple[int, ...]
    gathered: tuple[RowAxes, ...]
    picks: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    by_distance: bool
    """Whether rows that are neighbours have to be neighbours in the sequence."""
    outputs: tuple[RowAxes | None, ...]
    """Where the rows of an output are; None for one that has none."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the model's outputs."""
    dtypes: tuple[torch.dtype, ...]
    batch: int
    sequence: int

    @functools.cached_property
    def bound(self) -> Binder[tuple[tuple[tuple[int, ...], ...], tuple[Pattern, ...], int, int]]:
        """Shapes of outputs, patterns, and the numbers of entries and positions, for some sizes."""
        return Binder((self.shapes, self.patterns, self.batch, self.sequence))


@dataclass(frozen=True)
class PackedGraph:
    """A graph in two parts.

    ``before`` takes the model's inputs and makes the masks, then the values gathered by rows, then those that ``rows``
    takes as they are. ``rows`` takes the gathered ones with ``tokens`` rows, those others, for each of the layout's
    ``picks`` (positions) the rows that are at this position, (B,) int64, and what a
    :class:`~fuser.ir.operators.DocumentMask` reads: rows, length, keys, and for each of its ``patterns`` the plan.
    ``masks`` are (B, S): whether a position is a key of its entry, or numbers to add.
    """

    before: OperatorGraph
    rows: OperatorGraph
    masks: tuple[str, ...]
    layout: PackedLayout


def _inputs_of(graph: OperatorGraph, values: Iterable[str]) -> tuple[int, ...]:
    """Which of a graph's inputs values follow from, by position."""
    needed = set(values)
    for op in reversed(graph.operators):
        if needed.intersection(op.outputs):
            needed.update(op.inputs)
    return tuple(i for i, value in enumerate(graph.inputs) if value in needed)


def pack(graph: OperatorGraph) -> PackedGraph:
    """``graph`` for rows that are no padding. Raises PackingError, with the reason, where rows influence each other
    otherwise than by attention under a mask, or where there is no such mask."""
    return _Packer(graph).packed()


class _Packer:
    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        self.batch, self.sequence = _sizes(graph)
        self.rows: dict[str, RowAxes] = {}
        """The values that are packed."""
        self.late: set[str] = set()
        """Values that follow from packed ones, but are no rows."""
        self.plain: list[Operator] = []
        self.body: list[Operator] = []
        self.is_packed: set[str] = set()
        """Names of operators whose sizes are those of packed rows."""
        self.gathered: dict[str, RowAxes] = {}
        self.masks: dict[str, tuple[Operator, TensorSpec]] = {}
        self.picks: dict[int, str] = {}
        self.picked: dict[str, TensorSpec] = {}
        self.patterns: dict[Pattern, None] = {}
        self.by_distance = False
        self.done: set[str] = set()

    def packed(self) -> PackedGraph:
        graph = self.graph
        if graph.states or graph.aliases or graph.updated:
            raise PackingError("it keeps values between calls, or returns its inputs")
        for op in graph.operators:
            if op.semantics.is_random:
                raise PackingError(f"{op.name} draws random numbers")
            if op.name not in self.done:
                self._operator(op)
        outputs = tuple(self.rows.get(value) for value in graph.outputs)
        for value, axes in zip(graph.outputs, outputs, strict=True):
            shared = axes is not None and axes.batch is None and not axes.merged and self.batch != 1
            if shared or (axes is None and value not in self.late):
                raise PackingError(f"its output {value} is made before there are rows")
        return self._finished(outputs)

    # ---- operators

    def _operator(self, op: Operator) -> None:
        if isinstance(op.semantics, QK):
            self._attention(op)
        elif isinstance(op.semantics, PredictedAttention):
            self._predicted(op, op.semantics)
        elif any(value in self.rows for value in op.inputs):
            (self._view if self.graph.is_alias(op) else self._row_wise)(op)
        elif self._starts(op):
            self._row_wise(op)
        elif any(value in self.late for value in op.inputs):
            self.body.append(op)
            self.late.update(op.outputs)
        else:
            self.plain.append(op)

    def _starts(self, op: Operator) -> bool:
        """Whether it is where rows begin: an operator of weight, on a value that has them."""
        at = 1 if isinstance(op.semantics, Embedding) else 0 if isinstance(op.semantics, Product) else None
        return at is not None and op.inputs[at] not in self.late and self._axes(op.inputs[at]) is not None

    def _row_wise(self, op: Operator) -> None:
        shapes = [self.graph.values[value].shape for value in op.inputs]
        out, *others = op.outputs
        axes = self._axes(out)
        kept = axes is not None and op.semantics.keeps_rows(shapes, self.graph.values[out].shape)
        if axes is None or not kept or any(self._axes(other) != axes for other in others):
            raise PackingError(f"{_called(op)} mixes the rows of different positions")
        is_last = axes.sequence == len(self.graph.values[out].shape) - 1
        expression = op.expression
        if is_last and not isinstance(op.semantics, Embedding) and (expression is None or expression.has_reduction):
            raise PackingError(f"{_called(op)} goes along the sequence")
        inputs, product = [], op.semantics if isinstance(op.semantics, Product) else None
        for i, value in enumerate(op.inputs):
            if i in op.semantics.gathers or (product and i not in product.rows(len(op.inputs))):
                if value in self.rows:
                    raise PackingError(f"{_called(op)} looks up rows of the sequence")
                inputs.append(value)
                continue
            beyond = 1 if isinstance(op.semantics, Embedding) else 0
            inputs.append(self._operand(op, value, axes, len(self.graph.values[out].shape) - beyond))
        self._emit(replace(op, inputs=tuple(inputs)), axes)

    def _operand(self, op: Operator, value: str, axes: RowAxes, rank: int) -> str:
        """An input of a row-wise operator whose ``axes`` count rows among the last ``rank`` dimensions."""
        spec = self.graph.values[value]
        if not any(names(size) for size in spec.shape):
            return value
        found = self._axes(value)
        if found is None or (value in self.late):
            raise PackingError(f"{_called(op)} combines rows with {value}, which has none of its own")
        shift = rank - len(spec.shape)
        same = (
            found.sequence + shift == axes.sequence
            and found.merged == axes.merged
            and (found.batch is None or found.batch + shift == axes.batch)
        )
        if not same:
            raise PackingError(f"{_called(op)} combines rows of different positions")
        return value if value in self.rows else self._gather(value, found)

    def _view(self, op: Operator) -> None:
        """The same rows seen otherwise, or one of each entry."""
        (out,) = op.outputs
        spec = self.graph.values[out]
        base = self.graph.base(out)
        inner = self.graph.values[base]
        base_axes = self._axes(base)
        if base_axes is None:
            raise PackingError(f"{out} is a view of what has no rows")
        axes = self._axes(out)
        outer = _row_strides(inner, base_axes, self.sequence)
        if axes is not None and _stays_inside(spec, axes, inner, base_axes):
            entry, position = _row_strides(spec, axes, self.sequence)
            # All entries may see the rows that they share.
            if position == outer[1] and (entry == outer[0] or (outer[0] is None and entry == 0)):
                self._emit(op, axes)
                return
        if axes is None and not isinstance(spec.offset, Size) and self._pick(op, spec, inner, base_axes, outer):
            return
        raise PackingError(f"{out}, a view of {base}, takes some positions of it, or puts them in another order")

    def _pick(
        self, op: Operator, spec: TensorSpec, inner: TensorSpec, axes: RowAxes, outer: tuple[int | None, int]
    ) -> bool:
        """Whether a view has the rows at one position of all entries, which it then becomes a copy of."""
        stride = outer[1]
        counts = [d for d, size in enumerate(spec.shape) if size == self.batch]
        if isinstance(stride, Size) or any(names(s) for d, s in enumerate(spec.shape) if d not in counts[:1]):
            return False
        if isinstance(self.batch, Size) and (counts != [0] or spec.strides[0] != outer[0]):
            return False
        position, offset = divmod(spec.offset, stride)
        dims = spec.shape[1:] if counts[:1] == [0] else spec.shape
        strides = spec.strides[1:] if counts[:1] == [0] else spec.strides
        row = TensorSpec(tuple(dims), spec.dtype, tuple(strides))
        if any(isinstance(s, Size) for s in row.strides) or offset + row.extent > stride:
            return False
        rows = self.picks.setdefault(position, f"rows_at_{position}")
        arguments = (axes.sequence, tuple(dims), tuple(strides), offset, tuple(spec.shape))
        call = TorchCall(_picked, (Ref(0), Ref(1), *arguments))
        base = self.graph.base(op.output)
        self.body.append(Operator(op.name, Extern(call, "rows of one position"), (base, rows), op.outputs))
        self.picked[op.output] = TensorSpec.contiguous(spec.shape, spec.dtype)
        self.late.add(op.output)
        return True

    def _attention(self, qk: Operator) -> None:
        """Attention of rows to rows of their entry, whose masks become intervals."""
        chain = [qk]
        while not isinstance(chain[-1].semantics, PV):
            value = chain[-1].output
            readers = self.graph.readers(value)
            if len(readers) != 1 or self.graph.escapes(value) or not isinstance(readers[0].semantics, (*_SCORES, PV)):
                raise PackingError(f"something else than attention reads the scores {value}")
            chain.append(readers[0])
        views = [op for op in self.graph.operators if self.graph.is_alias(op) and op.inputs[0] in self.rows]
        for op in views:
            # The values of attention may be seen as heads after its scores.
            if op.output in chain[-1].inputs and op.name not in self.done and op.output not in self.rows:
                self._operator(op)
                self.done.add(op.name)
        causal, pattern, attn_masks, biases = False, None, [], []
        for op in chain:
            if isinstance(op.semantics, PatternMask):
                causal |= op.semantics.causal
                if op.semantics.pattern is not None:
                    pattern = op.semantics.pattern if pattern is None else pattern & op.semantics.pattern
            elif isinstance(op.semantics, (BooleanMask, AdditiveMask)):
                attn_masks.append(op.inputs[1])
            elif isinstance(op.semantics, BiasByDistance):
                biases.append(op)
        plan = self._plan(qk, (*qk.inputs, chain[-1].inputs[1]), attn_masks, Pattern(causal, pattern))
        self.by_distance |= bool(biases)
        masked = False
        previous = ""
        for op in chain:
            self.done.add(op.name)
            if isinstance(op.semantics, (PatternMask, BooleanMask, AdditiveMask)):
                if not masked:
                    mask = DocumentMask(causal, pattern)
                    self._emit(Operator(op.name, mask, (previous, *_ROWS, plan), op.outputs), None)
                    previous, masked = op.output, True
                continue
            inputs = op.inputs if op is qk else (previous, *op.inputs[1:])
            self._emit(replace(op, inputs=inputs), self._axes(op.output) if op is chain[-1] else None)
            previous = op.output

    def _predicted(self, op: Operator, semantics: PredictedAttention) -> None:
        """Attention that decides by few bits, if what it decides of a row is the same without padding."""
        operands, attn_masks = op.inputs[:3], op.inputs[3:]
        if not semantics.quantize.is_by_document(semantics.rule):
            raise PackingError(f"{op.name} compares scores with those of other rows, padding among them")
        added = any(self.graph.values[value].dtype != torch.bool for value in attn_masks)
        if semantics.quantize.unmasked_maximum and added:
            raise PackingError(f"{op.name} compares scores with those of padding")
        pattern = None if semantics.pattern.allows_all else semantics.pattern
        plan = self._plan(op, operands, attn_masks, Pattern(False, pattern))
        packed = replace(op, semantics=replace(semantics, packed=True), inputs=(*operands, *_ROWS, plan))
        self._emit(packed, self._axes(op.output))

    def _plan(self, op: Operator, operands: Sequence[str], attn_masks: Sequence[str], pattern: Pattern) -> str:
        """The plan of attention of rows to rows under masks of padding and a pattern."""
        if any(value not in self.rows for value in operands):
            raise PackingError(f"{op.name} attends to something that is no part of the sequence")
        if not attn_masks:
            raise PackingError(f"{op.name} attends to all positions, with no mask of padding")
        for value in attn_masks:
            self._mask(op, value)
        self.patterns.setdefault(pattern)
        return _plan_input(list(self.patterns).index(pattern))

    def _mask(self, qk: Operator, value: str) -> None:
        """Let ``before`` give a mask of scores as one of keys."""
        spec = self.graph.values[value]
        batch, _, _, key = spec.strides
        if value in self.rows or value in self.late:
            raise PackingError(f"the mask of {qk.name} follows from rows")
        if not (self._repeats(value, 1) and self._repeats(value, 2)):
            raise PackingError(f"the mask of {qk.name} is not of padding alone: it differs by head, or by query")
        name = f"{value}_keys"
        if name in self.masks:
            return
        keys = TensorSpec((spec.shape[0], spec.shape[3]), spec.dtype, (batch, key), self.graph.base(value), spec.offset)
        call = TorchCall(torch.as_strided, (Ref(0), keys.shape, keys.strides, keys.offset))
        self.masks[name] = Operator(name, View(call), (self.graph.base(value),), (name,)), keys

    def _repeats(self, value: str, dim: int) -> bool:
        """Whether a value is known to be the same all along a dimension."""
        spec = self.graph.values[value]
        size, stride = spec.shape[dim], spec.strides[dim]
        op = self.graph.producer.get(value)
        if size == 1 or stride == 0:
            return True
        if op is not None and self.graph.is_alias(op):
            base = self.graph.values[self.graph.base(value)]
            same = [d for d, there in enumerate(zip(base.shape, base.strides, strict=True)) if there == (size, stride)]
            return len(same) == 1 and self._repeats(self.graph.base(value), same[0])
        if op is None or not isinstance(op.semantics, Extern) or not op.semantics.is_elementwise:
            return False
        shifts = [(v, len(self.graph.values[v].shape) - len(spec.shape)) for v in op.inputs]
        return all(dim + shift < 0 or self._repeats(v, dim + shift) for v, shift in shifts)

    # ---- values

    def _axes(self, value: str) -> RowAxes | None:
        """Which dimensions of a value count rows; None where none do, or it is not clear."""
        shape = self.graph.values[value].shape
        is_named = [bool(names(size)) for size in shape]
        sequence = [d for d, size in enumerate(shape) if size == self.sequence]
        batch = [d for d, size in enumerate(shape) if isinstance(self.batch, Size) and size == self.batch]
        if len(sequence) == 1 and len(batch) <= 1 and sum(is_named) == 1 + len(batch):
            return RowAxes(sequence[0], batch[0] if batch else None)
        merged = [d for d, size in enumerate(shape) if size == self.batch * self.sequence]
        if len(merged) == sum(is_named) == 1:
            return RowAxes(merged[0], merged=True)
        return None

    def _gather(self, value: str, axes: RowAxes) -> str:
        self.gathered.setdefault(value, axes)
        return _packed_name(value)

    def _emit(self, op: Operator, axes: RowAxes | None) -> None:
        self.body.append(op)
        self.is_packed.add(op.name)
        if axes is not None:
            self.rows.update(dict.fromkeys(op.outputs, axes))

    # ---- the end

    def _finished(self, outputs: tuple[RowAxes | None, ...]) -> PackedGraph:
        graph, tokens = self.graph, named(TOKENS)
        if not self.gathered:
            raise PackingError("it has no rows")
        sizes = {str(self.sequence): tokens, str(self.batch): 1}
        packed = [op for op in self.body if op.name in self.is_packed]
        made = {value: graph.values[value] for op in packed for value in op.outputs}
        whole = {_packed_name(v): _contiguous(graph.values[v]) for v in self.gathered}
        # What is said by positions of a document is not said by rows.
        by_position = DocumentMask, BiasByDistance, PredictedAttention
        by_rows = [None if isinstance(op.semantics, by_position) else op.semantics for op in packed]
        binder = Binder((tuple(by_rows), {**made, **whole}))
        if other := sorted(binder.names.keys() - sizes.keys()):
            raise PackingError(f"its rows depend on {', '.join(other)}")
        semantics, specs = binder.renamed(sizes)
        by_name = {op.name: replace(op, semantics=s or op.semantics) for op, s in zip(packed, semantics, strict=True)}
        body = [by_name.get(op.name, op) for op in self.body]
        late = {value: graph.values[value] for value in self.late} | self.picked
        inputs: dict[str, TensorSpec] = {}
        for name in self.picks.values():
            inputs[name] = TensorSpec.contiguous((self.batch,), torch.int64)
        numbers, length, is_key = _ROWS
        inputs[numbers] = TensorSpec.contiguous((tokens,), torch.int64)
        inputs[length] = TensorSpec.contiguous((1,), torch.int64)
        inputs[is_key] = TensorSpec.contiguous((tokens,), torch.bool)
        for number in range(len(self.patterns)):
            inputs[_plan_input(number)] = TensorSpec.contiguous((1,), torch.int64)
        there = {*specs, *late, *inputs}
        reads = dict.fromkeys(value for op in body for value in op.inputs)
        carried = [v for v in reads if v not in there and v not in graph.constants]
        values = {**graph.values, **specs, **late, **inputs}
        rows = _made(graph, body, values, (*whole, *carried, *inputs), graph.outputs)
        before = _made(
            graph,
            [*self.plain, *(op for op, _ in self.masks.values())],
            {**graph.values, **{name: spec for name, (_, spec) in self.masks.items()}},
            graph.inputs,
            (*self.masks, *self.gathered, *carried),
        )
        layout = PackedLayout(
            masks=len(self.masks),
            mask_inputs=_inputs_of(before, self.masks),
            gathered=tuple(self.gathered.values()),
            picks=tuple(self.picks),
            patterns=tuple(self.patterns),
            by_distance=self.by_distance,
            outputs=outputs,
            shapes=tuple(graph.values[value].shape for value in graph.outputs),
            dtypes=tuple(rows.values[value].dtype for value in rows.outputs),
            batch=self.batch,
            sequence=self.sequence,
        )
        return PackedGraph(before, rows, tuple(self.masks), layout)


def _sizes(graph: OperatorGraph) -> tuple[int, int]:
    """The batch and the sequence of attention of a sequence to itself."""
    found = set()
    for op in graph.operators:
        if isinstance(op.semantics, (QK, PredictedAttention)):
            (batch, _, length, _), (_, _, keys, _) = (graph.values[value].shape for value in op.inputs[:2])
            if length != keys:
                raise PackingError(f"{op.name} is attention to something else than the sequence")
            found.add((batch, length))
    if len(found) != 1:
        raise PackingError("it has no attention" if not found else "its attentions have different sizes")
    ((batch, length),) = found
    if not isinstance(length, Size) or len(length.terms) != 1 or str(length) not in names(length):
        raise PackingError("it is captured for one length")
    if batch != 1 and (not isinstance(batch, Size) or str(batch) not in names(batch)):
        raise PackingError("heads and batch entries are one dimension of its attention, or the batch is fixed")
    return batch, length


def _row_strides(spec: TensorSpec, axes: RowAxes, sequence: int) -> tuple[int | None, int]:
    """Elements from an entry to the next, and from a position to the next."""
    stride = spec.strides[axes.sequence]
    if axes.merged:
        return sequence * stride, stride
    return None if axes.batch is None else spec.strides[axes.batch], stride


def _stays_inside(view: TensorSpec, axes: RowAxes, base: TensorSpec, base_axes: RowAxes) -> bool:
    """Whether the elements of a row of a view are of one row of its base."""
    near, far = _inner(view, axes)
    whole, whole_far = _inner(base, base_axes)
    # Dimensions between whose elements other rows lie must be those of the base; the others may be any part of it.
    is_known = not isinstance(view.offset, Size) and all(dim in whole_far for dim in far)
    return is_known and view.offset + _extent(near) <= _extent(whole)


def _inner(spec: TensorSpec, axes: RowAxes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(size, stride) of the dimensions within rows, by whether the stride is a number."""
    dims = [
        dim
        for d, dim in enumerate(zip(spec.shape, spec.strides, strict=True))
        if d not in (axes.sequence, axes.batch) and dim[0] != 1
    ]
    return [d for d in dims if not isinstance(d[1], Size)], [d for d in dims if isinstance(d[1], Size)]


def _extent(dims: Iterable[tuple[int, int]]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in dims)


def _picked(
    base: Tensor,
    rows: Tensor,
    axis: int,
    dims: Sequence[int],
    strides: Sequence[int],
    offset: int,
    shape: Sequence[int],
) -> Tensor:
    """Parts of ``rows`` of ``base``, which dimension ``axis`` counts: the elements from ``offset`` on, in ``shape``."""
    sizes, steps = (base.shape[axis], *dims), (base.stride(axis), *strides)
    return base.as_strided(sizes, steps, base.storage_offset() + offset).index_select(0, rows).reshape(shape)


def _packed_name(value: str) -> str:
    return f"{value}_packed"


_ROWS = ("packed_rows", "packed_length", "packed_keys")
"""What all masks of packed rows read besides their plans."""


def _plan_input(number: int) -> str:
    return f"packed_plan_{number}"


def _contiguous(spec: TensorSpec) -> TensorSpec:
    return TensorSpec.contiguous(spec.shape, spec.dtype)


def _called(op: Operator) -> str:
    """An operator in a sentence."""
    return f"{op.name} ({op.semantics})" if isinstance(op.semantics, Extern) else op.name


def _made(
    graph: OperatorGraph,
    operators: Sequence[Operator],
    values: Mapping[str, TensorSpec],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> OperatorGraph:
    """The graph of those of ``operators`` that ``outputs`` need."""
    used = set(outputs)
    kept: list[Operator] = []
    for op in reversed(operators):
        if any(value in used for value in op.outputs):
            kept.append(op)
            used.update(op.inputs)
    kept.reverse()
    used.update(value for op in kept for value in op.outputs)
    constants = {v: graph.constants[v] for v in graph.with_sources(v for v in used if v in graph.constants)}
    keep = {*used, *inputs, *constants}
    keep |= {base for value in keep if (base := values[value].base) is not None}
    constants |= {v: graph.constants[v] for v in graph.with_sources(v for v in keep if v in graph.constants)}
    keep |= constants.keys()
    return OperatorGraph(
        operators=tuple(kept),
        values={value: spec for value, spec in values.items() if value in keep},
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants=constants,
        inspected=graph.inspected,
    )
