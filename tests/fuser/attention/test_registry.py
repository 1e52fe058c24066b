"""Keys of masks: who is known, for how long, and to whom."""

from __future__ import annotations

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

from fuser import masks, sparse_attention
from fuser.attention import register_mask, registry
from fuser.ir.errors import MaskError


def test_a_traced_mask_outlives_its_owner() -> None:
    block = Block(masks.SlidingWindow(3, 11), lse=True).eval()
    with torch.no_grad():
        want = block(X)
    program = torch.export.export(block, (X,)).module()
    del block
    q, k, v = inputs(1, 1, 1, 4, 4)
    for i in range(2 * registry._REGISTERED):
        sparse_attention(q, k, v, masks.SlidingWindow(i, 0))
    gc.collect()
    assert len(registry._recent) <= registry._REGISTERED
    torch.testing.assert_close(program(X), want, rtol=0, atol=0)


def test_a_mask_that_somebody_holds_is_known() -> None:
    """As between a call's key and its operator, while other threads use other masks."""
    mask = masks.SlidingWindow(5, 13)
    key = registry.enter(mask, None, None)
    for i in range(registry._REGISTERED):
        registry.enter(masks.SlidingWindow(i, 1), None, None)
    assert key not in registry._recent and registry.mask_of(key) is mask
    del mask
    gc.collect()
    with pytest.raises(MaskError, match="knows no mask"):
        registry.mask_of(key)


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
