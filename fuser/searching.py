"""Searching for a model's fastest program: capture, then a study over its regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import FuserError
from fuser.ir.graph import OperatorGraph
from fuser.ir.masks import Mask
from fuser.ir.target import Target
from fuser.kernels.base import FLOATING, floating
from fuser.module.options import Options
from fuser.runtime.program import CPU
from fuser.runtime.targets import on_device, target_of, threads_now
from fuser.schemes import from_atoffer
from fuser.search.results import SearchResult
from fuser.search.space import Space
from fuser.search.study import search


def graph_of(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> OperatorGraph:
    """The operators of one call of ``model``, for kernels of the target of ``options`` (default: a CPU). Raises
    CaptureError when it cannot be captured."""
    options = options or Options()
    dtypes = FLOATING if options.target is None else floating(options.target)
    with torch.inference_mode(False), torch.no_grad():
        return raise_graph(capture(model, flatten_call(args, kwargs or {})), options.attention_now(), dtypes)


def team_of(target: Target, threads: int | None = None) -> int:
    """The team size that ``optimize`` compiles for: ``threads`` (default: PyTorch's) on a CPU, 1 on a GPU."""
    if target.kind == "cuda":
        return 1
    return threads_now() if threads is None else threads


def search_model(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attention: Mask | None = None,
    target: Target | str | torch.device | None = None,
    threads: int | None = None,
    offline: bool = False,
    **options: Any,
) -> SearchResult:
    """Search the programs of ``model`` for inputs like these; later calls of ``optimize`` use what it finds.

    Args:
        model: in evaluation mode, on the device of the inputs.
        args, kwargs: the inputs of one call.
        attention: a mask that every self-attention is restricted to.
        target: as for ``optimize``; default: the device of the inputs.
        threads: the team size on a CPU; default: PyTorch's.
        offline: whether kernels that take about a minute each to build are tried, too.
        options: those of :func:`fuser.search.study.search`.

    Raises like that search, MaskError for a mask that is none of ``fuser.masks``, CaptureError when the model cannot be
    captured, and FuserError for a target that this machine does not have or that the inputs are not on.
    """
    tensors = flatten_call(args, kwargs or {}).tensors
    device = tensors[0].device if tensors else CPU
    wanted = Options.of(attention=attention, target=target_of(device) if target is None else target)
    target = wanted.target
    assert target is not None
    if device.type != target.device:
        raise FuserError(f"the inputs are on {device}, this target's tensors on {target.device}: move model and inputs")
    with on_device(device):
        graph = graph_of(model, args, kwargs, wanted)
        team = team_of(target, threads)
        if offline:
            options = {"space": Space.of(graph, target, team, offline=True), **options}
        return search(graph, target, team, **{"decode": from_atoffer, **options})
