"""The benchmark of models of today: an arm that fails or computes otherwise is told, not timed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from scripts import load_script
from torch import Tensor, nn


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("modern")


def tiny(name: str) -> nn.Module:
    assert name == "t5-base-encoder"
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 30000}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def failing(network: nn.Module, ids: Tensor) -> Callable[[], Any]:
    raise RuntimeError("no such operator\nand a long story")


def test_arms(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {
        "same": lambda network, ids: lambda: network(ids)[0],
        "wrong": lambda network, ids: lambda: 2 * network(ids)[0],
        "failing": failing,
    }
    monkeypatch.setattr(benchmark, "model", tiny)
    monkeypatch.setattr(benchmark, "PEERS", peers)
    with torch.no_grad():
        found = benchmark.run("t5-base-encoder:1x7", list(peers), 1)
    assert list(found["timings"]) == ["fuser", "eager", "same"] and list(found["speedup_over"]) == ["eager", "same"]
    assert found["speedup_over_best"] == min(found["speedup_over"].values())
    assert found["relative_error_to_eager"]["fuser"] < 1e-5
    reason = "it does not compute the same: its relative error is 1"
    assert found["missing"] == {"wrong": reason, "failing": "RuntimeError: no such operator"}


def test_unknown_models_are_refused(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit, match="take one of modernbert-base"):
        benchmark.run("bert:1x7", [], 1)
