"""Raising: from a captured ATen graph to the operator graph.

Views are composed, not executed; what depends on constants alone becomes a constant; linear layers that read the same
value become one GEMM; attention is recognized in every form that PyTorch users write it. What is not understood stays
an ``extern`` operator that PyTorch runs.
"""

from __future__ import annotations

import functools
import math
import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuser import attention_patterns
from fuser.attention import mask_of
from fuser.capture import Captured
from fuser.ir import expression as ex
from fuser.ir.errors import CaptureError, MaskError
from fuser.ir.expression import Builder, Expression, Op
from fuser.ir.graph import VIEWS, Constant, Kind, Operator, OperatorGraph, Ref, TensorSpec, TorchCall
from fuser.ir.masks import Dense, Mask, from_dense
from fuser.views import View

aten = torch.ops.aten
_FLOATING = (torch.float32, torch.bfloat16)
_FOLD_LIMIT = 1 << 28
_MERGE_LIMIT = 3


@dataclass(frozen=True)
class Conjunction:
    """A boolean mask that is the conjunction of a constant and a run-time one, kept apart until somebody needs it."""

    constant: View
    runtime: View

    def expand(self, shape: Sequence[int]) -> Conjunction:
        return Conjunction(self.constant.expand(shape), self.runtime.expand(shape))


Value = View | Conjunction | tuple[View, ...]


def raise_graph(captured: Captured, attention: Mask | None = None) -> OperatorGraph:
    """The operator graph of a captured model.

    ``attention`` is a mask that every self-attention (as many keys as queries) is restricted to. Raises CaptureError
    for graphs that mutate tensors.
    """
    return _Raiser(captured, attention).run()


