"""``torch.compile(model, backend="fuser")``: Dynamo's graphs through the same compiler as ``fuser.optimize``.

Dynamo hands over a graph whose parameters are inputs like all others. Those are bound into a module as what they are,
weights that are packed and watched for changes, and the rest stays the module's arguments. Sizes arrive as integers
when the graph runs, so a graph with dynamic shapes gets one program for each shape it meets, without a new trace.
"""

from __future__ import annotations

import collections
import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fuser.ir.errors import FuserError, MaskError
from fuser.module.compiler import Compiled
from fuser.module.engine import Engine
from fuser.module.optimized import OptimizedModule
from fuser.module.options import Options
from fuser.runtime.locks import ForkSafeLock

logger = logging.getLogger("fuser")
_SETS_OF_WEIGHTS = 64
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

    ``torch.compile(model, backend="fuser", options={...})`` takes the options ``attention``, ``search``, ``target``,
    ``cuda_graphs`` and ``padding`` of :func:`fuser.optimize`; ``mode`` is ignored. Graphs compile at their first call
    for a shape. A graph runs as PyTorch has it, with the reason in the log, where autograd would record it (call the
    model under ``torch.no_grad()`` or ``torch.inference_mode()``), where it changes its inputs, and where capture or
    build fails.

    Raises FuserError for unknown options, and as that function does for what an option cannot be.
    """
    settings = Options.of(**{**(options or {}), **more})
    if settings.quantize is not None:
        raise FuserError("graphs know nothing of the model's outputs: use fuser.optimize(model, quantize=...) instead")
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


def _returns_views(graph: fx.GraphModule) -> bool:
    """Whether an output shares memory with an input."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    inputs = {_storage(node) for node in graph.graph.nodes if node.op == "placeholder"} - {None}
    return any(_storage(node) in inputs for node in output.all_input_nodes)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout is torch.strided else None


def _written_out(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with nn.TransformerEncoder's fast path, one opaque operator a layer, as what it computes."""
    nodes = [node for node in graph.graph.nodes if node.target is torch._transformer_encoder_layer_fwd]
    if not nodes:
        return graph
    written = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in written.graph.nodes:
        if node.target is torch._transformer_encoder_layer_fwd:
            node.target = _encoder_layer
    written.recompile()
    return written


def _encoder_layer(
    src: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``: src (B, L, E); mask nonzero = forbidden, of type 0 (L, L), 1 (B, L) or
    2 (B, H, L, L)."""
    allowed = None
    if mask is not None:
        allowed = ~mask.to(torch.bool)
        allowed = allowed[:, None, None, :] if mask_type == 1 else allowed

    def attention(x: Tensor) -> Tensor:
        parts = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        split = (heads, width // heads)
        q, k, v = (part.unflatten(-1, split).transpose(1, 2) for part in parts)  # type: ignore[no-untyped-call]
        out = F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2)
        return F.linear(out, out_weight, out_bias)

    def perceptron(x: Tensor) -> Tensor:
        hidden = F.linear(x, first_weight, first_bias)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), second_weight, second_bias)

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = src + attention(norm1(src))
        return x + perceptron(norm2(x))
    x = norm1(src + attention(src))
    return norm2(x + perceptron(x))


class _Bound(nn.Module):
    """A graph with its weights in place."""

    def __init__(self, graph: fx.GraphModule, constant: Sequence[bool], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = graph
        # A graph compiles its code when it is first asked for, which a capture would take for a change of state.
        graph.code  # noqa: B018
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


class _GraphEngine(Engine):
    """The engine of a bound graph, which shares packed weights with those of the other graphs over the same weights.

    Dynamo makes several graphs of one model: for one shape, then for all others, or for another mode.
    """

    def __init__(self, model: _Bound, weights: Sequence[Tensor], options: Options) -> None:
        super().__init__(model, options)
        with _groups_lock:
            self._siblings = _groups.setdefault(tuple(map(id, weights)), weakref.WeakSet())
            first = next(iter(self._siblings), None)
            if first is not None:
                self.store, self.lock = first.store, first.lock
            self._siblings.add(self)

    def check_masked(self, compiled: Compiled) -> None:
        try:
            super().check_masked(compiled)
        except MaskError as error:
            # What runs between graphs is never seen.
            raise MaskError(
                f"{error}, in one of the graphs that Dynamo made of the model; attention between its graphs would miss "
                "the mask: compile with fullgraph=True, or use fuser.optimize(model, attention=...)"
            ) from error

    def sharing(self) -> Sequence[Engine]:
        return [sibling for sibling in self._siblings if sibling.store is self.store]


# Identities are those of the graphs' weights, which live as long as the graphs.
_groups: weakref.WeakValueDictionary[tuple[int, ...], weakref.WeakSet[_GraphEngine]] = weakref.WeakValueDictionary()
_groups_lock = ForkSafeLock()


class _Runner:
    """What Dynamo calls.

    Modules that share their code share one graph, so the weights are looked at in every call and each set of them has
    a module of its own.
    """

    def __init__(self, graph: fx.GraphModule, constant: tuple[bool, ...], options: Options) -> None:
        self._graph = graph
        self._compiled = _written_out(graph)
        self._aliases = _returns_views(graph)
        self._constant = constant
        self._options = options
        self._lock = ForkSafeLock()
        self._bound: collections.OrderedDict[tuple[int, ...], OptimizedModule] = collections.OrderedDict()

    def __call__(self, *inputs: Any) -> Any:
        weights = [x for x, constant in zip(inputs, self._constant, strict=True) if constant]
        rest = [x for x, constant in zip(inputs, self._constant, strict=True) if not constant]
        if self._options.attention is not None:
            # Dynamo's graph knows nothing of the mask.
            return self._module(weights)(*rest)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            _say(
                "autograd would record this graph, and fused kernels have no backward; "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
            return self._graph(*inputs)
        if self._aliases and any(isinstance(x, Tensor) and not x.is_contiguous() for x in inputs):
            # Programs read contiguous copies, and a view of a copy is not a view of the input.
            return self._graph(*inputs)
        module = self._module(weights)
        if module.programs and not any(compiled.assembly.kernels for compiled in module.programs):
            # Nothing to fuse, as in the scraps between graph breaks.
            return self._graph(*inputs)
        return module(*rest)

    def _module(self, weights: Sequence[Tensor]) -> OptimizedModule:
        key = tuple(map(id, weights))
        with self._lock:
            module = self._bound.get(key)
            if module is None:
                # The module keeps its weights alive, so that their identities stay theirs.
                bound = _Bound(self._compiled, self._constant, weights)
                module = OptimizedModule(bound, self._options, _GraphEngine(bound, weights, self._options))
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
