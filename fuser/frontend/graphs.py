"""From a captured model to its operators."""

from __future__ import annotations

import torch

from fuser.frontend.aten import HANDLERS
from fuser.frontend.capture import Captured
from fuser.frontend.raising import Raiser
from fuser.ir.graph import OperatorGraph
from fuser.ir.masks import Mask
from fuser.kernels.base import FLOATING


def raise_graph(
    captured: Captured, attention: Mask | None = None, floating: frozenset[torch.dtype] = FLOATING
) -> OperatorGraph:
    """The operator graph of a captured model.

    ``attention`` is a mask that every self-attention (as many keys as queries) is restricted to; ``floating`` holds the
    dtypes that kernels of the target store (:func:`fuser.kernels.base.floating`). Raises CaptureError for graphs that
    mutate tensors.
    """
    return Raiser(captured, HANDLERS, attention, floating).run()
