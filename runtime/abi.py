"""The C interface that every generated kernel shares: one definition, as structures of ctypes and as a header.

``python -m fuser.runtime.abi`` prints ``templates/cpu/abi.h``.
"""

from __future__ import annotations

import ctypes
import struct
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from fuser.ir.extents import Extents

_ARGS: tuple[tuple[str, str, Any, str], ...] = (
    ("void* const*", "tensors", ctypes.POINTER(ctypes.c_void_p), "one address per tensor, in the template's order"),
    ("const void*", "extents", ctypes.c_void_p, "the kernel's struct of run-time sizes"),
    ("int32_t", "threads", ctypes.c_int32, "team size of every parallel region; 1 on a GPU"),
    ("void*", "workspace", ctypes.c_void_p, "scratch memory, may be null when the kernel asks for none"),
    (
        "int32_t*",
        "status",
        ctypes.c_void_p,
        "where work on a GPU reports an index outside its table (1); null on a CPU",
    ),
)
"""Type in C, name, type in Python, and meaning of the fields of ``FuserArgs``."""


class KernelArgs(ctypes.Structure):
    """``FuserArgs``: what a kernel is called with."""

    _fields_ = tuple((name, kind) for _, name, kind, _ in _ARGS)

    @classmethod
    def pack(
        cls,
        tensors: Sequence[int],
        extents: Extents | Sequence[int] = (),
        threads: int = 1,
        workspace: int = 0,
        status: int = 0,
    ) -> KernelArgs:
        """Arguments from plain integers (addresses in ``tensors``, ``workspace`` and ``status``).

        ``extents`` that are no struct become an array of ``int64_t``. The structure owns the two arrays; the memory
        that the addresses point to stays the caller's.
        """
        addresses = (ctypes.c_void_p * max(len(tensors), 1))(*tensors)
        return cls(
            ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p)),
            ctypes.cast(extents_buffer(extents), ctypes.c_void_p),
            threads,
            workspace or None,
            status or None,
        )


def extents_buffer(extents: Extents | Sequence[int]) -> Any:
    """Extents in memory that a kernel can read: a ctypes array, which owns it."""
    if not isinstance(extents, Extents):
        return (ctypes.c_int64 * max(len(extents), 1))(*extents)
    packed = extents.pack()
    return (ctypes.c_int64 * max(len(packed) // 8, 1)).from_buffer_copy(packed or struct.pack("=q", 0))


KernelFunction = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(KernelArgs), ctypes.c_void_p)

_STEP: tuple[tuple[str, str, Any, str], ...] = (
    (
        "int (*{})(const FuserArgs*, void*)",
        "kernel",
        ctypes.c_void_p,
        "the second argument is the CUDA stream; null on a CPU",
    ),
    ("const FuserArgs*", "args", ctypes.POINTER(KernelArgs), "what it is called with"),
)


class Step(ctypes.Structure):
    """``FuserStep``: one kernel and its arguments, so that C code can run a list of steps without Python."""

    _fields_ = tuple((name, kind) for _, name, kind, _ in _STEP)


def _table(kind: type[ctypes.Structure], fields: Sequence[tuple[str, str, Any, str]]) -> np.dtype[np.void]:
    """The structure as a row of an array, in which pointers are integers."""
    members = [getattr(kind, name) for _, name, _, _ in fields]
    return np.dtype(
        {
            "names": [name for _, name, _, _ in fields],
            "formats": [f"i{member.size}" for member in members],
            "offsets": [member.offset for member in members],
            "itemsize": ctypes.sizeof(kind),
        }
    )


ARGS_ROW = _table(KernelArgs, _ARGS)
STEP_ROW = _table(Step, _STEP)
"""Rows of arrays of numpy that lie in memory as arrays of ``FuserArgs`` and ``FuserStep``."""


def header() -> str:
    """The text of ``abi.h``."""
    return textwrap.dedent("""\
        // The C interface that every generated kernel shares; written by `python -m fuser.runtime.abi`.
        #pragma once
        #include <cstdint>

        extern "C" {{

        {args}
        {step}
        }}
        """).format(args=_declaration("FuserArgs", _ARGS), step=_declaration("FuserStep", _STEP))


def _declaration(name: str, fields: Sequence[tuple[str, str, Any, str]]) -> str:
    declared = [f"{kind.format(field) if '{}' in kind else f'{kind} {field}'};" for kind, field, _, _ in fields]
    width = max(map(len, declared))
    lines = [f"    {text:<{width}}  // {field[3]}\n" for text, field in zip(declared, fields, strict=True)]
    return f"typedef struct {{\n{''.join(lines)}}} {name};\n"


if __name__ == "__main__":
    print(header(), end="")
