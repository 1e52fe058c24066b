"""Finding C++ compilers and ninja, and the flags that kernels are built with."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from fuser.ir.errors import ToolchainError
from fuser.ir.target import VECTOR_BYTES, Isa, Target
from fuser.runtime import emulator
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import openmp_runtime
from fuser.runtime.nvcc import find_nvcc
from fuser.runtime.toolchain import NO_SPACE, NoRoomError, Toolchain, check_once, checking_folder, no_room

INSTALL_COMPILER = "install g++ 10 or newer (Debian: apt install g++, conda: conda install gxx)"
INSTALL_NINJA = "install it with `pip install ninja` (Debian: apt install ninja-build, conda: conda install ninja)"

# Not -ffast-math: NaN and infinity must propagate. Not -march=native: a kernel must run wherever Target.key says.
_COMMON = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility-inlines-hidden",
)
_GCC_ONLY = ("-fno-gnu-unique", "-fno-semantic-interposition")
_X86_64_V3 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_ISA_FLAGS = {
    Isa.AVX512: (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *_X86_64_V3,
        "-mprefer-vector-width=512",
    ),
    Isa.AVX2: _X86_64_V3,
    Isa.NEON: (),
    Isa.PORTABLE: (),
}
_FEATURE_FLAGS = {
    "amx_bf16": "-mamx-bf16",
    "amx_int8": "-mamx-int8",
    "amx_tile": "-mamx-tile",
    "avx512_bf16": "-mavx512bf16",
    "avx512_vnni": "-mavx512vnni",
    "avx_vnni": "-mavxvnni",
}
_ARM_EXTENSIONS = {"asimddp": "dotprod", "bf16": "bf16", "i8mm": "i8mm"}
# -Bsymbolic: a kernel must never call a function of the same name in torch or in another kernel.
_LINK = ("-shared", "-Wl,-Bsymbolic", "-Wl,--as-needed")
STANDARD_HEADERS = """\
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <omp.h>
#include <type_traits>
#if __has_include(<immintrin.h>)
#include <immintrin.h>
#endif
"""
"""What the CPU's templates include."""
_TIMEOUT = 60.0

_CHECK = """
#include <cstdint>
#include <vector>
#include <omp.h>
extern "C" int check(int threads) {
    int team = 0;
    #pragma omp parallel for num_threads(threads) reduction(+ : team)
    for (int i = 0; i < threads; ++i) team += omp_get_num_threads() > 0;
    if constexpr (sizeof(void*) == 8) return team;
    return -1;
}
"""


def target_flags(target: Target) -> tuple[str, ...]:
    """The flags that choose the instruction set of ``target``, and the macros that tell kernels about it."""
    isa = Isa(target.arch)
    flags = list(_ISA_FLAGS[isa])
    if isa is Isa.NEON:
        extensions = [_ARM_EXTENSIONS[name] for name in sorted(target.features) if name in _ARM_EXTENSIONS]
        flags.append("+".join(["-march=armv8.2-a", *extensions]) if extensions else "-march=armv8-a")
    else:
        flags += [_FEATURE_FLAGS[name] for name in sorted(target.features) if name in _FEATURE_FLAGS]
    return (*flags, f"-DFUSER_VECTOR_BYTES={VECTOR_BYTES[isa]}")


def find_toolchain(target: Target, cache: KernelCache | None = None) -> Toolchain:
    """The compiler for ``target``: ``$CXX`` if it is set, else the first of g++, c++ and clang++ that works; for a GPU
    nvcc (:func:`fuser.runtime.nvcc.find_nvcc`), for an emulated one the C++ compiler.

    "Works" means that it compiles and links C++17 with OpenMP; that is tried once per compiler and flags, and
    remembered in ``cache`` (default: for this process only). Raises :class:`ToolchainError` that says what is missing
    and how to install it.
    """
    if target.kind == "cuda" and not target.emulated:
        return find_nvcc(target, cache)
    if target.kind not in ("cpu", "cuda"):
        raise ToolchainError(
            f"there is no toolchain for targets of kind {target.kind!r}; this build of fuser knows 'cpu' and 'cuda'"
        )
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = tuple(shlex.split(chosen))
        if shutil.which(command[0]) is None:
            raise ToolchainError(f"CXX is set to {chosen!r}, which is not an executable; correct or unset it")
        return _toolchain(command, target, cache)
    failures = []
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is None:
            continue
        try:
            return _toolchain((name,), target, cache)
        except NoRoomError:
            raise
        except ToolchainError as error:
            failures.append(str(error))
    if failures:
        raise ToolchainError("no C++ compiler works here:\n" + "\n".join(failures))
    raise ToolchainError(f"no C++ compiler found (looked for g++, c++, clang++ on PATH); {INSTALL_COMPILER} or set CXX")


