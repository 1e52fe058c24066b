"""Reductions of other axes than the last: pooled squares of a grid, what experts have made, the largest of a window."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fuser

WIDTH, SIDE = 32, 12


class Pooled(nn.Module):
    """Tokens of a square grid, reduced between two linear layers."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.reduce(self.before(x)))
        return y


def squares(x: Tensor, side: int) -> Tensor:
    return x.view(len(x), SIDE // side, side, SIDE // side, side, WIDTH)


def heads_first(x: Tensor) -> Tensor:
    return squares(x, 4).unflatten(-1, (4, WIDTH // 4)).movedim(5, 1)


FEW: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda x: squares(x, 4).mean((2, 4)),
    "squares, kept": lambda x: squares(x, 4).mean((2, 4), keepdim=True),
    "rows of squares": lambda x: squares(x, 6).mean((2, 4)),
    "heads first": lambda x: heads_first(x).mean((3, 5)).permute(0, 2, 3, 1, 4).reshape(len(x), 9, WIDTH),
    "experts": lambda x: x.view(len(x), SIDE**2 // 2, 2, WIDTH).sum(2),
    "largest": lambda x: x.view(len(x), SIDE**2 // 3, 3, WIDTH).amax(2),
}
MANY: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x.view(len(x), SIDE**2, WIDTH).mean(1),
    "all but four": lambda x: x.view(len(x), SIDE**2, WIDTH)[:, 4:].mean(1, keepdim=True),
    "half": lambda x: x.view(len(x), 2, SIDE**2 // 2, WIDTH).sum(2),
    "the largest of all": lambda x: x.view(len(x), SIDE**2, WIDTH).amax(1),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "a prime number": lambda x: x.view(len(x), SIDE**2, WIDTH)[:, 5:].mean(1),
    "in no order": lambda x: squares(x, 3).permute(1, 3, 0, 2, 4, 5).sum(2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*FEW, *MANY, *OTHER])
def test_reductions_of_other_axes(name: str, dtype: torch.dtype) -> None:
    model = Pooled({**FEW, **MANY, **OTHER}[name]).eval().to(dtype)
    fast = fuser.optimize(model)
    exact = Pooled(model.reduce).eval().double()
    exact.load_state_dict(model.state_dict())
    for batch in (2, 3):
        x = torch.randn(batch, SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(batch)).to(dtype)
        with torch.no_grad():
            got, want, eager = fast(x), exact(x.double()), model(x)
        assert got.dtype == dtype and got.shape == want.shape
        error, theirs = (float((found.double() - want).norm() / want.norm()) for found in (got, eager))
        # Sums in another order round otherwise.
        assert error <= 2 * theirs + torch.finfo(dtype).eps / 8
    if name not in OTHER and dtype == torch.float32:
        assert fast.programs and not any(program.unfused for program in fast.programs)


def test_gpus_reduce_few_parts_by_a_kernel() -> None:
    model = Pooled(FEW["squares"]).eval()
    fast = fuser.optimize(model, target="cuda:emulated")
    x = torch.randn(2, SIDE * SIDE, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert fast.programs and not any(program.unfused for program in fast.programs)
