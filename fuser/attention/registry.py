"""Names of what attention computes for the operators of torch, which take tensors, numbers and strings.

Masks and score rules are Python values; so a specification enters a process-wide registry and the operators take its
key. Keys that traces have seen stay registered, up to a number of them, those that were used last.
"""

from __future__ import annotations

import collections
import concurrent.futures
import uuid
import weakref
from typing import Any

import torch

from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import MaskError
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.runtime.locks import ForkSafeLock

_RECENT = 64
_PINNED = 256
"""Specifications that are kept because a trace has seen their keys: more than the masks of several models."""

_lock = ForkSafeLock()
_recent: collections.OrderedDict[str, AttentionSpec] = collections.OrderedDict()
_pinned: collections.OrderedDict[str, AttentionSpec] = collections.OrderedDict()
_registered: dict[str, AttentionSpec] = {}
_known: weakref.WeakKeyDictionary[Mask, dict[Any, str]] = weakref.WeakKeyDictionary()
# A mask that somebody holds can be found, however many others are used between its key and the operator. Masks of
# different functions have one key while their entries are equal.
_alive: weakref.WeakValueDictionary[tuple[str, ScoreRule | None, ScoreQuantization | None, int], Mask] = (
    weakref.WeakValueDictionary()
)


def register_mask(
    mask: Mask,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    score: ScoreRule | None = None,
    quantize: ScoreQuantization | None = None,
) -> str:
    """Make ``mask``, with a score rule and quantization or without, known to this process for good; return its key.

    Call it before running a graph that another process has exported with this mask. ``q_len`` and ``kv_len`` are
    needed for masks that contain functions (``from_mask_mod``), whose keys hold for one pair of lengths.
    """
    key = enter(AttentionSpec(mask, score, quantize), q_len, kv_len)
    adopt(key, spec_of(key))
    return key


def spec_of(key: str) -> AttentionSpec:
    """What a key stands for. Raises MaskError if this process does not know it."""
    known = specs_of(key)
    if not known:
        raise MaskError(
            f"this process knows no mask with the key {key}: the graph was made in another one, or {_PINNED} others "
            "have been traced since it last ran; call fuser.attention.register_mask with its mask first"
        )
    return next((spec for spec in known if spec.mask.is_current), known[0])


def specs_of(key: str) -> list[AttentionSpec]:
    """All that was given this key, which means that the entries of the masks were equal at the lengths in question."""
    with _lock:
        known = [table[key] for table in (_registered, _pinned, _recent) if key in table]
        if key in _pinned:
            _pinned.move_to_end(key)
        if not known or any(spec.mask.has_functions for spec in known):
            known += [AttentionSpec(mask, rule, how) for (name, rule, how, _), mask in _alive.items() if name == key]
    return list(dict.fromkeys(known))


def adopt(key: str, spec: AttentionSpec) -> None:
    """Keep a specification under a key that this or another process gave it, for good."""
    with _lock:
        _registered[key] = spec


def enter(spec: AttentionSpec, q_len: int | None, kv_len: int | None, *, any_lengths: bool = False) -> str:
    """The key of ``spec``, known as long as somebody holds its mask, and among the last ones used in any case.

    Of a mask with functions, which needs lengths, the key holds for these alone; or, with ``any_lengths``, for all, in
    this process.
    """
    spec = spec.current()
    mask = spec.mask
    with _lock:
        keys = _known.setdefault(mask, {})
    name = keys.get(None)
    if name is None:
        try:
            name = keys[None] = mask.hash
        except MaskError:
            # A function has no hash, but its entries at these lengths have.
            if q_len is None and not any_lengths:
                raise
            lengths = None if q_len is None else (int(q_len), int(q_len if kv_len is None else kv_len))
            if lengths is None:
                name = keys.setdefault("any", uuid.uuid4().hex)
            elif (name := keys.get(lengths)) is None:
                # An export traces all that its thread runs, and this is not part of the model.
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    name = keys[lengths] = pool.submit(mask.fingerprint, *lengths).result()
    key = spec.named(name)
    with _lock:
        _alive[key, spec.rule, spec.quantize, id(mask)] = mask
        _keep(_recent, key, spec, _RECENT)
    return key


def pin(key: str) -> None:
    """Keep what ``key`` stands for, as a graph may hold the key."""
    spec = spec_of(key)
    with _lock:
        _keep(_pinned, key, spec, _PINNED)


def _keep(table: collections.OrderedDict[str, AttentionSpec], key: str, spec: AttentionSpec, most: int) -> None:
    table[key] = spec
    table.move_to_end(key)
    while len(table) > most:
        table.popitem(last=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def key_of(
    mask: Mask,
    rule: ScoreRule | None,
    quantize: ScoreQuantization | None,
    causal: bool,
    offset: int,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> str:
    """The key of a specification, a constant of whatever graph is traced; empty if it depends on lengths that are not
    given.

    Queries are rows ``offset`` and on of the mask; with ``causal``, query i sees keys up to i only (counted from 0).
    """
    try:
        mask = mask.current()
        mask = mask.shift(offset) if offset else mask
        return enter(AttentionSpec(mask & Causal() if causal else mask, rule, quantize), q_len, kv_len)
    except MaskError:
        if q_len is not None:
            raise
        return ""
    except AttributeError as error:
        _explain(error)
        raise


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def key_of_any_lengths(mask: Mask, rule: ScoreRule | None, quantize: ScoreQuantization | None) -> str:
    """The key of a specification that documents of any lengths have, a constant of whatever graph is traced."""
    try:
        return enter(AttentionSpec(mask, rule, quantize), None, None, any_lengths=True)
    except AttributeError as error:
        _explain(error)
        raise


def _explain(error: AttributeError) -> None:
    """Dynamo passes objects that are made inside the traced function before their fields are set: then say so."""
    if torch._guards.TracingContext.try_get() is not None:
        from torch._dynamo.exc import Unsupported

        raise Unsupported("a fuser mask is made inside of a compiled function; make it outside") from error


DENSE = register_mask(Dense())
CAUSAL = register_mask(Causal())
