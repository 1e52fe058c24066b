"""Every primitive of ``device.cuh`` on the emulator, against NumPy, closed forms and documented fragment layouts."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fuser.templates
from fuser.ir.errors import ToolchainError
from fuser.ir.target import cuda_target, emulated_target
from fuser.runtime.build import Source, build
from fuser.runtime.cache import default_cache
from fuser.runtime.emulator import compile_flags, launches, run
from fuser.runtime.nvcc import find_nvcc, resources

SOURCE = Path(__file__).with_name("primitives.cu").read_text()
HEADERS = Path(fuser.templates.__file__).parent
Array = NDArray[np.generic]


@pytest.fixture(scope="module", params=["quick", "portable", "checked"])
def library(request: pytest.FixtureRequest) -> Path:
    """As it is built by default, as on processors without the fast paths, and with all checks: they must be silent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        patch.setenv("FUSER_EMULATOR_CHECKED", "1" if request.param == "checked" else "0")
        # The emulator's own code is another there, too.
        portable = '#define FUSER_EMULATOR_PORTABLE\n#include "cuda/emulator.cpp"\n'
        text = (portable if request.param == "portable" else "") + SOURCE
        return build([Source("indices", text, ".cu")], emulated_target(), headers=HEADERS, cache=default_cache())[
            "indices"
        ]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Launching


