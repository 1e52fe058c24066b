"""The one-file form of a kernel cache: a zip file whose index holds the checksum of every member."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

from fuser.ir.errors import CacheError
from fuser.runtime.entries import FORMAT, KEY

KERNEL_MEMBER = re.compile(rf"kernels/({KEY.pattern})/(kernel\.so|source\.cpp|manifest\.json)")
RECORD_MEMBER = re.compile(r"records/([A-Za-z_][A-Za-z0-9_]*)/([0-9a-f]{64})\.json")
PLAN_MEMBER = re.compile(r"plans/([0-9a-f]{64}\.plan)")
_LEAST_LIMIT = 64 << 20
_EXPANSION = 64
"""How many times its own size an archive may unpack to by default; kernels compress four to ten times."""


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


def read_archive(path: Path, max_bytes: int | None = None) -> dict[str, bytes]:
    """The members of an archive, in memory: names are matched, never used as paths.

    Raises :class:`CacheError` for a file that is no archive or is damaged, and for one that unpacks to more than
    ``max_bytes``, by default 64 MiB or 64 times its own size. What is unpacked counts, not what the archive says.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"cannot read the archive {path}: it is not a file")
        left = max(_LEAST_LIMIT, _EXPANSION * status.st_size) if max_bytes is None else max_bytes
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            known = (KERNEL_MEMBER, RECORD_MEMBER, PLAN_MEMBER)
            strange = [name for name in names if not any(member.fullmatch(name) for member in known)]
            if strange != ["index.json"] or len(set(names)) != len(names):
                raise CacheError(f"{path} is not an archive of a kernel cache: it holds {sorted(strange)[:5]}")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
                raise CacheError(f"{path} is not an archive of a kernel cache: it is compressed in another way")
            members: dict[str, bytes] = {}
            for info in infos:
                with archive.open(info) as file:
                    members[info.filename] = content = file.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise CacheError(
                        f"the archive {path} unpacks to far more than its size; if you trust where it comes from, "
                        "raise the limit with `fuserc cache import --max-size`"
                    )
        index = json.loads(members.pop("index.json"))
        if index["format"] != FORMAT:
            raise CacheError(f"the archive {path} has format {index['format']}; this version of fuser reads {FORMAT}")
        if index["members"] != {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}:
            raise CacheError(f"the archive {path} is damaged: its content does not match its index")
    except OSError as error:
        raise CacheError(f"cannot read the archive {path}: {error}") from error
    except CacheError:
        raise
    except Exception as error:  # whatever the parsers of zip and JSON find wrong
        raise CacheError(f"{path} is not an archive of a kernel cache, or is damaged: {error}") from error
    return members
