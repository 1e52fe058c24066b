"""Row-wise and pointwise kernels: which operands they can read, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser.ir.graph import TensorSpec
from fuser.ir.target import emulated_target
from fuser.kernels.base import Access
from fuser.kernels.operands import Bound, OperandExtents, bind, bind_groups, row_stride, rows_and_columns

SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...]]:
    """A strided tensor of numbered elements and a shape that it broadcasts to."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    own = [1 if draw(st.booleans()) else size for size in shape]
    own = own[draw(st.integers(0, len(own))) :]
    order = draw(st.permutations(range(len(own)))) if draw(st.booleans()) else list(range(len(own)))
    base = torch.arange(math.prod(own)).float().view([own[d] for d in order])
    tensor = base.permute([order.index(d) for d in range(len(own))])
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor.expand(
            [full if size == 1 else size for size, full in zip(own, shape[-len(own) :], strict=True)]
        )
    return tensor, shape


def read(bound: Bound, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix that a kernel reads, address by address."""
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    found = torch.empty(rows, columns)
    for r in range(rows):
        size, step = bound.group, bound.step
        row = r // size % bound.period if bound.operand.periodic else r // size
        for c in range(columns):
            found[r, c] = storage[
                row * bound.stride + r % size * step + (c if bound.operand.access is Access.MATRIX else 0)
            ]
    return found


@settings(max_examples=400, deadline=None, derandomize=True)
@given(broadcasts())
def test_operands_are_read_as_pytorch_broadcasts_them(case: tuple[Tensor, tuple[int, ...]]) -> None:
    tensor, shape = case
    spec = TensorSpec(tuple(tensor.shape), torch.float32, tuple(tensor.stride()))
    bound = bind("x", spec, shape)
    if bound is None:
        # A dense operand of the full shape, and one that only lacks leading dimensions, can always be read.
        assert not (tensor.is_contiguous() and tuple(tensor.shape) == shape[len(shape) - tensor.dim() :])
        return
    rows, columns = rows_and_columns(shape)
    assert torch.equal(read(bound, tensor, rows, columns), tensor.broadcast_to(shape).reshape(rows, columns))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(broadcasts())
def test_operands_in_groups_are_read_as_pytorch_broadcasts_them(case: tuple[Tensor, tuple[int, ...]]) -> None:
    tensor, shape = case
    spec = TensorSpec(tuple(tensor.shape), torch.float32, tuple(tensor.stride()))
    bound = bind_groups("x", spec, shape)
    if bound is not None:
        rows, columns = rows_and_columns(shape)
        assert torch.equal(read(bound, tensor, rows, columns), tensor.broadcast_to(shape).reshape(rows, columns))
        assert 1 <= bound.distinct(rows) <= rows


HEADS_OF_A_PRODUCT = TensorSpec((2, 5, 3, 8), torch.float32, (5 * 72, 72, 8, 1))


@pytest.mark.parametrize(
    ("spec", "extents"),
    [
        (HEADS_OF_A_PRODUCT, OperandExtents(72, 10, 3, 8)),
        (TensorSpec.contiguous((2, 5, 1, 8), torch.float32), OperandExtents(8, 10, 3, 0)),
        (TensorSpec((2, 5, 3, 8), torch.float32, (0, 8, 40, 1)), OperandExtents(8, 5, 3, 40)),
        (TensorSpec((2, 5, 3, 8), torch.float32, (120, 8, 40, 1)), None),
    ],
    ids=["heads of a product", "one for all heads", "other order", "three strides"],
)
def test_rows_in_groups(spec: TensorSpec, extents: OperandExtents | None) -> None:
    shape = (2, 5, 3, 8)
    assert bind("x", spec, shape) is None
    bound = bind_groups("x", spec, shape)
    assert (bound and bound.extents) == extents


@pytest.mark.parametrize(
    ("own", "access", "periodic", "stride"),
    [
        ((2, 3, 8), Access.MATRIX, False, 8),
        ((8,), Access.MATRIX, True, 0),
        ((3, 8), Access.MATRIX, True, 8),
        ((2, 3, 1), Access.COLUMN, False, 1),
        ((3, 1), Access.COLUMN, True, 1),
        ((), Access.COLUMN, True, 0),
    ],
)
def test_common_operands(own: tuple[int, ...], access: Access, periodic: bool, stride: int) -> None:
    bound = bind("x", TensorSpec.contiguous(own, torch.float32), (2, 3, 8))
    assert bound is not None
    assert (bound.operand.access, bound.stride) == (access, stride)
    # One row for all needs no period.
    assert stride == 0 or bound.operand.periodic == periodic


@pytest.mark.parametrize(
    ("own", "shape"), [((2, 1, 8), (2, 3, 8)), ((4,), (2, 8)), ((1, 2, 8), (2, 8)), ((2, 1, 1), (2, 3, 8))]
)
def test_operands_that_cannot_be_read(own: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert bind("x", TensorSpec.contiguous(own, torch.float32), shape) is None
    assert bind("x", TensorSpec.contiguous(shape, torch.float64), shape) is None


def test_row_strides() -> None:
    assert row_stride(TensorSpec.contiguous((2, 3, 8), torch.float32)) == 8
    assert row_stride(TensorSpec((2, 3, 8), torch.float32, (48, 16, 1))) == 16
    assert row_stride(TensorSpec((2, 3, 8), torch.float32, (100, 16, 1))) is None
    assert row_stride(TensorSpec((2, 3, 8), torch.float32, (24, 1, 3))) is None


# ---- whole kernels


class Chain(nn.Module):
    def __init__(self, width: int, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(40, width), nn.Embedding(16, width)
        self.norm, self.bias = nn.LayerNorm(width), nn.Parameter(torch.randn(width))
        self.row = nn.Parameter(torch.randn(16, width))
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


CHAINS: dict[str, tuple[str, Callable[..., Any]]] = {
    "embeddings": ("rowwise", lambda m, x, y, i: m.norm(m.table(i) + m.places(torch.arange(16)) + m.bias)),
    "residual norm": ("rowwise", lambda m, x, y, i: m.norm(x + y + m.bias)),
    "two outputs": ("rowwise", lambda m, x, y, i: (lambda s: (s, m.norm(s)))(x + m.row)),
    "softmax": ("rowwise", lambda m, x, y, i: torch.softmax(x * 0.5 + y, -1)),
    "rms": ("rowwise", lambda m, x, y, i: F.rms_norm(x, (x.shape[-1],), m.bias, 1e-6)),
    "gate": ("pointwise", lambda m, x, y, i: F.silu(x) * y),
    "activation": ("pointwise", lambda m, x, y, i: F.gelu(x + m.bias) / 3 - y),
    "lengths": ("rowwise", lambda m, x, y, i: (x * y).square().sum(-1, keepdim=True) * -0.5),
    "largest and rest": ("rowwise", lambda m, x, y, i: (lambda t: (t.exp(), x - t))(x.amax(-1, keepdim=True))),
    "column": ("pointwise", lambda m, x, y, i: x * y[..., :1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 83])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_one_kernel(name: str, width: int, dtype: torch.dtype) -> None:
    family, run = CHAINS[name]
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 16, width, generator=generator).to(dtype) for _ in range(2))
    ids = torch.randint(0, 40, (2, 16), generator=generator)
    model = Chain(width, run).eval().to(dtype)
    exact = Chain(width, run).eval().double()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        ours, theirs, truth = fast(x, y, ids), model(x, y, ids), exact(x.double(), y.double(), ids)
    for mine, eager, expected in zip(
        *((t if isinstance(t, tuple) else (t,)) for t in (ours, theirs, truth)), strict=True
    ):
        error, reference = (mine.double() - expected).norm(), (eager.double() - expected).norm()
        assert float(error) <= 2 * float(reference) + 1e-6 * float(expected.norm())
    assert [(kernel.family, kernel.calls) for kernel in fast.kernels] == [(family, 1)]
    assert fast.unfused == ()


def test_a_gather_of_transposed_ids_follows_their_order() -> None:
    model = Chain(64, lambda m, i: m.norm(m.table(i.t()))).eval()
    ids = torch.arange(24).view(4, 6)
    with torch.no_grad():
        assert torch.allclose(fuser.optimize(model, search="model")(ids), model(ids), atol=1e-5)


class _OneColumn(nn.Module):
    """A number of a table, read with rows of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 1)

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        found = self.table(ids)
        return found * 2, x * found, x - (found + x.amax(-1, keepdim=True))


@pytest.mark.parametrize("target", ["cpu", emulated_target()], ids=["cpu", "cuda"])
def test_a_table_of_one_column_is_no_table_of_rows(target: Any) -> None:
    torch.manual_seed(0)
    model, x, ids = _OneColumn().eval(), torch.randn(5, 7, 64), torch.randint(0, 10, (5, 7))
    with torch.no_grad():
        fast = fuser.optimize(model, search="model", target=target)
        for got, want in zip(fast(x, ids), model(x, ids), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not fast.fallbacks
