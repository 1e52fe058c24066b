"""Attention over the ranks of a ``torch.distributed`` group: tokens out, partial results merged, failures named.

The same code runs over gloo (CPU) and NCCL. No collective waits longer than the timeout, whatever happens elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fuser.ir.errors import FuserError

_CHUNK = 1 << 22
"""Elements of an output that are merged in one collective."""


class DistributedError(FuserError):
    """A rank has died, failed or fallen silent, or the ranks do not fit the problem."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of ``group`` (a process group, such as ``torch.distributed.group.WORLD``); rank 0 holds the problem.

    ``timeout`` in seconds bounds every wait for another rank. Raises DistributedError if there is no group.
    """

    group: Any
    timeout: float = 300.0

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

    @property
    def rank(self) -> int:
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        return int(dist.get_world_size(self.group))

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be sent."""
        if "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def agree(self, stage: str, problem: str | None = None) -> None:
        """Wait for all ranks; raise DistributedError on every one of them if any has a ``problem`` or does not come."""
        with self._stage(stage):
            if "gloo" in str(dist.get_backend(self.group)):
                # Only this tells which rank is missing.
                dist.monitored_barrier(self.group, timedelta(seconds=self.timeout), wait_all_ranks=True)
            problems: list[str | None] = [None] * self.size
            dist.all_gather_object(problems, problem, group=self.group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
        if failed:
            raise DistributedError(f"distributed attention stopped while {stage}; {'; '.join(failed)}")

    def share(self, stage: str, value: Any) -> Any:
        """The ``value`` of rank 0, on every rank; any picklable object."""
        with self._stage(stage):
            found = [value]
            dist.broadcast_object_list(found, src=self._global(0), group=self.group)
            return found[0]

    def scatter(
        self,
        tensors: Sequence[Tensor] | None,
        ranges: Sequence[Sequence[tuple[int, int]]],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Give rank r the token ranges ``ranges[r]`` of ``tensors``, which only rank 0 has; each is (B, H, N, D).

        ``shapes`` are those of the whole tensors. Returns this rank's (B, H, L, D), on :attr:`device`.
        """
        with self._stage("the tokens were handed out"):
            if self.rank:
                length = sum(stop - start for start, stop in ranges[self.rank])
                mine = []
                for b, h, _, d in shapes:
                    part = torch.empty(b, h, length, d, dtype=dtype, device=self.device)
                    self._wait(dist.irecv(part, src=self._global(0), group=self.group))
                    mine.append(part)
                return mine
            whole = list(tensors or ())
            # One rank at a time: rank 0 holds one copy beside the problem.
            for rank in range(1, self.size):
                for tensor in whole:
                    part = _gather(tensor, ranges[rank]).to(self.device)
                    self._wait(dist.isend(part, dst=self._global(rank), group=self.group))
            return [_gather(tensor, ranges[0]).to(self.device) for tensor in whole]

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
        if work is not None:
            work.wait(timedelta(seconds=self.timeout))

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self.group, rank))

    @contextlib.contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        # Backends report a lost peer and a timeout as RuntimeError.
        try:
            yield
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DistributedError(
                f"distributed attention stopped while {stage}, on rank {self.rank} of {self.size}: another rank has "
                f"died or was silent for {self.timeout:g} s; restart all ranks (torchrun --max-restarts does). "
                f"The backend says: {reason}"
            ) from error


def _gather(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([tensor[:, :, start:stop] for start, stop in ranges], dim=2).contiguous()
