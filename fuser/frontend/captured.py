"""What a capture of a model is: an ATen graph, and what it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuser.frontend.output_structure import OutputSpec
from fuser.frontend.sizes import SizeRange


@dataclass(frozen=True)
class Captured:
    """An ATen graph over flat inputs, of operators as the model calls them where these have handlers.

    ``graph`` has placeholders for ``parameters`` (name in the graph → the live tensor of the model), then for the
    tensors of the call; its output is the flat tuple of tensors that ``output`` rebuilds the model's result from.
    ``asks_modes`` says whether the model asked if gradients or inference mode are on, ``lifted`` names the parameters
    that are tensors which no module has registered, and ``sizes`` says for which calls the graph holds: for shapes of
    one kind if its sizes are named, else for those that it was captured with. ``known`` has the contents of inputs that
    the graph is to be raised for, by the name of the input and ``_known``. Inputs that the model writes in place are
    named by ``updated``: what they hold then are the last results of the graph, behind those of ``output``.
    """

    graph: torch.fx.GraphModule
    parameters: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    output: OutputSpec
    asks_modes: bool = False
    lifted: frozenset[str] = frozenset()
    sizes: SizeRange = field(default_factory=lambda: SizeRange(()))
    known: Mapping[str, Tensor] = field(default_factory=dict)
    updated: tuple[str, ...] = ()
