"""What every kernel family shares: storage types, operands, kernel specs, calls and the family protocol."""

from __future__ import annotations

import abc
import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup
from fuser.ir.target import Target

_TORCH = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


class DType(enum.Enum):
    """Storage types of kernel operands. Those that a family's kernels read and write are its own to say; row
    expressions compute in fp32 whatever the storage."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @property
    def bytes(self) -> int:
        return self.torch.itemsize

    @property
    def torch(self) -> torch.dtype:
        return _TORCH[self.value]


STORAGE: Mapping[torch.dtype, DType] = {d.torch: d for d in DType}
FLOATING = frozenset({torch.float32, torch.bfloat16})
"""Floating storage types of the CPU's kernels."""
_FLOATING = {"cpu": FLOATING, "cuda": FLOATING | {torch.float16}}


def floating(target: Target) -> frozenset[torch.dtype]:
    """Floating storage types of the kernels of ``target``."""
    return _FLOATING[target.kind]


class Access(enum.Enum):
    """How a matrix operand is read for row ``r`` and column ``c``.

    ``MATRIX``: ``p[row(r) * stride + c]`` where ``row(r)`` is ``r`` or, for a periodic operand, ``r % period``; stride
    zero is one row for all (a bias). ``COLUMN``: ``p[row(r) * stride]``, one number a row. ``GATHER``:
    ``p[index[r] * stride + c]``, rows of a table.
    """

    MATRIX = "matrix"
    COLUMN = "column"
    GATHER = "gather"


