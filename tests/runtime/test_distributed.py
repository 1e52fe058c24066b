"""Attention over gloo ranks: results, and ranks that fail, die or fall silent at any stage."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 3
# Where kernels are built once, and not for each test as by the others of this folder.
CACHE = os.environ["FUSER_CACHE_DIR"]
# Ranks are forked from a process that has imported what they need, and write to files of their own.
PROGRAM = """
import os, sys, time, datetime, torch, torch.distributed as dist
from fuser import cqs, masks
from fuser.runtime import distributed
distributed._PATIENCE_SECONDS = 4.0
ranks = []
for rank in range(int(os.environ["WORLD_SIZE"])):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        break
else:
    print(*(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks))
    sys.exit()
os.environ["RANK"] = str(rank)
os.dup2(os.open(f"{sys.argv[3]}/rank{rank}", os.O_CREAT | os.O_WRONLY), 1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, victim, stage = dist.get_rank(), int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, n, 16) for n in (100, 90, 90)) if rank == 0 else (None,) * 3

def attend(mask):
    start = time.monotonic()
    try:
        return cqs.attention(q, k, v, mask=mask, group=dist.group.WORLD, timeout=45)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        assert time.monotonic() - start < 40
        return None

def raises(*_):
    raise MemoryError("no memory left")

def dies(*_):
    os._exit(9)

work = cqs.work
for mask in (masks.Causal(), masks.Strided(7), ~masks.Dense()):
    out = attend(mask)
    if rank == 0:
        assert (out - cqs.attention(q, k, v, mask=mask)).norm() <= 1e-6 * out.norm()
        if isinstance(mask, masks.Causal):
            q64, k64, v64 = (t.double() for t in (q, k, v))
            wanted = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64, is_causal=True)
            assert (out - wanted).norm() <= 8e-7 * wanted.norm()
if rank == 1:
    cqs.work = raises
attend(masks.Causal())
cqs.work = work
if rank == victim:
    if stage == "work":
        cqs.work = dies
    else:
        setattr(distributed.Ranks, stage, dies)
attend(masks.Causal())
os._exit(0)
"""


@pytest.mark.parametrize(
    ("victim", "stage", "words"),
    [
        (2, "work", "rank 2 has died"),
        (1, "merge", "rank 1 has died"),
        (0, "merge", "store of the process group is gone, so what kept it has died: rank 0"),
    ],
)
def test_a_dead_rank_is_named(victim: int, stage: str, words: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "FUSER_CACHE_DIR": CACHE, "WORLD_SIZE": str(RANKS)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", PROGRAM, str(victim), stage, str(tmp_path)]
    # A session of its own, so that no rank outlives the test.
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        codes = launcher.communicate(timeout=200)[0].split()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert codes == ["9" if r == victim else "0" for r in range(RANKS)]
    for r in range(RANKS):
        first, *rest = (tmp_path / f"rank{r}").read_text().splitlines()
        assert re.match("MemoryError" if r == 1 else "DistributedError.* rank 1: MemoryError", first)
        if r != victim:
            (second,) = rest
            assert second.startswith("DistributedError")
            assert words in second
