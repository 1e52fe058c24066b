"""What handlers of ATen operators are registered in, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fuser.frontend.raising import Handler, Raiser
from fuser.ir.graph import TensorSpec

aten = torch.ops.aten
FEW = 16
"""Parts that are reduced as operands of one operator."""

HANDLERS: dict[Any, Handler] = {}
"""By operators, or by the names of those that only another package defines."""


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for target in targets:
            HANDLERS[target] = handler
        return handler

    return register


def given_by(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the first, by name."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def named(r: Raiser, name: str) -> tuple[str, TensorSpec]:
    return name, r.values[name]
