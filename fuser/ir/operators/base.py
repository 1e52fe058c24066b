"""What all kinds of operators have, how they are registered and told apart, and calls of PyTorch's functions."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fuser.ir.expression import Expression
from fuser.ir.masks import Mask

Shape = tuple[int, ...]


class Semantics(ABC):
    """What an operator means, whatever its values are called.

    A kind is a subclass that is a frozen dataclass, registered by :func:`kind`; all its fields enter
    :attr:`fuser.ir.graph.Region.hash`. The class attributes are what the compiler asks about a kind.
    """

    kind: ClassVar[str]
    """The name to print."""
    fusible: ClassVar[bool] = True
    """Whether it can share a kernel with a neighbour."""
    is_linear: ClassVar[bool] = False
    """Whether it multiplies rows by constant weights: where a new region may start."""
    finishes_rows: ClassVar[bool] = False
    """Whether its rows are where blocks of a model meet: residual sums, their norms, embeddings."""
    makes_scores: ClassVar[bool] = False
    """Whether it compares queries with keys: where attention starts."""
    consumes_scores: ClassVar[bool] = False
    """Whether it weighs values by what became of scores: where attention ends."""
    gathers: ClassVar[tuple[int, ...]] = ()
    """Positions of the inputs that are tables, of which it reads rows by number."""
    writes: ClassVar[tuple[int, ...]] = ()
    """Positions of the inputs that it writes in place, which are states of the graph or views of them."""

    @property
    def expression(self) -> Expression | None:
        """What it computes of rows that broadcast to its output's shape, for kernels that work row by row; None where
        no row expression says it."""
        return None

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, whose order matters."""
        return False

    @abstractmethod
    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Its outputs by PyTorch, in the dtype of the inputs; they broadcast to the outputs' shapes. The inputs that it
        ``writes``, and no others, are changed."""

    @abstractmethod
    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        """fp32 operations for values of these shapes."""

    @abstractmethod
    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        """A few words for pictures about what it does to values of these shapes; empty where its name says it."""

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        """Whether every row of its output, all dimensions but the last, follows from the rows of its inputs in the same
        place alone, as PyTorch broadcasts them."""
        return self.expression is not None

    def widths(self, inputs: Sequence[Shape]) -> Shape:
        """Sizes of run-time inputs that do not follow from the number of tokens, nor from constants."""
        return ()

    @property
    def signature(self) -> str:
        """A text that is equal exactly when the kind and all its fields are."""
        return canonical(self)

    def __str__(self) -> str:
        return str(self.expression or "")


S = TypeVar("S", bound=Semantics)
KINDS: list[type[Semantics]] = []
"""All kinds."""


def kind(name: str) -> Callable[[type[S]], type[S]]:
    """Registers a kind that prints as ``name``. Raises TypeError for one that lacks a method or can be changed."""

    def register(cls: type[S]) -> type[S]:
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise TypeError(f"the kind {cls.__name__} lacks {', '.join(missing)}")
        parameters = cls.__dict__.get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            raise TypeError(f"the kind {cls.__name__} must be a frozen dataclass")
        cls.kind = name
        KINDS.append(cls)
        return cls

    return register


def canonical(value: Any) -> str:
    """A text that is equal exactly when the values are, to the last bit of their numbers."""
    if isinstance(value, Mask):
        return value.hash
    if isinstance(value, TorchCall):
        return f"{value}({canonical(value.args)},{canonical(value.kwargs)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={canonical(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({','.join(fields)})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(canonical, value))})"
    return value.hex() if isinstance(value, float) else repr(value)


# ---- calls of PyTorch's functions


@dataclass(frozen=True)
class Ref:
    """Stands for the operator's input number ``index`` inside the arguments of a :class:`TorchCall`; with ``strides``,
    laid out like that, for functions whose results depend on it."""

    index: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TorchCall:
    """A PyTorch function with its arguments, tensors replaced by :class:`Ref`."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on ``inputs``; always a tuple of the results."""
        args = [_substitute(a, inputs) for a in self.args]
        result = self.target(*args, **{k: _substitute(v, inputs) for k, v in self.kwargs})
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def __str__(self) -> str:
        return str(getattr(self.target, "_name", None) or getattr(self.target, "__name__", self.target))

    def __reduce__(self) -> tuple[Any, ...]:
        # ATen overloads do not pickle; their names do.
        if isinstance(self.target, torch._ops.OpOverload):
            namespace, name = self.target._schema.name.split("::")
            return _restore_call, (namespace, name, self.target._overloadname, self.args, self.kwargs)
        return TorchCall, (self.target, self.args, self.kwargs)


def _restore_call(namespace: str, name: str, overload: str, args: Any, kwargs: Any) -> TorchCall:
    return TorchCall(getattr(getattr(getattr(torch.ops, namespace), name), overload), args, kwargs)


def laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of ``tensor`` in memory of its own with these strides; where they let elements share memory, those are
    equal."""
    # Expanded dimensions hold one element, to which PyTorch refuses to write several.
    once = tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.empty_strided(once, strides, dtype=tensor.dtype, device=tensor.device)
    memory.copy_(tensor[tuple(slice(size) for size in once)])
    return memory.as_strided(tensor.shape, strides)


def _substitute(value: Any, inputs: tuple[Tensor, ...]) -> Any:
    if isinstance(value, Ref):
        tensor = inputs[value.index]
        return tensor if value.strides is None or value.strides == tensor.stride() else laid_out(tensor, value.strides)
    if isinstance(value, (tuple, list)):
        return type(value)(_substitute(v, inputs) for v in value)
    return value
