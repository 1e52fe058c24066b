"""Writing compiled programs to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import platform
import threading
from collections import Counter
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
from fuser.module.compiler import by_place, tables_of
from fuser.module.forms import Packing, Variant
from fuser.module.snapshot import SavedCall, SavedForm, Snapshot
from fuser.runtime.library import Kernel
from fuser.runtime.program import ProgramPlan
from fuser.saved import codec
from fuser.saved.content import (
    FORMAT,
    PROGRAMS,
    REPORTS,
    Manifest,
    SavedCapture,
    SavedPacking,
    SavedPart,
    SavedProgram,
    SavedPrograms,
    SavedTemplate,
    SavedTensor,
    SavedVariant,
    torch_calls,
)
from fuser.saved.outline import outline_of

logger = logging.getLogger("fuser")
_STORED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.bool}
)
"""Types that every version of safetensors has names for."""


def save(calls: Sequence[SavedCall], forms: Sequence[SavedForm], snapshot: Snapshot, path: Path) -> None:
    """Write the programs of ``calls``, and for all sizes of ``forms``, with the report of ``snapshot`` to ``path``, at
    once or not at all.

    The file is as large as the packed weights. It holds programs, not the model: of forms for all sizes, of other calls
    for the shapes that were compiled, so call the module on those first. What of a form cannot be written is left out,
    with a word in the log.

    Raises FuserError when nothing is compiled, when a part of a program cannot be saved, or when the file cannot be
    written.
    """
    target = snapshot.target
    if target is None:
        raise FuserError("nothing is compiled yet: call the module, or pass example_inputs to fuser.optimize")
    spans = _Spans()
    captures = tuple(made for form in forms if (made := _capture(form, spans)) is not None)
    if not calls and not captures:
        raise FuserError(
            "nothing is compiled yet that can be saved, and programs of calls with objects, such as caches, cannot: "
            "call the module on plain tensors"
        )
    kernels = _kernels_of(calls, forms)
    try:
        programs = SavedPrograms(tuple(_saved(call, spans) for call in calls), captures, ())
        programs = dataclasses.replace(programs, attention=tuple(_specs_of(programs.plans).items()))
        text = codec.dump(programs)
        codec.load(text)
    except (TypeError, ValueError, AttributeError) as error:
        raise FuserError(f"a part of the program cannot be saved: {error}") from error
    parts = {
        PROGRAMS: _bytes(text),
        **{f"weights/{name}": tensor for name, tensor in spans.tensors()},
        **{f"kernels/{s}.so": _bytes(content) for s, content in _libraries(kernels).items()},
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


def _kernels_of(calls: Iterable[SavedCall], forms: Iterable[SavedForm]) -> dict[str, Kernel]:
    """All kernels by symbol."""
    every = [call.compiled.program.kernels for call in calls]
    every += [made.kernels for _, form, _ in forms for part in form.parts for made in part.templates.values()]
    return {symbol: kernel for kernels in every for symbol, kernel in kernels.items()}


def _libraries(kernels: Mapping[str, Kernel]) -> dict[str, bytes]:
    """The shared objects of kernels."""
    found: dict[str, bytes] = {}
    for symbol, kernel in sorted(kernels.items()):
        try:
            found[symbol] = kernel.path.read_bytes()
        except OSError as error:
            raise FuserError(
                f"the kernel {symbol} is no longer in the cache ({error}); optimize the model again before saving"
            ) from error
    return found


def _capture(saved: SavedForm, spans: _Spans) -> SavedCapture | None:
    """What is written of a form; None for one that nothing is compiled of, or that is no plain data."""
    key, form, _ = saved
    if not any(part.templates for part in form.parts):
        return None

    def made(spans: _Spans) -> SavedCapture:
        results = [torch.empty(0) for _ in form.variants[0].graph.outputs]
        return SavedCapture(
            key,
            form.captured.sizes,
            outline_of(form.captured.output.build(results)),
            tuple(_variant(variant, saved, spans) for variant in form.variants),
        )

    try:
        codec.dump(made(_Spans()))
    except (TypeError, ValueError, AttributeError) as error:
        logger.warning("calls are saved for the shapes that they had, not for all: %s", error)
        return None
    return made(spans)


def _variant(variant: Variant, saved: SavedForm, spans: _Spans) -> SavedVariant:
    packing, found = variant.packing, None
    if isinstance(packing, Packing) and packing.rows.templates:
        before, rows = (_part(part, saved, spans) for part in (packing.before, packing.rows))
        found = SavedPacking(packing.graph.layout, before, rows)
    return SavedVariant(variant.graph.assumptions, _part(variant, saved, spans), found)


def _part(part: Variant, saved: SavedForm, spans: _Spans) -> SavedPart:
    _, form, store = saved
    parameters, found = form.captured.parameters, []
    for (_, _, magnitude), made in part.templates.items():
        plan, own, values = made.late
        refs, constants, _ = made.use(parameters)
        shared = iter(store.load(refs, constants, parameters, tables_of(part.graph)))
        unfused, outside = by_place(part.graph, made.assembly.unfused)
        found.append(
            SavedTemplate(
                magnitude=magnitude,
                plan=dataclasses.replace(plan, constants=()),
                constants=tuple(None if i in own else spans.add(next(shared)) for i in range(len(plan.constants))),
                late=tuple((i, plan.constants[i]) for i in own),
                values=values,
                parameters={name: spans.add(parameters[name]) for name, v in values.items() if v.call is None},
                specs=made.assembly.specs,
                kernels=made.assembly.kernels,
                unfused=unfused,
                outside=outside,
            )
        )
    return SavedPart(tuple(found), part.counts)


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
        """The contents, on the CPU. Spans that overlap, such as a table and its first rows, are copied: the format has
        no shared memory."""
        storages = Counter(span.untyped_storage().data_ptr() for _, span in self._spans.values())
        return [
            (name, (span.clone() if storages[span.untyped_storage().data_ptr()] > 1 else span).cpu())
            for name, span in (
                (name, span if span.dtype in _STORED else span.view(torch.uint8)) for name, span in self._spans.values()
            )
        ]


def _specs_of(plans: Sequence[ProgramPlan]) -> dict[str, AttentionSpec]:
    """What calls of our own operators name by key; of those that a function is part of, their entries."""
    found: dict[str, AttentionSpec] = {}
    for step in torch_calls(plans):
        call: Any = step.call
        if isinstance(call, TorchCall) and getattr(call.target, "namespace", "") == "fuser":
            key = next(a for a in call.args if isinstance(a, str))
            spec = spec_of(key)
            try:
                codec.dump(spec)
            except TypeError:
                if not str(call).startswith("fuser::sparse_attention"):
                    raise FuserError(
                        "a mask of functions over documents of any lengths cannot be saved, since it has no entries"
                    ) from None
                spec = spec.of(from_dense(spec.mask.dense(*(step.inputs[i].shape[2] for i in (0, 1)))))
            found[key] = spec
    return found
