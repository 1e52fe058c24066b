"""What one kernel call has beside a program."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from fuser.codegen import launch
from fuser.codegen.launch import scratch

CPU = torch.device("cpu")


def test_a_thread_keeps_its_scratch_memory() -> None:
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        large = one.submit(scratch, 1 << 20, CPU).result()
        small = one.submit(scratch, 100, CPU).result()
        assert small.data_ptr() == large.data_ptr() and small.numel() >= 1 << 20
        assert other.submit(scratch, 100, CPU).result().data_ptr() != large.data_ptr()
        assert one.submit(scratch, 1 << 21, CPU).result().numel() == 1 << 21


def test_it_does_not_keep_all_that_it_was_ever_given() -> None:
    with ThreadPoolExecutor(1) as one:
        most = one.submit(scratch, launch._MOST_KEPT + 1, CPU).result()
        assert most.numel() == launch._MOST_KEPT + 1
        assert one.submit(scratch, 100, CPU).result().numel() == 100
