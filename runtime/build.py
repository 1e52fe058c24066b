"""From generated sources to shared objects in the cache: one ninja run for everything that is missing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from fuser.ir.errors import BuildError, CacheError, ToolchainError
from fuser.ir.target import Target
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.compilers import find_ninja, find_toolchain
from fuser.runtime.emulator import ENGINE
from fuser.runtime.entries import KernelKey, kernel_key
from fuser.runtime.library import Kernel, UnusableLibraryError, load
from fuser.runtime.precompiled import Engine, Precompiled
from fuser.runtime.store import FULL, remedy
from fuser.runtime.toolchain import NO_SPACE, Toolchain

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_ANNOUNCE_SECONDS = 2.0
_REPEAT_SECONDS = 15.0
_STOP_SECONDS = 0.1
_LOCK_SECONDS = 120.0
_COMPILATIONS = 3
"""Times that sources are compiled when other processes remove the folder that this is done in."""
_LOADS = 3
_MESSAGE_CHARACTERS = 6000
_LITTLE_SPACE = 4 << 20
_SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
_Files = tuple[tuple[str, bytes], ...]
"""Names and contents of files, by name."""

logger = logging.getLogger("fuser")


@dataclass(frozen=True)
class Source:
    """One kernel to build: ``text`` defines ``extern "C" int symbol(const FuserArgs*, void* stream)``.

    The text includes nothing of ours but headers of the folder that :func:`build` is given. ``includes`` are folders of
    other packages' headers; they are not part of a kernel's key, so the text must name the packages' versions.
    """

    symbol: str
    text: str
    suffix: str = ".cpp"
    includes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A source that did not compile: a command that shows it again, the output, and where the source is kept."""

    symbol: str
    command: str
    output: str
    source: Path


