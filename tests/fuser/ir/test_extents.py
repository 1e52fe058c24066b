from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import pytest

from fuser.ir.extents import Extents
from fuser.kernels.attention import AttentionExtents, Distances, HeadStrides, MaskStrides


@dataclass(frozen=True)
class Strides(Extents):
    batch: int
    row: int


@dataclass(frozen=True)
class Example(Extents):
    rows: int
    scale: float
    q: Strides
    k: Strides
    periods: tuple[int, ...]
    masks: tuple[Strides, ...]


EXAMPLE = Example(3, 0.5, Strides(4, 5), Strides(6, 7), (8, 9), (Strides(10, 11),))


def test_numbers_lie_in_the_order_of_the_fields() -> None:
    assert tuple(EXAMPLE.words()) == (3, 0.5, *range(4, 12))
    assert EXAMPLE.pack() == struct.pack("=qd8q", 3, 0.5, *range(4, 12))


def test_a_struct_without_arrays_packs_the_same_words() -> None:
    strides = (HeadStrides(*range(i, i + 3)) for i in (7, 10, 13, 16, 19))
    made = AttentionExtents(1, 2, 3, 4, 5, 0.25, 6, *strides, MaskStrides(22, 23, 24, 25), Distances(26, 27, 28))
    assert made.pack() == struct.pack("=5qd23q", 1, 2, 3, 4, 5, 0.25, *range(6, 29))
    assert Strides(7, -1).pack() == struct.pack("=2q", 7, -1)
    with pytest.raises(struct.error):
        Strides(1 << 63, 0).pack()


def test_a_declaration_holds_its_parts_once_and_no_empty_arrays() -> None:
    assert Example.declaration(periods=2, masks=0) == (
        "struct Strides {\n  int64_t batch;\n  int64_t row;\n};\n"
        "struct Example {\n  int64_t rows;\n  double scale;\n  Strides q;\n  Strides k;\n  int64_t periods[2];\n};\n"
    )


@pytest.mark.parametrize("lengths", [{}, {"periods": 1}, {"periods": 1, "masks": 1, "rows": 1}])
def test_every_open_length_is_asked_for(lengths: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="lengths of Example"):
        Example.declaration(**lengths)


@pytest.mark.parametrize(("rows", "scale"), [(1 << 63, 0.5), (0.5, 0.5), (1, "wide")])
def test_what_does_not_fit_is_refused(rows: Any, scale: Any) -> None:
    with pytest.raises(struct.error):
        Example(rows, scale, Strides(0, 0), Strides(0, 0), (), ()).pack()


def test_a_field_that_has_no_place_in_a_struct_is_refused() -> None:
    @dataclass(frozen=True)
    class Named(Extents):
        name: str

    with pytest.raises(TypeError, match=r"Named\.name has no place in a struct"):
        Named.declaration()
