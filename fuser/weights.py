"""The constants of programs: evaluated, packed, watched for changes, and kept in memory once."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuser.ir.graph import Constant
from fuser.kernels.base import Literal, Packed, TensorRef
from fuser.kernels.families import materialize

_OFFLOAD_BYTES = 1 << 16
_WRITE_BYTES = 1 << 16


@dataclass
class _Leaf:
    """A live tensor of the model, and what it was when the constants were made from it."""

    tensor: Tensor
    owner: dict[str, Any] | None
    key: str
    version: int | None
    address: int

    @classmethod
    def of(cls, tensor: Tensor, owner: dict[str, Any] | None, key: str) -> _Leaf:
        return cls(tensor, owner, key, _version(tensor), tensor.data_ptr())

    @property
    def changed(self) -> bool:
        if self.owner is not None and self.owner.get(self.key) is not self.tensor:
            return True
        return self.tensor.data_ptr() != self.address or _version(self.tensor) != self.version


def _version(tensor: Tensor) -> int | None:
    # Tensors made in inference mode have no version.
    return None if tensor.is_inference() else tensor._version


class WeightStore:
    """Constants of all programs of one model.

    A constant is identified by the live tensors and functions that it is made from, so programs for different shapes
    share packed weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._leaves: dict[int, _Leaf] = {}
        self._made: dict[str, Tensor] = {}
        self._offloaded: set[int] = set()
        self._direct: set[int] = set()
        self.offload_error = ""
        """Why originals stay in memory beside their packed forms, if they do."""

    def register(self, parameters: Mapping[str, Tensor]) -> None:
        """Watch the live tensors of a captured model."""
        owners = {id(t): (owner, key) for owner, key, t in _owned(self._model())}
        for tensor in parameters.values():
            if id(tensor) not in self._leaves:
                owner, key = owners.get(id(tensor), (None, ""))
                self._leaves[id(tensor)] = _Leaf.of(tensor, owner, key)

    @property
    def changed(self) -> bool:
        """Whether any weight is another tensor or has other contents than when the constants were made."""
        return any(leaf.changed for leaf in self._leaves.values())

    @property
    def replaced(self) -> bool:
        """Whether a weight has become another tensor object, shape, dtype or device: programs must be made anew."""
        return any(
            leaf.owner is not None and leaf.owner.get(leaf.key) is not leaf.tensor for leaf in self._leaves.values()
        )

    def refresh(self) -> None:
        """Forget what was made from the old weights."""
        self._made = {key: tensor for key, tensor in self._made.items() if key.startswith("literal:")}
        self._leaves = {i: _Leaf.of(leaf.tensor, leaf.owner, leaf.key) for i, leaf in self._leaves.items()}

    def load(
        self,
        refs: Sequence[TensorRef],
        constants: Mapping[str, Constant],
        parameters: Mapping[str, Tensor],
        tables: Iterable[str] = (),
        folder: Path | None = None,
    ) -> list[Tensor]:
        """The tensors of a program's constants, packed constants and literals.

        With ``folder``, originals of which only packed forms are used, and ``tables`` that rows are gathered from, move
        to files there as soon as they are packed, so that the weights are never in memory twice.
        """
        tables = set(tables)
        for ref in refs:
            if isinstance(ref, str) and ref not in tables:
                self._direct.update(id(t) for t in _sources(ref, constants, parameters))
        for ref in refs:
            if folder is None:
                break
            if isinstance(ref, Packed):
                self._get(ref, constants, parameters)
            if isinstance(ref, Packed) or ref in tables:
                self._offload(_sources(ref if isinstance(ref, str) else ref.value, constants, parameters), folder)
        loaded = [self._get(ref, constants, parameters) for ref in refs]
        _trim_heap()
        return loaded

    def _get(self, ref: TensorRef, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> Tensor:
        if isinstance(ref, Literal):
            return self._memo(f"literal:{ref.key}", lambda: materialize(ref, None))
        if isinstance(ref, Packed):
            key = f"packed:{ref.layout}:{_identity(ref.value, constants, parameters)}"
            return self._memo(key, lambda: materialize(ref, self._value(ref.value, constants, parameters)))
        if constants[ref].call is None:
            return parameters[ref].detach()
        key = _identity(ref, constants, parameters)
        return self._memo(key, lambda: self._value(ref, constants, parameters))

    def _memo(self, key: str, make: Any) -> Tensor:
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def _value(self, name: str, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> Tensor:
        constant = constants[name]
        if constant.call is None:
            return parameters[name].detach()
        return constant.evaluate([self._value(s, constants, parameters) for s in constant.sources])

    # ---- memory

    def _offload(self, weights: Iterable[Tensor], folder: Path) -> None:
        """Back originals by files, so that they take no memory until touched.

        The parameters stay what they are, tensors with their values: ``state_dict``, in-place updates and the original
        model keep working, and read the file when they need to. The files have no names and go with the process.
        """
        for tensor in weights:
            if id(tensor) in self._offloaded | self._direct or not isinstance(tensor, nn.Parameter):
                continue
            if tensor.nbytes < _OFFLOAD_BYTES or not tensor.is_contiguous() or tensor.is_inference():
                continue
            try:
                mapped = _file_backed(tensor.detach(), folder)
            except (OSError, RuntimeError) as error:
                self.offload_error = str(error)
                return
            tensor.data = mapped
            self._offloaded.add(id(tensor))
            if id(tensor) in self._leaves:
                leaf = self._leaves[id(tensor)]
                self._leaves[id(tensor)] = _Leaf.of(tensor, leaf.owner, leaf.key)

    @property
    def made_bytes(self) -> int:
        """Bytes of packed and derived constants and of literals."""
        return sum(tensor.nbytes for tensor in self._made.values())

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of originals that lie in files."""
        return sum(self._leaves[i].tensor.nbytes for i in self._offloaded if i in self._leaves)

    def restore(self) -> None:
        """Bring the originals back into memory."""
        for i in self._offloaded:
            leaf = self._leaves[i]
            leaf.tensor.data = leaf.tensor.detach().clone()
            self._leaves[i] = _Leaf.of(leaf.tensor, leaf.owner, leaf.key)
        self._offloaded.clear()


def _sources(name: str, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    constant = constants[name]
    if constant.call is None:
        return [parameters[name]]
    return [t for s in constant.sources for t in _sources(s, constants, parameters)]


def _identity(name: str, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> str:
    constant = constants[name]
    if constant.call is None:
        return f"leaf:{id(parameters[name])}"
    sources = ",".join(_identity(s, constants, parameters) for s in constant.sources)
    return f"{constant.call}:{constant.call.args}:{constant.call.kwargs}({sources})"


def _owned(model: nn.Module | None) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
    for module in model.modules() if model is not None else ():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield owner, key, tensor


def _trim_heap() -> None:
    """Give the pages of freed originals back to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _file_backed(tensor: Tensor, folder: Path) -> Tensor:
    """A private copy-on-write mapping of a nameless file with the tensor's contents."""
    handle = tempfile.NamedTemporaryFile(dir=folder, prefix="weights-", delete=False, buffering=0)  # noqa: SIM115
    path = Path(handle.name)
    try:
        with handle:
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            # Small writes make small pages in the cache, so that a touched row brings in little around it.
            for start in range(0, len(content), _WRITE_BYTES):
                handle.write(content[start : start + _WRITE_BYTES])
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return mapped.view(tensor.shape)