class CompilationError(BuildError):
    """Raised by :func:`build`; ``failures`` holds one :class:`Failure` per source that did not compile."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = tuple(failures)
        parts = [f"{len(failures)} generated kernel{'s' if len(failures) > 1 else ''} did not compile"]
        for failure in failures:
            parts.append(
                f"{failure.symbol}: source kept at {failure.source}\ncommand: {failure.command}\n"
                f"{failure.output.strip()[:_MESSAGE_CHARACTERS]}"
            )
        super().__init__("\n\n".join(parts))


@dataclass(frozen=True)
class _Job:
    """A kernel to build, with the headers that it includes; ``engine`` has the source and headers of the emulator's own
    code if it is to be linked with that."""

    source: Source
    key: KernelKey
    headers: Mapping[str, bytes]
    engine: Mapping[str, bytes]


def build(
    sources: Sequence[Source],
    target: Target,
    *,
    headers: Path,
    cache: KernelCache | None = None,
    jobs: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Path]:
    """The shared object of every source, from the cache or built now in parallel; by symbol.

    ``headers`` is the folder of the headers that sources include; ``jobs`` bounds the compilers that run at once
    (default: the CPUs that this process may use); setting ``stop`` ends them with a :class:`BuildError`. Without a
    working compiler, kernels that any compiler has built for this target are taken from the cache.

    Raises :class:`CompilationError` (a :class:`BuildError`) if sources do not compile, after all others have been
    published; :class:`ToolchainError` if something must be built and there is no compiler or ninja;
    :class:`CacheError` if there is no place to put the result.
    """
    cache = default_cache() if cache is None else cache
    unique = _unique(sources, target)
    if not unique:
        return {}
    try:
        toolchain = find_toolchain(target, cache)
    except ToolchainError as error:
        return _without_compiler(unique, target, headers, cache, error)
    jobs_by_symbol = {symbol: _job(source, target, toolchain, headers) for symbol, source in unique.items()}
    built = {symbol: path for symbol, job in jobs_by_symbol.items() if (path := cache.get(job.key.digest))}
    missing = [job for symbol, job in jobs_by_symbol.items() if symbol not in built]
    if not missing:
        return built
    ninja = find_ninja()
    with _locked(cache, missing):
        for job in missing:
            if path := cache.get(job.key.digest):
                built[job.source.symbol] = path
        missing = [job for job in missing if job.source.symbol not in built]
        if missing:
            parallel = jobs or _usable_cpus()
            built |= cache.writing(
                lambda _: _compile(missing, target, toolchain, ninja, cache, parallel, stop), attempts=_COMPILATIONS
            )
            cache.prune()
    return built


def build_and_load(
    sources: Sequence[Source], target: Target, *, headers: Path, cache: KernelCache | None = None
) -> dict[str, Kernel]:
    """The kernels of all sources by symbol, loaded; see :func:`build`.

    A library that has vanished from the cache since it was found, or that cannot be used although it is what its
    manifest says, is built again. Raises what :func:`build` raises, and :class:`CacheError` when that does not help.
    """
    cache = default_cache() if cache is None else cache
    for attempt in range(_LOADS):
        paths = build(sources, target, headers=headers, cache=cache)
        try:
            return {symbol: load(path, symbol) for symbol, path in paths.items()}
        except UnusableLibraryError as error:
            if attempt == _LOADS - 1:
                raise
            logger.info("building again: %s", error)
            if error.path.exists():
                cache.remove(error.path.parent)
    raise AssertionError


def key_of(source: Source, target: Target, *, headers: Path) -> KernelKey:
    """The key under which :func:`build` files ``source``. Raises :class:`ToolchainError` without a compiler."""
    return _job(source, target, find_toolchain(target), headers).key


def included_headers(text: str, headers: Path) -> dict[str, bytes]:
    """Names (relative to the folder ``headers``) and content of the headers that ``text`` includes, directly or not.

    Only these are there when the source is compiled, so that a build can depend on nothing outside its key.
    """
    root = headers.resolve()
    found: dict[str, bytes] = {}
    pending = [(text.encode(), root)]
    while pending:
        content, folder = pending.pop()
        for name in _INCLUDE.findall(content):
            for base in (folder, root):
                path = (base / os.fsdecode(name)).resolve()
                if path.is_relative_to(root) and path.is_file():
                    relative = path.relative_to(root).as_posix()
                    if relative not in found:
                        found[relative] = path.read_bytes()
                        pending.append((found[relative], path.parent))
                    break
    return found


def _unique(sources: Sequence[Source], target: Target) -> dict[str, Source]:
    suffix = _SUFFIX[target.kind]
    unique: dict[str, Source] = {}
    for source in sources:
        if not _SYMBOL.fullmatch(source.symbol):
            raise BuildError(f"{source.symbol!r} is not a C identifier of at most 200 characters")
        if source.suffix != suffix:
            raise BuildError(f"{source.symbol}: there is no rule to build {source.suffix!r} files, only {suffix!r}")
        if unique.setdefault(source.symbol, source) != source:
            raise BuildError(f"two different sources define the kernel {source.symbol}; give them different names")
    return unique


def _job(source: Source, target: Target, toolchain: Toolchain | None, headers: Path) -> _Job:
    included = included_headers(source.text, headers)
    linked = target.emulated and ENGINE not in included
    engine = included_headers(f'#include "{ENGINE}"', headers) if linked else {}
    key = kernel_key(
        symbol=source.symbol,
        text=source.text,
        headers={**included, **engine},
        target=target.key,
        compiler=toolchain.version if toolchain else "",
        flags=toolchain.flags if toolchain else (),
    )
    return _Job(source, key, included, engine)


def _without_compiler(
    unique: Mapping[str, Source], target: Target, headers: Path, cache: KernelCache, error: ToolchainError
) -> dict[str, Path]:
    found = {}
    for symbol, source in unique.items():
        path = cache.find(_job(source, target, None, headers).key.source)
        if path is None:
            raise ToolchainError(
                f"the kernel {symbol} is not in the cache {cache.root} and cannot be built: {error}\n"
                "(Kernels can also be built elsewhere for the same instruction set and brought here with "
                "`fuserc cache export` and `fuserc cache import`.)"
            ) from error
        found[symbol] = path
    return found


@contextlib.contextmanager
def _locked(cache: KernelCache, jobs: Sequence[_Job]) -> Iterator[None]:
    """Hold the locks of all ``jobs``, so that two processes do not build the same kernel.

    The lock only saves work (publishing is atomic), so a lock that cannot be had is not an error. All processes take
    locks in the same order; the kernel releases those of a process that dies.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        for digest in sorted(job.key.digest for job in jobs):
            lock = filelock.FileLock(cache.lock_path(digest), mode=0o600)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                logger.info("waiting for another process that is building the same kernel (%s)", digest)
                try:
                    lock.acquire(timeout=max(deadline - time.monotonic(), 0.0))
                except filelock.Timeout:
                    logger.warning("another process has held %s for long; building without it", lock.lock_file)
                    break
            except (OSError, NotImplementedError) as error:
                logger.debug("no file locks in %s: %s", cache.root, error)
                break
            stack.callback(lock.release)
        yield


