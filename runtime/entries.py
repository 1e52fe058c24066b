"""What the files of the cache hold: keys and manifests of kernels, plans, and small records, each with a checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.ir.errors import CacheError

FORMAT = 1
KEY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}")
_TOOLS = frozenset({"compiler", "flags"})


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
        "format": digest_of([str(FORMAT).encode()]),
        "symbol": digest_of([symbol.encode()]),
        "target": digest_of([target.encode()]),
        "text": digest_of([text.encode()]),
    }
    for name, content in sorted(headers.items()):
        identity[f"header {name}"] = digest_of([name.encode(), content])
    tools = {"compiler": digest_of([compiler.encode()]), "flags": digest_of([flag.encode() for flag in flags])}
    return _combine({**identity, **tools})


def _combine(fields: Mapping[str, str]) -> KernelKey:
    source, toolchain = (
        digest_of([part.encode() for item in sorted(fields.items()) if (item[0] in _TOOLS) is tools for part in item])
        for tools in (False, True)
    )
    return KernelKey(source[:32], toolchain[:16], tuple(fields.items()))


def digest_of(parts: Iterable[bytes]) -> str:
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
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
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


def plan_path(root: Path, key: str) -> Path:
    """Where the plan of ``key`` (any text) lies."""
    return root / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()}.plan"


def format_plan(name: str, title: str, content: bytes) -> bytes:
    """The file of a plan, whose name without its suffix is ``name``."""
    fields = {"format": FORMAT, "key": name, "title": title, "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(fields).encode() + b"\n" + content


def parse_plan(content: bytes, path: Path) -> tuple[str, bytes]:
    """(title, plan) of a file. Raises :class:`CacheError` if it is damaged."""
    line, _, plan = content.partition(b"\n")
    title, checksum = plan_header(line, path)
    if hashlib.sha256(plan).hexdigest() != checksum:
        raise CacheError(f"the plan {path} is damaged: it does not match its checksum")
    return title, plan


def plan_header(line: bytes, path: Path) -> tuple[str, str]:
    """(title, checksum) from the first line of a plan's file. Raises :class:`CacheError` if it is damaged."""
    try:
        header = json.loads(line)
        if header["format"] != FORMAT or header["key"] != path.stem:
            raise ValueError("it belongs to another key or format")
        return str(header["title"]), str(header["sha256"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(f"the plan {path} is damaged: {error}") from error


def record_path(root: Path, kind: str, key: str) -> Path:
    """Where the record of ``key`` (any text) lies. Raises ValueError if ``kind`` is not a word."""
    if not kind.isidentifier():
        raise ValueError(f"a kind of record is a word, not {kind!r}")
    return root / "records" / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def format_record(kind: str, key: str, value: Mapping[str, Any]) -> bytes:
    """The file of a record."""
    body = json.dumps([FORMAT, kind, key, dict(value)], sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode()


def parse_record(content: bytes, kind: str, key: str | None) -> tuple[str, dict[str, Any]]:
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(f"a record of kind {kind} is damaged: {error}") from error
