"""Attention over the ranks of a ``torch.distributed`` group: tokens out, partial results merged, failures named.

The same code runs over gloo (CPU) and NCCL. No wait is longer than the timeout, whatever happens elsewhere: every rank
counts up a key of the group's store while it lives, and a rank whose count stands still is dead and named.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fuser.ir.errors import FuserError

_CHUNK = 1 << 22
"""Elements of an output that are merged in one collective."""


_BEAT_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
"""A rank whose count has stood still for so long is dead."""
_POLL_SECONDS = 0.002


class DistributedError(FuserError):
    """A rank has died, failed or fallen silent, or the ranks do not fit the problem."""


class _Pulse:
    """The counts of the ranks of one group in its store: a thread raises this rank's own until the process ends."""

    def __init__(self, store: Any, prefix: str, rank: int, size: int) -> None:
        self._store = store
        self._prefix = f"fuser/{prefix}"
        self._rank = rank
        self._keys = [f"{self._prefix}/beat/{r}" for r in range(size)]
        self._seen = [(-1, time.monotonic())] * size
        self._checked = 0.0
        self.calls = itertools.count()
        self._old: list[str] = []
        # There is a count before anybody looks.
        for key in self._keys:
            self._store.add(key, 0)
        threading.Thread(target=self._beat, name="fuser-pulse", daemon=True).start()

    def _beat(self) -> None:
        # The store vanishes with the group, or with the rank that keeps it.
        with contextlib.suppress(RuntimeError):
            while True:
                self._store.add(self._keys[self._rank], 1)
                time.sleep(_BEAT_SECONDS)

    def put(self, key: str, value: Any) -> None:
        self._store.set(f"{self._prefix}/{key}", pickle.dumps(value).hex())

    def retire(self, keys: Sequence[str]) -> None:
        """Delete the keys retired before: all ranks have come to ``keys``, and so left what was before them."""
        if self._rank == 0:
            for key in self._old:
                self._store.delete_key(f"{self._prefix}/{key}")
            self._old = list(keys)

    def take(self, keys: Sequence[str]) -> list[Any] | None:
        """The values of ``keys``, or None while one of them is missing."""
        names = [f"{self._prefix}/{key}" for key in keys]
        if not self._store.check(names):
            return None
        # Ranks are trusted with each other's code anyway.
        return [pickle.loads(bytes.fromhex(self._store.get(name).decode())) for name in names]

    def begin(self) -> None:
        """Count patience from now on."""
        self._seen = [(count, time.monotonic()) for count, _ in self._seen]

    def dead(self, call: int) -> list[int]:
        """Ranks whose count has not changed for too long, or that another rank has found dead in this ``call``.

        Raises RuntimeError if the store is gone.
        """
        now = time.monotonic()
        if now - self._checked >= _BEAT_SECONDS:
            self._checked = now
            if told := self.take([f"{call}/dead"]):
                return list(told[0])
            for rank, key in enumerate(self._keys):
                count = self._store.add(key, 0)
                if count != self._seen[rank][0]:
                    self._seen[rank] = (count, now)
        return [rank for rank, (_, since) in enumerate(self._seen) if now - since > _PATIENCE_SECONDS]


@functools.lru_cache(maxsize=8)
def _pulse(group: Any) -> _Pulse:
    store = dist.distributed_c10d._get_default_store()
    return _Pulse(store, str(group.group_name), int(dist.get_rank(group)), int(dist.get_world_size(group)))


