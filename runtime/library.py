"""Loading kernels, and the one OpenMP runtime that they share with torch."""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fuser.ir.errors import CacheError, KernelError, ToolchainError
from fuser.runtime.abi import KernelArgs, KernelFunction

Result = TypeVar("Result")
_RUNTIME_NAME = re.compile(r"^lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
_NO_EXECUTION = ("failed to map segment", "Operation not permitted")
# The thread of a forked child that still refers to its parent's pool of threads, and the one that stands in for it.
_stale_thread: int | None = None
_substitute: ThreadPoolExecutor | None = None


@dataclass(frozen=True)
class OpenMPRuntime:
    """The OpenMP runtime of this process.

    ``path`` is the mapped file; ``llvm`` says whether it has LLVM's entry points (``__kmpc_*``), which code from
    clang++ needs. Every known runtime has GNU's (``GOMP_*``), which code from g++ needs.
    """

    path: Path
    llvm: bool


def loaded_runtimes() -> tuple[Path, ...]:
    """Files of all OpenMP runtimes that are mapped into this process, in the order of their addresses."""
    paths: dict[Path, None] = {}
    for _, _, path in _mappings():
        if _RUNTIME_NAME.match(path.name):
            paths[path] = None
    return tuple(paths)


@functools.cache
def openmp_runtime() -> OpenMPRuntime:
    """The runtime that torch uses, made visible to kernels.

    Kernels are linked without a runtime and find ``GOMP_*`` in the global symbol scope, so that a process has one
    pool of threads whatever file its runtime comes from. Raises :class:`ToolchainError` if there is no runtime.
    """
    import torch

    path = _owner_of(ctypes.CDLL(None))
    if path is None:
        # A torch that does not load its dependencies globally still knows which runtime it was linked against.
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        path = _owner_of(ctypes.CDLL(str(library))) if library.exists() else None
    candidates = [path] if path else [*loaded_runtimes(), Path("libgomp.so.1"), Path("libomp.so.5")]
    for candidate in candidates:
        try:
            runtime = ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(runtime, "GOMP_parallel"):
            return OpenMPRuntime(_owner_of(runtime) or candidate, hasattr(runtime, "__kmpc_fork_call"))
    raise ToolchainError(
        "this build of torch has no OpenMP runtime and none is installed; "
        "install libgomp (Debian: apt install libgomp1, conda: conda install libgomp)"
    )


class Kernel:
    """A loaded kernel: its ``symbol``, the ``path`` of its library and its ``address`` in this process."""

    def __init__(self, path: Path, symbol: str, library: ctypes.CDLL, address: int) -> None:
        self.path = path
        self.symbol = symbol
        self.address = address
        self._library = library
        self._function = KernelFunction(address)

    def __call__(self, args: KernelArgs, stream: int | None = None) -> None:
        """Run the kernel. Raises :class:`KernelError` if it reports failure."""
        status = self.status(args, stream)
        if status != 0:
            raise KernelError(f"the kernel {self.symbol} failed with status {status} (library: {self.path})")

    def status(self, args: KernelArgs, stream: int | None = None) -> int:
        """Run the kernel and return what it returns: 0 for success."""
        return run_after_fork(self._run, args, stream)

    def _run(self, args: KernelArgs, stream: int | None) -> int:
        return int(self._function(ctypes.byref(args), stream))

    def __repr__(self) -> str:
        return f"Kernel({self.symbol!r}, {str(self.path)!r})"


class UnusableLibraryError(CacheError):
    """The library at ``path`` is gone, is damaged, or is not what it was built as: another build helps."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


_kernels: dict[tuple[str, str], Kernel] = {}


def load(path: Path, symbol: str) -> Kernel:
    """The kernel ``symbol`` of the shared object ``path``, loaded once per process.

    Raises :class:`CacheError` if the file cannot be loaded or lacks the symbol, and its subclass
    :class:`UnusableLibraryError` where building it again would help.
    """
    memo = (str(path), symbol)
    if (kernel := _kernels.get(memo)) is not None:
        return kernel
    openmp_runtime()
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        message = f"cannot load the kernel library {path}: {error}. {_advice(path, str(error))}"
        if any(reason in str(error) for reason in _NO_EXECUTION):
            raise CacheError(message) from error
        raise UnusableLibraryError(path, message) from error
    try:
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    except AttributeError:
        # Else the loader would find this library again under its name, whatever is there then.
        _ctypes.dlclose(library._handle)
        raise UnusableLibraryError(
            path, f"the library {path} does not define the kernel {symbol}: it is not what its name says"
        ) from None
    kernel = Kernel(path, symbol, library, address or 0)
    return _kernels.setdefault(memo, kernel)


def _advice(path: Path, error: str) -> str:
    if not path.exists():
        return "The entry has been removed from the cache since it was built; build it again."
    if any(reason in error for reason in _NO_EXECUTION):
        return "Its file system forbids execution (noexec); set FUSER_CACHE_DIR to a directory elsewhere."
    if "GLIBC" in error:
        return "It was built on a newer system; build it here, or export it from a system as old as this one."
    return "It may be damaged or built for another machine; `fuserc cache verify` checks it."


def _mappings() -> list[tuple[int, int, Path]]:
    """(start, end, file) of the file mappings of this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, end = fields[0].split("-")
            found.append((int(start, 16), int(end, 16), Path(fields[5])))
    return found


def _owner_of(library: ctypes.CDLL) -> Path | None:
    """The file that ``GOMP_parallel`` comes from as seen by ``library``, or None if it is not visible there."""
    function = getattr(library, "GOMP_parallel", None)
    if function is None:
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    return next((path for start, end, path in _mappings() if start <= address < end), None)


def run_after_fork(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)``; in a forked child, where a team of threads would never come, from a thread of its own.

    That thread has PyTorch's default modes: gradients are recorded unless ``function`` says otherwise.
    """
    global _substitute
    if threading.get_ident() != _stale_thread or openmp_runtime().llvm:
        return function(*args)
    if _substitute is None:
        _substitute = ThreadPoolExecutor(1, "fuser")
    return _substitute.submit(function, *args).result()


def _note_fork() -> None:
    """In a child: libgomp's threads do not survive ``fork``, but the thread that forked would wait for them forever.

    libgomp keeps one pool for each thread that starts teams, so such a child runs its kernels from a new thread.
    (LLVM's and Intel's runtimes start anew after a fork.)
    """
    global _stale_thread, _substitute
    _substitute = None
    if _stale_thread is not None or "torch" in sys.modules:
        _stale_thread = threading.get_ident()


os.register_at_fork(after_in_child=_note_fork)
