"""Compilers as values, and trying each of them once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.errors import ToolchainError
from fuser.runtime.cache import KernelCache

NO_SPACE = "No space left on device"
"""What compilers, told to speak English, say on a full disk."""


@dataclass(frozen=True)
class Toolchain:
    """A working compiler for one target.

    ``command`` starts the compiler, ``version`` is all that it says about itself, ``compile_flags`` turn a source into
    an object and ``link_flags`` an object into a shared library. A CPU's library is linked without ``-fopenmp``: it
    takes the OpenMP runtime that torch has already loaded (:func:`fuser.runtime.library.openmp_runtime`).
    ``standard_headers`` is a header of the system's headers that kernels include, for compilers that can read it
    compiled (:mod:`fuser.runtime.precompiled`); empty for others.
    """

    command: tuple[str, ...]
    version: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    standard_headers: str = ""

    @property
    def name(self) -> str:
        """The first line of the version text, for reports."""
        return self.version.partition("\n")[0]

    @property
    def flags(self) -> tuple[str, ...]:
        """Everything on the command lines that decides what a library contains."""
        return (*self.compile_flags, "--", *self.link_flags)


def check_once(toolchain: Toolchain, stamp: str, cache: KernelCache | None, check: Callable[[], None]) -> None:
    """Run ``check`` unless it has passed for this toolchain before; ``stamp`` changes with the compiler's file."""
    key = "\0".join([*toolchain.command, stamp, toolchain.version, *toolchain.flags])
    if key in _checked:
        return
    if cache is None or cache.read_record("toolchain", key) is None:
        check()
        if cache is not None:
            cache.write_record("toolchain", key, {"works": True})
    _checked.add(key)


_checked: set[str] = set()


class NoRoomError(ToolchainError):
    """A compiler could not be tried because the folder for temporary files is full or missing."""


def no_room(reason: object) -> NoRoomError:
    """The error to raise when a temporary file cannot be written."""
    return NoRoomError(
        f"compilers cannot write their temporary files ({reason}): free some space in "
        f"{os.environ.get('TMPDIR', '/tmp')}, or set TMPDIR to a folder that has it"
    )


@contextlib.contextmanager
def checking_folder() -> Iterator[Path]:
    """A temporary folder to try a compiler in. Raises :class:`NoRoomError` where none can be made or written."""
    try:
        with tempfile.TemporaryDirectory(prefix="fuser-check-") as folder:
            yield Path(folder)
    except OSError as error:
        raise no_room(error) from error
