"""Calls without padding: which rows of a batch are none, and running packed programs on these alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser.ir.errors import FuserError, PackingError
from fuser.ir.evaluation import evaluate
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.packing import TOKENS, PackedLayout
from fuser.ir.target import Target
from fuser.kernels.documents import Documents, sees
from fuser.kernels.plan import Bools
from fuser.module.forms import Form, Packing

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""A program: from the tensors of a call to its results."""
logger = logging.getLogger("fuser")
_REMEMBERED = 16
_MUCH_PADDING = 0.1
"""The share of padding from which on it is worth a word."""
_REASONS = 64
_COUNTED = 8
"""Batches that are counted before that becomes rare."""
_STEP = 16
_STEPS_AN_OCTAVE = 32
_LOW = {dtype: torch.finfo(dtype).min / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Packed:
    """Where the rows of a batch are: ``rows`` (tokens,) numbers the positions of (B, S), entry by entry, that are
    computed, a few of them twice at the end; ``keys`` are those of ``rows`` that are no padding. ``picks`` holds the
    places in ``rows`` of certain positions of all entries, ``plans`` the plan of each pattern. ``masked`` are rows,
    length and keys as a :class:`~fuser.ir.operators.DocumentMask` takes them, as if what is computed twice were of
    entries of its own."""

    rows: Tensor
    keys: Tensor
    picks: tuple[Tensor, ...]
    masked: tuple[Tensor, Tensor, Tensor]
    plans: tuple[Tensor, ...]
    tokens: int


def is_key(masks: Sequence[Tensor]) -> Bools:
    """Which positions (B, S) the masks (B, S) of all attentions let through. Raises PackingError where they do not
    agree, or weigh positions."""
    found: list[Bools] = []
    for mask in masks:
        allowed = mask if mask.dtype == torch.bool else mask == 0
        if mask.dtype != torch.bool and not bool((allowed | (mask < _LOW[mask.dtype])).all()):
            raise PackingError("a mask adds numbers to the scores of positions")
        found.append(allowed.numpy())
    if any(not np.array_equal(found[0], other) for other in found[1:]):
        raise PackingError("attentions of the model have different padding")
    return found[0]


def packed_rows(
    keys: Bools,
    positions: Sequence[int],
    masks: Sequence[Mask],
    *,
    by_distance: bool = False,
    target: Target | None = None,
) -> Packed:
    """The rows of a batch whose positions ``keys`` (B, S) are no padding, and those at ``positions`` of every entry,
    which see the keys of their entry that each of the ``masks`` of an entry allows.

    Raises PackingError where a row at one of the positions is padding with keys before it, or sees none; and, where
    something is said ``by_distance``, where padding is between the rows of an entry.
    """
    entries, length = keys.shape
    computed = keys.copy()
    for position in positions:
        if (keys[:, :position].any(1, keepdims=True) & ~keys[:, position : position + 1]).any():
            raise PackingError(f"the model takes position {position} of every entry, which is padding between others")
        computed[:, position] = True
    rows = np.flatnonzero(computed)
    places = np.flatnonzero(keys.reshape(-1)[rows])
    count, tokens = len(rows), rounded(len(rows))
    sizes = computed.sum(1)
    if by_distance and (sizes != np.where(sizes, length - computed.argmax(1) - computed[:, ::-1].argmax(1), 0)).any():
        raise PackingError("something follows from the distance of positions, and padding is between tokens")
    picks = tuple(np.searchsorted(rows, np.arange(entries) * length + position) for position in positions)
    if not all(sees(mask, keys, position) for mask in masks for position in positions):
        raise PackingError("the model takes a row of every entry, and some entries have no token")
    # What is computed twice is of entries of its own, no longer than others.
    rest = np.arange(tokens - count)
    numbers = np.append(rows, entries * length + rest)
    documents = Documents(numbers, length, np.append(keys.reshape(-1)[rows], np.ones(len(rest), bool)))
    return Packed(
        torch.from_numpy(np.append(rows, np.repeat(rows[:1], len(rest)))),
        torch.from_numpy(places),
        tuple(map(torch.from_numpy, picks)),
        (torch.from_numpy(numbers), torch.tensor([length]), torch.from_numpy(documents.is_key)),
        tuple(torch.from_numpy(documents.plan(mask).array.copy()) for mask in masks),
        tokens,
    )


def rounded(count: int) -> int:
    """The number of rows of the program that serves ``count``: few numbers, so that few programs are made, and at most
    a few percent more, or :data:`_STEP`."""
    step = max(_STEP, (1 << max(count.bit_length() - 1, 0)) // _STEPS_AN_OCTAVE)
    return max(-(-count // step), 1) * step


def _mask_of(causal: bool, mask: Mask | None) -> Mask:
    """What constants allow within an entry."""
    if mask is None:
        return Causal() if causal else Dense()
    return mask & Causal() if causal else mask


def keys_of(
    packing: Packing, sizes: Mapping[str, int], parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]
) -> Bools:
    """Which positions of a call are no padding, computed by PyTorch. Raises PackingError as :func:`is_key` does."""
    graph = packing.before.binder(sizes)
    values = dict(zip(graph.inputs, tensors, strict=True))
    for name in reversed(graph.with_sources(graph.constants)):
        if name not in values:
            constant = graph.constants[name]
            sources = [values[source] for source in constant.sources]
            values[name] = parameters[name] if constant.call is None else constant.evaluate(sources)
    made = evaluate(graph, values)
    return is_key([made[mask] for mask in packing.graph.masks])


class Padding:
    """How many of the rows of some calls were padding, and why padding was computed, for ``padding=`` of
    :func:`fuser.optimize`."""

    def __init__(self, option: str) -> None:
        self.rows = 0
        self.padded = 0
        self.kept: dict[str, None] = {}
        self._option = option
        self._asked = 0
        self._told = False
        self._lock = threading.Lock()

    def add(self, keys: Bools) -> None:
        """Count a batch."""
        with self._lock:
            self.rows += keys.size
            self.padded += keys.size - int(keys.sum())

    def count(self, form: Form, sizes: Mapping[str, int], target: Target, tensors: Sequence[Tensor]) -> None:
        """Look how much of a call with a new program is padding that could be left out: of the first calls, then of one
        of so many as there were, since that takes about as long as binding."""
        if self._option != "keep" or target.kind != "cpu" or not self.is_due():
            return
        try:
            self.add(keys_of(form.packing(sizes, target), sizes, form.captured.parameters, tensors))
        except FuserError:
            return
        if float(self) >= _MUCH_PADDING and not self._told:
            self._told = True
            logger.info("%s", self.lines[0])

    def must_compute(self, reason: str) -> None:
        """Remember why the padding of a call had to be computed, for the last few reasons."""
        self.kept[reason] = None
        while len(self.kept) > _REASONS:
            del self.kept[next(iter(self.kept))]

    def is_due(self) -> bool:
        """Whether a batch is to be counted where counting takes time."""
        with self._lock:
            self._asked += 1
            return self._asked & (self._asked - 1) == 0 or self._asked <= _COUNTED

    def __float__(self) -> float:
        return self.padded / self.rows if self.rows else 0.0

    @property
    def lines(self) -> tuple[str, ...]:
        """How much of the rows was padding, if any was seen: of all calls with ``padding="skip"``, and why it was
        computed where it had to be, else of some of those that were compiled."""
        what = f"{float(self):.0%} of the rows were padding"
        if self._option == "keep":
            what += '; fuser.optimize(model, padding="skip") leaves them out'
        return (*((what,) if self.padded else ()), *(f"was computed: {reason}" for reason in self.kept))


def run_packed(
    layout: PackedLayout,
    sizes: Mapping[str, int],
    before: Run,
    rows_of: Callable[[Mapping[str, int]], Run],
    tensors: Sequence[Tensor],
    padding: Padding,
    complete: set[tuple[Any, ...]] | None,
) -> list[Tensor] | None:
    """The model's outputs, zeros where they are of padding; None where there is no padding. ``before`` runs the first
    part for the ``sizes`` of the call, ``rows_of`` gives what runs the second for some. ``complete`` remembers the
    numbers of which masks without padding of these shapes consist; with None, rows are packed where none is padding.

    Raises PackingError where padding cannot be left out of this call.
    """
    numbers = tuple(_only_number(tensors[i]) for i in layout.mask_inputs) if complete is not None else (None,)
    if complete is not None and numbers in complete:
        return None
    shapes, patterns, _, length = layout.bound(sizes)
    made = before(tensors)
    count = layout.masks
    keys = is_key(made[:count])
    padding.add(keys)
    if complete is not None and keys.all():
        if None not in numbers and len(complete) < _REMEMBERED:
            complete.add(numbers)
        return None
    if not keys.any() and not layout.picks and None not in layout.outputs:
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, layout.dtypes, strict=True)]
    masks = [_mask_of(p.causal, p.mask) for p in patterns]
    packed = packed_rows(keys, layout.picks, masks, by_distance=layout.by_distance)
    gathered = made[count : count + len(layout.gathered)]
    inputs = [
        *(axes.gather(t, packed.rows, length) for axes, t in zip(layout.gathered, gathered, strict=True)),
        *made[count + len(layout.gathered) :],
        *packed.picks,
        *packed.masked,
        *packed.plans,
    ]
    results = rows_of({**sizes, TOKENS: packed.tokens})(inputs)
    outputs = []
    for result, axes, shape in zip(results, layout.outputs, shapes, strict=True):
        if axes is None:
            outputs.append(result)
            continue
        whole = result.new_zeros(shape)
        axes.scatter(result.index_select(axes.sequence, packed.keys), packed.rows[packed.keys], whole)
        outputs.append(whole)
    return outputs


def _only_number(tensor: Tensor) -> Any | None:
    """The number that all entries of a tensor are; None where they differ."""
    if not tensor.numel():
        return None
    first = tensor.flatten()[0]
    return first.item() if bool((tensor == first).all()) else None
