"""What a handler of a call works with: the tensors of a captured graph as views of the values of an operator graph.

Views are composed, not executed, and what depends on constants alone becomes a constant. What no handler understands
stays an ``extern`` operator that PyTorch runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

# It registers torch.ops.fuser.
from fuser.attention import landmarks as _landmarks  # noqa: F401
from fuser.attention import linear as _linear  # noqa: F401
from fuser.attention import operators as _registered  # noqa: F401
from fuser.attention import windowed as _windowed  # noqa: F401
from fuser.frontend.building import GraphBuilder
from fuser.frontend.captured import Captured
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import Conjunction, Value, View, collapsed
from fuser.ir import operators as kinds
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import CaptureError
from fuser.ir.expression import Builder, Expression
from fuser.ir.graph import Operator, TensorSpec
from fuser.ir.operators import Extern, Ref, Semantics, TorchCall, laid_out
from fuser.ir.size import Size

aten = torch.ops.aten
_FOLD_LIMIT = 1 << 28


# What gives the same elements however its operands lie in memory. Of everything else that PyTorch runs we cannot know,
# so it gets operands with the strides that it had when the model was captured.
_READS_ELEMENTS = frozenset(
    {
        *(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default, aten.addmm.default),
        *(aten.cat.default, aten.stack.default, aten.embedding.default, aten.gather.default),
        *(aten.index_select.default, aten.index.Tensor, aten.cumsum.default, aten.layer_norm.default),
        *(aten.softmax.int, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default),
        *(aten.scaled_dot_product_attention.default, torch.ops.fuser.sparse_attention.default),
        *(aten.conv1d.default, aten.conv2d.default),
    }
)
# What reaches beyond its operand's elements, into the memory that they lie in.
_READS_STORAGE = frozenset(
    {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default, aten.set_.source_Tensor}
)


def _is_elementwise(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


class Raiser(GraphBuilder):
    """The operator graph of a captured one, as far as it is made; ``env`` has the values of the nodes so far."""

    def __init__(
        self,
        captured: Captured,
        attention: AttentionSpec | None,
        floating: frozenset[torch.dtype],
        sample: Mapping[str, int],
    ) -> None:
        super().__init__(sample, floating)
        self.captured = captured
        self.attention = attention
        self.env: dict[fx.Node, Value] = {}
        self._roots = _roots(captured.graph.graph)
        self.roomy: set[str] = set()
        """Values that are returned with strides of ours."""
        self.masks: dict[tuple[Any, ...], View] = {}
        """What is made of masks, by how and of which."""
        self._conjoined: dict[fx.Node, View] = {}
        self._viewing: dict[str, str] = {}
        """By what PyTorch makes, the value that it may be a view of."""
        self._laid: dict[tuple[str, tuple[int, ...]], str] = {}
        """Constants with other strides, by value and these."""
        self._elementwise: dict[tuple[Any, ...] | None, View] = {}
        """What is computed element by element, by how and of which: such as one mask for all layers."""

    # ---- tensors of the model

    def view(self, node: Any) -> View:
        """The view that an FX argument stands for; a conjunction is computed."""
        value = self.env[node]
        if isinstance(value, Conjunction):
            if node not in self._conjoined:
                self._conjoined[node] = self._conjoin(node, value)
            value = self._conjoined[node]
        if not isinstance(value, View):
            raise CaptureError(f"{node} is a tuple where a tensor is expected")
        return value

    def spec(self, node: fx.Node) -> TensorSpec:
        """Shape and dtype of an FX node's tensor, contiguous."""
        value = traced(node)
        return TensorSpec.contiguous(value.shape, value.dtype)

    def placeholder(self, node: fx.Node) -> View:
        """An input of the graph, or a parameter of the model."""
        if node.name in self.captured.parameters:
            return self.add_parameter(node.name, self.captured.parameters[node.name])
        value = traced(node)
        if not isinstance(value, Traced):
            raise CaptureError(f"the model takes a {type(node.meta['val']).__name__} that fuser cannot guard on")
        self.values[node.name] = spec = TensorSpec.contiguous(value.shape, value.dtype)
        known = f"{node.name}_known"
        if known in self.captured.known:
            return self.add_parameter(known, self.captured.known[known])
        return View.of(node.name, spec)

    def known_number(self, node: fx.Node) -> float | None:
        """The number that a constant without dimensions holds; the graph is then made for it."""
        tensor = self.captured.parameters.get(node.name)
        if tensor is None or tensor.dim() or not tensor.is_floating_point():
            return None
        self.inspected.add(node.name)
        return float(tensor)

    # ---- memory of the model

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory which the tensor of ``node`` lies in."""
        return self._roots[storage_of(node)]

    def memory(self, name: str) -> str:
        """The value whose memory a value may lie in when the program runs."""
        name = self.values[name].base or name
        return self.memory(self._viewing[name]) if name in self._viewing else name

    @staticmethod
    def is_returned(node: fx.Node) -> bool:
        """Whether the tensor of ``node`` is an output of the graph."""
        return any(user.op == "output" for user in node.users)

    def is_whole(self, node: fx.Node) -> bool:
        """Whether the tensor of ``node`` is known and all of its memory."""
        value = traced(node)
        known = isinstance(self.env.get(node), (View, Conjunction))
        return known and value.storage_bytes == value.nbytes and value.is_dense

    def in_place(self, node: fx.Node) -> View:
        """A tensor as the model has it in memory: of whatever root, with all strides."""
        view, value = self.view(node), traced(node)
        spec = self.values[self.realize(view)]
        if spec.has_strides(value.strides):
            return dataclasses.replace(View.of(spec.base or self.realize(view), spec), offset=spec.offset)
        return self.copied(node, "a copy as it lies in the model's memory")

    def copied(self, node: fx.Node, reason: str) -> View:
        """A copy of a tensor in memory of its own, with the strides that the model has it with."""
        value = traced(node)
        source = self.realize(self.view(node))
        # Memory that overlaps cannot be written to.
        strides = value.strides if value.is_dense else TensorSpec.contiguous(value.shape, value.dtype).strides
        copy = Extern(TorchCall(laid_out, (Ref(0), strides)), reason)
        spec = TensorSpec(value.shape, value.dtype, strides)
        return self.emit(copy, f"{node.name}_copy", (source,), spec)

    # ---- operators

    def elementwise(self, node: fx.Node, semantics: Semantics, operands: Sequence[View]) -> View | None:
        """An elementwise or row-wise operator, in the order in which its largest operand lies in memory.

        Kernels compute in fp32 whatever a model stores, so where operands and result differ in dtype, as in a cast,
        each is rounded to its own. What only decides between others may be boolean.
        """
        spec = self.spec(node)
        if spec.dtype not in self.floating or not spec.shape or spec.numel == 0:
            return None
        dtypes = [self.dtype(view) for view in operands]
        decide = frozenset[int]() if semantics.expression is None else semantics.expression.conditions
        if any(d not in self.floating and not (d == torch.bool and i in decide) for i, d in enumerate(dtypes)):
            return None
        running = [v for v in operands if not self.is_constant(v)]
        if not running:
            return None
        full = next((v for v in running if v.shape == spec.shape), None)
        if full is None:
            # Such as the sum of a column and a row.
            full = running[0].expand(spec.shape)
            operands = [full if v is running[0] else v for v in operands]
        dtypes = [spec.dtype if dtype == torch.bool else dtype for dtype in dtypes]
        if any(dtype != spec.dtype for dtype in dtypes):
            semantics = _rounded(semantics, dtypes, spec.dtype)
        order = full.memory_order()
        by_element = semantics.expression is not None and not semantics.expression.has_reduction
        whole = [v.expand((1,) * (len(spec.shape) - len(v.dims)) + v.shape) for v in operands]
        if by_element:
            elements = full.memory_order(rows=False)
            order = elements if all(v.lies_in(elements) for v in whole) else order
        inverse = tuple(order.index(d) for d in range(len(order)))
        ordered = shape = tuple(spec.shape[d] for d in order)
        turned = [view.permute(order) for view in whole]
        if order != tuple(range(len(order))):
            operands = turned
        if by_element and any(map(_repeats_between, turned)):
            shape, operands = with_wide_rows(shape, turned)
        inputs = [self.realize(view) for view in operands]
        # What every layer makes of one mask is made once.
        key = (semantics, tuple(inputs), shape, spec.dtype) if stays_inside(node) else None
        out = self._elementwise.get(key)
        if out is None:
            out = self.emit(semantics, node.name, inputs, TensorSpec.contiguous(shape, spec.dtype))
            if key is not None:
                self._elementwise[key] = out
        return self.reshaped(out, ordered).permute(inverse)

    def reduction(self, name: str, function: Expression, x: View, dtype: torch.dtype, keepdim: bool) -> View | None:
        """One number for every row of ``x``, which ``function`` makes of the row."""
        if not {dtype, self.dtype(x)} <= self.floating or self.is_constant(x):
            return None
        order = x.memory_order()
        rows = x.permute(order)
        semantics: Semantics = kinds.Reduction(function)
        if self.dtype(x) != dtype:
            semantics = _rounded(semantics, [self.dtype(x)], dtype)
        spec = TensorSpec.contiguous((*rows.shape[:-1], 1), dtype)
        out = self.emit(semantics, name, (self.realize(rows),), spec)
        out = out.permute([order.index(d) for d in range(len(order))])
        return out if keepdim else out.reshape(x.shape[:-1])

    def extern(self, node: fx.Node) -> Value:
        """Run the ATen operator as it is; fold it when all it reads is constant."""
        if node.target in _READS_STORAGE:
            raise CaptureError(f"the model uses {node.target} on memory that it has not made as a whole")
        views: list[View] = []
        free = node.target in _READS_ELEMENTS or _is_elementwise(node.target)

        def convert(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                view, strides = self.view(argument), traced(argument).strides
                if self.is_constant(view) and not free:
                    view = self._laid_out(view, strides)
                views.append(view)
                if free or self.values[self.realize(view)].has_strides(strides):
                    return Ref(len(views) - 1)
                return Ref(len(views) - 1, strides)
            if isinstance(argument, (tuple, list)):
                return tuple(map(convert, argument)) if isinstance(argument, tuple) else list(map(convert, argument))
            return argument

        value = traced(node)
        results = list(value) if isinstance(value, tuple) else [value]
        args = tuple(convert(a) for a in node.args)
        kwargs = tuple((k, convert(v)) for k, v in node.kwargs.items())
        if node.meta.get("val") is None:
            return ()
        if not all(isinstance(r, Traced) for r in results):
            raise CaptureError(f"{node.target} returns something other than tensors")
        call = TorchCall(node.target, args, kwargs)
        deterministic = torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        size = sum(r.nbytes for r in results)
        # What follows from named sizes is made when they are known.
        small = isinstance(size, Size) or size <= _FOLD_LIMIT
        if deterministic and small and len(results) == 1 and all(self.is_constant(v) for v in views):
            (result,) = results
            sources = tuple(self.realize(v) for v in views)
            name = self.derived(node.name, sources, call, result.shape, result.dtype)
            return View.of(name, self.values[name])
        specs = [TensorSpec.contiguous(r.shape, r.dtype) for r in results]
        suffixes = [node.name] if len(specs) == 1 else [f"{node.name}_{i}" for i in range(len(specs))]
        inputs = tuple(self.realize(v) for v in views)
        extern = Extern(call, f"no kernel family knows {node.target}")
        once = extern.is_elementwise and isinstance(value, Traced) and stays_inside(node)
        key = (extern.signature, node.target, inputs) if once else None
        if key in self._elementwise:
            return self._elementwise[key]
        names = tuple(self.add_value(s, spec) for s, spec in zip(suffixes, specs, strict=True))
        self.append(Operator(names[0], extern, inputs, names))
        if _is_view(node.target):
            self._viewing.update(dict.fromkeys(names, inputs[0]))
        found = tuple(View.of(n, s) for n, s in zip(names, specs, strict=True))
        if key is not None:
            self._elementwise[key] = found[0]
        return found if isinstance(value, tuple) else found[0]

    def _laid_out(self, view: View, strides: tuple[int, ...]) -> View:
        """A constant with these strides, so that no call has to lay it out."""
        name = self.realize(view)
        spec = self.values[name]
        if spec.has_strides(strides) or isinstance(spec.numel, Size) or not spec.numel:
            return view
        key = name, strides
        if key not in self._laid:
            call = TorchCall(laid_out, (Ref(0), strides))
            made = self.derived(f"{name}_laid_out", (name,), call, spec.shape, spec.dtype)
            self.values[made] = TensorSpec(spec.shape, spec.dtype, strides)
            self._laid[key] = made
        return View.of(self._laid[key], self.values[self._laid[key]])

    def _conjoin(self, node: fx.Node, value: Conjunction) -> View:
        inputs = (self.realize(value.constant), self.realize(value.attn_mask))
        both = Extern(TorchCall(torch.logical_and, (Ref(0), Ref(1))), "a mask made at run time")
        return self.emit(both, node.name, inputs, self.spec(node))


Handler = Callable[[Raiser, fx.Node], "Value | None"]
"""What becomes of a call: its value, or None where the handler declines it."""


def _rounded(semantics: Semantics, operands: Sequence[torch.dtype], result: torch.dtype) -> Semantics:
    """The same of operands in dtypes other than the result's, every one rounded to its own."""
    if semantics.expression is None:
        raise ValueError(f"{semantics.kind} is no row expression, and so cannot round its operands")
    b = Builder()
    inputs = [b.cast(b.input(i), dtype) if dtype != result else b.input(i) for i, dtype in enumerate(operands)]
    function = b.build(*(b.cast(output, result) for output in b.inline(semantics.expression, inputs)))
    if dataclasses.is_dataclass(semantics) and hasattr(semantics, "function"):
        return dataclasses.replace(semantics, function=function)
    return kinds.Pointwise(function)


