"""Masks that a model gets as inputs and has got before: their entries make the plan of their attention.

A mask is known by its contents, so one that is changed in place, or whose memory holds another by now, is another mask.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Hashable

import torch
from torch import Tensor

from fuser.codegen.choice import GroupChoice
from fuser.frontend.calls import FlatCall
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.ir.attention import AttentionSpec
from fuser.ir.target import Target
from fuser.kernels.base import floating
from fuser.module.compiler import choose_all
from fuser.search.tuning import Tuner

_REMEMBERED = 32
_PAYS = 0.9
"""Share of a program's predicted time below which another one is worth its compilation."""
_LONGEST_PAUSE = 64


class KnownMasks:
    """Which masks a module's calls have brought."""

    def __init__(self) -> None:
        self._seen: collections.OrderedDict[Hashable, bool] = collections.OrderedDict()
        self._strange: collections.Counter[Hashable] = collections.Counter()
        self._pauses: dict[Hashable, int] = {}
        self._captured: tuple[Hashable, Captured] | None = None

    def looks_at(self, key: Hashable) -> bool:
        """Whether the masks of this call are worth a look: not each time where none has ever returned."""
        left = self._pauses.get(key, 0)
        if left:
            self._pauses[key] = left - 1
        return not left

    def returns(self, key: Hashable, known: Hashable) -> bool:
        """Whether these masks are here again, and a program for them has not been tried; they are remembered."""
        if known in self._seen:
            self._seen.move_to_end(known)
            self._strange.pop(key, None)
            return self._seen[known]
        self._seen[known] = True
        self._strange[key] += 1
        self._pauses[key] = min(2 ** self._strange[key] // 4, _LONGEST_PAUSE)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        while len(self._pauses) > _REMEMBERED:
            gone = next(iter(self._pauses))
            del self._pauses[gone]
            self._strange.pop(gone, None)
        return False

    def tried(self, known: Hashable) -> None:
        """Do not try a program for these masks again."""
        self._seen[known] = False

    def captured(self, key: Hashable) -> Captured | None:
        """What :meth:`keep` was given last, if it was for this call."""
        return self._captured[1] if self._captured is not None and self._captured[0] == key else None

    def keep(self, key: Hashable, captured: Captured) -> None:
        """Keep a capture for the sizes of one call, for its next mask."""
        self._captured = key, captured


def fingerprint(tensor: Tensor) -> Hashable | None:
    """Equal for tensors of equal entries; None for what is no mask that could be planned: one that is learned, or lies
    on another device."""
    if tensor.requires_grad or tensor.device.type != "cpu" or tensor.dtype not in (torch.bool, *_FLOATS):
        return None
    # Samples and heads that share a mask are expanded.
    once = tensor.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    content = once.resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(content).digest()


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def knowing(captured: Captured, call: FlatCall, places: tuple[int, ...]) -> Captured:
    """What was captured, told of the masks of a call as they are now."""
    known = {f"{captured.inputs[i]}_known": call.tensors[i].detach().clone() for i in places}
    return dataclasses.replace(captured, known=known)


def pays(plain: Captured, told: Captured, attention: AttentionSpec | None, target: Target, tuner: Tuner | None) -> bool:
    """Whether a program that knows its masks is predicted to be faster, and needs nothing of them but the plan."""
    graph, planned = (raise_graph(captured, attention, floating(target)) for captured in (plain, told))
    read = {name for op in planned.operators for name in op.inputs if name in planned.constants}
    if not told.known.keys().isdisjoint(planned.with_sources(read)):
        return False
    return _seconds(choose_all(planned, target, tuner)[0]) < _PAYS * _seconds(choose_all(graph, target, tuner)[0])


def _seconds(choices: list[GroupChoice]) -> float:
    return math.fsum(choice.seconds for choice in choices)
