"""The arena: nothing that is alive at once overlaps, and little is wasted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.codegen.memory import ALIGNMENT, Lifetime, plan_arena


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    count = draw(st.integers(0, 25))
    found = []
    for i in range(count):
        first = draw(st.integers(0, 20))
        found.append(Lifetime(f"v{i}", draw(st.integers(1, 5000)), first, first + draw(st.integers(0, 8))))
    return found


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lifetimes())
def test_buffers_that_are_alive_together_do_not_overlap(buffers: list[Lifetime]) -> None:
    offsets, total = plan_arena(buffers)
    assert set(offsets) == {b.name for b in buffers}
    for i, a in enumerate(buffers):
        assert offsets[a.name] % ALIGNMENT == 0
        assert offsets[a.name] >= 0 and offsets[a.name] + a.size <= total
        for b in buffers[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert offsets[a.name] + a.size <= offsets[b.name] or offsets[b.name] + b.size <= offsets[a.name]
    live = [sum(padded(b.size) for b in buffers if b.first <= step <= b.last) for step in range(30)]
    assert max(live) <= total <= sum(padded(b.size) for b in buffers)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lifetimes())
def test_the_plan_does_not_depend_on_the_order_of_the_buffers(buffers: list[Lifetime]) -> None:
    assert plan_arena(buffers) == plan_arena(list(reversed(buffers)))


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = [100, 900, 300, 900, 100]
    chain = [Lifetime(f"v{i}", size * ALIGNMENT, i, i + 1) for i, size in enumerate(sizes)]
    _, total = plan_arena(chain)
    assert total == 1200 * ALIGNMENT


def test_buffers_that_never_meet_share_one_place() -> None:
    offsets, total = plan_arena([Lifetime(f"v{i}", 640, 2 * i, 2 * i + 1) for i in range(10)])
    assert set(offsets.values()) == {0} and total == 640


def test_no_buffers_need_no_memory() -> None:
    assert plan_arena([]) == ({}, 0)