@pytest.mark.parametrize("grid", [(5, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("block", [(1, 1, 1), (33, 1, 1), (4, 5, 6), (1024, 1, 1)])
def test_indices(library: Path, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    out = np.full((int(np.prod(grid)), int(np.prod(block)), 6), -1, dtype=np.int32)
    run(library, "indices", [out], [*grid, *block])
    # x is the fastest index of both.
    blocks = np.indices(grid[::-1]).reshape(3, -1)[::-1].T
    threads = np.indices(block[::-1]).reshape(3, -1)[::-1].T
    np.testing.assert_array_equal(out[:, :, :3], np.broadcast_to(blocks[:, None], (len(out), len(threads), 3)))
    np.testing.assert_array_equal(out[:, :, 3:], np.broadcast_to(threads[None], (len(out), len(threads), 3)))


def test_tensors_of_pytorch_and_views(library: Path) -> None:
    x = torch.randn(9, 40, dtype=torch.float16)[:, :].contiguous()
    out = torch.zeros(9)
    run(library, "row_sums", [x, out], x.shape)
    torch.testing.assert_close(out.double(), x.double().sum(1), atol=1e-4, rtol=1e-5)


def test_shared_arrays_follow_their_alignment(library: Path) -> None:
    out = np.zeros(3, dtype=np.uint64)
    run(library, "shared_arrays", [out], [100, 10, 168, 1, 32])
    assert out.tolist() == [128 + 40, 0, 0]


def test_unwritten_shared_memory_is_nan(library: Path) -> None:
    """In every block, also in those that run where an earlier one has written."""
    out = np.zeros((8, 2, 32), dtype=np.float32)
    run(library, "unwritten", [out])
    assert np.isnan(out).all()


def test_printf(library: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(library, "print", [], [42])
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "thread 3 of block 0 says 42 (1)\n"


def test_threads_of_the_host(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random().standard_normal((50, 100)).astype(np.float16)
    for threads in ("1", "3", "nonsense"):
        monkeypatch.setenv("FUSER_EMULATOR_THREADS", threads)
        out = np.zeros(50, dtype=np.float32)
        run(library, "row_sums", [x, out], x.shape)
        np.testing.assert_allclose(out, x.astype(np.float64).sum(1), atol=1e-4)


def test_launches_can_be_listed_instead_of_run(library: Path) -> None:
    nowhere = [1 << 20] * 3
    (one,) = launches(library, "product", nowhere, [1000, 200, 64])
    assert one.grid == (4, 16, 1)
    assert one.block == (128, 1, 1) and one.threads == 128 and one.blocks == 64
    assert one.shared_bytes == 4 * 64 * 40 * 2
    assert "multiply_tiles" in one.function
    assert launches(library, "product", nowhere, [0, 200, 64]) == ()
    test_row_sums(library, 31)  # what is asked for next is carried out


# Barriers


@pytest.mark.parametrize("columns", [1, 31, 96, 1000])
def test_row_sums(library: Path, columns: int) -> None:
    x = random().standard_normal((7, columns)).astype(np.float16)
    out = np.zeros(7, dtype=np.float32)
    run(library, "row_sums", [x, out], [7, columns])
    np.testing.assert_allclose(out, x.astype(np.float64).sum(1), atol=1e-4)


@pytest.mark.parametrize("values", ["zeros", "ones", "mixed"])
@pytest.mark.parametrize("threads", [1, 32, 100])
def test_barriers_that_count(library: Path, values: str, threads: int) -> None:
    x = {"zeros": np.zeros(threads), "ones": np.full(threads, 3), "mixed": random(1).integers(0, 2, threads)}[values]
    out = np.zeros((3, threads), dtype=np.int32)
    run(library, "block_votes", [x.astype(np.int32), out], [threads])
    assert (out == np.array([[np.count_nonzero(x)], [int(x.any())], [int(x.all())]])).all()


def test_named_barriers(library: Path) -> None:
    x = random().standard_normal((9, 64)).astype(np.float32)
    out = np.zeros_like(x)
    run(library, "named_barriers", [x, out], [9])
    np.testing.assert_array_equal(out, 2 * x[:, ::-1])


def test_mbarriers(library: Path) -> None:
    x = random().standard_normal((7, 32)).astype(np.float32)
    out = np.zeros((3, 7, 32), dtype=np.float32)
    run(library, "mbarriers", [x, out], [7])
    np.testing.assert_array_equal(out, np.arange(1, 4, dtype=np.float32)[:, None, None] * x[None, :, ::-1])


def test_bulk_copies(library: Path) -> None:
    x = random().standard_normal((20, 32)).astype(np.float32)
    rows = np.array([3, 19, 0, 7, 7], dtype=np.int32)
    out = np.zeros((5, 32), dtype=np.float32)
    run(library, "bulk_copies", [x, rows, out], [5])
    np.testing.assert_array_equal(out, x[rows])


# Warps


@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
@pytest.mark.parametrize(("name", "dtype"), [("shuffles_int", np.int32), ("shuffles_double", np.float64)])
def test_shuffles(library: Path, name: str, dtype: type, argument: int, width: int) -> None:
    x = random().integers(0, 1 << 30, 32).astype(dtype)
    out = np.zeros((4, 32), dtype=dtype)
    run(library, name, [x, out], [argument, width])
    lanes = np.arange(32)
    base = lanes - lanes % width
    # CUDA C++ Programming Guide, "Warp Shuffle Functions": a source outside of the group leaves the value.
    sources = [
        base + argument % width,
        np.where(lanes - argument >= base, lanes - argument, lanes),
        np.where(lanes + argument < base + width, lanes + argument, lanes),
        np.where((lanes ^ argument) < base + width, lanes ^ argument, lanes),
    ]
    np.testing.assert_array_equal(out, x[np.array(sources)])


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_votes_in_two_branches(library: Path, kind: str) -> None:
    x = random(2).integers(-50, 50, 32).astype(np.int32)
    if kind == "equal":
        x[::2], x[1::2] = 15, 7
    out = np.zeros((32, 12), dtype=np.uint32)
    run(library, "votes", [x, out])
    for t in range(32):
        members = np.arange(t % 2, 32, 2)
        mask = int(sum(1 << int(m) for m in members))
        values = x[members]

        def ballot(condition: Array, members: Array = members) -> int:
            return int(sum(1 << int(m) for m, yes in zip(members, condition, strict=True) if yes))

        same = ballot((values & 8) == (x[t] & 8))
        expected = [
            ballot(values & 1),
            int((values & 2).any()),
            int(((values & 4) != 0).all()),
            ballot((values & 3) == (x[t] & 3)),
            mask if same == mask else 0,
            int(same == mask),
            int(values.sum()),
            int(values.min()),
            int(values.max()),
            int(np.bitwise_and.reduce(values)),
            int(np.bitwise_or.reduce(values)),
            int(np.bitwise_xor.reduce(values)),
        ]
        assert out[t].tolist() == [value & 0xFFFFFFFF for value in expected]


@pytest.mark.parametrize("width", [2, 8, 32])
def test_warp_reductions(library: Path, width: int) -> None:
    x = random().standard_normal(64).astype(np.float32)
    out = np.zeros((3, 64), dtype=np.float32)
    run(library, "warp_reductions", [x, out], [width])
    groups = x.astype(np.float64).reshape(-1, width)
    expected = np.stack([groups.sum(1), groups.max(1), groups.min(1)]).repeat(width, axis=1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_exchange_in_warps_of_which_the_last_is_not_full(library: Path) -> None:
    x = np.arange(80, dtype=np.int32)
    out = np.zeros(80, dtype=np.int32)
    run(library, "warp_exchange", [x, out])
    np.testing.assert_array_equal(out, np.concatenate([x[:32][::-1], x[32:64][::-1], x[64:][::-1]]))


# Atomics


def test_atomics(library: Path) -> None:
    x = random(3).integers(0, 1000, 777).astype(np.int32)
    ints = np.zeros(24, dtype=np.int32)
    ints[17], ints[19] = 1 << 30, -1
    floats, longs, doubles = np.zeros(1, np.float32), np.full(1, 1 << 40, np.uint64), np.zeros(1, np.float64)
    run(library, "atomics", [x, ints, floats, longs, doubles], [777])
    np.testing.assert_array_equal(ints[:16], np.bincount(x & 15, minlength=16))
    total = int(x.sum())
    assert ints[16:22].tolist() == [
        -total,
        x.min(),
        x.max(),
        np.bitwise_and.reduce(x),
        np.bitwise_or.reduce(x),
        np.bitwise_xor.reduce(x),
    ]
    assert ints[22:].tolist() == [777 % 7, -777 % 7]  # modulo 7, up and down from 0
    assert longs[0] == (1 << 40) + total
    assert doubles[0] == total
    assert floats[0] == pytest.approx(total / 2, rel=1e-5)


def test_lock(library: Path) -> None:
    lock, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(library, "spin_lock", [lock, count])
    assert count[0] == 3 * 64
    assert lock[0] == 0


def test_last_block_sees_what_all_have_written(library: Path) -> None:
    x = random().standard_normal(5000).astype(np.float32)
    partial, finished, out = np.zeros(23, np.float32), np.full(1, 99, np.int32), np.zeros(1, np.float32)
    run(library, "last_block", [x, partial, finished, out], [23, 5000])
    assert finished[0] == 23
    assert out[0] == pytest.approx(x.astype(np.float64).sum(), abs=1e-3)


def test_blocks_that_wait_for_each_other(library: Path) -> None:
    flag, order = np.zeros(1, np.int32), np.zeros(12, np.int32)
    run(library, "block_chain", [flag, order], [12])
    assert flag[0] == 12
    np.testing.assert_array_equal(order, np.arange(12) * 3)


# Tensor cores: PTX ISA, "Matrix Fragments for mma.m16n8k16", "... m16n8k8" and "... m16n8k32"


def fragment_a(k: int, count: int) -> tuple[Array, Array]:
    """Row and column of every element of ``a``: (32 lanes, 4 registers, ``count`` elements of a register)."""
    lane, register, element = np.indices((32, 4, count))
    return lane // 4 + register % 2 * 8, lane % 4 * count + element + register // 2 * (k // 2)


def fragment_b(k: int, count: int) -> tuple[Array, Array]:
    lane, register, element = np.indices((32, 2, count))
    return lane % 4 * count + element + register * (k // 2), lane // 4


def fragment_d() -> tuple[Array, Array]:
    lane, element = np.indices((32, 4))
    return lane // 4 + element // 2 * 8, lane % 4 * 2 + element % 2


def pack(elements: Array, bits: int) -> Array:
    """(..., count) unsigned elements of ``bits`` bits in one 32-bit register each, the first one lowest."""
    shifts = np.arange(elements.shape[-1], dtype=np.uint32) * bits
    return (elements.astype(np.uint32) << shifts).sum(-1).astype(np.uint32)


def tf32_bits(x: Array) -> Array:
    return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def bf16_bits(x: Array) -> Array:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def fp8_bits(x: Array) -> Array:
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def fp8_values(bits: Array) -> Array:
    return torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()


@pytest.mark.parametrize(
    ("name", "k", "bits"), [("mma_half", 16, 16), ("mma_bf16", 16, 16), ("mma_e4m3", 32, 8), ("mma_tf32", 8, 32)]
)
def test_mma_of_floats(library: Path, name: str, k: int, bits: int) -> None:
    generator = random(4)
    a, b = generator.standard_normal((16, k)).astype(np.float32), generator.standard_normal((k, 8)).astype(np.float32)
    c = generator.standard_normal((16, 8)).astype(np.float32)
    if name == "mma_half":
        raw_a, raw_b = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
        a, b = a.astype(np.float16), b.astype(np.float16)
    elif name == "mma_bf16":
        raw_a, raw_b = bf16_bits(a), bf16_bits(b)
        a, b = ((raw.astype(np.uint32) << 16).view(np.float32) for raw in (raw_a, raw_b))
    elif name == "mma_e4m3":
        raw_a, raw_b = fp8_bits(a), fp8_bits(b)
        a, b = fp8_values(raw_a), fp8_values(raw_b)
    else:
        raw_a, raw_b = tf32_bits(a), tf32_bits(b)
        a, b = raw_a.view(np.float32), raw_b.view(np.float32)
    count = 32 // bits
    d = np.ascontiguousarray(c[fragment_d()])
    run(library, name, [pack(raw_a[fragment_a(k, count)], bits), pack(raw_b[fragment_b(k, count)], bits), d])
    result = np.empty((16, 8))
    result[fragment_d()] = d
    # Sums of 33 products in fp32 at most.
    np.testing.assert_allclose(result, a.astype(np.float64) @ b.astype(np.float64) + c, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "low_a", "low_b"), [("mma_int8", -128, -128), ("mma_uint8", 0, 0), ("mma_mixed", 0, -128)]
)
def test_mma_of_integers(library: Path, name: str, low_a: int, low_b: int) -> None:
    generator = random(5)
    a, b = generator.integers(low_a, low_a + 256, (16, 32)), generator.integers(low_b, low_b + 256, (32, 8))
    c = generator.integers(-1000, 1000, (16, 8)).astype(np.int32)
    d = np.ascontiguousarray(c[fragment_d()])
    run(library, name, [pack((a & 255)[fragment_a(32, 4)], 8), pack((b & 255)[fragment_b(32, 4)], 8), d])
    result = np.empty((16, 8), dtype=np.int64)
    result[fragment_d()] = d
    np.testing.assert_array_equal(result, a @ b + c)


def test_fragment_maps_agree_with_their_inverse() -> None:
    """The same layouts told the other way around: where an element (row, column) is (tinygrad's tables, MIT)."""
    row, column = fragment_a(16, 2)
    lane, register, element = np.indices((32, 4, 2))
    np.testing.assert_array_equal(lane, column // 2 % 4 + row % 8 * 4)
    np.testing.assert_array_equal(register * 2 + element, column % 2 + row // 8 * 2 + column // 8 * 4)
    k, n = fragment_b(16, 2)
    lane, register, element = np.indices((32, 2, 2))
    np.testing.assert_array_equal(lane, k // 2 % 4 + n * 4)
    np.testing.assert_array_equal(register * 2 + element, k % 2 + k // 8 * 2)
    row, column = fragment_a(32, 4)
    lane, register, element = np.indices((32, 4, 4))
    np.testing.assert_array_equal(lane, column // 4 % 4 + row % 8 * 4)
    np.testing.assert_array_equal(register * 4 + element, column % 4 + row // 8 * 4 + column // 16 * 8)
    k, n = fragment_b(32, 4)
    lane, register, element = np.indices((32, 2, 4))
    np.testing.assert_array_equal(lane, k // 4 % 4 + n * 4)
    np.testing.assert_array_equal(register * 4 + element, k % 4 + k // 16 * 4)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library: Path, count: int, transposed: bool) -> None:
    data = np.arange(64 * 8, dtype=np.uint16)
    rows = random(6).permutation(64)[:32]
    out = np.zeros((count, 32), dtype=np.uint32)
    name = f"ldmatrix_{'trans_' if transposed else ''}{count}"
    run(library, name, [data, (rows * 8).astype(np.int32), out], [len(data)])
    matrices = data.reshape(64, 8)[rows].reshape(4, 8, 8)[:count]
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    np.testing.assert_array_equal(out, pack(matrices.reshape(count, 32, 2), 16))


# Asynchronous copies


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("valid", ["none", "some", "all"])
def test_cp_async_fills_with_zeros(library: Path, size: int, valid: str) -> None:
    count = {"none": 0, "some": size - 3, "all": size}[valid]
    data = random().integers(1, 255, (32, size)).astype(np.uint8)
    out = np.full_like(data, 77)
    run(library, f"cp_async_{size}", [data, out], [count])
    expected = data.copy()
    expected[:, count:] = 0
    np.testing.assert_array_equal(out, expected)


def test_cp_async_is_visible_after_the_wait_only(library: Path, request: pytest.FixtureRequest) -> None:
    if "checked" in request.node.name:
        pytest.skip("the checking mode stops this kernel, which reads too early on purpose")
    data = np.arange(96, dtype=np.int32).reshape(3, 32)
    out = np.zeros((4, 3, 32), dtype=np.int32)
    run(library, "cp_async_groups", [data, out])
    for moment in range(4):
        np.testing.assert_array_equal(out[moment, :moment], data[:moment])
        assert (out[moment, moment:] == -1).all()


# Arithmetic


def test_math(library: Path) -> None:
    x = np.concatenate([np.linspace(-8, 8, 400), [0.0, -0.0, 1e-20]]).astype(np.float32)
    out = np.zeros((16, len(x)), dtype=np.float32)
    run(library, "math", [x, out], [len(x)])
    v = x.astype(np.float64)
    positive = np.abs(x) + np.float32(0.01)
    p = positive.astype(np.float64)
    erf = torch.erf(torch.from_numpy(v)).numpy()
    expected = [
        np.exp(v),
        np.exp2(v),
        np.log(p),
        np.log2(p),
        p**-0.5,
        1 / p,
        v / p,
        v * v + v,
        erf,
        np.tanh(v),
        np.tanh(v),
    ]
    expected += [np.exp(v), np.sqrt(p), 1 / p, np.clip(v, 0, 1), np.maximum(v, 0)]
    for row, (result, reference) in enumerate(zip(out, expected, strict=True)):
        np.testing.assert_allclose(result, reference, rtol=3e-6, atol=1e-6, err_msg=f"row {row}")


def test_rounding_to_narrow_types(library: Path) -> None:
    generator = random(7)
    x = generator.integers(0, 1 << 32, 6000, dtype=np.uint32).view(np.float32)
    # Where rounding is decided: ties between neighbours, subnormal results, the largest values.
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    edges = np.array([65504, 65519.99, 65520, 1e-8, 2.0**-25, 2.0**-24, 3.4e38, np.inf, -np.inf, 0.0, -0.0], np.float32)
    x = np.concatenate([x[np.isfinite(x)], halves, ties, -ties, edges]).astype(np.float32)
    n = len(x)
    as_half, as_bf16 = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
    as_tf32, packed = np.zeros(n, np.uint32), np.zeros((2, n), np.uint32)
    run(library, "from_float", [x, as_half, as_bf16, as_tf32, packed], [n])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(as_half, x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(as_bf16, bf16_bits(x))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(as_tf32[finite], tf32_bits(x)[finite])
    np.testing.assert_array_equal(as_tf32[~finite], x[~finite].view(np.uint32))
    for row, narrow in zip(packed, (as_half, as_bf16), strict=True):
        np.testing.assert_array_equal(row, narrow.astype(np.uint32) | narrow[::-1].astype(np.uint32) << 16)


def test_nan_stays_nan(library: Path) -> None:
    x = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001], dtype=np.uint32).view(np.float32)
    as_half, as_bf16 = np.zeros(4, np.uint16), np.zeros(4, np.uint16)
    as_tf32, packed = np.zeros(4, np.uint32), np.zeros((2, 4), np.uint32)
    run(library, "from_float", [x, as_half, as_bf16, as_tf32, packed], [4])
    assert np.isnan(as_half.view(np.float16)).all()
    assert np.isnan((as_bf16.astype(np.uint32) << 16).view(np.float32)).all()
    assert np.isnan(as_tf32.view(np.float32)).all()


def test_rounding_to_fp8(library: Path) -> None:
    """As PyTorch's conversion, but for what is beyond the largest number, which becomes that (PTX ISA, "cvt",
    ``.satfinite``)."""
    numbers = fp8_values(np.arange(0x7F, dtype=np.uint8))
    ties = (numbers[:-1] + numbers[1:]) / 2
    near = np.concatenate([np.nextafter(ties, np.float32(side), dtype=np.float32) for side in (0, 1e3)])
    anything = random(10).integers(0, 1 << 32, 6000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([numbers, ties, near, anything[np.isfinite(anything)], [449, 3e38, np.inf]]).astype(np.float32)
    x = np.concatenate([x, -x])
    out = np.zeros(len(x), np.uint8)
    run(library, "to_fp8", [x, out], [len(x)])
    np.testing.assert_array_equal(out, fp8_bits(np.clip(x, -448, 448)))
    out = np.zeros(2, np.uint8)
    run(library, "to_fp8", [np.array([np.nan, -np.nan], np.float32), out], [2])
    assert np.isnan(fp8_values(out)).all()


def test_widening_of_every_16_bit_value(library: Path) -> None:
    halves, bf16s = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    run(library, "to_float", [halves, bf16s])
    bits = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(halves, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bf16s.view(np.uint32), bits.astype(np.uint32) << 16)


def test_integers(library: Path) -> None:
    x, y = (random(seed).integers(0, 1 << 32, 500, dtype=np.uint32) for seed in (8, 9))
    x[:3], y[:3] = [0, 1, 0xFFFFFFFF], [0, 0xFFFFFFFF, 0xFFFFFFFF]
    out = np.zeros((14, 500), dtype=np.int64)
    run(library, "integers", [x, y, out], [500])
    for a, b, row in zip(x.tolist(), y.tolist(), out.T.tolist(), strict=True):
        both = a << 32 | b
        permuted = int.from_bytes(bytes((b << 32 | a) >> 8 * (b >> 4 * i & 7) & 255 for i in range(4)), "little")
        signed = [(v >> 8 * i & 255) - 256 * (v >> 8 * i + 7 & 1) for v in (a, b) for i in range(4)]
        dot = sum(p * q for p, q in zip(signed[:4], signed[4:], strict=True)) + 7
        scaled = np.float32(np.float32(a - (a >> 31 << 32)) * np.float32(1e-7)) * np.float32(b - (b >> 31 << 32))
        rounded = int(np.clip(np.rint(np.float64(scaled)), -(2**31), 2**31 - 1))
        assert row == [
            a.bit_count(),
            both.bit_count(),
            32 - a.bit_length(),
            64 - both.bit_length(),
            (a & -a).bit_length(),
            (both & -both).bit_length(),
            int(f"{a:032b}"[::-1], 2),
            permuted,
            a * b >> 32,
            ((b << 32 | a) << (b & 31) >> 32) & 0xFFFFFFFF,
            ((b << 32 | a) >> (a & 31)) & 0xFFFFFFFF,
            dot,
            rounded,
            a,
        ]


# Together


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (128, 192, 96), (100, 70, 200), (1, 1, 8)])
def test_product(library: Path, m: int, n: int, k: int) -> None:
    a, b = (random(seed).standard_normal((rows, k)).astype(np.float16) for seed, rows in ((1, m), (2, n)))
    c = np.full((m, n), np.nan, dtype=np.float32)
    run(library, "product", [a, b, c], [m, n, k])
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64).T, atol=1e-5 * k**0.5, rtol=1e-5)


# nvcc


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
@pytest.mark.parametrize("name", ["primitives.cu", "faults.cu"])
def test_compiles_with_nvcc(arch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    try:
        find_nvcc(cuda_target(arch), default_cache())
    except ToolchainError as error:
        pytest.skip(str(error))
    text = Path(__file__).with_name(name).read_text()
    found = resources(text, cuda_target(arch), headers=HEADERS, cache=default_cache())
    assert len(found) >= text.count("__global__") - 1
    if name == "primitives.cu":
        assert not any(one.spill_store_bytes or one.spill_load_bytes for one in found)


def test_flags_of_the_checking_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    assert "-DFUSER_CHECKED" in compile_flags()
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "0")
    assert "-DFUSER_CHECKED" not in compile_flags()
    assert "-DFUSER_CHECKED" in compile_flags(checked=True)
