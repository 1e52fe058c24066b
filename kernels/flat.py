"""FLAT: attention whose logits live one tile at a time, in the granularity of batch entries, heads or rows.

A tile computes whole rows of logits, their softmax and their product with the values before the next tile starts, so
keys are never split and nothing is rescaled. After Kao et al., "FLAT: An Optimized Dataflow for Mitigating Attention
Bottlenecks", ASPLOS 2023, doi:10.1145/3575693.3575747, table 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from fuser.ir.errors import PlanError


class Granularity(str, enum.Enum):
    """What a tile holds of the logits (B, H, N, M): everything, whole batch entries, whole heads, or rows of heads."""

    ALL = "all"
    BATCH = "batch"
    HEAD = "head"
    ROW = "row"

    @classmethod
    def of(cls, value: str | Granularity) -> Granularity:
        """The granularity of a name. Raises PlanError for an unknown one."""
        try:
            return cls(value)
        except ValueError as error:
            names = ", ".join(each.value for each in cls)
            raise PlanError(f"{value!r} is no granularity: choose one of {names}") from error


@dataclass(frozen=True)
class Tile:
    """Extents of a tile: batch entries, heads and query rows; always all keys."""

    batch: int
    heads: int
    rows: int

    def __post_init__(self) -> None:
        for name, extent in (("batch", self.batch), ("heads", self.heads), ("rows", self.rows)):
            _extent(f"the {name} extent of a tile", extent)

    def logit_elements(self, kv_len: int) -> int:
        """Logits of one tile."""
        return self.batch * self.heads * self.rows * kv_len

    def live_elements(
        self, kv_len: int, head_dim: int, *, value_dim: int | None = None, double_buffered: bool = True
    ) -> int:
        """Elements of Q, K, V, output and logits that one tile needs at a time.

        ``Bx·Hx·(4·R·d + 4·N·d + R·N)``: all but the logits twice, so that the next tile loads meanwhile; with
        ``double_buffered=False`` once. ``value_dim`` is the width of V and of the output where it is not ``head_dim``.
        """
        width = head_dim + (head_dim if value_dim is None else value_dim)
        once = (self.rows + kv_len) * width
        return self.batch * self.heads * ((2 if double_buffered else 1) * once + self.rows * kv_len)


@dataclass(frozen=True)
class Choice:
    """A granularity with its tile."""

    granularity: Granularity
    tile: Tile


def tile_of(granularity: str | Granularity, batch: int, heads: int, q_len: int, rows: int | None = None) -> Tile:
    """The smallest tile of a granularity; ``rows`` (row granularity only) defaults to 1.

    Raises PlanError for extents below one, and for ``rows`` above ``q_len`` or of another granularity than row.
    """
    for name, extent in (("batch", batch), ("heads", heads), ("q_len", q_len)):
        _extent(name, extent)
    kind = Granularity.of(granularity)
    if kind is Granularity.ROW:
        return check_tile(kind, Tile(1, 1, 1 if rows is None else rows), batch, heads, q_len)
    if rows is not None:
        raise PlanError(f"{kind.value} granularity takes all {q_len} rows: rows belongs to row granularity")
    if kind is Granularity.HEAD:
        return Tile(1, 1, q_len)
    return Tile(1 if kind is Granularity.BATCH else batch, heads, q_len)


def check_tile(granularity: Granularity, tile: Tile, batch: int, heads: int, q_len: int) -> Tile:
    """``tile`` if it is one of the granularity. Raises PlanError, naming the extent that must change."""
    whole = {
        Granularity.ALL: ("batch", "heads", "rows"),
        Granularity.BATCH: ("heads", "rows"),
        Granularity.HEAD: ("rows",),
        Granularity.ROW: (),
    }[granularity]
    for name, extent, full in (
        ("batch", tile.batch, batch),
        ("heads", tile.heads, heads),
        ("rows", tile.rows, q_len),
    ):
        if extent > full:
            raise PlanError(f"a tile of {extent} {name} is larger than the problem, which has {full}")
        if name in whole and extent != full:
            raise PlanError(
                f"a tile of {granularity.value} granularity has all {full} {name}, got {extent}: "
                "choose a finer granularity or leave the tile out"
            )
    return tile


def live_elements(
    granularity: str | Granularity,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    rows: int | None = None,
    double_buffered: bool = True,
) -> int:
    """Elements that a granularity keeps on chip, by the formulas of the paper's table 1 (see :class:`Tile`)."""
    _extent("kv_len", kv_len)
    _extent("head_dim", head_dim)
    tile = tile_of(granularity, batch, heads, q_len, rows)
    return tile.live_elements(kv_len, head_dim, double_buffered=double_buffered)


def largest_rows(elements: int, kv_len: int, head_dim: int, double_buffered: bool = True) -> int:
    """Most rows of one head that a buffer of so many elements holds; 0 when not even one fits.

    ``(S - 4·N·d) // (4·d + N)``, since all keys and values stay.
    """
    fixed = 2 * (2 if double_buffered else 1) * head_dim
    return max(0, (elements - fixed * kv_len) // (fixed + kv_len))


def longest(elements: int, head_dim: int, rows: int = 1, double_buffered: bool = True) -> int:
    """Most keys with which tiles of ``rows`` rows of one head fit a buffer of so many elements; 0 if none do."""
    fixed = 2 * (2 if double_buffered else 1) * head_dim
    return max(0, (elements - fixed * rows) // (fixed + rows))


def choose(
    buffer_bytes: int,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    *,
    element_bytes: int = 4,
    double_buffered: bool = True,
) -> Choice:
    """The largest tile, of the coarsest granularity, whose live elements fit a buffer.

    Coarse tiles have the most parallel work. Raises PlanError when not even one row fits, with the smallest buffer that
    works.
    """
    for name, extent in (
        ("buffer_bytes", buffer_bytes),
        ("batch", batch),
        ("heads", heads),
        ("q_len", q_len),
        ("kv_len", kv_len),
        ("head_dim", head_dim),
        ("element_bytes", element_bytes),
    ):
        _extent(name, extent)
    room = buffer_bytes // element_bytes

    def live(*extents: int) -> int:
        return Tile(*extents).live_elements(kv_len, head_dim, double_buffered=double_buffered)

    entries = min(batch, room // live(1, heads, q_len))
    if entries == batch:
        return Choice(Granularity.ALL, Tile(batch, heads, q_len))
    if entries:
        return Choice(Granularity.BATCH, Tile(entries, heads, q_len))
    if some := room // live(1, 1, q_len):
        return Choice(Granularity.HEAD, Tile(1, some, q_len))
    if rows := largest_rows(room, kv_len, head_dim, double_buffered):
        return Choice(Granularity.ROW, Tile(1, 1, rows))
    raise PlanError(
        f"a buffer of {buffer_bytes} bytes is too small for one row of attention over {kv_len} keys of {head_dim}: "
        f"the smallest that works is {live(1, 1, 1) * element_bytes} bytes"
    )


def _extent(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name} must be an integer above zero, got {value!r}")
