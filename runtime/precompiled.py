"""What many kernels need and is the same for all of them, compiled once for each compiler and its flags.

The system's headers: g++ reads ``standard.h.gch`` for ``-include standard.h`` if it was made by the same compiler with
the same flags, and ``standard.h`` itself if not (GCC's manual, "Using Precompiled Headers"). What comes out is the
same, to the bit, and sooner: reading ``<immintrin.h>`` takes longer than all else that most kernels need. Nothing of
ours is in it, so that it serves every version of every kernel.

The emulator's own code (:data:`fuser.runtime.emulator.ENGINE`), an object that every emulated kernel is linked with.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from fuser.ir.errors import CacheError
from fuser.runtime.cache import KernelCache
from fuser.runtime.emulator import ENGINE
from fuser.runtime.entries import digest_of
from fuser.runtime.store import read_regular, require_own_folder
from fuser.runtime.toolchain import Toolchain

HEADER = "standard.h"
_COMPILED = f"{HEADER}.gch"
_PAYS_FROM = 3
"""Kernels that take longer with their own reading of the headers than with one more compilation before them."""


class _Kept:
    """The file ``path``, which the cache may have from an earlier build by the same ``toolchain``; ``content`` is what
    it is made of."""

    def __init__(self, toolchain: Toolchain, content: Iterable[bytes], cache: KernelCache, path: Path) -> None:
        parts = [*toolchain.command, "", *toolchain.compile_flags, "", toolchain.version]
        self._key = digest_of([*(part.encode() for part in parts), *content])[:32]
        self._cache, self._path = cache, path
        self.found = self._link()
        """Whether it is there already."""

    def _link(self) -> bool:
        """Put what the cache has, if it is what its name says, where it is wanted; whether there is any."""
        for found in self._cache.precompiled(self._key):
            try:
                require_own_folder(found.parent)
                os.link(found, self._path)
                if hashlib.sha256(read_regular(self._path)).hexdigest() == found.stem.partition("-")[2]:
                    os.utime(self._path)
                    return True
            except (OSError, CacheError):
                continue
            self._path.unlink()
            self._cache.remove(found)
        return False

    def keep(self) -> None:
        """Leave what was made now to later builds."""
        if not self.found and self._path.exists():
            with contextlib.suppress(OSError, CacheError):
                self._cache.keep_precompiled(self._key, self._path)


class Precompiled:
    """The compiled headers of a toolchain for one run of ninja in ``folder``, where ``kernels`` are to be compiled.

    Whatever goes wrong with it costs time only: kernels then read the headers themselves.
    """

    def __init__(self, toolchain: Toolchain, cache: KernelCache, folder: Path, kernels: int) -> None:
        self._kept: _Kept | None = None
        self.flags = ""
        """What kernels are compiled with beside their own flags, in the shell that starts the compiler."""
        self.needs = ""
        """The file that ninja has to make before kernels, if any."""
        self.lines: list[str] = []
        """What build.ninja says about it."""
        if not toolchain.standard_headers:
            return
        self._kept = _Kept(toolchain, [toolchain.standard_headers.encode()], cache, folder / _COMPILED)
        if not self._kept.found and kernels < _PAYS_FROM:
            return
        (folder / HEADER).write_text(toolchain.standard_headers)
        self.flags = f" $(test -e {_COMPILED} && echo -include {HEADER})"
        if not self._kept.found:
            # -c: where the flags say that sources are C++, g++ would link.
            options = ("-c", "-x", "c++-header", HEADER, "-o", f"{_COMPILED}.part")
            make = shlex.join([*toolchain.command, *toolchain.compile_flags, *options])
            command = f"( {make} && mv {_COMPILED}.part {_COMPILED} ) > {HEADER}.log 2>&1 || true"
            self.needs = f" {_COMPILED}"
            self.lines = [
                "rule standard",
                f"  command = {command.replace('$', '$$')}",
                f"build {_COMPILED}: standard {HEADER}",
            ]

    def keep(self) -> None:
        """Leave what was made now to later builds."""
        if self._kept is not None:
            self._kept.keep()


class Engine:
    """The object ``name`` of the emulator's own code for one run of ninja in ``folder``; ``files`` are its source and
    headers."""

    def __init__(
        self, toolchain: Toolchain, cache: KernelCache, folder: Path, name: str, files: Mapping[str, bytes]
    ) -> None:
        content = (part for path, data in sorted(files.items()) for part in (path.encode(), data))
        self.name = name
        self._kept = _Kept(toolchain, content, cache, folder / name)
        self.lines: list[str] = []
        """What build.ninja says about it."""
        if not self._kept.found:
            sources = Path(f"{name}.files")
            for path, data in files.items():
                (folder / sources / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / sources / path).write_bytes(data)
            options = ("-c", str(sources / ENGINE), "-o", f"{name}.part")
            make = shlex.join([*toolchain.command, *toolchain.compile_flags, *options])
            command = f"{make} && mv {name}.part {name}"
            self.lines = [
                f"rule {name}",
                f"  command = {command.replace('$', '$$')}",
                f"build {name}: {name} {sources / ENGINE}",
            ]

    def keep(self) -> None:
        """Leave what was made now to later builds."""
        self._kept.keep()
