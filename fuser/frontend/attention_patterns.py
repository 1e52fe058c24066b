"""Attention written out: finding matmul, scale, mask, softmax and matmul in a captured graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fuser.frontend.sizes import Traced, traced
from fuser.ir.scores import ScoreRule, SoftCap

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_WITH_SUM = aten.baddbmm.default
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)
_PASS = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
# A kernel keeps scores and probabilities in fp32 between the products, as PyTorch's own attention does. So they may
# pass through dtypes that hold all that the model's own does; a rounding to less is more than attention.
_HOLDS = {
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
}
FLOOR = -1e30
"""What adds so little leaves a probability of exactly zero next to any ordinary score."""


@dataclass(frozen=True)
class MaskUse:
    """A mask operand: boolean (True = may attend, or its inverse) or additive, as the node's dtype says.

    ``fill`` is the score of what a boolean mask forbids. A finite one is so low that nothing is left of the score that
    it replaces: adding it gives the same. It forbids nothing, though, in a row that consists of it. ``shape`` is that
    of the scores which the operand broadcasts to, where batch and heads are written in another way than in the pattern.
    """

    node: fx.Node
    inverted: bool
    fill: float = -math.inf
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pattern:
    """softmax(rule(scale · factors · q · kᵀ) + masks) · v; ``k`` is the transposed key as the product reads it.

    ``shape`` is that of the scores; products may have batch and heads as one dimension. ``factors`` broadcast to the
    scores as masks do, one number for all queries and keys of a head. With ``one_head``, that of keys and values serves
    the queries of all heads.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    masks: tuple[MaskUse, ...]
    rule: ScoreRule | None
    shape: tuple[int, ...]
    factors: tuple[MaskUse, ...]
    one_head: bool


@dataclass(frozen=True)
class Role:
    """What a node does in a pattern; only ``pv`` carries it, the others vanish."""

    part: str
    pattern: Pattern | None = None


Numbers = Callable[[fx.Node], float | None]
"""Gives the number that a placeholder without dimensions holds, if it is known."""


@dataclass
class _Walk:
    numbers: Numbers
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    scale: float = 1.0
    rule: ScoreRule | None = None
    masks: list[MaskUse] = field(default_factory=list)
    factors: list[MaskUse] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether what is added to scores here is added to what the softmax reads."""
        return self.scale == 1.0 and self.rule is None and not self.factors


def find(graph: fx.Graph, numbers: Numbers = lambda _: None) -> Mapping[fx.Node, Role]:
    """Roles of all nodes of all attentions that are written as products and a softmax.

    A pattern counts only when nothing else reads its scores or probabilities: otherwise they must exist in memory.
    """
    roles: dict[fx.Node, Role] = {}
    for node in graph.nodes:
        if node.target in _SOFTMAX:
            found = _match(node, numbers)
            if found is not None:
                roles.update(found)
    return roles


def _value(node: Any) -> Traced | None:
    value = traced(node)
    return value if isinstance(value, Traced) else None


def _match(softmax: fx.Node, numbers: Numbers) -> dict[fx.Node, Role] | None:
    scores = _value(softmax)
    if scores is None or scores.ndim not in (3, 4) or softmax.args[1] % scores.ndim != scores.ndim - 1:
        return None
    found = _probabilities(softmax)
    if found is None:
        return None
    *inner, output = found
    walk = _Walk(numbers, scores.shape, _HOLDS.get(traced(output).dtype, ()), nodes=[softmax, *inner])
    if any(traced(node).dtype not in walk.dtypes for node in walk.nodes):
        return None
    product = _scores(softmax.args[0], walk)
    if product is None:
        return None
    q, k = product.args[1:3] if product.target is _WITH_SUM else product.args[:2]
    q = _prescaled(q, walk)
    k = _prescaled(k, walk)
    v, first, last = _value(output.args[1]), _value(product), _value(output)
    if v is None or first is None or last is None or max(first.ndim, last.ndim) > 4:
        return None
    # Plain batched products only, but for one head of keys and values that all queries share: other broadcasting of
    # batch dimensions is not attention as we know it.
    operands = [(_value(q), first), (_value(k), first), (v, last)]
    if {traced(use.node).dtype for use in walk.factors} | {t.dtype for t, _ in operands if t} != {last.dtype}:
        return None
    shared = [_has_one_head(t, of) for t, of in operands]
    if one_head := any(shared):
        if shared != [False, True, True] or len({t.shape[:-2] for t in (scores, first, last)}) > 1:
            return None
        operands = operands[:1]
    if any(t is None or t.ndim < 3 or t.shape[:-2] != of.shape[:-2] for t, of in operands):
        return None
    shape = max((scores.shape, first.shape, (*last.shape[:-1], scores.shape[-1])), key=len)
    masks, factors = (
        tuple(use if use.shape != shape else replace(use, shape=None) for use in reversed(uses))
        for uses in (walk.masks, walk.factors)
    )
    pattern = Pattern(q, k, output.args[1], walk.scale, masks, walk.rule, shape, factors, one_head)
    roles = {node: Role("inner") for node in walk.nodes}
    roles[product] = Role("qk")
    roles[output] = Role("pv", pattern)
    return roles


def _has_one_head(operand: Traced | None, product: Traced) -> bool:
    """Whether one head of an operand serves all of a product's."""
    if operand is None or product.ndim != 4 or product.shape[1] == 1:
        return False
    return operand.shape[:-2] == (product.shape[0], 1)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if user.target is not aten._assert_tensor_metadata.default]
    return users[0] if len(users) == 1 else None


