"""The `gemm` family: a matrix product with constant weights and everything elementwise or row-wise that follows it.

The weights are packed once, in panels as wide as the microkernel's register tile. Rows of the activations are copied,
a cache block at a time, to where their stride cannot collide in the cache. The epilogue is a row expression on the
accumulators of a finished tile, or of finished rows where it reduces along them (a norm).

Where equal parts of the columns meet in the epilogue, as the two of a gated MLP, they are several products of a kernel:
their panels lie side by side, and so do the accumulators of columns that meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuser.ir.expression import Expression, Op
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup
from fuser.ir.operators import Gemm, Product
from fuser.ir.target import Isa, Target
from fuser.kernels.base import (
    STORAGE,
    Access,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Layout,
    LibraryCall,
    LibraryParameters,
    Operand,
    Packed,
    floating,
)
from fuser.kernels.compose import RowProgram, compose
from fuser.kernels.operands import OperandExtents, row_stride, rows_and_columns

_MAX_OPERANDS = 16
_LINE = 16  # floats in a cache line
_DEPTHS = (256, 384)  # longer passes add up more roundings than a library's GEMM does
_PAIR_DEPTHS = (384, 256)  # those of bf16 factors are larger
_MAX_BLOCK = 168
_SERIAL_BELOW = 1 << 18
_TILE_STEPS = 16
_TILE_ROWS, _TILE_COLUMNS = 32, 32
_TILES_SHARE = 0.5  # of AMX's rate: an estimate, nothing was measured on a CPU that has it
_TILES_RATIO = 8.0  # of AMX's rate over that of vectors, for int8 as for bf16

# (rows, vectors) of the register tile: accumulators, one row of W and a broadcast element fill the register file.
_TILES = {
    Isa.AVX512: ((6, 4), (8, 3), (14, 2)),
    Isa.AVX2: ((6, 2), (4, 3)),
    Isa.NEON: ((8, 3), (12, 2)),
    Isa.PORTABLE: ((4, 2), (6, 1)),
}


@dataclass(frozen=True)
class GemmExtents(Extents):
    """Rows of A, elements between them, the epilogue's operands, and elements between the rows of every output."""

    rows: int
    a_stride: int
    operands: tuple[OperandExtents, ...]
    output_strides: tuple[int, ...]


