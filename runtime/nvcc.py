"""Finding nvcc, of the system or of PyPI's CUDA packages, and what ptxas and the disassembler say about a kernel."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.errors import BuildError, ToolchainError
from fuser.ir.target import Target
from fuser.runtime import cuda
from fuser.runtime.cache import KernelCache
from fuser.runtime.toolchain import NO_SPACE, Toolchain, check_once, checking_folder, no_room

INSTALL_NVCC = (
    "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads) and set CUDA_HOME, or "
    "`pip install nvidia-cuda-nvcc nvidia-cuda-runtime`"
)
# The first toolkit that knows an architecture (CUDA toolkit release notes); nothing older than 11.8 is supported.
_SINCE = {
    "sm_80": (11, 8),
    "sm_86": (11, 8),
    "sm_87": (11, 8),
    "sm_89": (11, 8),
    "sm_90": (11, 8),
    "sm_90a": (12, 0),
    "sm_100": (12, 8),
    "sm_103": (12, 9),
    "sm_120": (12, 8),
}
_PACKAGES = ("nvidia.cu13", "nvidia.cuda_nvcc")
_DISASSEMBLER = "nvdisasm"
# Triton brings one along.
_DISASSEMBLER_PACKAGES = ("nvidia.cu13", "nvidia.cuda_nvdisasm", "triton.backends.nvidia")
_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
_DEFAULT = Path("/usr/local/cuda/bin/nvcc")
_TIMEOUT = 120.0
_RELEASE = re.compile(r"release (\d+)\.(\d+)")
_CHECK = """
#include <cstdint>
__global__ void check(float* out) { out[threadIdx.x] = 1.0f; }
extern "C" int run(float* out, void* stream) {
    check<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(out);
    return int(cudaPeekAtLastError());
}
"""


@dataclass(frozen=True)
class InstructionMix:
    """Instructions in the machine code of one function, by what executes them; counted where they stand, not how often
    they run.

    ``tensor``: products on tensor cores; ``fma``: multiply-adds in fp32; ``alu``: all other arithmetic, moves and
    conversions; ``shared``: loads and stores of shared memory; ``global_``: of global memory, with the asynchronous
    copies from there to shared memory; ``barriers`` of a block; ``local``: local memory, where spilled registers are;
    ``control``: branches, waits, constants and special registers.
    """

    tensor: int = 0
    fma: int = 0
    alu: int = 0
    shared: int = 0
    global_: int = 0
    barriers: int = 0
    local: int = 0
    control: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Resources:
    """What one ``__global__`` function needs, as ptxas reports it: registers of a thread, bytes of static shared
    memory of a block, and bytes that a thread keeps in local memory: its stack, and stores and loads of spilled
    registers. ``instructions`` are known where a disassembler has been asked."""

    function: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    instructions: InstructionMix | None = None


def find_nvcc(target: Target, cache: KernelCache | None = None) -> Toolchain:
    """nvcc for ``target``: ``$CUDACXX`` if it is set, else the first that fits of ``$CUDA_HOME``, ``$CUDA_PATH``,
    ``PATH``, PyPI's packages and ``/usr/local/cuda``.

    One fits if it knows the architecture and is not of a later major release than the GPU's driver, where there is a
    driver. It is tried once, which ``cache`` remembers. Raises :class:`ToolchainError` that says what is missing.
    """
    if target.arch not in _SINCE:
        raise ToolchainError(f"targets of kind 'cuda' have an architecture of {', '.join(_SINCE)}, not {target.arch!r}")
    chosen = os.environ.get("CUDACXX", "").strip()
    if chosen and shutil.which(chosen) is None:
        raise ToolchainError(f"CUDACXX is set to {chosen!r}, which is not an executable; correct or unset it")
    reasons = []
    for path in [Path(chosen)] if chosen else dict.fromkeys(_candidates()):
        try:
            return _toolchain(path, target, cache)
        except ToolchainError as error:
            reasons.append(f"{path}: {error}")
    if reasons:
        raise ToolchainError(f"no nvcc here can build for {target.arch}:\n" + "\n".join(reasons))
    raise ToolchainError(
        f"no CUDA compiler found (looked for nvcc in CUDA_HOME, on PATH, in PyPI's packages and /usr/local/cuda); "
        f"{INSTALL_NVCC}, or build the kernels elsewhere and bring them here with `fuserc cache export` and "
        "`fuserc cache import`"
    )


def find_disassembler(toolchain: Toolchain) -> Path | None:
    """``nvdisasm`` that reads what the nvcc ``toolchain`` writes, of the same or a later release: the first of those
    beside it, on ``PATH``, in PyPI's packages (``nvidia-cuda-nvdisasm``, ``triton``) and in ``/usr/local/cuda``. None
    if there is none."""
    release = _release(toolchain.version)
    for path in dict.fromkeys(_disassemblers(Path(toolchain.command[0]))):
        if os.access(path, os.X_OK) and path.is_file():
            found = _release(_version(str(path), path.stat().st_mtime_ns))
            if found is not None and release is not None and found >= release:
                return path
    return None


def resources(
    text: str,
    target: Target,
    *,
    headers: Path,
    cache: KernelCache | None = None,
    disassembler: Path | None = None,
) -> tuple[Resources, ...]:
    """Compile the source ``text`` to a cubin and return what each of its kernels needs; runs nothing.

    ``headers`` is the folder of the headers that it includes. With a ``disassembler``
    (:func:`find_disassembler`), instructions are counted too. Raises BuildError with nvcc's message if it does not
    compile, or the disassembler's if that cannot read it, and ToolchainError without a fitting nvcc.
    """
    toolchain = find_nvcc(target, cache)
    with tempfile.TemporaryDirectory(prefix="fuser-cubin-") as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(text)
        cubin = source.with_suffix(".cubin")
        out = ("-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin))
        result = _execute((*toolchain.command, *toolchain.compile_flags, f"-I{headers}", *out))
        if result.returncode != 0:
            raise BuildError(f"nvcc cannot compile the kernel for {target.arch}:\n{_output(result)}")
        found = parse_resources(result.stderr)
        if disassembler is None:
            return found
        listing = _execute((str(disassembler), "-c", str(cubin)))
        if listing.returncode != 0:
            raise BuildError(f"{disassembler} cannot read the kernel for {target.arch}:\n{_output(listing)}")
        mixes = parse_instructions(listing.stdout)
        return tuple(dataclasses.replace(one, instructions=mixes[one.function]) for one in found)


_FUNCTION = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SMEM = re.compile(r"(\d+) bytes smem")


def parse_resources(report: str) -> tuple[Resources, ...]:
    """The kernels of a report of ``ptxas -v``."""
    found: list[Resources] = []
    name, stack = "", (0, 0, 0)
    for line in report.splitlines():
        if match := _FUNCTION.search(line):
            name, stack = match[1], (0, 0, 0)
        elif match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := _USED.search(line)) and name:
            shared = _SMEM.search(match[2])
            found.append(Resources(name, int(match[1]), int(shared[1]) if shared else 0, *stack))
            name = ""
    return tuple(found)


_SECTION = re.compile(r"^\.text\.(\S+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
# Names of instructions up to the first dot ("CUDA Binary Utilities", instruction set reference); the first that fits.
_CLASSES = {
    "": "NOP",
    "tensor": r"[A-Z]*MMA",
    "fma": r"FFMA(2|32I)?",
    "local": "LDL|STL",
    "shared": "LDSM?|STSM?|ATOMS",
    "global_": r"LDGSTS|LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG|UTMASTG",
    "barriers": "BAR|UCGABAR_ARV|UCGABAR_WAIT|SYNCS",
    "control": "BRA|BRX|BRXU|JMP|JMX|CALL|RET|EXIT|KILL|BREAK|BSSY|BSYNC|BMOV|WARPSYNC|YIELD|BPT|NANOSLEEP|DEPBAR|"
    "LDGDEPBAR|ARRIVES|ERRBAR|MEMBAR|CCTL|FENCE|WARPGROUP|WARPGROUPSET|ACQBULK|ENDCOLLECTIVE|LDC|LDCU|ULDC|S2R|"
    "S2UR",
    "alu": ".*",
}


def parse_instructions(listing: str) -> dict[str, InstructionMix]:
    """The instructions of every function in a listing of ``nvdisasm -c``, padding left out."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            current = counts[section[1]] = Counter()
        elif instruction := _INSTRUCTION.match(line):
            current[_class(instruction[1])] += 1
    return {
        name: InstructionMix(**{kind: count for kind, count in found.items() if kind}) for name, found in counts.items()
    }


