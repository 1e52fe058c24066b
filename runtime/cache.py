"""The kernel cache on disk: content-addressed libraries, plans and small records, safe under many processes.

Layout below the root (mode 0700)::

    kernels/ab/<key>/{kernel.so, source.cpp, manifest.json}    one entry, renamed into place as a whole
    plans/<sha256 of the key>.plan                             a line of JSON, then the plan; renamed into place
    records/<kind>/<sha256 of the key>.json                    one record, renamed into place
    locks/<key>.lock                                           held while a kernel is being built
    failed/<key>/                                              sources that did not compile, with the compiler's output
    tmp/                                                       work in progress

An entry's key has two halves: what the kernel is (symbol, source, headers, target, format) and what built it (compiler
and flags). A machine without a compiler knows only the first half and takes any entry that has it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from fuser.ir.errors import CacheError
from fuser.runtime.archive import (
    FORMAT,
    KERNEL_MEMBER,
    KEY,
    PLAN_MEMBER,
    RECORD_MEMBER,
    read_archive,
    write_archive,
)

_TOOLS = frozenset({"compiler", "flags"})
_ENTRY_FILES = ("kernel.so", "manifest.json", "source.cpp")
DEFAULT_MAX_BYTES = 2 << 30
_STALE_SECONDS = 86_400.0
_FAILURES_KEPT = 32
_LARGEST_PLAN = 1 / 8
"""Part of the cache that one plan may take."""
_LONGEST_HEADER = 1 << 16
_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST}
    | {errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOENT, errno.ENODEV, errno.EMLINK, errno.EFBIG}
)

logger = logging.getLogger("fuser")
T = TypeVar("T")


@dataclass(frozen=True)
class KernelKey:
    """The key of one build of one kernel.

    ``source`` digests what the kernel is, ``toolchain`` what built it; ``fields`` holds a digest of every ingredient,
    so that two keys can be compared.
    """

    source: str
    toolchain: str
    fields: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """The name of the cache entry."""
        return f"{self.source}-{self.toolchain}"


def kernel_key(
    *, symbol: str, text: str, headers: Mapping[str, bytes], target: str, compiler: str, flags: Sequence[str]
) -> KernelKey:
    """The key of a kernel: every ingredient of the build, each with its length in front of it.

    ``headers`` maps the names of included files to their content, ``target`` is :attr:`Target.key`, ``compiler`` the
    version text of the compiler and ``flags`` its flags.
    """
    identity = {
        "format": _digest([str(FORMAT).encode()]),
        "symbol": _digest([symbol.encode()]),
        "target": _digest([target.encode()]),
        "text": _digest([text.encode()]),
    }
    for name, content in sorted(headers.items()):
        identity[f"header {name}"] = _digest([name.encode(), content])
    tools = {"compiler": _digest([compiler.encode()]), "flags": _digest([flag.encode() for flag in flags])}
    return _combine({**identity, **tools})


def _combine(fields: Mapping[str, str]) -> KernelKey:
    source, toolchain = (
        _digest([part.encode() for item in sorted(fields.items()) if (item[0] in _TOOLS) is tools for part in item])
        for tools in (False, True)
    )
    return KernelKey(source[:32], toolchain[:16], tuple(fields.items()))


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Entry:
    """The manifest of one cached kernel. ``size`` is the library's in bytes, ``created`` in seconds since 1970."""

    format: int
    key: str
    symbol: str
    sha256: str
    size: int
    created: float
    compiler: str
    target: str
    fields: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Entry:
        """The manifest at ``path``. Raises OSError if there is none and :class:`CacheError` if it is damaged."""
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, name: str) -> Entry:
        """The manifest in ``content``; ``name`` is for errors. Raises :class:`CacheError` if it is damaged."""
        try:
            values = json.loads(content)
            entry = cls(**values)
            types = {
                "format": int,
                "key": str,
                "symbol": str,
                "sha256": str,
                "size": int,
                "compiler": str,
                "target": str,
            }
            if not all(isinstance(getattr(entry, field), kind) for field, kind in types.items()):
                raise TypeError("a field has the wrong type")
            entry = dataclasses.replace(entry, created=float(entry.created), fields=dict(entry.fields))
            if _combine(entry.fields).digest != entry.key:
                raise ValueError("its key does not follow from its fields")
        except (ValueError, TypeError) as error:
            raise CacheError(f"the manifest {name} is damaged: {error}") from error
        if entry.format != FORMAT:
            raise CacheError(f"the manifest {name} has format {entry.format}; this version of fuser reads {FORMAT}")
        return entry


