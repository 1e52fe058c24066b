"""CQS attention: exact attention divided among workers, each of which needs about 1 / sqrt(workers) of the tokens.

    part = fuser.cqs.partition(workers=7, seq_len=4096)
    part.blocks(0), part.tokens(0)                           # what worker 0 owns, and what it needs for that
    part.draw("partition.png")
    fuser.cqs.attention(q, k, v, workers=7)                  # one kernel that runs all workers
    fuser.cqs.attention(q, k, v, memory_budget="512MB")      # piece by piece, in little memory
    fuser.cqs.attention(q, k, v, mask=mask, group=torch.distributed.group.WORLD)    # a worker on every rank

The three parts can be used alone, on any machines: a :class:`Scheduler` makes tasks, :func:`work` does one and returns
its outputs with their log-sum-exp, a :class:`Tiler` merges them in whatever order they come.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuser.attention.checks import check_heads, check_operands
from fuser.attention.launch import run_plan, say, unsupported
from fuser.attention.reference import empty_out, reference
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import BuildError, CacheError, FuserError, MaskError, PlanError, ToolchainError
from fuser.ir.masks import Dense, Mask, from_dense, per_head
from fuser.kernels import cqs as kernel
from fuser.kernels.attention import LARGEST_HEAD
from fuser.kernels.base import FLOATING
from fuser.kernels.cqs import Gathered, Partition, Share, base_set, check_base, partition, plan, search, singer_set
from fuser.kernels.plan import AttentionPlan
from fuser.kernels.planner import plan as plan_mask

__all__ = [
    "Partition",
    "Scheduler",
    "Share",
    "Streaming",
    "Task",
    "Tiler",
    "attention",
    "base_set",
    "check_base",
    "parse_bytes",
    "partition",
    "plan",
    "search",
    "singer_set",
    "streaming",
    "work",
]

WORKERS = 7
"""Workers where the caller asks for no number: the smallest perfect set that more than halves the tokens."""
_CANDIDATES = (1, 3, 7, 13, 21, 31, 57, 73, 91, 133, 183, 307)
"""Numbers of workers that a budget chooses from: perfect base sets, whose workers need the fewest tokens."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_FIXED = 8 << 20
"""Bytes that any run takes: scratch memory of threads, code, small objects."""
_INTERVAL, _PAIR, _SLICE = 1200, 32, 200
"""Bytes that planning takes: for an interval of keys, for a listed pair, and for one that it is looking at."""
_SLICE_PAIRS = 1 << 22


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    workers: int | None = None,
    memory_budget: str | int | None = None,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    base: Sequence[int] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """Exact attention by fork and join over the workers of a CQS partition.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, M, D); H is a multiple of Hkv. Where M is not N, queries and keys are divided apart.
        v: (B, Hkv, M, Dv).
        workers: at most N and M; default 7 (or N, or M), or the size of ``group``, or what ``memory_budget`` allows.
        memory_budget: most bytes to use beside q, k, v and the output: an integer or a string such as "512MB" or
            "1GiB". The smallest number of workers that fits is taken, and within it as many heads at a time as fit;
            see :func:`streaming`. Without it, all workers are one plan, run by one kernel.
        mask: one of ``fuser.masks`` or a bool tensor (N, M) or (H, N, M), True = may attend; of all N x M pairs.
        scale: default 1 / sqrt(D).
        base: base set, default :func:`base_set` of the workers.
        group: spread the workers over the ranks of this process group, one a rank. Every rank calls with the same mask;
            q, k and v are needed on rank 0 only, and each rank receives only the tokens of its own groups. Rank 0
            returns the result, the others an empty tensor.
        timeout: seconds to wait for another rank.

    Returns (B, H, N, Dv) in the dtype of q. Rows that may see nothing give zeros. No gradients.

    Raises:
        ValueError: the tensors do not fit each other, or need gradients.
        PlanError: more workers than tokens, no base set, a budget that is too small (with the smallest that works).
        MaskError: the mask does not fit.
        DistributedError: a rank died, failed or was silent for longer than ``timeout``; on every living rank.
    """
    mask = _mask(mask)
    if group is not None:
        if memory_budget is not None:
            raise PlanError("memory_budget streams on one device: leave it out with group")
        return _distributed(q, k, v, workers, mask, scale, base, group, timeout)
    n, m = _check(q, k, v, mask)
    if not (n and m):
        return empty_out(q, v).zero_()
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if memory_budget is not None:
        return _stream(q, k, v, streaming(q, k, v, memory_budget, workers, mask, base=base), mask, scale)
    part = partition(min(WORKERS, n, m) if workers is None else workers, n, base, m)
    reason = unsupported(q, v, None)
    if not reason:
        out = empty_out(q, v)
        try:
            run_plan(q, k, v, _plan(part, mask), None, scale, out, None)
        except (BuildError, ToolchainError, CacheError) as error:
            reason = str(error)
        else:
            return out
    return _stream(q, k, v, Streaming(part, q.shape[0], k.shape[1], 0), mask, scale)


