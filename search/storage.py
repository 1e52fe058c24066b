"""Where studies live: Optuna's journal files, SQLite, or a database server by its URL."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from fuser.ir.errors import SearchError
from fuser.runtime.cache import default_cache

_LOCK_SECONDS = 20.0
_LINE_START = b'{"op_code":'
"""What every line of a journal starts with."""


def default_storage() -> str:
    """The folder ``studies`` of the kernel cache, which keeps a journal file for every study."""
    return str(default_cache().root / "studies")


def located(storage: str | None, study: str) -> str:
    """The storage that a study is in: of a folder (the default), its journal file there."""
    where = default_storage() if storage is None else storage
    if storage is None or ("://" not in where and Path(where).expanduser().is_dir()):
        return str(Path(where).expanduser().absolute() / f"{quote(study, safe='')}.journal")
    return where


def studies_in(folder: Path) -> list[str]:
    """Names of the studies in a folder, by the age of their files, the newest last."""
    found = []
    for path in folder.glob("*.journal"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path.name))
    return [unquote(name.removesuffix(".journal")) for _, name in sorted(found)]


def shown(storage: str) -> str:
    """A storage's name without the password in it."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", storage)


def open_storage(name: str, *, create: bool = True) -> tuple[BaseStorage, str]:
    """The storage at a path (``.db`` and ``.sqlite``: SQLite, else a journal file) or URL, and its full name.

    Raises SearchError when it is not there and not to be made, cannot be reached or written, or is of another version.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with translated(name):
        if "://" not in name:
            path = Path(name).expanduser().absolute()
            if not path.is_file() and (path.exists() or not create):
                raise SearchError(f"there are no studies at {path}" if not path.exists() else f"{path} is not a file")
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix not in (".db", ".sqlite", ".sqlite3"):
                if not os.access(path if path.exists() else path.parent, os.W_OK):
                    raise SearchError(f"{path} cannot be written, so no study can be kept there")
                return JournalStorage(_Journal(str(path))), str(path)
            name = f"sqlite:///{path}"
        elif name.startswith("sqlite:///") and not create and not Path(name.removeprefix("sqlite:///")).is_file():
            raise SearchError(f"there are no studies at {name}")
        url = _with_driver(name)
        engine: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            engine = {"connect_args": {"timeout": _LOCK_SECONDS}}
        elif "+psycopg" in url:
            # A server without an encoding answers in bytes otherwise.
            engine["connect_args"] = {"client_encoding": "utf8"}
        return _database(url, engine), name


class _Journal(JournalFileBackend):
    """A journal that goes on where its last line was cut short, as on a disk that was full: Optuna would write the next
    line behind it, and could read neither, nor what follows."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._own_lock = JournalFileSymlinkLock(path)
        super().__init__(path, self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._own_lock.acquire()
        try:
            self._mend()
        finally:
            self._own_lock.release()
        super().append_logs(logs)

    def _mend(self) -> None:
        with self._path.open("rb+") as file:
            if not file.seek(0, os.SEEK_END):
                return
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            if content[start : start + len(_LINE_START)] != _LINE_START[: len(content) - start]:
                raise ValueError("its last line is not of a journal")
            file.truncate(start)


def _database(url: str, engine: dict[str, Any]) -> RDBStorage:
    """A database, with its tables. Raises what SQLAlchemy raises."""
    import sqlalchemy.exc

    for attempt in itertools.count(1):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except sqlalchemy.exc.DBAPIError as error:
            # Another process makes the same tables at this moment.
            if attempt >= 10 or not re.search("already exists|duplicate key|UNIQUE constraint", str(error)):
                raise
            time.sleep(0.1 * attempt)
    raise AssertionError


def _with_driver(url: str) -> str:
    """A PostgreSQL URL that names the installed driver."""
    if re.match(r"postgres(ql)?://", url):
        if importlib.util.find_spec("psycopg") is not None:
            return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
        if importlib.util.find_spec("psycopg2") is None:
            raise SearchError('a study in PostgreSQL needs a driver: pip install "psycopg[binary]"')
    return url


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn what storages raise into SearchError, with what the user can do."""
    import sqlalchemy.exc

    shown_name = shown(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    except SearchError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        if "locked" in cause:
            hint = "another program holds it; end that, or use a journal file or PostgreSQL for many processes"
        else:
            hint = "check that it can be reached and written; what was measured before is kept"
        raise SearchError(f"the storage {shown_name} failed ({cause}): {hint}") from error
    except ImportError as error:
        raise SearchError(f"the storage {shown_name} needs a database driver that is not installed: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise SearchError(
            f"the storage {shown_name} failed ({reason}): make room or choose another place; what was measured before "
            "is kept, and the study can be resumed"
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "version" in str(error):
            raise SearchError(f"the storage {shown_name} is of another version of Optuna: {error}") from error
        # Damaged lines of a journal, rows of a database, or another program's file: Optuna asserts, recurses, looks up.
        raise SearchError(
            f"the storage {shown_name} cannot be read ({type(error).__name__}: {error!s:.200}): it is damaged or no "
            "storage of studies; use another file, or put this one back from a copy"
        ) from error
