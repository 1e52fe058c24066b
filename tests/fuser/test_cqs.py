"""CQS attention against float64, and its memory against its budget."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_reference import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser import cqs, masks
from fuser.ir.errors import MaskError, PlanError
from fuser.ir.masks import Mask


def inputs(dtype: torch.dtype, q_len: int = 157, kv_len: int = 157) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, length, 32, dtype=dtype) for length in (q_len, kv_len, kv_len)]


@pytest.mark.parametrize("lengths", [(157, 157), (157, 61), (40, 157)], ids=str)
@pytest.mark.parametrize("mask", [masks.Dense(), masks.Causal(), ~masks.Causal(), masks.Longformer(9, 3)], ids=str)
@pytest.mark.parametrize("how", [{"workers": 2}, {"workers": 7}, {"workers": 7, "memory_budget": "500MB"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 8e-7), (torch.float64, 2e-15)], ids=str)
def test_attention_is_exact(
    mask: Mask, how: dict[str, Any], dtype: torch.dtype, tolerance: float, lengths: tuple[int, int]
) -> None:
    q, k, v = inputs(dtype, *lengths)
    out, wanted = cqs.attention(q, k, v, mask=mask, **how), exact(q, k, v, mask.dense(*lengths))[0]
    assert (out - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("mask", [None, masks.Strided(7)])
def test_bfloat16_is_merged_in_single_precision(mask: Mask | None) -> None:
    """The result of streaming is rounded once, so it is as near as bf16 is."""
    q, k, v = inputs(torch.bfloat16)
    wanted, _ = exact(q, k, v, None if mask is None else mask.dense(157))
    out = cqs.attention(q, k, v, workers=7, memory_budget="500MB", mask=mask)
    assert out.dtype == torch.bfloat16
    assert (out - wanted).norm() <= 2**-8 * wanted.norm()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_order_of_tasks_does_not_matter(data: st.DataObject) -> None:
    q_len, kv_len = data.draw(st.sampled_from([(157, 157), (157, 61)]))
    q, k, v = inputs(torch.float64, q_len, kv_len)
    mask = data.draw(st.sampled_from([masks.Causal(), masks.Strided(), masks.Dilated(3, 4)]))
    wanted, sums = exact(q, k, v, mask.dense(q_len, kv_len))
    tasks = list(cqs.Scheduler(cqs.partition(data.draw(st.integers(1, 12)), q_len, kv_len=kv_len), mask))
    tiler = cqs.Tiler(torch.empty_like(q), q.new_empty(q.shape[:3]))
    for task in data.draw(st.permutations(tasks)):
        tiler.add(task.ranges, *cqs.work(task, *task.gather(q, k, v)))
    assert (tiler.out - wanted).norm() <= 4e-15 * wanted.norm()
    torch.testing.assert_close(tiler.lse, sums, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lengths", [(0, 9), (9, 0)])
def test_nothing_to_attend(lengths: tuple[int, int]) -> None:
    assert torch.equal(cqs.attention(*inputs(torch.float32, *lengths)), torch.zeros(2, 2, lengths[0], 32))


def test_small_budget_names_the_smallest() -> None:
    q, k, v = inputs(torch.float32)
    with pytest.raises(PlanError, match="smallest that works is") as caught:
        cqs.attention(q, k, v, memory_budget="1kB")
    smallest = int(str(caught.value).split("works is ")[1].split()[0])
    how = cqs.streaming(q, k, v, smallest)
    assert how.bytes <= smallest
    with pytest.raises(PlanError, match="too small"):
        cqs.streaming(q, k, v, smallest - 1)
    wanted, _ = exact(q, k, v)
    assert (cqs.attention(q, k, v, memory_budget=smallest) - wanted).norm() <= 8e-7 * wanted.norm()


@pytest.mark.parametrize("budget", ["", "much", "12XB", 0, -5, True])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(PlanError, match=r"is not a size|must be above zero"):
        cqs.attention(*inputs(torch.float32), memory_budget=budget)


@pytest.mark.parametrize(("text", "size"), [("512MB", 512_000_000), ("1GiB", 1 << 30), ("1.5 kib", 1536), (77, 77)])
def test_sizes(text: str | int, size: int) -> None:
    assert cqs.parse_bytes(text) == size


def test_bad_input() -> None:
    q, k, v = inputs(torch.float32, 6, 9)
    with pytest.raises(PlanError, match="7 workers cannot share 6 tokens: use 6 workers or fewer"):
        cqs.attention(q, k, v, workers=7)
    with pytest.raises(MaskError, match="tensor of 5x9"):
        cqs.attention(q, k, v, mask=torch.ones(5, 9, dtype=torch.bool))
    with pytest.raises(MaskError, match="bool"):
        cqs.attention(q, k, v, mask=torch.ones(6, 9))
    with pytest.raises(MaskError, match=r"must be one of fuser\.masks"):
        cqs.attention(q, k, v, mask="causal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradients"):
        cqs.attention(q.requires_grad_(), k, v)


MEASURE = """
import json, sys, torch
from pathlib import Path
from fuser import cqs, masks
torch.set_num_threads(2)
mask = eval(sys.argv[1])
dtype, workers, budget, heads = getattr(torch, sys.argv[2]), int(sys.argv[3]) or None, sys.argv[4], int(sys.argv[5])

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def attend(length):
    q, k, v = (torch.randn(1, heads, length, 64).to(dtype) for _ in range(3))
    limit = cqs.streaming(q, k, v, budget, workers, mask).bytes
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    out = cqs.attention(q, k, v, workers, budget, mask)
    return [resident("VmHWM") - before - out.nbytes, limit]

attend(700)  # what is loaded and built once
print(json.dumps(attend(8192)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of memory from /proc")
@pytest.mark.parametrize(
    ("mask", "dtype", "workers", "budget", "heads"),
    [
        ("None", "float32", 0, "24MiB", 4),
        ("None", "float32", 7, "40MiB", 4),
        ("None", "bfloat16", 13, "40MiB", 4),
        ("masks.Causal()", "float32", 7, "40MiB", 4),
        ("masks.Strided()", "float32", 7, "64MiB", 4),
        ("masks.Longformer(256, 64)", "bfloat16", 7, "48MiB", 4),
    ],
)
def test_memory_stays_below_the_budget(mask: str, dtype: str, workers: int, budget: str, heads: int) -> None:
    command = [sys.executable, "-c", MEASURE, mask, dtype, str(workers), budget, str(heads)]
    taken, expected = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken <= expected <= cqs.parse_bytes(budget)
    # All scores of one head would be 256 MiB.
    assert cqs.parse_bytes(budget) < 4 * 8192**2 / 3