@functools.cache
def _class(instruction: str) -> str:
    return next(kind for kind, names in _CLASSES.items() if re.fullmatch(names, instruction))


def _release(version: str) -> tuple[int, int] | None:
    found = _RELEASE.search(version)
    return (int(found[1]), int(found[2])) if found else None


def _disassemblers(nvcc: Path) -> Iterator[Path]:
    yield nvcc.resolve().parent / _DISASSEMBLER
    if found := shutil.which(_DISASSEMBLER):
        yield Path(found)
    yield from _in_packages(_DISASSEMBLER_PACKAGES, _DISASSEMBLER)
    yield _DEFAULT.parent / _DISASSEMBLER


def _in_packages(packages: Iterable[str], tool: str) -> Iterator[Path]:
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield Path(folder) / "bin" / tool


def _candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable, "").strip():
            yield Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    # Older packages hold ptxas alone.
    yield from filter(Path.exists, _in_packages(_PACKAGES, "nvcc"))
    if _DEFAULT.exists():
        yield _DEFAULT


def _toolchain(path: Path, target: Target, cache: KernelCache | None) -> Toolchain:
    resolved = Path(shutil.which(str(path)) or path)
    if not os.access(resolved, os.X_OK):
        raise ToolchainError("there is no such program")
    stamp = resolved.stat().st_mtime_ns
    version = _version(str(resolved), stamp)
    number = _release(version)
    if number is None:
        raise ToolchainError(f"this is not nvcc (its --version says {version[:200]!r})")
    if number < _SINCE[target.arch]:
        raise ToolchainError(
            f"CUDA {number[0]}.{number[1]} is too old for {target.arch}, which needs "
            f"{'.'.join(map(str, _SINCE[target.arch]))} or newer; {INSTALL_NVCC}"
        )
    driver = cuda.driver_version()
    if driver is not None and number[0] > driver[0]:
        raise ToolchainError(
            f"kernels of CUDA {number[0]}.{number[1]} need a newer driver than this machine's, which runs up to CUDA "
            f"{driver[0]}.{driver[1]}; update the driver, or install a CUDA toolkit {driver[0]}.x"
        )
    toolchain = Toolchain((str(resolved),), version, _compile_flags(target), _link_flags(resolved))
    check_once(toolchain, str(stamp), cache, lambda: _check(toolchain))
    return toolchain