def storage_of(node: fx.Node) -> int:
    """The number of the storage of a node's tensor."""
    (storage,) = _storages(node)
    return storage


def _repeats_between(view: View) -> bool:
    """Whether rows of a view are the same along one dimension and differ along one before and one behind it."""
    differ = [size != 1 for size in view.shape[:-1]]
    return True in differ and False in differ[differ.index(True) : len(differ) - differ[::-1].index(True)]


def with_wide_rows(shape: tuple[int, ...], views: list[View]) -> tuple[tuple[int, ...], list[View]]:
    """Operands of a shape whose last dimensions are one, as far as each of them has all or nothing of these in one
    piece of memory."""
    while len(shape) > 1:
        narrow = [view.shape[-2:] != shape[-2:] for view in views]
        one = [view.reshape((*view.shape[:-2], math.prod(view.shape[-2:]))) for view in views]
        joined = [view for view in one if view is not None and len(collapsed(view.dims[-1])) <= 1]
        if len(joined) < len(views) or any(n and view.shape[-1] != 1 for n, view in zip(narrow, joined, strict=True)):
            break
        shape, views = (*shape[:-2], math.prod(shape[-2:])), joined
    return shape, views


def _storages(node: fx.Node) -> frozenset[int]:
    """The numbers of the storages of all tensors of a node, such as of the parts of a split."""
    value = traced(node)
    return frozenset(v.storage for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Traced))


def stays_inside(node: fx.Node) -> bool:
    """Whether no output of the graph is in the memory of a tensor of ``node``, which a caller may write to."""
    own = _storages(node)
    return not any(user.op == "output" or (own & _storages(user) and not stays_inside(user)) for user in node.users)


def _is_view(target: Any) -> bool:
    """Whether what an operator returns may be a view of its first argument."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(returned.alias_info is not None for returned in schema.returns)


def _roots(graph: fx.Graph) -> dict[int, fx.Node]:
    """The first node of every storage: the one that made it, since nodes are in the order of execution."""
    roots: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if isinstance(traced(node), Traced):
            roots.setdefault(storage_of(node), node)
    return roots
