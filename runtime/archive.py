"""The one-file form of a kernel cache: a zip file whose index holds the checksum of every member."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fuser.ir.errors import CacheError
from fuser.runtime.entries import FORMAT, KEY

KERNEL_MEMBER = re.compile(rf"kernels/({KEY.pattern})/(kernel\.so|source\.cpp|manifest\.json)")
RECORD_MEMBER = re.compile(r"records/([A-Za-z_][A-Za-z0-9_]*)/([0-9a-f]{64})\.json")
PLAN_MEMBER = re.compile(r"plans/([0-9a-f]{64}\.plan)")
_MAX_ARCHIVE_BYTES = 4 << 30


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    """Write ``members`` (name to content) to ``path`` at once. Raises :class:`CacheError` if it cannot be written."""
    index = {"format": FORMAT, "members": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {"index.json": json.dumps(index).encode(), **members}.items():
                # A fixed date: the same kernels give the same file.
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CacheError(f"cannot write the archive {path}: {error}") from error


def read_archive(path: Path) -> dict[str, bytes]:
    """The members of an archive, in memory: names are matched, never used as paths. Raises :class:`CacheError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            known = (KERNEL_MEMBER, RECORD_MEMBER, PLAN_MEMBER)
            strange = [name for name in names if not any(member.fullmatch(name) for member in known)]
            if strange != ["index.json"] or len(set(names)) != len(names):
                raise CacheError(f"{path} is not an archive of a kernel cache: it holds {sorted(strange)[:5]}")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
                raise CacheError(f"{path} is not an archive of a kernel cache: it is compressed in another way")
            if sum(info.file_size for info in infos) > _MAX_ARCHIVE_BYTES:
                raise CacheError(f"the archive {path} unpacks to more than {_MAX_ARCHIVE_BYTES >> 30} GiB")
            members = {name: archive.read(name) for name in names}
        index = json.loads(members.pop("index.json"))
        if index["format"] != FORMAT:
            raise CacheError(f"the archive {path} has format {index['format']}; this version of fuser reads {FORMAT}")
        if index["members"] != {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}:
            raise CacheError(f"the archive {path} is damaged: its content does not match its index")
    except OSError as error:
        raise CacheError(f"cannot read the archive {path}: {error}") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise CacheError(f"{path} is not an archive of a kernel cache, or is damaged: {error}") from error
    return members
