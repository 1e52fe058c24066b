"""The sizes of a trace: numbers, or formulas of named sizes where PyTorch has symbols, and the calls they hold for."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils._sympy import functions as formulas

from fuser.ir.binding import Binder, Condition
from fuser.ir.errors import CaptureError
from fuser.ir.size import Size, bounds, maximum, minimum, named

_NAMES = ("batch", "sequence")
"""Of the first two dimensions of a call's first tensor."""
_TRACED = "fuser_traced"
_RELATIONS: Mapping[Literal["==", "!=", "<", "<="], tuple[Any, tuple[Any, ...]]] = {
    "==": (sympy.Eq, ()),
    "!=": (sympy.Ne, ()),
    "<": (sympy.StrictLessThan, (sympy.StrictGreaterThan,)),
    "<=": (sympy.LessThan, (sympy.GreaterThan,)),
}
"""PyTorch's comparisons, and those that are these with sides exchanged."""


@dataclass(frozen=True)
class Traced:
    """What a trace knows of a tensor: numbers or formulas for its shape, strides and place in its storage.

    ``storage`` is equal for tensors that share memory, of ``storage_bytes`` bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset: int
    storage: int
    storage_bytes: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether every element has a place of its own and nothing lies between them."""
        left = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True) if size != 1]
        expected: int = 1
        while left:
            inner = next((dim for dim in left if dim[1] == expected), None)
            if inner is None:
                return False
            left.remove(inner)
            expected = expected * inner[0]
        return True


def traced(node: Any) -> Any:
    """What the trace knows of the value of a node: a :class:`Traced`, a tuple of such, or None."""
    return node.meta.get(_TRACED) if isinstance(node, fx.Node) else None


@dataclass(frozen=True)
class Guard:
    """Something that must be true of named sizes, over PyTorch's symbols for them, that is no
    :class:`~fuser.ir.binding.Condition`."""

    condition: sympy.Basic
    symbols: tuple[tuple[sympy.Symbol, str], ...]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true of these sizes by name."""
        found = self.condition.xreplace({symbol: sympy.Integer(sizes[name]) for symbol, name in self.symbols})
        return found is sympy.true or found == True  # noqa: E712

    def __str__(self) -> str:
        return str(self.condition.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.symbols}))


@dataclass(frozen=True)
class SizeRange:
    """The calls that a trace holds for: those whose tensors have the ``shapes``, formulas of named sizes, for sizes for
    which the ``guards`` are true and the ``positive`` formulas are."""

    shapes: tuple[tuple[int, ...], ...]
    guards: tuple[Condition | Guard, ...] = ()
    positive: tuple[int, ...] = ()

    @functools.cached_property
    def names(self) -> Mapping[str, tuple[int, int]]:
        """The named sizes, each with the tensor and dimension that it is read from."""
        found: dict[str, tuple[int, int]] = {}
        for i, shape in enumerate(self.shapes):
            for d, size in enumerate(shape):
                if isinstance(size, Size) and size == named_like(size):
                    found.setdefault(str(size), (i, d))
        return found

    @functools.cached_property
    def _expected(self) -> Binder[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]]:
        return Binder((self.shapes, self.positive))

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The named sizes of a call whose tensors have these shapes. Raises CaptureError if the trace does not hold
        for it."""
        found = {name: shapes[i][d] for name, (i, d) in self.names.items()}
        try:
            expected, positive = self._expected(found)
        except ValueError as error:
            raise CaptureError(str(error)) from error
        for given, shape in zip(shapes, expected, strict=True):
            if tuple(given) != shape:
                raise CaptureError(f"an input has the shape {tuple(given)}, and the model was captured for {shape}")
        if any(size < 1 for size in positive):
            raise CaptureError("a tensor of the model would be empty")
        for guard in self.guards:
            if not guard.holds(found):
                raise CaptureError(f"the model was captured for {guard}")
        return found


