"""FlexAttention's interface: its block masks as plans, and its functions of scores as what kernels know."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fuser.attention import sparse_attention
from fuser.attention.checks import check_scores
from fuser.attention.launch import say
from fuser.ir.errors import ScoreError
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import SoftCap

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

aten = torch.ops.aten
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    quantize: ScoreQuantization | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """``torch.nn.attention.flex_attention.flex_attention``, by kernels where they know what ``score_mod`` computes.

    Args:
        query, key, value: (B, H, Sq, D), (B or 1, Hkv, Sk, D) and (B or 1, Hkv, Sk, Dv).
        score_mod: a function of a score and its b, h, q_idx and kv_idx. Kernels know factors, ``c * tanh(score / c)``,
            what is added to scores, and -inf for pairs of a condition, in this order, where nothing but the score
            itself depends on the score. A sum is computed for all pairs once a call.
        block_mask: any ``BlockMask``; no dense mask is made of it.
        scale: default 1 / sqrt(D).
        enable_gqa: whether H may be a multiple of Hkv.
        return_lse: also return the log-sum-exp of each row, (B, H, Sq) fp32.
        kernel_options: for other implementations; ignored.
        return_aux: also return an ``AuxOutput`` with what is asked for. Its
            ``max_scores`` are left to PyTorch, which has them on GPUs alone.
        quantize: as in :func:`fuser.sparse_attention`; scores are predicted and compared after ``score_mod``.

    Another ``score_mod`` runs in PyTorch's own, unfused, which is said once in the log. Raises ValueError, MaskError
    and ScoreError as :func:`fuser.sparse_attention` does, and ScoreError for ``quantize`` with another ``score_mod``.
    """
    check_scores(None, quantize)
    if return_lse and return_aux is not None:
        raise ValueError("pass either return_lse or return_aux, which has lse as well")
    if query.shape[1:2] != key.shape[1:2] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: pass enable_gqa=True where heads of keys serve "
            "groups of those of queries"
        )
    if key.shape[:1] == value.shape[:1] == (1,):
        key, value = (t.expand(query.shape[0], *t.shape[1:]) for t in (key, value))
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    known: _Known | None
    if return_aux is not None and return_aux.max_scores:
        say("no kernel gives the largest scores")
        known = None
    else:
        known = _Known() if score_mod is None else _known(score_mod, query, key)
    if known is None and quantize is not None:
        raise ScoreError(
            "quantize= takes no max_scores, and a score_mod that kernels know: factors, c * tanh(score / c), what is "
            "added, and -inf for pairs of a condition, in this order"
        )
    if known is None:
        from torch.nn.attention import flex_attention as torchs

        aux: dict[str, Any] = {} if return_aux is None else {"return_aux": return_aux}
        return torchs.flex_attention(query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, **aux)
    result: Tensor | tuple[Tensor, Tensor] = sparse_attention(
        query,
        key,
        value,
        block_mask,
        bias=known.bias(query.dtype),
        score=known.cap,
        quantize=quantize,
        scale=scale * known.factor,
        return_lse=return_lse or (return_aux is not None and return_aux.lse),
    )
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import AuxOutput

    return (result, AuxOutput()) if isinstance(result, Tensor) else (result[0], AuxOutput(lse=result[1]))


@dataclass
class _Known:
    """A function of scores: ``cap`` of scores times ``factor``, plus ``added``, where ``seen``."""

    factor: float = 1.0
    cap: SoftCap | None = None
    added: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores, -inf where nothing is seen."""
        if not self.added and not self.seen:
            return None
        total = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for part in self.added:
            total = total + part
        for part in self.seen:
            total = torch.where(part, total, -math.inf)
        return total


class _UnknownError(Exception):
    """A function of scores that kernels do not know."""


class _SizesError(Exception):
    """A function of scores makes tensors of all pairs, whose number is a symbol of a trace."""


def _known(score_mod: ScoreMod, query: Tensor, key: Tensor) -> _Known | None:
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    try:
        # What a trace or a transformation of this thread would record is no part of the model.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            gradients = torch.is_grad_enabled()
            try:
                return pool.submit(_Reader(score_mod, sizes, query.device).read, gradients).result()
            except _SizesError:
                # From here on the trace is for these sizes.
                numbers = tuple(int(size) for size in sizes)
                return pool.submit(_Reader(score_mod, numbers, query.device).read, gradients).result()
    except Exception as error:
        say(f"no kernel knows the score_mod {getattr(score_mod, '__qualname__', score_mod)}: {error!s:.300}")
        return None


