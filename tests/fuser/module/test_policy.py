"""When calls are compiled: rules on numbers, fed with numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.module.policy import AT_ONCE, ATTEMPTS, Comparison, CompilationPolicy
from fuser.module.programs import ProgramCache

COMPILE, ORIGINAL, FUSED = 0.5, 0.02, 0.01


class Server:
    """A model that takes ``ORIGINAL`` seconds a call, its programs ``FUSED`` and their compilation ``COMPILE``."""

    def __init__(self, places: int = 64, original: float = ORIGINAL) -> None:
        self.policy = CompilationPolicy()
        self.programs: ProgramCache[int, str] = ProgramCache(places)
        self.original = original
        self.seconds = 0.0
        self.compilations = 0

    def call(self, key: int) -> None:
        if self.programs.use(key) is not None:
            self.seconds += FUSED
            return
        now, oldest = self.programs.tick(), self.programs.oldest
        if self.policy.admits(key, "form", None, label=str(key), now=now, oldest=oldest):
            self.policy.compiled(key, None, COMPILE)
            self.policy.succeeded("form")
            self.programs.add(key, "program")
            self.compilations += 1
            self.seconds += COMPILE + FUSED
        else:
            self.policy.ran_original(key, self.original)
            self.seconds += self.original

    def serve(self, keys: Iterable[int]) -> None:
        for key in keys:
            self.call(key)


def test_the_first_calls_compile_at_once_and_others_wait() -> None:
    server = Server()
    server.serve(range(AT_ONCE))
    assert server.compilations == AT_ONCE
    server.serve(range(AT_ONCE, 100))
    assert server.compilations == AT_ONCE


def test_a_call_compiles_when_the_original_has_taken_as_long_as_compiling() -> None:
    server = Server()
    server.serve(range(AT_ONCE))
    server.serve([99] * round(COMPILE / ORIGINAL))
    assert server.compilations == AT_ONCE
    (reason,) = server.policy.reasons
    assert reason.startswith("99 was called 25 times and took 0.5 s; it is compiled when that reaches 0.5 s")
    server.call(99)
    assert server.compilations == AT_ONCE + 1 and server.policy.reasons == ()


def test_a_stream_of_calls_that_never_come_again_costs_what_the_original_costs() -> None:
    server = Server()
    server.serve(range(1000))
    assert server.seconds == pytest.approx(AT_ONCE * (COMPILE + FUSED) + (1000 - AT_ONCE) * ORIGINAL)


def test_calls_in_turn_beyond_the_places_do_not_drive_each_other_out() -> None:
    server = Server()
    for _ in range(60):
        server.serve(range(80))
    assert server.compilations == len(server.programs) == 64
    before = server.seconds
    server.serve(range(80))
    assert server.seconds - before == pytest.approx(64 * FUSED + 16 * ORIGINAL)


def test_programs_that_nobody_calls_any_more_give_way() -> None:
    server = Server(places=4)
    server.serve([*range(4)] * 3)
    server.serve([*range(10, 14)] * 40)
    assert sorted(key for key, _ in server.programs.items()) == [10, 11, 12, 13]


def test_a_frequent_newcomer_takes_the_place_of_a_rare_program() -> None:
    server = Server(places=8)
    for _ in range(30):
        server.serve([*range(8), 99, 99])
    assert 99 in server.programs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=300),
    st.integers(1, 12),
    st.sampled_from([0.001, 0.02, 0.4, 3.0]),
)
def test_whatever_is_called_waiting_and_compiling_cost_at_most_twice_the_original(
    calls: list[int], places: int, original: float
) -> None:
    server = Server(places, original)
    server.serve(calls)
    spent_running = sum(original for _ in calls)
    assert server.compilations * COMPILE <= AT_ONCE * COMPILE + spent_running + 1e-9
    assert len(server.programs) <= places


def test_what_fails_is_tried_again_at_growing_distances_and_then_no_more() -> None:
    policy = CompilationPolicy()
    attempts = []
    for request in range(1000):
        if policy.admits(request, "form", None, label="", now=request):
            attempts.append(request)
            policy.failed(request, "form")
    assert len(attempts) == ATTEMPTS
    assert [b - a for a, b in itertools.pairwise(attempts)] == [1, 5, 17, 65]


def test_failures_of_one_form_say_nothing_about_another() -> None:
    policy = CompilationPolicy()
    for request in range(ATTEMPTS):
        policy.failed(request, "form")
    assert not policy.admits("key", "form", None, label="", now=0)
    assert policy.admits("key", "other", None, label="", now=0)


def test_a_success_forgives_failures() -> None:
    policy = CompilationPolicy()
    for request in range(ATTEMPTS):
        policy.failed(request, "form")
    policy.succeeded("form")
    assert policy.admits("key", "form", None, label="", now=0)


def test_of_calls_that_differ_in_floats_only_the_first_compiles_at_once() -> None:
    policy = CompilationPolicy()
    assert policy.admits(0.5, "form", "kin", label="0.5", now=0)
    policy.compiled(0.5, "kin", COMPILE)
    assert not policy.admits(0.6, "form", "kin", label="0.6", now=1)
    policy.ran_original(0.6, COMPILE)
    assert policy.admits(0.6, "form", "kin", label="0.6", now=2)


def test_a_request_may_lower_how_many_compile_at_once() -> None:
    policy = CompilationPolicy()
    assert policy.admits(0, "form", None, label="", now=0, at_once=1)
    policy.compiled(0, None, COMPILE)
    assert not policy.admits(1, "form", None, label="", now=1, at_once=1)
    assert policy.admits(1, "form", None, label="", now=2)


def test_what_is_remembered_of_calls_is_bounded() -> None:
    server = Server()
    server.serve(range(5000))
    policy = server.policy
    for number in range(1000):
        policy.compiled(number, number, COMPILE)
        policy.failed(number, number)
    assert max(map(len, (policy._waiting, policy._kin, policy._failures))) <= 256
    assert len(policy.reasons) == 6 and policy.reasons[-1].startswith("251 more calls wait")


# ---- the program or the original


def compare(original: Iterable[float], program: Iterable[float]) -> Comparison:
    comparison, times = Comparison(), {True: iter(original), False: iter(program)}
    while not comparison.is_complete:
        turn = comparison.original_is_next
        comparison.add(next(times[turn]), original=turn)
    return comparison


@pytest.mark.parametrize(("program", "faster"), [(2.0, False), (0.5, True)])
def test_the_faster_of_program_and_original_is_found_by_medians(program: float, faster: bool) -> None:
    # The first turn of each, and one that something disturbed, do not count.
    comparison = compare([50, 1, 1, 30, 1, 1], [0.001, program, program, program, 30, program])
    assert comparison.original_is_faster is not faster
    assert comparison.medians == {True: 1.0, False: program}


def test_program_and_original_take_turns() -> None:
    comparison, turns = Comparison(), []
    while not comparison.is_complete:
        turns.append(comparison.original_is_next)
        comparison.add(1.0, original=turns[-1])
    assert turns == [False, True] * 6
    assert not comparison.original_is_faster
