"""A directory that many processes share: private, written by renaming, and replaced where it cannot be written."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import platformdirs

from fuser.ir.errors import CacheError

FOLDERS = ("tmp", "locks", "kernels", "plans", "records")
_STALE_SECONDS = 86_400.0
_ATTEMPTS = 4
_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST}
    | {errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOENT, errno.ENODEV, errno.EMLINK, errno.EFBIG}
    | {errno.EISDIR, errno.ENOTEMPTY, errno.EXDEV, errno.EBUSY}
)

logger = logging.getLogger("fuser")
T = TypeVar("T")


class Store:
    """A directory, by default :func:`default_root`, and a private temporary one that takes what is new where the
    directory cannot be written (read-only, full, unusable HOME) but only read.

    Raises :class:`CacheError` for a directory that belongs to another user or that others can write to: what lies in it
    is code that would run as this user.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._read_only: Path | None = None
        self.root = root if root is not None else default_root()
        try:
            _prepare(self.root)
        except OSError as error:
            self._fall_back(error)
        self.sweep()

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private directory on the cache's file system, removed afterwards."""
        path = self.writing(lambda root: Path(tempfile.mkdtemp(prefix="build-", dir=root / "tmp")))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def lock_path(self, key: str) -> Path:
        """The file to lock while building ``key``."""
        return self.root / "locks" / f"{key}.lock"

    def roots(self) -> list[Path]:
        """Where things are read: the directory that is written first."""
        return [self.root] if self._read_only is None else [self.root, self._read_only]

    def remove(self, folder: Path) -> bool:
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

    def sweep(self) -> None:
        """Remove what killed processes left behind."""
        oldest = time.time() - _STALE_SECONDS
        for path in [*(self.root / "tmp").glob("*"), *(self.root / "locks").glob("*.lock")]:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def writing(self, write: Callable[[Path], T]) -> T:
        """Run ``write`` on the root; if its file system refuses, on a temporary root from now on."""
        try:
            for _ in range(_ATTEMPTS - 1):
                # Another process may remove the directories at any moment.
                with contextlib.suppress(FileNotFoundError):
                    _make_folders(self.root)
                    return write(self.root)
            _make_folders(self.root)
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
    _make_folders(root)
    with tempfile.TemporaryFile(dir=root / "tmp") as probe:
        probe.write(b"writable")


def _make_folders(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in FOLDERS:
        (root / name).mkdir(mode=0o700, exist_ok=True)


def _remove_own(path: Path, process: int) -> None:
    # A forked child inherits the exit handler, but the directory is its parent's.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file by renaming it into place from the directory ``temporary``, which is on the same file system."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="write-", dir=temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
