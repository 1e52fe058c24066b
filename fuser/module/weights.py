"""The constants of programs: evaluated, packed, watched for changes, and kept in memory once."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import operator
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fuser.frontend.watch import Structure
from fuser.ir.evaluation import value_of
from fuser.ir.graph import Constant
from fuser.kernels.base import Literal, Packed, TensorRef
from fuser.runtime.pages import Shelf

Use = tuple[Sequence[TensorRef], Mapping[str, Constant], Mapping[str, Tensor]]
"""The constants that a program refers to, what they are, and the live tensors that they are made from."""
_Key = tuple[Hashable, ...]
_LITERAL, _PACKED, _VALUE = "literal", "packed", "value"
_OFFLOAD_BYTES = 1 << 16
_WRITE_BYTES = 1 << 16
_GENERATIONS = itertools.count()


_VERSION = operator.attrgetter("_version")


class _Contents:
    """Tensors with where they lie and how often they have been written."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.tensors = {id(tensor): tensor for tensor in tensors}
        # Tensors made in inference mode have no version.
        self._versioned = [tensor for tensor in self.tensors.values() if not tensor.is_inference()]
        self._state = self._look()

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self.tensors.values())), list(map(_VERSION, self._versioned))

    @property
    def changed(self) -> bool:
        return self._look() != self._state

    def changes(self) -> set[int]:
        """Identities of the tensors that lie elsewhere or have been written."""
        (addresses, versions), (old_addresses, old_versions) = self._look(), self._state
        pairs = zip(self.tensors, addresses, old_addresses, strict=True)
        found = {i for i, now, before in pairs if now != before}
        versioned = zip(self._versioned, versions, old_versions, strict=True)
        return found | {id(tensor) for tensor, now, before in versioned if now != before}

    def changed_to(self, tensors: Iterable[Tensor], moved: Iterable[Tensor] = ()) -> _Contents:
        """What to watch from now on; what is known already stays as it was seen, but for ``moved``."""
        (addresses, versions) = self._state
        old = dict(zip(self.tensors, addresses, strict=True))
        old_versions = dict(zip(map(id, self._versioned), versions, strict=True))
        for tensor in moved:
            old.pop(id(tensor), None)
            old_versions.pop(id(tensor), None)
        fresh = _Contents(tensors)
        addresses, versions = fresh._state
        fresh._state = (
            [old.get(i, now) for i, now in zip(fresh.tensors, addresses, strict=True)],
            [old_versions.get(id(t), now) for t, now in zip(fresh._versioned, versions, strict=True)],
        )
        return fresh


