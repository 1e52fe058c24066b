"""A score policy of one's own, all of it in this file: attention with linear biases (ALiBi) from where keys are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fuser.codegen.render import header_folder, render
from fuser.ir import masks
from fuser.ir.graph import TensorSpec
from fuser.kernels.attention import AttentionParameters, Operands, call_of
from fuser.kernels.base import STORAGE, Literal
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

SLOPE = 0.0625
# A distance i - j takes SLOPE * (i - j) off a score; what depends on the row alone does not change its weights.
POLICY = f"""
template <class C>
struct LinearBias : attention::Products<C> {{
  static constexpr bool kChanges = true;
  FUSER_INLINE vf change(const attention::Scratch<C>& w, vf x, int64_t j, int64_t v, bool row_bias) {{
    return attention::Products<C>::change(w, x + set1({SLOPE}f * float(w.key[j])), j, v, row_bias);
  }}
}};

struct Config {{
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [70, 3])
def test_a_policy_beside_products_is_right(rows: int, dtype: torch.dtype) -> None:
    length, dim, target = 70, 32, cpu_target()
    parameters = AttentionParameters(dim, dim, STORAGE[dtype])
    source = render(parameters.spec)
    text = source.text.replace("\nstruct Config {\n", POLICY).replace(
        "attention::Products<Config>", "LinearBias<Config>"
    )
    assert text.count("LinearBias") == 2
    path = build([dataclasses.replace(source, text=text)], target, headers=header_folder(target))[source.symbol]

    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, 4, n, dim, generator=generator).to(dtype) for n in (rows, length, length))
    out = torch.full_like(q, math.nan)
    specs = [TensorSpec.contiguous(t.shape, dtype) for t in (q, k, v, out)]
    mask = masks.Causal().shift(length - rows)
    call = call_of(mask, Operands(*specs), ("q", "k", "v"), ("out",), dim**-0.5, parameters, target, 2)
    values = {"q": q, "k": k, "v": v, "out": out}
    tensors = [ref.tensor if isinstance(ref, Literal) else values[str(ref)] for ref in call.tensors]
    scratch = torch.empty(call.workspace_bytes // 4 + 16)
    workspace = -(-scratch.data_ptr() // 64) * 64
    load(path, source.symbol)(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2, workspace))

    distance = torch.arange(length - rows, length)[:, None] - torch.arange(length)
    scores = q.double() @ k.double().mT / math.sqrt(dim) - SLOPE * distance
    exact = scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v.double()
    # Sums of fp32, and the result's own rounding.
    tolerance = 1e-6 + torch.finfo(dtype).eps / 2
    assert float((out.double() - exact).norm() / exact.norm()) <= tolerance
    without = (scores + SLOPE * distance).masked_fill(distance < 0, -math.inf).softmax(-1) @ v.double()
    assert float((without - exact).norm() / exact.norm()) > 0.1
