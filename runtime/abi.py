"""The C interface that every generated kernel shares; ``templates/cpu/abi.h`` mirrors it field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


class KernelArgs(ctypes.Structure):
    """``FuserArgs``: what a kernel is called with.

    ``tensors`` holds one address per tensor and ``extents`` the run-time sizes, both in the order of the kernel's
    specification; ``threads`` is the team size of every parallel region, on a GPU the number of its multiprocessors;
    ``workspace`` is scratch memory or null; ``status`` is a word that work on a GPU may write, null on a CPU.
    """

    _fields_ = (
        ("tensors", ctypes.POINTER(ctypes.c_void_p)),
        ("extents", ctypes.POINTER(ctypes.c_int64)),
        ("threads", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
    )

    @classmethod
    def pack(
        cls, tensors: Sequence[int], extents: Sequence[int] = (), threads: int = 1, workspace: int = 0, status: int = 0
    ) -> KernelArgs:
        """Arguments from plain integers (addresses in ``tensors``, ``workspace`` and ``status``).

        The structure owns the two arrays; the memory that the addresses point to stays the caller's.
        """
        addresses = (ctypes.c_void_p * max(len(tensors), 1))(*tensors)
        sizes = (ctypes.c_int64 * max(len(extents), 1))(*extents)
        pointers = (
            ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p)),
            ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
        )
        return cls(*pointers, threads, workspace or None, status or None)


KernelFunction = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(KernelArgs), ctypes.c_void_p)


class Step(ctypes.Structure):
    """``FuserStep``: one kernel and its arguments, so that C code can run a list of steps without Python."""

    _fields_ = (("kernel", ctypes.c_void_p), ("args", ctypes.POINTER(KernelArgs)))
