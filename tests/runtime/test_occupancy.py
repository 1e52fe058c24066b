"""Occupancy against values that follow from NVIDIA's tables by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuser.ir.errors import FuserError
from fuser.ir.target import CUDA_ARCHS, cuda_target
from fuser.runtime.occupancy import multiprocessor, occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        # 2048 threads of 32 registers: everything fits.
        ("sm_80", 256, 32, 0, 8, 1.0, "warps"),
        # 64 registers: 32 warps of 2048 registers each.
        ("sm_80", 128, 64, 0, 8, 0.5, "registers"),
        # 255 registers are 8192 a warp after rounding 8160 up: 8 warps.
        ("sm_90", 128, 255, 0, 2, 0.125, "registers"),
        # 168 registers are 5376 a warp: 12 warps.
        ("sm_90a", 384, 168, 0, 1, 0.1875, "registers"),
        # The largest block that sm_90 takes leaves no room for another one.
        ("sm_90", 256, 32, 227 * 1024, 1, 0.125, "shared memory"),
        ("sm_90", 256, 32, 227 * 1024 + 1, 0, 0.0, "shared memory"),
        # 1 KiB of each block is the system's: 163 KiB / 2 does not fit twice into 164.
        ("sm_80", 128, 32, 81 * 1024, 2, 0.125, "shared memory"),
        ("sm_80", 128, 32, 81 * 1024 + 1, 1, 0.0625, "shared memory"),
        # Small blocks: the number of blocks.
        ("sm_80", 32, 16, 0, 32, 0.5, "blocks"),
        ("sm_86", 32, 16, 0, 16, 1 / 3, "blocks"),
        ("sm_89", 1024, 32, 0, 1, 2 / 3, "warps"),
        # A block of 33 threads has two warps.
        ("sm_80", 33, 32, 0, 32, 1.0, "warps"),
        ("sm_80", 1024, 65, 0, 0, 0.0, "registers"),
        ("sm_80", 1056, 16, 0, 0, 0.0, "warps"),
    ],
)
def test_values_by_hand(
    arch: str, threads: int, registers: int, shared: int, blocks: int, share: float, limit: str
) -> None:
    found = occupancy(arch, threads=threads, registers=registers, shared_bytes=shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == pytest.approx(share)


@given(
    arch=st.sampled_from(CUDA_ARCHS),
    threads=st.integers(1, 1024),
    registers=st.integers(1, 254),
    shared=st.integers(0, 200_000),
)
def test_more_of_anything_never_gives_more_blocks(arch: str, threads: int, registers: int, shared: int) -> None:
    found = occupancy(arch, threads=threads, registers=registers, shared_bytes=shared)
    assert 0.0 <= found.share <= 1.0
    for more in (
        (threads + 32, registers, shared),
        (threads, registers + 1, shared),
        (threads, registers, shared + 512),
    ):
        assert occupancy(arch, threads=more[0], registers=more[1], shared_bytes=more[2]).blocks <= found.blocks


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_targets_ask_for_no_more_than_there_is(arch: str) -> None:
    assert cuda_target(arch).shared_bytes <= multiprocessor(arch).block_shared_bytes


def test_bad_input() -> None:
    with pytest.raises(FuserError, match="sm_42"):
        occupancy("sm_42", threads=1, registers=1, shared_bytes=0)
    for values in ((0, 1, 0), (1, 256, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="no kernel has"):
            occupancy("sm_80", threads=values[0], registers=values[1], shared_bytes=values[2])
