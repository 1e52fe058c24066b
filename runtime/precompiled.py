"""The system's headers that kernels include, compiled once for each compiler and its flags.

g++ reads ``standard.h.gch`` for ``-include standard.h`` if it was made by the same compiler with the same flags, and
``standard.h`` itself if not (GCC's manual, "Using Precompiled Headers"). What comes out is the same, to the bit, and
sooner: reading ``<immintrin.h>`` takes longer than all else that most kernels need. Nothing of ours is in it, so that
it serves every version of every kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from pathlib import Path

from fuser.ir.errors import CacheError
from fuser.runtime.cache import KernelCache
from fuser.runtime.entries import digest_of
from fuser.runtime.store import read_regular, require_own_folder
from fuser.runtime.toolchain import Toolchain

HEADER = "standard.h"
_COMPILED = f"{HEADER}.gch"
_PAYS_FROM = 3
"""Kernels that take longer with their own reading of the headers than with one more compilation before them."""


class Precompiled:
    """The compiled headers of a toolchain for one run of ninja in ``folder``, where ``kernels`` are to be compiled.

    Whatever goes wrong with it costs time only: kernels then read the headers themselves.
    """

    def __init__(self, toolchain: Toolchain, cache: KernelCache, folder: Path, kernels: int) -> None:
        parts = [*toolchain.command, "", *toolchain.compile_flags, "", toolchain.version, toolchain.standard_headers]
        self._key = digest_of([part.encode() for part in parts])[:32]
        self._cache, self._folder = cache, folder
        self._found = False
        self.flags = ""
        """What kernels are compiled with beside their own flags, in the shell that starts the compiler."""
        self.needs = ""
        """The file that ninja has to make before kernels, if any."""
        self.lines: list[str] = []
        """What build.ninja says about it."""
        if not toolchain.standard_headers:
            return
        self._found = self._link()
        if not self._found and kernels < _PAYS_FROM:
            return
        (folder / HEADER).write_text(toolchain.standard_headers)
        self.flags = f" $(test -e {_COMPILED} && echo -include {HEADER})"
        if not self._found:
            # -c: where the flags say that sources are C++, g++ would link.
            options = ("-c", "-x", "c++-header", HEADER, "-o", f"{_COMPILED}.part")
            make = shlex.join([*toolchain.command, *toolchain.compile_flags, *options])
            command = f"( {make} && mv {_COMPILED}.part {_COMPILED} ) > {HEADER}.log 2>&1 || true"
            self.needs = f" | {_COMPILED}"
            self.lines = [
                "rule standard",
                f"  command = {command.replace('$', '$$')}",
                f"build {_COMPILED}: standard {HEADER}",
            ]

    def _link(self) -> bool:
        """Put what the cache has, if it is what its name says, into the folder; whether there is any."""
        path = self._folder / _COMPILED
        for found in self._cache.precompiled(self._key):
            try:
                require_own_folder(found.parent)
                os.link(found, path)
                if hashlib.sha256(read_regular(path)).hexdigest() == found.stem.partition("-")[2]:
                    os.utime(path)
                    return True
            except (OSError, CacheError):
                continue
            path.unlink()
            self._cache.remove(found)
        return False

    def keep(self) -> None:
        """Leave what was made now to later builds."""
        path = self._folder / _COMPILED
        if not self._found and self.flags and path.exists():
            with contextlib.suppress(OSError, CacheError):
                self._cache.keep_precompiled(self._key, path)
