"""Linear attention from the public function to the kernel: numbers, gradients, captures, and the tests of ONNX."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from linear_reference import recurrent
from torch import Tensor, nn

import fuser
from fuser import linear_attention
from fuser.attention.linear import _run, features
from fuser.ir.errors import MechanismError
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.target import emulated_target

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}
"""Sums of some tens of terms in fp32, and one rounding of the output."""


def operands(dtype: torch.dtype, tokens: int = 70, width: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, decay, beta = (
        torch.rand(2, tokens, heads, size, generator=generator).transpose(1, 2).to(dtype)
        for heads, size in ((4, width), (2, width), (2, width), (2, 1))
    )
    v = torch.randn(2, 2, tokens, 24, generator=generator).to(dtype)
    return {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "decay": -decay, "beta": beta}


RULES: dict[str, dict[str, Any]] = {
    "plain": {"decay": None, "beta": None},
    "whole": {"decay": None, "beta": None, "causal": False, "normalize": 0.1},
    "normalized": {"beta": None, "normalize": 0.1},
    "gated": {"beta": None},
    "delta": {"decay": None},
    "gated delta": {},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_states_are_those_of_the_recurrence(rule: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {**operands(dtype), **RULES[rule], "scale": 0.3}
    out, state = linear_attention(**given, return_state=True)
    want, last = recurrent(**given)
    assert out.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    assert float((out.double() - want).norm() / want.norm()) < TOLERANCE[dtype]
    assert float((state.double() - last).norm() / last.norm()) < min(TOLERANCE[dtype], 3e-6)


def test_a_gpu_has_a_kernel_for_it() -> None:
    given: dict[str, Any] = {**operands(torch.float32), **RULES["gated delta"], "scale": 0.3}
    want, last = recurrent(**given)
    out, state = torch.full_like(want, torch.nan, dtype=torch.float32), torch.full_like(last, torch.nan).float()
    tensors = tuple(given[name] for name in ("q", "k", "v", "decay", "beta"))
    _run(Recurrence(0.3, decay=True, delta=True), (*tensors, None), out, state, emulated_target())
    assert float((out.double() - want).norm() / want.norm()) < TOLERANCE[torch.float32]
    assert float((state.double() - last).norm() / last.norm()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rule", ["normalized", "gated", "gated delta"])
def test_parts_of_a_sequence_go_on_from_each_other(rule: str) -> None:
    given: dict[str, Any] = {**operands(torch.float32), **RULES[rule]}
    whole, last = linear_attention(**given, return_state=True)
    state, parts = None, []
    for start, stop in itertools.pairwise((0, 1, 40, 70)):
        part = {n: t[:, :, start:stop] if isinstance(t, Tensor) else t for n, t in given.items()}
        out, state = linear_attention(**part, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_one_decay_for_a_head_is_retention() -> None:
    """RetNet (Sun et al., 2023): weights gamma^(t - s) of the products of queries and keys."""
    given = operands(torch.float32)
    gamma = torch.tensor([0.9, 0.7])
    out = linear_attention(given["q"], given["k"], given["v"], gamma.log()[None, :, None, None], scale=1.0)
    apart = torch.arange(70)[:, None] - torch.arange(70)
    weights = torch.where(apart >= 0, gamma.double()[:, None, None] ** apart, 0.0).repeat_interleave(2, 0)
    k, v = (given[n].double().repeat_interleave(2, 1) for n in "kv")
    want = (given["q"].double() @ k.mT * weights) @ v
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule: str) -> None:
    tokens = {n: t[:1, :, :5, :3].double() for n, t in operands(torch.float64, 40, 3).items()}
    given = {**tokens, **RULES[rule]}
    names = [n for n, t in given.items() if isinstance(t, Tensor)]
    more = {n: t for n, t in given.items() if n not in names and t is not None}

    def call(*tensors: Tensor) -> Any:
        return linear_attention(**dict(zip(names, tensors, strict=True)), **more, return_state=True)

    inputs = tuple(given[n].clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


class Layer(nn.Module):
    """Gated delta rule between linear layers."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule, self.inner, self.out = RULES[rule], nn.Linear(32, 4 * 32 + 2), nn.Linear(32, 32)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *heads, beta = self.inner(x).split([32, 32, 32, 32, 2], -1)
        q, k, v, decay = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in heads)
        given = {"decay": -decay.sigmoid(), "beta": beta.sigmoid().mT.unsqueeze(-1), **self.rule}
        positive = {"q": q.sigmoid(), "k": k.sigmoid() / 4}
        out, state = linear_attention(**positive, v=v, **given, state=state, return_state=True)
        return self.out(out.transpose(1, 2).flatten(2)), state


