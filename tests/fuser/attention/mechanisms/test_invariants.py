"""What is true of every mechanism, whatever its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mechanism_cases import DIM, GRIDS, SEQUENCES, BatchFirst, make, tokens
from torch import Tensor, nn

ALL = {**{f"sequence-{k}": v for k, v in SEQUENCES.items()}, **{f"grid-{k}": v for k, v in GRIDS.items()}}
CASES = pytest.mark.parametrize("case", ALL)
# The floor below denominators of linear attention, and of what scatterbrain's windows do not see, takes weights away.
AVERAGES = [case for case in ALL if "performer" not in case and "scatterbrain" not in case]
CAUSAL = [case for case in SEQUENCES if case in ("causal_eva", "causal_eva-overlap")]


def of(case: str) -> tuple[nn.Module, Tensor]:
    """The mechanism in evaluation mode, float64, and tokens for it."""
    name, arguments = ALL[case]
    return make(name, **arguments).double().eval(), tokens(2, 4, 6) if case.startswith("grid") else tokens()


def with_values(module: nn.Module, change: Any) -> None:
    """Change the weights so that values are seen: ``change`` the values' projection, no output projection."""
    inner = module.attention if isinstance(module, BatchFirst) else module
    out = getattr(inner, "out_proj", None) or inner.proj
    with torch.no_grad():
        out.weight.copy_(torch.eye(DIM))
        out.bias.zero_()
        if hasattr(inner, "qkv"):
            change(inner.qkv.weight[2 * DIM :], inner.qkv.bias[2 * DIM :])
        else:
            change(inner.v_proj.weight, inner.v_proj.bias)


@CASES
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    module, x = of(case)
    given = {"x": x[:1], **dict(module.named_parameters())}
    sizes = [t.numel() for t in given.values()]

    def call(joined: Tensor) -> Tensor:
        # One operand, since each takes finite differences of its own.
        parts = joined.split(sizes)
        values = {name: part.view_as(t) for (name, t), part in zip(given.items(), parts, strict=True)}
        out: Tensor = torch.func.functional_call(module, values, (values.pop("x"),))
        return out

    joined = torch.cat([t.detach().flatten() for t in given.values()]).requires_grad_()
    assert torch.autograd.gradcheck(call, joined, fast_mode=True)


@pytest.mark.parametrize("case", AVERAGES)
def test_equal_values_give_that_value(case: str) -> None:
    module, x = of(case)
    with_values(module, lambda weight, bias: (weight.zero_(), bias.copy_(torch.arange(DIM) - 3.0)))
    out = module(x)
    torch.testing.assert_close(out, (torch.arange(DIM) - 3.0).double().expand_as(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", AVERAGES)
def test_outputs_lie_among_the_values(case: str) -> None:
    module, x = of(case)
    with_values(module, lambda weight, bias: (weight.copy_(torch.eye(DIM)), bias.zero_()))
    out = module(x)
    flat = x.flatten(1, -2)
    assert (out.flatten(1, -2) <= flat.amax(1, keepdim=True) + 1e-12).all()
    assert (out.flatten(1, -2) >= flat.amin(1, keepdim=True) - 1e-12).all()


@pytest.mark.parametrize("case", CAUSAL)
def test_later_tokens_change_no_bit_of_earlier_outputs(case: str) -> None:
    module, x = of(f"sequence-{case}")
    for first in (1, 7, 8, 13, 20):
        changed = x.clone()
        changed[:, first:] += 1.0
        assert torch.equal(module(changed)[:, :first], module(x)[:, :first])
        assert not torch.equal(module(changed)[:, first:], module(x)[:, first:])


@pytest.mark.parametrize("case", SEQUENCES)
def test_what_padding_holds_does_not_matter_and_rows_of_padding_are_finite(case: str) -> None:
    module, x = of(f"sequence-{case}")
    x = torch.cat([x, x[:1]])
    padding = torch.zeros(3, x.shape[1], dtype=torch.bool)
    padding[0, 17:], padding[1, :3], padding[2] = True, True, True
    changed = torch.where(padding.unsqueeze(-1), x + 3.0, x).requires_grad_()
    out, other = module(x, padding), module(changed, padding)
    torch.testing.assert_close(other[~padding], out[~padding], rtol=0, atol=1e-12)
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(other[:2].sum() + other[2].sum(), changed)
    assert gradient.isfinite().all()
    assert not torch.equal(module(x)[~padding], out[~padding])


@pytest.mark.parametrize("case", ["softmax", "local", "eva", "scatterbrain", "ra-expected"])
def test_a_query_that_sees_nothing_gets_zeros(case: str) -> None:
    module, x = of(f"sequence-{case}")
    module.proj.bias.data.zero_()
    assert torch.equal(module(x, torch.ones(2, 24)), torch.zeros_like(x))


@CASES
def test_large_activations_of_16_bits_stay_finite(case: str) -> None:
    module, x = of(case)
    for dtype in (torch.float16, torch.bfloat16):
        out = module.to(dtype)((x * 40).to(dtype))
        assert out.dtype == dtype and out.isfinite().all()


@CASES
def test_training_reaches_every_parameter(case: str) -> None:
    module, x = of(case)
    module.train()(x).square().sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("case", ["softmax", "local", "performer-favorp", "ra-mean", "eva"])
def test_a_grid_is_a_sequence_to_what_knows_no_grids(case: str) -> None:
    module, x = of(f"sequence-{case}")
    assert torch.equal(module(x.unflatten(1, (4, 6))).flatten(1, 2), module(x))


def test_windows_of_all_tokens_are_softmax_attention() -> None:
    softmax, local = make("softmax").double(), make("local", window_size=24).double()
    local.load_state_dict(softmax.state_dict())
    torch.testing.assert_close(local(tokens()), softmax(tokens()), rtol=0, atol=1e-12)
