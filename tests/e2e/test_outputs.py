"""What a caller can do with outputs: their strides, what they share memory with, and operators that read strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("rows", torch.randn(4, 8))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def scaled_in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y.transpose(0, 1).mul_(0.5)
    return y


def several(m: Any, x: Tensor) -> Any:
    y = m.linear(x)
    return y, y.t(), y[1:], y.clone(), y.t().contiguous(), y.view(-1)[3:].expand(2, -1)


def copies_of_views(m: Any, x: Tensor) -> Any:
    y = m.linear(x)
    return (
        x.unfold(1, 4, 4).clone(),
        m.rows.unfold(1, 4, 4).clone(),
        y.unfold(1, 4, 4).clone(),
        y,
        x.diagonal().clone(),
        [part.clone() for part in y.unbind(0)][1],
        y.to(torch.float32).unfold(0, 2, 2).contiguous(),
    )


MODELS: dict[str, Callable[..., Any]] = {
    "as_strided of a transposed copy": lambda m, x: x.t().contiguous().as_strided((4, 8), (8, 1)) * 2,
    "as_strided beyond its operand": lambda m, x: m.linear(x)[1:].as_strided((2, 8), (8, 1), 0) * 2,
    "overlapping windows": lambda m, x: x.as_strided((3, 2, 4), (8, 2, 1)) + 1.0,
    "unfolded": lambda m, x: (x.t().contiguous().unfold(0, 4, 2) * 1.5, m.linear(x).unfold(1, 4, 2)),
    "complex": lambda m, x: torch.view_as_real(torch.view_as_complex(x.view(4, 4, 2)) * 2).flatten(1) * 2,
    "bits": lambda m, x: (x * 2).view(torch.int32) + 1,
    "in place through a view": scaled_in_place,
    "given and kept": lambda m, x: (
        x,
        x.t(),
        m.linear.weight,
        m.linear.weight.view(-1),
        m.rows[1:],
        m.rows.chunk(2)[1],
    ),
    "views of one result": several,
    "copies of views": copies_of_views,
    "constants": lambda m, x: (m.rows * 2, x.clone(), x.t().contiguous(), m.linear.weight.t().contiguous()),
    "expanded": lambda m, x: (x.sum(-1, keepdim=True) * 2).expand(4, 8),
    "joined with nothing": lambda m, x: (
        torch.cat([m.rows[:0], x]),
        torch.cat([m.rows, m.rows[:0]]),
        *(lambda y: (y, torch.cat([y[:, :0], y], 1), torch.cat([y.t(), y.t()[:0]])))(m.linear(x)),
    ),
    "repeated": lambda m, x: (
        x.repeat_interleave(2, 1),
        m.linear(x)[:, :1].repeat_interleave(3, 1),
        m.linear(x).view(4, 1, 8).expand(4, 2, 8).reshape(8, 8),
    ),
    "attention": lambda m, x: F.scaled_dot_product_attention(*(m.linear(x).view(1, 4, 2, 4).transpose(1, 2),) * 3),
    "active dropout": lambda m, x: F.dropout((x.t().contiguous().t() * 3).t(), 0.5, True) + 1.0,
    "random like a transposed": lambda m, x: torch.rand_like((x * 2).t()) + 1.0,
}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def relations(model: Any, x: Tensor, outputs: tuple[Tensor, ...]) -> list[Any]:
    """For every output: strides, place, and which of the known tensors and the other outputs share its memory."""
    known = (x, *model.parameters(), *model.buffers(), *outputs)
    return [
        (t.dtype, t.stride(), t.storage_offset(), [storage(t) == storage(k) for k in known], [t is k for k in known])
        for t in outputs
    ]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_strides_and_share_the_memory_of_those_of_eager(name: str) -> None:
    model = Model(MODELS[name]).eval()
    fast = fuser.optimize(model)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (model, fast):
        torch.manual_seed(2)
        with torch.no_grad():
            outputs = run(x)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        found.append((relations(model, x, outputs), outputs))
    (theirs, expected), (mine, got) = found
    assert fast.fallbacks == () and mine == theirs
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_writing_to_what_is_returned_writes_what_it_is_a_view_of() -> None:
    model = Model(lambda m, x: (x.t(), m.rows[1:], m.linear.weight, m.linear(x))).eval()
    fast = fuser.optimize(model)
    # A view of a transposed input is a view of it as well, whatever programs read.
    for x in (torch.randn(4, 8), torch.randn(8, 4).t()):
        view, rows, weight, _ = fast(x)
        assert weight is model.linear.weight and weight.requires_grad
        with torch.no_grad():
            view.mul_(2.0)
            rows.fill_(3.0)
            weight.zero_()
        assert torch.equal(view, x.t()) and bool((model.rows[1:] == 3.0).all())
        assert torch.equal(fast(x)[3], model.linear.bias.expand(4, 8))


def test_memory_that_is_only_partly_known_stays_with_pytorch() -> None:
    model = Model(lambda m, x: torch.as_strided_scatter(x * 1.0, x[0] * 3, (8,), (1,), 8) * 2).eval()
    fast = fuser.optimize(model)
    x = torch.randn(4, 8)
    assert torch.equal(fast(x), model(x))
    assert "as_strided_scatter" in fast.fallbacks[0]
