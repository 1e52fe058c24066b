"""Nested tensors as inputs: the numbers of every entry by itself, and clear errors for what cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.errors import PackingError

WIDTH = 32


class Encoder(nn.Module):
    """A layer on embeddings under a mask, and a row of every entry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, WIDTH))
        return x, x[:, 0].tanh()


def jagged(*lengths: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.nested.nested_tensor(
        [torch.randn(n, WIDTH, generator=generator) for n in lengths], layout=torch.jagged
    )


@pytest.fixture(scope="module")
def fast() -> fuser.OptimizedModule:
    return fuser.optimize(Encoder().eval(), padding="skip", search="model")


@pytest.mark.parametrize("lengths", [(5, 17, 1, 9), (32, 3), (4, 4, 4)], ids=str)
def test_entries_have_the_numbers_that_they_have_alone(fast: fuser.OptimizedModule, lengths: tuple[int, ...]) -> None:
    exact, x = copy.deepcopy(fast._model).double(), jagged(*lengths)
    with torch.inference_mode():
        rows, firsts = fast(x)
        assert rows.is_nested and torch.equal(rows.offsets(), x.offsets()) and rows.dtype == torch.float32
        for entry, got, first in zip(x.unbind(), rows.unbind(), firsts, strict=True):
            want, want_first = exact(entry[None].double())
            torch.testing.assert_close(got.double(), want[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(first.double(), want_first[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(fast(x=x)[0].values(), rows.values(), rtol=0, atol=0)


def test_what_cannot_be_says_why(fast: fuser.OptimizedModule) -> None:
    x = jagged(5, 2)
    with torch.inference_mode():
        with pytest.raises(PackingError, match="no token"):
            fast(jagged(3, 0))
        with pytest.raises(PackingError, match="which the call leaves out"):
            fast(x, torch.ones(2, 5))
        with pytest.raises(PackingError, match="attention_mask"):
            fuser.optimize(nn.Linear(WIDTH, 4), padding="skip")(x)
        with pytest.raises(ValueError, match=r"layout=torch\.jagged"):
            fast(torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)]))
        with pytest.raises(ValueError, match="gaps"):
            starts, lengths = torch.tensor([0, 4]), torch.tensor([2, 3])
            fast(torch.nested.narrow(torch.randn(2, 8, WIDTH), 1, starts, lengths, layout=torch.jagged))
    with pytest.raises(PackingError, match="gradients"):
        fast(x)
