"""A study in a real PostgreSQL, which is started here by a user that is not root."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuser.ir.errors import SearchError
from fuser.search.ledger import list_studies, open_study

TESTS = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("study_tests", TESTS / "test_study.py")
assert _spec is not None and _spec.loader is not None
studies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(studies)


def binaries() -> Path | None:
    """The newest server's programs: Debian keeps them out of the PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name.split(".")[0]))
    return versions[-1] if versions else None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database."""
    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip('PostgreSQL needs a driver: pip install "psycopg[binary]"')
    as_user: list[str] = []
    root = tmp_path_factory.mktemp("postgres")
    if os.geteuid() == 0:
        # The server refuses to run as root.
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL cannot run as root, and there is no user called postgres")
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL cannot run as root, and there is no runuser")
        as_user = ["runuser", "-u", "postgres", "--"]
        root = Path("/tmp") / f"fuser-postgres-{os.getpid()}"
        root.mkdir(mode=0o700)
        os.chown(root, account.pw_uid, account.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = root / "data"
    environment = {**os.environ, "LC_ALL": "C"}

    def call(*command: str | Path) -> None:
        done = subprocess.run(
            [*as_user, *map(str, command)], capture_output=True, cwd="/", env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()

    call(folder / "initdb", "-D", data, "-U", "fuser", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -k {root} -c listen_addresses=127.0.0.1 -c fsync=off"
    subprocess.run(
        [*as_user, str(folder / "pg_ctl"), "-D", str(data), "-w", "-l", str(root / "log"), "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        timeout=120,
    )
    try:
        yield f"postgresql://fuser@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*as_user, str(folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"],
            cwd="/",
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        shutil.rmtree(root, ignore_errors=True)


def test_a_study_in_postgres_is_shared_and_read(server: str) -> None:
    studies.share(server)
    view = open_study("s", server)
    assert view.best is not None and view.default is not None
    assert list_studies(server) == ["s"]
    with pytest.raises(SearchError, match="no study 'other'"):
        open_study("other", server)


def test_a_study_in_postgres_is_resumed(server: str, tmp_path: Path) -> None:
    first = studies.run(tmp_path, study="again", storage=server, trials=6)
    second = studies.run(tmp_path, study="again", storage=server, trials=10)
    assert (first.trials, second.trials) == (6, 10)
    assert second.seconds <= first.seconds
