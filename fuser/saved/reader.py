"""Reading a file of compiled programs."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

import fuser
from fuser.attention.registry import adopt, spec_of
from fuser.codegen.assemble import runner_source
from fuser.codegen.render import header_folder, render
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.target import Target
from fuser.runtime import cuda
from fuser.runtime.build import build_and_load
from fuser.runtime.cache import default_cache
from fuser.runtime.cpuinfo import lacking
from fuser.runtime.library import Kernel
from fuser.runtime.library import load as load_kernel
from fuser.saved import codec
from fuser.saved.content import (
    FORMAT,
    PROGRAMS,
    REPORTS,
    Content,
    Manifest,
    SavedPrograms,
    check_capture,
    check_program,
)
from fuser.saved.module import LoadedModule
from fuser.saved.writer import checksum

Trust = Literal["kernels", "data"]
_ZIP = b"PK"


def load(path: str | os.PathLike[str], *, trust: Trust = "kernels") -> LoadedModule:
    """The programs of a file that :meth:`fuser.OptimizedModule.save` wrote, as a module.

    Kernels are machine code, and all else in a file is data. With ``trust="kernels"`` the file's kernels run, as you:
    load only files from people you trust. With ``trust="data"`` they are ignored and built anew from their parameters,
    which needs a compiler or a cache that has them, and gives the same results; but the kernels still believe the sizes
    that the file states.

    The classes of the model's inputs and outputs must be in modules that are imported already, or in ``transformers``;
    the model is not needed.

    Raises FuserError when the file cannot be read, is damaged or truncated, was written in another format, or was made
    for a CPU with instructions that this one lacks; and, with ``trust="data"``, when kernels cannot be built.
    """
    if trust not in ("kernels", "data"):
        raise FuserError(f"trust is 'kernels' or 'data', not {trust!r}")
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FuserError(f"cannot read {path}: it is not a file")
        with path.open("rb") as file:
            old = file.read(len(_ZIP)) == _ZIP
        if not old:
            with safe_open(path, "pt") as parts:
                return LoadedModule(_read(parts, path, trust))
    except FuserError:
        raise
    except OSError as error:
        raise FuserError(f"cannot read {path}: {error}") from error
    except Exception as error:
        # Whatever a parser, PyTorch or a constructor says about it: the file is to blame.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FuserError(
            f"{path} is damaged or is not a file that OptimizedModule.save wrote: {reason:.300}"
        ) from error
    raise FuserError(
        f"{path} is a zip archive: either it was written by an older version of fuser, which kept programs in another "
        "format, or it is not a file that OptimizedModule.save wrote. To make it anew, optimize the model, call it on "
        "every shape and save it again"
    )


def _read(parts: Any, path: Path, trust: Trust) -> Content:
    metadata = parts.metadata() or {}
    if "fuser.format" not in metadata:
        raise ValueError("it is of safetensors, but holds no programs")
    if metadata["fuser.format"] != FORMAT:
        raise FuserError(
            f"{path} has format {metadata['fuser.format']} (written by fuser {metadata.get('fuser.version')}); "
            f"this is fuser {fuser.__version__}, which reads format {FORMAT}: save the model again"
        )
    text = metadata["fuser.manifest"].encode()
    if hashlib.sha256(text).hexdigest() != metadata["fuser.sha256"]:
        raise ValueError("its manifest does not match its checksum")
    manifest = codec.load(text)
    if not isinstance(manifest, Manifest):
        raise TypeError("it has no manifest")
    if metadata["fuser.version"] != manifest.fuser:
        raise ValueError("it does not say which version wrote it")
    _require_machine(manifest, path)
    if set(manifest.parts) != set(parts.keys()):
        raise ValueError("it does not hold what its manifest lists")

    def part(name: str) -> Tensor:
        # A copy, in memory aligned as kernels want it: what is read stays as it was checked.
        tensor: Tensor = parts.get_tensor(name).clone()
        if checksum(tensor) != manifest.parts[name]:
            raise ValueError(f"{name} does not match its checksum")
        return tensor

    weights = {n.removeprefix("weights/"): part(n) for n in manifest.parts if n.startswith("weights/")}
    try:
        content = codec.load(part(PROGRAMS).numpy().tobytes())
        if not isinstance(content, SavedPrograms) or not (content.programs or content.captures):
            raise TypeError("it holds no programs")
        for program in content.programs:
            check_program(program, weights)
        for capture in content.captures:
            check_capture(capture, weights)
    except Exception as error:
        raise FuserError(
            f"the programs of {path} cannot be read: {str(error) or type(error).__name__:.300}. They were written by "
            f"fuser {manifest.fuser} with torch {manifest.torch}; here are fuser {fuser.__version__} and torch "
            f"{torch.__version__}. If all of these are the same, the file is damaged"
        ) from error
    symbols = {symbol for plan in content.plans for symbol in plan.symbols}
    libraries = {symbol: f"kernels/{symbol}.so" for symbol in sorted(symbols)}
    if absent := sorted(set(libraries.values()) - set(manifest.parts)):
        raise ValueError(f"it lacks {absent[0]}")
    if trust == "kernels":
        kernels = _loaded({symbol: part(name) for symbol, name in libraries.items()})
    else:
        kernels = _built(content, manifest.target)
    reports = {name: part(name).numpy().tobytes().decode() for name in REPORTS}
    for key, spec in content.attention:
        try:
            spec_of(key)
        except MaskError:
            adopt(key, spec)
    return Content(path, manifest.target, content.programs, content.captures, weights, kernels, reports)


def _loaded(libraries: Mapping[str, Tensor]) -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {}
    # A library stays mapped when its file is gone.
    with default_cache().workspace() as folder:
        for symbol, library in libraries.items():
            file = folder / f"{len(kernels)}.so"
            file.write_bytes(library.numpy().data)
            kernels[symbol] = load_kernel(file, symbol)
    return kernels


def _built(content: SavedPrograms, target: Target) -> dict[str, Kernel]:
    """The kernels of all programs from their parameters."""
    try:
        sources = [*map(render, content.specs.values()), runner_source(target)]
    except Exception as error:
        raise ValueError(f"a kernel cannot be made of its parameters: {error}") from error
    return build_and_load(sources, target, headers=header_folder(target))


def _require_machine(manifest: Manifest, path: Path) -> None:
    """Raise FuserError unless this machine runs what was built for the target."""
    target = manifest.target
    same = manifest.machine == platform.machine()
    if target.kind == "cuda" and not (same and target.emulated):
        if not same:
            raise FuserError(f"{path} was saved for {manifest.machine}, and this machine is {platform.machine()}")
        device = cuda.resolve_device(torch.device("cuda"))
        found = {cuda.architecture(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
        if target.arch not in found:
            raise FuserError(
                f"{path} was saved for GPUs of the architecture {target.arch}, and this machine has "
                f"{', '.join(sorted(found))} ({torch.cuda.get_device_name(device)}): optimize the model here"
            )
    if target.kind == "cuda":
        return
    reason = lacking(target) if same else f"is {platform.machine()}"
    if reason:
        what = " ".join((manifest.machine, target.arch, *sorted(target.features)))
        raise FuserError(
            f"{path} was saved for {what}, and this CPU {reason}: optimize the model here, or save it with "
            "FUSER_ISA set to an instruction set that both CPUs have"
        )
