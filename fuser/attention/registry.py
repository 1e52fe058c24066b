"""Names of masks for the operators of torch, which take tensors, numbers and strings.

Masks are Python values; so a mask enters a process-wide registry and the operators take its key. A key that a trace has
seen stays registered for the life of the process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import weakref

import torch

from fuser.ir.errors import MaskError
from fuser.ir.masks import Causal, Dense, Mask
from fuser.runtime.locks import ForkSafeLock

_REGISTERED = 64


_lock = ForkSafeLock()
_recent: collections.OrderedDict[str, Mask] = collections.OrderedDict()
_pinned: dict[str, Mask] = {}
_known: weakref.WeakKeyDictionary[Mask, dict[tuple[int, int] | None, str]] = weakref.WeakKeyDictionary()
# A mask that somebody holds can be found, however many others are used between its key and the operator. Masks of
# different functions have one key while their entries are equal.
_alive: weakref.WeakValueDictionary[tuple[str, int], Mask] = weakref.WeakValueDictionary()


def register_mask(mask: Mask, q_len: int | None = None, kv_len: int | None = None) -> str:
    """Make ``mask`` known to this process for good and return its key.

    Call it before running a graph that another process has exported with this mask. ``q_len`` and ``kv_len`` are
    needed for masks that contain functions (``from_mask_mod``), whose keys hold for one pair of lengths.
    """
    key = enter(mask, q_len, kv_len)
    pin(key)
    return key


def mask_of(key: str) -> Mask:
    """The mask of a key. Raises MaskError if this process does not know it."""
    known = masks_of(key)
    if not known:
        raise MaskError(
            f"this process knows no mask with the key {key}: the graph was made in another one; "
            "call fuser.attention.register_mask with its mask first"
        )
    return next((mask for mask in known if mask.is_current), known[0])


def masks_of(key: str) -> list[Mask]:
    """All masks that were given this key, which means that their entries were equal at the lengths in question."""
    with _lock:
        known = [table[key] for table in (_pinned, _recent) if key in table]
        if not known or any(mask.has_functions for mask in known):
            known += [mask for (name, _), mask in _alive.items() if name == key]
    return list(dict.fromkeys(known))


def adopt_mask(key: str, mask: Mask) -> None:
    """Register ``mask`` under a key that another process gave it."""
    with _lock:
        _pinned[key] = mask


def enter(mask: Mask, q_len: int | None, kv_len: int | None) -> str:
    """The key of ``mask``, known as long as somebody holds it, and among the last ones used in any case."""
    mask = mask.current()
    with _lock:
        keys = _known.setdefault(mask, {})
    key = keys.get(None)
    if key is None:
        try:
            key = keys[None] = mask.hash
        except MaskError:
            # A function has no hash, but its entries at these lengths have.
            if q_len is None:
                raise
            lengths = (int(q_len), int(q_len if kv_len is None else kv_len))
            key = keys.get(lengths)
            if key is None:
                # An export traces all that its thread runs, and this is not part of the model.
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    key = keys[lengths] = pool.submit(mask.fingerprint, *lengths).result()
    with _lock:
        _recent[key] = _alive[key, id(mask)] = mask
        _recent.move_to_end(key)
        while len(_recent) > _REGISTERED:
            _recent.popitem(last=False)
    return key


def pin(key: str) -> None:
    """Keep the mask of ``key`` for the life of the process, as a graph may hold the key."""
    mask = mask_of(key)
    with _lock:
        _pinned[key] = mask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def key_of(mask: Mask, causal: bool, offset: int, q_len: int | None = None, kv_len: int | None = None) -> str:
    """The key of a mask, a constant of whatever graph is traced; empty if it depends on lengths that are not given."""
    try:
        mask = mask.current()
        mask = mask.shift(offset) if offset else mask
        return enter(mask & Causal() if causal else mask, q_len, kv_len)
    except MaskError:
        if q_len is not None:
            raise
        return ""
    except AttributeError as error:
        if torch._guards.TracingContext.try_get() is None:
            raise
        # Dynamo passes objects that are made inside the traced function before their fields are set.
        from torch._dynamo.exc import Unsupported

        raise Unsupported("a fuser mask is made inside of a compiled function; make it outside") from error


DENSE = register_mask(Dense())
CAUSAL = register_mask(Causal())
