"""The models that commands name: ``module:callable`` or a built-in configuration."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser import zoo
from fuser.frontend.calls import FlatCall, flatten_call
from fuser.ir import masks
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.masks import Mask

_MASKS: Mapping[str, type[Mask]] = {
    "dense": masks.Dense,
    "causal": masks.Causal,
    "sliding-window": masks.SlidingWindow,
    "strided": masks.Strided,
    "fixed": masks.Fixed,
    "dilated": masks.Dilated,
    "longformer": masks.Longformer,
    "bigbird": masks.BigBird,
}


@dataclass(frozen=True)
class Named:
    """A model with the call that it is looked at with."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def call(self) -> FlatCall:
        return flatten_call(self.args, self.kwargs)

    def to(self, device: torch.device) -> Named:
        """The same on ``device``; the model itself moves."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(move, (self.args, dict(self.kwargs)))
        return Named(self.name, self.model.to(device), args, kwargs)


def parse_mask(text: str) -> Mask | None:
    """A mask from ``name:number:number`` such as ``sliding-window:128:128``; None for an empty text.

    Raises MaskError for an unknown name or arguments that the mask does not take.
    """
    if not text:
        return None
    name, *numbers = text.lower().replace("_", "-").split(":")
    if name not in _MASKS:
        raise MaskError(f"there is no mask {name!r}; choose one of {', '.join(_MASKS)}, as in sliding-window:128:128")
    try:
        return _MASKS[name](*(int(number) for number in numbers))
    except (TypeError, ValueError) as error:
        raise MaskError(f"{text!r} is not a mask: {error}") from error


def resolve(
    name: str, sizes: Mapping[str, int | None], *, seed: int = 0, padding: bool = False, dtype: str = "float32"
) -> Named:
    """The model called ``name``.

    ``module:callable`` is imported (from the working directory too) and called without arguments; it returns a module
    whose inputs can be guessed (Hugging Face text and image encoders), or a pair (module, inputs) with a tuple of
    positional or a dict of keyword arguments. ``sizes`` that are None keep the configuration's own.

    Raises FuserError for a name that leads nowhere.
    """
    chosen = {key: value for key, value in sizes.items() if value is not None}
    if ":" in name:
        found = _imported(name, chosen, seed, padding)
    else:
        configuration = zoo.configuration(name)
        model, actual = configuration.build(seed, **chosen)
        found = Named(name, model, (), configuration.example(actual, padding))
    return found if dtype == "float32" else _converted(found, dtype)


def _imported(name: str, sizes: Mapping[str, int], seed: int, padding: bool) -> Named:
    path, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise FuserError(f"cannot import {path!r} for the model {name!r}: {_reason(error)}") from error
    make = getattr(module, attribute, None)
    if make is None:
        raise FuserError(f"the module {path!r} has no {attribute!r}")
    architecture = sorted(set(sizes) - {"batch", "seq"})
    if architecture:
        raise FuserError(f"--{architecture[0]} is for built-in configurations; {name} chooses its own sizes")
    torch.manual_seed(seed)
    try:
        made = make if isinstance(make, nn.Module) else make() if callable(make) else None
    except Exception as error:
        raise FuserError(f"cannot make the model {name!r}: {_reason(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise FuserError(f"{name} must be, or return, an nn.Module or a pair (nn.Module, inputs)")
    model.eval()
    if inputs is None:
        return Named(name, model, (), _guess(name, model, sizes.get("batch", 1), sizes.get("seq", 128), padding))
    if sizes or padding:
        raise FuserError(f"{name} brings its own inputs, so --batch, --seq and --padding do not apply")
    if isinstance(inputs, Mapping):
        return Named(name, model, (), dict(inputs))
    return Named(name, model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _reason(error: Exception) -> str:
    """What the user's own code raised, and where, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno})"


def _guess(name: str, model: nn.Module, batch: int, seq: int, padding: bool) -> dict[str, Tensor]:
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "vocab_size"):
        call = {"input_ids": torch.randint(0, config.vocab_size, (batch, seq), generator=generator)}
        return {**call, "attention_mask": zoo.padding_mask(batch, seq)} if padding else call
    if hasattr(config, "image_size"):
        channels = getattr(config, "num_channels", 3)
        side = config.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}
    raise FuserError(f"the inputs of {name} cannot be guessed: let it return a pair (module, inputs)")


def _converted(found: Named, dtype: str) -> Named:
    to = getattr(torch, dtype, None)
    if not isinstance(to, torch.dtype) or not to.is_floating_point:
        raise FuserError(f"{dtype!r} is not a floating-point dtype of PyTorch; use float32 or bfloat16")

    def convert(value: Any) -> Any:
        return value.to(to) if isinstance(value, Tensor) and value.is_floating_point() else value

    args = tuple(convert(value) for value in found.args)
    kwargs = {key: convert(value) for key, value in found.kwargs.items()}
    return Named(found.name, found.model.to(to), args, kwargs)
