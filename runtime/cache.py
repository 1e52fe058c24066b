"""The kernel cache on disk: content-addressed libraries, plans and small records, safe under many processes.

Layout below the root (mode 0700)::

    kernels/ab/<key>/{kernel.so, source.cpp, manifest.json}    one entry, renamed into place as a whole
    plans/<sha256 of the key>.plan                             a line of JSON, then the plan; renamed into place
    records/<kind>/<sha256 of the key>.json                    one record, renamed into place
    headers/<key>-<sha256>.{gch,o}                             what all kernels share, compiled (runtime/precompiled.py)
    locks/<key>.lock                                           held while a kernel is being built
    failed/<key>/                                              sources that did not compile, with the compiler's output
    tmp/                                                       work in progress

An entry's key has two halves: what the kernel is (symbol, source, headers, target, format) and what built it (compiler
and flags). A machine without a compiler knows only the first half and takes any entry that has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.ir.errors import CacheError
from fuser.runtime.archive import KERNEL_MEMBER, PLAN_MEMBER, RECORD_MEMBER, read_archive, write_archive
from fuser.runtime.entries import (
    FORMAT,
    KEY,
    Entry,
    KernelKey,
    PlanEntry,
    digest_of,
    format_plan,
    format_record,
    parse_plan,
    parse_record,
    plan_header,
    plan_path,
    record_path,
)
from fuser.runtime.store import (
    Store,
    children,
    default_root,
    make_held,
    read_regular,
    require_own_folder,
    write_atomic,
    write_own,
)

_ENTRY_FILES = ("kernel.so", "manifest.json", "source.cpp")
DEFAULT_MAX_BYTES = 2 << 30
_FAILURES_KEPT = 32
_LARGEST_PLAN = 1 / 8
"""Part of the cache that one plan may take."""
_LONGEST_HEADER = 1 << 16

logger = logging.getLogger("fuser")


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


class KernelCache(Store):
    """Compiled kernels, plans and small records on disk, in the directory that a :class:`Store` is.

    Of all but records at most ``max_bytes`` are kept when the cache is pruned.
    """

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._verified: dict[str, tuple[int, int, int, int]] = {}
        self._used: set[str] = set()
        super().__init__(root)

    # Kernels

    def get(self, key: str) -> Path | None:
        """The library of an intact entry, else None. Damage is logged and is a miss; the next build replaces it."""
        for root in self.roots():
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
        for root in self.roots():
            for folder in children(root / "kernels" / source[:2]):
                with contextlib.suppress(OSError):
                    if folder.name.startswith(f"{source}-"):
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
        for folder in self._folders(self.roots()):
            with contextlib.suppress(OSError, CacheError):
                manifest = folder / "manifest.json"
                entry = Entry.parse(read_regular(manifest), str(manifest))
                found.append((manifest.stat().st_mtime, entry))
        return [entry for _, entry in sorted(found, key=lambda item: (-item[0], item[1].key))]

    def size(self) -> int:
        """Bytes of all kernels, with their sources and manifests, of all plans, and of compiled headers."""
        others = sum(_folder_bytes(root / name) for root in self.roots() for name in ("plans", "headers"))
        return others + sum(_folder_bytes(folder) for folder in self._folders(self.roots()))

    def verify(self) -> VerifyReport:
        """Check every kernel, record and plan against its checksum. Nothing is changed; what is damaged is a miss."""
        damaged: list[tuple[str, str]] = []
        kernels = records = plans = total = 0
        for folder in self._folders(self.roots()):
            try:
                total += self._check(folder.name, folder, remember=False).size
                kernels += 1
            except (OSError, CacheError) as error:
                damaged.append((folder.name, str(error)))
        for path in self._record_paths():
            try:
                parse_record(read_regular(path), path.parent.name, None)
                records += 1
            except (OSError, CacheError) as error:
                damaged.append((f"{path.parent.name}/{path.name}", str(error)))
        for path in self._plan_paths(self.roots()):
            try:
                parse_plan(read_regular(path), path)
                plans += 1
            except (OSError, CacheError) as error:
                damaged.append((f"plans/{path.name}", str(error)))
        return VerifyReport(kernels, records, total, tuple(damaged), plans)

    def prune(self, max_bytes: int | None = None) -> list[str]:
        """Remove what was least recently used until at most ``max_bytes`` are left; what was removed.

        The result has the keys of kernels and the names of other files. Kernels that this process has used stay.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        found = []
        for folder in self._folders([self.root]):
            with contextlib.suppress(OSError):
                known = [path.stat().st_mtime for path in (folder / "manifest.json", folder) if path.exists()]
                accessed = max(known, default=0.0)
                found.append((accessed, folder.name, _folder_bytes(folder), folder))
        for path in [*self._plan_paths([self.root]), *children(self.root / "headers")]:
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.name, path.stat().st_size, path))
        total = sum(size for _, _, size, _ in found)
        removed = []
        for _, key, size, folder in sorted(found):
            if total <= limit:
                break
            if key not in self._used and self.remove(folder):
                total -= size
                removed.append(key)
        self.sweep()
        return removed

    def clear(self) -> None:
        """Remove everything that was kept. Kernels that are loaded anywhere keep working."""
        for name in ("kernels", "plans", "records", "headers", "failed"):
            self.remove(self.root / name)
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

    # What all kernels share, compiled

    def precompiled(self, key: str) -> list[Path]:
        """The files that were kept for ``key``; the names of those that are intact end in their sha256."""
        return [path for root in self.roots() for path in children(root / "headers") if path.name.startswith(key)]

    def keep_precompiled(self, key: str, path: Path) -> None:
        """Keep a file for later builds. Raises :class:`CacheError` if nothing can be written anywhere."""
        content = path.read_bytes()
        name = f"{key}-{hashlib.sha256(content).hexdigest()}{path.suffix}"
        self.writing(lambda root: write_atomic(root / "headers" / name, content, root / "tmp"))

    # Plans

    def read_plan(self, key: str) -> bytes | None:
        """What was written for ``key``, or None if there is nothing or it is damaged."""
        for root in self.roots():
            path = plan_path(root, key)
            try:
                content = parse_plan(read_regular(path), path)[1]
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
        path = plan_path(self.root, key)
        self._put_plan(path.name, format_plan(path.stem, title, content))

    def _put_plan(self, name: str, whole: bytes) -> None:
        self.writing(lambda root: write_atomic(root / "plans" / name, whole, root / "tmp"))

    def plans(self) -> list[PlanEntry]:
        """All plans, most recently used first; damaged ones are left out."""
        found = []
        for path in self._plan_paths(self.roots()):
            with contextlib.suppress(OSError, CacheError):
                status = path.stat()
                title, _ = plan_header(read_regular(path, _LONGEST_HEADER).partition(b"\n")[0], path)
                found.append(PlanEntry(path.name, title, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (-entry.used, entry.name))

    # Records

    def read_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The value that was written for ``key``, or None if there is none or it is damaged."""
        for root in self.roots():
            path = record_path(root, kind, key)
            try:
                return parse_record(read_regular(path), kind, key)[1]
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, CacheError) as error:
                logger.warning("a cached record is damaged and will be ignored: %s", error)
        return None

    def write_record(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Remember a small JSON object for ``key`` (any text) among the records of ``kind`` (a word).

        Raises ValueError if ``value`` is not JSON, :class:`CacheError` if nothing can be written anywhere.
        """
        content = format_record(kind, key, value)
        self.writing(lambda root: write_atomic(record_path(root, kind, key), content, root / "tmp"))

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        """The values of all intact records of ``kind``, by the names of their files."""
        for path in sorted((p for p in self._record_paths() if p.parent.name == kind), key=lambda p: p.name):
            with contextlib.suppress(OSError, CacheError):
                yield parse_record(read_regular(path), kind, None)[1]

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
            files = self._read_entry(key)
            if files is None and keys is not None:
                raise CacheError(f"the kernel {key} is not in the cache {self.root}, or damaged; nothing was exported")
            if files is not None:
                kernels += 1
                members |= {f"kernels/{key}/{name}": content for name, content in files.items()}
        for record in self._record_paths() if keys is None else []:
            with contextlib.suppress(CacheError, OSError):
                content = read_regular(record)
                parse_record(content, record.parent.name, None)
                members[f"records/{record.parent.name}/{record.name}"] = content
        for plan in self._plan_paths(self.roots()) if keys is None else []:
            with contextlib.suppress(CacheError, OSError):
                content = read_regular(plan)
                parse_plan(content, plan)
                members[f"plans/{plan.name}"] = content
        write_archive(path, members)
        return kernels

    def import_(self, path: Path, max_bytes: int | None = None) -> ImportReport:
        """Add the kernels, records and plans of a file that :meth:`export` wrote; what is here already stays.

        ``max_bytes`` bounds what the file unpacks to, by default in proportion to its size. The kernels are code that
        will run as this user, so import only what comes from people you trust. Raises :class:`CacheError`, and adds
        nothing, if any part of the file is damaged or out of place.
        """
        members = read_archive(path, max_bytes)
        entries: dict[str, Entry] = {}
        records: dict[tuple[str, str], dict[str, Any]] = {}
        plans: dict[str, bytes] = {}
        for name, content in members.items():
            if plan := PLAN_MEMBER.fullmatch(name):
                parse_plan(content, path / name)
                plans[plan[1]] = content
            elif record := RECORD_MEMBER.fullmatch(name):
                key, value = parse_record(content, record[1], None)
                if record_path(self.root, record[1], key).name != f"{record[2]}.json":
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
                        *(kernel[1], hashlib.sha256(library).hexdigest(), digest_of([text])),
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
        known = {path.name for path in self._plan_paths(self.roots())}
        new_plans = [name for name in plans if name not in known]
        for name in new_plans:
            self._put_plan(name, plans[name])
        present = len(entries) + len(records) + len(plans) - len(added) - new_records - len(new_plans)
        targets = frozenset(entry.target for entry in entries.values())
        return ImportReport(tuple(added), new_records, present, targets, len(new_plans))

    # Failures

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

        path = self.writing(write)
        kept = []
        for folder in children(self.root / "failed"):
            with contextlib.suppress(OSError):
                kept.append((folder.stat().st_mtime, folder))
        for _, folder in sorted(kept)[:-_FAILURES_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)
        return path

    # Inside

    def _folders(self, roots: Iterable[Path]) -> list[Path]:
        found = {f.name: f for root in roots for part in children(root / "kernels") for f in children(part)}
        return [found[name] for name in sorted(found)]

    def _record_paths(self) -> list[Path]:
        kinds = [kind for root in self.roots() for kind in children(root / "records")]
        return sorted(path for kind in kinds for path in children(kind) if path.suffix == ".json")

    def _plan_paths(self, roots: Iterable[Path]) -> list[Path]:
        return sorted(path for root in roots for path in children(root / "plans") if path.suffix == ".plan")

    def _read_entry(self, key: str) -> dict[str, bytes] | None:
        """The files of an intact entry, as :meth:`import_` wants them; None if there is none or it is damaged."""
        if (library := self.get(key)) is None:
            return None
        try:
            files = {name: read_regular(library.parent / name) for name in _ENTRY_FILES}
            entry = Entry.parse(files["manifest.json"], str(library.parent / "manifest.json"))
            if digest_of([files["source.cpp"]]) != entry.fields.get("text"):
                raise CacheError(f"{library.parent / 'source.cpp'} does not match its manifest")
        except (OSError, CacheError) as error:
            logger.warning("a cached kernel cannot be exported: %s", error)
            return None
        return files

    def _check(self, key: str, folder: Path, *, remember: bool = True) -> Entry:
        """The manifest of an entry whose library matches it. Raises OSError or :class:`CacheError`."""
        manifest, library = folder / "manifest.json", folder / "kernel.so"
        for part in (folder.parent.parent, folder.parent, folder):
            require_own_folder(part)
        try:
            entry = Entry.parse(read_regular(manifest), str(manifest))
            status = library.lstat()
        except FileNotFoundError as error:
            folder.stat()  # another process may have pruned the entry a moment ago: a plain miss
            raise CacheError(f"{folder} is incomplete: {error.filename} is missing") from error
        stamp = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if remember and self._verified.get(key) == stamp:
            return entry
        if entry.key != key:
            raise CacheError(f"{manifest} belongs to the entry {entry.key}")
        if hashlib.sha256(read_regular(library)).hexdigest() != entry.sha256:
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
            stage, handle = make_held(root / "tmp", "stage-")
            try:
                write_own(stage / "kernel.so", library)
                write_own(stage / "source.cpp", text)
                write_own(stage / "manifest.json", manifest)
                with contextlib.suppress(FileExistsError):
                    folder.parent.mkdir(mode=0o700, parents=True)
                self._install(entry.key, stage, folder)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
                os.close(handle)
            return folder / "kernel.so"

        path = self.writing(write)
        self._used.add(entry.key)
        return path

    def _install(self, key: str, stage: Path, folder: Path) -> None:
        """Rename ``stage`` to ``folder`` unless an intact entry is there."""
        while True:
            try:
                stage.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                obstacle = error
            else:
                return
            try:
                self._check(key, folder, remember=False)
            except (OSError, CacheError):
                if os.path.lexists(folder) and not self.remove(folder):
                    raise obstacle from None
            else:
                return


def default_cache() -> KernelCache:
    """The cache at :func:`default_root`, opened once per process and directory."""
    return _open(default_root())


@functools.cache
def _open(root: Path) -> KernelCache:
    return KernelCache(root)


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
