"""Saving compiled programs to one file, and running them on a machine that needs neither the model nor a compiler.

The file is a zip archive: ``manifest.json`` (format, versions, target, SHA-256 of every other member),
``programs.pickle`` (plans and structures of inputs and outputs), ``weights.safetensors`` (constants as the kernels read
them, each once), ``kernels/SYMBOL.so``, ``report.txt`` and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import io
import json
import os
import pickle
import platform
import tempfile
import threading
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fuser
from fuser.acceptance import unreadable
from fuser.attention.registry import adopt_mask, mask_of
from fuser.capture import OutputSpec, Signature, flatten_call
from fuser.codegen.assemble import KernelRecord
from fuser.compiler import Compiled
from fuser.ir.errors import FuserError, KernelError, MaskError
from fuser.ir.masks import Mask, from_dense
from fuser.ir.operators import TorchCall
from fuser.ir.target import Target
from fuser.module import OptimizedModule, split_unfused
from fuser.runtime import cuda
from fuser.runtime.cache import default_cache
from fuser.runtime.cuda_program import arena_of, program_of
from fuser.runtime.device import lacking
from fuser.runtime.library import Kernel
from fuser.runtime.library import load as load_kernel
from fuser.runtime.locks import ForkSafeLock
from fuser.runtime.program import Arena, Program, ProgramPlan, TorchStep
from fuser.runtime.targets import threads_now

FORMAT = 1
_MANIFEST, _PROGRAMS, _WEIGHTS = "manifest.json", "programs.pickle", "weights.safetensors"
_REPORTS = ("report.txt", "report.html")
_CHUNK = 1 << 22
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class SavedTensor:
    """Where a constant lies: elements of a one-dimensional tensor of the weights file, read with these strides.

    ``dtype`` is that of the constant; what safetensors has no name for is stored as bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class SavedProgram:
    """One program without its memory; ``constants`` are the tensors of ``plan.constants`` in its order."""

    key: Signature
    plan: ProgramPlan
    output: OutputSpec
    constants: tuple[SavedTensor, ...]
    kernels: tuple[KernelRecord, ...]
    unfused: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Content:
    """Everything that a file holds, in memory."""

    path: Path
    target: Target
    programs: tuple[SavedProgram, ...]
    weights: Mapping[str, Tensor]
    kernels: Mapping[str, Kernel]
    reports: Mapping[str, str]


# ---- saving


