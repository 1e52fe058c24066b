"""What DEQ and Sanger decide, as numbers and as a picture: shares of scores and tiles computed in full, and predicted
beside true importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuser.ir.errors import FuserError
from fuser.ir.evaluation import Evaluation, run_graph
from fuser.ir.graph import Operator, is_kind
from fuser.ir.operators import PredictedAttention
from fuser.ir.prediction import Prediction
from fuser.module.compiler import Compiled


@dataclass(frozen=True)
class Shares:
    """Of the scores that may attend, those computed in full, and of tiles of scores that hold such ones, those in which
    at least one is: (B, H) float64 each, NaN where nothing may attend."""

    elements: Tensor
    tiles: Tensor


def shares(chosen: Tensor, allowed: Tensor | None = None, *, tile: int = 64) -> Shares:
    """The shares of decisions ``chosen``, bool (B, H, Sq, Sk), such as :meth:`Prediction.reference` returns.

    ``allowed``, bool and broadcastable to ``chosen``, is False for pairs that do not exist. Raises ValueError for
    other dtypes and shapes, and for a tile below one.
    """
    if chosen.dim() != 4 or chosen.dtype != torch.bool or tile < 1:
        raise ValueError(
            f"decisions are bool (B, H, Sq, Sk), not {chosen.dtype} {tuple(chosen.shape)}, tiles 1 or more"
        )
    if allowed is not None and allowed.dtype != torch.bool:
        raise ValueError(f"allowed is bool, not {allowed.dtype}")
    exists = torch.ones_like(chosen) if allowed is None else allowed.expand(chosen.shape)
    chosen = chosen & exists

    def tiles(x: Tensor) -> Tensor:
        padding = (0, -x.shape[3] % tile, 0, -x.shape[2] % tile)
        padded = torch.nn.functional.pad(x, padding)
        rows, columns = padded.shape[2] // tile, padded.shape[3] // tile
        return padded.view(*x.shape[:2], rows, tile, columns, tile).any(5).any(3)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return part.sum((2, 3), dtype=torch.float64) / whole.sum((2, 3), dtype=torch.float64)

    return Shares(share(chosen, exists), share(tiles(chosen), tiles(exists)))


def of_program(compiled: Compiled, tensors: Sequence[Tensor]) -> dict[str, Shares]:
    """The shares of every attention with few bits in a program, by the operator's name, for a call with ``tensors``:
    its graph is run by PyTorch."""
    found: dict[str, Shares] = {}

    def look(op: Operator, evaluation: Evaluation) -> None:
        if is_kind(op, PredictedAttention):
            found[op.name] = shares(*op.semantics.decisions(*(evaluation[value] for value in op.inputs)))

    run_graph(
        compiled.graph, compiled.captured.parameters, dict(zip(compiled.graph.inputs, tensors, strict=True)), look
    )
    return found


def picture(
    path: Path,
    how: Prediction,
    q: Tensor,
    k: Tensor,
    *,
    additive_mask: Tensor | None = None,
    scale: float | None = None,
    head: int = 0,
) -> None:
    """Write a picture of one head of the first batch entry: probabilities under predicted scores, true ones, and which
    scores are computed in full.

    ``q`` and ``k`` (B, H, S, D) and the other arguments are those of :meth:`Prediction.reference`. Raises FuserError
    without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FuserError("pictures of decisions need matplotlib: pip install matplotlib") from error
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    bias = torch.zeros(()) if additive_mask is None else additive_mask
    _, chosen = how.reference(q, k, k, additive_mask=additive_mask, scale=scale)
    predicted = (how.predicted(q.float(), keys, scale) + bias).softmax(-1)
    true = (q.float() * scale @ keys.mT + bias).softmax(-1)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("predicted probability", predicted), ("true probability", true), ("computed in full", chosen.float()))
    most = float(true[0, head].max())
    for axes, (title, values) in zip(figure.subplots(1, 3), panels, strict=True):
        shown = values[0, head].detach().numpy()
        axes.imshow(shown, cmap="magma", vmin=0.0, vmax=1.0 if title == "computed in full" else most, aspect="auto")
        axes.set(title=title, xlabel="key", ylabel="query")
    figure.savefig(path, dpi=100)
