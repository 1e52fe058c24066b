"""Attention over three gloo ranks: the result, a rank that fails and one that dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, datetime, torch, torch.distributed as dist
from fuser import cqs, masks
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, mode = dist.get_rank(), sys.argv[1]
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3)) if rank == 0 else (None,) * 3
def fail(*_):
    if mode == "dies":
        os._exit(9)
    raise MemoryError("no memory left")
if rank == 2 and mode != "works":
    cqs.work = fail
try:
    out = cqs.attention(q, k, v, mask=masks.Causal(), group=dist.group.WORLD, timeout=30)
except Exception as error:
    print(type(error).__name__, error, flush=True)
    os._exit(3)
if rank == 0:
    q, k, v = (t.double() for t in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (out - wanted).norm() <= 8e-7 * wanted.norm()
dist.barrier()
"""


@pytest.mark.parametrize(
    ("mode", "codes", "words"),
    [("works", [0, 0, 0], ""), ("raises", [3, 3, 3], "rank 2: MemoryError"), ("dies", [3, 3, 9], "DistributedError")],
)
def test_ranks(mode: str, codes: list[int], words: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mode], env={**common, "RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(3)
    ]
    try:
        texts = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == codes
    assert all(words in text for text, code in zip(texts[:2], codes[:2], strict=True))