def _compile(
    jobs: Sequence[_Job],
    target: Target,
    toolchain: Toolchain,
    ninja: Path,
    cache: KernelCache,
    parallel: int,
    stop: threading.Event | None,
) -> dict[str, Path]:
    """Build ``jobs`` with one ninja run and publish what compiled. Raises :class:`CompilationError` for the rest, and
    OSError where the disk is full."""
    with cache.workspace() as folder:
        try:
            precompiled = Precompiled(toolchain, cache, folder, len(jobs))
            engines: dict[_Files, Engine] = {}
            for files in dict.fromkeys(_files(job.engine) for job in jobs if job.engine):
                engines[files] = Engine(toolchain, cache, folder, f"engine{len(engines)}.o", dict(files))
            _write_project(folder, jobs, toolchain, precompiled, engines)
            log = _run_ninja(
                [str(ninja), "-C", str(folder), "-k", "0", "-j", str(parallel), "--quiet"], folder, len(jobs), stop
            )
            precompiled.keep()
            for engine in engines.values():
                engine.keep()
        except OSError as error:
            if error.errno in FULL or not folder.exists():
                raise
            raise CacheError(f"cannot build in {folder}: {error}; {remedy(error)}") from error
        built: dict[str, Path] = {}
        failures = []
        for index, job in enumerate(jobs):
            library = folder / f"k{index}.so"
            if library.exists():
                built[job.source.symbol] = cache.publish(
                    job.key,
                    symbol=job.source.symbol,
                    library=library,
                    text=job.source.text,
                    compiler=toolchain.name,
                    target=target.key,
                )
                continue
            if not folder.exists():
                raise FileNotFoundError(errno.ENOENT, "another process has removed it", str(folder))
            report = folder / f"k{index}.log"
            output = (report.read_text(errors="replace") if report.exists() else "") or log
            # On a full disk a compiler cannot even write what is wrong.
            if NO_SPACE in output or shutil.disk_usage(folder).free < _LITTLE_SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            source = cache.keep_failure(job.key.digest, job.source.text, job.headers, output)
            command = shlex.join([*toolchain.command, *toolchain.compile_flags, "-c", str(source), "-o", os.devnull])
            failures.append(Failure(job.source.symbol, command, output, source))
    if failures:
        raise CompilationError(failures)
    return built


def _write_project(
    folder: Path,
    jobs: Sequence[_Job],
    toolchain: Toolchain,
    precompiled: Precompiled,
    engines: Mapping[_Files, Engine],
) -> None:
    """Write sources, the headers that were hashed, and build.ninja.

    Headers of the same name have the same content for all jobs unless a file changed in between: each distinct set of
    headers gets a folder of its own.
    """
    include_folders: dict[_Files, str] = {}
    lines = ["ninja_required_version = 1.5", *precompiled.lines]
    for engine in engines.values():
        lines += engine.lines
    for index, job in enumerate(jobs):
        content = _files(job.headers)
        if content not in include_folders:
            include_folders[content] = f"include{len(include_folders)}"
            for name, data in content:
                path = folder / include_folders[content] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        stem = f"k{index}"
        (folder / f"{stem}{job.source.suffix}").write_text(job.source.text)
        compiler = shlex.join([*toolchain.command, *toolchain.compile_flags]) + precompiled.flags
        folders = [f"-I{include_folders[content]}", *(f"-I{folder}" for folder in job.source.includes)]
        rest = shlex.join([*folders, "-c", f"{stem}{job.source.suffix}", "-o", f"{stem}.o"])
        objects = [f"{stem}.o", *([engines[_files(job.engine)].name] if job.engine else [])]
        link_command = shlex.join([*toolchain.command, *toolchain.link_flags, *objects, "-o", f"{stem}.so.part"])
        # A linker that is killed must not leave something that looks finished.
        command = f"( {compiler} {rest} && {link_command} && mv {stem}.so.part {stem}.so ) > {stem}.log 2>&1"
        lines += [
            f"rule r{index}",
            f"  command = {command.replace('$', '$$')}",
            f"build {stem}.so: r{index} {stem}{job.source.suffix} | {' '.join(objects[1:])}{precompiled.needs}",
        ]
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))


def _files(content: Mapping[str, bytes]) -> _Files:
    return tuple(sorted(content.items()))


def _run_ninja(command: Sequence[str], folder: Path, count: int, stop: threading.Event | None) -> str:
    """Run ninja to its end and return what it printed; whatever interrupts the wait ends ninja and its compilers."""
    started = time.monotonic()
    next_message = started + _ANNOUNCE_SECONDS
    output = folder / "ninja.log"
    with output.open("wb") as sink:
        # A session of its own: the terminal's Ctrl-C reaches only us, and the session finds all compilers.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},
        )
        try:
            while True:
                try:
                    left = max(next_message - time.monotonic(), 0.01)
                    process.wait(timeout=left if stop is None else min(left, _STOP_SECONDS))
                    break
                except subprocess.TimeoutExpired:
                    if stop is not None and stop.is_set():
                        raise BuildError("the build was stopped") from None
                    if time.monotonic() < next_message:
                        continue
                    done = sum(1 for _ in folder.glob("k*.so"))
                    first = next_message == started + _ANNOUNCE_SECONDS
                    logger.log(
                        logging.INFO if first else logging.WARNING,
                        "compiling %d kernel%s … (%d done after %.0f s)",
                        count,
                        "" if count == 1 else "s",
                        done,
                        time.monotonic() - started,
                    )
                    next_message = time.monotonic() + _REPEAT_SECONDS
        except BaseException:
            _end_session(process)
            raise
    return output.read_text(errors="replace")


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End ninja, which ends its compilers; then whatever is left of its session."""
    try:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3.0)
    finally:  # even when a second Ctrl-C cuts the wait short
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                # Fields after the command name in parentheses: state, parent, process group, session.
                if int(stat.read_text().rpartition(")")[2].split()[3]) == process.pid:
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        process.kill()
        process.wait()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))
