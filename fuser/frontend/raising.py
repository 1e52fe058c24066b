"""Raising: from a captured ATen graph to the operator graph.

Views are composed, not executed; what depends on constants alone becomes a constant; linear layers that read the same
value become one GEMM; attention is recognized in every form that PyTorch users write it. What is not understood stays
an ``extern`` operator that PyTorch runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator as python_operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fuser.frontend import attention_patterns
from fuser.frontend.capture import Captured
from fuser.frontend.views import Conjunction, Value, View
from fuser.ir import operators as kinds
from fuser.ir.errors import CaptureError, MaskError
from fuser.ir.expression import Builder
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec, ViewCalls
from fuser.ir.masks import Causal, Dense, Mask, from_dense
from fuser.ir.operators import Extern, Ref, Semantics, TorchCall, laid_out

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


class Raiser:
    """One walk over a captured graph; ``handlers`` say by target what a call becomes, and None that it is an extern."""

    def __init__(
        self,
        captured: Captured,
        handlers: Mapping[Any, Handler],
        attention: Mask | None,
        floating: frozenset[torch.dtype],
    ) -> None:
        self.captured = captured
        self.handlers = handlers
        self.attention = attention
        self.floating = floating
        self.values: dict[str, TensorSpec] = {}
        self.operators: list[Operator] = []
        self.constants: dict[str, Constant] = {}
        self.states: list[str] = []
        self.env: dict[fx.Node, Value] = {}
        self.roles: Mapping[fx.Node, attention_patterns.Role] = {}
        self._tensors: dict[str, Tensor] = {}
        self._realized: dict[View, str] = {}
        self._inspected: set[str] = set()
        self._roots = _roots(captured.graph.graph)
        self._aliases: dict[int, ViewCalls] = {}

    # ---- the walk

    def run(self) -> OperatorGraph:
        graph = self.captured.graph.graph
        self.roles = attention_patterns.find(graph, self._known_number)
        outputs: tuple[str, ...] = ()
        for node in graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                if node not in self.env:
                    self._call(node)
            elif node.op == "output":
                outputs = self._outputs(node.args[0])
            elif node.op != "get_attr":
                raise CaptureError(f"the captured graph holds a {node.op} that fuser does not know")
        return _finish(self, outputs)

    def _placeholder(self, node: fx.Node) -> None:
        name = node.name
        if name in self.captured.parameters:
            tensor = self.captured.parameters[name]
            self.constants[name] = Constant(name)
            self._tensors[name] = tensor
            spec = TensorSpec(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))
        else:
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                raise CaptureError(f"the model takes a {type(value).__name__} that fuser cannot guard on")
            spec = TensorSpec.contiguous(value.shape, value.dtype)
        self.values[name] = spec
        self.env[node] = View.of(name, spec)

    # ---- outputs

    def _outputs(self, leaves: Sequence[fx.Node]) -> tuple[str, ...]:
        """The values to return, with the strides that the model gives them, and sharing memory where the model's do."""
        names: dict[int, str] = {}
        sharing: dict[int, list[int]] = {}
        for position, leaf in enumerate(leaves):
            calls = self._view_calls(leaf)
            if calls is None:
                sharing.setdefault(_storage(leaf), []).append(position)
            else:
                self._aliases[position] = calls
                names[position] = self.root(leaf).name
        taken: set[str] = set()
        for positions in sharing.values():
            found = self._together([leaves[p] for p in positions], taken)
            taken.update(self.values[name].base or name for name in found)
            names.update(zip(positions, found, strict=True))
        return tuple(names[position] for position in range(len(leaves)))

    def _together(self, leaves: Sequence[fx.Node], taken: Collection[str]) -> list[str]:
        """Values for outputs that share the memory of their root: as they lie if that is how the model has them, else
        in a copy of the root."""
        values = [leaf.meta["val"] for leaf in leaves]
        realized = [self.realize(self.view(leaf)) for leaf in leaves]
        specs = [self.values[name] for name in realized]
        (base, *more) = {spec.base or name for name, spec in zip(realized, specs, strict=True)}
        if (
            not more
            and base not in taken
            and base not in self.constants
            and (base not in self.captured.inputs or self.root(leaves[0]).op == "placeholder")
            and all(spec.has_strides(value.stride()) for spec, value in zip(specs, values, strict=True))
            and len({s.offset - v.storage_offset() for s, v in zip(specs, values, strict=True)}) == 1
        ):
            offset = specs[0].offset - values[0].storage_offset()
        else:
            root = self.root(leaves[0])
            if not self.is_whole(root) or any(v.dtype != root.meta["val"].dtype for v in values):
                return [self._laid_out(leaf, "a copy to return") for leaf in leaves]
            base = self._laid_out(root, "a copy to return")
            offset = -root.meta["val"].storage_offset()
        return [
            self._alias(f"{leaf.name}_output", base, value.shape, value.stride(), offset + value.storage_offset())
            for leaf, value in zip(leaves, values, strict=True)
        ]

    def is_whole(self, node: fx.Node) -> bool:
        """Whether the tensor of ``node`` is known and all of its memory."""
        value = node.meta["val"]
        known = isinstance(self.env.get(node), (View, Conjunction))
        return known and value.untyped_storage().nbytes() == value.nbytes and _is_dense(value)

    def _view_calls(self, leaf: fx.Node) -> ViewCalls | None:
        """The views that make an output of an input or parameter; None for what the model computes."""
        if self.root(leaf).op != "placeholder":
            return None
        calls: list[tuple[TorchCall, int]] = []
        node, index = leaf, 0
        while node.op != "placeholder":
            source, *rest = node.args
            if any(isinstance(a, fx.Node) for a in pytree.tree_leaves((rest, node.kwargs))):
                return None
            if node.target is python_operator.getitem:
                node, index = source, rest[0]
                continue
            if node.target is aten.lift_fresh.default:
                # A tensor that the model writes down, new in every call.
                return None
            calls.append((TorchCall(node.target, (Ref(0), *rest), tuple(node.kwargs.items())), index))
            node, index = source, 0
        return tuple(reversed(calls))

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory which the tensor of ``node`` lies in."""
        return self._roots[_storage(node)]

    def in_place(self, node: fx.Node) -> View:
        """A tensor as the model has it in memory: of whatever root, with all strides."""
        view, value = self.view(node), node.meta["val"]
        spec = self.values[self.realize(view)]
        if spec.has_strides(value.stride()):
            return dataclasses.replace(View.of(spec.base or self.realize(view), spec), offset=spec.offset)
        name = self._laid_out(node, "a copy as it lies in the model's memory")
        return View.of(name, self.values[name])

    def _laid_out(self, node: fx.Node, reason: str) -> str:
        """A copy of a tensor in memory of its own, with the strides that the model has it with."""
        value = node.meta["val"]
        source = self.realize(self.view(node))
        # Memory that overlaps cannot be written to.
        strides = value.stride() if _is_dense(value) else TensorSpec.contiguous(value.shape, value.dtype).strides
        name = self.add_value(f"{node.name}_copy", TensorSpec(tuple(value.shape), value.dtype, tuple(strides)))
        call = TorchCall(laid_out, (Ref(0), tuple(strides)))
        self.operators.append(Operator(name, Extern(call, reason), (source,), (name,)))
        return name

    def _alias(self, name: str, base: str, shape: Sequence[int], strides: Sequence[int], offset: int) -> str:
        """Memory of ``base`` seen with another shape and strides."""
        whole = self.values[base]
        spec = TensorSpec(tuple(shape), whole.dtype, tuple(strides), base, offset)
        if offset == 0 and (spec.shape, spec.strides) == (whole.shape, whole.strides):
            return base
        name = self.add_value(name, spec)
        call = TorchCall(torch.as_strided, (Ref(0), spec.shape, spec.strides, offset))
        self.operators.append(Operator(name, _view_kind(whole, spec)(call), (base,), (name,)))
        return name

    def _known_number(self, node: fx.Node) -> float | None:
        """The number that a constant without dimensions holds; the graph is then made for it."""
        tensor = self.captured.parameters.get(node.name)
        if tensor is None or tensor.dim() or not tensor.is_floating_point():
            return None
        self._inspected.add(node.name)
        return float(tensor)

    def _call(self, node: fx.Node) -> None:
        role = self.roles.get(node)
        if role is not None:
            self.env[node] = self._attention(node, role)
            return
        handler = self.handlers.get(node.target)
        value = handler(self, node) if handler else None
        self.env[node] = value if value is not None else self._extern(node)

    # ---- values

    def view(self, node: Any) -> View:
        """The view that an FX argument stands for; a conjunction is computed."""
        value = self.env[node]
        if isinstance(value, Conjunction):
            value = self._conjoin(node, value)
            self.env[node] = value
        if not isinstance(value, View):
            raise CaptureError(f"{node} is a tuple where a tensor is expected")
        return value

    def spec(self, node: fx.Node) -> TensorSpec:
        """Shape and dtype of an FX node's tensor, contiguous."""
        value = node.meta["val"]
        return TensorSpec.contiguous(value.shape, value.dtype)

    def dtype(self, view: View) -> torch.dtype:
        return self.values[view.base].dtype

    def is_constant(self, view: View) -> bool:
        return view.base in self.constants

    def add_value(self, name: str, spec: TensorSpec) -> str:
        unique, n = name, 1
        while unique in self.values:
            unique, n = f"{name}_{n}", n + 1
        self.values[unique] = spec
        return unique

    def add_state(self, name: str, spec: TensorSpec) -> View:
        """A value that lives across calls, by the name that all programs know it by. Raises CaptureError where that is
        the name of another value."""
        if self.values.setdefault(name, spec) is not spec and (name not in self.states or self.values[name] != spec):
            raise CaptureError(f"the state {name} has the name of another value")
        if name not in self.states:
            self.states.append(name)
        return View.of(name, spec)

    def realize(self, view: View) -> str:
        """The name of a value that is this view: its base, an alias, or, where no strides can say it, a copy."""
        base = self.values[view.base]
        shape, strides = view.shape, view.strides()
        if view.offset == 0 and shape == base.shape and strides is not None and base.has_strides(strides):
            return view.base
        if view in self._realized:
            return self._realized[view]
        if self.is_constant(view):
            name = self.derived(f"{view.base}_view", (view.base,), _as_strided(view), shape, base.dtype)
        elif strides is not None:
            name = self._alias(f"{view.base}_view", view.base, shape, strides, view.offset)
        else:
            name = self.add_value(f"{view.base}_copy", TensorSpec.contiguous(shape, base.dtype))
            call = _as_strided(view)
            reason = "a view that no strides can describe is copied"
            self.operators.append(Operator(name, Extern(call, reason), (view.base,), (name,)))
        self._realized[view] = name
        return name

    def tensor(self, name: str) -> Tensor:
        """The value of a constant, computed once."""
        if name not in self._tensors:
            constant = self.constants[name]
            if constant.call is None:
                raise KeyError(name)
            self._tensors[name] = constant.evaluate([self.tensor(s) for s in constant.sources])
        return self._tensors[name]

    def constant_tensor(self, view: View) -> Tensor:
        """The value of a constant view, which the graph is then made for."""
        self._inspect(view.base)
        (tensor,) = _as_strided(view)(self.tensor(view.base))
        return tensor

    def _inspect(self, name: str) -> None:
        constant = self.constants[name]
        if constant.call is None:
            self._inspected.add(name)
        for source in constant.sources:
            self._inspect(source)

    def derived(
        self, name: str, sources: tuple[str, ...], call: TorchCall, shape: Sequence[int], dtype: torch.dtype
    ) -> str:
        """A constant made from others, which is computed when something needs its contents."""
        unique = self.add_value(name, TensorSpec.contiguous(shape, dtype))
        self.constants[unique] = Constant(unique, sources, call)
        return unique

    # ---- emitting

    def emit(self, semantics: Semantics, name: str, inputs: Sequence[str], spec: TensorSpec) -> View:
        """Append an operator with one output of its own storage."""
        output = self.add_value(name, spec)
        self.operators.append(Operator(output, semantics, tuple(inputs), (output,)))
        return View.of(output, spec)

    def elementwise(self, node: fx.Node, semantics: Semantics, operands: Sequence[View]) -> View | None:
        """An elementwise or row-wise operator, in the order in which its largest operand lies in memory.

        Kernels compute in fp32 whatever a model stores, so where operands and result differ in dtype, as in a cast,
        each is rounded to its own.
        """
        spec = self.spec(node)
        if spec.dtype not in self.floating or not spec.shape or spec.numel == 0:
            return None
        if any(self.dtype(v) not in self.floating for v in operands):
            return None
        full = next((v for v in operands if v.shape == spec.shape and not self.is_constant(v)), None)
        if full is None:
            return None
        dtypes = [self.dtype(view) for view in operands]
        if any(dtype != spec.dtype for dtype in dtypes):
            semantics = _rounded(semantics, dtypes, spec.dtype)
        order = full.memory_order()
        inverse = tuple(order.index(d) for d in range(len(order)))
        inputs = []
        for view in operands:
            pad = len(spec.shape) - len(view.dims)
            if order != tuple(range(len(order))):
                view = view.expand((1,) * pad + view.shape).permute(order)
            inputs.append(self.realize(view))
        shape = tuple(spec.shape[d] for d in order)
        out = self.emit(semantics, node.name, inputs, TensorSpec.contiguous(shape, spec.dtype))
        return out.permute(inverse)

    def _extern(self, node: fx.Node) -> Value:
        """Run the ATen operator as it is; fold it when all it reads is constant."""
        if node.target in _READS_STORAGE:
            raise CaptureError(f"the model uses {node.target} on memory that it has not made as a whole")
        views: list[View] = []
        free = node.target in _READS_ELEMENTS or _is_elementwise(node.target)

        def convert(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                view = self.view(argument)
                views.append(view)
                strides = tuple(argument.meta["val"].stride())
                if free or self.values[self.realize(view)].has_strides(strides):
                    return Ref(len(views) - 1)
                return Ref(len(views) - 1, strides)
            if isinstance(argument, (tuple, list)):
                return type(argument)(convert(a) for a in argument)
            return argument

        val = node.meta.get("val")
        results = list(val) if isinstance(val, (tuple, list)) else [val]
        args = tuple(convert(a) for a in node.args)
        kwargs = tuple((k, convert(v)) for k, v in node.kwargs.items())
        if val is None:
            return ()
        if not all(isinstance(r, Tensor) for r in results):
            raise CaptureError(f"{node.target} returns something other than tensors")
        call = TorchCall(node.target, args, kwargs)
        deterministic = torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        size = sum(r.numel() * r.element_size() for r in results)
        if deterministic and size <= _FOLD_LIMIT and len(results) == 1 and all(self.is_constant(v) for v in views):
            (result,) = results
            sources = tuple(self.realize(v) for v in views)
            name = self.derived(node.name, sources, call, result.shape, result.dtype)
            return View.of(name, self.values[name])
        specs = [TensorSpec.contiguous(r.shape, r.dtype) for r in results]
        suffixes = [node.name] if len(specs) == 1 else [f"{node.name}_{i}" for i in range(len(specs))]
        inputs = tuple(self.realize(v) for v in views)
        names = tuple(self.add_value(s, spec) for s, spec in zip(suffixes, specs, strict=True))
        reason = f"no kernel family knows {node.target}"
        self.operators.append(Operator(names[0], Extern(call, reason), inputs, names))
        found = tuple(View.of(n, s) for n, s in zip(names, specs, strict=True))
        return found if isinstance(val, (tuple, list)) else found[0]

    def _conjoin(self, node: fx.Node, value: Conjunction) -> View:
        inputs = (self.realize(value.constant), self.realize(value.runtime))
        spec = self.spec(node)
        name = self.add_value(node.name, spec)
        call = TorchCall(torch.logical_and, (Ref(0), Ref(1)))
        self.operators.append(Operator(name, Extern(call, "a mask made at run time"), inputs, (name,)))
        return View.of(name, spec)

    # ---- linear layers

    def linear(self, node: fx.Node, x: View, weight: View, bias: View | None, transposed: bool) -> View | None:
        """x · Wᵀ (+ bias), W constant, as ``gemm`` and ``bias``; rows in the order in which x lies in memory."""
        if self.dtype(x) not in self.floating or self.dtype(weight) != self.dtype(x) or 0 in x.shape:
            return None
        order = x.memory_order()
        inverse = tuple(order.index(d) for d in range(len(order)))
        rows = x.permute(order)
        columns = weight.shape[0] if transposed else weight.shape[1]
        if rows.strides() is None or rows.strides()[-1] != 1:  # type: ignore[index]
            rearranged = _rows_in_memory_order(x)
            if rearranged is not None:
                rows, restore = rearranged
                out = self._gemm(node, rows, weight, bias, transposed, columns)
                return restore(out)
        return self._gemm(node, rows, weight, bias, transposed, columns).permute(inverse)

    def _gemm(self, node: fx.Node, x: View, weight: View, bias: View | None, transposed: bool, columns: int) -> View:
        spec = TensorSpec.contiguous((*x.shape[:-1], columns), self.dtype(x))
        inputs = (self.realize(x), self.realize(weight))
        name = node.name if bias is None else f"{node.name}_gemm"
        out = self.emit(kinds.Gemm(transposed), name, inputs, spec)
        if bias is not None:
            out = self.emit(kinds.Bias(), node.name, (out.base, self.realize(bias)), spec)
        return out

    # ---- attention

    def _attention(self, node: fx.Node, role: attention_patterns.Role) -> Value:
        if role.part != "pv" or role.pattern is None:
            return ()
        p = role.pattern
        return self.attention_from(
            node, self.view(p.q), self.view(p.k), self.view(p.v), p.scale, p.masks, transposed_key=True
        )

    def attention_from(
        self,
        node: fx.Node,
        q: View,
        k: View,
        v: View,
        scale: float,
        masks: Sequence[attention_patterns.MaskUse],
        *,
        pattern: Mask | None = None,
        causal: bool = False,
        transposed_key: bool = False,
    ) -> View:
        """Emit qk, scale, mask, softmax and pv for q (…, Sq, D), k (…, Sk, D) or its transpose, v (…, Sk, Dv)."""
        if transposed_key:
            k = k.permute((*range(len(k.dims) - 2), len(k.dims) - 1, len(k.dims) - 2))
        out_shape = self.spec(node).shape
        rank = len(q.dims)
        q, k, v = (_four_dims(t) for t in (q, k, v))
        batch, heads, q_len, _ = q.shape
        kv_len = k.shape[2]
        dtype = self.dtype(q)
        scores = TensorSpec.contiguous((batch, heads, q_len, kv_len), dtype)
        name = node.name
        s = self.emit(kinds.QK(), f"{name}_qk", (self.realize(q), self.realize(k)), scores).base
        if scale != 1.0:
            s = self.emit(kinds.Scale(scale), f"{name}_scale", (s,), scores).base
        if self.attention is not None and q_len == kv_len:
            pattern = self.attention if pattern is None else pattern & self.attention
        pattern, runtime = self._masks(masks, (batch, heads, q_len, kv_len), rank, pattern, causal, dtype)
        if pattern is not None:
            pattern = _hashable(pattern, q_len, kv_len)
        if causal or pattern is not None:
            s = self.emit(kinds.PatternMask(causal, pattern), f"{name}_mask", (s,), scores).base
        if runtime is not None:
            mask = kinds.AdditiveMask() if self.dtype(runtime).is_floating_point else kinds.BooleanMask()
            s = self.emit(mask, f"{name}_mask", (s, self.realize(runtime)), scores).base
        p = self.emit(kinds.Softmax(masked=True), f"{name}_softmax", (s,), scores).base
        # Heads lie inside a token and tokens as they do in q, so that merging heads afterwards moves nothing.
        width = v.shape[3]
        token = heads * width
        q_strides = q.strides()
        time_first = q_strides is not None and batch > 1 and q_len > 1 and q_strides[2] > q_strides[0] > 0
        batch_stride, row_stride = (token, batch * token) if time_first else (q_len * token, token)
        spec = TensorSpec((batch, heads, q_len, width), dtype, (batch_stride, width, row_stride, 1))
        out = self.emit(kinds.PV(), name, (p, self.realize(v)), spec)
        merged = out.reshape(out_shape)
        if merged is None:
            raise CaptureError(f"{node} has the shape {out_shape}, which its operands do not give")
        return merged

    def _masks(
        self,
        uses: Sequence[attention_patterns.MaskUse],
        shape: tuple[int, int, int, int],
        rank: int,
        pattern: Mask | None,
        causal: bool,
        dtype: torch.dtype,
    ) -> tuple[Mask | None, View | None]:
        """All masks of one attention over scores of ``rank`` dimensions: a constant pattern of what is forbidden, and
        one run-time tensor, expanded to ``shape``.

        Only -inf forbids. A finite minimum that a mask adds, or fills in, gives exactly zero in every row that allows
        something, as a pattern does, and a uniform average in a row that does not: that needs the numbers.
        """
        full = {4: shape, 3: (shape[0], *shape[2:]), 2: shape[2:]}[rank]
        lowered: list[tuple[attention_patterns.MaskUse, Mask | None]] = []
        runtime: list[View] = []
        for use in uses:
            constant, finite = self._constant_mask(use, full)
            if finite:
                lowered.append((use, constant))
                continue
            value, rest = self.env[use.node], None
            if isinstance(value, Conjunction) and not use.inverted and use.fill == -math.inf:
                constant, _ = self._constant_mask(use, full, value.constant)
                rest = value.runtime if constant is not None else None
            if constant is not None:
                pattern = _conjunction(pattern, constant)
            if constant is None or rest is not None:
                runtime.append(self._runtime_mask(use, rest or self.view(use.node), dtype))
        for use, constant in lowered:
            known = _conjunction(_conjunction(pattern, Causal() if causal else None), constant)
            if runtime or (known is not None and not bool(known.dense(shape[2], shape[3]).any(-1).all())):
                runtime.append(self._runtime_mask(use, self.view(use.node), dtype))
            else:
                pattern = _conjunction(pattern, constant)
        if isinstance(pattern, Dense):
            pattern = None
        if not runtime:
            return pattern, None
        total, *more = runtime if len(runtime) == 1 else [self._additive(v, -math.inf, dtype) for v in runtime]
        for view in more:
            total = self._torch_mask("sum", torch.add, (total, view), (), dtype)
        return pattern, _four_dims(total.expand(full))

    def _runtime_mask(self, use: attention_patterns.MaskUse, view: View, dtype: torch.dtype) -> View:
        """A mask operand as kernels take it: True where something may attend, or numbers to add."""
        if use.inverted:
            view = self._torch_mask("not", torch.logical_not, (view,), (), torch.bool)
        if use.fill != -math.inf and self.dtype(view) == torch.bool:
            return self._additive(view, use.fill, dtype)
        return view

    def _additive(self, view: View, fill: float, dtype: torch.dtype) -> View:
        """A boolean mask as numbers to add: zero, and ``fill`` where it is False."""
        if self.dtype(view) != torch.bool:
            return view
        lowest = fill if fill == -math.inf else max(fill, torch.finfo(dtype).min)
        return self._torch_mask("numbers", _numbers, (view,), (lowest, dtype), dtype)

    def _torch_mask(
        self,
        what: str,
        function: Callable[..., Tensor],
        views: Sequence[View],
        more: tuple[Any, ...],
        dtype: torch.dtype,
    ) -> View:
        """A mask that PyTorch makes of others."""
        shape: tuple[int, ...] = torch.broadcast_shapes(*(view.shape for view in views))  # type: ignore[no-untyped-call]
        spec = TensorSpec.contiguous(shape, dtype)
        name = self.add_value(f"{views[0].base}_{what}", spec)
        call = TorchCall(function, (*map(Ref, range(len(views))), *more))
        inputs = tuple(self.realize(view) for view in views)
        self.operators.append(Operator(name, Extern(call, "a mask made at run time"), inputs, (name,)))
        return View.of(name, spec)

    def _constant_mask(
        self, use: attention_patterns.MaskUse, full: Sequence[int], view: View | None = None
    ) -> tuple[Mask | None, bool]:
        """A constant mask as a pattern, Dense for what allows everything and None for what is no pattern (a bias, not
        constant, or different for each sample); and whether what it forbids is a finite number."""
        if view is None:
            value = self.env[use.node]
            if isinstance(value, Conjunction) or not self.is_constant(self.view(use.node)):
                return None, False
            view = self.view(use.node)
        tensor = self.constant_tensor(_four_dims(view.expand(full))).detach()
        finite = use.fill != -math.inf
        if tensor.dtype != torch.bool:
            allowed = tensor == 0
            lowest = torch.finfo(tensor.dtype).min / 2 if tensor.is_floating_point() else -math.inf
            if not bool((allowed | (tensor < lowest)).all()):
                return None, False
            finite = not bool(torch.isneginf(tensor[~allowed]).all())
            tensor = allowed
        elif use.inverted:
            tensor = ~tensor
        if bool(tensor.all()):
            return Dense(), False
        if not bool((tensor == tensor[:1]).all()):
            return None, False
        tensor = tensor[0]
        if tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
            tensor = tensor[:1]
        dense = tensor[0] if tensor.shape[0] == 1 else tensor
        return _named_mask(dense.contiguous()), finite


def _conjunction(a: Mask | None, b: Mask | None) -> Mask | None:
    """What both allow; None and Dense allow everything."""
    if a is None or isinstance(a, Dense):
        return b
    return a if b is None or isinstance(b, Dense) else a & b


def _numbers(mask: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, fill)


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


@functools.lru_cache(maxsize=8)
def _hashable(mask: Mask, q_len: int, kv_len: int) -> Mask:
    """The mask itself, or, where a function is part of it, its entries: regions are compared by the hash of masks."""
    try:
        mask.hash  # noqa: B018
    except MaskError:
        return from_dense(mask.dense(q_len, kv_len))
    return mask


def _named_mask(dense: Tensor) -> Mask:
    from fuser.ir import masks

    if dense.dim() == 2:
        causal = masks.Causal()
        if bool((dense == causal.dense(*dense.shape)).all()):
            return causal
    return masks.from_dense(dense)


def _is_dense(tensor: Tensor) -> bool:
    """Whether every element has a place of its own and nothing lies between them."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _storage(node: fx.Node) -> int:
    storage: int = node.meta["val"].untyped_storage()._cdata
    return storage


def _roots(graph: fx.Graph) -> dict[int, fx.Node]:
    """The first node of every storage: the one that made it, since nodes are in the order of execution."""
    roots: dict[int, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.layout is torch.strided:
            roots.setdefault(_storage(node), node)
    return roots


def _as_strided(view: View) -> TorchCall:
    flat = [f for factors in view.dims for f in factors]
    sizes, strides = tuple(s for s, _ in flat), tuple(s for _, s in flat)
    return TorchCall(_strided_copy, (Ref(0), sizes, strides, view.offset, view.shape))


def _strided_copy(
    base: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, shape: tuple[int, ...]
) -> Tensor:
    return base.as_strided(sizes, strides, base.storage_offset() + offset).reshape(shape)


def _four_dims(view: View) -> View:
    if len(view.dims) == 4:
        return view
    if len(view.dims) == 3:
        # (B·H, S, D), as nn.MultiheadAttention has it: every pair of batch and head is a sample of one head.
        return View(view.base, (view.dims[0], ((1, 0),), *view.dims[1:]), view.offset)
    if len(view.dims) == 2:
        return View(view.base, (((1, 0),), ((1, 0),), *view.dims), view.offset)
    raise CaptureError(f"attention over a tensor of {len(view.dims)} dimensions")


def _view_kind(base: TensorSpec, spec: TensorSpec) -> type[kinds.View]:
    if len(spec.shape) == 4 and len(base.shape) < 4:
        return kinds.SplitHeads
    if len(base.shape) == 4 and len(spec.shape) < 4:
        return kinds.MergeHeads
    return kinds.View


def _rows_in_memory_order(x: View) -> tuple[View, Callable[[View], View]] | None:
    """A view whose rows have several factors, as (memory order, N) rows, and how to lay the result out as x was."""
    last = View(x.base, (x.dims[-1],)).strides()
    factors = [(d, f) for d, dim in enumerate(x.dims[:-1]) for f in dim if f[0] > 1]
    if last is None or last[0] != 1 or any(stride == 0 for _, (_, stride) in factors):
        return None
    ordered = sorted(range(len(factors)), key=lambda i: -factors[i][1][1])
    rows = View(x.base, (*(((factors[i][1]),) for i in ordered), x.dims[-1]), x.offset)

    def restore(out: View) -> View:
        dims: list[tuple[tuple[int, int], ...]] = []
        for d in range(len(x.dims) - 1):
            mine = [ordered.index(i) for i, (dim, _) in enumerate(factors) if dim == d]
            dims.append(tuple(f for m in mine for f in out.dims[m]) or ((1, 0),))
        return View(out.base, (*dims, out.dims[-1]), out.offset)

    return rows, restore


def _finish(raiser: Raiser, outputs: tuple[str, ...]) -> OperatorGraph:
    """Drop what neither an output nor a state needs, and let everything that does not depend on kernels run first."""

    def states(values: Sequence[str]) -> set[str]:
        return {raiser.values[v].base or v for v in values}.intersection(raiser.states)

    needed = set(outputs)
    kept: list[Operator] = []
    for op in reversed(raiser.operators):
        if op.semantics.is_random or op.mutates or any(o in needed for o in op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    kept.reverse()
    late: set[str] = set()
    late_touched: set[str] = set()
    late_written: set[str] = set()
    random_late = False
    first: list[Operator] = []
    rest: list[Operator] = []
    for op in kept:
        early = not op.semantics.fusible and not any(v in late for v in op.inputs)
        early = early and not (op.semantics.is_random and random_late)
        touched, written = states(op.inputs), states(op.mutates)
        early = early and not touched & late_written and not written & late_touched
        (first if early else rest).append(op)
        if not early:
            late.update(op.outputs)
            late_touched |= touched
            late_written |= written
            random_late |= op.semantics.is_random
    used = needed | {v for op in kept for v in op.outputs}
    stack = [v for v in used if v in raiser.constants]
    while stack:
        for source in raiser.constants[stack.pop()].sources:
            if source not in used:
                used.add(source)
                stack.append(source)
    bases = {spec.base for name, spec in raiser.values.items() if name in used and spec.base}
    keep = used | bases | set(raiser.captured.inputs)
    return OperatorGraph(
        operators=tuple(first + rest),
        values={name: spec for name, spec in raiser.values.items() if name in keep},
        inputs=raiser.captured.inputs,
        outputs=outputs,
        constants={name: constant for name, constant in raiser.constants.items() if name in keep},
        aliases=raiser._aliases,
        inspected=frozenset(raiser._inspected),
        states=tuple(name for name in raiser.states if name in keep),
    )


Handler = Callable[[Raiser, fx.Node], "Value | None"]