def find_ninja() -> Path:
    """The ninja executable: of the PyPI package if it is installed, else from PATH.

    Raises :class:`ToolchainError` if there is none.
    """
    try:
        import ninja
    except ImportError:
        pass
    else:
        path = Path(ninja.BIN_DIR) / "ninja"
        if os.access(path, os.X_OK):
            return path
    if found := shutil.which("ninja"):
        return Path(found)
    raise ToolchainError(f"ninja, which builds kernels in parallel, is not installed; {INSTALL_NINJA}")


def _toolchain(command: tuple[str, ...], target: Target, cache: KernelCache | None) -> Toolchain:
    resolved = Path(shutil.which(command[0]) or command[0]).resolve()
    stamp = resolved.stat().st_mtime_ns if resolved.exists() else 0
    host = _identify(command, str(resolved), stamp, () if target.emulated else target_flags(target))
    toolchain = _emulating(host) if target.emulated else host
    check_once(toolchain, f"{resolved}\0{stamp}", cache, lambda: _check(host))
    return toolchain


def _emulating(host: Toolchain) -> Toolchain:
    """The same compiler for CUDA kernels that run on the CPU."""
    headers = emulator.STANDARD_HEADERS if host.standard_headers else ""
    return Toolchain(host.command, host.version, emulator.compile_flags(), emulator.link_flags(), headers)


@functools.lru_cache(maxsize=64)
def _identify(command: tuple[str, ...], resolved: str, stamp: int, isa_flags: tuple[str, ...]) -> Toolchain:
    """The toolchain of ``command``; ``resolved`` and ``stamp`` make an upgraded compiler a new one."""
    version = _run((*command, "--version"), command).strip()
    clang = "clang" in version.lower()
    if not clang and "gcc" not in version.lower() and "free software foundation" not in version.lower():
        raise ToolchainError(
            f"{shlex.join(command)} does not look like g++ or clang++ (its --version says {version[:200]!r}); "
            f"{INSTALL_COMPILER}"
        )
    runtime = openmp_runtime()
    if clang and not runtime.llvm:
        raise ToolchainError(
            f"{shlex.join(command)} is clang, whose OpenMP code needs LLVM's runtime, but torch has loaded "
            f"{runtime.path.name}, and two runtimes in one process fight over its cores; {INSTALL_COMPILER}"
        )
    compile_flags = (*_COMMON, *(() if clang else _GCC_ONLY), *isa_flags)
    return Toolchain(command, version, compile_flags, _LINK, "" if clang else STANDARD_HEADERS)


def _check(toolchain: Toolchain) -> None:
    """Build a small library. Raises :class:`ToolchainError` if that fails."""
    command = toolchain.command
    with checking_folder() as folder:
        source, objects, library = (folder / name for name in ("check.cpp", "check.o", "check.so"))
        source.write_text(_CHECK)
        _run((*command, *toolchain.compile_flags, "-c", str(source), "-o", str(objects)), command)
        _run((*command, *toolchain.link_flags, str(objects), "-o", str(library)), command)
        if not library.exists():
            raise ToolchainError(f"{shlex.join(command)} reports success but writes no library; {INSTALL_COMPILER}")


def _run(arguments: tuple[str, ...], command: tuple[str, ...]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"cannot run {shlex.join(arguments)}: {error}; {INSTALL_COMPILER}") from error
    if result.returncode != 0:
        output = (result.stderr or result.stdout).strip()
        if NO_SPACE in output:
            raise no_room(output.partition("\n")[0])
        raise ToolchainError(
            f"{shlex.join(command)} cannot build C++17 with OpenMP for this target ({platform.machine()}); "
            f"{INSTALL_COMPILER}.\ncommand: {shlex.join(arguments)}\n{output[:4000]}"
        )
    return result.stdout