@dataclass(frozen=True)
class Operand:
    """The compile-time part of one operand of a row expression; strides and counts are run-time extents.

    ``grouped``: rows are evenly spaced in groups only, as the heads of tokens are in a product for q, k and v; stride
    and period are those of the groups."""

    access: Access
    dtype: DType
    periodic: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to build: a template and its frozen, typed parameters (ints, floats, enums, booleans, tuples,
    expressions; never free text). Equal specs are one kernel."""

    family: str
    template: str
    parameters: Any

    @property
    def hash(self) -> str:
        """sha256 of template name and parameters; the sources enter the cache key separately."""
        return hashlib.sha256(f"{self.template}\0{canonical(self.parameters)}".encode()).hexdigest()

    @property
    def symbol(self) -> str:
        """Name of the exported C function."""
        return f"fuser_{self.family}_{self.hash[:16]}"


def canonical(value: Any) -> str:
    """A text that is equal exactly when the values are; raises TypeError for what must not reach a template."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if dataclasses.is_dataclass(value):
        fields = ",".join(f"{f.name}={canonical(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, tuple):
        return f"({','.join(canonical(v) for v in value)})"
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        return value.hex()
    raise TypeError(f"a {type(value).__name__} may not be a kernel parameter: {value!r}")


class Layout(abc.ABC):
    """How a kernel wants constants in memory: a frozen dataclass beside the kernel, with what packing depends on."""

    @abc.abstractmethod
    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The packed tensors that are made of these constants, contiguous; they may share memory with them."""


@dataclass(frozen=True)
class Packed:
    """A constant operand in a kernel's own layout, made from weights at load time and again when they change.

    ``values`` names the constants of the operator graph that ``layout`` packs together, ``index`` which of the packed
    tensors this is. Operands that differ in ``index`` alone are packed once.
    """

    values: tuple[str, ...]
    layout: Layout
    index: int = 0

    @property
    def whole(self) -> Packed:
        """The first operand of the same packing: equal for all that are packed together."""
        return dataclasses.replace(self, index=0)

    def pack(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """All tensors of the packing, of constants by name."""
        return self.layout.pack(*(values[v] for v in self.values))


@dataclass(frozen=True)
class Literal:
    """A constant operand that is not made from weights, such as the arrays of an attention plan; equal by ``key``."""

    key: str
    array: npt.NDArray[Any] = dataclasses.field(compare=False)

    @property
    def tensor(self) -> Tensor:
        """A tensor of its own on the CPU."""
        return torch.from_numpy(self.array.copy())


TensorRef = str | Packed | Literal
"""A value of the operator graph by name, a packed constant, or a literal array. Where a kernel takes the literal of a
plan, it takes a value with such an array as well, which whoever makes it has checked: kernels trust plans."""


def materialized(refs: Iterable[TensorRef], values: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that ``refs`` refer to, of values by name; what is packed together is packed once."""
    packed: dict[Packed, tuple[Tensor, ...]] = {}
    found = []
    for ref in refs:
        if isinstance(ref, Packed):
            if ref.whole not in packed:
                packed[ref.whole] = ref.pack(values)
            found.append(packed[ref.whole][ref.index])
        else:
            found.append(ref.tensor if isinstance(ref, Literal) else values[ref])
    return found


def _renamed(ref: TensorRef, names: Mapping[str, str]) -> TensorRef:
    if isinstance(ref, Packed):
        return dataclasses.replace(ref, values=tuple(names[v] for v in ref.values))
    return ref if isinstance(ref, Literal) else names[ref]


@dataclass(frozen=True)
class KernelCall:
    """One launch: a kernel, its tensors in the template's order, its run-time extents, and the scratch it needs.

    ``outputs`` are the values that it makes; states that it writes are among its tensors alone.
    """

    spec: KernelSpec
    tensors: tuple[TensorRef, ...]
    extents: Extents | tuple[int, ...]
    outputs: tuple[str, ...]
    workspace_bytes: int = 0

    def reading(self, *more: TensorRef) -> KernelCall:
        """The same launch with ``more`` tensors behind its own."""
        return dataclasses.replace(self, tensors=(*self.tensors, *more))

    def renamed(self, names: Mapping[str, str]) -> KernelCall:
        """The same launch on other values, which ``names`` gives for each of its own."""
        tensors = tuple(_renamed(ref, names) for ref in self.tensors)
        return dataclasses.replace(self, tensors=tensors, outputs=tuple(names[v] for v in self.outputs))


@dataclass(frozen=True)
class LibraryCall:
    """One call of a PyTorch library function: ``run(*inputs, out)`` writes its last argument in place."""

    name: str
    run: Callable[..., None]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def renamed(self, names: Mapping[str, str]) -> LibraryCall:
        """The same call on other values, which ``names`` gives for each of its own."""
        inputs, outputs = (tuple(names[v] for v in values) for values in (self.inputs, self.outputs))
        return dataclasses.replace(self, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class LibraryParameters:
    """The choice of a library's GEMM through PyTorch for a product whose epilogue is nothing or a ``bias``: oneDNN's on
    a CPU, cuBLAS's on CUDA."""

    bias: bool


@dataclass(frozen=True)
class Cost:
    """Work of one launch: operations, bytes moved to and from memory, kernels started. ``efficiency`` is the share of
    the peak that is reached: that of fp32, or the rate of ``dtype`` where most operations multiply that."""

    flops: float
    bytes: float
    launches: int = 1
    efficiency: float = 1.0
    dtype: torch.dtype | None = None

    def peak(self, target: Target) -> float:
        """Operations a second that one core cannot exceed."""
        return target.peak_flops if self.dtype is None else target.rate(self.dtype)

    def seconds(self, target: Target) -> float:
        """Roofline time on ``target`` with all cores."""
        compute = self.flops / (self.peak(target) * target.cores * self.efficiency)
        return max(compute, self.bytes / target.bandwidth) + self.launches * target.launch_seconds


Match = TypeVar("Match", contravariant=True)
Parameters = TypeVar("Parameters")


class Family(Protocol):
    """A kind of kernel by what it computes, whatever the device: see :data:`fuser.kernels.families.IMPLEMENTATIONS`."""

    @property
    def name(self) -> str: ...

    def match(self, group: OperatorGroup, target: Target) -> Any | None:
        """All that implementations need to know about ``group``, None when it is nothing of this family."""


class Implementation(Protocol[Match, Parameters]):
    """One way to run what a family matches on one kind of target: a template, or a library."""

    from_library: bool = False
    """Whether the kernels are a library's; how those compare with others is worth a measurement."""

    def space(self, match: Match, target: Target) -> Sequence[Parameters]:
        """The legal parameters, the default first; none when this implementation cannot run the group."""

    def offline_space(self, match: Match, target: Target) -> Sequence[Parameters]:
        """More of them, whose kernels take about a minute each to build: for a search that has the time."""
        return ()

    def cost(self, match: Match, parameters: Parameters, target: Target) -> Cost:
        """The predicted work of one launch; it may be wrong by a factor, but not in the order of choices."""

    def call(self, match: Match, parameters: Parameters, target: Target, threads: int) -> KernelCall | LibraryCall:
        """The launch of ``parameters`` on the values of the matched group."""


Table = Mapping[tuple[Family, str], Sequence[Implementation[Any, Any]]]
"""The implementations of every family by the kind of target, families in order of preference."""
