"""What PyTorch keeps of every trace for the life of the process, and how to let it go."""

from __future__ import annotations

import contextlib
import linecache
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Forget, at the end, the traces made meanwhile: the source of every graph, which tracebacks would quote, and the
    results of operators on fake tensors by shape, of which the next trace makes those that it needs."""
    sources: dict[str, Any] = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(sources)
    try:
        yield
    finally:
        for name in set(sources) - before:
            del sources[name]
            linecache.cache.pop(name, None)
        FakeTensorMode.cache_clear()
