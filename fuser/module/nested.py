"""Nested tensors (``layout=torch.jagged``) as inputs of models that take padding and a mask of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuser.attention.jagged import offsets_of
from fuser.ir.errors import PackingError
from fuser.ir.packing import RowAxes

_MASKS = {"attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True}
"""Names of arguments that say which positions are padding, and whether they are true there."""


@dataclass(frozen=True)
class Padded:
    """A call with padding and a mask in the place of nested tensors of ``offsets`` (batch + 1,); ``keep`` (B, S) is
    true where there are rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    offsets: Tensor
    keep: Tensor

    def outputs(self, tensors: Sequence[Tensor], axes: Sequence[RowAxes | None]) -> list[Tensor]:
        """Outputs of the call: nested ones for (B, S, …), others as they are."""
        return [
            torch.nested.nested_tensor_from_jagged(tensor[self.keep], self.offsets)
            if place == RowAxes(1, 0)
            else tensor
            for tensor, place in zip(tensors, axes, strict=True)
        ]


def is_nested(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument is a nested tensor."""
    return any(isinstance(value, Tensor) and value.is_nested for value in (*args, *kwargs.values()))


def padded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Padded:
    """A call of ``model``, which has nested tensors (B, *, …) of equal lengths, with padded ones.

    Raises PackingError for a model without a mask of padding among its arguments, or a call that gives one; ValueError
    for tensors that are no jagged ones, or differ in lengths.
    """
    signature = inspect.signature(model.forward)
    mask = next((name for name in _MASKS if name in signature.parameters), None)
    if mask is None or signature.bind_partial(*args, **kwargs).arguments.get(mask) is not None:
        names = " or ".join(_MASKS)
        raise PackingError(f"a model takes nested tensors if it has an argument {names}, which the call leaves out")
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_nested]
    offsets = [offsets_of("an input", value) for value in given]
    if any(not torch.equal(offsets[0], other) for other in offsets[1:]):
        raise ValueError("the nested inputs of a call must have equal lengths")
    lengths = offsets[0].diff()
    keep = torch.arange(max(int(lengths.max()), 1) if len(lengths) else 1) < lengths[:, None]

    def made(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_nested:
            return value
        values = value.values()
        whole = values.new_zeros(*keep.shape, *values.shape[1:])
        whole[keep] = values
        return whole

    more = {**dict(zip(kwargs, map(made, kwargs.values()), strict=True)), mask: keep ^ _MASKS[mask]}
    if not _MASKS[mask]:
        more[mask] = more[mask].long()
    return Padded(tuple(map(made, args)), more, offsets[0], keep)
