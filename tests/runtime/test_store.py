"""The directory of the cache among other processes: cleared, killed, replaced by what is no file of ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuser.ir.errors import CacheError
from fuser.runtime import store
from fuser.runtime.cache import KernelCache
from fuser.runtime.entries import KernelKey, kernel_key


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


def _key(text: str = "int x;") -> KernelKey:
    return kernel_key(symbol="kernel", text=text, headers={}, target="t", compiler="c", flags=())


def _publish(cache: KernelCache, folder: Path, text: str = "int x;") -> KernelKey:
    (folder / "built.so").write_bytes(b"library")
    key = _key(text)
    cache.publish(key, symbol="kernel", library=folder / "built.so", text=text, compiler="c", target="t")
    return key


# ---- what is no file of ours


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the names of sockets are short
        made.bind(path.name)


def _outside(path: Path) -> None:
    other = path.parents[3] / "outside"
    other.write_bytes(b"library")
    path.symlink_to(other)


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "link": _outside,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["kernel.so", "manifest.json"])
def test_what_is_no_file_is_never_read_and_is_replaced(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    key = _publish(cache, tmp_path)
    path = cache.root / "kernels" / key.digest[:2] / key.digest / name
    path.unlink()
    PLACES[place](path)
    other = KernelCache(cache.root)
    assert other.get(key.digest) is None
    assert [found for found, _ in other.verify().damaged] == [key.digest]
    assert other.entries() == [] or name == "kernel.so"
    other.export(tmp_path / "archive")
    _publish(other, tmp_path)
    assert other.get(key.digest) is not None and other.verify().damaged == ()


@pytest.mark.parametrize("place", PLACES)
def test_records_and_plans_that_are_no_files_are_misses(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cache.write_record("tuning", "a", {"x": 1})
    cache.write_plan("mask", "a mask", b"plan")
    for path in [*(cache.root / "records" / "tuning").iterdir(), *(cache.root / "plans").iterdir()]:
        path.unlink()
        PLACES[place](path)
    assert cache.read_record("tuning", "a") is None and cache.read_plan("mask") is None
    assert list(cache.records("tuning")) == [] and cache.plans() == [] and len(cache.verify().damaged) == 2


@pytest.mark.parametrize("at", ["kernels", "part", "folder", "kernel.so", "manifest.json"])
@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH])
def test_code_that_others_could_have_written_is_not_used(
    cache: KernelCache, tmp_path: Path, at: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    key = _publish(cache, tmp_path)
    folder = cache.root / "kernels" / key.digest[:2] / key.digest
    path = {"kernels": folder.parent.parent, "part": folder.parent, "folder": folder}.get(at, folder / at)
    path.chmod(path.stat().st_mode | mode)
    assert KernelCache(cache.root).get(key.digest) is None
    assert "could put code into it" in caplog.text and "chmod" in caplog.text and str(path) in caplog.text


def test_code_of_another_user_is_not_used(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = _publish(cache, tmp_path)
    other = KernelCache(cache.root)
    (cache.root / "kernels" / key.digest[:2] / key.digest / "kernel.so").stat()
    monkeypatch.setattr(store.os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid() == 0:  # what the administrator has written is trusted
        assert other.get(key.digest) is not None
    else:
        assert other.get(key.digest) is None and "another user" in caplog.text


def test_what_is_published_is_private_whatever_the_umask_is(cache: KernelCache, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        key = _publish(cache, tmp_path)
    finally:
        os.umask(before)
    assert KernelCache(cache.root).get(key.digest) is not None


# ---- processes that die


_KILLED = """
import sys, time
from pathlib import Path
from fuser.runtime.cache import KernelCache
with KernelCache(Path(sys.argv[1])).workspace() as folder:
    (folder / "half").write_bytes(bytes(1 << 20))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_process_go_at_the_next_sweep_and_work_in_progress_stays(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_GRACE_SECONDS", 0.0)
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(cache.root)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        folder = Path(child.stdout.readline().strip())
        cache.sweep()
        assert (folder / "half").exists(), "its writer lives"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with cache.workspace() as mine:
        cache.sweep()
        KernelCache(cache.root)
        assert not folder.exists() and mine.exists()
    assert list((cache.root / "tmp").iterdir()) == []


def test_nothing_that_was_made_a_moment_ago_is_swept(cache: KernelCache) -> None:
    (cache.root / "tmp" / "new").mkdir()
    cache.sweep()
    assert (cache.root / "tmp" / "new").exists()


@pytest.mark.parametrize("days", [-1, 1, 400])
def test_a_clock_that_is_wrong_removes_nobodys_work(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + days * 86_400)
    with cache.workspace() as folder:
        KernelCache(cache.root).sweep()
        assert folder.exists()


# ---- processes that clear


@pytest.fixture
def clearing(cache: KernelCache) -> Iterator[None]:
    """Something that clears the cache, or removes all of it, again and again."""
    done = threading.Event()

    def clear() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            if turn % 2:
                KernelCache(cache.root).clear()
            else:
                shutil.rmtree(cache.root, ignore_errors=True)

    thread = threading.Thread(target=clear)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("clearing")
def test_beside_a_process_that_clears_nothing_fails_and_the_folder_stays(cache: KernelCache, tmp_path: Path) -> None:
    root = cache.root
    for i in range(40):
        _publish(cache, tmp_path, f"int x{i};")
        cache.write_record("tuning", str(i), {"x": i})
        cache.write_plan(str(i), "a mask", b"plan")
        cache.prune(0)
        cache.verify()
        cache.export(tmp_path / "archive")
        list(cache.records("tuning"))
        cache.entries(), cache.plans(), cache.size(), cache.explain(_key())
        cache.keep_failure(_key().digest, "int x", {"a.h": b"a"}, "no")
        with cache.workspace() as folder:
            assert folder.is_relative_to(root)
    assert cache.root == cache.home == root and cache.refusal is None


def test_a_cache_that_cannot_be_written_says_what_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    cache = KernelCache(tmp_path / "file" / "cache")
    assert cache.home == tmp_path / "file" / "cache" != cache.root
    assert cache.refusal is not None and "writ" in store.remedy(cache.refusal)
    assert "free some space" in store.remedy(OSError(28, "No space left on device"))
    monkeypatch.setattr(store.os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CacheError, match="free some space"), cache.workspace():
        pass


def test_what_is_written_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, path = tmp_path / "tmp", tmp_path / "folder" / "file"
    temporary.mkdir()
    store.write_atomic(path, b"first", temporary)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            store.write_atomic(path, b"second", temporary)
    assert path.read_bytes() == b"first" and list(temporary.iterdir()) == []
    store.write_atomic(path, b"second", temporary)
    assert store.read_regular(path) == b"second" and store.read_regular(path, 3) == b"sec"


def test_a_failure_that_no_other_directory_mends_is_raised_at_once(cache: KernelCache) -> None:
    tries = []

    def write(root: Path) -> None:
        tries.append(root)
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        cache.writing(write)
    assert tries == [cache.home] and cache.refusal is None


def test_what_is_removed_is_gone_and_what_is_not_there_is_too(cache: KernelCache, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    assert cache.remove(folder) and not folder.exists() and cache.remove(folder)
    assert list((cache.root / "tmp").iterdir()) == []
