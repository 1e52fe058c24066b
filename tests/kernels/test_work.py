"""How threads share units of work (templates/cpu/work.h)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.codegen.render import header_folder
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import Source, build_and_load
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target
from fuser.runtime.library import Kernel

# Of every unit how often it was done, and by whom; of every thread whether spans had more units than were asked for.
SOURCE = Source(
    "fuser_share_units",
    """
#include <omp.h>
#include "abi.h"
#include "work.h"
extern "C" int fuser_share_units(const FuserArgs* args, void*) {
  const auto* e = static_cast<const int64_t*>(args->extents);
  const int64_t count = e[0], team = e[1], most = e[2], least = e[3], slow = e[4];
  auto* times = static_cast<std::atomic<int64_t>*>(args->tensors[0]);
  auto* who = static_cast<int64_t*>(args->tensors[1]);
  work::Units units(args->workspace, count, args->threads);
  std::atomic<int> wrong{0}, rest{int(count)};
#pragma omp parallel num_threads(int(team))
  {
    const int64_t thread = omp_get_thread_num();
    for (work::Span s; (s = units.take(thread, most, least)).begin < s.end;) {
      if (s.end - s.begin > most || s.begin < 0 || s.end > count) wrong = 1;
      for (int64_t u = s.begin; u < s.end; ++u) times[u].fetch_add(1), who[u] = thread;
      rest -= int(s.end - s.begin);
      // The slow thread does nothing more until the others have done all else that can be taken.
      if (thread == slow && team > 1)
        for (int turns = 0; rest > 0 && turns < 1000000; ++turns) asm volatile("");
    }
  }
  return wrong;
}
""",
)


@pytest.fixture(scope="module")
def share() -> Kernel:
    target = cpu_target()
    return build_and_load([SOURCE], target, headers=header_folder(target), cache=default_cache())[SOURCE.symbol]


def shares(kernel: Kernel, count: int, threads: int, team: int, most: int, least: int, slow: int = -1) -> torch.Tensor:
    """Who has done every unit, after a check that each was done once."""
    times, who = torch.zeros(2, count + 1, dtype=torch.int64)
    lines = torch.full((8 * threads + 8,), -1, dtype=torch.int64)
    room = lines.data_ptr() + -lines.data_ptr() % 64
    kernel(KernelArgs.pack([times.data_ptr(), who.data_ptr()], (count, team, most, least, slow), threads, room))
    assert times[:count].eq(1).all() and times[count] == 0
    return who[:count]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 9), st.data())
def test_each_unit_is_done_once(share: Kernel, count: int, threads: int, data: st.DataObject) -> None:
    """Also where the team is smaller than was asked for."""
    team = data.draw(st.integers(1, threads))
    most = data.draw(st.integers(1, 40))
    shares(share, count, threads, team, most, data.draw(st.integers(1, most)), data.draw(st.integers(-1, threads)))


def test_one_thread_does_what_others_do_not(share: Kernel) -> None:
    assert shares(share, 1000, 4, 1, 1, 1).eq(0).all()


def test_work_of_a_slow_thread_is_done_by_others(share: Kernel) -> None:
    who = shares(share, 1000, 2, 2, 1, 1, slow=1)
    assert int(who.eq(1).sum()) < 250
