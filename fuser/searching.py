"""Searching for a model's fastest program: capture, then a study over its regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fuser.capture import capture, flatten_call
from fuser.compiler import threads_now
from fuser.ir.graph import OperatorGraph
from fuser.ir.masks import Mask
from fuser.ir.target import Target
from fuser.raising import raise_graph
from fuser.runtime.device import cpu_target
from fuser.schemes import from_atoffer
from fuser.search.study import SearchResult, search


def graph_of(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attention: Mask | None = None,
) -> OperatorGraph:
    """The operators of one call of ``model``. Raises CaptureError when it cannot be captured."""
    with torch.inference_mode(False), torch.no_grad():
        return raise_graph(capture(model, flatten_call(args, kwargs or {})), attention)


def search_model(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attention: Mask | None = None,
    target: Target | None = None,
    threads: int | None = None,
    **options: Any,
) -> SearchResult:
    """Search the programs of ``model`` for inputs like these; later calls of ``optimize`` use what it finds.

    ``attention`` is a mask that every self-attention is restricted to, ``target`` the device (default: this machine's
    CPU), ``threads`` the team size (default: PyTorch's), ``options`` those of :func:`fuser.search.study.search`. Raises
    like it, and CaptureError when the model cannot be captured.
    """
    graph = graph_of(model, args, kwargs, attention=attention)
    target = cpu_target() if target is None else target
    threads = threads_now() if threads is None else threads
    return search(graph, target, threads, **{"decode": from_atoffer, **options})
