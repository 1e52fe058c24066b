"""Rates of targets by data type."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fuser.ir.target import CUDA_ARCHS, TF32, Target, cuda_target, emulated_target

CPU = Target("cpu", "avx2", frozenset(), 4, (1, 1, 1), peak_flops=8e10, bandwidth=1e10, launch_seconds=1e-6)


@pytest.mark.parametrize(
    ("arch", "features", "bf16", "int8"),
    [
        ("portable", [], 1, 1),
        ("neon", [], 1, 1),
        ("avx2", [], 1, 2),
        ("avx512", [], 1, 2),
        ("avx512", ["avx512_vnni"], 1, 4),
        ("avx512", ["avx512_bf16", "avx512_vnni"], 2, 4),
        ("avx512", ["amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_vnni"], 16, 32),
    ],
)
def test_rates_of_a_cpu_are_the_measured_one_times_the_width_of_instructions(
    arch: str, features: list[str], bf16: int, int8: int
) -> None:
    target = dataclasses.replace(CPU, arch=arch, features=frozenset(features))
    assert target.rate(torch.float32) == target.rate(torch.float16) == 8e10
    assert target.rate(torch.bfloat16) == bf16 * 8e10
    assert target.rate(torch.int8) == target.rate(torch.uint8) == int8 * 8e10


@pytest.mark.parametrize(
    ("arch", "tops"),
    [("sm_80", 624e12), ("sm_86", 284e12), ("sm_90", 1979e12), ("sm_100", 4500e12), ("sm_120", 838e12)],
)
def test_integer_rates_of_gpus_are_those_of_their_data_sheets(arch: str, tops: float) -> None:
    target = cuda_target(arch)
    assert target.rate(torch.int8) * target.cores == pytest.approx(tops, rel=0.01)


def test_kernels_of_mma_sync_reach_what_it_can_feed_the_tensor_cores() -> None:
    ampere, hopper = cuda_target("sm_80"), cuda_target("sm_90a")
    assert ampere.mma_rate(torch.float16, 0.85) == 0.85 * ampere.tensor_flops
    assert hopper.mma_rate(torch.float16, 0.85) == 0.63 * hopper.tensor_flops
    assert hopper.mma_rate(torch.float16, 0.6) == 0.6 * hopper.tensor_flops


def test_mma_sync_of_fp8_is_fp16_where_it_is_converted() -> None:
    ada, hopper = cuda_target("sm_89"), cuda_target("sm_90a")
    assert ada.mma_rate(torch.float8_e4m3fn, 0.85) == 0.85 * ada.rate(torch.float8_e4m3fn) > 1.6 * ada.tensor_flops
    assert hopper.mma_rate(torch.float8_e4m3fn, 0.85) == hopper.mma_rate(torch.float16, 0.85)


def test_caches_are_faster_the_nearer_they_are() -> None:
    for arch in CUDA_ARCHS:
        target = cuda_target(arch)
        assert target.bandwidth / target.cores < target.l2_bandwidth < target.shared_bandwidth


def test_gpus_that_multiply_fp8() -> None:
    assert {arch for arch in CUDA_ARCHS if not cuda_target(arch).fp8} == {"sm_80", "sm_86", "sm_87"}
    assert not emulated_target().fp8 and emulated_target("sm_89").fp8


def test_rates_of_a_gpu_depend_on_what_its_tensor_cores_multiply() -> None:
    old, new = cuda_target("sm_80"), cuda_target("sm_90")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert old.rate(dtype) == old.peak_flops and new.rate(dtype) == 2 * new.tensor_flops
    for target in (old, new):
        assert target.rate(torch.float16) == target.rate(torch.bfloat16) == target.tensor_flops
        assert target.rate(torch.float32) == target.peak_flops
        rounded = dataclasses.replace(target, features=frozenset({TF32}))
        assert rounded.rate(torch.float32) == target.tensor_flops / 2
