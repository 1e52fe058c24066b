"""Masks without a closed form: tensors, and functions in FlexAttention's signature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch

from fuser.ir.errors import MaskError
from fuser.ir.masks.base import CURRENT, Mask
from fuser.ir.masks.batch import PerBatch
from fuser.ir.masks.captured import captured
from fuser.ir.masks.columns import Bools, Ints, integer

ModFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Pairs on which a function is called again, to see whether it depends on what it must not depend on.
_SAMPLE_ROWS = 4
_SAMPLE_PAIRS = 1024


def _packed_digest(mask: Mask, n: int, m: int) -> str:
    """Hex SHA-256 over the entries, row by row, each row of each head padded to whole bytes."""
    sha = hashlib.sha256()
    for start, stop in mask._chunks(n, m):
        block = mask._block(np.arange(start, stop), n, m)
        sha.update(np.packbits(block if mask.heads is None else block.swapaxes(0, 1), axis=-1).tobytes())
    return sha.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class TensorMask(Mask):
    """A mask given entry by entry; made by ``from_dense``. Equal to any other with the same entries."""

    array: Bools

    def __post_init__(self) -> None:
        self.array.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorMask, (np.array(self.array),)

    def __repr__(self) -> str:
        return f"TensorMask({self._size}, sha256={self._digest})"

    @property
    def heads(self) -> int | None:
        return self.array.shape[0] if self.array.ndim == 3 else None

    @property
    def structured(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"from_dense({self._size}, {self._digest[:8]})"

    @property
    def _size(self) -> str:
        return "x".join(map(str, self.array.shape))

    @cached_property
    def _digest(self) -> str:
        return _packed_digest(self, *self.array.shape[-2:])

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return self.array[..., i, j]

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return self.array[..., i, :]

    def _check(self, n: int, m: int) -> None:
        if (n, m) != self.array.shape[-2:]:
            raise MaskError(
                f"the mask was made from a tensor of {self._size} and cannot be used with q_len = {n}, kv_len = {m}: "
                "slice the tensor before from_dense"
            )

    def _head(self, index: int) -> Mask:
        return TensorMask(self.array[index])

    def _key(self) -> Any:
        return ["tensor", list(self.array.shape), self._digest]


def from_dense(tensor: torch.Tensor) -> TensorMask:
    """A mask from a bool tensor (q_len, kv_len) or (heads, q_len, kv_len), True where attention is allowed.

    The tensor is copied. Raises MaskError for other dtypes (additive masks: pass ``mask == 0``), for other shapes, and
    for tensors without data.
    """
    if not isinstance(tensor, torch.Tensor):
        raise MaskError(f"from_dense takes a torch.Tensor, got {type(tensor).__name__}")
    if tensor.requires_grad:
        raise MaskError("from_dense takes a constant, got a tensor that requires grad: masks cannot be trained")
    if tensor.dtype != torch.bool:
        raise MaskError(
            f"from_dense takes a bool tensor (True = allowed), got {tensor.dtype}: compare first, for an additive mask "
            "with `mask == 0`"
        )
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] == 0):
        raise MaskError(
            f"from_dense takes (q_len, kv_len) or (heads, q_len, kv_len), got shape {tuple(tensor.shape)}: a mask is "
            "the same for the whole batch; padding is given at run time"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise MaskError(f"from_dense takes a tensor with dense data, got {tensor.layout} on {tensor.device}")
    return TensorMask(np.array(tensor.detach().cpu().numpy(), order="C"))


@dataclass(frozen=True, eq=False, repr=False)
class MaskMod(Mask):
    """A mask given by a function; made by ``from_mask_mod``. Equal only to masks of the very same function object.

    ``state`` is what the function reads besides its arguments, in a mask that :meth:`current` has made: it is equal
    only to those of the same state, and refuses to be used in another. None follows the function as it is. ``entry`` is
    the batch entry that the mask is for, None for all.
    """

    function: ModFunction
    size: int | None = None
    fixed_head: int | None = None
    device: str = "cpu"
    state: Hashable = None
    entry: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskMod) and self.function is other.function and self._rest == other._rest

    def __hash__(self) -> int:
        return hash((id(self.function), self._rest))

    def current(self) -> Mask:
        now = captured(self.function)
        if self.state is None:
            kept = self.__dict__.get(CURRENT)
            if kept is None or kept.state != now:
                kept = self.__dict__[CURRENT] = replace(self, state=now)
            return kept
        if self.state != now:
            raise MaskError(
                f"what {self.name} reads has changed since a plan or a graph was made with it: trace or compile again, "
                "and keep it as it is until gradients have been computed"
            )
        return self

    @property
    def has_functions(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        if any(mark in getattr(self.function, "__qualname__", "") for mark in ("<lambda>", "<locals>")):
            raise MaskError(
                f"{self.name} cannot be pickled, because its function is not importable: define it at the top level of "
                "a module, or pickle from_dense(mask.dense(q_len, kv_len)) instead"
            )
        # Another process reads what is there.
        return {**super().__getstate__(), "state": None}

    def __repr__(self) -> str:
        return f"MaskMod({self.function!r}, heads={self.size})"

    @property
    def _rest(self) -> tuple[Any, ...]:
        return self.size, self.fixed_head, self.device, self.state, self.entry

    @property
    def heads(self) -> int | None:
        return self.size

    @property
    def structured(self) -> bool:
        return False

    @property
    def name(self) -> str:
        function = getattr(self.function, "__name__", type(self.function).__name__)
        fixed = {"batch": self.entry, "head": self.fixed_head}
        return f"mask_mod({', '.join([function, *(f'{k}={v}' for k, v in fixed.items() if v is not None)])})"

    def _check(self, n: int, m: int) -> None:
        if self.state is not None:
            self.current()

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        q, kv = torch.from_numpy(i).to(self.device), torch.from_numpy(j).to(self.device)
        allowed = self._call(self.entry or 0, self.fixed_head or 0, q, kv)
        self._check_pure(allowed, q, kv)
        return allowed.cpu().numpy()

    def _check_pure(self, allowed: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> None:
        """Call again on a sample: the result may depend on (head, query, key) only."""
        size = (_SAMPLE_ROWS if q.ndim == 2 else _SAMPLE_PAIRS) if len(q) else 0
        pick = torch.from_numpy(np.linspace(0, len(q) - 1, size, dtype=np.int64)).to(q.device)
        some_q, some_kv = q[pick], kv if q.ndim == 2 else kv[pick]
        expected = allowed[pick] if self.size is None else allowed[:, pick]
        trials = [(0, 0, "gives different answers for the same pair: return a function of h, q_idx and kv_idx only")]
        if self.entry is None:
            trials.append((1, 0, "depends on b: pass from_mask_mod(fn, batch=...), or give padding at run time"))
        if self.size is None and self.fixed_head is None:
            trials.append((0, 1, "depends on h: pass from_mask_mod(fn, heads=...)"))
        for b, h, problem in trials:
            try:
                again = self._call((self.entry or 0) + b, (self.fixed_head or 0) + h, some_q, some_kv)
            except MaskError as error:
                raise MaskError(f"{self.name} {problem}") from error
            if not torch.equal(expected, again):
                raise MaskError(f"{self.name} {problem}")

    def _call(self, b: int, h: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Bool of q and kv broadcast, heads in front; by vmap as FlexAttention does, else on whole index tensors."""
        shape = np.broadcast_shapes(q.shape, kv.shape)
        lead = () if self.size is None else (self.size,)
        if 0 in shape:
            return torch.zeros(*lead, *shape, dtype=torch.bool, device=q.device)
        batch = torch.tensor(b, device=q.device)
        head = torch.tensor(h, device=q.device) if self.size is None else torch.arange(self.size, device=q.device)
        if q.ndim == 2:
            mapped = torch.vmap(torch.vmap(self.function, (None, None, None, 0)), (None, None, 0, None))
        else:
            mapped = torch.vmap(self.function, (None, None, 0, 0))
        if self.size is not None:
            mapped = torch.vmap(mapped, (None, 0, None, None))
        try:
            result = mapped(batch, head, *((q[:, 0], kv[0]) if q.ndim == 2 else (q, kv)))
        except Exception as scalar_error:  # the user's function may raise anything
            try:
                result = self.function(batch, head if self.size is None else head.view(-1, *(1 for _ in shape)), q, kv)
            except Exception as error:
                raise MaskError(
                    f"{self.name} raised {type(error).__name__}: {error}. It is called with index tensors: use & | ~ "
                    "and torch.where, not `and`, `or`, `not` and `if`"
                ) from scalar_error
        if not isinstance(result, torch.Tensor) or result.dtype != torch.bool:
            got = result.dtype if isinstance(result, torch.Tensor) else type(result).__name__
            raise MaskError(f"{self.name} must return a bool tensor, got {got}")
        full = (*lead, *shape)
        if result.ndim not in (len(shape), len(full)) or any(
            size not in (1, wanted) for size, wanted in zip(reversed(result.shape), reversed(full), strict=False)
        ):
            raise MaskError(
                f"{self.name} must return one value for each pair: {full} for this call, got {tuple(result.shape)}"
            )
        return result.expand(full)

    def _head(self, index: int) -> Mask:
        return replace(self, size=None, fixed_head=index)

    def _key(self) -> Any:
        raise MaskError(f"{self.name} has no hash, since a function is opaque: use fingerprint(q_len, kv_len)")

    def _shape_key(self, n: int, m: int) -> Any:
        return ["mask_mod", self.size, _packed_digest(self, n, m)]


