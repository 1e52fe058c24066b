"""``fuser.optimize`` for models of sentence-transformers: ``encode`` and ``predict`` without padding.

What comes back is a model of the same class, with the same weights, whose transformers run optimized, and whose batches
are as large as their tokens allow. Works with sentence-transformers from 3 (cross encoders: from 4, where they are
modules), which is not imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fuser.module.options import Options

_PACKAGE = "sentence_transformers"
_BATCHES = 16
"""Batches of the caller's size that are tokenized, and sorted by their tokens, together."""
_LOOPS = {"SentenceTransformer": ("encode", "sentence_embedding"), "CrossEncoder": ("predict", "scores")}
"""The method of a class that runs it in batches, and all that it takes of each."""
_WITHOUT_PADDING = {
    "Dense",
    "Dropout",
    "LSTM",
    "LayerNorm",
    "LogitScore",
    "Normalize",
    "Pooling",
    "WeightedLayerPooling",
}
"""Modules behind a transformer of whose results padding is no part, whatever it is."""
_CONTAINERS = {"Asym", "ModuleDict", "Router", "Sequential", "Transformer", *_LOOPS}
M = TypeVar("M", bound=nn.Module)


def is_served(model: nn.Module) -> bool:
    """Whether this is a model of sentence-transformers with a transformer in PyTorch."""
    return any(map(_is_theirs, type(model).__mro__)) and (isinstance(model, _Served) or bool(_transformers_of(model)))


def serve(model: M, options: Options, optimize: Callable[[nn.Module, Options], nn.Module]) -> M:
    """A model like ``model`` whose transformers are what ``optimize`` makes of them, without padding if modules behind
    them leave it alone.

    Weights, tokenizers and other modules are those of ``model``, which stays as it is; copies, also in the processes of
    a pool, are made of it and served again. ``encode`` of a SentenceTransformer and ``predict`` of a CrossEncoder sort
    ``16 × batch_size`` texts at a time by their tokens and run them in batches of about ``batch_tokens`` of these, an
    attribute that may be set. Where all of a batch is returned (``output_value="token_embeddings"``), batches are the
    caller's, and positions of padding are zero.
    """
    if isinstance(model, _Served):
        return serve(model._serving.model, options, optimize)
    inner = dataclasses.replace(options, padding="skip") if _leaves_padding_alone(model) else options
    made = {transformer: optimize(transformer, inner) for transformer in _transformers_of(model)}
    cls = type(model)
    members: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    for base in cls.__mro__:
        # Before 6, cross encoders are no chain of modules.
        if base.__name__ in _LOOPS and _is_theirs(base) and issubclass(base, nn.Sequential):
            name, output = _LOOPS[base.__name__]
            if getattr(cls, name) is base.__dict__[name]:
                members[name] = _by_tokens(getattr(cls, name), output)
    metaclass: Any = type(cls)
    served: M = _with(model, made, metaclass(cls.__name__, (_Served, cls), members))
    object.__setattr__(served, "_serving", _Serving(model, options, optimize, list(made.values())))
    return served


@dataclass
class _Serving:
    """What a served model was made from and of, and the output that a loop of the running thread wants."""

    model: nn.Module
    options: Options
    optimize: Callable[[nn.Module, Options], nn.Module]
    transformers: list[Any]
    loop: threading.local = field(default_factory=threading.local)


class _Served:
    """What comes before the class of a model."""

    _serving: _Serving
    batch_tokens = 4096

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run: Any = super().forward  # type: ignore[misc]
        output = getattr(self._serving.loop, "output", None)
        features: Any = args[0] if args else None
        if output is None or not _has_rows(features):
            return run(*args, **kwargs)
        tokens = features["attention_mask"].sum(1).cpu().numpy()
        parts = batches(tokens, self.batch_tokens)
        found = torch.cat([run(_part(features, part), *args[1:], **kwargs)[output] for part in parts])
        return {output: found[torch.from_numpy(np.argsort(np.concatenate(parts)))]}

    def report(self) -> str:
        """What was fused in each of its transformers, and what was not and why."""
        return "\n\n".join(transformer.report() for transformer in self._serving.transformers)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return serve, (self._serving.model, self._serving.options, self._serving.optimize)


def batches(tokens: npt.NDArray[Any], budget: int) -> list[npt.NDArray[np.intp]]:
    """The numbers of rows with so many tokens each in batches of about equally many tokens and about ``budget``, those
    of most tokens first."""
    order = np.argsort(-tokens, kind="stable")
    ends = np.cumsum(tokens[order])
    total = max(int(ends[-1]), 1)
    batch = (ends - tokens[order]) * -(-total // max(budget, 1)) // total
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1)


def _by_tokens(method: Callable[..., Any], output: str) -> Callable[..., Any]:
    """A loop over batches with larger ones, of which ``forward`` makes those that run."""
    parameters = inspect.signature(method).parameters
    place = list(parameters).index("batch_size") - 1

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(list(parameters)[1:], args, strict=False)), **kwargs}
        size = given.get("batch_size", parameters["batch_size"].default)
        processes = given.get("pool") is not None or isinstance(given.get("device"), (list, tuple))
        if processes or given.get("output_value", output) != output or type(size) is not int or size < 1:
            return method(self, *args, **kwargs)
        if len(args) > place:
            args = (*args[:place], size * _BATCHES, *args[place + 1 :])
        else:
            kwargs["batch_size"] = size * _BATCHES
        loop = self._serving.loop
        loop.output = output
        try:
            return method(self, *args, **kwargs)
        finally:
            loop.output = None

    return run


def _has_rows(features: Any) -> bool:
    """Whether features are texts padded to one length: tensors (texts, tokens), and plain values."""
    mask = features.get("attention_mask") if isinstance(features, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not len(mask):
        return False
    return all(value.shape == mask.shape for value in features.values() if isinstance(value, Tensor))


def _part(features: Mapping[str, Any], rows: npt.NDArray[np.intp]) -> dict[str, Any]:
    """Some of the texts, padded to the longest of these."""
    chosen = torch.from_numpy(rows).to(features["attention_mask"].device)
    there = features["attention_mask"][chosen].any(0).nonzero()
    columns = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(1)
    return {
        name: value[chosen, columns].contiguous() if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


def _is_theirs(cls: type) -> bool:
    return cls.__module__.split(".")[0] == _PACKAGE


def _transformers_of(model: nn.Module) -> list[nn.Module]:
    """The models of transformers in a model that are in no other."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    found = (transformer for child in model.children() for transformer in _transformers_of(child))
    return list(dict.fromkeys(found))


def _leaves_padding_alone(model: nn.Module) -> bool:
    """Whether nothing that a model returns follows from what its transformers give for padding."""
    children: Sequence[nn.Module] = [child for child in model.children() if _transformers_of(child) != [child]]
    if not (_is_theirs(type(model)) or type(model).__module__.startswith("torch.nn.")):
        return False
    name = type(model).__name__
    return name in _WITHOUT_PADDING or (name in _CONTAINERS and all(map(_leaves_padding_alone, children)))


def _with(model: M, made: Mapping[nn.Module, nn.Module], cls: type[M] | None = None) -> Any:
    """A copy of a model with other parts in it, of class ``cls`` if given; what has none of the parts is shared."""
    if model in made:
        return made[model]
    modules = {name: child if child is None else _with(child, made) for name, child in model._modules.items()}
    if cls is None and all(child is model._modules[name] for name, child in modules.items()):
        return model
    copied = object.__new__(type(model) if cls is None else cls)
    object.__setattr__(copied, "__dict__", {**model.__dict__, "_modules": modules})
    return copied
