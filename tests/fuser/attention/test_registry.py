"""Keys of masks: who is known, for how long, and to whom."""

from __future__ import annotations

import collections
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import Block, X, inputs

from fuser import SoftCap, masks, sparse_attention
from fuser.attention import register_mask, registry
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import MaskError


def test_a_traced_mask_outlives_its_owner() -> None:
    block = Block(masks.SlidingWindow(3, 11), lse=True).eval()
    with torch.no_grad():
        want = block(X)
    program = torch.export.export(block, (X,)).module()
    del block
    q, k, v = inputs(1, 1, 1, 4, 4)
    for i in range(2 * registry._RECENT):
        sparse_attention(q, k, v, masks.SlidingWindow(i, 0))
    gc.collect()
    assert len(registry._recent) <= registry._RECENT
    torch.testing.assert_close(program(X), want, rtol=0, atol=0)


def test_a_mask_that_somebody_holds_is_known() -> None:
    """As between a call's key and its operator, while other threads use other masks."""
    mask = masks.SlidingWindow(5, 13)
    key = registry.enter(AttentionSpec(mask), None, None)
    for i in range(registry._RECENT):
        registry.enter(AttentionSpec(masks.SlidingWindow(i, 1)), None, None)
    assert key not in registry._recent and registry.spec_of(key).mask is mask
    del mask
    gc.collect()
    with pytest.raises(MaskError, match="knows no mask"):
        registry.spec_of(key)


def test_traces_pin_a_bounded_number_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones that were used last; whoever registers a mask by hand keeps it."""
    monkeypatch.setattr(registry, "_PINNED", 3)
    monkeypatch.setattr(registry, "_pinned", collections.OrderedDict())
    monkeypatch.setattr(registry, "_recent", collections.OrderedDict())

    def traced(window: int) -> str:
        key = registry.enter(AttentionSpec(masks.SlidingWindow(window, 17)), None, None)
        registry.pin(key)
        return key

    kept = register_mask(masks.SlidingWindow(99, 17))
    first, second, *_ = map(traced, range(3))
    assert registry.spec_of(first).mask == masks.SlidingWindow(0, 17)
    traced(3)
    registry._recent.clear()
    gc.collect()
    assert len(registry._pinned) == 3
    assert registry.spec_of(first).mask == masks.SlidingWindow(0, 17)
    assert registry.spec_of(kept).mask == masks.SlidingWindow(99, 17)
    with pytest.raises(MaskError, match=r"3 others have been traced .*register_mask"):
        registry.spec_of(second)


def test_a_score_rule_belongs_to_the_key() -> None:
    mask = masks.SlidingWindow(4, 21)
    plain, capped, other = (register_mask(mask, score=rule) for rule in (None, SoftCap(2.0), SoftCap(3.0)))
    assert len({plain, capped, other}) == 3 and plain == mask.hash
    assert registry.spec_of(capped) == AttentionSpec(mask, SoftCap(2.0))
    assert register_mask(masks.SlidingWindow(4, 21), score=SoftCap(2)) == capped
    assert registry.spec_of(registry.enter(AttentionSpec(mask, SoftCap(5.0)), None, None)).rule == SoftCap(5.0)


def test_a_forked_child_does_not_wait_for_the_registry_of_its_parent() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(registry._lock.acquire).result()
        child = os.fork()
        if child == 0:
            os._exit(0 if registry._lock.acquire(blocking=False) else 1)
        pool.submit(registry._lock.release).result()
    assert os.waitpid(child, 0)[1] == 0


def test_equal_masks_have_one_key() -> None:
    ones = torch.ones(4, 4, dtype=torch.bool)
    assert register_mask(masks.from_dense(ones)) == register_mask(masks.from_dense(ones.clone()))
    assert register_mask(masks.Causal(1)) != register_mask(masks.Causal(2))
    function = masks.from_mask_mod(lambda b, h, i, j: i >= j)
    assert register_mask(function, 4) != register_mask(function, 5)
    with pytest.raises(MaskError, match="fingerprint"):
        register_mask(function)


def test_another_process_is_told_to_register_the_mask(tmp_path: Any) -> None:
    mask = masks.SlidingWindow(2, 5)
    block = Block(mask).eval()
    path = tmp_path / "block.pt2"
    torch.export.save(torch.export.export(block, (X,)), path)
    code = f"""
import torch, fuser.attention
program = torch.export.load({str(path)!r}).module()
x = torch.ones(2, 50, 64)
try:
    program(x)
except fuser.FuserError as error:
    assert "register_mask" in str(error), error
    fuser.attention.register_mask(fuser.masks.SlidingWindow(2, 5))
    print(program(x).double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout) == block(torch.ones(2, 50, 64)).double().sum().item()