@dataclass(frozen=True)
class PlanEntry:
    """One cached plan: its file's name, what it is a plan of, bytes, and its last use in seconds since 1970."""

    name: str
    title: str
    size: int
    used: float


@dataclass(frozen=True)
class VerifyReport:
    """What :meth:`KernelCache.verify` found: intact entries, records and plans, and (name, reason) of damaged ones."""

    kernels: int
    records: int
    bytes: int
    damaged: tuple[tuple[str, str], ...]
    plans: int = 0


@dataclass(frozen=True)
class ImportReport:
    """What :meth:`KernelCache.import_` did: keys of added kernels, how many records and plans were added and how many
    items were there already, and the targets (:attr:`Target.key`) of all kernels in the file."""

    kernels: tuple[str, ...]
    records: int
    present: int
    targets: frozenset[str]
    plans: int = 0


class KernelCache:
    """Compiled kernels, plans and small records on disk.

    ``root`` defaults to ``$FUSER_CACHE_DIR``, else the user's cache directory. A directory that cannot be written
    (read-only, full, unusable HOME) is still read, and a private temporary directory takes what is new. Raises
    :class:`CacheError` for a directory that belongs to another user or that others can write to: its libraries are
    code that would run as this user.
    """

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._used: set[str] = set()
        self._read_only: Path | None = None
        self.root = root if root is not None else default_root()
        try:
            _prepare(self.root)
        except OSError as error:
            self._fall_back(error)
        self._sweep()

    # Kernels

    def get(self, key: str) -> Path | None:
        """The library of an intact entry, else None. Damage is logged and is a miss; the next build replaces it."""
        for root in self._roots():
            folder = _entry_folder(root, key)
            try:
                self._check(key, folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, CacheError) as error:
                logger.warning("a cached kernel is damaged and will be built again: %s", error)
                continue
            self._used.add(key)
            return folder / "kernel.so"
        return None

    def find(self, source: str) -> Path | None:
        """The most recently used library of :attr:`KernelKey.source`, whatever compiler built it."""
        found = []
        for root in self._roots():
            with contextlib.suppress(OSError):
                for folder in (root / "kernels" / source[:2]).glob(f"{source}-*"):
                    found.append(((folder / "manifest.json").stat().st_mtime, folder.name))
        return next((path for _, key in sorted(found, reverse=True) if (path := self.get(key))), None)

    def publish(self, key: KernelKey, *, symbol: str, library: Path, text: str, compiler: str, target: str) -> Path:
        """Add a library that has been built, and return where it is now. The file ``library`` is left alone.

        Another process may publish the same key meanwhile; whichever intact entry is in place stays. Raises
        :class:`CacheError` if neither the cache nor a temporary directory can take it (disk full).
        """
        content = library.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        size, fields = len(content), dict(key.fields)
        entry = Entry(FORMAT, key.digest, symbol, checksum, size, time.time(), compiler, target, fields)
        return self._publish(entry, content, text.encode())

    def entries(self) -> list[Entry]:
        """The manifests of all kernels, most recently used first; damaged ones are left out."""
        found: list[tuple[float, Entry]] = []
        for folder in self._folders(self._roots()):
            with contextlib.suppress(OSError, CacheError):
                manifest = folder / "manifest.json"
                found.append((manifest.stat().st_mtime, Entry.read(manifest)))
        return [entry for _, entry in sorted(found, key=lambda item: (-item[0], item[1].key))]

    def size(self) -> int:
        """Bytes of all kernels, with their sources and manifests, and of all plans."""
        plans = _folder_bytes(self.root / "plans")
        return plans + sum(_folder_bytes(folder) for folder in self._folders([self.root]))

    def verify(self) -> VerifyReport:
        """Check every kernel, record and plan against its checksum. Nothing is changed; what is damaged is a miss."""
        damaged: list[tuple[str, str]] = []
        kernels = records = plans = total = 0
        for folder in self._folders(self._roots()):
            try:
                total += self._check(folder.name, folder, remember=False).size
                kernels += 1
            except (OSError, CacheError) as error:
                damaged.append((folder.name, str(error)))
        for path in self._record_paths():
            try:
                _parse_record(path.read_bytes(), path.parent.name, None)
                records += 1
            except (OSError, CacheError) as error:
                damaged.append((f"{path.parent.name}/{path.name}", str(error)))
        for path in self._plan_paths(self._roots()):
            try:
                _parse_plan(path.read_bytes(), path)
                plans += 1
            except (OSError, CacheError) as error:
                damaged.append((f"plans/{path.name}", str(error)))
        return VerifyReport(kernels, records, total, tuple(damaged), plans)

    def prune(self, max_bytes: int | None = None) -> list[str]:
        """Remove the least recently used kernels and plans until at most ``max_bytes`` are left; what was removed.

        The result has the keys of kernels and the file names of plans. Kernels that this process has used stay.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        found = []
        for folder in self._folders([self.root]):
            with contextlib.suppress(OSError):
                accessed = max(path.stat().st_mtime for path in (folder / "manifest.json", folder) if path.exists())
                found.append((accessed, folder.name, _folder_bytes(folder), folder))
        for path in self._plan_paths([self.root]):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.name, path.stat().st_size, path))
        total = sum(size for _, _, size, _ in found)
        removed = []
        for _, key, size, folder in sorted(found):
            if total <= limit:
                break
            if key not in self._used and self._remove(folder):
                total -= size
                removed.append(key)
        self._sweep()
        return removed

    def clear(self) -> None:
        """Remove all kernels, plans, records and kept failures. Kernels that are loaded anywhere keep working."""
        for name in ("kernels", "plans", "records", "failed"):
            self._remove(self.root / name)
        self._verified.clear()
        self._used.clear()

    def explain(self, key: KernelKey) -> str:
        """Why ``key`` hits or misses: the digest of every ingredient, compared with the nearest entry of its symbol."""
        lines = [f"key {key.digest}"]
        fields = dict(key.fields)
        path = self.get(key.digest)
        nearest: Entry | None = None
        if path is None:
            same_symbol = [entry for entry in self.entries() if entry.fields.get("symbol") == fields["symbol"]]
            nearest = max(same_symbol, key=lambda entry: len(entry.fields.items() & fields.items()), default=None)
        if path is not None:
            lines.append(f"hit: {path}")
        elif nearest is None:
            lines.append("miss: no entry has this symbol")
        else:
            lines.append(f"miss; the nearest entry is {nearest.key}")
        other = nearest.fields if nearest else fields
        for name in [*fields, *(name for name in other if name not in fields)]:
            mine, theirs = fields.get(name, "absent")[:16], other.get(name, "absent")[:16]
            lines.append(f"  {name}: {mine}" + ("" if mine == theirs else f"  differs from {theirs}"))
        return "\n".join(lines)

    # Plans

    def read_plan(self, key: str) -> bytes | None:
        """What was written for ``key``, or None if there is nothing or it is damaged."""
        for root in self._roots():
            path = _plan_path(root, key)
            try:
                content = _parse_plan(path.read_bytes(), path)[1]
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, CacheError) as error:
                logger.warning("a cached plan is damaged and will be made again: %s", error)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return content
        return None

    def write_plan(self, key: str, title: str, content: bytes) -> None:
        """Keep the bytes of a plan for ``key`` (any text), unless they would fill a large part of the cache.

        Raises :class:`CacheError` if nothing can be written anywhere.
        """
        if len(content) > _LARGEST_PLAN * self.max_bytes:
            return
        checksum = hashlib.sha256(content).hexdigest()
        fields = {"format": FORMAT, "key": _plan_path(self.root, key).stem, "title": title, "sha256": checksum}
        whole = json.dumps(fields).encode() + b"\n" + content
        self._put_plan(_plan_path(self.root, key).name, whole)

    def _put_plan(self, name: str, whole: bytes) -> None:
        self._writing(lambda root: _write_atomic(root / "plans" / name, whole, root / "tmp"))

    def plans(self) -> list[PlanEntry]:
        """All plans, most recently used first; damaged ones are left out."""
        found = []
        for path in self._plan_paths(self._roots()):
            with contextlib.suppress(OSError, CacheError):
                status = path.stat()
                with path.open("rb") as file:
                    title, _ = _plan_header(file.readline(_LONGEST_HEADER), path)
                found.append(PlanEntry(path.name, title, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (-entry.used, entry.name))

    # Records

    def read_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The value that was written for ``key``, or None if there is none or it is damaged."""
        for root in self._roots():
            path = _record_path(root, kind, key)
            try:
                return _parse_record(path.read_bytes(), kind, key)[1]
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, CacheError) as error:
                logger.warning("a cached record is damaged and will be ignored: %s", error)
        return None

    def write_record(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Remember a small JSON object for ``key`` (any text) among the records of ``kind`` (a word).

        Raises ValueError if ``value`` is not JSON, :class:`CacheError` if nothing can be written anywhere.
        """
        content = _format_record(kind, key, value)
        self._writing(lambda root: _write_atomic(_record_path(root, kind, key), content, root / "tmp"))

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        """The values of all intact records of ``kind``, by the names of their files."""
        for path in sorted((p for p in self._record_paths() if p.parent.name == kind), key=lambda p: p.name):
            with contextlib.suppress(OSError, CacheError):
                yield _parse_record(path.read_bytes(), kind, None)[1]

    # Archives

    def export(self, path: Path, keys: Iterable[str] | None = None) -> int:
        """Write kernels, records and plans to one file that :meth:`import_` reads; how many kernels it holds.

        ``keys`` chooses kernels (default: all that are intact, and all records and plans). Raises :class:`CacheError`
        if a chosen kernel is missing or damaged, or the file cannot be written.
        """
        chosen = [entry.key for entry in self.entries()] if keys is None else list(dict.fromkeys(keys))
        members: dict[str, bytes] = {}
        kernels = 0
        for key in sorted(chosen):
            library = self.get(key)
            if library is None and keys is not None:
                raise CacheError(f"the kernel {key} is not in the cache {self.root}, or damaged; nothing was exported")
            if library is not None:
                kernels += 1
                for name in _ENTRY_FILES:
                    members[f"kernels/{key}/{name}"] = (library.parent / name).read_bytes()
        for record in self._record_paths() if keys is None else []:
            with contextlib.suppress(CacheError, OSError):
                content = record.read_bytes()
                _parse_record(content, record.parent.name, None)
                members[f"records/{record.parent.name}/{record.name}"] = content
        for plan in self._plan_paths(self._roots()) if keys is None else []:
            with contextlib.suppress(CacheError, OSError):
                content = plan.read_bytes()
                _parse_plan(content, plan)
                members[f"plans/{plan.name}"] = content
        write_archive(path, members)
        return kernels

    def import_(self, path: Path) -> ImportReport:
        """Add the kernels, records and plans of a file that :meth:`export` wrote; what is here already stays.

        The kernels are code that will run as this user, so import only what comes from people you trust. Raises
        :class:`CacheError`, and adds nothing, if any part of the file is damaged or out of place.
        """
        members = read_archive(path)
        entries: dict[str, Entry] = {}
        records: dict[tuple[str, str], dict[str, Any]] = {}
        plans: dict[str, bytes] = {}
        for name, content in members.items():
            if plan := PLAN_MEMBER.fullmatch(name):
                _parse_plan(content, path / name)
                plans[plan[1]] = content
            elif record := RECORD_MEMBER.fullmatch(name):
                key, value = _parse_record(content, record[1], None)
                if _record_path(self.root, record[1], key).name != f"{record[2]}.json":
                    raise CacheError(f"the archive {path} is damaged: {name} holds the record of another key")
                records[record[1], key] = value
            elif kernel := KERNEL_MEMBER.fullmatch(name):
                folder = f"kernels/{kernel[1]}"
                if any(f"{folder}/{file}" not in members for file in _ENTRY_FILES):
                    raise CacheError(f"the archive {path} is damaged: {folder} is incomplete")
                if kernel[2] == "manifest.json":
                    entry = Entry.parse(content, f"{path}:{name}")
                    library = members[f"{folder}/kernel.so"]
                    text = members[f"{folder}/source.cpp"]
                    if (entry.key, entry.sha256, entry.fields.get("text")) != (
                        *(kernel[1], hashlib.sha256(library).hexdigest(), _digest([text])),
                    ):
                        raise CacheError(f"the archive {path} is damaged: {folder} does not match its manifest")
                    entries[entry.key] = entry
        added = []
        for key, entry in entries.items():
            if self.get(key) is None:
                library, text = (members[f"kernels/{key}/{name}"] for name in ("kernel.so", "source.cpp"))
                self._publish(entry, library, text)
                added.append(key)
        new_records = 0
        for (kind, key), value in records.items():
            if self.read_record(kind, key) is None:
                self.write_record(kind, key, value)
                new_records += 1
        known = {path.name for path in self._plan_paths(self._roots())}
        new_plans = [name for name in plans if name not in known]
        for name in new_plans:
            self._put_plan(name, plans[name])
        present = len(entries) + len(records) + len(plans) - len(added) - new_records - len(new_plans)
        targets = frozenset(entry.target for entry in entries.values())
        return ImportReport(tuple(added), new_records, present, targets, len(new_plans))

    # Work in progress

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private directory on the cache's file system, removed afterwards."""
        path = self._writing(lambda root: Path(tempfile.mkdtemp(prefix="build-", dir=root / "tmp")))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def lock_path(self, key: str) -> Path:
        """The file to lock while building ``key``."""
        return self.root / "locks" / f"{key}.lock"

    def keep_failure(self, key: str, text: str, headers: Mapping[str, bytes], output: str) -> Path:
        """Keep a source that did not compile, its headers and what the compiler said; the path of the source."""

        def write(root: Path) -> Path:
            folder = root / "failed" / key
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "output.txt").write_text(output)
            for name, content in headers.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            (folder / "source.cpp").write_text(text)
            return folder / "source.cpp"

        path = self._writing(write)
        kept = sorted((self.root / "failed").iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in kept[:-_FAILURES_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)
        return path

    # Inside

    def _roots(self) -> list[Path]:
        return [self.root] if self._read_only is None else [self.root, self._read_only]

    def _folders(self, roots: Iterable[Path]) -> list[Path]:
        found = {folder.name: folder for root in roots for folder in (root / "kernels").glob("??/*")}
        return [found[name] for name in sorted(found)]

    def _record_paths(self) -> list[Path]:
        return sorted(path for root in self._roots() for path in (root / "records").glob("*/*.json"))

    def _plan_paths(self, roots: Iterable[Path]) -> list[Path]:
        return sorted(path for root in roots for path in (root / "plans").glob("*.plan"))

    def _check(self, key: str, folder: Path, *, remember: bool = True) -> Entry:
        """The manifest of an entry whose library matches it. Raises OSError or :class:`CacheError`."""
        manifest, library = folder / "manifest.json", folder / "kernel.so"
        folder.stat()
        try:
            entry = Entry.read(manifest)
            status = library.stat()
        except FileNotFoundError as error:
            folder.stat()  # another process may have pruned the entry a moment ago: a plain miss
            raise CacheError(f"{folder} is incomplete: {error.filename} is missing") from error
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if remember and self._verified.get(key) == stamp:
            return entry
        if entry.key != key:
            raise CacheError(f"{manifest} belongs to the entry {entry.key}")
        if hashlib.sha256(library.read_bytes()).hexdigest() != entry.sha256:
            raise CacheError(f"{library} does not match its checksum")
        if remember:
            self._verified[key] = stamp
            with contextlib.suppress(OSError):
                os.utime(manifest)
        return entry

    def _publish(self, entry: Entry, library: bytes, text: bytes) -> Path:
        manifest = json.dumps(dataclasses.asdict(entry), indent=1).encode()

        def write(root: Path) -> Path:
            folder = _entry_folder(root, entry.key)
            stage = Path(tempfile.mkdtemp(prefix="stage-", dir=root / "tmp"))
            try:
                (stage / "kernel.so").write_bytes(library)
                (stage / "source.cpp").write_bytes(text)
                (stage / "manifest.json").write_bytes(manifest)
                folder.parent.mkdir(parents=True, exist_ok=True)
                self._install(entry.key, stage, folder)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
            return folder / "kernel.so"

        path = self._writing(write)
        self._used.add(entry.key)
        return path

    def _install(self, key: str, stage: Path, folder: Path) -> None:
        """Rename ``stage`` to ``folder`` unless an intact entry is there."""
        while True:
            try:
                stage.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return
            try:
                self._check(key, folder, remember=False)
            except FileNotFoundError:
                continue
            except CacheError:
                self._remove(folder)
            else:
                return

    def _remove(self, folder: Path) -> bool:
        """Make a directory or file vanish at once: rename it away, then delete it. False if it could not be removed."""
        try:
            trash = Path(tempfile.mkdtemp(prefix="trash-", dir=self.root / "tmp"))
            folder.rename(trash / "it")
        except FileNotFoundError:
            return True
        except OSError as error:
            logger.warning("cannot remove %s from the cache: %s", folder, error)
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        oldest = time.time() - _STALE_SECONDS
        for path in [*(self.root / "tmp").glob("*"), *(self.root / "locks").glob("*.lock")]:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def _writing(self, write: Callable[[Path], T]) -> T:
        """Run ``write`` on the root; if its file system refuses, on a temporary root from now on."""
        try:
            for name in ("tmp", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            return write(self.root)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            self._fall_back(error)
        try:
            return write(self.root)
        except OSError as error:
            raise CacheError(
                f"cannot write to the kernel cache {self._read_only} nor to the temporary directory {self.root}: "
                f"{error}; free some space, or set FUSER_CACHE_DIR to a directory that has it"
            ) from error

    def _fall_back(self, error: OSError) -> None:
        if self._read_only is not None:
            raise CacheError(
                f"cannot write to the temporary kernel cache {self.root}: {error}; "
                "free some space, or set FUSER_CACHE_DIR to a directory that has it"
            ) from error
        try:
            temporary = Path(tempfile.mkdtemp(prefix="fuser-cache-"))
            atexit.register(_remove_own, temporary, os.getpid())
            _prepare(temporary)
        except OSError as second:
            raise CacheError(
                f"cannot write to the kernel cache {self.root} ({error}) nor to a temporary directory ({second}); "
                "set FUSER_CACHE_DIR to a writable directory"
            ) from second
        logger.warning(
            "cannot write to the kernel cache %s (%s); kernels of this process go to %s and are lost at its end. "
            "Set FUSER_CACHE_DIR to a writable directory to keep them.",
            self.root,
            error,
            temporary,
        )
        self._read_only, self.root = self.root, temporary


def default_root() -> Path:
    """``$FUSER_CACHE_DIR`` if it is set, else ``fuser`` in the user's cache directory; relative if there is no home."""
    return _root(*map(os.environ.get, ("FUSER_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@functools.cache
def _root(chosen: str | None, *_environment: str | None) -> Path:
    # Every call of an operator asks, so what the environment leads to is remembered.
    try:
        return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("fuser")
    except RuntimeError:  # no HOME and no entry in the user database
        return Path(chosen or "~/.cache/fuser")


def default_cache() -> KernelCache:
    """The cache at :func:`default_root`, opened once per process and directory."""
    return _open(default_root())


@functools.cache
def _open(root: Path) -> KernelCache:
    return KernelCache(root)


def _prepare(root: Path) -> None:
    """Create the directory and try to write in it. Raises OSError if it cannot be used, CacheError if it is unsafe."""
    if not root.is_absolute():
        raise OSError(errno.ENOENT, "there is no home directory", str(root))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise CacheError(
            f"the kernel cache {root} belongs to another user (uid {status.st_uid}), who could put code into it; "
            "set FUSER_CACHE_DIR to a directory of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"other users can write to the kernel cache {root} and could put code into it; "
            f"run `chmod 700 {root}`, or set FUSER_CACHE_DIR to another directory"
        )
    for name in ("tmp", "locks", "kernels", "plans", "records"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=root / "tmp") as probe:
        probe.write(b"writable")


def _remove_own(path: Path, process: int) -> None:
    # A forked child inherits the exit handler, but the directory is its parent's.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def _entry_folder(root: Path, key: str) -> Path:
    if not KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not the key of a kernel")
    return root / "kernels" / key[:2] / key


def _folder_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            total += path.stat().st_size
    return total


def _write_atomic(path: Path, content: bytes, temporary: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="write-", dir=temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _plan_path(root: Path, key: str) -> Path:
    return root / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()}.plan"


def _parse_plan(content: bytes, path: Path) -> tuple[str, bytes]:
    """(title, plan) of a file. Raises :class:`CacheError` if it is damaged."""
    line, _, plan = content.partition(b"\n")
    title, checksum = _plan_header(line, path)
    if hashlib.sha256(plan).hexdigest() != checksum:
        raise CacheError(f"the plan {path} is damaged: it does not match its checksum")
    return title, plan


def _plan_header(line: bytes, path: Path) -> tuple[str, str]:
    try:
        header = json.loads(line)
        if header["format"] != FORMAT or header["key"] != path.stem:
            raise ValueError("it belongs to another key or format")
        return str(header["title"]), str(header["sha256"])
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"the plan {path} is damaged: {error}") from error


def _record_path(root: Path, kind: str, key: str) -> Path:
    if not kind.isidentifier():
        raise ValueError(f"a kind of record is a word, not {kind!r}")
    return root / "records" / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _format_record(kind: str, key: str, value: Mapping[str, Any]) -> bytes:
    body = json.dumps([FORMAT, kind, key, dict(value)], sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode()


def _parse_record(content: bytes, kind: str, key: str | None) -> tuple[str, dict[str, Any]]:
    """(key, value) of a record. Raises :class:`CacheError` if it is damaged or is not the one that was asked for."""
    try:
        outer = json.loads(content)
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its checksum does not match")
        version, stored_kind, stored_key, value = json.loads(body)
        if version != FORMAT or stored_kind != kind or (key is not None and stored_key != key):
            raise ValueError("it belongs to another key or format")
        return stored_key, dict(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"a record of kind {kind} is damaged: {error}") from error
