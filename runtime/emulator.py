"""CUDA kernels on the CPU: how they are built for the emulator (``templates/cuda/emulator.h``), run, and what their
faults mean.

In the checking mode the compiler reports every memory access of a kernel to the emulator, which then finds races on
shared memory, accesses outside of arrays and tensors, reads of asynchronous copies that have not been waited for and
misaligned vectors. It is some ten times slower and needs g++.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.ir.errors import KernelError
from fuser.ir.extents import Extents
from fuser.runtime.abi import KernelArgs
from fuser.runtime.cpuinfo import cpu_flags
from fuser.runtime.library import load

ENGINE = "cuda/emulator.cpp"
"""The emulator's own code, in the folder of templates: compiled once, and linked with every emulated kernel that does
not include it."""
FAULT_STATUS = 900
"""What a kernel returns when it was stopped by a fault, or when no GPU would have launched it."""

_FLAGS = (
    *("-x", "c++", "-std=c++17", "-DFUSER_EMULATED", "-fPIC", "-pthread"),
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    # A frame larger than the guard page of a stack must not jump over it.
    "-fstack-clash-protection",
    *("-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-psabi"),
)
_CHECKED = (
    *("-O1", "-g1", "-DFUSER_CHECKED", "-fsanitize=thread,bounds-strict,alignment"),
    "-fno-toplevel-reorder",  # variables stay in the order of their declarations: arrays and the gaps between them
    *("--param", "tsan-instrument-func-entry-exit=0"),
)
# What mma and conversions are quick with: all of it or nothing, so that there are two kinds of libraries.
_FAST = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
STANDARD_HEADERS = """\
#include <pthread.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
"""
"""What the emulator's headers and CUDA's templates include."""
_LINE = re.compile(r":(\d+)(?: |$)")


class EmulationError(KernelError):
    """A kernel broke a rule of CUDA: a race, an access out of bounds, a barrier that not all threads reach, ...

    ``kernel`` is the name of the exported function, ``block`` and ``thread`` the indices (x, y, z) of the thread that
    was caught, ``file`` and ``line`` where (line 0: unknown) and ``fault`` what happened.
    """

    def __init__(
        self,
        kernel: str,
        block: tuple[int, int, int],
        thread: tuple[int, int, int],
        file: str,
        line: int,
        fault: str,
    ) -> None:
        self.kernel, self.block, self.thread, self.file, self.line, self.fault = (
            kernel,
            block,
            thread,
            file,
            line,
            fault,
        )
        place = f", {file}:{line}" if line else ""
        super().__init__(f"kernel {kernel}, block {block}, thread {thread}{place}: {fault}")


class _Fault(ctypes.Structure):
    """``FuserFault`` of ``emulator.h``."""

    _fields_ = (
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("address", ctypes.c_uint64),
        ("other", ctypes.c_uint64),
        ("line", ctypes.c_int32),
        ("other_line", ctypes.c_int32),
        ("file", ctypes.c_char * 512),
        ("text", ctypes.c_char * 2048),
    )


class _Launch(ctypes.Structure):
    """``FuserLaunch`` of ``emulator.h``."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("function", ctypes.c_char * 4000),
    )


def checking() -> bool:
    """Whether ``FUSER_EMULATOR_CHECKED`` asks for the checking mode."""
    return os.environ.get("FUSER_EMULATOR_CHECKED", "") not in ("", "0")


def compile_flags(checked: bool | None = None) -> tuple[str, ...]:
    """What turns a rendered ``.cu`` into an object with g++ or clang++; by default as
    ``FUSER_EMULATOR_CHECKED`` says."""
    present = cpu_flags()
    fast = tuple(_FAST.values()) if present.issuperset(_FAST) else ()
    return (*_FLAGS, *fast, *(_CHECKED if (checking() if checked is None else checked) else ("-O2",)))


def link_flags() -> tuple[str, ...]:
    """What turns an object into a library. The sanitizers' own libraries stay out: the emulator stands in for them."""
    return ("-shared", "-pthread", "-Wl,-Bsymbolic")


def run(
    path: Path,
    symbol: str,
    tensors: Sequence[Any],
    extents: Extents | Sequence[int] = (),
    *,
    workspace: Any = None,
) -> None:
    """Run the kernel ``symbol`` of an emulated library on CPU ``tensors`` (NumPy arrays or PyTorch tensors).

    A library of the checking mode may touch nothing but these and ``workspace``. Raises :class:`EmulationError` for a
    fault and :class:`KernelError` for any other status.
    """
    kernel = load(path, symbol)
    spans = [_span(tensor) for tensor in (*tensors, *(() if workspace is None else (workspace,)))]
    addresses = [begin for begin, _ in spans]
    args = KernelArgs.pack(addresses[: len(tensors)], extents, 1, addresses[-1] if workspace is not None else 0)
    with allowed(path, spans):
        status = kernel.status(args)
        if status == FAULT_STATUS:
            raise fault(path, symbol)
    if status != 0:
        raise KernelError(f"the kernel {symbol} failed with status {status} (library: {path})")


