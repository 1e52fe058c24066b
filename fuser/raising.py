"""Raising: from a captured ATen graph to the operator graph.

Views are composed, not executed; what depends on constants alone becomes a constant; linear layers that read the same
value become one GEMM; attention is recognized in every form that PyTorch users write it. What is not understood stays
an ``extern`` operator that PyTorch runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fuser import attention_patterns
from fuser.aten import HANDLERS
from fuser.capture import Captured
from fuser.ir import operators as kinds
from fuser.ir.errors import CaptureError, MaskError
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.masks import Mask, from_dense
from fuser.ir.operators import Extern, Ref, Semantics, TorchCall
from fuser.kernels.base import FLOATING
from fuser.views import Conjunction, Value, View

aten = torch.ops.aten
_FOLD_LIMIT = 1 << 28


def raise_graph(
    captured: Captured, attention: Mask | None = None, floating: frozenset[torch.dtype] = FLOATING
) -> OperatorGraph:
    """The operator graph of a captured model.

    ``attention`` is a mask that every self-attention (as many keys as queries) is restricted to; ``floating`` holds the
    dtypes that kernels of the target store (:func:`fuser.kernels.base.floating`). Raises CaptureError for graphs that
    mutate tensors.
    """
    return Raiser(captured, attention, floating).run()


class Raiser:
    def __init__(self, captured: Captured, attention: Mask | None, floating: frozenset[torch.dtype]) -> None:
        self.captured = captured
        self.attention = attention
        self.floating = floating
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
        self.operators.append(Operator(name, Extern(call, "a copy to return"), (source,), (name,)))
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
        handler = HANDLERS.get(node.target)
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
            self.operators.append(Operator(name, _view_kind(base, spec)(call), (view.base,), (name,)))
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

    def emit(self, semantics: Semantics, name: str, inputs: Sequence[str], spec: TensorSpec) -> View:
        """Append an operator with one output of its own storage."""
        output = self.add_value(name, spec)
        self.operators.append(Operator(output, semantics, tuple(inputs), (output,)))
        return View.of(output, spec)

    def elementwise(self, node: fx.Node, semantics: Semantics, operands: Sequence[View]) -> View | None:
        """An elementwise or row-wise operator, in the order in which its largest operand lies in memory."""
        spec = self.spec(node)
        if spec.dtype not in self.floating or not spec.shape or spec.numel == 0:
            return None
        if any(self.dtype(v) not in self.floating for v in operands):
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
        out = self.emit(semantics, node.name, inputs, TensorSpec.contiguous(shape, spec.dtype))
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
            s = self.emit(kinds.PatternMask(causal, pattern), f"{name}_mask", (s,), scores).base
        for i, (view, mask_dtype) in enumerate(runtime):
            mask = kinds.AdditiveMask() if mask_dtype.is_floating_point else kinds.BooleanMask()
            s = self.emit(mask, f"{name}_mask{i or ''}", (s, self.realize(view)), scores).base
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
            self.operators.append(Operator(name, Extern(call, "a mask made at run time"), inputs, (name,)))
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
    """Drop what no output needs, and let everything that does not depend on kernels run first."""
    needed = set(outputs)
    kept: list[Operator] = []
    for op in reversed(raiser.operators):
        if op.semantics.is_random or any(o in needed for o in op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    kept.reverse()
    late: set[str] = set()
    random_late = False
    first: list[Operator] = []
    rest: list[Operator] = []
    for op in kept:
        early = not op.semantics.fusible and not any(v in late for v in op.inputs)
        early = early and not (op.semantics.is_random and random_late)
        (first if early else rest).append(op)
        if not early:
            late.update(op.outputs)
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
        inspected=frozenset(raiser._inspected),
    )
