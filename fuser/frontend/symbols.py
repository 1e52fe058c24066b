"""PyTorch's symbols for sizes while a model is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch.fx.experimental import proxy_tensor, sym_node

_ARITHMETIC = ("mul", "add", "sub", "mod", "eq", "ne", "ge", "gt", "le", "lt", "sym_max", "sym_min")


@contextlib.contextmanager
def remembered_arithmetic() -> Iterator[None]:
    """Compute every formula of two sizes once: a trace asks thousands of times for the strides and sizes of memory of
    tensors of the same few shapes, which takes longer than all else that it does."""
    known: dict[Any, Any] = {}
    with contextlib.ExitStack() as patches:
        for method in _ARITHMETIC:
            plain = getattr(sym_node.SymNode, f"_{method}", None)
            if plain is not None:
                patches.enter_context(
                    mock.patch.object(sym_node.SymNode, f"_{method}", _remembering(method, plain, known))
                )
        yield


def _remembering(method: str, plain: Callable[[Any, Any], Any], known: dict[Any, Any]) -> Callable[[Any, Any], Any]:
    def compute(a: Any, b: Any) -> Any:
        # What the graph computes itself has a node of its own each time.
        if proxy_tensor.get_proxy_mode():
            return plain(a, b)
        key = (method, a._expr, a.pytype, b._expr, b.pytype, id(a.shape_env))
        result = known.get(key)
        if result is None:
            # The result keeps its environment, and so the number of this, alive.
            result = known[key] = plain(a, b)
        return result

    return compute
