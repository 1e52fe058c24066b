"""Traces leave nothing behind."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fuser.frontend import traces


def kept() -> tuple[int, int, int]:
    return len(linecache.cache), len(torch.fx.graph_module._loader.eval_cache), FakeTensorMode.cache_info().size


def trace(length: int) -> torch.export.ExportedProgram:
    return torch.export.export(nn.Linear(8, 8).eval(), (torch.ones(length, 8),), strict=False)


def test_what_pytorch_keeps_of_a_trace_is_forgotten() -> None:
    with traces.forgotten():
        trace(3)
    before = kept()
    with traces.forgotten():
        program = trace(4)
        assert all(now > then for now, then in zip(kept(), before, strict=True))
    assert kept() == before
    assert program.module()(torch.ones(4, 8)).shape == (4, 8)


def test_traces_of_others_stay() -> None:
    graph = torch.fx.symbolic_trace(nn.ReLU())
    names = set(torch.fx.graph_module._loader.eval_cache)
    with pytest.raises(ValueError, match="fails"), traces.forgotten():
        trace(5)
        raise ValueError("fails")
    assert set(torch.fx.graph_module._loader.eval_cache) == names
    assert graph(torch.ones(1)) == 1