@dataclass(frozen=True)
class Ranks:
    """The ranks of ``group`` (a process group, such as ``torch.distributed.group.WORLD``); rank 0 holds the problem.

    Every rank makes as many of them, in the same order. ``timeout`` in seconds bounds every wait for another rank.
    Raises DistributedError if there is no group.
    """

    group: Any
    timeout: float = 300.0
    call: int = field(init=False)

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "there is no process group: start the program with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if dist.get_rank(self.group) < 0:
            raise DistributedError("this process is not a rank of the given process group")
        if self.timeout <= 0:
            raise DistributedError(f"the timeout must be above zero seconds, got {self.timeout}")
        with self._stage("the ranks met"):
            object.__setattr__(self, "call", next(_pulse(self.group).calls))
            _pulse(self.group).begin()

    @property
    def rank(self) -> int:
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        return int(dist.get_world_size(self.group))

    @property
    def _shared(self) -> str:
        return f"{self.call}/shared"

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be sent."""
        if "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def agree(self, stage: str, problem: str | None = None) -> None:
        """Once a call: wait for all ranks; raise DistributedError on each if one has a ``problem`` or does not come."""
        keys = [f"{self.call}/agreed/{rank}" for rank in range(self.size)]
        with self._stage(stage):
            _pulse(self.group).put(keys[self.rank], problem)
            problems = self._until(lambda: _pulse(self.group).take(keys))
            _pulse(self.group).retire([*keys, self._shared])
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
        if failed:
            raise DistributedError(f"distributed attention stopped while {stage}; {'; '.join(failed)}")

    def share(self, stage: str, value: Any) -> Any:
        """Once a call: the ``value`` of rank 0, on every rank; any picklable object."""
        with self._stage(stage):
            if self.rank == 0:
                _pulse(self.group).put(self._shared, value)
            return self._until(lambda: _pulse(self.group).take([self._shared]))[0]

    def scatter(
        self,
        tensors: Sequence[Tensor] | None,
        ranges: Sequence[Sequence[Sequence[tuple[int, int]]]],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Give rank r the token ranges ``ranges[r][t]`` of ``tensors[t]``, which only rank 0 has; each is (B, H, N, D).

        ``shapes`` are those of the whole tensors. Returns this rank's (B, H, L, D), on :attr:`device`.
        """
        with self._stage("the tokens were handed out"):
            if self.rank:
                mine = []
                for (b, h, _, d), own in zip(shapes, ranges[self.rank], strict=True):
                    length = sum(stop - start for start, stop in own)
                    part = torch.empty(b, h, length, d, dtype=dtype, device=self.device)
                    self._wait(dist.irecv(part, src=self._global(0), group=self.group))
                    mine.append(part)
                return mine
            whole = list(tensors or ())
            # One rank at a time: rank 0 holds one copy beside the problem.
            for rank in range(1, self.size):
                for tensor, theirs in zip(whole, ranges[rank], strict=True):
                    part = _gather(tensor, theirs).to(self.device)
                    self._wait(dist.isend(part, dst=self._global(rank), group=self.group))
            return [_gather(tensor, own).to(self.device) for tensor, own in zip(whole, ranges[0], strict=True)]

    def merge(
        self, out: Tensor, lse: Tensor, ranges: Sequence[tuple[int, int]], length: int
    ) -> tuple[Tensor, Tensor] | None:
        """Merge partial results exactly: ``out`` (B, H, L, D) and ``lse`` (B, H, L) of the tokens ``ranges``.

        Returns (B, H, length, D) and (B, H, length) on rank 0 and None elsewhere; memory beside them is bounded. Rows
        that no rank has keys for give zeros and -inf.
        """
        batch, heads, _, width = out.shape
        result = None
        if self.rank == 0:
            result = out.new_zeros(batch, heads, length, width), lse.new_empty(batch, heads, length)
        tokens = torch.cat([torch.arange(*r) for r in ranges])
        step = max(1, _CHUNK // max(1, batch * heads * (width + 1)))
        with self._stage("the results were merged"):
            for start in range(0, length, step):
                stop = min(start + step, length)
                first, last = torch.searchsorted(tokens, torch.tensor([start, stop])).tolist()
                at = (tokens[first:last] - start).to(out.device)
                mine = lse[:, :, first:last]
                top = lse.new_full((batch, heads, stop - start), float("-inf"))
                top[:, :, at] = mine
                self._wait(dist.all_reduce(top, dist.ReduceOp.MAX, self.group, async_op=True))
                # A row without keys keeps weight 0, where -inf - -inf would be NaN.
                weight = torch.where(torch.isneginf(mine), 0.0, torch.exp(mine - top[:, :, at]))
                sums = out.new_zeros(batch, heads, stop - start, width + 1)
                sums[:, :, at, :width] = out[:, :, first:last] * weight[..., None]
                sums[:, :, at, width] = weight
                self._wait(dist.all_reduce(sums, dist.ReduceOp.SUM, self.group, async_op=True))
                if result is not None:
                    total = sums[..., width]
                    result[0][:, :, start:stop] = sums[..., :width] / total.masked_fill(total == 0, 1.0)[..., None]
                    result[1][:, :, start:stop] = top + total.log()
        return result

    def _wait(self, work: Any) -> None:
        """Wait for a collective, but no longer than all ranks live."""
        if work is None:
            return
        if "gloo" not in str(dist.get_backend(self.group)):
            # It orders the work on this thread's stream, and watches for dead ranks itself.
            work.wait(timedelta(seconds=self.timeout))
            return
        ended: list[BaseException | None] = []

        def wait() -> None:
            try:
                work.wait(timedelta(seconds=self.timeout))
            except RuntimeError as error:
                ended.append(error)
            else:
                ended.append(None)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(_POLL_SECONDS)
        error = self._until(lambda: ended or None)[0]
        if error is not None:
            raise error

    def _until(self, ask: Callable[[], list[Any] | None]) -> list[Any]:
        """What ``ask`` gives once it gives something. Raises DistributedError for a dead rank and RuntimeError late."""
        start = time.monotonic()
        while (found := ask()) is None:
            if dead := _pulse(self.group).dead(self.call):
                raise _DeadError(dead)
            if time.monotonic() - start > self.timeout:
                raise RuntimeError("timed out")
            time.sleep(_POLL_SECONDS)
        return found

    def _missing(self) -> list[int]:
        """Ranks that turn out to be dead while patience lasts, after something has failed."""
        end = time.monotonic() + min(self.timeout, _PATIENCE_SECONDS + 2 * _BEAT_SECONDS)
        while time.monotonic() < end:
            if dead := _pulse(self.group).dead(self.call):
                return dead
            time.sleep(_BEAT_SECONDS / 5)
        return []

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self.group, rank))

    @contextlib.contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        # Backends and stores report a lost peer and a timeout as RuntimeError.
        try:
            yield
        except _DeadError as error:
            raise self._lost(stage, error.ranks) from None
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            try:
                dead = self._missing()
            except RuntimeError:
                raise DistributedError(
                    f"distributed attention stopped while {stage}, on rank {self.rank} of {self.size}: the store of "
                    "the process group is gone, so what kept it has died: rank 0, or torchrun where that started the "
                    f"ranks; restart all of them. The backend says: {reason}"
                ) from error
            if dead:
                raise self._lost(stage, dead) from error
            raise DistributedError(
                f"distributed attention stopped while {stage}, on rank {self.rank} of {self.size}: all ranks live, but "
                f"one has left the call or was silent for {self.timeout:g} s. The backend says: {reason}"
            ) from error

    def _lost(self, stage: str, dead: Sequence[int]) -> DistributedError:
        # This rank may keep the store and end with this error: the others get time to hear of it.
        with contextlib.suppress(RuntimeError):
            _pulse(self.group).put(f"{self.call}/dead", list(dead))
        time.sleep(4 * _BEAT_SECONDS)
        named = f"rank {dead[0]} has" if len(dead) == 1 else f"ranks {', '.join(map(str, dead))} have"
        return DistributedError(
            f"distributed attention stopped while {stage}: {named} died or cannot be reached (noticed on rank "
            f"{self.rank} of {self.size}); restart all ranks (torchrun --max-restarts does)"
        )


class _DeadError(Exception):
    """``ranks`` have died."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(ranks)
        self.ranks = ranks


def _gather(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([tensor[:, :, start:stop] for start, stop in ranges], dim=2).contiguous()
