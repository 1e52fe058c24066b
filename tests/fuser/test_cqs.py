"""CQS attention against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser import cqs, masks
from fuser.ir.errors import PlanError
from fuser.ir.masks import Mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~mask.dense(q.shape[2]), -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, 157, 32, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("mask", [masks.Dense(), masks.Causal(), ~masks.Causal(), masks.Longformer(9, 3)], ids=str)
@pytest.mark.parametrize("how", [{"workers": 2}, {"workers": 7}, {"workers": 7, "memory_budget": "500MB"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 8e-7), (torch.float64, 2e-15)], ids=str)
def test_attention_is_exact(mask: Mask, how: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = inputs(dtype)
    out, wanted = cqs.attention(q, k, v, mask=mask, **how), exact(q, k, v, mask)
    assert (out - wanted).norm() <= tolerance * wanted.norm()


def test_order_of_tasks_does_not_matter() -> None:
    q, k, v = inputs(torch.float64)
    wanted = exact(q, k, v, masks.Causal())
    tasks = list(cqs.Scheduler(cqs.partition(8, 157), masks.Causal()))
    for order in (tasks, tasks[::-1]):
        tiler = cqs.Tiler(torch.empty_like(q), q.new_empty(q.shape[:3]))
        for task in order:
            tiler.add(task.ranges, *cqs.work(task, *task.gather(q, k, v)))
        assert (tiler.out - wanted).norm() <= 2e-15 * wanted.norm()


def test_small_budget_names_the_smallest() -> None:
    q, k, v = inputs(torch.float32)
    with pytest.raises(PlanError, match="smallest that works is") as caught:
        cqs.attention(q, k, v, memory_budget="1kB")
    smallest = int(str(caught.value).split("works is ")[1].split()[0])
    assert cqs.streaming(q, k, v, smallest).bytes <= smallest