class _Reader:
    """Reads what a function computes from a trace of it over one pair."""

    def __init__(self, score_mod: ScoreMod, sizes: tuple[int, ...], device: torch.device) -> None:
        self._function = score_mod
        self._sizes = sizes
        self._device = device
        self._on_score: set[fx.Node] = set()

    def read(self, gradients: bool) -> _Known:
        with torch.set_grad_enabled(gradients):
            return self._read()

    def _read(self) -> _Known:
        from torch.fx.experimental.proxy_tensor import make_fx

        # Of one dimension: tables are then read by tensors, not by numbers.
        pair = [torch.zeros(1, dtype=torch.int, device=self._device) for _ in range(4)]
        with torch.no_grad():
            traced = make_fx(self._function)(torch.zeros(1, device=self._device), *pair)
        graph = traced.graph
        self._traced = traced
        self._places = list(graph.find_nodes(op="placeholder"))
        if any(isinstance(getattr(traced, str(n.target)), FakeTensor) for n in graph.find_nodes(op="get_attr")):
            raise _UnknownError("it reads tensors of a trace")
        node = self._places[0]
        self._on_score = {node}
        for other in graph.nodes:
            if not self._on_score.isdisjoint(other.all_input_nodes):
                self._on_score.add(other)
        (output,) = graph.find_nodes(op="output")
        found = _Known()
        while (users := [user for user in node.users if user is not output]) or node is not output.args[0]:
            if len(users) != 1 or node is output.args[0]:
                raise _UnknownError("it uses the score more than once")
            node = self._step(node, users[0], found)
        return found

    def _step(self, score: fx.Node, node: fx.Node, found: _Known) -> fx.Node:
        """Take in what a node does to the score; the last node of that."""
        target, args = node.target, list(node.args)
        if node.kwargs and target is not aten._to_copy.default:
            raise _UnknownError(f"{target} has keywords")
        if sum(isinstance(a, fx.Node) and a in self._on_score for a in args) != 1 or args.count(score) != 1:
            raise _UnknownError(f"{target} takes more than one value that depends on the score")
        at = args.index(score)
        plain = not found.added and not found.seen
        if target in (aten.mul.Tensor, aten.mul.Scalar) or (target in (aten.div.Tensor, aten.div.Scalar) and at == 0):
            number = self._number(args[1 - at])
            number = 1.0 / number if target in (aten.div.Tensor, aten.div.Scalar) else number
            if not plain or found.cap is not None:
                raise _UnknownError("it multiplies scores after it has changed them otherwise")
            found.factor *= number
        elif target is aten.tanh.default:
            return self._cap(node, found, plain)
        elif target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar) and len(args) == 2:
            subtracts = target in (aten.sub.Tensor, aten.sub.Scalar)
            if subtracts and at == 1:
                raise _UnknownError("it subtracts the score")
            value = self._value(args[1 - at])
            found.added.append(-value if subtracts else value)
        elif target is aten.where.self and at in (1, 2):
            if not bool(torch.isneginf(self._value(args[3 - at])).all()):
                raise _UnknownError("it replaces scores by something else than -inf")
            condition = self._value(args[0])
            found.seen.append(condition if at == 1 else ~condition)
        elif target is aten._to_copy.default and node.kwargs.get("dtype") in (torch.float32, torch.float64):
            pass
        else:
            raise _UnknownError(f"{target} of a score")
        return node

    def _cap(self, node: fx.Node, found: _Known, plain: bool) -> fx.Node:
        """``c · tanh(score · a)``, the soft cap by c of scores times a · c."""
        users = list(node.users)
        scaled = users[0] if len(users) == 1 and users[0].target in (aten.mul.Tensor, aten.mul.Scalar) else None
        if not plain or found.cap is not None or scaled is None:
            raise _UnknownError("it takes tanh in another way than a soft cap")
        number = self._number(scaled.args[1] if scaled.args[0] is node else scaled.args[0])
        if number <= 0:
            raise _UnknownError("it caps at a number that is not positive")
        found.factor *= number
        found.cap = SoftCap(number)
        return scaled

    def _number(self, value: Any) -> float:
        """A factor that is the same for all pairs."""
        if isinstance(value, (int, float)):
            return float(value)
        if self._reads(value):
            raise _UnknownError("it multiplies scores by numbers that differ between pairs")
        found = self._value(value)
        if found.numel() != 1 or found.requires_grad:
            raise _UnknownError("it multiplies scores by a tensor that is no number")
        return float(found)

    def _reads(self, value: Any) -> set[int]:
        """Which of b, h, q_idx and kv_idx a value depends on."""
        behind, todo = set[fx.Node](), [value]
        while todo:
            node = todo.pop()
            if isinstance(node, fx.Node) and node not in behind:
                behind.add(node)
                todo += node.all_input_nodes
        return {i for i, place in enumerate(self._places[1:]) if place in behind}

    def _value(self, value: Any) -> Tensor:
        """What does not depend on the score, for all pairs: (B, H, Sq, Sk), of size one where that is all the same."""
        if not isinstance(value, fx.Node):
            return torch.as_tensor(value, device=self._device)
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in itertools.takewhile(lambda n: n.op != "output", value.graph.nodes):
            if node not in self._on_score or node is self._places[0]:
                copies[node] = part.node_copy(node, copies.__getitem__)
        part.output(copies[value])
        module = fx.GraphModule(self._traced, part)
        reads = self._reads(value)
        function: Callable[..., Any] = lambda *pair: module(torch.zeros(1, device=self._device), *pair)  # noqa: E731
        for i in reversed(range(4)):
            if i in reads:
                function = torch.vmap(function, tuple(0 if j == i else None for j in range(4)))
        if not all(isinstance(self._sizes[i], int) for i in reads):
            raise _SizesError
        sizes = [size if i in reads else 1 for i, size in enumerate(self._sizes)]
        ranges = (torch.arange(size, dtype=torch.int, device=self._device)[:, None] for size in sizes)
        pair = [indices if i in reads else indices[0] for i, indices in enumerate(ranges)]
        result: Tensor = function(*pair)
        return result.reshape(sizes)
