from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.extents import Extents
from fuser.ir.target import Target
from fuser.runtime.abi import KernelArgs, Step, header
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import load

LAYOUT = """
#include "abi.h"
#include <cstddef>
extern "C" int layout(const FuserArgs* args, void* stream) {
    int64_t* out = static_cast<int64_t*>(args->tensors[1]);
    const auto* extents = static_cast<const int64_t*>(args->extents);
    const int64_t values[] = {
        sizeof(FuserArgs), offsetof(FuserArgs, tensors), offsetof(FuserArgs, extents), offsetof(FuserArgs, threads),
        offsetof(FuserArgs, workspace), offsetof(FuserArgs, status), sizeof(FuserStep),
        offsetof(FuserStep, kernel), offsetof(FuserStep, args),
        extents[0], extents[1], args->threads, reinterpret_cast<int64_t>(args->workspace),
        reinterpret_cast<int64_t>(args->status), reinterpret_cast<int64_t>(args->tensors[0]),
        reinterpret_cast<int64_t>(stream)};
    for (int i = 0; i < 16; ++i) out[i] = values[i];
    return 0;
}
extern "C" int run(const FuserArgs* args, void* stream) {
    const FuserStep* step = static_cast<const FuserStep*>(args->tensors[0]);
    return step->kernel(step->args, stream);
}
"""


def test_structures_have_the_layout_of_the_header(target: Target, cache: KernelCache, headers: Path) -> None:
    path = build([Source("layout", LAYOUT)], target, headers=headers, cache=cache)["layout"]
    out = (ctypes.c_int64 * 16)()
    args = KernelArgs.pack([0x1234, ctypes.addressof(out)], [-5, 2**40], threads=3, workspace=0x5678, status=0x9ABC)
    gc.collect()
    kernel = load(path, "layout")
    kernel(args, 0x42)
    assert list(out) == [
        ctypes.sizeof(KernelArgs),
        KernelArgs.tensors.offset,
        KernelArgs.extents.offset,
        KernelArgs.threads.offset,
        KernelArgs.workspace.offset,
        KernelArgs.status.offset,
        ctypes.sizeof(Step),
        Step.kernel.offset,
        Step.args.offset,
        *(-5, 2**40, 3, 0x5678, 0x9ABC, 0x1234, 0x42),
    ]
    # C code can run a kernel from a step.
    step = Step(kernel.address, ctypes.pointer(args))
    out[0] = 0
    load(path, "run")(KernelArgs.pack([ctypes.addressof(step)]))
    assert out[0] == ctypes.sizeof(KernelArgs)


def test_arguments_without_tensors_or_workspace() -> None:
    args = KernelArgs.pack([])
    assert args.workspace is None and args.threads == 1 and args.tensors[0] is None


def test_the_header_is_the_one_that_the_definition_gives(headers: Path) -> None:
    assert (headers / "abi.h").read_text() == header()


@dataclass(frozen=True)
class Point(Extents):
    x: int
    weight: float


@dataclass(frozen=True)
class Shape(Extents):
    size: int
    scale: float
    corners: tuple[int, int]
    points: tuple[Point, ...]
    nothing: tuple[int, ...]
    last: Point


SHAPE = """
#include "abi.h"
#include <cstddef>
namespace {
%s
}
extern "C" int shape(const FuserArgs* args, void*) {
    const auto& s = *static_cast<const Shape*>(args->extents);
    auto* out = static_cast<double*>(args->tensors[0]);
    const double values[] = {double(sizeof(s)), double(s.size), s.scale, double(s.corners[0]), double(s.corners[1]),
                             double(s.points[0].x), s.points[0].weight, double(s.points[1].x), s.points[1].weight,
                             double(s.last.x), s.last.weight};
    for (int i = 0; i < 11; ++i) out[i] = values[i];
    return 0;
}
"""


def test_extents_arrive_by_name(target: Target, cache: KernelCache, headers: Path) -> None:
    source = Source("shape", SHAPE % Shape.declaration(points=2, nothing=0))
    kernel = load(build([source], target, headers=headers, cache=cache)["shape"], "shape")
    extents = Shape(2**52 + 1, 0.1, (-1, 7), (Point(3, 0.25), Point(4, 1e300)), (), Point(-5, -0.5))
    out = (ctypes.c_double * 11)()
    kernel(KernelArgs.pack([ctypes.addressof(out)], extents))
    assert list(out) == [len(extents.pack()), 2**52 + 1, 0.1, -1, 7, 3, 0.25, 4, 1e300, -5, -0.5]