@overload
def from_mask_mod(
    function: ModFunction, heads: int | None = None, batch: None = None, *, device: torch.device | str = "cpu"
) -> MaskMod: ...


@overload
def from_mask_mod(
    function: ModFunction, heads: int | None = None, *, batch: int, device: torch.device | str = "cpu"
) -> PerBatch: ...


def from_mask_mod(
    function: ModFunction,
    heads: int | None = None,
    batch: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> MaskMod | PerBatch:
    """A mask from FlexAttention's ``mask_mod(b, h, q_idx, kv_idx) -> bool tensor``, called with tensors on ``device``.

    ``heads`` is the number of heads if the result depends on ``h``, ``batch`` the number of batch entries if it depends
    on ``b``: it gives a :class:`PerBatch`, one mask for each. Both are checked on samples. What the function reads
    (closures, defaults, globals, attributes of objects) may change between uses, which see it as it is then. Not seen
    are writes to tensors through ``tensor.data`` or NumPy, and what is looked up by a computed name or hidden in
    objects without attributes. Using the mask raises MaskError if the function fails, returns something else than bool,
    or breaks these rules.
    """
    if not callable(function):
        raise MaskError(f"from_mask_mod takes a function of (b, h, q_idx, kv_idx), got {function!r}")
    mask = MaskMod(function, None if heads is None else integer("heads", heads, 1), None, str(device))
    if batch is None:
        return mask
    return PerBatch(tuple(replace(mask, entry=b) for b in range(integer("batch", batch, 1))))
