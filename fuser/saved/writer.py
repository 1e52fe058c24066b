"""Writing compiled programs to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import fuser
from fuser.attention.registry import spec_of
from fuser.explain.report import collect, render_html, render_text
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import FuserError
from fuser.ir.masks import from_dense
from fuser.ir.operators import TorchCall
from fuser.module.compiler import Compiled
from fuser.module.snapshot import SavedCall, Snapshot
from fuser.saved import codec
from fuser.saved.content import (
    FORMAT,
    PROGRAMS,
    REPORTS,
    Manifest,
    SavedProgram,
    SavedPrograms,
    SavedTensor,
    torch_calls,
)
from fuser.saved.outline import outline_of

_STORED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.bool}
)
"""Types that every version of safetensors has names for."""


def save(calls: Sequence[SavedCall], snapshot: Snapshot, path: Path) -> None:
    """Write the programs of ``calls`` with the report of ``snapshot`` to ``path``, at once or not at all.

    The file is as large as the packed weights. It holds programs for the shapes that were compiled, not the model:
    call the module on every shape that is needed first.

    Raises FuserError when nothing is compiled, when a part of a program cannot be saved, or when the file cannot be
    written.
    """
    target = snapshot.target
    if not calls or target is None:
        raise FuserError("nothing is compiled yet: call the module, or pass example_inputs to fuser.optimize")
    spans = _Spans()
    try:
        saved = tuple(_saved(call, spans) for call in calls)
        text = codec.dump(SavedPrograms(saved, tuple(_specs_of(saved).items())))
        codec.load(text)
    except (TypeError, ValueError, AttributeError) as error:
        raise FuserError(f"a part of the program cannot be saved: {error}") from error
    parts = {
        PROGRAMS: _bytes(text),
        **{f"weights/{name}": tensor for name, tensor in spans.tensors()},
        **{f"kernels/{s}.so": _bytes(content) for s, content in _libraries(call.compiled for call in calls).items()},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        found = collect(snapshot)
        reports = dict(zip(REPORTS, (render_text(found), render_html(found, snapshot.last)), strict=True))
        parts |= {name: _bytes(report.encode()) for name, report in reports.items()}
        sums = {name: checksum(tensor) for name, tensor in parts.items()}
        manifest = codec.dump(Manifest(fuser.__version__, str(torch.__version__), platform.machine(), target, sums))
        write_file(temporary, parts, manifest)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise FuserError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path: Path, parts: Mapping[str, Tensor], manifest: bytes) -> None:
    """A safetensors file of these parts. What says how to read it is in its metadata."""
    metadata = {
        "fuser.format": FORMAT,
        "fuser.version": fuser.__version__,
        "fuser.manifest": manifest.decode(),
        "fuser.sha256": hashlib.sha256(manifest).hexdigest(),
    }
    safetensors.torch.save_file(dict(parts), path, metadata)


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the type, shape and bytes of a contiguous tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _libraries(programs: Iterable[Compiled]) -> dict[str, bytes]:
    """The shared objects of all kernels."""
    found: dict[str, bytes] = {}
    for symbol, kernel in sorted({s: k for c in programs for s, k in c.program.kernels.items()}.items()):
        try:
            found[symbol] = kernel.path.read_bytes()
        except OSError as error:
            raise FuserError(
                f"the kernel {symbol} is no longer in the cache ({error}); optimize the model again before saving"
            ) from error
    return found


def _saved(call: SavedCall, spans: _Spans) -> SavedProgram:
    compiled, assembly = call.compiled, call.compiled.assembly
    plan = dataclasses.replace(assembly.plan, constants=())
    return SavedProgram(
        key=call.signature,
        plan=plan,
        output=outline_of(compiled.output.build([torch.empty(0) for _ in plan.returns])),
        constants=tuple(spans.add(t) for t in call.constants),
        specs=assembly.specs,
        kernels=assembly.kernels,
        unfused=compiled.unfused,
        outside=compiled.outside,
    )


class _Spans:
    """Memory that constants lie in: what several share is written once."""

    def __init__(self) -> None:
        self._spans: dict[tuple[int, int, torch.dtype], tuple[str, Tensor]] = {}

    def add(self, tensor: Tensor) -> SavedTensor:
        tensor = tensor.detach()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if tensor.numel() else 0
        span = tensor.as_strided((size,), (1,))
        key = (span.data_ptr(), size, span.dtype)
        name, _ = self._spans.setdefault(key, (str(len(self._spans)), span))
        return SavedTensor(name, tensor.dtype, shape, strides)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The contents, on the CPU."""
        return [
            (name, (span if span.dtype in _STORED else span.view(torch.uint8)).cpu())
            for name, span in self._spans.values()
        ]


def _specs_of(programs: Sequence[SavedProgram]) -> dict[str, AttentionSpec]:
    """What calls of our own operators name by key; of those that a function is part of, their entries."""
    found: dict[str, AttentionSpec] = {}
    for step in torch_calls(programs):
        call: Any = step.call
        if isinstance(call, TorchCall) and getattr(call.target, "namespace", "") == "fuser":
            key = next(a for a in call.args if isinstance(a, str))
            spec = spec_of(key)
            try:
                codec.dump(spec)
            except TypeError:
                if len(step.inputs[0].shape) != 4:
                    raise FuserError(
                        "a mask of functions over documents of any lengths cannot be saved, since it has no entries"
                    ) from None
                spec = spec.of(from_dense(spec.mask.dense(*(step.inputs[i].shape[2] for i in (0, 1)))))
            found[key] = spec
    return found
