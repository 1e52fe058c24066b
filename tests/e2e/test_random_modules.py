"""Random modules agree with eager in values, dtypes, strides, shared memory and writes.

``python tests/e2e/test_random_modules.py FIRST LAST [kernels]`` tries the seeds FIRST … LAST - 1, without kernels
(every operator runs as what it means) or with them, and prints those that disagree. None does
of the seeds 0 … 999 without kernels, and of 0 … 149 with them (AVX2).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "support"))

from random_modules import RandomModule, inputs_of

import fuser
from fuser.module import compiler


def relations(model: nn.Module, inputs: tuple[Tensor, ...], outputs: list[Tensor]) -> list[Any]:
    """For every output: dtype, strides, place, and which known tensors and other outputs share its memory."""
    known = [t.untyped_storage()._cdata for t in (*inputs, *model.parameters(), *model.buffers(), *outputs)]
    return [
        (t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), [t.untyped_storage()._cdata == k for k in known])
        for t in outputs
    ]


def disagreement(seed: int) -> str:
    """What an optimized random module does otherwise than the module; empty if nothing."""
    model = RandomModule(seed).eval()
    fast = fuser.optimize(model)
    found = []
    for run in (model, fast):
        inputs = inputs_of(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs, structure = pytree.tree_flatten(run(*inputs))
        numbers = [o for o in outputs if not isinstance(o, Tensor)]
        tensors = [o for o in outputs if isinstance(o, Tensor)]
        found.append(((structure, numbers, relations(model, inputs, tensors)), [*tensors, *inputs]))
    (theirs, expected), (mine, got) = found
    if mine != theirs:
        return f"{model}\n{mine}\n  instead of\n{theirs}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not _agree(a, b, model.rounds):
            return f"{model}\nvalue {i} is off by {float((a.float() - b.float()).abs().max())}"
    return ""


def _agree(a: Tensor, b: Tensor, rounds: bool) -> bool:
    a, wide = a.detach(), b.detach().double()
    unit = 2.0**-7 if b.dtype == torch.bfloat16 else 1e-4
    off = (a.double() - wide).abs() > unit * max(1.0, float(wide.abs().amax()))
    # Sums in another order may fall to the other side of a rounding, here and there.
    return float(off.double().mean()) <= (0.05 if rounds else 0.0)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", {})


@pytest.mark.parametrize("first", range(0, 12, 4))
def test_random_modules_mean_what_they_mean_in_eager(without_kernels: None, first: int) -> None:
    assert [d for d in map(disagreement, range(first, first + 4)) if d] == []


@pytest.mark.parametrize("seed", range(2))
def test_kernels_of_random_modules_compute_what_eager_does(seed: int) -> None:
    assert disagreement(seed) == ""


if __name__ == "__main__":
    if "kernels" not in sys.argv:
        compiler.IMPLEMENTATIONS = {}
    wrong = 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            text = disagreement(seed)
        except Exception as error:
            text = f"{RandomModule(seed)}\n{type(error).__name__}: {error}"
        if text:
            wrong += 1
            print(f"seed {seed}: {text}", flush=True)
    print(f"{wrong} of {int(sys.argv[2]) - int(sys.argv[1])} disagree")
