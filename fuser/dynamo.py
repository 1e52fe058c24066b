"""``torch.compile(model, backend="fuser")``: Dynamo's graphs through the same compiler as ``fuser.optimize``.

Dynamo hands over a graph whose parameters are inputs like all others. Those are bound into a module as what they are,
weights that are packed and watched for changes, and the rest stays the module's arguments. Sizes arrive as integers
when the graph runs, so a graph with dynamic shapes gets one program for each shape it meets, without a new trace.
"""

from __future__ import annotations

import collections
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fuser.ir.errors import FuserError, MaskError
from fuser.ir.masks import Mask
from fuser.module import OptimizedModule

logger = logging.getLogger("fuser")
_SETS_OF_WEIGHTS = 64
_OPTIONS = ("attention", "search", "target")
_modules: weakref.WeakSet[OptimizedModule] = weakref.WeakSet()


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """The Dynamo backend ``"fuser"``.

    ``torch.compile(model, backend="fuser", options={...})`` takes the options ``attention``, ``search`` and ``target``
    of :func:`fuser.optimize`; ``mode`` is ignored. Graphs compile at their first call for a shape. A graph runs as
    PyTorch has it, with the reason in the log, where autograd would record it (call the model under
    ``torch.no_grad()`` or ``torch.inference_mode()``), where it changes its inputs, and where capture or build fails.

    Raises FuserError for unknown options.
    """
    settings = {**(options or {}), **more}
    unknown = sorted(set(settings) - set(_OPTIONS))
    if unknown:
        raise FuserError(f"the backend fuser has no option {', '.join(unknown)}; it has {', '.join(_OPTIONS)}")
    attention = settings.get("attention")
    if attention is not None and not isinstance(attention, Mask):
        raise MaskError(f"attention must be one of fuser.masks, not a {type(attention).__name__}")
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    constant = tuple(_is_weight(n, e) for n, e in zip(placeholders, example_inputs, strict=True))
    return _Runner(graph, constant, settings)


def modules() -> list[OptimizedModule]:
    """The optimized graphs that are alive in this process, for reports: ``.report()``, ``.kernels``, ``.unfused``."""
    return list(_modules)


def _is_weight(node: fx.Node, example: Any) -> bool:
    """Whether a graph input is a parameter or buffer of a module."""
    if isinstance(example, nn.Parameter):
        return True
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return isinstance(example, Tensor) and "._buffers[" in (name() if callable(name) else str(name))


class _Bound(nn.Module):
    """A graph with its weights in place."""

    def __init__(self, graph: fx.GraphModule, constant: Sequence[bool], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = graph
        self._constant = constant
        self._names = [f"weight_{i}" for i in range(len(weights))]
        for name, weight in zip(self._names, weights, strict=True):
            if isinstance(weight, nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight)
        # Dynamo has resolved the mode of every layer; the flag of a graph says nothing.
        self.training = False

    def forward(self, *inputs: Any) -> Any:
        given = iter(inputs)
        weights = iter([getattr(self, name) for name in self._names])
        return self.graph(*(next(weights) if constant else next(given) for constant in self._constant))


class _Runner:
    """What Dynamo calls.

    Modules that share their code share one graph, so the weights are looked at in every call and each set of them has
    a module of its own.
    """

    def __init__(self, graph: fx.GraphModule, constant: tuple[bool, ...], settings: Mapping[str, Any]) -> None:
        self._graph = graph
        self._constant = constant
        self._settings = settings
        self._lock = threading.Lock()
        self._bound: collections.OrderedDict[tuple[int, ...], OptimizedModule] = collections.OrderedDict()

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            _say(
                "autograd would record this graph, and fused kernels have no backward; "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
            return self._graph(*inputs)
        weights = [x for x, constant in zip(inputs, self._constant, strict=True) if constant]
        module = self._module(weights)
        if module.programs and not any(compiled.assembly.kernels for compiled in module.programs):
            # Nothing to fuse, as in the scraps between graph breaks.
            return self._graph(*inputs)
        return module(*(x for x, constant in zip(inputs, self._constant, strict=True) if not constant))

    def _module(self, weights: Sequence[Tensor]) -> OptimizedModule:
        key = tuple(map(id, weights))
        with self._lock:
            module = self._bound.get(key)
            if module is None:
                # The module keeps its weights alive, so that their identities stay theirs.
                module = OptimizedModule(_Bound(self._graph, self._constant, weights), **self._settings)
                _modules.add(module)
                self._bound[key] = module
                while len(self._bound) > _SETS_OF_WEIGHTS:
                    self._bound.popitem(last=False)
            self._bound.move_to_end(key)
        return module


_said: set[str] = set()


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("a graph runs in PyTorch: %s", reason)
