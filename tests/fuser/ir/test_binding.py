from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fuser.ir.binding import Binder, Late, bound
from fuser.ir.size import named, result

BATCH, SEQUENCE = named("batch"), named("sequence", high=512)


@dataclass(frozen=True)
class Part:
    shape: tuple[int, ...]
    label: str
    other: Any = None


@dataclass(frozen=True)
class Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("bad luck")


TREE = Part((BATCH, SEQUENCE * 768), "x", [Part((3,), "y"), {"k": (BATCH + 1, 2.5)}, Checked(BATCH)])


def test_every_size_in_a_tree_is_bound() -> None:
    made = bound(TREE, {"batch": 3, "sequence": 10, "unused": 4})
    assert made == Part((3, 7680), "x", [Part((3,), "y"), {"k": (4, 2.5)}, Checked(3)])
    assert made == Binder(TREE)({"sequence": 10, "batch": 3})
    assert type(made) is Part and hash(made.shape) == hash((3, 7680))


def test_what_has_no_sizes_is_shared_with_the_tree() -> None:
    static = Part((1, 2), "static", ["list"])
    assert bound(static, {}) is static
    made = bound(Part((BATCH,), "x", static), {"batch": 2})
    assert made.other is static


def test_equal_parts_are_made_once() -> None:
    calls = []

    def note(*arguments: Any) -> int:
        calls.append(arguments)
        return len(calls)

    tree = tuple(Part((result(note, (SEQUENCE, True), Part((BATCH,), "a")),), "p") for _ in range(3))
    made = bound(tree, {"batch": 2, "sequence": 9})
    assert calls == [((9, True), Part((2,), "a"))] and made[0] is made[1] is made[2]


def test_arguments_that_are_equal_but_not_alike_are_kept_apart() -> None:
    tree = tuple(Late(lambda *a: a, (BATCH, (kind,))) for kind in (1, True, 1.0))
    assert [type(made[1][0]) for made in bound(tree, {"batch": 2})] == [int, bool, float]


def test_late_values_are_any_values_made_from_bound_arguments() -> None:
    inner = Late(lambda size: "ab" * size, (BATCH,))
    assert bound((Late(len, (inner,)), inner), {"batch": 4}) == (8, "abababab")


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"batch": 3}, "size 'sequence' is missing"),
        ({"batch": 1, "sequence": 8}, "'batch' is from 2 on here, not 1"),
        ({"batch": 3, "sequence": 513}, "'sequence' is from 2 to 512 here, not 513"),
    ],
)
def test_sizes_that_the_tree_is_not_for_are_refused(sizes: dict[str, int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        bound(TREE, sizes)


def test_classes_that_check_themselves_do() -> None:
    with pytest.raises(ValueError, match="bad luck"):
        bound(TREE, {"batch": 13, "sequence": 2})