def _scores(node: Any, walk: _Walk) -> fx.Node | None:
    """From the softmax's operand back to the product, collecting scales and masks."""
    while isinstance(node, fx.Node):
        value = _value(node)
        if _only_user(node) is None or value is None or value.shape != walk.shape or value.dtype not in walk.dtypes:
            return None
        if node.target in _PRODUCTS:
            return node
        if node.target is _WITH_SUM:
            return node if _summed(node, walk) else None
        walk.nodes.append(node)
        if node.target in _RESHAPES:
            if not _regroups(node):
                return None
            node = node.args[0]
            walk.shape = traced(node).shape
            continue
        step = _score_step(node, walk)
        if step is None:
            return None
        node = step
    return None


def _summed(node: fx.Node, walk: _Walk) -> bool:
    """Take in what ``beta · bias + alpha · q · kᵀ`` is besides a product."""
    alpha, beta = (_number(node.kwargs.get(name, 1), walk.numbers) for name in ("alpha", "beta"))
    if alpha is None or beta not in (0.0, 1.0) or (beta and not walk.is_plain):
        return False
    if beta:
        walk.masks.append(MaskUse(node.args[0], inverted=False, shape=walk.shape))
    walk.scale *= alpha
    return True


def _regroups(node: fx.Node) -> bool:
    """Whether scores or probabilities keep their rows and keys in another shape."""
    before, after = _value(node.args[0]), _value(node)
    if before is None or after is None or min(before.ndim, after.ndim) < 3:
        return False
    return before.shape[-2:] == after.shape[-2:]


def _score_step(node: fx.Node, walk: _Walk) -> fx.Node | None:
    target, args = node.target, node.args
    value = _value(node)
    if target in _PASS or (target in _CASTS and value is not None):
        return args[0]
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        for this, other in ((args[0], args[1]), (args[1], args[0])):
            number = _number(other, walk.numbers)
            if number is not None and isinstance(this, fx.Node) and _value(this) is not None:
                if target in (aten.div.Tensor, aten.div.Scalar):
                    if this is not args[0]:
                        return None
                    number = 1.0 / number
                walk.scale *= number
                return this
        if target is aten.mul.Tensor:
            for this, other in ((args[0], args[1]), (args[1], args[0])):
                factor = _value(other)
                if factor is None or any(size != 1 for size in factor.shape[-2:]):
                    continue
                if _leads_to_product(this) and traced(this).shape == walk.shape and factor.dtype == traced(this).dtype:
                    walk.factors.append(MaskUse(other, inverted=False, shape=walk.shape))
                    return this
        return None
    if target is aten.tanh.default:
        # cap · tanh(x): what makes x is a factor of the scores in the rule, which divides them by the cap.
        if walk.rule is not None or walk.factors or not 0.0 < walk.scale < math.inf:
            return None
        walk.rule = SoftCap(walk.scale)
        return args[0]
    if target is aten.add.Tensor and not node.kwargs:
        for this, other in ((args[0], args[1]), (args[1], args[0])):
            scores, bias = _value(this), _value(other)
            if scores is None or bias is None or scores.shape != value.shape:  # type: ignore[union-attr]
                continue
            if _leads_to_product(this) and bias.dtype.is_floating_point:
                if not walk.is_plain:
                    return None
                walk.masks.append(MaskUse(other, inverted=False, shape=walk.shape))
                return this
        return None
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _filled(args[0], args[1], args[2], True, walk)
    if target in (aten.where.self, aten.where.ScalarOther) and _number(args[2], walk.numbers) is not None:
        return _filled(args[1], args[0], args[2], False, walk)
    if target in (aten.where.self, aten.where.ScalarSelf):
        return _filled(args[2], args[0], args[1], True, walk)
    return None


