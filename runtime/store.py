"""A directory that many processes share: private, written by renaming, and replaced where it cannot be written."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
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

FOLDERS = ("tmp", "locks", "kernels", "plans", "records", "headers")
_STALE_SECONDS = 86_400.0
_GRACE_SECONDS = 60.0
"""For which work in progress is left alone even when nobody holds it: its maker may not have got to that yet."""
_ATTEMPTS = 60
_LONGEST_WAIT_MS = 50
_TEMPORARY = "fuser-temporary-cache-"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
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
        self.refusal: OSError | None = None
        self.root = root if root is not None else default_root()
        try:
            _prepare(self.root)
        except OSError as error:
            self._fall_back(error)
        self.sweep()

    @property
    def home(self) -> Path:
        """The directory that was asked for, which a temporary one may stand in for."""
        return self.root if self._read_only is None else self._read_only

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private directory on the cache's file system, removed afterwards or, if this process is killed, by the next
        one that sweeps."""
        path, handle = self.writing(lambda root: make_held(root / "tmp", "build-"))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)

    def lock_path(self, key: str) -> Path:
        """The file to lock while building ``key``."""
        return self.root / "locks" / f"{key}.lock"

    def roots(self) -> list[Path]:
        """Where things are read: the directory that is written first."""
        return [self.root] if self._read_only is None else [self.root, self._read_only]

    def remove(self, folder: Path) -> bool:
        """Make a directory or file vanish at once: rename it away, then delete it. False if it could not be removed."""
        try:
            with contextlib.suppress(FileExistsError):
                (self.root / "tmp").mkdir(mode=0o700)
            trash, handle = make_held(self.root / "tmp", "trash-")
            try:
                folder.rename(trash / "it")
            finally:
                shutil.rmtree(trash, ignore_errors=True)
                os.close(handle)
        except FileNotFoundError:
            return True
        except OSError as error:
            logger.warning("cannot remove %s from the cache: %s", folder, error)
            return False
        return True

    def sweep(self) -> None:
        """Remove what killed processes left behind: work in progress that nobody holds, and locks of old."""
        now = time.time()
        for path in children(self.root / "tmp"):
            _remove_abandoned(path, now)
        for path in children(self.root / "locks"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < now - _STALE_SECONDS:
                    path.unlink()

    def writing(self, write: Callable[[Path], T], attempts: int = _ATTEMPTS) -> T:
        """Run ``write`` on the root; if its file system refuses, on a temporary root from now on.

        Another process may remove the directories at any moment: they are made again, and ``write`` is tried again, at
        most ``attempts`` times in all.
        """
        for attempt in range(attempts):
            try:
                _make_folders(self.root)
                return write(self.root)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                refusal = error
                # Making a directory that exists fails with EEXIST when it is removed meanwhile.
                if error.errno not in (errno.ENOENT, errno.EEXIST):
                    break
                time.sleep(min(attempt, _LONGEST_WAIT_MS) / 1000)
        self._fall_back(refusal)
        try:
            return write(self.root)
        except OSError as error:
            raise CacheError(
                f"cannot write to the kernel cache {self.home} nor to the temporary directory {self.root}: {error}; "
                f"{remedy(error)}"
            ) from error

    def _fall_back(self, error: OSError) -> None:
        if self._read_only is not None:
            raise CacheError(
                f"cannot write to the temporary kernel cache {self.root}: {error}; {remedy(error)}"
            ) from error
        try:
            for path in children(Path(tempfile.gettempdir())):
                if path.name.startswith(_TEMPORARY):
                    _remove_abandoned(path, time.time())
            # Held until the process ends, so that others know that it is in use.
            temporary, _ = make_held(Path(tempfile.gettempdir()), _TEMPORARY)
            atexit.register(_remove_own, temporary, os.getpid())
            _prepare(temporary)
        except OSError as second:
            raise CacheError(
                f"cannot write to the kernel cache {self.root} ({error}) nor to a temporary directory ({second}); "
                f"{remedy(second)}"
            ) from second
        logger.warning(
            "cannot write to the kernel cache %s (%s); kernels of this process go to %s and are lost at its end. "
            "Set FUSER_CACHE_DIR to a writable directory to keep them.",
            self.root,
            error,
            temporary,
        )
        self.refusal = error
        self._read_only, self.root = self.root, temporary


def remedy(error: OSError) -> str:
    """What to do when a directory refuses to be written."""
    if error.errno in FULL:
        return "free some space, or set FUSER_CACHE_DIR to a directory that has it"
    return "set FUSER_CACHE_DIR to a directory that this user can write to"


def children(folder: Path) -> list[Path]:
    """What lies in a directory, by name; nothing if it is not there, or no longer."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_regular(path: Path, limit: int = -1) -> bytes:
    """The content of a file of our own, or its first ``limit`` bytes.

    Raises OSError if there is none, and :class:`CacheError` for what is no regular file (a pipe would make a reader
    wait, a link lead elsewhere) or what others could have written.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise CacheError(f"{path} is not a regular file") from error
        raise
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"{path} is not a regular file")
        require_own(path, status)
        return file.read(limit)


def require_own(path: Path, status: os.stat_result) -> None:
    """Raise :class:`CacheError` if another user could have put something into a file or directory."""
    if status.st_uid not in (os.geteuid(), 0):
        raise CacheError(
            f"{path} belongs to another user (uid {status.st_uid}), who could put code into it; "
            "set FUSER_CACHE_DIR to a directory of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"other users can write to {path} and could put code into it; "
            f"run `chmod -R go-w {path}`, or set FUSER_CACHE_DIR to another directory"
        )


def require_own_folder(path: Path) -> None:
    """Raise OSError if there is no such directory, and :class:`CacheError` if it is a link or open to others."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{path} is not a directory")
    require_own(path, status)


def write_own(path: Path, content: bytes) -> None:
    """Write a new file that nobody else may write to, whatever the umask is."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
        file.write(content)


def make_held(folder: Path, prefix: str) -> tuple[Path, int]:
    """A new directory, and a handle that keeps :func:`_remove_abandoned` away from it until it is closed."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return path, handle


def _remove_abandoned(path: Path, now: float) -> None:
    """Delete a file or directory whose writer has died: its lock, which the kernel gives back, can be had."""
    try:
        status = path.lstat()
        age = abs(now - status.st_mtime)
        if status.st_uid != os.geteuid() or age < _GRACE_SECONDS:
            return
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:
        if age < _STALE_SECONDS:
            return
    finally:
        os.close(handle)
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
    require_own(root, root.stat())
    _make_folders(root)
    with tempfile.TemporaryFile(dir=root / "tmp") as probe:
        probe.write(b"writable")


def _make_folders(root: Path) -> None:
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700, parents=True)
    for name in FOLDERS:
        # Without exist_ok, which asks again and finds nothing if another process has removed the directory meanwhile.
        with contextlib.suppress(FileExistsError):
            (root / name).mkdir(mode=0o700)


def _remove_own(path: Path, process: int) -> None:
    # A forked child inherits the exit handler, but the directory is its parent's.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file by renaming it into place from the directory ``temporary``, which is on the same file system."""
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True)
    handle, name = tempfile.mkstemp(prefix="write-", dir=temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