def named_like(size: Size) -> Size | None:
    """The named size that ``size`` is, without any arithmetic."""
    ((monomial, count), *more) = size.terms
    return size if not more and count == 1 and len(monomial) == 1 and hasattr(monomial[0], "name") else None


class Sizes:
    """The symbols of a traced graph under names of ours; ``inputs`` are the names of the placeholders for a call's
    tensors, of which the first ``plain`` are arguments, and the others in objects that are arguments.

    Tensors in objects, such as the layers of a cache, mostly grow together: where they have equal sizes in a dimension,
    that is one named size, and calls for which they differ have another capture.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[str], plain: int | None = None) -> None:
        self._graph = graph
        self._inputs = inputs
        self._known: dict[sympy.Symbol, Size] = {}
        self._alike: dict[tuple[int, int | None], Size] = {}
        self._environment: Any = None
        self._least = _least(graph)
        values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder" and node.name in inputs]
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                continue
            for d, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    self._environment = size.node.shape_env
                    name = _NAMES[d] if i == 0 and d < len(_NAMES) else f"size{len(self._known)}"
                    self._name(size, name, None if plain is None or i < plain else (d, size.node.hint))

    def _name(self, size: torch.SymInt, name: str, place: tuple[int, int | None] | None) -> None:
        symbol = self._replaced(size.node.expr)
        if not isinstance(symbol, sympy.Symbol) or symbol in self._known:
            return
        if place in self._alike:
            self._known[symbol] = self._alike[place]
            return
        reach = self._environment.var_to_range[symbol]
        high = int(reach.upper) if reach.upper.is_Integer else None
        # PyTorch takes sizes of zero and one for numbers.
        self._known[symbol] = named(name, max(2, int(reach.lower), self._least.get(symbol, 0)), high)
        if place is not None:
            self._alike[place] = self._known[symbol]

    def _replaced(self, expression: Any) -> Any:
        return expression if self._environment is None else self._environment.replace(expression)

    def _guards(self) -> tuple[Condition | Guard, ...]:
        """What must be true of the sizes, beyond the ranges of the names. Raises CaptureError for what depends on
        values of tensors."""
        if self._environment is None:
            return ()
        found: list[Condition | Guard] = []
        for condition in dict.fromkeys(self._replaced(guard.expr) for guard in self._environment.guards):
            if condition is sympy.true or self._is_identity(condition):
                continue
            symbols = sorted(condition.free_symbols, key=str)
            if any(symbol not in self._known for symbol in symbols):
                raise CaptureError(f"the model asks whether {condition}, which follows from no size of its inputs")
            try:
                found.append(self._condition(condition))
            except CaptureError:
                found.append(Guard(condition, tuple((symbol, str(self._known[symbol])) for symbol in symbols)))
        return tuple(found)

    def _condition(self, condition: Any) -> Condition:
        """A condition over formulas. Raises CaptureError where it is none."""
        for kind, (cls, swapped) in _RELATIONS.items():
            if isinstance(condition, cls):
                return Condition(kind, (self._formula(condition.lhs), self._formula(condition.rhs)))
            if isinstance(condition, swapped):
                return Condition(kind, (self._formula(condition.rhs), self._formula(condition.lhs)))
        if isinstance(condition, (sympy.And, sympy.Or)):
            parts = tuple(map(self._condition, condition.args))
            return Condition("all" if isinstance(condition, sympy.And) else "any", parts)
        raise CaptureError(f"{condition} is no comparison of sizes")

    def _is_identity(self, condition: Any) -> bool:
        """Whether both sides of an equation are one formula, which PyTorch asks of its own strides."""
        if not isinstance(condition, sympy.Eq):
            return False
        try:
            return self._formula(condition.lhs) == self._formula(condition.rhs)
        except CaptureError:
            return False

    def of(self, value: Any) -> int:
        """A number, or the formula of a symbolic one. Raises CaptureError for numbers that are no sizes."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        return self._formula(self._replaced(value.node.expr))

    def _formula(self, expression: Any) -> int:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if expression in self._known:
            return self._known[expression]
        arguments = expression.args
        if isinstance(expression, sympy.Add):
            return sum(map(self._formula, arguments))
        if isinstance(expression, sympy.Mul):
            return math.prod(map(self._formula, arguments))
        if isinstance(expression, (sympy.Pow, formulas.PowByNatural)) and isinstance(arguments[1], sympy.Integer):
            if arguments[1] > 0:
                return math.prod([self._formula(arguments[0])] * int(arguments[1]))
        elif isinstance(expression, (formulas.FloorDiv, formulas.CleanDiv)):
            return self._formula(arguments[0]) // self._formula(arguments[1])
        elif isinstance(expression, (formulas.Mod, formulas.PythonMod)):
            return self._formula(arguments[0]) % self._formula(arguments[1])
        elif isinstance(expression, formulas.Max):
            return maximum(map(self._formula, arguments))
        elif isinstance(expression, formulas.Min):
            return minimum(map(self._formula, arguments))
        raise CaptureError(f"the size {expression} follows from no sizes of the inputs in a way that fuser knows")

    def _traced(self, value: Any) -> Any:
        """The :class:`Traced` of a tensor, a tuple of those of several, None for anything else."""
        if isinstance(value, (tuple, list)):
            return tuple(map(self._traced, value))
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        storage = value.untyped_storage()
        return Traced(
            tuple(map(self.of, value.shape)),
            value.dtype,
            tuple(map(self.of, value.stride())),
            self.of(value.storage_offset()),
            storage._cdata,
            self.of(storage.nbytes()),
        )

    def annotate(self) -> SizeRange:
        """Note at every node what the trace knows of its value (see :func:`traced`), and put formulas of named sizes in
        the place of the nodes that compute sizes, which go.

        Raises CaptureError for sizes that do not follow from those of the inputs.
        """
        numbers: dict[fx.Node, int] = {}
        shapes: list[tuple[int, ...]] = []
        positive: dict[int, None] = {}
        for node in self._graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and node.op == "call_function":
                numbers[node] = self.of(value)
                continue
            node.meta[_TRACED] = found = self._traced(value)
            for tensor in pytree.tree_leaves(found, is_leaf=lambda part: isinstance(part, Traced)):
                if tensor is not None:
                    positive.update((size, None) for size in tensor.shape if (bounds(size)[0] or 0) < 1 and size != 0)
            if node.name in self._inputs and node.op == "placeholder" and found is not None:
                shapes.append(found.shape)
            if numbers:
                node.args = fx.map_arg(node.args, lambda n: numbers.get(n, n))
                node.kwargs = fx.map_arg(node.kwargs, lambda n: numbers.get(n, n))
        for node in reversed(numbers):
            self._graph.erase_node(node)
        return SizeRange(tuple(shapes), self._guards(), tuple(positive))


def _least(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """How large a symbol must be for no tensor to be empty, by the quotients among sizes."""
    found: dict[sympy.Symbol, int] = {}
    for value in (leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))):
        for size in value.shape if isinstance(value, Tensor) else ():
            factors: Any = sympy.Mul.make_args(size.node.expr) if isinstance(size, torch.SymInt) else ()
            for factor in factors:
                if isinstance(factor, formulas.FloorDiv) and isinstance(factor.args[1], sympy.Integer):
                    symbol, divisor = cast("tuple[sympy.Symbol, Any]", factor.args)
                    found[symbol] = max(found.get(symbol, 0), int(divisor))
    return found


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that these broadcast to. Raises ValueError if they do not."""
    rank = max(map(len, shapes), default=0)
    found: list[int] = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        others = {size for size in sizes if size != 1}
        if len(others) > 1:
            raise ValueError(f"the shapes {', '.join(map(str, shapes))} do not broadcast")
        found.append(others.pop() if others else 1)
    return tuple(found)
