"""Convolutions whose windows lie side by side, or along one axis, are products, those of every channel by itself
kernels where channels lie beside each other; others are PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.operators import Bias, Depthwise, Gemm, Norm, Unfold

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
    (lambda: nn.Conv2d(3, 32, 4, 4, padding="valid"), image(1, 3, 8, 8), 4),
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


class Sound(nn.Module):
    """Two convolutions of a sequence, as before an encoder of sound."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.norm = first, second, nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.second(nn.functional.gelu(self.first(x))))
        return self.linear(self.norm(y.transpose(1, 2)))


# (convolutions, their input, of what PyTorch still copies)
SOUNDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor, set[str]]] = {
    "padded": (lambda: nn.Conv1d(5, 16, 3, padding=1), lambda: nn.Conv1d(16, 32, 3, 2, 1), image(1, 5, 24), set()),
    "one channel": (lambda: nn.Conv1d(1, 16, 10, 5), lambda: nn.Conv1d(16, 32, 3, 2), image(1, 1, 101), set()),
    "windows that skip": (
        lambda: nn.Conv1d(5, 16, 2, 3, bias=False),
        lambda: nn.Conv1d(16, 32, 2, 3, 1),
        image(1, 5, 24),
        set(),
    ),
    "same length": (
        lambda: nn.Conv1d(5, 16, 4, padding="same", bias=False),
        lambda: nn.Conv1d(16, 32, 3, padding="valid"),
        image(1, 5, 24).transpose(1, 2).contiguous().transpose(1, 2),
        set(),
    ),
    "samples": (
        lambda: nn.Conv1d(5, 16, 3, 2, 1),
        lambda: nn.Conv1d(16, 32, 3, 2, 1),
        image(3, 5, 25),
        {"conv1d_1_windows"},
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("name", SOUNDS)
def test_windows_along_one_axis_are_rows_of_a_product(name: str) -> None:
    first, second, x, left = SOUNDS[name]
    torch.manual_seed(0)
    model = Sound(first(), second(), 32).eval()
    fast = fuser.optimize(model, search="model")
    expected = model.double()(x.double())
    model.float()
    # Of 80 and fewer products each, in fp32.
    torch.testing.assert_close(fast(x).double(), expected, rtol=2e-5, atol=2e-5)
    assert {name for name, _ in fast.unfused} == left and not fast.fallbacks


def test_sequences_of_any_length_are_convolved_by_one_capture() -> None:
    torch.manual_seed(0)
    convolutions = Sound(nn.Conv1d(1, 16, 10, 5), nn.Conv1d(16, 32, 3, 2, 1), 32)
    model = nn.Sequential(nn.Unflatten(1, (1, -1)), convolutions).eval()
    fast = fuser.optimize(model, search="model")
    for length in (95, 101, 160):
        x = image(1, length)
        torch.testing.assert_close(fast(x), model(x), rtol=2e-5, atol=2e-5)
    assert not fast.specialized and not fast.unfused


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"groups": 2}], ids=str)
def test_other_sequences_are_left_to_pytorch(settings: dict[str, int]) -> None:
    model = Sound(nn.Conv1d(4, 16, 3, **settings), nn.Conv1d(16, 32, 2), 32).eval()
    x = image(2, 4, 24)
    fast = fuser.optimize(model, search="model")
    torch.testing.assert_close(fast(x), model(x))
    assert any("conv1d" in reason for _, reason in (*fast.unfused, *fast.outside))


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
    ids=["read with channels first", "padded", "dilated", "grouped", "of one pixel"],
)
def test_others_are_left_to_pytorch(convolution: nn.Module) -> None:
    model = nn.Sequential(convolution, nn.Flatten(2), nn.LazyLinear(16)).eval()
    x = image(2, 4, 8, 8)
    expected = model(x)
    fast = fuser.optimize(model, search="model")
    torch.testing.assert_close(fast(x), expected)
    assert any("conv2d" in reason for _, reason in (*fast.unfused, *fast.outside))


# Patches that overlap: of an image, and of a grid whose channels lie last.
OVERLAPPING: list[tuple[Callable[[], nn.Module], Tensor, int]] = [
    (lambda: nn.Conv2d(3, 32, 7, 4, padding=3), image(2, 3, 20, 13), 20),
    (lambda: nn.Conv2d(8, 32, 3, 2, padding=1, bias=False), channels_last(2, 8, 9, 6), 15),
    (lambda: nn.Conv2d(3, 32, (2, 5), (2, 3), padding=(1, 0)), image(1, 3, 8, 11), 15),
]


