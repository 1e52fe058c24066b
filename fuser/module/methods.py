"""Methods of a model that run its forward: with a stand-in for ``self``, so that they run programs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch.utils._pytree as pytree
from torch import Tensor, nn


class BoundMethods:
    """The methods of ``model`` with a ``self`` that runs ``run`` where the model itself would run.

    The stand-in is of a subclass of the model's class and shares its attributes, the very dict, so that a method reads
    and changes the model's state; only ``self(...)`` and ``self.forward(...)`` are others. ``unserved`` is told the
    name of a method that gave tensors or arrays without them: it runs parts of the model, for which there are no
    programs.
    """

    def __init__(self, model: nn.Module, run: nn.Module, unserved: Callable[[str], None]) -> None:
        self._run = run
        self._unserved = unserved
        self._running = threading.local()
        self._self = _stand_in(model, self._counted(run))

    @property
    def is_running(self) -> bool:
        """Whether this thread is in one of the methods."""
        return bool(getattr(self._running, "calls", None))

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls = getattr(self._running, "calls", None)
            if calls:
                calls[-1] += 1
            return run(*args, **kwargs)

        return counted

    def bind(self, name: str, method: MethodType) -> Callable[..., Any]:
        """``method``, one of the model's own, called with the stand-in."""
        function = method.__func__

        @functools.wraps(method)
        def bound(*args: Any, **kwargs: Any) -> Any:
            calls: list[int] = self._running.__dict__.setdefault("calls", [])
            calls.append(0)
            try:
                result = function(self._self, *args, **kwargs)
            finally:
                served = calls.pop()
            if not served and any(isinstance(leaf, (Tensor, np.ndarray)) for leaf in pytree.tree_leaves(result)):
                self._unserved(name)
            return self._run if result is self._self else result

        return bound


def _stand_in(model: nn.Module, run: Callable[..., Any]) -> nn.Module:
    """An object with the attributes and methods of ``model`` that calls ``run`` when it is called."""
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    @functools.wraps(cls.__call__)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Copies and files of it are those of the model.
        return _itself, (model,)

    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__call__": call,
        "__reduce_ex__": reduce,
        "forward": forward,
    }
    metaclass: Any = type(cls)
    stand_in: nn.Module = object.__new__(metaclass(cls.__name__, (cls,), members))
    object.__setattr__(stand_in, "__dict__", model.__dict__)
    return stand_in


def _itself(model: nn.Module) -> nn.Module:
    return model