def save(module: OptimizedModule, path: Path) -> None:
    """Write all programs that ``module`` has compiled to ``path``, at once or not at all.

    The file is as large as the packed weights. It holds programs for the shapes that were compiled, not the model:
    call the module on every shape that is needed first.

    Raises FuserError when nothing is compiled, when a part of a program cannot be saved, or when the file cannot be
    written.
    """
    programs = module.snapshot()
    target = module._target
    if not programs or target is None:
        raise FuserError("nothing is compiled yet: call the module, or pass example_inputs to fuser.optimize")
    layout = _Weights()
    saved = tuple(_saved(key, compiled, constants, layout) for key, compiled, constants in programs)
    try:
        pickled = _pickled((saved, _masks_of(saved)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise FuserError(f"a part of the program cannot be saved: {error}") from error
    libraries = _libraries(compiled for _, compiled, _ in programs)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with tempfile.TemporaryDirectory() as folder:
            html = Path(folder) / _REPORTS[1]
            reports = {_REPORTS[0]: module.report(html), _REPORTS[1]: html.read_text(encoding="utf-8")}
        with zipfile.ZipFile(temporary, "w") as archive:
            members = {
                _PROGRAMS: _write(archive, _PROGRAMS, [pickled], compress=True),
                _WEIGHTS: _write(archive, _WEIGHTS, layout.parts()),
            }
            for symbol, library in libraries.items():
                name = f"kernels/{symbol}.so"
                members[name] = _write(archive, name, [library], compress=True)
            for name, text in reports.items():
                members[name] = _write(archive, name, [text.encode()], compress=True)
            _write(archive, _MANIFEST, [json.dumps(_manifest(target, members), indent=1).encode()])
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FuserError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def _manifest(target: Target, members: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fuser": fuser.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "target": {**dataclasses.asdict(target), "features": sorted(target.features)},
        "members": dict(members),
    }


def _saved(key: Signature, compiled: Compiled, constants: Sequence[Tensor], layout: _Weights) -> SavedProgram:
    assembly = compiled.assembly
    unfused, outside = split_unfused(compiled)
    plan = dataclasses.replace(assembly.plan, constants=())
    return SavedProgram(
        key, plan, compiled.output, tuple(layout.add(t) for t in constants), assembly.kernels, unfused, outside
    )


class _Weights:
    """The tensors of a weights file: memory that several constants share is written once."""

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

    def parts(self) -> Iterator[bytes | memoryview]:
        """The file in the format of safetensors, piece by piece."""
        header: dict[str, Any] = {}
        offset = 0
        spans = [(name, _storable(span)) for name, span in self._spans.values()]
        for name, span in spans:
            end = offset + span.nbytes
            header[name] = {"dtype": _DTYPES[span.dtype], "shape": list(span.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        # The format wants the data to start at a multiple of eight bytes.
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, span in spans:
            yield span.cpu().view(torch.uint8).numpy().data


def _storable(span: Tensor) -> Tensor:
    return span if span.dtype in _DTYPES else span.view(torch.uint8)


def _write(archive: zipfile.ZipFile, name: str, parts: Iterable[bytes | memoryview], compress: bool = False) -> str:
    """Add a member and return its SHA-256."""
    digest = hashlib.sha256()
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as file:
        for part in parts:
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _masks_of(programs: Iterable[SavedProgram]) -> dict[str, Mask]:
    """Masks that calls of our own operators name by key."""
    found: dict[str, Mask] = {}
    for program in programs:
        for step in program.plan.steps:
            if not isinstance(step, TorchStep) or not isinstance(step.call, TorchCall):
                continue
            call = step.call
            if getattr(call.target, "namespace", "") == "fuser":
                q_len, kv_len = (step.inputs[i].shape[2] for i in (0, 1))
                key = next(a for a in call.args if isinstance(a, str))
                found[key] = _picklable(mask_of(key), q_len, kv_len)
    return found


def _picklable(mask: Mask, q_len: int, kv_len: int) -> Mask:
    try:
        mask.hash  # noqa: B018
    except MaskError:
        return from_dense(mask.dense(q_len, kv_len))
    return mask


# ---- pickles of known things only


def _function(name: str) -> Any:
    """A function of torch's flat namespace, such as ``torch.cat``."""
    found = getattr(torch, name)
    if not isinstance(found, types.BuiltinFunctionType):
        raise pickle.UnpicklingError(f"torch.{name} is not an operator")
    return found


def _leaf() -> pytree.TreeSpec:
    return pytree.tree_structure(None)


def _type_of_none() -> type:
    return type(None)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if value is type(None):
            return _type_of_none, ()
        # The class of leaves is going away in torch, and says so whenever it is used.
        if isinstance(value, pytree.TreeSpec) and value.is_leaf():
            return _leaf, ()
        name = getattr(value, "__name__", "")
        if isinstance(value, types.BuiltinFunctionType) and getattr(torch, name, None) is value:
            return _function, (name,)
        return NotImplemented


_MODULES = (
    "fuser.capture",
    "fuser.codegen.assemble",
    "fuser.ir.",
    "fuser.kernels.",
    "fuser.raising",
    "fuser.runtime.program",
)
_NAMES = frozenset(
    {
        *(("builtins", name) for name in ("bool", "bytes", "complex", "float", "int", "str")),
        *(("builtins", name) for name in ("dict", "frozenset", "list", "range", "set", "slice", "tuple")),
        *(("collections", name) for name in ("OrderedDict", "defaultdict", "deque", "namedtuple")),
        *(("torch", name) for name in ("Size", "device")),
        ("torch.serialization", "_get_layout"),
        ("torch.fx.immutable_collections", "immutable_list"),
        ("torch.fx.immutable_collections", "immutable_dict"),
        ("torch.utils._pytree", "TreeSpec"),
        *(("fuser.saved", name) for name in ("SavedProgram", "SavedTensor", "_function", "_leaf", "_type_of_none")),
        *(("numpy", name) for name in ("dtype", "ndarray")),
        *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    }
)


class _Unpickler(pickle.Unpickler):
    """Finds what programs are made of, and the classes of a model's inputs and outputs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        found = super().find_class(module, name)
        if (
            module.startswith(_MODULES)
            and "." not in name
            and str(getattr(found, "__module__", "")).startswith(_MODULES)
        ):
            return found
        if isinstance(found, (torch.dtype, torch.memory_format)):
            return found
        if isinstance(found, type) and (
            dataclasses.is_dataclass(found)
            or found in pytree.SUPPORTED_NODES
            or issubclass(found, enum.Enum)
            or (issubclass(found, tuple) and hasattr(found, "_fields"))
        ):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a saved program")


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


# ---- loading


def load(path: str | os.PathLike[str]) -> LoadedModule:
    """The programs of a file that :meth:`fuser.OptimizedModule.save` wrote, as a module.

    Only load files that you trust: a file holds native code, which runs as you. (Its pickles are read with a list of
    permitted classes.) The classes of the model's outputs must be importable; the model and a compiler are not needed.

    Raises FuserError when the file cannot be read, is damaged or truncated, was written in another format, or was made
    for a CPU with instructions that this one lacks.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return LoadedModule(_read(archive, path))
    except OSError as error:
        raise FuserError(f"cannot read {path}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, FuserError):
            raise
        raise FuserError(f"{path} is damaged or is not a file that OptimizedModule.save wrote: {error}") from error


def _read(archive: zipfile.ZipFile, path: Path) -> _Content:
    manifest = json.loads(archive.read(_MANIFEST))
    if manifest["format"] != FORMAT:
        raise FuserError(
            f"{path} has format {manifest['format']} (written by fuser {manifest['fuser']}); "
            f"this is fuser {fuser.__version__}, which reads format {FORMAT}: save the model again"
        )
    target = Target(**{**manifest["target"], "features": frozenset(manifest["target"]["features"])})
    same = manifest["machine"] == platform.machine()
    if target.kind == "cuda" and (not same or not target.emulated):
        _require_gpu(target, path, manifest["machine"])
    reason = "" if target.kind == "cuda" else lacking(target) if same else f"is {platform.machine()}"
    if reason:
        what = " ".join((manifest["machine"], target.arch, *sorted(target.features)))
        raise FuserError(
            f"{path} was saved for {what}, and this CPU {reason}: optimize the model here, or save it with "
            "FUSER_ISA set to an instruction set that both CPUs have"
        )
    members: dict[str, str] = manifest["members"]
    if set(members) | {_MANIFEST} != set(archive.namelist()):
        raise FuserError(f"{path} is damaged: it does not hold what its manifest lists")
    weights = _read_weights(archive, members[_WEIGHTS], path)
    try:
        programs, masks = _Unpickler(io.BytesIO(_member(archive, _PROGRAMS, members, path))).load()
    except (pickle.UnpicklingError, ImportError, AttributeError) as error:
        raise FuserError(
            f"the programs of {path} cannot be read: {error}. They were written by fuser {manifest['fuser']} with "
            f"torch {manifest['torch']}; here are fuser {fuser.__version__} and torch {torch.__version__}, and the "
            "packages that define the model's outputs must be installed"
        ) from error
    for key, mask in masks.items():
        adopt_mask(key, mask)
    kernels: dict[str, Kernel] = {}
    # A library stays mapped when its file is gone.
    with default_cache().workspace() as folder:
        for name in members:
            if name.startswith("kernels/"):
                symbol = name.removeprefix("kernels/").removesuffix(".so")
                file = folder / f"{len(kernels)}.so"
                file.write_bytes(_member(archive, name, members, path))
                kernels[symbol] = load_kernel(file, symbol)
    reports = {name: _member(archive, name, members, path).decode() for name in _REPORTS}
    return _Content(path, target, programs, weights, kernels, reports)


def _require_gpu(target: Target, path: Path, machine: str) -> None:
    """Raise FuserError unless a GPU here runs what was built for ``target``."""
    if machine != platform.machine():
        raise FuserError(f"{path} was saved for {machine}, and this machine is {platform.machine()}")
    device = cuda.resolve_device(torch.device("cuda"))
    found = {cuda.architecture(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    if target.arch not in found:
        raise FuserError(
            f"{path} was saved for GPUs of the architecture {target.arch}, and this machine has "
            f"{', '.join(sorted(found))} ({torch.cuda.get_device_name(device)}): optimize the model here"
        )


def _member(archive: zipfile.ZipFile, name: str, members: Mapping[str, str], path: Path) -> bytes:
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != members[name]:
        raise FuserError(f"{path} is damaged: {name} does not match its checksum")
    return content


def _read_weights(archive: zipfile.ZipFile, checksum: str, path: Path) -> dict[str, Tensor]:
    """The tensors of the weights file, each in memory of its own, aligned as kernels want it."""
    digest = hashlib.sha256()
    names = {text: dtype for dtype, text in _DTYPES.items()}
    found: dict[str, Tensor] = {}
    with archive.open(_WEIGHTS) as file:
        prefix = _exactly(file, 8, digest.update)
        length = int.from_bytes(prefix, "little")
        if length > archive.getinfo(_WEIGHTS).file_size:
            raise FuserError(f"{path} is damaged: its weights have no header")
        header = json.loads(_exactly(file, length, digest.update))
        at = 0
        for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], int(item[0]))):
            start, end = entry["data_offsets"]
            dtype, (size,) = names[entry["dtype"]], entry["shape"]
            if start != at or end - start != size * dtype.itemsize or end > archive.getinfo(_WEIGHTS).file_size:
                raise FuserError(f"{path} is damaged: its weights do not follow each other")
            tensor = torch.empty(size, dtype=dtype)
            view = tensor.view(torch.uint8).numpy().data.cast("B") if size else memoryview(b"")
            for low in range(0, end - start, _CHUNK):
                part = view[low : low + _CHUNK]
                part[:] = _exactly(file, len(part), digest.update)
            found[name], at = tensor, end
        if file.read(1) or digest.hexdigest() != checksum:
            raise FuserError(f"{path} is damaged: {_WEIGHTS} does not match its checksum")
    return found


def _exactly(file: IO[bytes], size: int, note: Callable[[bytes], None]) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError("it ends early")
    note(content)
    return content


# ---- running


class LoadedModule(nn.Module):
    """Programs from a file, called like the model that they were compiled from.

    Calls take the shapes, dtypes and plain arguments that were compiled before saving and return what the saved module
    returned, bit for bit on as many threads. There are no parameters: weights are constants of the programs, gradients
    are not computed, and ``train``, ``to`` and ``half`` change nothing. Programs run on as many threads as they were
    compiled for, or on ``torch.get_num_threads()`` if that is less.
    """

    def __init__(self, content: _Content) -> None:
        super().__init__()
        self._content = content
        self._lock = ForkSafeLock()
        self._arenas: dict[torch.device, Arena] = {}
        self._weights: dict[tuple[str, torch.device], Tensor] = {}
        self._running: dict[tuple[int, int, torch.device], Program] = {}
        self._by_key: dict[Signature, list[int]] = {}
        for i, saved in enumerate(content.programs):
            self._by_key.setdefault(saved.key, []).append(i)
        self._last = len(content.programs) - 1
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = flatten_call(args, kwargs)
        if reason := unreadable(call.tensors):
            raise KernelError(f"{reason}; a loaded module has no original to run: pass plain tensors of one device")
        candidates = self._by_key.get(call.key)
        if candidates is None:
            shapes = "\n  ".join(describe(key) for key in self._by_key)
            raise KernelError(
                f"no program was saved for the call {describe(call.key)}; {self._content.path} has\n  {shapes}"
            )
        device = call.tensors[0].device if call.tensors else torch.device(self._content.target.device)
        index, program = self._program(candidates, device)
        self._last = index
        with torch.no_grad():
            return self._content.programs[index].output.build(program(call.tensors))

    def _program(self, candidates: Sequence[int], device: torch.device) -> tuple[int, Program]:
        """The program with the largest team that PyTorch's threads can be, or the smallest of all with fewer."""
        target = self._content.target
        now = threads_now() if target.kind == "cpu" else target.cores
        programs = self._content.programs
        fitting = [i for i in candidates if programs[i].plan.threads <= now]
        pick = max if fitting else min
        index = pick(fitting or candidates, key=lambda i: programs[i].plan.threads)
        team = min(now, programs[index].plan.threads)
        key = (index, team, device)
        with self._lock:
            if key not in self._running:
                saved = programs[index]
                plan = dataclasses.replace(saved.plan, threads=team)
                constants = [self._tensor(t, device) for t in saved.constants]
                arena = self._arenas.setdefault(device, arena_of(device))
                self._running[key] = program_of(plan, self._content.kernels, constants, target, arena)
            return index, self._running[key]

    def _tensor(self, saved: SavedTensor, device: torch.device) -> Tensor:
        if (saved.name, device) not in self._weights:
            self._weights[saved.name, device] = self._content.weights[saved.name].to(device)
        return self._weights[saved.name, device].view(saved.dtype).as_strided(saved.shape, saved.strides)

    @property
    def calls(self) -> Sequence[str]:
        """The calls that programs were saved for, as text."""
        return tuple(map(describe, self._by_key))

    @property
    def kernels(self) -> Sequence[KernelRecord]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._content.programs[self._last].kernels

    @property
    def unfused(self) -> Sequence[tuple[str, str]]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._content.programs[self._last].unfused

    @property
    def outside(self) -> Sequence[tuple[str, str]]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._content.programs[self._last].outside

    def report(self, path: str | Path | None = None) -> str:
        """The report of the module that was saved, as text; with ``path`` also as HTML."""
        if path is not None:
            Path(path).write_text(self._content.reports[_REPORTS[1]], encoding="utf-8")
        return self._content.reports[_REPORTS[0]]

    def extra_repr(self) -> str:
        return f"path={str(self._content.path)!r}, programs={len(self._content.programs)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedModule:
        return LoadedModule(self._content)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("a loaded module does not pickle: pass the path and call fuser.load there")


def describe(key: Signature) -> str:
    """The call of a signature: ``(int64 (1, 128), attention_mask=int64 (1, 128))``."""
    spec, *leaves = key
    texts = [
        _Text(f"{str(leaf[1]).removeprefix('torch.')} {leaf[0]}" + (f" on {leaf[2]}" if leaf[2] != "cpu" else ""))
        if len(leaf) == 3
        else _Text(repr(leaf[1]))
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(texts, spec)
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"


class _Text(str):
    """A string that prints without quotes inside of containers."""

    def __repr__(self) -> str:
        return str(self)


__all__ = ["LoadedModule", "describe", "load", "save"]