@pytest.mark.parametrize("rule", ["normalized", "gated delta"])
def test_a_layer_is_captured_for_all_lengths(rule: str) -> None:
    torch.manual_seed(0)
    model = Layer(rule).eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        for tokens in (24, 31):
            x = torch.randn(2, tokens, 32)
            _, first = model(x)
            for mine, eager in zip(fast(x, first), model(x, first), strict=True):
                torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)
    assert fast.fallbacks == ()
    assert sum(kernel.family == "linear_attention" for kernel in fast.kernels) == 1


def test_compiled_functions_keep_the_operator_and_decompose_feature_maps() -> None:
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def attend(x: Tensor, directions: Tensor) -> Tensor:
        mapped = features(x, directions, FeatureMap.RELU)
        out = linear_attention(mapped, mapped, x)
        assert isinstance(out, Tensor)
        return out

    x, directions = torch.randn(1, 2, 9, 4), torch.randn(2, 6, 4)
    compiled = torch.compile(attend, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x, directions), attend(x, directions))
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("fuser.linear_attention" in name for name in called)
    made = torch.export.export(_Function(attend), (x, directions)).run_decompositions()
    assert "fuser.features" not in str(made.graph) and "fuser.linear_attention" in str(made.graph)


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Tensor:
        out: Tensor = self.function(*given)
        return out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 3, 70, 16)}, "multiple of those of k"),
        ({"k": torch.zeros(2, 2, 70, 15)}, "widths of q and k"),
        ({"k": torch.zeros(2, 2, 70, 16, dtype=torch.float64)}, "one dtype"),
        ({"q": torch.zeros(2, 4, 69, 16)}, "as many queries as keys"),
        ({"decay": torch.zeros(2, 2, 70, 5)}, "decay of shape"),
        ({"beta": torch.zeros(2, 2, 70, dtype=torch.int64)}, "beta must be floating-point"),
        ({"state": torch.zeros(2, 2, 16, 25)}, r"state must be torch.float32 \(2, 2, 16, 24\)"),
        ({"v": torch.zeros(2, 70, 24)}, "takes q"),
    ],
)
def test_operands_that_do_not_fit(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**operands(torch.float32), **changed})


def test_parts_that_do_not_go_together() -> None:
    given = operands(torch.float32)
    with pytest.raises(MechanismError, match="causal recurrence"):
        linear_attention(given["q"], given["k"], given["v"], given["decay"], causal=False)
    with pytest.raises(MechanismError, match="no sums to divide by"):
        linear_attention(**given, normalize=1.0)
    with pytest.raises(MechanismError, match="features need"):
        features(given["q"], torch.zeros(2, 8, 16), FeatureMap.RELU)


def test_no_tokens_leave_the_state_as_it_is() -> None:
    given = {n: t[:, :, :0] for n, t in operands(torch.float32).items()}
    state = torch.randn(2, 2, 16, 24)
    out, last = linear_attention(**given, state=state, return_state=True)
    assert out.shape == (2, 4, 0, 24) and torch.equal(last, state) and last.data_ptr() != state.data_ptr()


# ---- the standard's own tests of the operator LinearAttention

onnx = pytest.importorskip("onnx")


def _node_tests() -> dict[str, Any]:
    if not onnx.defs.has("LinearAttention"):
        return {}
    with warnings.catch_warnings():
        # All other operators' tests are made, too, and some overflow on purpose.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node as nodes

        tests = nodes.collect_testcases("LinearAttention")
    return {test.name: test for test in tests if "expanded" not in test.name}


NODE_TESTS = _node_tests()


@pytest.mark.skipif(not NODE_TESTS, reason="this onnx has no LinearAttention")
@pytest.mark.parametrize("name", NODE_TESTS)
def test_the_standards_own_tests(name: str) -> None:
    test = NODE_TESTS[name]
    (node,) = test.model.graph.node
    numbers = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    heads, kv_heads = numbers["q_num_heads"], numbers["kv_num_heads"]
    inputs, outputs = test.data_sets[0]
    given = dict(zip((n for n in node.input if n), map(torch.from_numpy, inputs), strict=True))

    def split(t: Tensor, count: int) -> Tensor:
        return t.unflatten(-1, (count, -1)).transpose(1, 2)

    q = split(given["query"], heads)
    k, v = (split(given[n], kv_heads) for n in ("key", "value"))
    decay = split(given["decay"], kv_heads) if "decay" in given else None
    beta = given["beta"].mT.unsqueeze(-1) if "beta" in given else None
    past = given["past_state"].float() if "past_state" in given else None
    scale = numbers.get("scale") or None
    out, state = linear_attention(q, k, v, decay, beta, state=past, scale=scale, return_state=True)
    want, last = map(torch.from_numpy, outputs)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if q.dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), want, **tolerance)
    torch.testing.assert_close(state.to(last.dtype), last, **tolerance)