@dataclass(frozen=True)
class GemmParameters:
    """What the template ``cpu/gemm.cpp.j2`` is rendered from.

    ``n`` and ``k`` are the weight's sizes, ``a_dtype`` and ``w_dtype`` storage types. ``epilogue`` has the accumulator
    as input 0 and ``operands`` as inputs 1, 2, …; ``out_dtypes`` are the types of its outputs. ``mr`` × ``nr`` is the
    register tile, ``mc`` the rows of A that a thread works on at a time, ``chunk`` the steps for which it packs them at
    a time, ``kc`` the steps of one pass over registers; a step is one element along K, or two of bf16 where the target
    multiplies ``pairs`` of them in one instruction, to which an A in fp32 is rounded. With ``tiles``, the register tile
    is up to 32 × 32 in matrix tiles (AMX), which multiply 16 steps at a time; K is padded to a multiple of that.
    Below ``serial_below`` multiply-adds, one thread does all.
    """

    n: int
    k: int
    a_dtype: DType
    w_dtype: DType
    epilogue: Expression
    operands: tuple[Operand, ...]
    out_dtypes: tuple[DType, ...]
    mr: int
    nr: int
    mc: int
    kc: int
    chunk: int
    pairs: bool = False
    tiles: bool = False
    serial_below: int = _SERIAL_BELOW

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return GemmExtents.declaration(operands=len(self.operands), output_strides=len(self.out_dtypes))

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """Operands of the epilogue's inputs, the accumulators first."""
        return (*(Operand(Access.MATRIX, DType.F32) for _ in range(self.products)), *self.operands)

    @property
    def reduces(self) -> bool:
        """Whether the epilogue needs whole rows."""
        return self.epilogue.has_reduction

    @property
    def panels(self) -> int:
        return -(-self.n // self.nr)

    @property
    def width(self) -> int:
        """Elements along K that one step multiplies: those of a 32-bit word."""
        return 2 if self.pairs else 1

    @property
    def steps(self) -> int:
        """32-bit words along K, and registers of W read for each of them: steps of the inner loop."""
        return _steps(self.k, self.width, self.tiles)

    @property
    def tile_product(self) -> str:
        """What multiplies matrix tiles, in ``cpu/tiles.h``."""
        return "multiply_bytes" if self.integer else "multiply_bf16"

    @property
    def pitch(self) -> int:
        """Words between packed rows of A: an odd number of cache lines, so that rows spread over the cache's sets."""
        return _odd_lines(min(self.steps, self.chunk))

    @property
    def products(self) -> int:
        """Products of ``n`` columns each that meet in the epilogue."""
        return 1

    @property
    def wide(self) -> bool:
        """Whether accumulators of all columns are kept: for the epilogue, or from chunk to chunk."""
        return self.reduces or self.chunk < self.steps

    @property
    def tile_pitch(self) -> int:
        """Floats between accumulator rows."""
        return _odd_lines(self.products * self.panels * self.nr) if self.wide else self.products * self.nr

    @property
    def tile_rows(self) -> int:
        """Accumulator rows of a thread: those of a register tile where one pass completes it and the epilogue follows,
        else those of a block."""
        return min(self.mr, self.mc) if not self.wide and self.kc >= self.steps else self.mc

    def workspace_bytes(self, threads: int) -> int:
        """Scratch for ``threads`` threads."""
        return 4 * threads * (_LINE + self.mc * self.pitch + self.scale_words + self.tile_rows * self.tile_pitch)

    @property
    def integer(self) -> bool:
        """Whether integers are multiplied, with scales of rows and columns (:mod:`fuser.kernels.gemm_int8`)."""
        return False

    @property
    def shifted(self) -> bool:
        """Whether integers of rows have zero points."""
        return False

    @property
    def given(self) -> bool:
        """Whether the scale and the zero point of all of A are given, not found for its rows."""
        return False

    @property
    def coded(self) -> bool:
        """Whether A is integers, and followed by their scales (:mod:`fuser.kernels.gemm_int8`)."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether sums are multiplied with a scale for every column (:mod:`fuser.kernels.gemm_int8_weight`)."""
        return False

    @property
    def scales(self) -> bool:
        """Whether sums are multiplied with scales before the epilogue reads them."""
        return self.integer or self.scaled

    @property
    def grouped(self) -> bool:
        """Whether groups of rows have weights of their own (:mod:`fuser.kernels.gemm_grouped`)."""
        return False

    @property
    def shares(self) -> bool:
        """Whether threads may share packed rows of A: all along K, and any of them with all panels."""
        return not self.grouped and self.chunk >= self.steps

    @property
    def row_numbers(self) -> int:
        """How many numbers say what the integers of a row stand for."""
        return 1 if self.coded else 3 if self.shifted else 2

    @property
    def scale_words(self) -> int:
        """Words of scratch for these numbers of the rows that a thread works on at a time."""
        return -(-self.row_numbers * self.mc // _LINE) * _LINE if self.integer else 0


@dataclass(frozen=True)
class GatedGemmParameters(GemmParameters):
    """As :class:`GemmParameters`, with ``parts`` weights of (``n``, ``k``), whose accumulators are the first inputs of
    the epilogue."""

    parts: int = 2

    @property
    def products(self) -> int:
        return self.parts


def _steps(k: int, width: int, tiles: bool) -> int:
    steps = -(-k // width)
    return -(-steps // _TILE_STEPS) * _TILE_STEPS if tiles else steps


def _odd_lines(floats: int) -> int:
    return _LINE * (-(-floats // _LINE) | 1)


def pack(
    weight: Tensor,
    nr: int,
    transposed: bool = True,
    dtype: DType | None = None,
    width: int = 1,
    tiles: bool = False,
) -> Tensor:
    """The weight of a linear layer in the microkernel's layout.

    ``weight`` is (N, K) when ``transposed`` (as in ``torch.nn.Linear``), else (K, N). Returns a contiguous tensor of
    ``dtype`` (default: the weight's): (ceil(N / nr), ceil(K / width), nr, width), without the last dimension for a
    ``width`` of one; zero beyond N and K. For ``tiles``, steps are padded to a multiple of 16.
    """
    columns = weight if transposed else weight.t()
    n, k = columns.shape
    panels, step = -(-n // nr), width
    packed = torch.zeros(panels, _steps(k, step, tiles), nr, step, dtype=weight.dtype if dtype is None else dtype.torch)
    # Whole panels and the last one, whole steps and the last one: four rectangles, each copied once.
    for rows in (slice(0, n - n % nr), slice(n - n % nr, n)):
        for depth in (slice(0, k - k % step), slice(k - k % step, k)):
            part = columns[rows, depth]
            if part.numel() == 0:
                continue
            panel, word = min(nr, part.shape[0]), min(step, part.shape[1])
            into = packed[rows.start // nr : -(-rows.stop // nr), depth.start // step : -(-depth.stop // step)]
            into[:, :, :panel, :word] = part.reshape(into.shape[0], panel, into.shape[1], word).permute(0, 2, 1, 3)
    return packed.squeeze(-1) if width == 1 else packed


def unpack(packed: Tensor, n: int, k: int, transposed: bool = True) -> Tensor:
    """The inverse of :func:`pack`: the (N, K) weight, or (K, N) when not ``transposed``."""
    words = packed if packed.dim() == 4 else packed.unsqueeze(-1)
    panels, steps, nr, step = words.shape
    columns = words.permute(0, 2, 1, 3).reshape(panels * nr, steps * step)[:n, :k]
    return (columns if transposed else columns.t()).contiguous()


@dataclass(frozen=True)
class PanelLayout(Layout):
    """A weight as :func:`pack` lays it out."""

    nr: int
    transposed: bool
    dtype: DType
    pairs: bool
    tiles: bool = False

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (weight,) = tensors
        return (pack(weight, self.nr, self.transposed, self.dtype, 2 if self.pairs else 1, self.tiles),)


@dataclass(frozen=True)
class GatedLayout(Layout):
    """The columns of one weight as ``products`` equal parts, whose panels follow each other: (ceil(N / products / nr),
    products, …)."""

    panels: PanelLayout
    products: int

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (weight,) = tensors
        parts = weight.chunk(self.products, 0 if self.panels.transposed else 1)
        return (torch.stack([self.panels.pack(part)[0] for part in parts], 1),)


@dataclass
class _Prepacked:
    """A weight that oneDNN has reordered, its version then, and the result."""

    weight: Tensor | None = None
    version: int = -1
    packed: Tensor | None = None


@dataclass(frozen=True)
class PrepackedLinear:
    """``run(a, weight, [bias,] out)`` by oneDNN, the weight reordered at the first call and whenever it changes.

    ``a`` is (..., K), ``weight`` (N, K) when ``transposed``, else (K, N), ``out`` (..., N); one dtype for all. Without
    oneDNN in this build of PyTorch it is ``torch.nn.functional.linear``. A pickled object forgets the reordered weight.
    """

    bias: bool
    transposed: bool
    _last: _Prepacked = field(default_factory=_Prepacked, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return PrepackedLinear, (self.bias, self.transposed)

    def __call__(self, a: Tensor, weight: Tensor, *rest: Tensor) -> None:
        bias, out = (rest[0] if self.bias else None), rest[-1]
        columns = weight if self.transposed else weight.t()
        if not _packs(a.dtype):
            out.copy_(torch.nn.functional.linear(a, columns, bias))
            return
        # Inference tensors have no version; they cannot be changed in place outside inference mode either.
        version = -1 if weight.is_inference() else weight._version
        last = self._last
        if last.packed is None or last.weight is not weight or last.version != version:
            rows = a.numel() // max(a.shape[-1], 1)
            last.packed = torch.ops.mkldnn._reorder_linear_weight(columns.detach().contiguous(), rows)
            last.weight, last.version = weight, version
        out.copy_(torch.ops.mkldnn._linear_pointwise(a, last.packed, bias, "none", [], ""))


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype for the CPU at hand: bf16 needs AVX-512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class GemmMatch:
    """A GEMM operator and the row program of what follows it; ``row_stride`` is that of A in elements.

    The weight has ``products`` times ``n`` columns; in the row program those meet that are ``n`` apart.
    """

    group: OperatorGroup
    gemm: Operator[Product]
    program: RowProgram
    n: int
    k: int
    row_stride: int
    products: int = 1

    @property
    def a(self) -> str:
        return self.gemm.inputs[0]

    @property
    def weight(self) -> str:
        return self.gemm.inputs[1]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (N, K)."""
        return self.gemm.semantics.transposed


@dataclass(frozen=True)
class GemmFamily:
    """One GEMM with a constant weight, and the elementwise operators and norms that read its result."""

    name = "gemm"
    kind: ClassVar[type[Product]] = Gemm
    weights: ClassVar[frozenset[torch.dtype]] = frozenset()
    """Dtypes of weights where they are others than those of activations."""
    codes: ClassVar[frozenset[torch.dtype]] = frozenset()
    """Dtypes of activations where they are others than those of results."""
    constants: ClassVar[slice] = slice(1, None)
    """Positions of the inputs that must be constant."""
    dims: ClassVar[int] = 2
    """Dimensions of a weight, of which the last two are multiplied."""

    def match(self, group: OperatorGroup, target: Target) -> GemmMatch | None:
        """The group as a GEMM and the row program of its epilogue; None when a part of it is something else."""
        graph = group.graph
        gemms = group.of(self.kind)
        others = [op for op in group.operators if op not in gemms]
        if len(gemms) != 1 or any(op.expression is None for op in others):
            return None
        (gemm,) = gemms
        if any(v not in graph.constants for v in gemm.inputs[self.constants]) or group.produces(gemm.inputs[0]):
            return None
        a, weight, out = (graph.values[v] for v in (*gemm.inputs[:2], gemm.output))
        stride = row_stride(a)
        stored = floating(target)
        if stride is None or len(weight.shape) != self.dims or out.dtype not in stored:
            return None
        if a.dtype not in (self.codes or stored):
            return None
        if weight.dtype not in (self.weights or stored):
            return None
        *_, n, k = weight.shape if gemm.semantics.transposed else (*weight.shape[:-2], *weight.shape[:-3:-1])
        if rows_and_columns(a.shape)[1] != k or rows_and_columns(out.shape)[1] != n or n == 0:
            return None
        seeds = _parts(group, gemm) or (gemm.output,)
        program = compose(group, others, seeds=seeds, storage=stored, narrow=True)
        if program is None or program.gathers or len(program.bounds) > _MAX_OPERANDS:
            return None
        if len(seeds) > 1 and program.expression.has_reduction:
            return None
        if program.expression.narrow and not program.expression.has_reduction:
            # Rows are finished in parts.
            return None
        return GemmMatch(group, gemm, program, n // len(seeds), k, stride, len(seeds))


def _parts(group: OperatorGroup, gemm: Operator[Product]) -> tuple[str, ...]:
    """The views in which a group reads a product, if these are equal parts of its columns, in order; else nothing."""
    graph = group.graph
    out = graph.values[gemm.output]
    rows, columns = rows_and_columns(out.shape)
    read = {v for op in group.operators for v in op.inputs if graph.base(v) == gemm.output}
    parts = sorted(read, key=lambda v: graph.values[v].offset)
    specs = [graph.values[v] for v in parts]
    width = columns // max(len(parts), 1)
    if len(parts) < 2 or any(rows_and_columns(spec.shape) != (rows, width) for spec in specs):
        return ()
    even = rows == 1 or all(row_stride(spec) == columns for spec in specs)
    lie = even and all(spec.offset == i * width and spec.strides[-1] == 1 for i, spec in enumerate(specs))
    return tuple(parts) if lie and width * len(parts) == columns else ()


class CpuGemm(Implementation[GemmMatch, GemmParameters]):
    """Our template on CPUs."""

    family = "gemm"

    def space(self, match: GemmMatch, target: Target) -> Sequence[GemmParameters]:
        """Register tiles of the instruction set, the one that wastes the fewest columns first; a deeper pass."""
        values = match.group.graph.values
        a_dtype, w_dtype = STORAGE[values[match.a].dtype], STORAGE[values[match.weight].dtype]
        return self.choices(match, target, w_dtype, a_dtype is w_dtype is DType.BF16 and multiplies_bf16(target))

    def choices(self, match: GemmMatch, target: Target, w_dtype: DType, pairs: bool) -> Sequence[GemmParameters]:
        """The :meth:`space` of weights that are stored as ``w_dtype``."""
        program, a_dtype = match.program, STORAGE[match.group.graph.values[match.a].dtype]

        def choice(tile: tuple[int, int], depth: int, tiles: bool = False) -> GemmParameters:
            mr, vectors = tile
            return parameters(
                match.n,
                match.k,
                program.expression,
                program.operands,
                program.output_dtypes,
                target,
                a_dtype=a_dtype,
                w_dtype=w_dtype,
                mr=mr,
                vectors=vectors,
                depth=depth,
                products=match.products,
                pairs=pairs,
                tiles=tiles,
            )

        tiles = register_tiles(match.n, target)
        depths = _PAIR_DEPTHS if pairs else _DEPTHS
        wide = matrix_tiles(match.n, target, "amx_bf16") if pairs else []
        choices = [choice(tile, depth, True) for tile in wide for depth in depths]
        choices += [choice(tile, depths[0]) for tile in tiles] + [choice(tiles[0], depths[1])]
        return [*dict.fromkeys(choices)]

    def cost(self, match: GemmMatch, parameters: GemmParameters, target: Target) -> Cost:
        """Roofline of the padded product, its epilogue, and every tensor touched once; 95 % of the peak and more was
        measured on BERT's shapes."""
        share = share_of(parameters, target, "amx_bf16", 0.95) if parameters.pairs else 0.95
        return product_cost(match, target, nr=parameters.nr, share=share, passes=1, launches=1)

    def call(self, match: GemmMatch, parameters: GemmParameters, target: Target, threads: int) -> KernelCall:
        program = match.program
        p = parameters
        panels = PanelLayout(p.nr, match.transposed, p.w_dtype, p.pairs, p.tiles)
        layout = panels if match.products == 1 else GatedLayout(panels, match.products)
        return KernelCall(
            KernelSpec(self.family, "cpu/gemm.cpp.j2", parameters),
            (match.a, Packed((match.weight,), layout), *program.tensors),
            GemmExtents(program.rows, match.row_stride, program.operand_extents, program.output_strides),
            program.outputs,
            parameters.workspace_bytes(threads),
        )


class OneDnnGemm(Implementation[GemmMatch, LibraryParameters]):
    """oneDNN through PyTorch: one dtype, and no epilogue but a bias."""

    from_library = True

    def space(self, match: GemmMatch, target: Target) -> Sequence[LibraryParameters]:
        program, values = match.program, match.group.graph.values
        read = (match.a, match.weight, *(b.value for b in program.bounds))
        ops = [i.op for i in program.expression.instructions]
        if len(program.outputs) != 1 or len({values[v].dtype for v in (*read, *program.outputs)}) != 1 or match.k == 0:
            return []
        if match.products > 1:
            return []
        if ops == [Op.INPUT]:
            return [LibraryParameters(bias=False)]
        rows = [b for b in program.bounds if b.stride == 0 and b.operand.access is Access.MATRIX]
        is_bias = len(rows) == len(program.bounds) == 1 and values[rows[0].value].shape == (match.n,)
        return [LibraryParameters(bias=True)] if is_bias and ops == [Op.INPUT, Op.INPUT, Op.ADD] else []

    def cost(self, match: GemmMatch, parameters: LibraryParameters, target: Target) -> Cost:
        """As our template's, a little slower (measured on BERT's shapes), and the result is copied to its place."""
        return product_cost(match, target, nr=target.vector_lanes, share=0.85, passes=2, launches=3)

    def call(self, match: GemmMatch, parameters: LibraryParameters, target: Target, threads: int) -> LibraryCall:
        run = PrepackedLinear(parameters.bias, match.transposed)
        bounds = tuple(b.value for b in match.program.bounds)
        return LibraryCall("onednn_linear", run, (match.a, match.weight, *bounds), match.program.outputs)


def product_cost(
    match: GemmMatch,
    target: Target,
    *,
    nr: int,
    share: float,
    passes: int,
    launches: int,
    multiplied: torch.dtype | None = None,
) -> Cost:
    """The roofline of a product in tiles of ``nr`` columns at a ``share`` of the peak, whose epilogue goes through
    memory so many times. ``multiplied`` is the dtype in which elements are multiplied and weights are stored, if it is
    another than theirs."""
    program, values = match.program, match.group.graph.values
    padded = -(-match.n // nr) * nr * match.products
    flops = program.rows * (2.0 * match.k * padded + 2.0 * match.n * program.expression.flops)
    # Below eight independent accumulators the latency of a multiply-add shows.
    efficiency = share * min(1.0, max(program.rows, 1) * (nr // target.vector_lanes) / 8)
    dtype, stored = values[match.a].dtype, values[match.weight].dtype
    if multiplied is not None:
        dtype = stored = multiplied
    moved = values[match.a].nbytes + padded * match.k * stored.itemsize
    moved += program.bytes(match.group.graph) * passes
    return Cost(flops, float(moved), launches, efficiency, dtype if stored == dtype else None)


def register_tiles(n: int, target: Target, tiles: Sequence[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Register tiles (rows, vectors), those with the fewest padded columns first: of ``tiles``, by default those of the
    instruction set."""
    lanes = target.vector_lanes
    order = [(r, min(v, -(-n // lanes))) for r, v in tiles or _TILES[Isa(target.arch)]]
    return sorted(set(order), key=lambda tile: (-(-n // (tile[1] * lanes)) * tile[1], order.index(tile)))


def matrix_tiles(n: int, target: Target, feature: str) -> list[tuple[int, int]]:
    """The register tile (rows, vectors) in matrix tiles, if the target has them with this ``feature``."""
    if not {"amx_tile", feature} <= target.features:
        return []
    return [(_TILE_ROWS, min(_TILE_COLUMNS, -(-n // 16) * 16) // target.vector_lanes)]


def share_of(parameters: GemmParameters, target: Target, feature: str, share: float) -> float:
    """What a product reaches of the target's rate where vectors reach ``share`` of theirs; ``feature`` is that of
    matrix tiles."""
    if parameters.tiles:
        return _TILES_SHARE
    return share / _TILES_RATIO if matrix_tiles(parameters.n, target, feature) else share


def multiplies_bf16(target: Target) -> bool:
    """Whether one instruction multiplies and adds pairs of bf16 numbers, at twice the fp32 rate."""
    return Isa(target.arch) is Isa.AVX512 and "avx512_bf16" in target.features


def parameters(
    n: int,
    k: int,
    epilogue: Expression,
    operands: Sequence[Operand],
    out_dtypes: Sequence[DType],
    target: Target,
    *,
    a_dtype: DType = DType.F32,
    w_dtype: DType = DType.F32,
    mr: int | None = None,
    vectors: int | None = None,
    depth: int = _DEPTHS[0],
    products: int = 1,
    pairs: bool | None = None,
    tiles: bool = False,
) -> GemmParameters:
    """Parameters with blocks that fit the caches of ``target``; the register tile (``mr`` rows, ``vectors`` vectors)
    defaults to its best. ``pairs`` of bf16 numbers are multiplied, by default where A and W have them and the target
    can."""
    best = register_tiles(n, target)[0]
    mr = best[0] if mr is None else mr
    nr = (best[1] if vectors is None else vectors) * target.vector_lanes
    if pairs is None:
        pairs = a_dtype is w_dtype is DType.BF16 and multiplies_bf16(target)
    blocks = blocking(n, k, 2 if pairs else 1, mr, nr, depth, products, epilogue, target, tiles)
    plain = GemmParameters(
        n=n,
        k=k,
        a_dtype=a_dtype,
        w_dtype=w_dtype,
        epilogue=epilogue,
        operands=tuple(operands),
        out_dtypes=tuple(out_dtypes),
        mr=mr,
        nr=nr,
        mc=blocks.mc,
        kc=blocks.kc,
        chunk=blocks.chunk,
        pairs=pairs,
        tiles=tiles,
    )
    return plain if products == 1 else GatedGemmParameters(**vars(plain), parts=products)


def int8_fields(
    match: GemmMatch, target: Target, tile: tuple[int, int], depth: int, width: int, tiles: bool = False
) -> dict[str, Any]:
    """What parameters of products with int8 weights have in common, for a register ``tile`` of rows and vectors and
    steps of ``width`` elements along K."""
    program, values = match.program, match.group.graph.values
    mr, nr = tile[0], tile[1] * target.vector_lanes
    blocks = blocking(match.n, match.k, width, mr, nr, depth, match.products, program.expression, target, tiles)
    return {
        "n": match.n,
        "k": match.k,
        "a_dtype": STORAGE[values[match.a].dtype],
        "w_dtype": DType.I8,
        "epilogue": program.expression,
        "operands": program.operands,
        "out_dtypes": program.output_dtypes,
        "mr": mr,
        "nr": nr,
        "mc": blocks.mc,
        "kc": blocks.kc,
        "chunk": blocks.chunk,
        "tiles": tiles,
        "parts": match.products,
    }


@dataclass(frozen=True)
class Blocks:
    """Rows, steps of a pass and steps of packed rows that fit the caches (see :class:`GemmParameters`)."""

    mc: int
    kc: int
    chunk: int


def blocking(
    n: int,
    k: int,
    width: int,
    mr: int,
    nr: int,
    depth: int,
    products: int,
    epilogue: Expression,
    target: Target,
    tiles: bool = False,
) -> Blocks:
    """Blocks of a product whose steps are ``width`` elements along K, for passes of about ``depth`` steps."""
    steps = _steps(k, width, tiles)
    # A panel of W for one pass takes an eighth of L2, the packed rows of A and their accumulators up to a half each.
    l2 = target.cache_bytes[1] // 4
    passes = max(-(-steps // max(min(depth, l2 // 8 // nr), 64)), 1)
    kc = _steps(max(-(-steps // passes), 1), 1, tiles)
    # W is read once for every block of rows. Rows that are packed for a part of K at a time may be more, but need
    # accumulators of all columns, which a norm needs anyway.
    all_columns = -(-n // nr) * nr * products
    whole = min(l2 // 2 // _odd_lines(steps), l2 // 2 // all_columns if epilogue.has_reduction else _MAX_BLOCK)
    chunked = min(l2 // 2 // all_columns, _MAX_BLOCK)
    by_chunks = 2 * chunked > 3 * whole
    mc = max(min(chunked if by_chunks else whole, _MAX_BLOCK) // mr, 1) * mr
    return Blocks(mc, kc, max(l2 // 4 // mc // kc, 1) * kc if by_chunks else max(steps, 1))
