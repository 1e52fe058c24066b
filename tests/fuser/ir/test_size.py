from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuser.ir.binding import bound
from fuser.ir.size import Size, UndecidedSizeError, bounds, maximum, named, names, result

BATCH, SEQUENCE = named("batch"), named("sequence")
VALUES = st.fixed_dictionaries({"batch": st.integers(2, 40), "sequence": st.integers(2, 600)})

Formula = Callable[[Any, Any], Any]


def formulas() -> st.SearchStrategy[Formula]:
    """Functions of batch and sequence, of numbers as well as of sizes."""

    def constant(value: int) -> Formula:
        return lambda b, s: value

    leaves: list[Formula] = [lambda b, s: b, lambda b, s: s]
    start = st.one_of(st.sampled_from(leaves), st.integers(-9, 70).map(constant))

    def more(inner: st.SearchStrategy[Formula]) -> st.SearchStrategy[Formula]:
        def pair(make: Callable[[Any, Any], Any]) -> Callable[[tuple[Formula, Formula]], Formula]:
            return lambda two: lambda b, s: make(two[0](b, s), two[1](b, s))

        both = st.tuples(inner, inner)
        divided = st.tuples(inner, st.integers(1, 65))
        return st.one_of(
            both.map(pair(lambda x, y: x + y)),
            both.map(pair(lambda x, y: x - y)),
            both.map(pair(lambda x, y: x * y)),
            both.map(pair(lambda x, y: maximum([x, y]))),
            divided.map(lambda two: lambda b, s: -(-two[0](b, s) // two[1])),
            divided.map(lambda two: lambda b, s: two[0](b, s) % two[1]),
        )

    return st.recursive(start, more, max_leaves=8)


@given(formulas(), VALUES)
def test_a_formula_of_sizes_is_what_it_is_of_their_values(formula: Formula, values: dict[str, int]) -> None:
    assert bound(formula(BATCH, SEQUENCE), values) == formula(values["batch"], values["sequence"])


@given(formulas(), VALUES)
def test_bounds_hold_for_all_values(formula: Formula, values: dict[str, int]) -> None:
    low, high = bounds(formula(BATCH, SEQUENCE))
    value = formula(values["batch"], values["sequence"])
    assert (low is None or low <= value) and (high is None or value <= high)


@given(formulas(), formulas(), VALUES)
def test_what_is_decided_holds_for_all_values(one: Formula, two: Formula, values: dict[str, int]) -> None:
    left, right = (formula(BATCH, SEQUENCE) for formula in (one, two))
    x, y = (formula(values["batch"], values["sequence"]) for formula in (one, two))
    if left == right:
        assert x == y and hash(left) == hash(right)
    for compare in (operator.lt, operator.gt, operator.le, operator.ge):
        try:
            decided = compare(left, right)
        except UndecidedSizeError:
            continue
        assert decided == compare(x, y)


def test_integers_stay_integers() -> None:
    rows = BATCH * SEQUENCE
    for value, expected in (
        (rows - SEQUENCE * BATCH, 0),
        (rows * 0, 0),
        (rows * 768 // (rows * 64), 12),
        ((rows + 3) - rows, 3),
        (rows * 768 % 64, 0),
        (maximum([3, 5]), 5),
        (math.prod([2, 3]), 6),
    ):
        assert type(value) is int and value == expected
    assert rows * 64 // SEQUENCE == BATCH * 64


def test_ranges_decide() -> None:
    assert BATCH != 1 and 0 not in (BATCH, SEQUENCE) and BATCH in (1, BATCH)
    assert max(SEQUENCE * 768, 1) == SEQUENCE * 768 and SEQUENCE * BATCH * 64 > SEQUENCE * 8
    assert bool(SEQUENCE) and bool(BATCH - 1)
    assert -(-SEQUENCE // 8) * BATCH > 1 and -(-SEQUENCE // 8) * -(-BATCH // 8) >= 1
    assert named("short", 1, 64) <= 64 < SEQUENCE + 63
    assert maximum([BATCH * SEQUENCE, SEQUENCE, 4]) == BATCH * SEQUENCE


@pytest.mark.parametrize(
    "ask",
    [
        lambda: SEQUENCE < BATCH,
        lambda: BATCH > 2,
        lambda: bool(BATCH - 4),
        lambda: int(BATCH),
        lambda: float(BATCH),
        lambda: [1, 2, 3][BATCH],
        lambda: range(BATCH),
    ],
)
def test_what_depends_on_the_sizes_is_not_guessed(ask: Callable[[], Any]) -> None:
    with pytest.raises(UndecidedSizeError, match="batch"):
        ask()


def test_sizes_print_as_formulas() -> None:
    assert str(BATCH * SEQUENCE * 768 - 3 * SEQUENCE + 4) == "768*batch*sequence - 3*sequence + 4"
    assert str(maximum([SEQUENCE // 64, 8])) == "max((sequence // 64), 8)"
    assert str(BATCH // (SEQUENCE + 1)) == "(batch // (sequence + 1))"


def test_sizes_know_their_names() -> None:
    assert names(SEQUENCE // BATCH + 1) == {"batch", "sequence"}
    assert names(maximum([named("kv"), 3])) == {"kv"} and names(7) == frozenset()


def test_sizes_copy_and_pickle_but_do_not_change() -> None:
    size = BATCH * SEQUENCE - SEQUENCE // 7
    assert pickle.loads(pickle.dumps(size)) == size == copy.deepcopy(size)
    assert {size: 1}[SEQUENCE * BATCH - SEQUENCE // 7] == 1


def test_a_result_is_computed_from_bound_arguments() -> None:
    size = result(math.gcd, SEQUENCE, 48) * 10
    assert isinstance(size, Size) and bound(size, {"sequence": 36}) == 120