class WeightStore:
    """Constants of all programs of one model.

    A constant is identified by the live tensors and functions that it is made from, so programs for different shapes
    share packed weights. Changes are seen through PyTorch's version counters, which every operator that writes a
    tensor advances, and through identities. What goes around both (``tensor.data``, NumPy) is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = Structure(model)
        self._contents = _Contents()
        self._made: dict[_Key, tuple[Tensor, ...]] = {}
        self._shelf = Shelf()
        self._offloaded: dict[int, Tensor] = {}
        self._direct: set[int] = set()
        self.generation = next(_GENERATIONS)
        """A number for the values that the constants are made from; no two are equal in a process."""
        self.offload_error = ""
        """Why originals stay in memory beside their packed forms, if they do."""

    def register(self, parameters: Mapping[str, Tensor]) -> None:
        """Watch the live tensors of a captured model; call before their values are used."""
        self._contents = self._contents.changed_to([*self._contents.tensors.values(), *parameters.values()])

    @property
    def changed(self) -> bool:
        """Whether the model consists of other modules or tensors, or has other values, than the constants were made
        from."""
        return self._contents.changed or self._structure.changed

    @property
    def restructured(self) -> bool:
        """Whether the model consists of other modules or tensors, or runs in another mode: programs must be made
        anew."""
        return self._structure.changed

    @property
    def configuration(self) -> int:
        """A number for what the model's plain attributes hold now, so that programs can be told apart by it."""
        return self._structure.configuration

    def changes(self) -> set[int]:
        """Identities of the tensors with new contents."""
        return self._contents.changes()

    @contextlib.contextmanager
    def refreshing(self) -> Iterator[None]:
        """Inside, constants are made anew; on leaving, they are what the weights were on entering."""
        seen = _Contents(self._contents.tensors.values())
        self._made = {key: made for key, made in self._made.items() if key[0] == _LITERAL}
        self.generation = next(_GENERATIONS)
        yield
        self._contents = seen

    def retain(self, uses: Iterable[Use]) -> None:
        """Forget everything but what these programs use."""
        keys: set[_Key] = set()
        watched: dict[int, Tensor] = dict(self._offloaded)
        for refs, constants, parameters in uses:
            keys.update(_key(ref, constants, parameters) for ref in refs)
            watched.update((id(tensor), tensor) for tensor in parameters.values())
        self._made = {key: made for key, made in self._made.items() if key in keys}
        self._contents = self._contents.changed_to(watched.values())

    def load(
        self,
        refs: Sequence[TensorRef],
        constants: Mapping[str, Constant],
        parameters: Mapping[str, Tensor],
        tables: Iterable[str] = (),
        folder: Path | None = None,
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """The tensors of a program's constants, packed constants and literals, on ``device``.

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
                self._offload((t for v in ref.values for t in _sources(v, constants, parameters)), folder)
            elif isinstance(ref, str) and ref in tables:
                self._offload(_sources(ref, constants, parameters), folder)
        loaded = [self._get(ref, constants, parameters, device) for ref in refs]
        _trim_heap()
        return loaded

    def _get(
        self,
        ref: TensorRef,
        constants: Mapping[str, Constant],
        parameters: Mapping[str, Tensor],
        device: torch.device | None = None,
    ) -> Tensor:
        if isinstance(ref, str) and constants[ref].call is None:
            # Itself, since a model may return it.
            return parameters[ref]
        key = _key(ref, constants, parameters)
        if key not in self._made:
            found = _made(ref, constants, parameters, device)
            self._made[key] = tuple(map(self._shelf.moved, found)) if isinstance(ref, Packed) else found
        return self._made[key][ref.index if isinstance(ref, Packed) else 0]

    def made(
        self,
        ref: TensorRef,
        constants: Mapping[str, Constant],
        parameters: Mapping[str, Tensor],
        device: torch.device | None = None,
        known: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """A constant as :meth:`load` gives it, made anew and not kept; see :func:`value_of` for ``known``."""
        return made(ref, constants, parameters, device, known)

    # ---- memory

    def _offload(self, weights: Iterable[Tensor], folder: Path) -> None:
        """Back originals by files, so that they take no memory until touched.

        The parameters stay what they are, tensors with their values: ``state_dict``, in-place updates and the original
        model keep working, and read the file when they need to. The files have no names and go with the process.
        """
        for tensor in weights:
            if id(tensor) in self._offloaded or id(tensor) in self._direct or not isinstance(tensor, nn.Parameter):
                continue
            if tensor.device.type != "cpu":
                continue
            if tensor.nbytes < _OFFLOAD_BYTES or not tensor.is_contiguous() or not _is_exclusive(tensor):
                continue
            try:
                mapped = _file_backed(tensor.detach(), folder)
            except (OSError, RuntimeError) as error:
                self.offload_error = str(error)
                return
            tensor.data = mapped
            self._offloaded[id(tensor)] = tensor
            self._contents = self._contents.changed_to(self._contents.tensors.values(), [tensor])

    @property
    def made_bytes(self) -> int:
        """Bytes of packed and derived constants and of literals."""
        return sum(tensor.nbytes for made in self._made.values() for tensor in made)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of originals that lie in files."""
        return sum(tensor.nbytes for tensor in self._offloaded.values())

    def restore(self) -> None:
        """Bring the originals back into memory."""
        back = list(self._offloaded.values())
        self._direct.update(self._offloaded)
        for tensor in back:
            tensor.data = tensor.detach().clone()
        self._contents = self._contents.changed_to(self._contents.tensors.values(), back)
        self._offloaded.clear()


def _made(
    ref: TensorRef,
    constants: Mapping[str, Constant],
    parameters: Mapping[str, Tensor],
    device: torch.device | None,
    known: dict[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """What a constant is: all tensors of a packed one, else one."""
    with torch.no_grad():
        if isinstance(ref, Literal):
            return (ref.tensor.to(device),)
        if isinstance(ref, Packed):
            return ref.pack({v: value_of(v, constants, parameters, known).to(device) for v in ref.values})
        return (value_of(ref, constants, parameters, known).to(device),)


def made(
    ref: TensorRef,
    constants: Mapping[str, Constant],
    parameters: Mapping[str, Tensor],
    device: torch.device | None,
    known: dict[str, Tensor] | None = None,
) -> Tensor:
    """A constant, made anew: of the original ``parameters`` by name, and what ``constants`` derive from them; see
    :func:`value_of` for ``known``."""
    return _made(ref, constants, parameters, device, known)[ref.index if isinstance(ref, Packed) else 0]


def _sources(name: str, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    constant = constants[name]
    if constant.call is None:
        return [parameters[name]]
    return [t for s in constant.sources for t in _sources(s, constants, parameters)]


def _is_exclusive(tensor: Tensor) -> bool:
    """Whether nothing but ``tensor`` refers to its memory, so that it can move without leaving a view behind."""
    storage = tensor.untyped_storage()
    # One reference is the tensor's, one that of the object in our hands.
    alone: bool = torch._C._storage_Use_Count(storage._cdata) <= 2
    shared = tensor.is_shared()  # type: ignore[no-untyped-call]
    return alone and not tensor.is_inference() and not shared and storage.nbytes() == tensor.nbytes


def _key(ref: TensorRef, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> _Key:
    """What is made once: the same for all operands that are packed together."""
    if isinstance(ref, Literal):
        return _LITERAL, ref.key
    if isinstance(ref, Packed):
        return _PACKED, ref.layout, *(_identity(v, constants, parameters) for v in ref.values)
    return _VALUE, _identity(ref, constants, parameters)


def _identity(name: str, constants: Mapping[str, Constant], parameters: Mapping[str, Tensor]) -> str:
    constant = constants[name]
    if constant.call is None:
        return f"leaf:{id(parameters[name])}"
    sources = ",".join(_identity(s, constants, parameters) for s in constant.sources)
    return f"{constant.call}:{constant.call.args}:{constant.call.kwargs}({sources})"


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
            start = 0
            while start < len(content):
                start += handle.write(content[start : start + _WRITE_BYTES])
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return mapped.view(tensor.shape)