@pytest.mark.parametrize(("make", "x", "tokens"), OVERLAPPING)
def test_patches_that_overlap_a_little_are_rows_of_a_product(
    make: Callable[[], nn.Module], x: Tensor, tokens: int
) -> None:
    torch.manual_seed(0)
    model = Stem(make(), tokens, 32).eval()
    exact, fast = copy.deepcopy(model).double(), fuser.optimize(model, search="model")
    for batch in (x, x[:1], torch.cat((x, x))):
        torch.testing.assert_close(fast(batch).double(), exact(batch.double()), rtol=2e-5, atol=2e-5)
    assert fast.unfused == fast.fallbacks == fast.outside == ()
    operators = [type(op.semantics) for op in fast.programs[-1].graph.operators]
    assert operators.count(Unfold) == operators.count(Gemm) == 1


class Tokens(nn.Module):
    """Two products with a depthwise convolution between them, of patches as tokens (B, H · W, C), as SegFormer spells
    it."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.patches, self.convolution, self.behind = nn.Conv2d(3, 40, 4, 4), convolution, nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        tokens = nn.functional.gelu(x.flatten(2).transpose(1, 2))
        mixed = self.convolution(tokens.transpose(1, 2).view(x.shape)).flatten(2).transpose(1, 2)
        return self.behind(nn.functional.gelu(mixed))


class Grid(nn.Module):
    """The same of a grid (B, H, W, C) of any size."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.before, self.convolution, self.behind = nn.Linear(3, 40), convolution, nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.convolution(self.before(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.behind(nn.functional.gelu(mixed))


@pytest.mark.parametrize(
    ("kind", "convolution", "shapes"),
    [
        (Tokens, nn.Conv2d(40, 40, 3, padding=1, groups=40), [(2, 3, 24, 20), (3, 3, 24, 20)]),
        (Tokens, nn.Conv2d(40, 40, (3, 2), dilation=(1, 2), padding="same", groups=40), [(2, 3, 24, 20)]),
        (Grid, nn.Conv2d(40, 40, 5, 2, padding=2, groups=40, bias=False), [(2, 9, 6, 3), (2, 10, 6, 3), (1, 4, 6, 3)]),
    ],
)
def test_tokens_are_convolved_as_they_lie(
    kind: Callable[[nn.Module], nn.Module], convolution: nn.Module, shapes: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    model = kind(convolution).eval()
    exact, fast = copy.deepcopy(model).double(), fuser.optimize(model, search="model")
    for shape in shapes:
        x = image(*shape)
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=2e-5, atol=2e-5)
    assert fast.unfused == fast.fallbacks == ()
    operators = [type(op.semantics) for op in fast.programs[-1].graph.operators]
    assert operators.count(Depthwise) == 1


def test_a_grid_with_channels_first_is_convolved_by_pytorch() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(2), nn.LazyLinear(16)).eval()
    x = image(2, 8, 6, 6)
    expected = model(x)
    fast = fuser.optimize(model, search="model")
    torch.testing.assert_close(fast(x), expected)
    assert any("conv2d" in reason for _, reason in (*fast.unfused, *fast.outside))


class LinesOfTokens(nn.Module):
    """A convolution of tokens as a grid of eight lines."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 32), nn.Linear(32, 16)
        self.convolution = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        grid = y.transpose(1, 2).view(y.shape[0], y.shape[2], 8, -1)
        out: Tensor = self.after(self.convolution(grid).flatten(2).transpose(1, 2))
        return out


def test_tokens_of_a_named_length_are_lines_of_a_grid() -> None:
    torch.manual_seed(0)
    model = LinesOfTokens().eval()
    fast, exact = fuser.optimize(model, search="model"), copy.deepcopy(model).double()
    for tokens in (64, 40, 128):
        x = image(2, tokens, 16)
        # Of nine and 32 products each, in fp32.
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=1e-5, atol=2e-6)
    assert fast.unfused == fast.outside == fast.fallbacks == ()


def test_segformer_is_kernels() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    two = {"depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2]}
    heads = {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    model = transformers.SegformerModel(transformers.SegformerConfig(**two, **heads)).eval()
    fast, x = fuser.optimize(model, search="model"), image(1, 3, 64, 64)
    want = copy.deepcopy(model).double()(x.double()).last_hidden_state
    # Rounding of fp32 through two blocks.
    assert (fast(x).last_hidden_state.double() - want).norm() <= 2e-6 * want.norm()
    assert fast.fallbacks == () and all("copied" in reason for _, reason in fast.unfused)
