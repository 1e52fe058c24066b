"""What an engine does where a program cannot be made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuser
from fuser.frontend.aten import HANDLERS
from fuser.module import engine
from fuser.module.forms import Form

GELU = torch.ops.aten.gelu.default


@torch.no_grad()
def test_the_original_runs_where_fuser_is_at_fault(monkeypatch: pytest.MonkeyPatch, faults: list[str]) -> None:
    """Whatever goes wrong besides what fuser knows: in the capture for all sizes, and in that of one call."""
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    x, before = torch.randn(3, 8), {k: v.clone() for k, v in model.state_dict().items()}
    fast = fuser.optimize(model, search="model")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a division")

    monkeypatch.setitem(HANDLERS, GELU, broken)
    for rows in (3, 4):
        assert torch.equal(fast(x[:1].expand(rows, 8)), model(x[:1].expand(rows, 8)))
    assert "fuser fails on this model, ZeroDivisionError in test_engine.py" in fast.report()
    # With the traceback that a report of the fault needs.
    assert faults and all("in broken" in text and "should be reported" in text for text in faults)
    faults.clear()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    # Another module, without the fault, is compiled.
    monkeypatch.undo()
    again = fuser.optimize(model, search="model")
    torch.testing.assert_close(again(x), model(x))
    assert again.fallbacks == () and again.kernels


@torch.no_grad()
def test_the_original_runs_for_sizes_at_which_fuser_is_at_fault(
    monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    fast = fuser.optimize(model, search="model")
    fast(torch.randn(3, 8))

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a size")

    monkeypatch.setattr(Form, "compile", broken)
    x = torch.randn(5, 8)
    for _ in range(3):
        assert torch.equal(fast(x), model(x))
    assert any("ValueError in test_engine.py" in reason for reason in fast.fallbacks)
    # Not looked at again at every call.
    assert len(faults) == 1
    faults.clear()


@torch.no_grad()
def test_weights_that_cannot_be_packed_anew_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), torch.randn(3, 8)
    fast = fuser.optimize(model, search="model")
    fast(x)

    def broken(*_: object, **__: object) -> None:
        raise TypeError("a weight")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "program_constants", broken)
        model[0].weight.mul_(2)
        got = fast(x)
    torch.testing.assert_close(got, model(x))
    assert fast.fallbacks == ()


@torch.no_grad()
def test_the_original_runs_where_pytorch_gives_something_else_than_it_said() -> None:
    """Statistics of a batch in bf16 are of another dtype than the operator's meta function says."""

    class Normalized(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
            return torch.ops.aten._native_batch_norm_legit(x, None, None, mean, variance, True, 0.1, 1e-5)

    model, x = Normalized().eval(), torch.randn(6, 4).to(torch.bfloat16)
    fast = fuser.optimize(model, search="model")
    for _ in range(2):
        for got, want in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, want)
    assert "where the captured model had" in fast.report()
