"""Does the emulator compute what a GPU does? Every primitive of ``device.cuh`` on both, from the same inputs.

python benchmarks/gpu_primitives.py             # on the current GPU; under compute-sanitizer, too
python benchmarks/gpu_primitives.py --emulated  # a dry run: the emulator's fast paths against its portable ones
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fuser.templates
from fuser.ir.target import Target, emulated_target
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import Source, build
from fuser.runtime.library import load
from fuser.runtime.targets import named_target

HEADERS = Path(fuser.templates.__file__).parent
SOURCE = Path(__file__).parent.parent / "tests" / "runtime" / "primitives.cu"
BITS = torch.int32


@dataclass(frozen=True)
class Call:
    """One exported kernel: its inputs and outputs (both in the order of the kernel's tensors), its extents, and the
    relative error that its arithmetic may have (0: every bit is defined)."""

    symbol: str
    tensors: tuple[Tensor, ...]
    extents: tuple[int, ...] = ()
    error: float = 0.0


def calls() -> list[Call]:
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(torch.int32)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    words = [integers(-(2**31), 2**31, 128), integers(-(2**31), 2**31, 64)]
    halves = [floats(128, 2).half().view(BITS).view(128), floats(64, 2).half().view(BITS).view(64)]
    bf16s = [floats(128, 2).bfloat16().view(BITS).view(128), floats(64, 2).bfloat16().view(BITS).view(64)]
    # The hardware ignores the lowest 13 bits; the emulator must, too.
    tf32s = [floats(128).view(BITS), floats(64).view(BITS)]
    rows = (torch.randperm(64, generator=generator)[:32] * 8).to(torch.int32)
    values = torch.cat([floats(4000) * 10.0 ** integers(-30, 30, 4000), torch.tensor([0.0, -0.0, 65519.0, 65520.0])])
    n = len(values)
    return [
        Call("indices", (zeros(24 * 60 * 6, dtype=BITS),), (2, 3, 4, 3, 4, 5)),
        Call("row_sums", (floats(7, 1000).half(), zeros(7)), (7, 1000), 1e-4),
        Call("block_votes", (integers(0, 2, 100), zeros(300, dtype=BITS)), (100,)),
        Call("named_barriers", (floats(9 * 64), zeros(9 * 64)), (9,)),
        Call("mbarriers", (floats(7 * 32), zeros(3 * 7 * 32)), (7,)),
        Call("bulk_copies", (floats(20 * 32), integers(0, 20, 5), zeros(5 * 32)), (5,)),
        Call("shuffles_int", (integers(0, 1 << 30, 32), zeros(128, dtype=BITS)), (3, 8)),
        Call("shuffles_double", (floats(32).double(), zeros(128, dtype=torch.float64)), (17, 32)),
        Call("votes", (integers(-50, 50, 32), zeros(32 * 12, dtype=BITS))),
        Call("warp_reductions", (floats(64), zeros(192)), (8,), 1e-5),
        Call("warp_exchange", (integers(0, 100, 80), zeros(80, dtype=BITS))),
        Call("spin_lock", (zeros(1, dtype=BITS), zeros(1, dtype=BITS))),
        Call("last_block", (floats(5000), zeros(23), zeros(1, dtype=BITS), zeros(1)), (23, 5000), 1e-4),
        Call("block_chain", (zeros(1, dtype=BITS), zeros(12, dtype=BITS)), (12,)),
        Call("mma_half", (*halves, floats(128)), error=1e-4),
        Call("mma_bf16", (*bf16s, floats(128)), error=1e-4),
        Call("mma_tf32", (*tf32s, floats(128)), error=1e-4),
        *(Call(f"mma_{kind}", (*words, integers(-9, 9, 128))) for kind in ("int8", "uint8", "mixed")),
        *(
            Call(f"ldmatrix_{kind}{count}", (integers(0, 1 << 30, 256), rows, zeros(32 * count, dtype=BITS)), (512,))
            for kind in ("", "trans_")
            for count in (1, 2, 4)
        ),
        *(
            Call(f"cp_async_{size}", (integers(0, 1 << 30, 8 * size), zeros(8 * size, dtype=BITS)), (size - 3,))
            for size in (4, 8, 16)
        ),
        # The last row but five is tanh.approx, which has 11 bits.
        Call("math", (torch.linspace(-8, 8, 400), zeros(16 * 400)), (400,), 1e-3),
        Call(
            "from_float",
            (
                values,
                *(zeros(n, dtype=torch.int16) for _ in range(2)),
                zeros(n, dtype=BITS),
                zeros(2 * n, dtype=BITS),
            ),
            (n,),
        ),
        Call("to_float", (zeros(65536), zeros(65536))),
        Call("integers", (words[0], words[0].flip(0), zeros(14 * 128, dtype=torch.int64)), (128,)),
        Call("product", (floats(100, 200).half(), floats(70, 200).half(), zeros(100, 70)), (100, 70, 200), 1e-4),
    ]


def library(target: Target, text: str) -> Path:
    return build([Source("indices", text, ".cu")], target, headers=HEADERS)["indices"]


def results(path: Path, call: Call, device: torch.device) -> list[Tensor]:
    """All tensors of a call after it, on the CPU. Raises RuntimeError for a status other than 0."""
    tensors = [tensor.clone().to(device) for tensor in call.tensors]
    args = KernelArgs.pack([tensor.data_ptr() for tensor in tensors], call.extents, 4)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    status = load(path, call.symbol).status(args, stream)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if status != 0:
        raise RuntimeError(f"{call.symbol} has status {status}")
    return [tensor.cpu() for tensor in tensors]


def difference(ours: Tensor, theirs: Tensor, error: float) -> float:
    """Largest error relative to the largest value; infinite where bits differ that may not. NaN equals NaN."""
    if error == 0.0:
        same = torch.equal(ours, theirs) or bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
        return 0.0 if same else float("inf")
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


def compare(sides: Mapping[str, Callable[[Call], list[Tensor]]]) -> int:
    """Print one line for every kernel; how many differ."""
    bad = 0
    for call in calls():
        (first, run), (second, other) = sides.items()
        pairs = zip(run(call), other(call), strict=True)
        worst = max(difference(a, b, call.error) for a, b in pairs)
        wrong = not worst <= call.error
        bad += wrong
        print(f"{call.symbol:20} {'DIFFERS' if wrong else 'agrees'} ({first} and {second}: {worst:.1e})", flush=True)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="compare two builds of the emulator; needs no GPU")
    options = parser.parse_args()
    text = SOURCE.read_text(encoding="utf-8")
    emulated, cpu = library(emulated_target(), text), torch.device("cpu")
    sides: dict[str, Callable[[Call], list[Tensor]]] = {"emulator": lambda call: results(emulated, call, cpu)}
    if options.emulated:
        portable = library(emulated_target(), f"#define FUSER_EMULATOR_PORTABLE\n{text}")
        sides["portable emulator"] = lambda call: results(portable, call, cpu)
    else:
        real, cuda = library(named_target("cuda"), text), torch.device("cuda")
        sides["GPU"] = lambda call: results(real, call, cuda)
    bad = compare(sides)
    raise SystemExit(f"{bad} kernels differ" if bad else 0)


if __name__ == "__main__":
    main()
