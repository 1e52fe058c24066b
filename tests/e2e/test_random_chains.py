"""Random chains of operators, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import WIDTH, Model, X, optimize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_grad")


NODES = st.sampled_from(
    ["linear", "norm", "gelu", "relu", "residual", "scale", "bias", "transpose", "attention", "softmax", "cumsum"]
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(NODES, min_size=1, max_size=7))
def test_random_chains(nodes: list[str]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first = x
        for node in nodes:
            if node == "linear":
                x = m.linear(x)
            elif node == "norm":
                x = F.layer_norm(x, (WIDTH,))
            elif node == "gelu":
                x = F.gelu(x)
            elif node == "relu":
                x = torch.relu(x)
            elif node == "residual":
                x = x + first
            elif node == "scale":
                x = x * 0.5
            elif node == "bias":
                x = x + m.linear.bias
            elif node == "transpose":
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            elif node == "attention":
                heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
                x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
            elif node == "softmax":
                x = torch.softmax(x, -1)
            else:
                x = torch.cumsum(x, 1)
        return x

    torch.manual_seed(0)
    model, exact = Model(run), Model(run).double()
    theirs, ours, truth = model(X), optimize(model)(X), exact(X.double())
    assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-6 * float(truth.norm())