@functools.lru_cache(maxsize=16)
def _plan(part: Partition, mask: Mask) -> AttentionPlan:
    from fuser.runtime.device import cpu_target

    return plan(part, mask, cpu_target())


def _mask(mask: Mask | Tensor | None) -> Mask:
    if mask is None:
        return Dense()
    if isinstance(mask, Tensor):
        return from_dense(mask)
    if not isinstance(mask, Mask):
        raise MaskError(f"mask must be one of fuser.masks, a bool tensor or None, got {type(mask).__name__}")
    return mask.current()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[int, int]:
    """The numbers of queries and keys."""
    check_operands(q, k, v)
    n, m = q.shape[2], k.shape[2]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("CQS attention computes no gradients: call it under torch.no_grad(), or use sparse_attention")
    check_heads(mask, q)
    mask.validate(n, m)
    return n, m


# ---- scheduler, worker and tiler


@dataclass(frozen=True)
class Task:
    """What one worker has to know: ``ranges`` of tokens to gather from q, ``key_ranges`` to gather from k and v, which
    are the same for as many keys as queries, and the ``mask`` over those."""

    worker: int
    ranges: tuple[tuple[int, int], ...]
    key_ranges: tuple[tuple[int, int], ...]
    mask: Gathered

    def gather(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The worker's tokens of q (B, H, N, D), k (B, Hkv, M, D) and v: (B, H, L, D), (B, Hkv, Lk, D) and alike."""
        return _gather(q, self.ranges), _gather(k, self.key_ranges), _gather(v, self.key_ranges)


@dataclass(frozen=True)
class Scheduler:
    """Divides attention under ``mask`` (of all tokens) into one self-contained task a worker."""

    partition: Partition
    mask: Mask | None = None

    def task(self, worker: int) -> Task:
        mask = kernel.local_mask(self.partition, worker, self.mask)
        return Task(worker, mask.queries, mask.keys, mask)

    def __iter__(self) -> Iterator[Task]:
        return map(self.task, range(self.partition.workers))


def work(task: Task, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The task on its gathered tokens q (B, H, L, D), k and v: (B, H, L, Dv) and the log-sum-exp (B, H, L).

    Both are fp32, or fp64 for fp64 tensors. Rows without keys give zeros and -inf.
    """
    check_operands(q, k, v)
    return _attend(q, k, v, task.mask, 1.0 / math.sqrt(q.shape[3]) if scale is None else scale)


class Tiler:
    """Merges partial results exactly, in any order: ``out`` (B, H, N, Dv), ``lse`` (B, H, N), both changed in place."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.zero_(), lse.fill_(-math.inf)

    def add(self, ranges: Sequence[tuple[int, int]], out: Tensor, lse: Tensor) -> None:
        """Merge ``out`` (B, H, L, Dv) and ``lse`` (B, H, L) of the tokens ``ranges``; ``out`` is overwritten."""
        at = 0
        for start, stop in ranges:
            part, sums = (t[:, :, at : at + stop - start] for t in (out, lse))
            whole, known = self.out[:, :, start:stop], self.lse[:, :, start:stop]
            total = torch.logaddexp(known, sums)
            # Rows that have seen nothing yet keep weight 0, where -inf - -inf would be NaN.
            nothing = torch.isneginf(total)
            old = torch.exp(known - total).masked_fill_(nothing, 0.0)
            new = torch.exp(sums - total).masked_fill_(nothing, 0.0)
            whole.mul_(old[..., None]).add_(part.mul_(new[..., None]))
            known.copy_(total)
            at += stop - start


def _gather(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Tokens of (B, H, N, D); a view where the ranges touch."""
    if all(a[1] == b[0] for a, b in itertools.pairwise(ranges)):
        return tensor[:, :, ranges[0][0] : ranges[-1][1]]
    return torch.cat([tensor[:, :, start:stop] for start, stop in ranges], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of fp32 (or fp64) accuracy with its log-sum-exp; the plan is not kept."""
    from fuser.runtime.device import cpu_target

    if q.dtype != torch.float64:
        q, k, v = (t.float() for t in (q, k, v))
    reason = unsupported(q, v, None)
    if not reason:
        out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
        try:
            run_plan(q, k, v, plan_mask(mask, q.shape[2], k.shape[2], cpu_target()), None, scale, out, lse)
        except (BuildError, ToolchainError, CacheError) as error:
            reason = str(error)
        else:
            return out, lse
    say(reason)
    return reference(q, k, v, AttentionSpec(mask), None, scale)


# ---- streaming


@dataclass(frozen=True)
class Streaming:
    """How a budget is met: the ``partition``, how many batch entries and key heads run at a time, and ``bytes``, the
    most memory expected beside q, k, v and the output."""

    partition: Partition
    batch: int
    heads: int
    bytes: int


def streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_budget: str | int,
    workers: int | None = None,
    mask: Mask | Tensor | None = None,
    *,
    base: Sequence[int] | None = None,
) -> Streaming:
    """What :func:`attention` does under a ``memory_budget``, without doing it; nothing of q, k and v is read.

    Takes the fewest workers that fit (one, if the whole problem does), then as many heads at a time as fit. Raises
    PlanError if nothing fits, with the smallest budget that does.
    """
    mask = _mask(mask)
    n, m = _check(q, k, v, mask)
    budget = parse_bytes(memory_budget)
    if workers is not None:
        candidates = [workers]
    else:
        candidates = [w for w in (_CANDIDATES if base is None else (WORKERS,)) if w <= max(1, min(n, m))]
    smallest: Streaming | None = None
    for count in candidates:
        part = partition(count, n, base, m)
        planning = _planning_bytes(part, mask)
        for batch, heads in _chunks(q.shape[0], k.shape[1]):
            made = Streaming(part, batch, heads, _step_bytes(q, k, v, part, batch, heads) + planning)
            if made.bytes <= budget:
                return made
            if smallest is None or made.bytes < smallest.bytes:
                smallest = made
    if smallest is None:
        raise PlanError(f"no number of workers fits {n} tokens")
    raise PlanError(
        f"a memory budget of {budget} bytes is too small for attention over {n} tokens: the smallest that works is "
        f"{smallest.bytes} bytes ({smallest.bytes / 1e6:.1f}MB), with {smallest.partition.workers} workers"
    )


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as 1000, "512MB" or "1GiB". Raises PlanError for what is none."""
    if isinstance(size, int) and not isinstance(size, bool):
        found, scale = float(size), 1
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(size).strip().lower())
        if match is None:
            raise PlanError(f"{size!r} is not a size: write bytes, or a number with a unit as in 512MB or 1GiB")
        found, scale = float(match[1]), _UNITS[match[2] or ""]
    if found <= 0:
        raise PlanError(f"a memory budget must be above zero, got {size!r}")
    return int(found * scale)


def _chunks(batch: int, heads: int) -> Iterator[tuple[int, int]]:
    """Batch entries and key heads at a time, from all to one."""
    while True:
        yield batch, heads
        if batch > 1:
            batch = -(-batch // 2)
        elif heads > 1:
            heads = -(-heads // 2)
        else:
            return


def _whole(q: Tensor, v: Tensor, part: Partition) -> bool:
    """Whether one kernel writes the output itself."""
    return part.workers == 1 and not unsupported(q, v, None)


def _step_bytes(q: Tensor, k: Tensor, v: Tensor, part: Partition, batch: int, heads: int) -> int:
    """Most bytes of tensors that a step over ``batch`` entries and ``heads`` key heads has beside its arguments."""
    if _whole(q, v, part):
        return _FIXED
    size = 8 if q.dtype == torch.float64 else 4
    group, width, value = q.shape[1] // max(1, k.shape[1]), q.shape[3], v.shape[3]
    rows = -(-part.seq_len // part.workers)
    keys = -(-part.kv_len // part.workers) * max(map(len, part.roles))
    wide = q.element_size() != size
    sums = part.seq_len * (1 + (value if wide else 0))
    # Output, its product with the weights, sums and weights; queries where they are converted.
    query = rows * (2 * value + 8 + (width if wide else 0))
    total = group * (sums + query) * size + keys * (width + value) * ((2 if wide else 1) * size)
    if _plain(q, v):
        total += (
            group * (5 * rows * keys * size + keys * (width + value) * size + rows * width * size) + 4 * rows * keys
        )
    return _FIXED + batch * heads * total


def _plain(q: Tensor, v: Tensor) -> bool:
    """Whether steps run in plain PyTorch, with all scores of a step in memory."""
    if q.device.type == "cpu" and q.dtype in (torch.float16, *FLOATING):
        return max(q.shape[3], v.shape[3]) > LARGEST_HEAD or v.shape[3] == 0
    return bool(unsupported(q, v, None))


def _planning_bytes(part: Partition, mask: Mask) -> int:
    """Most bytes that the plan of a step takes while it is made, judged by some rows of some steps."""
    if part.workers == 1:
        n, m = part.seq_len, part.kv_len
        steps = [Gathered(mask, (n, m), ((0, n),), ((0, m),), ((0,),))]
    else:
        workers = np.unique(np.linspace(0, part.workers - 1, 5).astype(int)).tolist()
        steps = [piece for worker in workers for piece in kernel.pieces(part, worker, mask)]
    most = 0
    for step in steps:
        rows = np.unique(np.linspace(0, step.q_len - 1, 64).astype(np.int64))
        total = 0
        for one in {step.head(h) for h in range(step.heads)} if step.heads else {step}:
            closed = one.progressions(rows, step.q_len, step.kv_len)
            if closed is not None and (closed.step[closed.count > 1] == 1).all():
                total += step.q_len * closed.start.shape[1] * _INTERVAL
            else:
                listed = one.columns(rows, step.q_len, step.kv_len).indptr
                pairs = int(1.5 * listed[-1] / len(rows) * step.q_len)
                looked = pairs if closed is not None else min(pairs, _SLICE_PAIRS)
                total += pairs * _PAIR + looked * _SLICE + step.q_len * 64
        most = max(most, total)
    return most


def _stream(q: Tensor, k: Tensor, v: Tensor, how: Streaming, mask: Mask, scale: float) -> Tensor:
    """One query group of one worker at a time, for some heads at a time."""
    q, k, v = q.detach(), k.detach(), v.detach()
    out = empty_out(q, v)
    part = how.partition
    if _whole(q, v, part):
        from fuser.runtime.device import cpu_target

        try:
            run_plan(q, k, v, plan_mask(mask, part.seq_len, part.kv_len, cpu_target()), None, scale, out, None)
        except (BuildError, ToolchainError, CacheError) as error:
            raise FuserError(f"the memory budget counts on a kernel, which could not be built: {error}") from error
        return out
    group = q.shape[1] // max(1, k.shape[1])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    for b in range(0, q.shape[0], max(1, how.batch)):
        for h in range(0, k.shape[1], max(1, how.heads)):
            entries, some = slice(b, b + how.batch), slice(h, h + how.heads)
            mine = slice(h * group, (h + how.heads) * group)
            queries, keys, values, result = q[entries, mine], k[entries, some], v[entries, some], out[entries, mine]
            total = result if result.dtype == dtype else torch.empty(result.shape, dtype=dtype, device=q.device)
            tiler = Tiler(total, torch.empty(result.shape[:3], dtype=dtype, device=q.device))
            visible = mask
            if mask.heads is not None:
                visible = per_head([mask.head(i) for i in range(mask.heads)][mine])
            for worker in range(part.workers):
                for piece in kernel.pieces(part, worker, visible):
                    rows, columns, contents = (
                        _gather(t, r) for t, r in ((queries, piece.queries), (keys, piece.keys), (values, piece.keys))
                    )
                    tiler.add(piece.queries, *_attend(rows, columns, contents, piece, scale))
            if total is not result:
                result.copy_(total)
    return out


# ---- many processes


def _distributed(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    workers: int | None,
    mask: Mask,
    scale: float | None,
    base: Sequence[int] | None,
    group: torch.distributed.ProcessGroup,
    timeout: float,
) -> Tensor:
    from fuser.runtime.distributed import Ranks

    ranks = Ranks(group, timeout)
    # Rank 0 alone can judge the problem; the others must hear of a bad one, lest they wait.
    problem, known = None, None
    error: Exception | None = None
    if ranks.rank == 0:
        try:
            if q is None or k is None or v is None:
                raise ValueError("rank 0 must pass q, k and v")
            n, m = _check(q, k, v, mask)
            if workers not in (None, ranks.size):
                raise PlanError(f"{workers} workers need {workers} ranks, and there are {ranks.size}")
            part = partition(ranks.size, n, base, m)
            known = part, [tuple(t.shape) for t in (q, k, v)], q.dtype, q.device.type
        except (ValueError, FuserError) as caught:
            error, problem = caught, str(caught)
    known, problem = ranks.share("the problem was announced", (known, problem))
    if problem is not None:
        if error is not None:
            raise error
        raise PlanError(f"rank 0 refused the problem: {problem}")
    part, shapes, dtype, _ = known
    ranges = [(part.ranges(worker), part.key_ranges(worker), part.key_ranges(worker)) for worker in range(part.workers)]
    whole = None if q is None or k is None or v is None else [t.detach() for t in (q, k, v)]
    mine = ranks.scatter(whole if ranks.rank == 0 else None, ranges, shapes, dtype)
    failure: Exception | None = None
    result: tuple[Tensor, Tensor] | None = None
    try:
        own_q, own_k, own_v = mine
        result = work(Scheduler(part, mask).task(ranks.rank), own_q, own_k, own_v, scale)
    except (FuserError, ValueError, RuntimeError, MemoryError) as caught:
        failure = caught
    try:
        ranks.agree("the workers computed", None if failure is None else f"{type(failure).__name__}: {failure}")
    except FuserError:
        if failure is not None:
            raise failure from None
        raise
    if result is None:
        raise FuserError("a worker ended without a result")
    merged = ranks.merge(*result, ranges[ranks.rank][0], part.seq_len)
    if merged is None:
        return torch.empty(0, dtype=dtype)
    return merged[0].to(dtype).to(q.device if q is not None else "cpu")
