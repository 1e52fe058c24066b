"""Convolutions whose windows lie side by side are products; others are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.operators import Bias, Gemm, Norm

pytestmark = pytest.mark.usefixtures("no_grad")


class Stem(nn.Module):
    """Patches as tokens, with positions and a norm."""

    def __init__(self, convolution: nn.Module, tokens: int, width: int) -> None:
        super().__init__()
        self.convolution = convolution
        self.positions = nn.Parameter(torch.randn(1, tokens, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x).flatten(2).transpose(1, 2) + self.positions)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def channels_last(*shape: int) -> Tensor:
    return image(*shape).contiguous(memory_format=torch.channels_last)


# (the convolution, its input, the number of patches of one)
CASES: list[tuple[Callable[[], nn.Module], Tensor, int]] = [
    (lambda: nn.Conv2d(3, 32, 4, 4), image(2, 3, 16, 24), 24),
    (lambda: nn.Conv2d(3, 32, (2, 4), (2, 4), bias=False), image(1, 3, 8, 8), 8),
    # Rows and columns that remain.
    (lambda: nn.Conv2d(3, 32, 5, 5), image(2, 3, 17, 12), 6),
    (lambda: nn.Conv2d(8, 32, 2, 2), channels_last(2, 8, 8, 6), 12),
    (lambda: nn.Conv2d(3, 32, 4, 4), image(2, 3, 32, 8).transpose(2, 3)[..., ::2], 8),
    (lambda: nn.Conv1d(5, 32, 6, 6), image(3, 5, 36), 6),
    (lambda: nn.Conv3d(3, 32, 2, 2), image(1, 3, 4, 4, 6), 12),
]


@pytest.mark.parametrize(("make", "x", "tokens"), CASES)
def test_patches_are_rows_of_a_product(make: Callable[[], nn.Module], x: Tensor, tokens: int) -> None:
    torch.manual_seed(0)
    model = Stem(make(), tokens, 32).eval()
    fast = fuser.optimize(model, search="model")
    # Of 144 and fewer products each, in fp32.
    torch.testing.assert_close(fast(x).double(), model.double()(x.double()), rtol=2e-5, atol=2e-5)
    assert fast.unfused == fast.fallbacks == ()
    operators = [type(op.semantics) for op in fast.programs[-1].graph.operators]
    assert (
        operators.count(Gemm) == 1 and Norm in operators and (Bias in operators) == (model.convolution.bias is not None)
    )


def test_what_a_caller_gets_with_channels_first_is_left_to_pytorch() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 8, 2, 2)).eval(), image(2, 4, 8, 8)
    fast = fuser.optimize(model, search="model")
    torch.testing.assert_close(fast(x), model(x))
    assert any("conv2d" in reason for _, reason in (*fast.unfused, *fast.outside))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 3, 2),
        nn.Conv2d(4, 8, 2, 2, padding=1),
        nn.Conv2d(4, 8, 2, 2, dilation=2),
        nn.Conv2d(4, 8, 2, 2, groups=2),
        nn.Conv2d(4, 8, 1),
    ],
    ids=["overlapping", "padded", "dilated", "grouped", "of one pixel"],
)
def test_others_are_left_to_pytorch(convolution: nn.Module) -> None:
    model = nn.Sequential(convolution, nn.Flatten(2), nn.LazyLinear(16)).eval()
    x = image(2, 4, 8, 8)
    expected = model(x)
    fast = fuser.optimize(model, search="model")
    torch.testing.assert_close(fast(x), expected)
    assert any("conv2d" in reason for _, reason in (*fast.unfused, *fast.outside))