@dataclass(frozen=True)
class Launch:
    """One launch of a ``__global__`` function: its mangled name, blocks and threads by (x, y, z), and the bytes of
    dynamic shared memory of a block."""

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return math.prod(self.block)

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


def launches(
    path: Path,
    symbol: str,
    tensors: Sequence[int],
    extents: Extents | Sequence[int] = (),
    *,
    workspace: int = 0,
) -> tuple[Launch, ...]:
    """What the kernel ``symbol`` would launch for tensors at these addresses, which are not touched: any will do that
    have the alignment of the real ones.

    Raises :class:`KernelError` for extents that it refuses.
    """
    kernel = load(path, symbol)
    library = ctypes.CDLL(str(path))
    library.fuser_emulator_list(1)
    try:
        status = kernel.status(KernelArgs.pack(tensors, extents, 1, workspace))
        first = ctypes.POINTER(_Launch)()
        library.fuser_emulator_listed.restype = ctypes.c_size_t
        count = library.fuser_emulator_listed(ctypes.byref(first))
        found = [first[i] for i in range(count)]
        listed = tuple(
            Launch(one.function.decode(), tuple(one.grid), tuple(one.block), one.shared_bytes) for one in found
        )
    finally:
        library.fuser_emulator_list(0)
    if status != 0:
        raise KernelError(f"the kernel {symbol} refuses these extents with status {status} (library: {path})")
    return listed


@contextmanager
def allowed(path: Path, spans: Iterable[tuple[int, int]]) -> Iterator[None]:
    """While this lasts, kernels of the library at ``path`` may touch only these (begin, end) spans of global memory.

    Without effect on a library that was not built for the checking mode.
    """
    library = ctypes.CDLL(str(path))
    allow = getattr(library, "fuser_emulator_allow", None)
    if allow is None:
        yield
        return
    flat = [address for span in spans for address in span]
    allow((ctypes.c_uint64 * len(flat))(*flat), ctypes.c_size_t(len(flat) // 2))
    try:
        yield
    finally:
        allow(None, ctypes.c_size_t(0))


def fault(path: Path, symbol: str) -> EmulationError:
    """What stopped the last kernel of the library at ``path`` that this thread called."""
    library = ctypes.CDLL(str(path))
    library.fuser_emulator_fault.restype = ctypes.POINTER(_Fault)
    found = library.fuser_emulator_fault().contents
    file, line = found.file.decode(errors="replace"), int(found.line)
    if found.address:
        file, line = _place(path, found.address)
    text = found.text.decode(errors="replace")
    other = _place(path, found.other)[1] if found.other else int(found.other_line)
    if other:
        text += f" (line {other})"
    block, thread = tuple(found.block), tuple(found.thread)
    return EmulationError(symbol, block, thread, _known(path, file), line, text)


def _place(path: Path, address: int) -> tuple[str, int]:
    """The file and line of an address of a library with debug information; ("", 0) if that cannot be known.

    An inlined function of a header is reported at the line of the kernel that calls it, if there is one.
    """
    tool = shutil.which("addr2line")
    if tool is None:
        return "", 0
    # A return address belongs to the instruction before it.
    command = [tool, "-i", "-e", str(path), hex(address - 1)]
    output = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    places = []
    for text in output.splitlines():
        if found := _LINE.search(text):
            places.append((text[: found.start()], int(found[1])))
    return next((place for place in places if not place[0].endswith((".h", ".cuh"))), places[0] if places else ("", 0))


def _known(path: Path, file: str) -> str:
    """The file that a user can open: the source of a cached kernel is beside its library, headers are by their name."""
    name = Path(file).name
    if name.endswith((".h", ".cuh")) or not file:
        return name
    beside = path.with_name("source.cpp")
    return str(beside) if beside.exists() else name


def _span(tensor: Any) -> tuple[int, int]:
    """The addresses of an array's elements: (first byte, behind the last byte)."""
    if hasattr(tensor, "data_ptr"):
        begin = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return begin, begin + (0 if tensor.numel() == 0 else (reach + 1) * tensor.element_size())
    begin = tensor.ctypes.data
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return begin, begin + (0 if tensor.size == 0 else reach + tensor.itemsize)
