"""FLAT's footprint formulas against the values that they have in the literature, and the choice of a tile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuser.ir.errors import PlanError
from fuser.kernels.flat import Choice, Granularity, Tile, choose, largest_rows, live_elements, longest, tile_of

MIB = 1 << 20
# MiB of 2-byte elements for 64 entries, 8 heads of 64, double buffered: all, batch, head, then rows 1024, 256, 64, 1.
TABLE = {
    512: (512, 8.0, 1.0, None, 0.62, 0.34, 0.25),
    2048: (5120, 80, 10, 5.5, 2.1, 1.28, 1.00),
    4096: (18432, 288, 36, 10.5, 4.1, 2.53, 2.01),
    16384: (270336, 4224, 528, 40.5, 16.1, 10.0, 8.03),
    65536: (4227072, 66048, 8256, 160.5, 64.1, 40.0, 32.1),
}


@pytest.mark.parametrize("length", TABLE)
def test_live_elements(length: int) -> None:
    def mib(granularity: str, rows: int | None = None) -> float:
        return 2 * live_elements(granularity, 64, 8, length, length, 64, rows) / MIB

    found = [mib("all"), mib("batch"), mib("head")]
    found += [mib("row", rows) if rows <= length else None for rows in (1024, 256, 64, 1)]  # type: ignore[list-item]
    # The values are rounded to three digits or so.
    assert [None if x is None else pytest.approx(x, rel=0.02) for x in TABLE[length]] == found


def test_general_form() -> None:
    b, h, n, d, r = 3, 5, 70, 16, 7
    assert live_elements("all", b, h, n, n, d) == 8 * b * h * d * n + b * h * n * n
    assert live_elements("batch", b, h, n, n, d) == 8 * h * d * n + h * n * n
    assert live_elements("head", b, h, n, n, d) == 8 * n * d + n * n
    assert live_elements("row", b, h, n, n, d, r) == 4 * r * d + 4 * n * d + r * n
    assert Tile(2, 3, r).live_elements(n, d) == 6 * (4 * r * d + 4 * n * d + r * n)
    assert Tile(2, 3, r).live_elements(n, d, double_buffered=False) == 6 * (2 * r * d + 2 * n * d + r * n)
    assert Tile(1, 1, r).live_elements(n, d, value_dim=8, double_buffered=False) == r * (d + 8) + n * (d + 8) + r * n
    assert Tile(2, 3, r).logit_elements(n) == 6 * r * n


@pytest.mark.parametrize(("kilobytes", "keys"), [(200, 388), (2000, 3890), (20000, 38909)])
def test_longest_sequence(kilobytes: int, keys: int) -> None:
    room = kilobytes * 1000 // 2
    assert longest(room, 64) == keys
    assert largest_rows(room, keys, 64) >= 1 and largest_rows(room, keys + 1, 64) == 0


@given(st.integers(1, 1 << 20), st.integers(1, 300), st.integers(1, 64), st.booleans())
def test_largest_rows_is_the_last_that_fits(room: int, keys: int, width: int, double: bool) -> None:
    rows = largest_rows(room, keys, width, double)
    assert Tile(1, 1, rows + 1).live_elements(keys, width, double_buffered=double) > room
    assert rows == 0 or Tile(1, 1, rows).live_elements(keys, width, double_buffered=double) <= room


SHAPE = (4, 8, 512, 512, 64)


def test_choose_takes_the_coarsest_granularity() -> None:
    def live(*extents: int) -> int:
        return 4 * Tile(*extents).live_elements(512, 64)

    assert choose(live(4, 8, 512), *SHAPE) == Choice(Granularity.ALL, Tile(4, 8, 512))
    assert choose(live(4, 8, 512) - 1, *SHAPE) == Choice(Granularity.BATCH, Tile(3, 8, 512))
    assert choose(live(1, 8, 512), *SHAPE) == Choice(Granularity.BATCH, Tile(1, 8, 512))
    assert choose(live(1, 8, 512) - 1, *SHAPE) == Choice(Granularity.HEAD, Tile(1, 7, 512))
    assert choose(live(1, 1, 512) - 1, *SHAPE) == Choice(Granularity.ROW, Tile(1, 1, 511))
    assert choose(live(1, 1, 1), *SHAPE) == Choice(Granularity.ROW, Tile(1, 1, 1))


@given(st.integers(1, 1 << 27), st.booleans())
def test_choose_fits_or_names_what_would(room: int, double: bool) -> None:
    try:
        found = choose(room, *SHAPE, element_bytes=2, double_buffered=double)
    except PlanError as error:
        least = int(str(error).split()[-2])
        assert least > room
        found = choose(least, *SHAPE, element_bytes=2, double_buffered=double)
        assert found.tile == Tile(1, 1, 1)
        with pytest.raises(PlanError):
            choose(least - 1, *SHAPE, element_bytes=2, double_buffered=double)
    else:
        assert 2 * found.tile.live_elements(512, 64, double_buffered=double) <= room


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="'column' is no granularity: choose one of all, batch, head, row"):
        Granularity.of("column")
    with pytest.raises(PlanError, match="batch must be an integer above zero"):
        tile_of("head", 0, 8, 512)
    with pytest.raises(PlanError, match="rows belongs to row granularity"):
        tile_of("head", 1, 8, 512, rows=4)
    with pytest.raises(PlanError, match="513 rows is larger than the problem, which has 512"):
        tile_of("row", 1, 8, 512, rows=513)
    with pytest.raises(PlanError, match="the rows extent of a tile must be an integer above zero, got 0"):
        Tile(1, 1, 0)
    with pytest.raises(PlanError, match="buffer_bytes must be"):
        choose(0, *SHAPE)
