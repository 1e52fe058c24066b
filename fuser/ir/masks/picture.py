"""Pictures of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fuser.ir.errors import MaskError
from fuser.ir.masks.columns import Bools, chunks

Rows = Callable[[int, int], Bools]
"""Rows ``start:stop`` of a mask: bool, (stop - start, kv_len)."""

_CELLS = 512
_PANELS_PER_ROW = 4
_LARGEST_ASPECT = 8


def block_density(rows: Rows, n: int, m: int, cells: int = _CELLS) -> npt.NDArray[np.float64]:
    """Share of allowed pairs in at most ``cells`` x ``cells`` blocks of near-equal size: float64 in [0, 1], 2-D."""
    row_edges, col_edges = (np.arange(min(cells, size)) * size // min(cells, size) for size in (n, m))
    sums = np.zeros((len(row_edges), len(col_edges)), np.int64)
    for start, stop in chunks(n, m):
        by_column = np.add.reduceat(rows(start, stop), col_edges, axis=1, dtype=np.int64)
        np.add.at(sums, np.searchsorted(row_edges, np.arange(start, stop), side="right") - 1, by_column)
    area = np.outer(np.diff(np.append(row_edges, n)), np.diff(np.append(col_edges, m)))
    shares: npt.NDArray[np.float64] = sums / area
    return shares


def draw(path: Path, title: str, panels: Iterable[tuple[str, Rows]], heads: int | None, n: int, m: int) -> None:
    """Write a PNG picture of masks (n, m): one panel with its name for each of ``heads``, one without a name for None.

    MaskError if matplotlib is missing or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MaskError("drawing needs matplotlib: pip install matplotlib") from error
    if not (n and m):
        raise MaskError(f"cannot draw a mask with q_len = {n}, kv_len = {m}")
    across = min(heads or 1, _PANELS_PER_ROW)
    down = -(-(heads or 1) // across)
    figure = Figure(figsize=(4.2 * across, 4.2 * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_literal(title), fontsize=10, wrap=True)
    for h, (name, rows) in enumerate(panels):
        axes = figure.add_subplot(down, across, h + 1)
        shares = block_density(rows, n, m)
        # Square root: single pairs in a large block stay visible.
        aspect: Literal["equal", "auto"] = "equal" if max(n, m) <= _LARGEST_ASPECT * min(n, m) else "auto"
        axes.imshow(
            np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, extent=(0, m, n, 0), aspect=aspect, interpolation="nearest"
        )
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        if heads is not None:
            axes.set_title(f"head {h}: {_literal(name)}", fontsize=8, wrap=True)
    figure.savefig(path, format="png", dpi=150)


def _literal(name: str) -> str:
    """Text that matplotlib takes for no formula, whatever dollar signs are in a function's name."""
    return name.replace("$", r"\$")