class _Raiser:
    def __init__(self, captured: Captured, attention: Mask | None) -> None:
        self.captured = captured
        self.attention = attention
        self.values: dict[str, TensorSpec] = {}
        self.operators: list[Operator] = []
        self.constants: dict[str, Constant] = {}
        self.env: dict[fx.Node, Value] = {}
        self.roles: Mapping[fx.Node, attention_patterns.Role] = {}
        self._tensors: dict[str, Tensor] = {}
        self._realized: dict[View, str] = {}
        self._inspected: set[str] = set()
        self._returned: dict[str, int] = {}

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
                outputs = tuple(self._output(leaf) for leaf in node.args[0])
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
            self._returned[name] = value.untyped_storage()._cdata
        self.values[name] = spec
        self.env[node] = View.of(name, spec)

    def _output(self, leaf: fx.Node) -> str:
        """A value to return: in memory of its own unless the model returns tensors that share theirs."""
        view = self.view(leaf)
        storage = leaf.meta["val"].untyped_storage()._cdata
        if self._returned.setdefault(view.base, storage) == storage or self.is_constant(view):
            return self.realize(view)
        source = self.realize(view)
        name = self.add_value(f"{leaf.name}_copy", TensorSpec.contiguous(view.shape, self.dtype(view)))
        call = TorchCall(torch.clone, (Ref(0),))
        self.operators.append(Operator(name, Kind.EXTERN, (source,), (name,), call=call, reason="a copy to return"))
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
        handler = _HANDLERS.get(node.target)
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

    def realize(self, view: View) -> str:
        """The name of a value that is this view: its base, an alias, or, where no strides can say it, a copy."""
        base = self.values[view.base]
        shape, strides = view.shape, view.strides()
        if view.offset == 0 and shape == base.shape and strides is not None and base.has_strides(strides):
            return view.base
        if view in self._realized:
            return self._realized[view]
        if self.is_constant(view):
            name = self.derived(f"{view.base}_view", (view.base,), _as_strided(view), shape)
        elif strides is not None:
            spec = TensorSpec(shape, base.dtype, strides, view.base, view.offset)
            name = self.add_value(f"{view.base}_view", spec)
            call = TorchCall(torch.as_strided, (Ref(0), shape, strides, view.offset))
            self.operators.append(Operator(name, _view_kind(base, spec), (view.base,), (name,), call=call))
        else:
            name = self.add_value(f"{view.base}_copy", TensorSpec.contiguous(shape, base.dtype))
            call = _as_strided(view)
            reason = "a view that no strides can describe is copied"
            self.operators.append(Operator(name, Kind.EXTERN, (view.base,), (name,), call=call, reason=reason))
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

    def derived(self, name: str, sources: tuple[str, ...], call: TorchCall, shape: Sequence[int] | None = None) -> str:
        """A constant made from others; with its ``shape`` given, nothing is computed now."""
        if shape is None:
            tensor = Constant(name, sources, call).evaluate([self.tensor(s) for s in sources])
            spec = TensorSpec.contiguous(tensor.shape, tensor.dtype)
        else:
            spec = TensorSpec.contiguous(shape, self.values[sources[0]].dtype)
        unique = self.add_value(name, spec)
        self.constants[unique] = Constant(unique, sources, call)
        if shape is None:
            self._tensors[unique] = tensor
        return unique

    # ---- emitting

    def emit(
        self,
        kind: Kind,
        name: str,
        inputs: Sequence[str],
        spec: TensorSpec,
        *,
        expression: Expression | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> View:
        """Append an operator with one output of its own storage."""
        output = self.add_value(name, spec)
        self.operators.append(
            Operator(output, kind, tuple(inputs), (output,), expression=expression, attributes=dict(attributes or {}))
        )
        return View.of(output, spec)

    def elementwise(self, node: fx.Node, kind: Kind, expression: Expression, operands: Sequence[View]) -> View | None:
        """An elementwise or row-wise operator, in the order in which its largest operand lies in memory."""
        spec = self.spec(node)
        if spec.dtype not in _FLOATING or not spec.shape or spec.numel == 0:
            return None
        if any(self.dtype(v) not in _FLOATING for v in operands):
            return None
        full = next((v for v in operands if v.shape == spec.shape and not self.is_constant(v)), None)
        if full is None:
            return None
        order = full.memory_order()
        inverse = tuple(order.index(d) for d in range(len(order)))
        inputs = []
        for view in operands:
            pad = len(spec.shape) - len(view.dims)
            if order != tuple(range(len(order))):
                view = view.expand((1,) * pad + view.shape).permute(order)
            inputs.append(self.realize(view))
        shape = tuple(spec.shape[d] for d in order)
        out = self.emit(kind, node.name, inputs, TensorSpec.contiguous(shape, spec.dtype), expression=expression)
        return out.permute(inverse)

    def _extern(self, node: fx.Node) -> Value:
        """Run the ATen operator as it is; fold it when all it reads is constant."""
        views: list[View] = []

        def convert(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                views.append(self.view(argument))
                return Ref(len(views) - 1)
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
            name = self.derived(node.name, tuple(self.realize(v) for v in views), call)
            return View.of(name, self.values[name])
        specs = [TensorSpec.contiguous(r.shape, r.dtype) for r in results]
        suffixes = [node.name] if len(specs) == 1 else [f"{node.name}_{i}" for i in range(len(specs))]
        inputs = tuple(self.realize(v) for v in views)
        names = tuple(self.add_value(s, spec) for s, spec in zip(suffixes, specs, strict=True))
        reason = f"no kernel family knows {node.target}"
        self.operators.append(Operator(names[0], Kind.EXTERN, inputs, names, call=call, reason=reason))
        found = tuple(View.of(n, s) for n, s in zip(names, specs, strict=True))
        return found if isinstance(val, (tuple, list)) else found[0]

    def _conjoin(self, node: fx.Node, value: Conjunction) -> View:
        inputs = (self.realize(value.constant), self.realize(value.runtime))
        spec = self.spec(node)
        name = self.add_value(node.name, spec)
        call = TorchCall(torch.logical_and, (Ref(0), Ref(1)))
        self.operators.append(Operator(name, Kind.EXTERN, inputs, (name,), call=call, reason="a mask made at run time"))
        return View.of(name, spec)

    # ---- linear layers

    def linear(self, node: fx.Node, x: View, weight: View, bias: View | None, transposed: bool) -> View | None:
        """x · Wᵀ (+ bias), W constant, as ``gemm`` and ``bias``; rows in the order in which x lies in memory."""
        if self.dtype(x) not in _FLOATING or self.dtype(weight) != self.dtype(x) or 0 in x.shape:
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
        out = self.emit(Kind.GEMM, name, inputs, spec, attributes={"transposed": transposed})
        if bias is not None:
            out = self.emit(Kind.BIAS, node.name, (out.base, self.realize(bias)), spec, expression=ex.binary(Op.ADD))
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
        s = self.emit(Kind.QK, f"{name}_qk", (self.realize(q), self.realize(k)), scores).base
        if scale != 1.0:
            b = Builder()
            scaled = b.build(b.apply(Op.MUL, b.input(0), b.constant(scale)))
            s = self.emit(
                Kind.SCALE, f"{name}_scale", (s,), scores, expression=scaled, attributes={"scale": scale}
            ).base
        if self.attention is not None and q_len == kv_len:
            pattern = self.attention if pattern is None else pattern & self.attention
        runtime: list[tuple[View, torch.dtype]] = []
        for use in masks:
            constant, rest = self._split_mask(use, (batch, heads, q_len, kv_len), rank)
            if constant is not None:
                pattern = constant if pattern is None else pattern & constant
            if rest is not None:
                runtime.append((rest, self.dtype(rest)))
        if pattern is not None:
            pattern = _hashable(pattern, q_len, kv_len)
        if causal or pattern is not None:
            attributes = {"causal": causal, "pattern": pattern}
            s = self.emit(Kind.MASK, f"{name}_mask", (s,), scores, attributes=attributes).base
        for i, (view, mask_dtype) in enumerate(runtime):
            expression = ex.binary(Op.ADD) if mask_dtype.is_floating_point else None
            inputs = (s, self.realize(view))
            attributes = {"causal": False, "pattern": None}
            s = self.emit(
                Kind.MASK, f"{name}_mask{i or ''}", inputs, scores, expression=expression, attributes=attributes
            ).base
        p = self.emit(Kind.SOFTMAX, f"{name}_softmax", (s,), scores, expression=ex.masked_softmax()).base
        # Heads lie inside a token and tokens as they do in q, so that merging heads afterwards moves nothing.
        width = v.shape[3]
        token = heads * width
        q_strides = q.strides()
        time_first = q_strides is not None and batch > 1 and q_len > 1 and q_strides[2] > q_strides[0] > 0
        batch_stride, row_stride = (token, batch * token) if time_first else (q_len * token, token)
        spec = TensorSpec((batch, heads, q_len, width), dtype, (batch_stride, width, row_stride, 1))
        out = self.emit(Kind.PV, name, (p, self.realize(v)), spec)
        merged = out.reshape(out_shape)
        if merged is None:
            raise CaptureError(f"{node} has the shape {out_shape}, which its operands do not give")
        return merged

    def _split_mask(
        self, use: attention_patterns.MaskUse, shape: tuple[int, int, int, int], rank: int
    ) -> tuple[Mask | None, View | None]:
        """A mask operand as a constant pattern, a run-time tensor (expanded to ``shape``), or both.

        It broadcasts against scores of ``rank`` dimensions.
        """
        full = {4: shape, 3: (shape[0], *shape[2:]), 2: shape[2:]}[rank]
        value = self.env[use.node]
        if isinstance(value, Conjunction) and not use.inverted:
            constant, _ = self._constant_mask(_four_dims(value.constant.expand(full)), use)
            if constant is not None:
                return constant, _four_dims(value.runtime.expand(full))
        view = self.view(use.node)
        if self.is_constant(view):
            constant, known = self._constant_mask(_four_dims(view.expand(full)), use)
            if known:
                return constant, None
        if use.inverted:
            spec = TensorSpec.contiguous(view.shape, torch.bool)
            name = self.add_value(f"{view.base}_not", spec)
            call = TorchCall(torch.logical_not, (Ref(0),))
            inputs = (self.realize(view),)
            self.operators.append(
                Operator(name, Kind.EXTERN, inputs, (name,), call=call, reason="a mask made at run time")
            )
            view = View.of(name, spec)
        return None, _four_dims(view.expand(full))

    def _constant_mask(self, view: View, use: attention_patterns.MaskUse) -> tuple[Mask | None, bool]:
        """A constant mask as a pattern; (None, True) when it allows everything, (None, False) when it is no pattern
        (a bias, or different for each sample)."""
        tensor = self.constant_tensor(view).detach()
        if tensor.dtype != torch.bool:
            lowest = torch.finfo(tensor.dtype).min / 2 if tensor.is_floating_point() else None
            if lowest is None or not bool(((tensor == 0) | (tensor < lowest)).all()):
                return None, False
            # Adding such a number leaves a probability of exactly zero wherever a row allows anything.
            allowed = tensor == 0
            if not bool(allowed.any(-1).all()) and not bool(torch.isneginf(tensor[~allowed]).all()):
                return None, False
            tensor = allowed
        elif use.inverted:
            tensor = ~tensor
        if bool(tensor.all()):
            return None, True
        if not bool((tensor == tensor[:1]).all()):
            return None, False
        tensor = tensor[0]
        if tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
            tensor = tensor[:1]
        dense = tensor[0] if tensor.shape[0] == 1 else tensor
        return _named_mask(dense.contiguous()), True


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


def _view_kind(base: TensorSpec, spec: TensorSpec) -> Kind:
    if len(spec.shape) == 4 and len(base.shape) < 4:
        return Kind.SPLIT_HEADS
    if len(base.shape) == 4 and len(spec.shape) < 4:
        return Kind.MERGE_HEADS
    return Kind.VIEW


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


def _finish(raiser: _Raiser, outputs: tuple[str, ...]) -> OperatorGraph:
    """Drop what no output needs, and let everything that does not depend on kernels run first."""
    needed = set(outputs)
    kept: list[Operator] = []
    for op in reversed(raiser.operators):
        if op.is_random or any(o in needed for o in op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    kept.reverse()
    late: set[str] = set()
    random_late = False
    first: list[Operator] = []
    rest: list[Operator] = []
    for op in kept:
        early = op.kind in (Kind.EXTERN, *VIEWS) and not any(v in late for v in op.inputs)
        early = early and not (op.is_random and random_late)
        (first if early else rest).append(op)
        if not early:
            late.update(op.outputs)
            random_late |= op.is_random
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
        inspected=frozenset(raiser._inspected),
    )


# ---- handlers: one a form of ATen operator; None means that the node stays an extern

Handler = Callable[[_Raiser, fx.Node], "Value | None"]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for target in targets:
            _HANDLERS[target] = handler
        return handler

    return register


@_handles(aten._assert_tensor_metadata.default)
def _nothing(r: _Raiser, node: fx.Node) -> Value:
    return ()


@_handles(
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
)
def _same(r: _Raiser, node: fx.Node) -> Value | None:
    value = r.env[node.args[0]]
    source, result = node.args[0].meta["val"], node.meta["val"]
    if isinstance(value, Conjunction):
        return value if source.dtype == result.dtype else None
    if source.dtype == result.dtype:
        return value
    b = Builder()
    return r.elementwise(node, Kind.POINTWISE, b.build(b.input(0)), [r.view(node.args[0])])


@_handles(aten.dropout.default)
def _dropout(r: _Raiser, node: fx.Node) -> Value | None:
    return r.env[node.args[0]] if not node.args[2] or node.args[1] == 0 else None


@_handles(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(r: _Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    shape = tuple(node.meta["val"].shape)
    reshaped = view.reshape(shape)
    if reshaped is None and view.shape and 0 not in shape and 0 not in view.shape and not r.is_constant(view):
        copied = View.of(*_named(r, r.realize(View(view.base, view.dims, view.offset))))
        reshaped = copied.reshape(shape)
    return reshaped


def _named(r: _Raiser, name: str) -> tuple[str, TensorSpec]:
    return name, r.values[name]


@_handles(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.mT.default)
def _transpose(r: _Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    n = len(view.dims)
    if n == 0:
        return view
    a, b = (d % n for d in (node.args[1:3] or (-2, -1)))
    order = list(range(n))
    order[a], order[b] = b, a
    return view.permute(order)


@_handles(aten.t.default, aten.numpy_T.default)
def _reverse(r: _Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute(tuple(reversed(range(len(view.dims)))))


@_handles(aten.permute.default)
def _permute(r: _Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute([d % len(view.dims) for d in node.args[1]])


@_handles(aten.select.int)
def _select(r: _Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = node.args[1] % len(view.dims)
    return view.select(dim, node.args[2] % view.shape[dim])


@_handles(aten.slice.Tensor)
def _slice(r: _Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    size = view.shape[dim]
    start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = node.args[4] if len(node.args) > 4 else 1
    count = node.meta["val"].shape[dim]
    return view.slice(dim, start, count, step) if count else None


@_handles(aten.expand.default)
def _expand(r: _Raiser, node: fx.Node) -> Value:
    shape = tuple(node.meta["val"].shape)
    value = r.env[node.args[0]]
    return value.expand(shape) if isinstance(value, Conjunction) else r.view(node.args[0]).expand(shape)


@_handles(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
)
def _split(r: _Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(view.dims)
    parts: list[View] = []
    start = 0
    for result in node.meta["val"]:
        part = view.slice(dim, start, result.shape[dim], 1)
        if part is None:
            return None
        parts.append(part)
        start += result.shape[dim]
    return tuple(parts)


@_handles(aten.unbind.int)
def _unbind(r: _Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    parts = [view.select(dim, i) for i in range(view.shape[dim])]
    return None if any(p is None for p in parts) else tuple(p for p in parts if p is not None)


@_handles(python_operator.getitem)
def _getitem(r: _Raiser, node: fx.Node) -> Value:
    value = r.env[node.args[0]]
    if not isinstance(value, tuple):
        raise CaptureError(f"{node.args[0]} is indexed but is not a tuple")
    part: View = value[node.args[1]]
    return part


@_handles(aten.linear.default)
def _linear(r: _Raiser, node: fx.Node) -> Value | None:
    x, weight = r.view(node.args[0]), r.view(node.args[1])
    if not r.is_constant(weight) or len(weight.dims) != 2:
        return None
    siblings = _siblings(r, node)
    if len(siblings) > 1:
        _merged_linear(r, siblings, x)
        return r.env[node]
    bias = r.view(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    if bias is not None and not r.is_constant(bias):
        return None
    return r.linear(node, x, weight, bias, transposed=True)


def _siblings(r: _Raiser, node: fx.Node) -> list[fx.Node]:
    """This and the next linear layers that read the same value with constant weights of one width and dtype."""

    def signature(n: fx.Node) -> tuple[Any, ...] | None:
        if n.target is not aten.linear.default or n.args[0] is not node.args[0]:
            return None
        bias = n.args[2] if len(n.args) > 2 else None
        operands = [n.args[1], *([bias] if bias is not None else [])]
        if any(o not in r.env or not isinstance(r.env[o], View) or not r.is_constant(r.view(o)) for o in operands):
            return None
        return (bias is None, r.dtype(r.view(n.args[1])))

    mine = signature(node)
    if mine is None:
        return [node]
    return [n for n in node.args[0].users if n not in r.env and signature(n) == mine][:_MERGE_LIMIT]


def _merged_linear(r: _Raiser, nodes: Sequence[fx.Node], x: View) -> None:
    """One GEMM for several: weights concatenated, results its slices."""
    first = nodes[0]
    weights = tuple(r.realize(r.view(n.args[1])) for n in nodes)
    sizes = [r.values[w].shape[0] for w in weights]
    total = sum(sizes)
    join = TorchCall(torch.cat, ([Ref(i) for i in range(len(nodes))],))
    weight = r.derived(f"{first.name}_weights", weights, join, (total, r.values[weights[0]].shape[1]))
    bias = None
    if len(first.args) > 2 and first.args[2] is not None:
        biases = tuple(r.realize(r.view(n.args[2])) for n in nodes)
        name = r.derived(f"{first.name}_biases", biases, join, (total,))
        bias = View.of(name, r.values[name])
    out = r.linear(first, x, View.of(weight, r.values[weight]), bias, transposed=True)
    start = 0
    for n, size in zip(nodes, sizes, strict=True):
        part = out.slice(len(out.dims) - 1, start, size, 1) if out is not None else None
        r.env[n] = part if part is not None else r._extern(n) or ()
        start += size


@_handles(aten.addmm.default)
def _addmm(r: _Raiser, node: fx.Node) -> Value | None:
    bias, x, weight = (r.view(a) for a in node.args[:3])
    if node.kwargs or not r.is_constant(weight) or not r.is_constant(bias) or len(bias.dims) != 1:
        return None
    return _matrix_product(r, node, x, weight, bias)


@_handles(aten.mm.default, aten.matmul.default)
def _matmul(r: _Raiser, node: fx.Node) -> Value | None:
    x, weight = r.view(node.args[0]), r.view(node.args[1])
    if not r.is_constant(weight) or len(weight.dims) != 2 or len(x.dims) < 2 or r.is_constant(x):
        return None
    return _matrix_product(r, node, x, weight, None)


def _matrix_product(r: _Raiser, node: fx.Node, x: View, weight: View, bias: View | None) -> Value | None:
    strides = weight.strides()
    if strides is not None and strides[0] == 1 and weight.shape[0] > 1:
        # x · Wᵀ written out: use the weight as it is stored.
        return r.linear(node, x, weight.permute((1, 0)), bias, transposed=True)
    return r.linear(node, x, weight, bias, transposed=False)


@_handles(aten.layer_norm.default)
def _layer_norm(r: _Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if len(node.args[1]) != 1:
        return None
    weight = node.args[2] if len(node.args) > 2 else None
    bias = node.args[3] if len(node.args) > 3 else None
    eps = node.args[4] if len(node.args) > 4 else 1e-5
    operands = [x] + [r.view(a) for a in (weight, bias) if a is not None]
    expression = ex.layer_norm(eps, weight is not None, bias is not None)
    return r.elementwise(node, Kind.NORM, expression, operands)


@_handles(aten.rms_norm.default)
def _rms_norm(r: _Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if len(node.args[1]) != 1:
        return None
    weight = node.args[2] if len(node.args) > 2 else None
    eps = node.args[3] if len(node.args) > 3 and node.args[3] is not None else torch.finfo(r.dtype(x)).eps
    operands = [x] + ([r.view(weight)] if weight is not None else [])
    return r.elementwise(node, Kind.NORM, ex.rms_norm(eps, weight is not None), operands)


@_handles(aten.softmax.int, aten._softmax.default)
def _softmax(r: _Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if not x.dims or node.args[1] % len(x.dims) != len(x.dims) - 1:
        return None
    return r.elementwise(node, Kind.SOFTMAX, ex.softmax(), [x])


@_handles(aten.embedding.default)
def _embedding(r: _Raiser, node: fx.Node) -> Value | None:
    table, index = r.view(node.args[0]), r.view(node.args[1])
    spec = r.spec(node)
    if r.is_constant(index) or not r.is_constant(table) or spec.dtype not in _FLOATING or spec.numel == 0:
        return None
    strides = index.strides()
    if strides is None or not TensorSpec.contiguous(index.shape, torch.int64).has_strides(strides):
        return None
    return r.emit(Kind.EMBEDDING, node.name, (r.realize(table), r.realize(index)), spec)


@_handles(aten.scaled_dot_product_attention.default)
def _sdpa(r: _Raiser, node: fx.Node) -> Value | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = (r.view(given[n]) for n in names[:3])
    if given.get("dropout_p", 0.0) or not 2 <= len(q.dims) <= 4 or r.dtype(q) not in _FLOATING or 0 in q.shape:
        return None
    if 0 in k.shape or 0 in v.shape:
        return None
    mask = given.get("attn_mask")
    if not len(q.dims) == len(k.dims) == len(v.dims) or (mask is not None and mask.meta["val"].dim() > len(q.dims)):
        return None
    if len(q.dims) > 2 and not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:-2] == v.shape[1:-2]):
        return None
    grouped = len(q.dims) == 4 and q.shape[1] != k.shape[1]
    if grouped and not (given.get("enable_gqa") and q.shape[1] % k.shape[1] == 0):
        return None
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    masks = [] if mask is None else [attention_patterns.MaskUse(mask, inverted=False)]
    return r.attention_from(node, q, k, v, scale, masks, causal=bool(given.get("is_causal", False)))


@_handles(torch.ops.fuser.sparse_attention.default)
def _sparse_attention(r: _Raiser, node: fx.Node) -> Value | None:
    q, k, v = (r.view(n) for n in node.args[:3])
    _, _, _, key, runtime, scale = node.args
    if r.dtype(q) not in _FLOATING or any(0 in t.shape for t in (q, k, v)):
        return None
    pattern = mask_of(key)
    pattern.validate(q.shape[2], k.shape[2])
    masks = [] if runtime is None else [attention_patterns.MaskUse(runtime, inverted=False)]
    return r.attention_from(node, q, k, v, scale, masks, pattern=None if isinstance(pattern, Dense) else pattern)


@_handles(torch.ops.aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
def _and(r: _Raiser, node: fx.Node) -> Value | None:
    """Masks: a constant that allows everything vanishes, another is kept apart from the run-time part."""
    if node.meta["val"].dtype != torch.bool:
        return None
    shape = tuple(node.meta["val"].shape)
    values = [r.env[a] for a in node.args if isinstance(a, fx.Node)]
    if len(values) != 2 or any(isinstance(v, tuple) for v in values):
        return None
    views = [v for v in values if isinstance(v, View)]
    if any(r.dtype(v) != torch.bool for v in views):
        return None
    for i, value in enumerate(values):
        other = values[1 - i]
        if isinstance(value, View) and r.is_constant(value):
            if bool(r.constant_tensor(value).all()):
                return other.expand(shape) if not isinstance(other, tuple) else None
            if isinstance(other, View) and not r.is_constant(other):
                return Conjunction(value.expand(shape), other.expand(shape))
    return None


# ---- elementwise operators

_UNARY = {
    aten.relu.default: Op.RELU,
    aten.silu.default: Op.SILU,
    aten.tanh.default: Op.TANH,
    aten.sigmoid.default: Op.SIGMOID,
    aten.exp.default: Op.EXP,
    aten.log.default: Op.LOG,
    aten.erf.default: Op.ERF,
    aten.sqrt.default: Op.SQRT,
    aten.rsqrt.default: Op.RSQRT,
    aten.reciprocal.default: Op.RECIPROCAL,
    aten.neg.default: Op.NEG,
    aten.abs.default: Op.ABS,
}
_ACTIVATIONS = frozenset({Op.RELU, Op.SILU, Op.TANH, Op.SIGMOID, Op.GELU, Op.GELU_TANH})


@_handles(*_UNARY)
def _unary(r: _Raiser, node: fx.Node) -> Value | None:
    op = _UNARY[node.target]
    kind = Kind.ACTIVATION if op in _ACTIVATIONS else Kind.POINTWISE
    return r.elementwise(node, kind, ex.unary(op), [r.view(node.args[0])])


@_handles(aten.gelu.default)
def _gelu(r: _Raiser, node: fx.Node) -> Value | None:
    op = Op.GELU_TANH if node.kwargs.get("approximate", "none") == "tanh" else Op.GELU
    return r.elementwise(node, Kind.ACTIVATION, ex.unary(op), [r.view(node.args[0])])


_BINARY = {
    aten.add.Tensor: Op.ADD,
    aten.add.Scalar: Op.ADD,
    aten.sub.Tensor: Op.SUB,
    aten.sub.Scalar: Op.SUB,
    aten.mul.Tensor: Op.MUL,
    aten.mul.Scalar: Op.MUL,
    aten.div.Tensor: Op.DIV,
    aten.div.Scalar: Op.DIV,
    aten.maximum.default: Op.MAXIMUM,
    aten.minimum.default: Op.MINIMUM,
}


@_handles(*_BINARY)
def _binary(r: _Raiser, node: fx.Node) -> Value | None:
    op = _BINARY[node.target]
    if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return None
    b = Builder()
    operands: list[View] = []
    at: list[int] = []
    for argument in node.args[:2]:
        if isinstance(argument, fx.Node):
            scalar = _scalar(r, argument)
            if scalar is not None:
                at.append(b.constant(scalar))
                continue
            operands.append(r.view(argument))
            at.append(b.input(len(operands) - 1))
        elif isinstance(argument, (int, float)) and not isinstance(argument, bool):
            at.append(b.constant(float(argument)))
        else:
            return None
    if not operands:
        return None
    kind = Kind.POINTWISE
    running = [v for v in operands if not r.is_constant(v)]
    if op is Op.ADD and len(operands) == 2:
        bias = len(running) == 1 and any(len(v.dims) == 1 and r.is_constant(v) for v in operands)
        kind = Kind.BIAS if bias else Kind.RESIDUAL
    return r.elementwise(node, kind, b.build(b.apply(op, *at)), operands)


def _scalar(r: _Raiser, node: fx.Node) -> float | None:
    """The number that a constant of no dimensions holds."""
    value = r.env[node]
    if isinstance(value, View) and not value.dims and r.is_constant(value) and r.dtype(value).is_floating_point:
        return float(r.constant_tensor(value))
    return None


@_handles(aten.pow.Tensor_Scalar)
def _pow(r: _Raiser, node: fx.Node) -> Value | None:
    exponent = node.args[1]
    b = Builder()
    x = b.input(0)
    if exponent in (1, 2, 3, 4):
        y = x
        for _ in range(int(exponent) - 1):
            y = b.apply(Op.MUL, y, x)
    elif exponent == 0.5:
        y = b.apply(Op.SQRT, x)
    elif exponent == -0.5:
        y = b.apply(Op.RSQRT, x)
    elif exponent == -1:
        y = b.apply(Op.RECIPROCAL, x)
    else:
        return None
    return r.elementwise(node, Kind.POINTWISE, b.build(y), [r.view(node.args[0])])