def _compile_flags(target: Target) -> tuple[str, ...]:
    number = target.arch.removeprefix("sm_")
    # Not --use_fast_math: NaN, infinity and denormal numbers must be what they are on the CPU.
    flags = ["-x", "cu", "-O3", "-std=c++17", "-gencode", f"arch=compute_{number},code=sm_{number}"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if compiler := os.environ.get("CXX", "").strip():
        flags += ["-ccbin", shlex.split(compiler)[0]]
    return tuple(flags)


def _link_flags(nvcc: Path) -> tuple[str, ...]:
    # The static runtime: no matter which one PyTorch has loaded, kernels have the one that they were compiled for.
    # Both work on the device's primary context, so streams and memory are common.
    folders = [nvcc.parent.parent / name for name in _LIBRARY_FOLDERS]
    found = [f"-L{folder}" for folder in folders if (folder / "libcudart_static.a").exists()]
    flags = ("-shared", "-cudart", "static", *found[:1])
    return (*flags, "-Xlinker", "-Bsymbolic", "-Xlinker", "--exclude-libs=ALL", "-Xlinker", "--strip-all")


@functools.lru_cache(maxsize=64)
def _version(resolved: str, stamp: int) -> str:
    """What nvcc says about itself; ``stamp`` makes an upgraded compiler a new one."""
    text = _output(_execute((resolved, "--version")))
    # The line with the number first, since reports show the first one.
    return "\n".join(sorted(text.splitlines(), key=lambda line: _RELEASE.search(line) is None))


def _check(toolchain: Toolchain) -> None:
    with checking_folder() as folder:
        source, objects, library = (folder / name for name in ("check.cu", "check.o", "check.so"))
        source.write_text(_CHECK)
        for arguments in (
            (*toolchain.compile_flags, "-c", str(source), "-o", str(objects)),
            (*toolchain.link_flags, str(objects), "-o", str(library)),
        ):
            result = _execute((*toolchain.command, *arguments))
            if result.returncode != 0:
                if NO_SPACE in _output(result):
                    raise no_room(NO_SPACE)
                raise ToolchainError(
                    f"it cannot build a small kernel; {INSTALL_NVCC}.\n"
                    f"command: {shlex.join([*toolchain.command, *arguments])}\n{_output(result)[:4000]}"
                )


def _execute(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"cannot run {shlex.join(arguments)}: {error}; {INSTALL_NVCC}") from error


def _output(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + result.stderr).strip()