def _filled(scores: fx.Node, mask: fx.Node, fill: Any, inverted: bool, walk: _Walk) -> fx.Node | None:
    """The scores below a mask whose ``fill``, scaled as they are afterwards, is so low that its probability is exactly
    zero next to any ordinary score."""
    number = _number(fill, walk.numbers)
    if number is None or not walk.scale > 0 or not number * walk.scale <= FLOOR or walk.rule is not None:
        return None
    if walk.factors:
        return None
    # What fp32 cannot hold after scaling has become infinite.
    lowest = number * walk.scale
    lowest = lowest if lowest >= torch.finfo(torch.float32).min else -math.inf
    walk.masks.append(MaskUse(mask, inverted, lowest, walk.shape))
    return scores


def _leads_to_product(node: Any, depth: int = 8) -> bool:
    while isinstance(node, fx.Node) and depth:
        if node.target in _PRODUCTS or node.target is _WITH_SUM:
            return True
        if not node.args:
            return False
        if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            return any(_leads_to_product(value, depth - 1) for value in node.args[1:])
        node, depth = node.args[0], depth - 1
    return False


def _number(value: Any, numbers: Numbers) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    constant = _value(value)
    if constant is not None and constant.ndim == 0:
        return _constant_number(value, numbers)
    return None


def _constant_number(node: fx.Node, numbers: Numbers) -> float | None:
    """The number that a node of constants alone computes: ``torch.tensor(8.0)``, ``sqrt`` of it, ``full``."""
    if node.op == "placeholder":
        return numbers(node)
    if node.op != "call_function":
        return None
    if node.target is aten.full.default and not node.args[0]:
        return float(node.args[1])
    if node.target is aten.scalar_tensor.default:
        return float(node.args[0])
    if node.target is aten.sqrt.default:
        inner = _number(node.args[0], numbers)
        return None if inner is None or inner < 0 else math.sqrt(inner)
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        factors = [_number(argument, numbers) for argument in node.args]
        return None if None in factors else math.prod(f for f in factors if f is not None)
    cast = node.target in _CASTS and traced(node).dtype in (torch.float32, torch.float64)
    if cast or node.target in (*_PASS, aten.detach_.default, aten.lift_fresh_copy.default):
        return _number(node.args[0], numbers)
    return None


def _probabilities(softmax: fx.Node) -> list[fx.Node] | None:
    """What follows the softmax, to the product with the values."""
    node = softmax
    found: list[fx.Node] = []
    while True:
        user = _only_user(node)
        if user is None:
            return None
        if user.target in _PRODUCTS:
            return [*found, user] if user.args[0] is node and user.args[1] is not node else None
        evaluated = user.target is aten.dropout.default and (not user.args[2] or user.args[1] == 0)
        regrouped = user.target in _RESHAPES and _regroups(user)
        cast = user.target in _CASTS and _value(user) is not None
        if not (evaluated or regrouped or cast or user.target in _PASS):
            return None
        found.append(user)
        node = user


def _prescaled(node: Any, walk: _Walk) -> Any:
    """Move a scale on q or k alone to the scores, where it costs nothing."""
    if (
        isinstance(node, fx.Node)
        and node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
        and _only_user(node) is not None
    ):
        number = _number(node.args[1], walk.numbers)
        if number is not None and number != 0 and isinstance(node.args[0], fx.Node):
            divides = node.target in (aten.div.Tensor, aten.div.Scalar)
            walk.scale *= 1.0 / number if divides else number
            walk.nodes.append(node)
            return node.args[0]
    return node
